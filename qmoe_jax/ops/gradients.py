"""Reverse mode of experts' products, whatever computes them: one expert's kernels at a time.

The loops over experts have as many turns as experts have tokens, which JAX cannot reverse, and
kernels from codes by "cpu" or "cuda" come from callbacks. So the rule is our own. Only tokens are
kept; the backward pass is another loop over experts (`grouped_fold`), each fetched or expanded once
more, so its memory is that of the tokens and of one expert. Arrays of floats behind kernels get
gradients if they are asked for, summed expert by expert; codes have none.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from qmoe_jax.ops.experts import Experts, is_float
from qmoe_jax.ops.grouped_mlp import KernelFetch, grouped_fold
from qmoe_jax.varying import varying_zeros

# Tokens, their experts, the kernels, factors of hidden layers, to a row for each token.
Forward = Callable[[Array, Array, Sequence[Experts], Array | None], Array]
# A block of an expert's tokens, its kernels in the activation dtype, its factors, to outputs.
Block = Callable[[Array, Sequence[Array], Array | None], Array]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Wanted:
    """Whether gradients are asked for: of tokens, and of which arrays of each kernel."""

    x: bool
    arrays: tuple[frozenset[str], ...]


def differentiable(
    forward: Forward,
    block: Block,
    fetch: Callable[[Experts], KernelFetch],
    x: Float[Array, "tokens in"],
    expert_index: Int[Array, "tokens"],
    kernels: Sequence[Experts],
    hidden_scale: Float[Array, "experts mlp"] | None = None,
    *,
    num_experts: int,
) -> Float[Array, "tokens out"]:
    """forward(x, expert_index, kernels, hidden_scale), with a gradient.

    Args:
      forward: the computation; need not be differentiable.
      block: what it computes for one expert's tokens, each row of its own: differentiable.
      fetch: how the loop gets a kernel of which no gradient is asked for.
      x: tokens.
      expert_index: expert of each token in [0, num_experts); a negative index yields zeros.
      kernels: of all experts.
      hidden_scale: not differentiated.
      num_experts: number of experts.

    Returns:
      What `forward` does.
    """
    # JAX keeps the functions below in caches, so they hold no arrays, which may be tracers.
    layouts = [kernel.layout() for kernel in kernels]

    def whole(arrays: Sequence[dict[str, Array]]) -> list[Experts]:
        return [make(own) for make, own in zip(layouts, arrays, strict=True)]

    @jax.custom_vjp
    def product(x: Array, index: Array, arrays: list[dict[str, Array]], scale: Any) -> Array:
        return forward(x, index, whole(arrays), scale)

    def keep(x: Any, index: Any, arrays: Any, scale: Any) -> tuple[Array, Any]:
        values = jax.tree.map(lambda leaf: leaf.value, (x, index, arrays, scale))
        asked = tuple(frozenset(n for n, leaf in own.items() if leaf.perturbed) for own in arrays)
        return product(*values), (_Wanted(x.perturbed, asked), *values)

    def pull(kept: Any, dy: Any) -> tuple[Any, ...]:
        wanted, x, index, arrays, scale = kept
        if isinstance(dy, jax.custom_derivatives.SymbolicZero):
            return None, None, None, None
        dx, sums = _pull(block, fetch, x, dy, index, whole(arrays), scale, wanted, num_experts)
        # None: nothing, or an array that no gradient is asked of.
        gradients = [
            {name: own.get(name) for name in kernel}
            for kernel, own in zip(arrays, sums, strict=True)
        ]
        return dx, None, gradients, None

    product.defvjp(keep, pull, symbolic_zeros=True)
    return product(x, expert_index, [kernel.by_name for kernel in kernels], hidden_scale)


def _pull(
    block: Block,
    fetch: Callable[[Experts], KernelFetch],
    x: Float[Array, "tokens in"],
    dy: Float[Array, "tokens out"],
    expert_index: Int[Array, "tokens"],
    kernels: Sequence[Experts],
    hidden_scale: Float[Array, "experts mlp"] | None,
    wanted: _Wanted,
    num_experts: int,
) -> tuple[Float[Array, "tokens in"], list[dict[str, Array]]]:
    """Return the gradients of tokens and of the arrays that are wanted, by kernel and name."""
    in_features = x.shape[1]
    sources = [array for kernel in kernels for array in kernel.by_name.values()]
    sources += [] if hidden_scale is None else [hidden_scale]
    like = (x, dy, expert_index, *sources)
    trained = [i for i, names in enumerate(wanted.arrays) if names]

    def begin(expert: Array) -> tuple[Any, dict[int, Array]]:
        fetched: list[Array] = []
        pulls: dict[int, Callable[[Array], Any]] = {}
        for i, kernel in enumerate(kernels):
            if i in trained:
                floats = kernel.floats(expert)
                own = {name: floats.pop(name) for name in sorted(wanted.arrays[i])}

                def weights(own: Any, kernel: Any = kernel, others: Any = floats) -> Array:
                    return kernel.weights({**others, **own}, expert)

                weight, pulls[i] = jax.vjp(weights, own)
                fetched.append(weight.astype(x.dtype))
            else:
                fetched.append(fetch(kernel)(expert))
        scale = None
        if hidden_scale is not None:
            scale = lax.dynamic_index_in_dim(hidden_scale, expert, keepdims=False)
        # Of one expert, and in float32 whatever kernels are computed in.
        partial = {i: varying_zeros(fetched[i].shape, jnp.float32, *like) for i in trained}
        return (fetched, scale, pulls), partial

    def run(tokens: Array, mine: Array, begun: Any, partial: Any) -> tuple[Array, Any]:
        fetched, scale, _ = begun
        own, down = tokens[:, :in_features], tokens[:, in_features:]

        def of_trained(own: Array, weights: dict[int, Array]) -> Array:
            used = list(fetched)
            for i, weight in weights.items():
                used[i] = weight
            return block(own, used, scale)

        _, pull = jax.vjp(of_trained, own, {i: fetched[i] for i in trained})
        dx, weights = pull(jnp.where(mine, down, 0))
        return dx, {i: partial[i] + weights[i].astype(jnp.float32) for i in trained}

    def end(expert: Array, begun: Any, partial: Any, sums: Any) -> Any:
        for i, pull in begun[2].items():
            (found,) = pull(partial[i])
            for name, value in found.items():
                at = expert if sums[i][name].shape[0] > 1 else 0
                sums[i][name] = sums[i][name].at[at].add(value)
        return sums

    zeros = [
        {name: varying_zeros(_array(kernels[i], name).shape, jnp.float32, *like) for name in names}
        for i, names in enumerate(wanted.arrays)
    ]
    dx, sums = grouped_fold(
        jnp.concatenate([x, dy.astype(x.dtype)], axis=1),
        expert_index,
        num_experts=num_experts,
        out_features=in_features,
        begin=begin,
        run=run,
        end=end,
        sums=zeros,
        fetched_from=sources,
    )
    gradients = [
        {name: value.astype(_array(kernels[i], name).dtype) for name, value in own.items()}
        for i, own in enumerate(sums)
    ]
    return dx, gradients


def _array(kernel: Experts, name: str) -> Array:
    array = kernel.by_name[name]
    assert is_float(array), f"{name} is {array.dtype} and has no gradient"
    return array
