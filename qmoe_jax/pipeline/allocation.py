"""Bits between kernels: a step of the lattice for each, at one slope of KL against bits.

Kernels differ in what an error in them does to the predictions, and one step for all is not best.
It is measured: some experts of a kernel are quantized while all else stays uncompressed, and the KL
to the uncompressed model is taken on a few calibration examples. The least total KL at a number of
bits has all kernels at one slope dKL / dbits; errors of different kernels, and of the experts of
one, are taken to add up. Only calibration text is looked at.

It is a sample in every respect, so that it costs a small part of the run: some examples for the
Hessians, some experts, one step, few examples for the KL. How KL and bits go with the step is then
that of most kernels: KL with the step to the power 2.5, bits as `step_search.typical_bits`. The
uncompressed model is in memory meanwhile. The result is a run's `kernel_steps`.

On the demo model, at 0.60 stored bits: KL 0.00282 with one step for all, 0.00163 with these. All
experts at three steps, on twice the text, cost four times as much and gave 0.00262: an encoder's
errors now and then send tokens to other experts, so that a kernel's KL jumps between steps, and
curves through three points follow the jumps.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qmoe_jax.calibration.hessian import (
    HessianState,
    finalize_hessian,
    init_hessian,
    update_hessian,
)
from qmoe_jax.calibration.tokens import TokenFile
from qmoe_jax.checkpoints import names
from qmoe_jax.evaluation.divergence import divergence_sums
from qmoe_jax.evaluation.metrics import model_sums
from qmoe_jax.models.moe import MoeLayer
from qmoe_jax.models.switch import SwitchTransformer
from qmoe_jax.pipeline.expert_pass import Kernels, hidden_layer
from qmoe_jax.pipeline.layer_tokens import token_chunks
from qmoe_jax.pipeline.stored_codes import stored_bits
from qmoe_jax.quantization.expert_batch import dequantize_experts, quantize_experts
from qmoe_jax.quantization.settings import CompressionSettings
from qmoe_jax.quantization.step_search import typical_bits

PROBE_STEPS = (5.0,)
EXPERT_SHARE = 1 / 4
NUM_HESSIAN_EXAMPLES = 256
NUM_KL_EXAMPLES = 64

_KL_POWER = 2.5
# Steps that may be chosen.
_CANDIDATES = np.exp2(np.arange(np.log2(1.0), np.log2(20.0), 1 / 64))
_CHUNK = 64  # tokens of an expert
HESSIAN_BYTES = 2 << 30
"""Of the layers that are looked at together; those of one layer in any case."""


@dataclasses.dataclass(frozen=True)
class Probe:
    """What quantizing one kernel costs and saves, all else uncompressed.

    Attributes:
      kernel: as `CompressionSettings.kernel_steps` names it, "encoder/layers_1/wi".
      num_weights: of all experts.
      steps: probed, rising.
      bits: a weight, at each step.
      kl: nats per target token, at each step, of all experts.
    """

    kernel: str
    num_weights: int
    steps: tuple[float, ...]
    bits: tuple[float, ...]
    kl: tuple[float, ...]

    def curves(self) -> tuple[Float[np.ndarray, " steps"], Float[np.ndarray, " steps"]]:
        """Return bits a weight and KL at every candidate step.

        Each is the typical curve times a polynomial of log step through what was measured.
        """
        degree = min(2, len(self.steps) - 1)
        at, wanted = np.log(self.steps), np.log(_CANDIDATES)
        typical = _typical_curves(np.asarray(self.steps)), _typical_curves(_CANDIDATES)
        curves = []
        for found, there, everywhere in zip((self.bits, self.kl), *typical, strict=True):
            above = np.polyfit(at, _log(found) - np.log(there), degree)
            curves.append(everywhere * np.exp(np.polyval(above, wanted)))
        bits, kl = curves
        # Beyond what was probed a polynomial may turn; bits fall and errors grow with the step.
        return np.minimum.accumulate(bits), np.maximum.accumulate(kl)


def _log(measured: Sequence[float]) -> np.ndarray:
    """Logarithms; a kernel that changes nothing has a KL of rounding errors, or below 0."""
    return np.log(np.maximum(measured, 1e-9))


def _typical_curves(steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.array([typical_bits(step) for step in steps]), steps**_KL_POWER


def measure_probes(
    module: SwitchTransformer,
    variables: Mapping[str, Any],
    tokens: TokenFile,
    settings: CompressionSettings,
    *,
    steps: Sequence[float] = PROBE_STEPS,
    expert_share: float = EXPERT_SHARE,
    num_hessian_examples: int = NUM_HESSIAN_EXAMPLES,
    num_kl_examples: int = NUM_KL_EXAMPLES,
    batch_size: int = 32,
    progress: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> list[Probe]:
    """Quantize the kernels one at a time and measure the KL of each.

    Args:
      module: the uncompressed model.
      variables: its parameters.
      tokens: calibration examples.
      settings: of the run; which layers it compresses with the lattice, and how.
      steps: to probe.
      expert_share: of the experts that are quantized, evenly spread.
      num_hessian_examples: examples whose tokens enter Hessians.
      num_kl_examples: examples on which the KL is measured.
      batch_size: examples at a time.
      progress: wraps what is gone through, the kernels.

    Raises:
      TokensError: no examples.
    """
    config = module.config
    layers = [
        at
        for at in config.sparse_layers
        if (own := settings.for_layer(*at)).method != "none" and own.has_steps
    ]
    count = max(1, round(expert_share * config.num_experts))
    experts = np.linspace(0, config.num_experts - 1, count).round().astype(int)
    experts = np.unique(experts)
    hessian_batches = _batches(tokens, num_hessian_examples, batch_size)
    kl_batches = _batches(tokens, num_kl_examples, min(batch_size, num_kl_examples))
    dense = names.flatten(variables["params"])
    apply = jax.jit(_logits, static_argnames="module")
    reference = [np.asarray(apply(module, variables, batch)) for batch in kl_batches]

    def divergence(path: str, kernels: np.ndarray) -> float:
        """KL with some experts of a kernel replaced."""
        whole = jnp.asarray(dense[path]).at[experts].set(kernels.astype(dense[path].dtype))
        mixed = {**variables, "params": names.unflatten(dense | {path: whole})}
        compared = [
            jax.device_get(_compare(module, mixed, batch, logits))
            for batch, logits in zip(kl_batches, reference, strict=True)
        ]
        kl, targets = (np.concatenate(column) for column in zip(*compared, strict=True))
        return float(kl.sum(dtype=np.float64) / targets.sum())

    probes = []
    each = 4 * len(experts) * (config.embed_dim**2 + config.expert_mlp_dim**2)
    at_once = max(1, HESSIAN_BYTES // each)
    groups = [layers[first : first + at_once] for first in range(0, len(layers), at_once)]
    work = [
        (group, at, name) for group in groups for at in group for name in (*config.wi_names, "wo")
    ]
    done: Sequence[tuple[str, int]] = ()
    sums: dict[tuple[str, int], dict[str, HessianState]] = {}
    for group, at, name in progress(work):
        if group is not done:
            sums = {}  # those of the last group go before the next one's come
            sums, done = _hessians(module, variables, hessian_batches, group, experts), group
        states = sums[at]
        stack, layer = at
        own = settings.for_layer(stack, layer)
        path = names.expert_kernel(stack, layer, name)
        kernels = jnp.asarray(dense[path])[experts].astype(jnp.float32)
        hessians, counts = finalize_hessian(states["wo" if name == "wo" else "wi"])
        points = []
        for step in sorted(steps):
            result = quantize_experts(
                kernels,
                hessians,
                counts,
                grid=own.quantization_grid,
                method=own.method,
                damping=own.damping,
                step=step,
                act_order=own.act_order,
            )
            codes = np.asarray(result.codes)
            weights = dequantize_experts(
                own.quantization_grid, result.codes, result.levels, num_in=kernels.shape[1]
            )
            bits = stored_bits(codes, result.levels, own.coding) / codes.size
            kl = divergence(path, np.asarray(weights)) * config.num_experts / len(experts)
            points.append((bits, kl))
        probes.append(
            Probe(
                f"{stack}/layers_{layer}/{name}",
                int(np.prod(dense[path].shape, dtype=np.int64)),
                tuple(sorted(steps)),
                *(tuple(column) for column in zip(*points, strict=True)),
            )
        )
    return probes


def _batches(tokens: TokenFile, count: int, batch_size: int) -> list[dict[str, np.ndarray]]:
    some = tokens.first(min(count, len(tokens)))
    return [batch.arrays() for batch in some.batches(batch_size)]


def _logits(
    module: SwitchTransformer, variables: Mapping[str, Any], batch: Mapping[str, Array]
) -> Float[Array, "batch length vocab"]:
    return model_sums(module, variables, batch)[1]


@functools.partial(jax.jit, static_argnames="module")
def _compare(
    module: SwitchTransformer,
    variables: Mapping[str, Any],
    batch: Mapping[str, Array],
    reference_logits: Float[Array, "batch length vocab"],
) -> tuple[Float[Array, "batch"], Int[Array, "batch"]]:
    """Return KL to the reference, summed over each row's targets, and how many those are."""
    targets, weights = batch["decoder_target_tokens"], batch["decoder_loss_weights"]
    logits = _logits(module, variables, batch)
    return divergence_sums(logits, reference_logits, targets, weights).kl, (weights > 0).sum(axis=1)


@functools.partial(jax.jit, static_argnames="module")
def _expert_inputs(
    module: SwitchTransformer, variables: Mapping[str, Any], batch: Mapping[str, Array]
) -> dict[str, tuple[Float[Array, "tokens embed"], Int[Array, "tokens"]]]:
    """Run the model; return what reaches each sparse layer's experts, and which (-1: none)."""
    seen: dict[str, Array] = {}

    def tap(run: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        if not isinstance(context.module, MoeLayer) or context.method_name != "__call__":
            return run(*args, **kwargs)
        (x,) = args
        result = run(*args, **kwargs)
        seen["/".join(context.module.path)] = x
        return result

    with nn.intercept_methods(tap):
        _, state = module.apply(
            variables,
            batch["encoder_input_tokens"],
            batch["decoder_input_tokens"],
            batch["decoder_target_tokens"],
            enable_dropout=False,
            mutable=["intermediates"],
        )
    sown = names.flatten(state["intermediates"])
    found = {}
    for path, x in seen.items():
        embed = x.shape[-1]
        index = sown[f"{path}/dispatched_expert"][0].reshape(-1)
        x = x.reshape(-1, embed)
        # Padding is exactly zero and reaches no expert.
        found[path] = x, jnp.where(jnp.any(x != 0, axis=-1), index, -1)
    return found


@functools.partial(jax.jit, static_argnames="activations", donate_argnums=0)
def _accumulate(
    states: dict[str, HessianState],
    wi: Kernels,
    x: Float[Array, "experts chunk embed"],
    real: Bool[Array, "experts chunk"],
    *,
    activations: tuple[str, ...],
) -> dict[str, HessianState]:
    return {
        "wi": update_hessian(states["wi"], x, real),
        "wo": update_hessian(states["wo"], hidden_layer(wi, x, activations), real),
    }


def _hessians(
    module: SwitchTransformer,
    variables: Mapping[str, Any],
    batches: Sequence[Mapping[str, np.ndarray]],
    layers: Sequence[tuple[str, int]],
    experts: Int[np.ndarray, "experts"],
) -> dict[tuple[str, int], dict[str, HessianState]]:
    """Sum the Hessians of some experts of some layers over the uncompressed model's tokens."""
    config = module.config
    states = {
        at: {
            "wi": init_hessian(len(experts), config.embed_dim),
            "wo": init_hessian(len(experts), config.expert_mlp_dim),
        }
        for at in layers
    }
    dense = names.flatten(variables["params"])
    wi = {
        at: {
            name: jnp.asarray(dense[names.expert_kernel(*at, name)])[experts].astype(jnp.float32)
            for name in config.wi_names
        }
        for at in layers
    }
    for batch in batches:
        inputs = jax.device_get(_expert_inputs(module, variables, batch))
        for at in layers:
            x, index = inputs[names.mlp_prefix(*at)]
            rows = [np.flatnonzero(index == expert) for expert in experts]
            for chunk in token_chunks(rows, _CHUNK):
                states[at] = _accumulate(
                    *(states[at], wi[at], x[chunk.rows].astype(np.float32), chunk.real),
                    activations=config.mlp_activations,
                )
    return states


def allocate(probes: Sequence[Probe], bits_per_weight: float) -> dict[str, float]:
    """Return the step of each kernel at which the total KL is least for so many bits.

    Args:
      probes: of all kernels.
      bits_per_weight: over all kernels, as `Probe.bits` counts them; the nearest that steps from 1
        to 20 have.

    Returns:
      `kernel_steps`: the kernel's name to its step.
    """
    weights = np.array([probe.num_weights for probe in probes], np.float64)
    curves = [probe.curves() for probe in probes]
    bits = weights[:, None] * np.stack([own for own, _ in curves])
    kl = np.stack([own for _, own in curves])
    total = bits_per_weight * weights.sum()

    def chosen(log_slope: float) -> np.ndarray:
        return np.argmin(kl + np.exp(log_slope) * bits / weights.sum(), axis=1)

    def bits_of(choice: np.ndarray) -> float:
        return float(np.take_along_axis(bits, choice[:, None], axis=1).sum())

    low, high = -40.0, 20.0  # at a low price bits are many
    for _ in range(70):
        middle = (low + high) / 2
        low, high = (middle, high) if bits_of(chosen(middle)) > total else (low, middle)
    # Both ends differ in one candidate of one kernel at the most, or in a few at a kink.
    return {
        probe.kernel: float(_CANDIDATES[at]) for probe, at in zip(probes, chosen(high), strict=True)
    }
