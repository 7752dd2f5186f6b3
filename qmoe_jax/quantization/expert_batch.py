"""An expert batch: many kernels of one shape quantized at once.

On accelerators, and over several devices, by one compiled program; on one CPU by `host_gptq`, a
thread for each expert.

Nothing here raises for numbers: what went wrong with an expert is its `status`, and it costs that
expert only (QMoE, section 3.2: a layer has hundreds of experts, and some always fail).
"""

import enum
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int8, Shaped, UInt8

from qmoe_jax.quantization.gptq import gptq
from qmoe_jax.quantization.grids import Grid
from qmoe_jax.quantization.groups import (
    dequantize_groups,
    fit_groups,
    kernel_of_rows,
    rows_of_kernel,
    rows_of_levels,
)
from qmoe_jax.quantization.host_gptq import host_gptq
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
      levels: float32 `[experts, rows, 2]`, values that bfloat16 represents exactly.
      status: int8 `[experts]`, values of `ExpertStatus`.
      weight_error: float32 `[experts]`, squared error summed over `out`, averaged over `in`.
      layer_error: float32 `[experts]`, squared error of the outputs on the calibration tokens,
        summed over `out`, averaged over tokens (trace(d^T H d) / 2). 0 without a usable Hessian.
      zero_share: float32 `[experts]`, share of weights whose value is 0.
    """

    codes: UInt8[Array, "experts rows width"]
    levels: Float[Array, "experts rows 2"]
    status: Int8[Array, " experts"]
    weight_error: Float[Array, " experts"]
    layer_error: Float[Array, " experts"]
    zero_share: Float[Array, " experts"]


def pad_expert_batch(
    array: Shaped[Array, "experts *rest"], num_experts: int
) -> Shaped[Array, "num_experts *rest"]:
    """Append experts of zeros, so that a smaller last batch needs no second compilation.

    Pad kernels, Hessians and token counts alike, and keep the first results only. A padding expert
    has no tokens, so where experts run one after the other it skips GPTQ.
    """
    missing = num_experts - array.shape[0]
    if missing < 0:
        raise ValueError(
            f"an expert batch of {array.shape[0]} cannot be padded to {num_experts} experts; "
            "pass the size of the largest batch"
        )
    return jnp.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))


def quantize_experts(
    kernels: Float[Array, "experts in out"],
    hessians: Float[Array, "experts in in"] | None,
    token_counts: Shaped[Array, " experts"],
    *,
    grid: Grid,
    method: str = "gptq",
    damping: float = 0.1,
    act_order: bool = False,
    group_size: int | None = None,
    mesh: Mesh | None = None,
    implementation: str = "auto",
    experts_at_once: int | None = None,
) -> ExpertBatchResult:
    """Quantize a batch of experts with GPTQ, or round them to nearest.

    XLA's program is compiled once for each shape, grid, method and option; `damping` is traced. No
    buffer is donated: no output has the size of an input, so XLA could reuse none.

    Args:
      kernels: Flax kernels, float32 or bfloat16.
      hessians: of `calibration.hessian`; None only with `method="rtn"`, where they serve the
        layer error alone.
      token_counts: calibration tokens of each expert, int or float; 0 means round to nearest.
      grid: which values a row may take.
      method: "gptq" or "rtn".
      damping: share of the mean diagonal that is added to the diagonal of the Hessian.
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
    on_cpu = jax.default_backend() == "cpu"
    one_device = mesh is None or mesh.size == 1
    traced = any(isinstance(a, Tracer) for a in (kernels, hessians, token_counts, damping))
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
            grid=grid,
            damping=float(damping),
            act_order=act_order,
            group_size=group_size,
        )
    if experts_at_once is None:
        experts_at_once = 1 if on_cpu else max(1, kernels.shape[0])
    if experts_at_once < 1:
        raise ValueError(f"experts_at_once is {experts_at_once}; it must be at least 1")
    return _quantize_experts(
        kernels,
        hessians,
        token_counts,
        damping,
        grid=grid,
        method=method,
        act_order=act_order,
        experts_at_once=experts_at_once,
        group_size=group_size,
        mesh=None if one_device else mesh,
    )


def _quantize_on_host(
    kernels, hessians, token_counts, *, grid, damping, act_order, group_size
) -> ExpertBatchResult:
    """GPTQ by `host_gptq` for the experts that have tokens, round-to-nearest for the others."""
    kernels, hessians = kernels.astype(jnp.float32), hessians.astype(jnp.float32)
    levels, values = _levels_and_values(kernels, grid=grid, group_size=group_size)
    weights, inputs, counts = (np.asarray(a) for a in (kernels, hessians, token_counts))
    with_tokens = np.flatnonzero(counts > 0)
    swept = host_gptq(
        weights, inputs, np.asarray(values), with_tokens, damping=damping, act_order=act_order
    )
    num_experts, num_in, _ = weights.shape
    # The fields of ExpertBatchResult.
    fields = (
        swept.codes.reshape(*levels.shape[:2], num_in // values.shape[1]),
        np.array(levels),
        np.full(num_experts, ExpertStatus.OK, np.int8),
        swept.weight_error / num_in,
        swept.layer_error,
        swept.zero_share,
    )
    status = fields[2]
    for expert in np.flatnonzero(swept.fell_back | (counts <= 0)):
        one = slice(expert, expert + 1)
        rounded = quantize_experts(
            kernels[one], None, token_counts[one], grid=grid, method="rtn", group_size=group_size
        )
        for whole, part in zip(fields, rounded, strict=True):
            whole[one] = part
        if status[expert] == ExpertStatus.RTN_REQUESTED:
            status[expert] = _why_rounded(counts[expert], inputs[expert])
    # Taken over without a copy where memory is aligned.
    return ExpertBatchResult(*jax.device_put(fields))


def _why_rounded(token_count, hessian) -> ExpertStatus:
    """Of a kernel that is finite."""
    if not token_count > 0:
        return ExpertStatus.NO_TOKENS
    is_finite = np.isfinite(hessian).all()
    return ExpertStatus.SINGULAR if is_finite else ExpertStatus.NONFINITE_INPUT


@functools.partial(jax.jit, static_argnames=("grid", "group_size"))
def _levels_and_values(kernels, *, grid, group_size):
    """Levels `[experts, rows, 2]`, values `[experts, groups, codes, out]`."""

    def fit(kernel):
        levels = fit_groups(grid, kernel, group_size)
        codes = jnp.arange(grid.num_codes, dtype=jnp.uint8)
        every = jnp.broadcast_to(codes[:, None], (grid.num_codes, kernel.shape[1]))
        values = jax.vmap(lambda of_group: grid.dequantize(every, of_group))(levels)
        return rows_of_levels(levels), values

    return jax.vmap(fit)(kernels)


@functools.partial(
    jax.jit,
    static_argnames=(
        "grid",
        "method",
        "act_order",
        "experts_at_once",
        "group_size",
        "mesh",
    ),
)
def _quantize_experts(kernels, hessians, token_counts, damping, *, mesh, **options):
    quantize = functools.partial(_quantize_in_turn, **options)
    if mesh is not None:
        experts, whole = PartitionSpec(mesh.axis_names[0]), PartitionSpec()
        quantize = jax.shard_map(
            quantize,
            mesh=mesh,
            in_specs=(experts, experts, experts, whole),
            out_specs=experts,
            check_vma=False,  # loops begin with constants that do not vary over devices yet
        )
    return quantize(kernels, hessians, token_counts, damping)


def _quantize_in_turn(
    kernels,
    hessians,
    token_counts,
    damping,
    *,
    grid,
    method,
    act_order,
    experts_at_once,
    group_size,
) -> ExpertBatchResult:
    def quantize_one(expert):
        kernel, hessian, token_count = expert
        return _quantize_expert(
            kernel,
            hessian,
            token_count,
            damping,
            grid=grid,
            method=method,
            act_order=act_order,
            group_size=group_size,
        )

    experts = (kernels, hessians, token_counts)
    num_experts = kernels.shape[0]
    if experts_at_once >= num_experts > 1:
        return jax.vmap(quantize_one)(experts)
    if experts_at_once == 1:
        # Without batch_size, lax.map does not vectorise, and cond runs one branch only.
        return lax.map(quantize_one, experts)
    return lax.map(quantize_one, experts, batch_size=experts_at_once)


def _quantize_expert(
    kernel, hessian, token_count, damping, *, grid, method, act_order, group_size
) -> ExpertBatchResult:
    """One expert; the fields of the result without their expert axis."""
    kernel = kernel.astype(jnp.float32)
    is_finite = jnp.all(jnp.isfinite(kernel))
    finite_kernel = jnp.where(jnp.isfinite(kernel), kernel, 0.0)
    has_tokens = token_count > 0

    def round_expert():
        codes, levels = round_to_nearest(finite_kernel, grid, group_size)
        d = finite_kernel - dequantize_groups(grid, codes, levels)
        error = jnp.float32(0.0)
        if hessian is not None:
            error = lax.cond(
                has_tokens & is_finite,
                lambda: _layer_error(d, hessian),
                lambda: error,
            )
        requested = ExpertStatus.RTN_REQUESTED if method == "rtn" else ExpertStatus.NO_TOKENS
        status = jnp.where(is_finite, requested, ExpertStatus.NONFINITE_INPUT)
        return codes, levels, status.astype(jnp.int8), error, jnp.sum(d * d)

    def sweep_expert():
        codes, levels, fell_back, error, weight_error = gptq(
            finite_kernel,
            hessian,
            grid,
            damping=damping,
            act_order=act_order,
            group_size=group_size,
        )
        # Reading the whole Hessian only to name the reason of a failure.
        is_singular = lax.cond(
            fell_back, lambda: jnp.all(jnp.isfinite(hessian)), lambda: jnp.bool_(False)
        )
        failure = jnp.where(is_singular, ExpertStatus.SINGULAR, ExpertStatus.NONFINITE_INPUT)
        status = jnp.where(fell_back, failure, ExpertStatus.OK)
        return codes, levels, status.astype(jnp.int8), error, weight_error

    if method == "rtn":
        codes, levels, status, layer_error, weight_error = round_expert()
    else:
        codes, levels, status, layer_error, weight_error = lax.cond(
            has_tokens & is_finite, sweep_expert, round_expert
        )
    return ExpertBatchResult(
        codes=rows_of_kernel(codes, group_size),
        levels=levels,
        status=status,
        weight_error=weight_error / kernel.shape[0],
        layer_error=layer_error,
        zero_share=jnp.mean(dequantize_groups(grid, codes, levels) == 0.0, dtype=jnp.float32),
    )


def _row_values(
    grid: Grid, rows: UInt8[Array, "rows width"], levels: Float[Array, "rows 2"]
) -> Float[Array, "rows width"]:
    return jnp.swapaxes(grid.dequantize(jnp.swapaxes(rows, 0, 1), levels), 0, 1)


def dequantize_experts(
    grid: Grid,
    codes: UInt8[Array, "experts rows width"],
    levels: Float[Array, "experts rows 2"],
    num_in: int,
) -> Float[Array, "experts in out"]:
    """Return what the codes of an expert batch stand for, as Flax kernels, float32.

    Args:
      grid: of the codes.
      codes: as in ExpertBatchResult.
      levels: as in ExpertBatchResult.
      num_in: input features; the width of a row, or a multiple of it where rows are groups.
    """
    values = jax.vmap(functools.partial(_row_values, grid))(codes, levels)
    return kernel_of_rows(values, num_in)


def _layer_error(error: Float[Array, "in out"], hessian: Float[Array, "in in"]) -> Float[Array, ""]:
    product = jnp.matmul(hessian, error, precision=lax.Precision.HIGHEST)
    total = jnp.sum(product * error) / 2
    return jnp.where(jnp.isfinite(total), total, 0.0)
