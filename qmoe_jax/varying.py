"""Zeros that a loop or a branch may begin with inside `jax.shard_map` too."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Shaped


def varying_zeros(
    shape: Sequence[Any], dtype: DTypeLike, *like: Shaped[Array, "..."]
) -> Shaped[Array, "..."]:
    """Return zeros that vary over the devices over which any of `like` does.

    The types of `jax.shard_map` (`check_vma`) say over which devices an array differs. A loop must
    end with the type that it began with, and the branches of a condition have one type; that of
    `jnp.zeros` is to differ nowhere. JAX's names for the conversion changed from version to
    version, so here the type is that of sums of nothing: exactly 0 whatever `like` holds, which
    XLA folds into the constant that `jnp.zeros` is.

    Args:
      shape: of the zeros; while `jax.export` traces, a dimension may be symbolic.
      dtype: of the zeros.
      like: any arrays.
    """
    nothing = jnp.zeros((), dtype)
    for array in like:
        nothing = nothing + jnp.sum(jnp.atleast_1d(array)[:0]).astype(dtype)
    return jnp.broadcast_to(nothing, shape)


def varying_as(tree: Any, like: Any) -> Any:
    """Return arrays of a tree, of the same values, that vary where any leaf of another tree does.

    Args:
      tree: of numbers and truth values.
      like: any arrays.
    """
    nothing = varying_zeros((), jnp.float32, *jax.tree.leaves(like))

    def vary(array: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
        zeros = varying_zeros(array.shape, array.dtype, nothing)
        return array | zeros if array.dtype == bool else array + zeros

    return jax.tree.map(vary, tree)
