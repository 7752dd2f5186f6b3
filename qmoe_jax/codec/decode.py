"""Coded tensors to codes and weights with XLA, under jit, one traced expert at a time."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import BFloat16, Float, Int, UInt8

from qmoe_jax.codec.codings import get_coding
from qmoe_jax.codec.row_levels import row_weights
from qmoe_jax.codec.tensor import CodedTensor, TensorSpec

Arrays = Mapping[str, jax.Array | np.ndarray]


def device_arrays(coded: CodedTensor) -> dict[str, jax.Array]:
    """Put a coded tensor's arrays on the default device, as the decoders take them."""
    return {name: jnp.asarray(array) for name, array in coded.arrays.items()}


def decode_expert(
    spec: TensorSpec, arrays: Arrays, expert: Int[jax.Array, ""] | int
) -> UInt8[jax.Array, "rows width"]:
    """Decode the codes of one expert. Reference: `reference.decode`.

    Reads and writes stay in bounds whatever the arrays hold: a row that decodes short is filled
    with 0, a long one is cut off. To refuse such arrays is `codings.validate`'s part, on the host.

    Args:
      spec: static.
      arrays: all arrays of the coded tensor.
      expert: index below spec.num_experts; may be traced, also by vmap.
    """
    return get_coding(spec.coding).decode_expert(spec, arrays, expert)


def dequantize(
    spec: TensorSpec,
    codes: UInt8[jax.Array, "*rows width"],
    levels: BFloat16[jax.Array, "*rows 2"],
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
) -> Float[jax.Array, "*rows width"]:
    """Weights of ternary and 2-bit codes: 0, low or high; scale * (code - zero).

    Computed in float32, then rounded to `dtype`: ternary weights are exact in bfloat16.
    """
    return row_weights(get_coding(spec.coding).grid, codes, levels).astype(dtype)


def decode_expert_weights(
    spec: TensorSpec,
    arrays: Arrays,
    expert: Int[jax.Array, ""] | int,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
) -> Float[jax.Array, "rows width"]:
    """Decode the weights of one expert, [rows, width] (a Flax kernel is the transpose).

    Computed in float32, then rounded to `dtype`.
    """
    codes = decode_expert(spec, arrays, expert)
    return get_coding(spec.coding).weights(spec, arrays, expert, codes).astype(dtype)
