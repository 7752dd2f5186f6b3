"""An expert batch: many kernels of one shape quantized at once.

On accelerators, and over several devices, by one compiled program; on one CPU by `host_gptq`, a
thread for each expert.

Nothing here raises for numbers: what went wrong with an expert is its `status`, and it costs that
expert only (QMoE, section 3.2: a layer has hundreds of experts, and some always fail).
"""

import dataclasses
import enum
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Float32, Int8, Shaped, UInt8

from qmoe_jax.codec.lattice_values import STEP_TABLE
from qmoe_jax.quantization.gptq import gptq
from qmoe_jax.quantization.grids import Grid, Levels, dequantize_kernel
from qmoe_jax.quantization.groups import kernel_of_rows, rows_of_kernel, stored_shape
from qmoe_jax.quantization.host_gptq import HostGptqResult, host_gptq
from qmoe_jax.quantization.lattice import (
    OVERLOAD_CODE,
    Lattice,
    Overlap,
    Steps,
    refuse_groups,
    root_mean_square,
)
from qmoe_jax.quantization.rtn import round_to_nearest

METHODS = ("gptq", "rtn")
IMPLEMENTATIONS = ("xla", "host")


class ExpertStatus(enum.IntEnum):
    """How the codes of an expert came about; all but OK are codes of round-to-nearest."""

    OK = 0
    RTN_REQUESTED = 1
    NO_TOKENS = 2
    SINGULAR = 3
    NONFINITE_INPUT = 4


class ExpertBatchResult(NamedTuple):
    """The quantized kernels of an expert batch.

    Attributes:
      codes: uint8 `[experts, rows, width]`, the orientation of the codec: rows are output features
        of `in` weights, or groups of `group_size` (`quantization.groups`).
      levels: as the grid fits them, in their stored form, with an expert axis (`grids.Levels`).
      status: int8 `[experts]`, values of `ExpertStatus`.
      weight_error: float32 `[experts]`, squared error summed over `out`, averaged over `in`.
      layer_error: float32 `[experts]`, squared error of the outputs on the calibration tokens,
        summed over `out`, averaged over tokens (trace(d^T H d) / 2). 0 without a usable Hessian.
      zero_share: float32 `[experts]`, share of weights whose value is 0.
      overload_share: float32 `[experts]`, share of codes at the ends of the range of a grid that
        has steps: weights that were clipped, or just fit.

    With a grid that has steps, `layer_error` rests on the gain of some outputs (`gptq`).
    """

    codes: UInt8[Array, "experts rows width"]
    levels: Levels
    status: Int8[Array, " experts"]
    weight_error: Float[Array, " experts"]
    layer_error: Float[Array, " experts"]
    zero_share: Float[Array, " experts"]
    overload_share: Float[Array, " experts"]


@dataclasses.dataclass(frozen=True)
class _Options:
    """What a program is compiled for; hashable, so that jit takes it as a static argument.

    Attributes:
      grid: which values a row may take.
      method: "gptq" or "rtn".
      act_order: quantize columns by descending diagonal of the Hessian.
      group_size: input features that share a pair of levels; None is all.
    """

    grid: Grid
    method: str
    act_order: bool
    group_size: int | None


class _Amounts(NamedTuple):
    """Numbers that programs take as arguments: another one compiles nothing."""

    damping: float | Float[Array, ""]
    step: float | Float[Array, ""]


class _Experts(NamedTuple):
    """What is quantized; where experts are mapped over, of one expert, without that axis."""

    kernels: Float[Array, "experts in out"]
    hessians: Float[Array, "experts in in"] | None
    token_counts: Shaped[Array, " experts"]


# Codes, levels, status, layer error and the sum of squared errors of one expert.
_Quantized = tuple[
    UInt8[Array, "in out"],
    Levels,
    Int8[Array, ""],
    Float[Array, ""],
    Float[Array, ""],
]


def quantize_experts(
    kernels: Float[Array, "experts in out"],
    hessians: Float[Array, "experts in in"] | None,
    token_counts: Shaped[Array, " experts"],
    *,
    grid: Grid,
    method: str = "gptq",
    damping: float = 0.1,
    step: float = 1.0,
    act_order: bool = False,
    group_size: int | None = None,
    mesh: Mesh | None = None,
    implementation: str = "auto",
    experts_at_once: int | None = None,
) -> ExpertBatchResult:
    """Quantize a batch of experts with GPTQ, or round them to nearest.

    XLA's program is compiled once for each shape, grid, method and option; `damping` and `step`
    are traced. No buffer is donated: no output has the size of an input, so XLA could reuse none.

    Args:
      kernels: Flax kernels, float32 or bfloat16.
      hessians: of `calibration.hessian`; None only with `method="rtn"`, where they serve the
        layer error alone.
      token_counts: calibration tokens of each expert, int or float; 0 means round to nearest.
      grid: which values a row may take.
      method: "gptq" or "rtn".
      damping: share of the mean diagonal that is added to the diagonal of the Hessian.
      step: of a grid that has steps, in units of the kernel's weights (`lattice`).
      act_order: quantize columns by descending diagonal of the Hessian.
      group_size: input features that share a pair of levels; None is all.
      mesh: of one axis, over which the experts are sharded; each device quantizes its own.
      implementation: of GPTQ: "xla", or "host" for `host_gptq`, which is two to three times faster
        on a CPU and cannot be traced; or "auto", "host" on a CPU where it can and "xla" elsewhere.
      experts_at_once: experts in one vectorised step of XLA's program. None takes all, but 1 on a
        CPU, where that is 2 to 3 times faster, needs the memory of one factorisation instead of
        all, and skips GPTQ for experts that are rounded to nearest.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; it must be one of {METHODS}")
    if hessians is None and method != "rtn":
        raise ValueError(f"hessians is None; method {method!r} needs one Hessian an expert")
    options = _Options(grid, method, act_order, group_size)
    on_cpu = jax.default_backend() == "cpu"
    one_device = mesh is None or mesh.size == 1
    traced = any(isinstance(a, Tracer) for a in (kernels, hessians, token_counts, damping, step))
    can_be_host = method == "gptq" and one_device and not traced
    if implementation not in (*IMPLEMENTATIONS, "auto"):
        raise ValueError(
            f"implementation is {implementation!r}; it must be one of {IMPLEMENTATIONS} or 'auto'"
        )
    if implementation == "host" and not can_be_host:
        raise ValueError(
            'implementation="host" is for method="gptq" on one device outside of jit; '
            'use "xla" or "auto"'
        )
    by_default = implementation == "auto" and on_cpu and experts_at_once is None
    on_host = can_be_host and (implementation == "host" or by_default)
    if on_host:
        assert hessians is not None
        return _quantize_on_host(
            kernels,
            hessians,
            token_counts,
            *(float(damping), float(step)),
            options,
        )
    if experts_at_once is None:
        experts_at_once = 1 if on_cpu else max(1, kernels.shape[0])
    if experts_at_once < 1:
        raise ValueError(f"experts_at_once is {experts_at_once}; it must be at least 1")
    return _quantize_experts(
        _Experts(kernels, hessians, token_counts),
        _Amounts(damping, step),
        options=options,
        experts_at_once=experts_at_once,
        mesh=None if one_device else mesh,
    )


def _quantize_on_host(
    kernels: Float[Array, "experts in out"],
    hessians: Float[Array, "experts in in"],
    token_counts: Shaped[Array, " experts"],
    damping: float,
    step: float,
    options: _Options,
) -> ExpertBatchResult:
    """GPTQ by `host_gptq` for the experts that have tokens, round-to-nearest for the others."""
    kernels, hessians = kernels.astype(jnp.float32), hessians.astype(jnp.float32)
    grid, group_size = options.grid, options.group_size
    weights, inputs, counts = (np.asarray(a) for a in (kernels, hessians, token_counts))
    num_experts, num_in, num_out = weights.shape
    sweep = functools.partial(
        host_gptq,
        experts=np.flatnonzero(counts > 0),
        damping=damping,
        act_order=options.act_order,
    )
    if isinstance(grid, Lattice):
        swept, levels = _sweep_with_steps(grid, sweep, kernels, inputs, step, group_size)
    else:
        levels, values = _levels_and_values(kernels, grid=grid, group_size=group_size)
        swept, levels = sweep(weights, inputs, np.asarray(values)), np.array(levels)
    # The fields of ExpertBatchResult.
    fields = (
        swept.codes.reshape(num_experts, *stored_shape(num_in, num_out, group_size)),
        levels,
        np.full(num_experts, ExpertStatus.OK, np.int8),
        swept.weight_error / num_in,
        swept.layer_error,
        swept.zero_share,
        _overload_share(swept.codes, grid),
    )
    status = fields[2]
    for expert in np.flatnonzero(swept.fell_back | (counts <= 0)):
        one = slice(expert, expert + 1)
        rounded = quantize_experts(
            *(kernels[one], None, token_counts[one]),
            grid=grid,
            method="rtn",
            step=step,
            group_size=group_size,
        )
        for whole, part in zip(jax.tree.leaves(fields), jax.tree.leaves(rounded), strict=True):
            whole[one] = part
        if status[expert] == ExpertStatus.RTN_REQUESTED:
            status[expert] = _why_rounded(counts[expert], inputs[expert])
    # Taken over without a copy where memory is aligned.
    return ExpertBatchResult(*jax.device_put(fields))


def _sweep_with_steps(
    grid: Lattice,
    sweep: Callable[..., HostGptqResult],
    kernels: Float[Array, "experts in out"],
    inputs: Float32[np.ndarray, "experts in in"],
    step: float,
    group_size: int | None,
) -> tuple[HostGptqResult, Steps]:
    """Sweep with steps from each expert's factor, then make its outputs unbiased."""
    refuse_groups(group_size)
    num_experts, num_in, _ = kernels.shape
    sizes = np.asarray(_root_mean_squares(kernels))
    # Of experts that are not swept, and rounded to nearest later.
    index, origin = np.zeros((num_experts, num_in), np.uint8), np.ones(num_experts, np.float32)

    def steps(expert: int, factor_diagonal: Float32[np.ndarray, " in"]) -> np.ndarray:
        index[expert], origin[expert] = _steps(grid, sizes[expert], factor_diagonal, step)
        return origin[expert] * STEP_TABLE[index[expert]]

    swept = sweep(np.asarray(kernels), inputs, steps)
    outputs = Overlap(swept.output_own, swept.output_cross, 2 * swept.layer_error)
    own = num_in * kernels.shape[2] * sizes**2
    weights = Overlap(own, swept.weight_cross, swept.weight_error)
    gain = outputs.unbiased_gain
    swept = swept._replace(
        layer_error=np.array(outputs.error_at(gain)) / 2,
        weight_error=np.array(weights.error_at(gain)),
    )
    return swept, Steps(index, origin * np.asarray(gain))


_root_mean_squares = jax.jit(jax.vmap(root_mean_square))


@functools.partial(jax.jit, static_argnames="grid")
def _steps(grid: Lattice, size, factor_diagonal, step) -> Steps:
    return grid.steps(size, factor_diagonal, step)


@functools.partial(jax.jit, static_argnames=("grid", "group_size"))
def _fit_without_factor(
    kernels: Float[Array, "experts in out"],
    step: float | Float[Array, ""],
    *,
    grid: Grid,
    group_size: int | None,
) -> Levels:
    """Return the levels of experts that are rounded to nearest."""
    ones = jnp.ones(kernels.shape[1])
    return jax.vmap(lambda kernel: grid.fit_kernel(kernel, ones, step, group_size))(kernels)


def _why_rounded(token_count: np.number[Any], hessian: Float[np.ndarray, "in in"]) -> ExpertStatus:
    """Return why GPTQ has no codes for a kernel that is finite."""
    if not token_count > 0:
        return ExpertStatus.NO_TOKENS
    is_finite = np.isfinite(hessian).all()
    return ExpertStatus.SINGULAR if is_finite else ExpertStatus.NONFINITE_INPUT


@functools.partial(jax.jit, static_argnames=("grid", "group_size"))
def _levels_and_values(
    kernels: Float[Array, "experts in out"], *, grid: Grid, group_size: int | None
) -> tuple[Levels, Float[Array, "experts groups codes out"]]:
    """Return the levels of every row, and the values that they give to each code."""

    def values_of(levels):
        numbers = grid.of_groups(levels, kernels.shape[2])
        codes = jnp.arange(grid.num_codes, dtype=jnp.uint8)
        every = jnp.broadcast_to(codes[:, None], (grid.num_codes, kernels.shape[2]))
        return jax.vmap(functools.partial(grid.dequantize, every))(numbers)

    levels = _fit_without_factor(kernels, 1.0, grid=grid, group_size=group_size)
    return levels, jax.vmap(values_of)(levels)


@functools.partial(jax.jit, static_argnames=("options", "experts_at_once", "mesh"))
def _quantize_experts(
    experts: _Experts,
    amounts: _Amounts,
    *,
    options: _Options,
    experts_at_once: int,
    mesh: Mesh | None,
) -> ExpertBatchResult:
    """Run XLA's program, on each device of a mesh for its own experts."""
    quantize = functools.partial(
        _quantize_in_turn, options=options, experts_at_once=experts_at_once
    )
    if mesh is not None:
        split, whole = PartitionSpec(mesh.axis_names[0]), PartitionSpec()
        quantize = jax.shard_map(
            quantize,
            mesh=mesh,
            in_specs=(split, whole),
            out_specs=split,
            # JAX (0.6 to 0.10) fails to vmap a cond over what varies and what does not, as damping.
            check_vma=False,
        )
    return quantize(experts, amounts)


def _quantize_in_turn(
    experts: _Experts,
    amounts: _Amounts,
    *,
    options: _Options,
    experts_at_once: int,
) -> ExpertBatchResult:
    """Quantize the experts of one device, so many in one vectorised step."""

    def quantize_one(expert: _Experts) -> ExpertBatchResult:
        return _quantize_expert(
            expert.kernels, expert.hessians, expert.token_counts, amounts, options
        )

    num_experts = experts.kernels.shape[0]
    if experts_at_once >= num_experts > 1:
        return jax.vmap(quantize_one)(experts)
    if experts_at_once == 1:
        # Without batch_size, lax.map does not vectorise, and cond runs one branch only.
        return lax.map(quantize_one, experts)
    return lax.map(quantize_one, experts, batch_size=experts_at_once)


def _quantize_expert(
    kernel: Float[Array, "in out"],
    hessian: Float[Array, "in in"] | None,
    token_count: Shaped[Array, ""],
    amounts: _Amounts,
    options: _Options,
) -> ExpertBatchResult:
    """Quantize one expert; the fields of the result have no expert axis."""
    grid, group_size = options.grid, options.group_size
    kernel = kernel.astype(jnp.float32)
    is_finite = jnp.all(jnp.isfinite(kernel))
    finite_kernel = jnp.where(jnp.isfinite(kernel), kernel, 0.0)
    has_tokens = token_count > 0

    def round_expert() -> _Quantized:
        codes, levels = round_to_nearest(finite_kernel, grid, group_size, amounts.step)
        d = finite_kernel - dequantize_kernel(grid, codes, levels)
        error = jnp.float32(0.0)
        if hessian is not None:
            measure = functools.partial(_layer_error, d, hessian)
            error = lax.cond(has_tokens & is_finite, measure, lambda: error)
        requested = (
            ExpertStatus.RTN_REQUESTED if options.method == "rtn" else ExpertStatus.NO_TOKENS
        )
        status = jnp.where(is_finite, requested, ExpertStatus.NONFINITE_INPUT)
        return codes, levels, status.astype(jnp.int8), error, jnp.sum(d * d)

    if options.method == "rtn":
        codes, levels, status, layer_error, weight_error = round_expert()
    else:
        assert hessian is not None  # as quantize_experts has checked
        sweep_expert = functools.partial(_sweep_expert, finite_kernel, hessian, amounts, options)
        codes, levels, status, layer_error, weight_error = lax.cond(
            has_tokens & is_finite, sweep_expert, round_expert
        )
    return ExpertBatchResult(
        codes=rows_of_kernel(codes, group_size),
        levels=levels,
        status=status,
        weight_error=weight_error / kernel.shape[0],
        layer_error=layer_error,
        zero_share=jnp.mean(dequantize_kernel(grid, codes, levels) == 0.0, dtype=jnp.float32),
        overload_share=jnp.asarray(_overload_share(codes, grid)),
    )


def _sweep_expert(
    kernel: Float[Array, "in out"],
    hessian: Float[Array, "in in"],
    amounts: _Amounts,
    options: _Options,
) -> _Quantized:
    """Quantize a finite kernel with GPTQ, or round it to nearest and say why."""
    codes, levels, fell_back, error, weight_error = gptq(
        kernel,
        hessian,
        options.grid,
        damping=amounts.damping,
        act_order=options.act_order,
        group_size=options.group_size,
        step=amounts.step,
    )
    # Reading the whole Hessian only to name the reason of a failure.
    is_singular = lax.cond(
        fell_back, lambda: jnp.all(jnp.isfinite(hessian)), lambda: jnp.bool_(False)
    )
    failure = jnp.where(is_singular, ExpertStatus.SINGULAR, ExpertStatus.NONFINITE_INPUT)
    status = jnp.where(fell_back, failure, ExpertStatus.OK)
    return codes, levels, status.astype(jnp.int8), error, weight_error


def dequantize_experts(
    grid: Grid,
    codes: UInt8[Array, "experts rows width"],
    levels: Levels,
    num_in: int,
) -> Float[Array, "experts in out"]:
    """Return what the codes of an expert batch stand for, as Flax kernels, float32.

    Args:
      grid: of the codes.
      codes: as in ExpertBatchResult.
      levels: as in ExpertBatchResult.
      num_in: input features; the width of a row, or a multiple of it where rows are groups.
    """
    return jax.vmap(functools.partial(dequantize_kernel, grid))(
        kernel_of_rows(codes, num_in), levels
    )


def _overload_share(codes, grid: Grid):
    """Return the share of codes at the ends of the range, of a kernel or of each of several."""
    if not grid.has_steps:
        return np.zeros(codes.shape[:-2], np.float32)
    return (codes >= OVERLOAD_CODE).mean((-2, -1)).astype(np.float32)


def _layer_error(error: Float[Array, "in out"], hessian: Float[Array, "in in"]) -> Float[Array, ""]:
    product = jnp.matmul(hessian, error, precision=lax.Precision.HIGHEST)
    total = jnp.sum(product * error) / 2
    return jnp.where(jnp.isfinite(total), total, 0.0)
