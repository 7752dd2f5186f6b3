"""Experts' products with tokens, grouped matmuls: by "xla" anywhere, else by "cpu" or "cuda".

"xla" expands an expert when its tokens are reached. "cpu" multiplies on the cores of the host
straight from stored codes (`ops/cpu/products.py`), in float32, and expands the codings that it does
not have. "cuda", for NVIDIA's GPUs, has two ways, and which is taken follows
from shapes alone, so nothing waits for the host:

- few tokens for each expert: one launch a kernel decodes and multiplies, for all experts at once;
- many: an expert is expanded to bfloat16 by a kernel, and XLA multiplies, as with "xla".

"cuda_fragments" is "cuda", but tokens are multiplied by codes that lie as tensor cores take them,
where they were laid out at loading (`ops/cuda/fragments.py`), in about two bits a weight beside the
stored codes: faster by prediction, and not run on a GPU.

Both ways of "cuda" round as the model's activation dtype does. bfloat16 tokens are multiplied as
they are, and sums are float32. A float32 token is the exact sum of three bfloat16 ones, so its
products are float32 too; the weights are bfloat16 (exact for ternary codes; for 2-bit codes
rounded, where "xla" with float32 activations has them unrounded). Of fragments it is features
times steps that are rounded (`ops/cuda/fragment_products.py`).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from qmoe_jax.ops.cuda import kernels
from qmoe_jax.ops.cuda.fragment_products import fragment_product, num_parts, takes_fragments
from qmoe_jax.ops.cuda.kernels import TokenOrder
from qmoe_jax.ops.cuda.launcher import Launcher, current_launcher
from qmoe_jax.ops.cuda.parts import add_parts, split_float32
from qmoe_jax.ops.experts import AdaptedExperts, CodedExperts, Experts, own_part
from qmoe_jax.ops.gradients import differentiable
from qmoe_jax.ops.grouped_mlp import (
    Activation,
    KernelFetch,
    dot_precision,
    grouped_apply,
    grouped_mlp,
    mlp,
)

CUDA = ("cuda", "cuda_fragments")
IMPLEMENTATIONS = ("xla", "cpu", *CUDA)
# What a user may choose; "auto" becomes one of the others when a model is loaded.
CHOICES = ("auto", *IMPLEMENTATIONS)


def compressed_product(
    x: Float[Array, "tokens in"],
    expert_index: Int[Array, "tokens"],
    experts: Experts,
    *,
    num_experts: int,
    out_features: int,
    implementation: str = "xla",
) -> Float[Array, "tokens out"]:
    """Multiply tokens by the kernel of their expert: a grouped (ragged) matmul over experts.

    y[t] = x[t] W_e(t).

    Args:
      x: tokens, float32 or bfloat16.
      expert_index: expert of each token in [0, num_experts); a negative index yields zeros.
      experts: dense kernels (multiplied by XLA in any case) or codes.
      num_experts: number of experts.
      out_features: width of the result.
      implementation: one of `IMPLEMENTATIONS`.

    Returns:
      Products in the order and dtype of `x`.

    Raises:
      CudaError: "cuda" without a GPU or CuPy, or a case that its kernels do not have.
      ValueError: "cpu" where JAX computes on something else.
    """
    check_implementation(implementation)
    precision, dtype = dot_precision(x), x.dtype

    def forward(x: Array, index: Array, kernels: Sequence[Experts], scale: Any) -> Array:
        del scale
        (experts,) = kernels
        if multiply := _direct_product(x, index, kernels, num_experts, implementation):
            return multiply(x, experts)
        return grouped_apply(
            x,
            index,
            num_experts=num_experts,
            out_features=out_features,
            fetch=kernel_fetch(experts, x.dtype, implementation),
            fetched_from=list(experts.by_name.values()),
            run=lambda tokens, kernel: jnp.dot(tokens, kernel, precision=precision),
        )

    return differentiable(
        forward,
        lambda tokens, kernels, scale: jnp.dot(tokens, kernels[0], precision=precision),
        lambda experts: kernel_fetch(experts, dtype, implementation),
        x,
        expert_index,
        [experts],
        num_experts=num_experts,
    )


def expert_mlp(
    x: Float[Array, "tokens embed"],
    expert_index: Int[Array, "tokens"],
    *,
    num_experts: int,
    wi: Sequence[Experts],
    wo: Experts,
    activation: Activation,
    hidden_scale: Float[Array, "experts mlp"] | None = None,
    implementation: str = "xla",
) -> Float[Array, "tokens embed"]:
    """activation(x wi) wo, with the kernels of each token's expert.

    Args:
      x: tokens, float32 or bfloat16.
      expert_index: expert of each token in [0, num_experts); a negative index yields zeros.
      num_experts: number of experts.
      wi: kernels `wi`, or gated `wi_0` and `wi_1`.
      wo: kernels `wo`.
      activation: maps the list of input projections [tokens, mlp] to the hidden layer; of a zero
        row it makes a zero row.
      hidden_scale: factors of an expert's hidden layer, as dropout has them; not differentiated.
        None: there are none.
      implementation: one of `IMPLEMENTATIONS`.

    Returns:
      Outputs in the order and dtype of `x`.

    Raises:
      CudaError: "cuda" without a GPU or CuPy, or a case that its kernels do not have.
      ValueError: "cpu" where JAX computes on something else.
    """
    check_implementation(implementation)
    dtype = x.dtype

    def forward(x: Array, index: Array, kernels: Sequence[Experts], scale: Array | None) -> Array:
        *wi, wo = kernels
        if multiply := _direct_product(x, index, kernels, num_experts, implementation):
            hidden = activation([multiply(x, kernel) for kernel in wi])
            if scale is not None:
                hidden = hidden * scale[jnp.maximum(index, 0)].astype(hidden.dtype)
            return multiply(hidden, wo)
        return grouped_mlp(
            x,
            index,
            num_experts=num_experts,
            fetch_wi=[kernel_fetch(kernel, x.dtype, implementation) for kernel in wi],
            fetch_wo=kernel_fetch(wo, x.dtype, implementation),
            fetched_from=[array for kernel in kernels for array in kernel.by_name.values()],
            activation=activation,
            hidden_scale=scale,
        )

    return differentiable(
        forward,
        lambda tokens, kernels, scale: mlp(tokens, kernels[:-1], kernels[-1], activation, scale),
        lambda experts: kernel_fetch(experts, dtype, implementation),
        x,
        expert_index,
        [*wi, wo],
        hidden_scale,
        num_experts=num_experts,
    )


def check_implementation(implementation: str) -> None:
    """Raise ValueError for a name that is no implementation, and for "cpu" on another device."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation is {implementation!r}; it must be one of {', '.join(IMPLEMENTATIONS)}"
        )
    if implementation == "cpu" and jax.default_backend() != "cpu":
        raise ValueError(
            f"JAX runs on {jax.default_backend()!r}; implementation='cpu' requires the CPU. "
            "Use implementation='auto' or 'xla' here, or set JAX_PLATFORMS=cpu."
        )


def check_choice(implementation: str) -> None:
    """Refuse what no model can be loaded with, before anything is read.

    Raises:
      ValueError: a name that is none of `CHOICES`, or "cpu" where JAX computes on something else.
      CudaError: "cuda" without a GPU or CuPy.
    """
    if implementation not in CHOICES:
        raise ValueError(
            f"implementation is {implementation!r}; it must be one of {', '.join(CHOICES)}"
        )
    if implementation in CUDA:
        current_launcher()
    if implementation == "cpu":
        check_implementation(implementation)


def _direct_product(
    x: Array,
    expert_index: Array,
    kernels: Sequence[Experts],
    num_experts: int,
    implementation: str,
) -> Callable[[Array, Experts], Array] | None:
    """Return the product of tokens and a kernel without expanding it, if all kernels have one."""
    bases = [kernel.base if isinstance(kernel, AdaptedExperts) else kernel for kernel in kernels]
    coded = [kernel for kernel in bases if isinstance(kernel, CodedExperts)]
    if len(coded) < len(bases):
        return None
    multiply = None
    if implementation == "cpu":
        multiply = _stored_product(x, expert_index, coded)
    if implementation in CUDA and x.shape[0]:
        launcher = current_launcher()
        if implementation == "cuda_fragments" and all(
            takes_fragments(launcher, kernel, x.shape[0], num_experts) for kernel in coded
        ):
            multiply = _FusedProducts(launcher, x, expert_index, num_experts).multiply_fragments
        elif _is_fused(launcher, x, coded, num_experts):
            multiply = _FusedProducts(launcher, x, expert_index, num_experts).multiply
    if multiply is None:
        return None
    of_codes = multiply

    def product(x: Array, kernel: Experts) -> Array:
        if isinstance(kernel, AdaptedExperts):
            assert isinstance(kernel.base, CodedExperts)
            low_rank = _low_rank_product(x, expert_index, kernel, num_experts)
            return of_codes(x, kernel.base) + low_rank
        assert isinstance(kernel, CodedExperts)
        return of_codes(x, kernel)

    return product


def _low_rank_product(
    x: Float[Array, "tokens in"],
    expert_index: Int[Array, "tokens"],
    experts: AdaptedExperts,
    num_experts: int,
) -> Float[Array, "tokens out"]:
    """x a b of each token's expert, zeros for a negative index."""
    precision = dot_precision(x)
    a, b = (array.astype(x.dtype) for array in (experts.a, experts.b))

    def multiply(tokens: Array, own: tuple[Array, Array]) -> Array:
        return jnp.dot(jnp.dot(tokens, own[0], precision=precision), own[1], precision=precision)

    if a.shape[0] == b.shape[0] == 1:
        return jnp.where(expert_index[:, None] < 0, 0, multiply(x, (a[0], b[0])))
    return grouped_apply(
        x,
        expert_index,
        num_experts=num_experts,
        out_features=b.shape[2],
        fetch=lambda expert: (own_part(a, expert), own_part(b, expert)),
        fetched_from=[a, b],
        run=multiply,
    )


def _stored_product(
    x: Array, expert_index: Array, kernels: Sequence[CodedExperts]
) -> Callable[[Array, CodedExperts], Array] | None:
    """Return the product from stored codes, if all kernels have one.

    `jax.export` may leave the number of tokens open: then there is none, and experts are expanded.
    """
    from qmoe_jax.ops.cpu import products as on_cpu

    if isinstance(x.shape[0], int) and all(map(on_cpu.is_supported, kernels)):
        return lambda x, kernel: on_cpu.stored_product(x, expert_index, kernel)
    return None


def kernel_fetch(experts: Experts, dtype: DTypeLike, implementation: str) -> KernelFetch:
    """How the loop over experts gets an expert's kernel, [in, out]."""
    if implementation in CUDA and isinstance(experts, CodedExperts):
        launcher = current_launcher()

        def expand(expert: Int[Array, ""]) -> Float[Array, "in out"]:
            ids = expert.astype(jnp.int32)[None]
            return kernels.expand_experts(launcher, experts, ids)[0].T.astype(dtype)

        return expand
    return lambda expert: experts.fetch(expert, dtype)


def _is_fused(
    launcher: Launcher, x: Array, experts: Sequence[CodedExperts], num_experts: int
) -> bool:
    """Whether products are decoded on the way: few tokens for each expert, and rows that fit."""
    for kernel in experts:
        kernels.check_coded(kernel)
        settings = kernels.settings_for(launcher, kernel)
        has_matmul = kernels.has_matmul(launcher, kernel)
        most = settings.matmul_most_per_expert if has_matmul else settings.fused_tokens_per_expert
        if x.shape[0] > min(most * num_experts, settings.fused_tokens):
            return False
        if not kernels.largest_tile(launcher, kernel):
            return False
    return True


class _FusedProducts:
    """Products of one layer's tokens; sorted once for all its kernels."""

    def __init__(self, launcher: Launcher, x: Array, expert_index: Array, num_experts: int):
        self._launcher = launcher
        self._dtype = x.dtype
        self._expert_index = expert_index
        self._num_experts = num_experts
        self._expected = max(1.0, x.shape[0] / num_experts)
        self._orders: dict[int, TokenOrder] = {}

    def _order(self, parts: int) -> TokenOrder:
        """Return the order of tokens that are so many parts: the first of all, then the second."""
        if parts not in self._orders:
            index = jnp.tile(self._expert_index, parts)
            self._orders[parts] = kernels.sort_tokens(index, self._num_experts)
        return self._orders[parts]

    def multiply(self, x: Array, experts: CodedExperts) -> Array:
        parts = 3 if self._dtype == jnp.float32 else 1
        y = kernels.fused_product(
            self._launcher,
            experts,
            jnp.concatenate(split_float32(x)) if parts == 3 else x,
            self._order(parts),
            expected_tokens=parts * self._expected,
            dtype=self._dtype,
        )
        return add_parts(y, parts)

    def multiply_fragments(self, x: Array, experts: CodedExperts) -> Array:
        parts = num_parts(experts, self._dtype)
        y = fragment_product(
            self._launcher,
            experts,
            x,
            self._order(parts),
            expected_tokens=parts * self._expected,
            dtype=self._dtype,
        )
        return add_parts(y, parts)
