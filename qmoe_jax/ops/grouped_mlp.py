"""The expert MLP over tokens that are sorted by expert, one expert's kernels at a time.

Kernels are dense `[experts, in, out]` arrays, or codes that are expanded when an expert is
reached: an expert without tokens is neither read nor expanded.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from qmoe_jax.varying import varying_zeros

# An expert's kernel in the activation dtype, [in, out], for a traced scalar expert index.
KernelFetch = Callable[[Int[Array, ""]], Float[Array, "in out"]]
# Input projections [tokens, mlp] to the hidden layer.
Activation = Callable[[list[Array]], Array]


def grouped_mlp(
    x: Float[Array, "tokens embed"],
    expert_index: Int[Array, "tokens"],
    *,
    num_experts: int,
    fetch_wi: Sequence[KernelFetch],
    fetch_wo: KernelFetch,
    fetched_from: Sequence[Array] = (),
    activation: Activation,
    hidden_scale: Float[Array, "experts mlp"] | None = None,
    block_size: int = 128,
) -> Float[Array, "tokens embed"]:
    """activation(x wi) wo, with the kernels of each token's expert.

    Args:
      x: tokens in the activation dtype.
      expert_index: expert of each token in [0, num_experts); a negative index yields zeros.
      num_experts: number of experts.
      fetch_wi: one fetch for `wi`, two for gated `wi_0`, `wi_1`.
      fetch_wo: fetch for `wo`.
      fetched_from: see `grouped_apply`.
      activation: maps the list of input projections [block, mlp] to the hidden layer.
      hidden_scale: factors of an expert's hidden layer, for dropout; None: there are none.
      block_size: tokens that are multiplied at a time.

    Returns:
      Outputs in the order and dtype of `x`.
    """
    scales = [] if hidden_scale is None else [hidden_scale]

    def fetch(expert: Array) -> tuple[list[Array], Array, list[Array]]:
        own = [lax.dynamic_index_in_dim(s, expert, keepdims=False) for s in scales]
        return [fetch(expert) for fetch in fetch_wi], fetch_wo(expert), own

    def run(tokens: Array, fetched: tuple[list[Array], Array, list[Array]]) -> Array:
        wi, wo, own = fetched
        return mlp(tokens, wi, wo, activation, *own)

    return grouped_apply(
        x,
        expert_index,
        num_experts=num_experts,
        out_features=x.shape[1],
        fetch=fetch,
        fetched_from=[*fetched_from, *scales],
        run=run,
        block_size=block_size,
    )


def mlp(
    tokens: Float[Array, "block embed"],
    wi: Sequence[Float[Array, "embed mlp"]],
    wo: Float[Array, "mlp embed"],
    activation: Activation,
    hidden_scale: Float[Array, "mlp"] | None = None,
) -> Float[Array, "block embed"]:
    """activation(tokens wi) wo of one expert, its hidden layer scaled if asked."""
    precision = dot_precision(tokens)
    hidden = activation([jnp.dot(tokens, w, precision=precision) for w in wi])
    if hidden_scale is not None:
        hidden = hidden * hidden_scale.astype(hidden.dtype)
    return jnp.dot(hidden, wo, precision=precision)


def dot_precision(x: Array) -> lax.Precision | None:
    """float32 products in float32, where a device would take fewer bits."""
    return lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def grouped_apply(
    x: Float[Array, "tokens in"],
    expert_index: Int[Array, "tokens"],
    *,
    num_experts: int,
    out_features: int,
    fetch: Callable[[Int[Array, ""]], Any],
    run: Callable[[Float[Array, "block in"], Any], Float[Array, "block out"]],
    fetched_from: Sequence[Array] = (),
    block_size: int = 128,
) -> Float[Array, "tokens out"]:
    """run(tokens, fetch(expert)) for every expert that has tokens.

    Args:
      x: tokens.
      expert_index: expert of each token in [0, num_experts); a negative index yields zeros.
      num_experts: number of experts.
      out_features: width of what `run` returns.
      fetch: an expert's kernels, for a traced scalar index; called once an expert.
      run: a block of tokens through an expert; each row of its own.
      fetched_from: the arrays that `fetch` reads. Inside `jax.shard_map` outputs differ from device
        to device where any of them does.
      block_size: tokens that are run at a time.

    Returns:
      Outputs in the order and dtype of `x`.
    """
    return grouped_fold(
        x,
        expert_index,
        num_experts=num_experts,
        out_features=out_features,
        begin=lambda expert: (fetch(expert), ()),
        run=lambda tokens, mine, kernels, partial: (run(tokens, kernels), partial),
        end=lambda expert, kernels, partial, sums: sums,
        sums=(),
        fetched_from=fetched_from,
        block_size=block_size,
    )[0]


def grouped_fold(
    x: Float[Array, "tokens in"],
    expert_index: Int[Array, "tokens"],
    *,
    num_experts: int,
    out_features: int,
    begin: Callable[[Int[Array, ""]], tuple[Any, Any]],
    run: Callable[[Float[Array, "block in"], Bool[Array, "block 1"], Any, Any], tuple[Array, Any]],
    end: Callable[[Int[Array, ""], Any, Any, Any], Any],
    sums: Any,
    fetched_from: Sequence[Array] = (),
    block_size: int = 128,
) -> tuple[Float[Array, "tokens out"], Any]:
    """`grouped_apply`, with sums over the tokens of an expert, such as gradients of its kernels.

    Args:
      x: tokens.
      expert_index: expert of each token in [0, num_experts); a negative index yields zeros.
      num_experts: number of experts.
      out_features: width of what `run` returns first.
      begin: an expert's kernels, anything, and the partial sums to begin with, arrays; for a
        traced scalar index, once an expert.
      run: a block of tokens, which of them are the expert's, its kernels and its partial sums, to
        a row for each token and the partial sums with the block in.
      end: an expert, its kernels, its partial sums and `sums`, to `sums` with the expert in.
      sums: arrays to begin with.
      fetched_from: see `grouped_apply`.
      block_size: tokens that are run at a time.

    Returns:
      Outputs in the order and dtype of `x`, and the sums.
    """
    num_tokens, in_features = x.shape
    if num_tokens == 0:
        return jnp.zeros((0, out_features), x.dtype), sums
    # `jax.export` may leave the number of tokens open; then it cannot be compared.
    block = min(block_size, num_tokens) if isinstance(num_tokens, int) else block_size

    # Tokens without an expert sort behind all others, and are never reached.
    key = jnp.where(expert_index < 0, num_experts, expert_index)
    order = jnp.argsort(key, stable=True)
    counts = jnp.bincount(key, length=num_experts + 1)[:num_experts]
    starts = jnp.cumsum(counts) - counts
    busy = jnp.argsort(counts == 0, stable=True)
    num_busy = jnp.sum(counts > 0)
    sorted_x = jnp.concatenate([x[order], jnp.zeros((block, in_features), x.dtype)])
    rows = jnp.arange(block)

    def run_expert(i: Array, carry: tuple[Array, Any]) -> tuple[Array, Any]:
        outputs, sums = carry
        expert = busy[i]
        kernels, partial = begin(expert)
        count, start = counts[expert], starts[expert]

        def run_block(j: Array, carry: tuple[Array, Any]) -> tuple[Array, Any]:
            outputs, partial = carry
            at = (start + j * block, 0)
            tokens = lax.dynamic_slice(sorted_x, at, (block, in_features))
            # Rows past this expert's tokens belong to the next one.
            mine = (rows < count - j * block)[:, None]
            result, partial = run(tokens, mine, kernels, partial)
            old = lax.dynamic_slice(outputs, at, (block, out_features))
            outputs = lax.dynamic_update_slice(outputs, jnp.where(mine, result, old), at)
            return outputs, partial

        blocks = (count + block - 1) // block
        outputs, partial = lax.fori_loop(0, blocks, run_block, (outputs, partial))
        return outputs, end(expert, kernels, partial, sums)

    outputs = varying_zeros(
        (num_tokens + block, out_features), x.dtype, x, expert_index, *fetched_from
    )
    outputs, sums = lax.fori_loop(0, num_busy, run_expert, (outputs, sums))
    outputs = outputs[:num_tokens]
    return jnp.zeros_like(outputs).at[order].set(outputs, unique_indices=True), sums
