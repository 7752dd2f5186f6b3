"""Coded tensors to codes and weights with XLA, under jit, one traced expert at a time."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import BFloat16, Float, Int, UInt8

from qmoe_jax.codec.codings import get_coding
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
    """Weights of codes: 0, low or high for ternary codes; scale * (code - zero) for 2-bit codes.

    Computed in float32, then rounded to `dtype`: ternary weights are exact in bfloat16.
    """
    first, second = jnp.split(levels.astype(jnp.float32), 2, axis=-1)
    if get_coding(spec.coding).grid == "ternary":
        weights = jnp.where(codes == 1, first, jnp.where(codes == 2, second, 0.0))
    else:
        weights = first * (codes.astype(jnp.float32) - second)
    return weights.astype(dtype)


def decode_expert_weights(
    spec: TensorSpec,
    arrays: Arrays,
    expert: Int[jax.Array, ""] | int,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
) -> Float[jax.Array, "rows width"]:
    """Decode the weights of one expert, [rows, width] (a Flax kernel is the transpose)."""
    codes = decode_expert(spec, arrays, expert)
    if get_coding(spec.coding).grid == "lattice":
        own = {
            name: jnp.take(jnp.asarray(arrays[name]), expert, axis=0, mode="clip")
            for name in ("step_index", "origin")
        }
        return lattice_weights(codes, own["step_index"], own["origin"], dtype)
    levels = jnp.take(jnp.asarray(arrays["levels"]), expert, axis=0, mode="clip")
    return dequantize(spec, codes, levels, dtype)


def lattice_weights(
    codes: UInt8[jax.Array, "rows width"],
    step_index: UInt8[jax.Array, " width"],
    origin: Float[jax.Array, ""],
    dtype: jax.typing.DTypeLike,
) -> Float[jax.Array, "rows width"]:
    """Weights of lattice codes: 2 k - 1 is -k and 2 k is k steps of origin * 2^(-index / 16)."""
    table = np.exp2(-np.arange(256) / 16).astype(np.float32)
    half = (codes.astype(jnp.int32) + 1) >> 1
    multiples = jnp.where(codes & 1, -half, half).astype(jnp.float32)
    return (multiples * (origin * jnp.asarray(table)[step_index])).astype(dtype)
