"""Hessians of the layer error, one an expert, summed over chunks of calibration tokens.

For outputs y = x W the squared error of a quantized W is quadratic, with the same Hessian
H = 2/n X^T X for every output feature (GPTQ, section 2). The 2/n only sets the unit: damping is
relative to the mean diagonal.

Typical use, with chunks of one fixed shape so that `update_hessian` compiles once:

    state = init_hessian(num_experts, num_in)
    for tokens, mask in chunks:
        state = update_hessian(state, tokens, mask)
    hessians, token_counts = finalize_hessian(state)
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float


class HessianState(NamedTuple):
    """The running sums of an expert batch.

    Attributes:
      sums: float32 `[experts, in, in]`, X^T X over the tokens so far.
      token_counts: float32 `[experts]`, the sum of their weights; exact up to 2^24 whole tokens.
    """

    sums: Float[Array, "experts in in"]
    token_counts: Float[Array, " experts"]


def init_hessian(num_experts: int, num_in: int) -> HessianState:
    """Return the state before the first token."""
    return HessianState(
        sums=jnp.zeros((num_experts, num_in, num_in), jnp.float32),
        token_counts=jnp.zeros(num_experts, jnp.float32),
    )


@functools.partial(jax.jit, donate_argnums=0)
def update_hessian(
    state: HessianState,
    tokens: Float[Array, "experts tokens in"],
    mask: Float[Array, "experts tokens"] | Bool[Array, "experts tokens"],
) -> HessianState:
    """Add a chunk of tokens. The buffers of `state` are donated: use the returned state only.

    Args:
      state: the sums so far.
      tokens: inputs of the kernel, float32 or bfloat16, each expert's own tokens.
      mask: the weight of each token, not negative: 1 (or True) counts it, 0 leaves it out
        whatever it holds, NaN included, so that chunks can be padded to a fixed shape.
    """
    weights = mask.astype(jnp.float32)
    tokens = jnp.where(weights[..., None] > 0, tokens.astype(jnp.float32), 0.0)
    products = jnp.einsum(
        "eti,etj->eij",
        tokens * weights[..., None],
        tokens,
        # No TF32 on accelerators: the small eigenvalues decide what GPTQ does.
        precision=lax.Precision.HIGHEST,
    )
    return HessianState(state.sums + products, state.token_counts + jnp.sum(weights, axis=1))


@jax.jit
def finalize_hessian(
    state: HessianState,
) -> tuple[Float[Array, "experts in in"], Float[Array, " experts"]]:
    """Hessians `2 / n X^T X` and token counts n; an expert without tokens has zeros and 0."""
    counts = state.token_counts
    scale = jnp.where(counts > 0, 2.0 / jnp.where(counts > 0, counts, 1.0), 0.0)
    return state.sums * scale[:, None, None], counts
