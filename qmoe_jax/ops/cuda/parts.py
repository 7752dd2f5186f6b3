"""float32 tokens as sums of what tensor cores multiply."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def split_float32(x: Float[Array, "..."]) -> list[Array]:
    """Three bfloat16 arrays whose sum is x, float32, exactly.

    But for what is below bfloat16's range: |x| from 2**-110 up splits exactly.
    """
    parts = []
    for _ in range(3):
        # reduce_precision, since XLA may leave out a conversion to bfloat16 and back.
        part = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        x = x - part
    return parts


def add_parts(y: Float[Array, "rows out"], num_parts: int) -> Float[Array, "tokens out"]:
    """Add up the products of tokens' parts, the smallest first.

    Args:
      y: those of all first parts, of all second ones, and so on.
      num_parts: of a token.
    """
    total, *larger = reversed(jnp.split(y, num_parts))
    for part in larger:
        total = part + total
    return total
