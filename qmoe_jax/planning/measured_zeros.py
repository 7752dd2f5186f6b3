"""The zero share to expect of a checkpoint that is at hand, from some of its own experts.

They are rounded to nearest. GPTQ leaves fewer zeros than that: what it adds to weights for the
errors of others makes them wider. How much is an assumption, stated in the plan.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qmoe_jax.checkpoints import names
from qmoe_jax.checkpoints.t5x import T5XCheckpoint
from qmoe_jax.config import SwitchConfig
from qmoe_jax.planning.sizes import ZeroShare, layer_settings
from qmoe_jax.quantization.grids import Grid, quantize_kernel
from qmoe_jax.quantization.settings import CompressionSettings

# By how much weights must be widened, and rounded, for GPTQ's share of zeros: means over the
# kernels of the demo's model (1.10 to 1.15 and 1.00 to 1.07).
GPTQ_WIDENING = {"ternary": 1.13, "2bit": 1.03}

_LAYERS = 4
_EXPERTS = 4
_SAMPLE_BYTES = 1 << 28  # of kernels that are read in all, but one expert of each in any case


def measured_zero_shares(
    source: T5XCheckpoint, config: SwitchConfig, settings: CompressionSettings
) -> dict[str, ZeroShare]:
    """Round a sample of experts of each grid that a run uses; return the zero shares by grid.

    Not of the lattice: there the steps decide, which follow the calibration text.

    Args:
      source: the native checkpoint.
      config: its geometry.
      settings: of the run.

    Raises:
      CheckpointError: an expert cannot be read, or holds NaN or infinite values.
      ValueError: a group size that does not divide the width.
    """
    by_grid: dict[str, list[tuple[tuple[str, int], CompressionSettings]]] = {}
    for at, own in layer_settings(config, settings).items():
        if own.method != "none" and not own.quantization_grid.has_steps:
            by_grid.setdefault(own.grid, []).append((at, own))
    return {grid: _measure(source, config, layers) for grid, layers in by_grid.items()}


def _measure(
    source: T5XCheckpoint,
    config: SwitchConfig,
    layers: list[tuple[tuple[str, int], CompressionSettings]],
) -> ZeroShare:
    chosen = [layers[i] for i in _spread(len(layers), _LAYERS)]
    kernels = [*config.wi_names, "wo"]
    expert_bytes = 4 * config.embed_dim * config.expert_mlp_dim
    fitting = _SAMPLE_BYTES // (expert_bytes * len(kernels) * len(chosen))
    experts = _spread(config.num_experts, min(_EXPERTS, max(1, fitting)))
    counts = np.zeros(3)
    for (stack, layer), own in chosen:
        widening = GPTQ_WIDENING[own.grid] if own.method == "gptq" else 1.0
        count = _rounding(own.quantization_grid, own.group_size, widening)
        for kernel in kernels:
            name = names.expert_kernel(stack, layer, kernel)
            counts += sum(np.asarray(count(_read(source, name, expert))) for expert in experts)
    told = f"measured by rounding {len(experts)} experts of {len(chosen)} of its layers"
    if any(own.method == "gptq" for _, own in chosen):
        grid = chosen[0][1].grid
        told += (
            f", {GPTQ_WIDENING[grid] - 1:.0%} wider as GPTQ is assumed to leave them (so on the "
            "demo's model)"
        )
    zeros, escaped = float(counts[0] / counts.sum()), float(counts[2] / max(1, counts[1:].sum()))
    single = (1 - escaped) / 2
    return ZeroShare(min(max(zeros, 0.001), 0.999), told, (single, single, escaped))


def _spread(count: int, most: int) -> list[int]:
    """Return at most so many of `count` things, evenly, the first and the last among them."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, most))})


def _read(source: T5XCheckpoint, name: str, expert: int) -> Float[np.ndarray, "in out"]:
    return source.read_experts(name, expert, expert + 1)[0].astype(np.float32)


@functools.cache
def _rounding(
    grid: Grid, group_size: int | None, widening: float
) -> Callable[[np.ndarray], jax.Array]:
    """Return a function from a kernel to its numbers of zeros, single and escaped non-zeros."""

    @jax.jit
    def count(kernel: Float[Array, "in out"]) -> Int[Array, "3"]:
        rows = grid.fit_kernel(kernel, jnp.ones(kernel.shape[0]), 1.0, group_size)
        codes = quantize_kernel(grid, widening * kernel, rows)
        levels = grid.of_groups(rows, kernel.shape[1])
        codes = codes.reshape(levels.shape[0], -1, kernel.shape[1]).astype(jnp.int32)
        if grid.num_codes < 4:
            return jnp.stack([jnp.sum(codes == 0), jnp.sum(codes != 0), 0])
        zero = levels[:, None, :, 1].astype(jnp.int32)
        # The two values next to zero are told apart by a sign bit; the third one is escaped.
        nearest = jnp.where((zero == 0) | (zero == 3), 2, 1)
        steps = jnp.abs(codes - zero)
        escaped = jnp.sum(steps > nearest)
        zeros = jnp.sum(steps == 0)
        return jnp.stack([zeros, steps.size - zeros - escaped, escaped])

    return count
