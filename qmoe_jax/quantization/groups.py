"""Groups of input features: `group_size` neighbours of an output row that have levels of their own.

The codec knows rows only, each with its two levels. A kernel `[in, out]` in groups is stored as
`out * groups` rows of `group_size` weights: the groups of the first output feature, then those of
the second. One group, the whole row, is the usual case.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from qmoe_jax.quantization.grids import Grid


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


def fit_groups(
    grid: Grid, kernel: Float[Array, "in out"], group_size: int | None
) -> Float[Array, "groups out 2"]:
    """Return the levels of every group."""
    groups = num_groups(kernel.shape[0], group_size)
    return jax.vmap(grid.fit)(kernel.reshape(groups, -1, kernel.shape[1]))


def rows_of_levels(levels: Float[Array, "groups out 2"]) -> Float[Array, "rows 2"]:
    """Reorder levels as the codec stores them: all groups of an output feature together."""
    return jnp.swapaxes(levels, 0, 1).reshape(-1, 2)


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


def quantize_groups(
    grid: Grid, kernel: Float[Array, "in out"], levels: Float[Array, "groups out 2"]
) -> Shaped[Array, "in out"]:
    """Return the nearest code of each weight."""
    grouped = kernel.reshape(levels.shape[0], -1, kernel.shape[1])
    return jax.vmap(grid.quantize)(grouped, levels).reshape(kernel.shape)


def dequantize_groups(
    grid: Grid, codes: Shaped[Array, "in out"], levels: Float[Array, "rows 2"]
) -> Float[Array, "in out"]:
    """Return the float32 value of each code of a kernel; levels as the codec stores them."""
    by_group = jnp.swapaxes(levels.reshape(codes.shape[1], -1, 2), 0, 1)
    grouped = codes.reshape(by_group.shape[0], -1, codes.shape[1])
    return jax.vmap(grid.dequantize)(grouped, by_group).reshape(codes.shape)
