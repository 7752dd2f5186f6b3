"""The sparse part of the block loop: one batch of experts, from kernels to codes to outputs."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, BFloat16, Bool, Float, UInt8

from qmoe_jax.calibration.hessian import (
    HessianState,
    finalize_hessian,
    init_hessian,
    update_hessian,
)
from qmoe_jax.models.layers import (
    T5LayerNorm,
    apply_module,
    gated_activation,
    matmul_precision,
)
from qmoe_jax.pipeline.devices import Devices
from qmoe_jax.pipeline.layer_tokens import LayerTokens
from qmoe_jax.pipeline.stored_codes import stored_bits
from qmoe_jax.quantization.expert_batch import dequantize_experts, quantize_experts
from qmoe_jax.quantization.lattice import Steps
from qmoe_jax.quantization.moved_kernel import Missing, moved_kernels, update_missing
from qmoe_jax.quantization.settings import CompressionSettings

# Experts that a step is searched on, with tokens and without.
_SAMPLED = 4

# The step of a kernel, from its name, the weights of a batch, and the bits a weight that some or
# (True) all of its experts take at a step.
StepChoice = Callable[[str, int, Callable[[float, bool], float]], float]

# Kernels of a batch of experts by name (wi or wi_0 and wi_1, wo), each [experts, in, out].
Kernels = dict[str, Float[Array, "experts in out"]]


@dataclasses.dataclass(frozen=True)
class QuantizedKernel:
    """One kernel of a batch of experts, on the host.

    Attributes:
      codes: uint8 [experts, rows, width]; rows are output features, or groups of their weights.
      levels: bfloat16 [experts, rows, 2], or `Steps` of arrays.
      in_features: of the kernel.
      statistics: arrays [experts] by name: `status`, `token_counts`, `zero_share`,
        `overload_share`, for the lattice `step`; `weight_error`
        and `layer_error` as ExpertBatchResult has them, and `weight_energy` and `layer_energy`,
        what they are to be divided by; of a kernel that was moved, from where it was moved to.
    """

    codes: UInt8[np.ndarray, "experts rows width"]
    levels: BFloat16[np.ndarray, "experts rows 2"] | Steps
    in_features: int
    statistics: dict[str, np.ndarray]


QuantizedKernels = dict[str, QuantizedKernel]


def _normalised(scale: Array, x: Float[Array, "experts chunk embed"], dtype: str) -> Array:
    return apply_module(T5LayerNorm(jnp.dtype(dtype)), {"scale": scale}, x)


def hidden_layer(
    kernels: Kernels, z: Float[Array, "experts chunk embed"], activations: tuple[str, ...]
) -> Float[Array, "experts chunk mlp"]:
    """Return the hidden layer of each expert on its own tokens."""
    precision = matmul_precision(z.dtype)
    projected = [
        jnp.einsum("ecd,edm->ecm", z, kernels[name].astype(z.dtype), precision=precision)
        for name in sorted(kernels)
        if name != "wo"
    ]
    return gated_activation(projected, activations)


class _Sums(NamedTuple):
    """What calibration tokens add up to, of a batch of experts; None is not asked for.

    Attributes:
      wi: Hessians of the inputs of wi.
      wo: Hessians of the inputs of wo.
      missing: what wo's outputs miss.
    """

    wi: HessianState | None = None
    wo: HessianState | None = None
    missing: Missing | None = None


@functools.partial(jax.jit, static_argnames=("activations", "dtype"), donate_argnames="sums")
def _accumulate(
    sums: _Sums,
    scale: Float[Array, "embed"],
    kernels: Kernels,
    exact: Kernels,
    x: Float[Array, "experts chunk embed"],
    real: Bool[Array, "experts chunk"],
    *,
    activations: tuple[str, ...],
    dtype: str,
) -> _Sums:
    """Add a chunk; wo's inputs are behind `kernels`, and miss what those behind `exact` have."""
    z = _normalised(scale, x, dtype)
    wi, wo, missing = sums
    if wi is not None:
        wi = update_hessian(wi, z, real)
    if wo is not None:
        hidden = hidden_layer(kernels, z, activations)
        wo = update_hessian(wo, hidden, real)
        if missing is not None:
            without_error = hidden_layer(exact, z, activations)
            missing = update_missing(missing, hidden, without_error, exact["wo"], real)
    return _Sums(wi, wo, missing)


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
    """Return the residual stream behind the experts, float32."""
    z = _normalised(scale, x, dtype)
    hidden = hidden_layer(kernels, z, activations)
    y = jnp.einsum(
        "ecm,emd->ecd",
        hidden,
        kernels["wo"].astype(z.dtype),
        precision=matmul_precision(z.dtype),
    )
    return x + y.astype(jnp.float32) * gate[..., None]


_dequantize = jax.jit(dequantize_experts, static_argnames=("grid", "num_in"))


def dequantized_kernel(
    batch: "ExpertBatch", kernel: QuantizedKernel, settings: CompressionSettings
) -> Float[Array, "experts in out"]:
    """Return what the codes stand for, float32: what decoding the stored tensor gives, bit for bit.

    Padded to the size of the batch and spread over the devices.
    """
    levels = jax.tree.map(batch.spread, kernel.levels)
    if not isinstance(levels, Steps):
        levels = levels.astype(np.float32)
    codes = batch.spread(kernel.codes)
    return _dequantize(settings.quantization_grid, codes, levels, num_in=kernel.in_features)


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
    """A batch of experts of one sparse layer in each process, and the tokens routed to them.

    Attributes:
      experts: indices of this process's experts; it may have none left while others have.
      all_experts: those of every process.
      tokens: the layer's tokens; None when none are given.
      norm_scale: scale of the layer's `pre_mlp_layer_norm`.
      activations: activations of the experts.
      devices: over which this process's experts are spread.
      size: experts of the compiled programs, a multiple of the devices; smaller batches are padded.
    """

    experts: range
    all_experts: Sequence[range]
    tokens: LayerTokens | None
    norm_scale: Float[Array, "embed"]
    activations: tuple[str, ...]
    devices: Devices
    size: int

    def spread(self, array: np.ndarray) -> Array:
        """Pad an array with an entry an expert with zeros and spread it over the devices."""
        missing = self.size - len(array)
        if missing:
            array = np.concatenate([array, np.zeros((missing, *array.shape[1:]), array.dtype)])
        return self.devices.spread(array)


def quantize_batch(
    batch: ExpertBatch,
    kernels: dict[str, Float[np.ndarray, "experts in out"]],
    settings: CompressionSettings,
    asking: Sequence[range],
    choose_step: StepChoice | None = None,
) -> QuantizedKernels:
    """Quantize all kernels of a batch of experts.

    Args:
      batch: the experts and their tokens.
      kernels: their kernels by name; none in a process that only hands out its tokens.
      settings: how.
      asking: the experts of each process whose Hessians are wanted; called by all processes when
        it is by one.
      choose_step: of each kernel; None takes that of the settings.

    Returns:
      The quantized kernels by name.
    """
    spread = {name: batch.spread(kernel) for name, kernel in kernels.items()}
    inputs = dict(spread)
    behind = settings.true_sequential or settings.moves_wo
    first = ("wi",) if behind else ("wi", "wo")
    sums = _sums(batch, inputs, spread, settings, asking, which=first)
    quantized: QuantizedKernels = {}
    for name in sorted(kernels.keys() - {"wo"}):
        hessians = None if sums is None else sums.wi
        kernel = spread[name]
        quantized[name] = _quantize_kernel(batch, name, kernel, hessians, settings, choose_step)
        if behind:
            inputs[name] = dequantized_kernel(batch, quantized[name], settings)
    if behind:
        which = ("wo", "missing") if settings.moves_wo else ("wo",)
        sums = _sums(batch, inputs, spread, settings, asking, which=which)
    if kernels:
        kernel, hessians = spread["wo"], None if sums is None else sums.wo
        if sums is not None and hessians is not None and sums.missing is not None:
            kernel = moved_kernels(
                *(kernel, hessians.sums, sums.missing, settings.damping), mesh=batch.devices.mesh
            )
        quantized["wo"] = _quantize_kernel(batch, "wo", kernel, hessians, settings, choose_step)
    return quantized


def _quantize_kernel(
    batch: ExpertBatch,
    name: str,
    kernel: Float[Array, "experts in out"],
    state: HessianState | None,
    settings: CompressionSettings,
    choose_step: StepChoice | None,
) -> QuantizedKernel:
    hessians, counts = None, batch.devices.spread(np.zeros(kernel.shape[0], np.float32))
    if state is not None:
        hessians, counts = finalize_hessian(state)
    weight_energy, layer_energy = _energies(kernel, hessians)
    quantize = functools.partial(
        quantize_experts,
        grid=settings.quantization_grid,
        method=settings.method,
        damping=settings.damping,
        act_order=settings.act_order,
        group_size=settings.group_size,
    )

    def measure(step: float, all_experts: bool) -> float:
        """Bits a weight that experts take at a step."""
        with_tokens = np.asarray(counts)[: len(batch.experts)] > 0
        total = 0.0
        # Apart, because experts without tokens are rounded and take fewer bits.
        for group in (np.flatnonzero(with_tokens), np.flatnonzero(~with_tokens)):
            size = len(group) if all_experts else min(_SAMPLED, len(group))
            if not size:
                continue
            some = group[np.linspace(0, len(group) - 1, size).round().astype(int)]
            of_some = None if hessians is None else hessians[some]
            result = quantize(kernel[some], of_some, counts[some], step=step)
            codes = np.asarray(result.codes)
            total += len(group) * stored_bits(codes, result.levels, settings.coding) / codes.size
        return total / len(with_tokens)

    weights = len(batch.experts) * kernel.shape[1] * kernel.shape[2]
    step = settings.step_of(name)
    if choose_step is not None:
        step = choose_step(name, weights, measure)
    result = quantize(kernel, hessians, counts, step=step, mesh=batch.devices.mesh)
    statistics = {
        "status": result.status,
        "token_counts": counts,
        "zero_share": result.zero_share,
        "overload_share": result.overload_share,
        "weight_error": result.weight_error,
        "weight_energy": weight_energy,
        "layer_error": result.layer_error,
        "layer_energy": layer_energy,
    }
    num_experts = len(batch.experts)
    if settings.quantization_grid.has_steps:
        statistics["step"] = np.full(num_experts, step, np.float64)
    levels = jax.tree.map(lambda array: np.asarray(array)[:num_experts], result.levels)
    if not isinstance(levels, Steps):
        # Exact: grids round their levels to bfloat16 before they choose codes.
        levels = levels.astype(ml_dtypes.bfloat16)
    return QuantizedKernel(
        codes=np.asarray(result.codes)[:num_experts],
        levels=levels,
        in_features=kernel.shape[1],
        statistics={name: np.asarray(a)[:num_experts] for name, a in statistics.items()},
    )


def _sums(
    batch: ExpertBatch,
    kernels: Kernels,
    exact: Kernels,
    settings: CompressionSettings,
    asking: Sequence[range],
    *,
    which: tuple[str, ...],
) -> _Sums | None:
    """Sum over all calibration tokens; None where there are none, or no kernels here."""
    tokens = batch.tokens
    if tokens is None:
        return None
    sums = None
    if kernels:
        shape = kernels["wo"].shape
        begun = {
            "wi": lambda: init_hessian(batch.size, shape[2]),
            "wo": lambda: init_hessian(batch.size, shape[1]),
            "missing": lambda: Missing(jnp.zeros((batch.size, *shape[1:]), jnp.float32)),
        }
        sums = _Sums(**{key: jax.tree.map(batch.devices.spread, begun[key]()) for key in which})
    for chunks in tokens.chunks(asking, settings.token_chunk, hessian=True):
        rows = tokens.gather(chunks)
        if sums is None:
            continue
        sums = _accumulate(
            sums,
            batch.norm_scale,
            kernels,
            exact,
            batch.spread(rows),
            batch.spread(chunks[tokens.processes.index].real),
            activations=batch.activations,
            dtype=settings.activation_dtype,
        )
    return sums


def run_batch(batch: ExpertBatch, kernels: Kernels, settings: CompressionSettings) -> None:
    """Send all tokens of a batch of experts through its kernels; outputs replace inputs.

    Args:
      batch: the experts and their tokens.
      kernels: what the tokens go through, float32, padded and spread; by name.
      settings: how.
    """
    tokens = batch.tokens
    if tokens is None:
        return
    for chunks in tokens.chunks(batch.all_experts, settings.token_chunk, hessian=False):
        rows = tokens.gather(chunks)
        outputs = rows
        if batch.experts:
            own = chunks[tokens.processes.index]
            result = _run(
                batch.norm_scale,
                kernels,
                batch.spread(rows),
                batch.spread(tokens.gate[own.rows]),
                activations=batch.activations,
                dtype=settings.activation_dtype,
            )
            outputs = np.asarray(result)[: len(batch.experts)]
        tokens.scatter(chunks, outputs)
