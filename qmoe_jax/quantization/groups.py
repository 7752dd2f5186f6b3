"""Groups of input features: `group_size` neighbours of an output row that have levels of their own.

The codec knows rows only, each with its two levels. A kernel `[in, out]` in groups is stored as
`out * groups` rows of `group_size` weights: the groups of the first output feature, then those of
the second. One group, the whole row, is the usual case.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped


def num_groups(num_in: int, group_size: int | None) -> int:
    """Return groups of a row of `num_in` weights; None is one.

    Raises:
      ValueError: the group size does not divide the row.
    """
    size = num_in if group_size is None else group_size
    if size < 1 or num_in % size:
        raise ValueError(
            f"group_size is {group_size}; it must divide the {num_in} input features of every "
            "expert kernel, or be None for whole rows"
        )
    return num_in // size


def stored_shape(num_in: int, num_out: int, group_size: int | None) -> tuple[int, int]:
    """Return (rows, width) of a kernel `[num_in, num_out]` as the codec stores it.

    Raises:
      ValueError: the group size does not divide the row.
    """
    groups = num_groups(num_in, group_size)
    return num_out * groups, num_in // groups


def rows_of_levels(levels: Float[Array, "groups out 2"]) -> Float[Array, "rows 2"]:
    """Reorder levels as the codec stores them: all groups of an output feature together."""
    return jnp.swapaxes(levels, 0, 1).reshape(-1, 2)


def levels_of_groups(rows: Float[Array, "rows 2"], num_out: int) -> Float[Array, "groups out 2"]:
    """Invert `rows_of_levels`."""
    return jnp.swapaxes(rows.reshape(num_out, -1, 2), 0, 1)


def rows_of_kernel(
    values: Shaped[Array, "*experts in out"], group_size: int | None
) -> Shaped[Array, "*experts rows width"]:
    """Reorder from the Flax orientation to the rows of the codec: the one place that does it."""
    *experts, num_in, num_out = values.shape
    rows = stored_shape(num_in, num_out, group_size)
    return jnp.swapaxes(values, -1, -2).reshape(*experts, *rows)


def kernel_of_rows(
    rows: Shaped[Array, "*experts rows width"], num_in: int
) -> Shaped[Array, "*experts in out"]:
    """Invert `rows_of_kernel`."""
    return jnp.swapaxes(rows.reshape(*rows.shape[:-2], -1, num_in), -1, -2)
