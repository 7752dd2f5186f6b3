"""The sparse part of the block loop: one batch of experts, from kernels to codes to outputs."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, BFloat16, Bool, Float, Int, UInt8

from qmoe_jax.calibration.dispatch import Dispatch
from qmoe_jax.calibration.hessian import (
    HessianState,
    finalize_hessian,
    init_hessian,
    update_hessian,
)
from qmoe_jax.calibration.list_buffer import ListBuffer
from qmoe_jax.models.layers import (
    T5LayerNorm,
    apply_module,
    gated_activation,
    matmul_precision,
)
from qmoe_jax.pipeline.settings import CompressionSettings
from qmoe_jax.quantization.expert_batch import (
    ExpertBatchResult,
    codes_to_codec_orientation,
    pad_expert_batch,
    quantize_experts,
)
from qmoe_jax.quantization.grids import Grid

# Kernels of a batch of experts by name (wi or wi_0 and wi_1, wo), each [experts, in, out].
Kernels = dict[str, Float[Array, "experts in out"]]


@dataclasses.dataclass(frozen=True)
class QuantizedKernel:
    """One kernel of a batch of experts, on the host.

    Attributes:
      codes: uint8 [experts, out, in].
      levels: bfloat16 [experts, out, 2].
      statistics: arrays [experts] by name: `status`, `token_counts`, `zero_share`; `weight_error`
        and `layer_error` as ExpertBatchResult has them, and `weight_energy` and `layer_energy`,
        what they are to be divided by.
    """

    codes: UInt8[np.ndarray, "experts out in"]
    levels: BFloat16[np.ndarray, "experts out 2"]
    statistics: dict[str, np.ndarray]


QuantizedKernels = dict[str, QuantizedKernel]


@dataclasses.dataclass(frozen=True)
class TokenChunk:
    """Some tokens of every expert of a batch, padded to one shape.

    Attributes:
      rows: rows of the list buffer, [experts, chunk]; 0 where padded.
      real: which of them are tokens, bool [experts, chunk].
    """

    rows: Int[np.ndarray, "experts chunk"]
    real: Bool[np.ndarray, "experts chunk"]


def token_chunks(tokens: Sequence[Int[np.ndarray, "_"]], chunk: int) -> Iterator[TokenChunk]:
    """Walks through the tokens of all experts side by side, `chunk` of each at a time."""
    longest = max((len(t) for t in tokens), default=0)
    for start in range(0, longest, chunk):
        rows = np.zeros((len(tokens), chunk), np.int64)
        real = np.zeros((len(tokens), chunk), bool)
        for expert, all_rows in enumerate(tokens):
            part = all_rows[start : start + chunk]
            rows[expert, : len(part)] = part
            real[expert, : len(part)] = True
        yield TokenChunk(rows, real)


def _normalised(scale: Array, x: Float[Array, "experts chunk embed"], dtype: str) -> Array:
    return apply_module(T5LayerNorm(jnp.dtype(dtype)), {"scale": scale}, x)


def _hidden(
    kernels: Kernels, z: Float[Array, "experts chunk embed"], activations: tuple[str, ...]
) -> Float[Array, "experts chunk mlp"]:
    """The hidden layer of each expert on its own tokens."""
    precision = matmul_precision(z.dtype)
    projected = [
        jnp.einsum("ecd,edm->ecm", z, kernels[name].astype(z.dtype), precision=precision)
        for name in sorted(kernels)
        if name != "wo"
    ]
    return gated_activation(projected, activations)


@functools.partial(jax.jit, static_argnames=("activations", "dtype"), donate_argnames="states")
def _accumulate(
    states: dict[str, HessianState],
    scale: Float[Array, "embed"],
    kernels: Kernels,
    x: Float[Array, "experts chunk embed"],
    real: Bool[Array, "experts chunk"],
    *,
    activations: tuple[str, ...],
    dtype: str,
) -> dict[str, HessianState]:
    """Adds a chunk to the Hessians of wi's inputs ("wi") and wo's ("wo"), whichever are asked."""
    z = _normalised(scale, x, dtype)
    updated = {}
    if "wi" in states:
        updated["wi"] = update_hessian(states["wi"], z, real)
    if "wo" in states:
        updated["wo"] = update_hessian(states["wo"], _hidden(kernels, z, activations), real)
    return updated


@functools.partial(jax.jit, static_argnames=("activations", "dtype"))
def _run(
    scale: Float[Array, "embed"],
    kernels: Kernels,
    x: Float[Array, "experts chunk embed"],
    gate: Float[Array, "experts chunk"],
    *,
    activations: tuple[str, ...],
    dtype: str,
) -> Float[Array, "experts chunk embed"]:
    """The residual stream behind the experts, float32."""
    z = _normalised(scale, x, dtype)
    hidden = _hidden(kernels, z, activations)
    y = jnp.einsum(
        "ecm,emd->ecd",
        hidden,
        kernels["wo"].astype(z.dtype),
        precision=matmul_precision(z.dtype),
    )
    return x + y.astype(jnp.float32) * gate[..., None]


@functools.partial(jax.jit, static_argnames="grid")
def _dequantize(
    grid: Grid, codes: UInt8[Array, "experts out in"], levels: Float[Array, "experts out 2"]
) -> Float[Array, "experts in out"]:
    return jax.vmap(grid.dequantize)(codes_to_codec_orientation(codes), levels)


def dequantized_kernel(
    kernel: QuantizedKernel, settings: CompressionSettings
) -> Float[Array, "experts in out"]:
    """What the codes stand for, float32: what decoding the stored tensor gives, bit for bit."""
    levels = jnp.asarray(kernel.levels, jnp.float32)
    return _dequantize(settings.quantization_grid, jnp.asarray(kernel.codes), levels)


@jax.jit
def _energies(
    kernels: Float[Array, "experts in out"], hessians: Float[Array, "experts in in"] | None
) -> tuple[Float[Array, "experts"], Float[Array, "experts"]]:
    """Squared weights and outputs, in the units of ExpertBatchResult's errors."""
    weight_energy = jnp.sum(jnp.square(kernels), axis=(1, 2)) / kernels.shape[1]
    if hessians is None:
        return weight_energy, jnp.zeros_like(weight_energy)
    products = jnp.matmul(hessians, kernels, precision=jax.lax.Precision.HIGHEST)
    return weight_energy, jnp.sum(products * kernels, axis=(1, 2)) / 2


@dataclasses.dataclass(frozen=True)
class ExpertBatch:
    """A batch of experts of one sparse layer, and the tokens that were routed to them.

    Attributes:
      experts: indices of the experts.
      buffer: the residual stream before the experts; replaced by that behind them.
      gate: router probability of every row of the buffer.
      dispatch: which rows go where; None when no tokens are given.
      norm_scale: scale of the layer's `pre_mlp_layer_norm`.
      activations: activations of the experts.
    """

    experts: range
    buffer: ListBuffer | None
    gate: Float[np.ndarray, "tokens"] | None
    dispatch: Dispatch | None
    norm_scale: Float[Array, "embed"]
    activations: tuple[str, ...]


def quantize_batch(
    batch: ExpertBatch, kernels: Kernels, settings: CompressionSettings
) -> QuantizedKernels:
    """Quantizes all kernels of a batch of experts.

    Args:
      batch: the experts and their tokens.
      kernels: their kernels, float32 [experts, in, out] by name.
      settings: how.

    Returns:
      The quantized kernels by name.
    """
    quantized: QuantizedKernels = {}
    inputs = dict(kernels)
    states = _hessians(batch, inputs, settings, which=("wi", "wo"))
    for name in [*(name for name in sorted(kernels) if name != "wo"), "wo"]:
        if name == "wo" and settings.true_sequential:
            # Now behind the quantized wi.
            states = _hessians(batch, inputs, settings, which=("wo",))
        state = None if states is None else states["wo" if name == "wo" else "wi"]
        quantized[name] = _quantize_kernel(kernels[name], state, settings)
        if settings.true_sequential:
            inputs[name] = dequantized_kernel(quantized[name], settings)
    return quantized


def _quantize_kernel(
    kernel: Float[Array, "experts in out"],
    state: HessianState | None,
    settings: CompressionSettings,
) -> QuantizedKernel:
    num_experts = kernel.shape[0]
    hessians, counts = None, jnp.zeros(num_experts)
    if state is not None:
        hessians, counts = finalize_hessian(state)
    weight_energy, layer_energy = _energies(kernel, hessians)

    # A smaller last batch is padded, so that it runs the program of the others.
    def padded(array: Array) -> Array:
        return pad_expert_batch(array, settings.expert_batch)

    result = quantize_experts(
        padded(kernel),
        None if hessians is None else padded(hessians),
        padded(counts),
        grid=settings.quantization_grid,
        method=settings.method,
        damping=settings.damping,
        act_order=settings.act_order,
    )
    result = ExpertBatchResult(*(field[:num_experts] for field in result))
    statistics = {
        "status": result.status,
        "token_counts": counts,
        "zero_share": result.zero_share,
        "weight_error": result.weight_error,
        "weight_energy": weight_energy,
        "layer_error": result.layer_error,
        "layer_energy": layer_energy,
    }
    return QuantizedKernel(
        codes=np.asarray(result.codes),
        # Exact: grids round their levels to bfloat16 before they choose codes.
        levels=np.asarray(result.levels).astype(ml_dtypes.bfloat16),
        statistics={name: np.asarray(array) for name, array in statistics.items()},
    )


def _hessians(
    batch: ExpertBatch,
    kernels: Kernels,
    settings: CompressionSettings,
    *,
    which: tuple[str, ...],
) -> dict[str, HessianState] | None:
    if batch.dispatch is None or batch.buffer is None:
        return None
    widths = {"wi": kernels["wo"].shape[2], "wo": kernels["wo"].shape[1]}
    states = {key: init_hessian(len(batch.experts), widths[key]) for key in which}
    tokens = [batch.dispatch.hessian_tokens_of(expert) for expert in batch.experts]
    for chunk in token_chunks(tokens, settings.token_chunk):
        states = _accumulate(
            states,
            batch.norm_scale,
            kernels,
            jnp.asarray(batch.buffer.rows[chunk.rows]),
            jnp.asarray(chunk.real),
            activations=batch.activations,
            dtype=settings.activation_dtype,
        )
    return states


def run_batch(
    batch: ExpertBatch, quantized: QuantizedKernels, settings: CompressionSettings
) -> None:
    """Sends all tokens of a batch of experts through its codes; writes outputs to the buffer."""
    if batch.dispatch is None or batch.buffer is None or batch.gate is None:
        return
    kernels = {name: dequantized_kernel(q, settings) for name, q in quantized.items()}
    tokens = [batch.dispatch.tokens_of(expert) for expert in batch.experts]
    for chunk in token_chunks(tokens, settings.token_chunk):
        outputs = _run(
            batch.norm_scale,
            kernels,
            jnp.asarray(batch.buffer.rows[chunk.rows]),
            jnp.asarray(batch.gate[chunk.rows]),
            activations=batch.activations,
            dtype=settings.activation_dtype,
        )
        batch.buffer.rows[chunk.rows[chunk.real]] = np.asarray(outputs)[chunk.real]
