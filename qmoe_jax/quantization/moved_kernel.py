"""A kernel moved so that, behind quantized inputs, it puts out what it did behind exact ones.

An expert puts out y = h W, where h is the hidden layer of its exact wi. Behind the quantized wi the
hidden layer is h', and GPTQ with the Hessian of h' makes the quantized wo put out h' W: what h' has
lost is accepted. Better to aim at h W itself. What comes nearest to it behind h', in least squares
damped as GPTQ damps, is

    W' = W + (H' + damping mean(diag H') I)^-1 h'^T (h - h') W,    H' = h'^T h',

and GPTQ then quantizes W' with H'. The idea is GPTAQ's (arXiv 2504.02692), which corrects in every
layer for all layers before it; here it is for the one kernel before it in the same expert, which
needs no second stream of hidden states. On the demo model that stream gained nothing more
(docs/verification.md).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import cho_factor, cho_solve
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float


class Missing(NamedTuple):
    """What a batch of experts misses, summed over tokens.

    Attributes:
      sums: float32, h'^T (h - h') W.
    """

    sums: Float[Array, "experts in out"]


def update_missing(
    state: Missing,
    hidden: Float[Array, "experts tokens in"],
    exact: Float[Array, "experts tokens in"],
    kernel: Float[Array, "experts in out"],
    real: Bool[Array, "experts tokens"],
) -> Missing:
    """Add a chunk of tokens.

    Args:
      state: the sums so far.
      hidden: h', each expert's own tokens.
      exact: h, of the same tokens.
      kernel: W.
      real: which of them are tokens; what the others hold does not matter, NaN included.
    """
    hidden, exact = (
        jnp.where(real[..., None], array.astype(jnp.float32), 0.0) for array in (hidden, exact)
    )
    highest = lax.Precision.HIGHEST  # no TF32, as in Hessians
    kernel = kernel.astype(jnp.float32)
    lost = jnp.einsum("eti,eio->eto", exact - hidden, kernel, precision=highest)
    return Missing(state.sums + jnp.einsum("eti,eto->eio", hidden, lost, precision=highest))


@functools.partial(jax.jit, static_argnames="mesh")
def moved_kernels(
    kernels: Float[Array, "experts in out"],
    hessian_sums: Float[Array, "experts in in"],
    missing: Missing,
    damping: float | Float[Array, ""],
    *,
    mesh: Mesh | None = None,
) -> Float[Array, "experts in out"]:
    """Return W' of each expert, float32; W where that is not finite, or no tokens were seen.

    Args:
      kernels: W.
      hessian_sums: H' = h'^T h' over the tokens that `missing` has seen.
      missing: of the same experts.
      damping: share of the mean diagonal that is added to the diagonal.
      mesh: of one axis, over which the experts are sharded.
    """

    def move(own: tuple[Array, Array, Array]) -> Array:
        kernel, hessian, sums = own
        kernel = kernel.astype(jnp.float32)
        ridge = damping * jnp.mean(jnp.diagonal(hessian))
        factor = cho_factor(hessian + ridge * jnp.eye(len(hessian)), lower=True)
        moved = kernel + cho_solve(factor, sums)
        return jnp.where(jnp.all(jnp.isfinite(moved)), moved, kernel)

    # One after another: a factorisation is large, and fills a device by itself.
    batch = functools.partial(lax.map, move)
    if mesh is not None and mesh.size > 1:
        split = PartitionSpec(mesh.axis_names[0])
        batch = jax.shard_map(batch, mesh=mesh, in_specs=(split,), out_specs=split)
    return batch((kernels, hessian_sums, missing.sums))
