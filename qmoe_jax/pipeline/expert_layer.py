"""The experts of one sparse layer: compressed, replayed or kept, and its tokens sent through.

With several processes, each works on its own experts, and all keep step: they exchange tokens.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping

import jax.numpy as jnp
import numpy as np

from qmoe_jax.pipeline.bit_budget import BitBudget
from qmoe_jax.pipeline.expert_pass import (
    ExpertBatch,
    QuantizedKernels,
    dequantized_kernel,
    quantize_batch,
    run_batch,
)
from qmoe_jax.pipeline.kernel_reader import KernelReader, Kernels
from qmoe_jax.pipeline.layer_store import KeptLayer, LayerStore
from qmoe_jax.pipeline.layer_tokens import LayerTokens
from qmoe_jax.pipeline.report import KernelReport
from qmoe_jax.pipeline.run import Run
from qmoe_jax.pipeline.schedule import BatchKey, LayerSchedule, Round


@dataclasses.dataclass(frozen=True)
class LayerResult:
    """What became of a layer's experts.

    Attributes:
      kernels: a report per compressed kernel; none of a layer that was kept.
      batches_replayed: batches of experts that this process has found finished.
      dense_parameters: parameters of experts that were kept.
      dense_bits: stored bits of those.
    """

    kernels: list[KernelReport]
    batches_replayed: int = 0
    dense_parameters: int = 0
    dense_bits: int = 0


@dataclasses.dataclass(frozen=True)
class _Step:
    """A round of the schedule at work: the batch, this process's part of it, and the bar."""

    round: Round
    batch: ExpertBatch
    key: BatchKey
    done: Callable[[], None]


def run_expert_layer(
    run: Run,
    reader: KernelReader,
    layer: LayerSchedule,
    norm_scale: np.ndarray,
    tokens: LayerTokens | None,
    budget: BitBudget | None = None,
) -> LayerResult:
    """Do with a layer's experts what the schedule says; outputs of the experts replace `tokens`.

    Args:
      run: of which this is a layer.
      reader: of expert kernels, by the same schedule.
      layer: of the schedule.
      norm_scale: scale of the layer's `pre_mlp_layer_norm`.
      tokens: routed tokens; None without calibration.
      budget: what the run may still spend; None without a target.

    Raises:
      CheckpointError: the source cannot be read or the output not be written.
    """
    title = f"{layer.stack} layer {layer.layer}: experts"
    with run.progress(total=len(run.experts), title=title, unit="experts", inner=True) as bar:

        def done(num_experts: int) -> None:
            if reader.seconds:
                bar.note(f"{reader.num_bytes / reader.seconds / 1e9:.2f} GB/s read")
            bar.update(num_experts)

        steps = _steps(run, layer, norm_scale, tokens, done)
        act = {"compress": _compress, "replay": _replay, "keep": _keep}[layer.action]
        return act(run, reader, layer, steps, budget)


def _steps(
    run: Run,
    layer: LayerSchedule,
    norm_scale: np.ndarray,
    tokens: LayerTokens | None,
    done: Callable[[int], None],
) -> Iterator[_Step]:
    scale = jnp.asarray(norm_scale)
    for step in layer.rounds:
        experts = step.experts[run.processes.index]
        batch = ExpertBatch(
            experts=experts,
            all_experts=step.experts,
            tokens=tokens,
            norm_scale=scale,
            activations=run.config.mlp_activations,
            devices=run.devices,
            size=run.padded_batch_size,
        )
        key = BatchKey(layer.stack, layer.layer, experts.start, experts.stop)
        yield _Step(step, batch, key, functools.partial(done, len(experts)))


def _compress(
    run: Run,
    reader: KernelReader,
    layer: LayerSchedule,
    steps: Iterator[_Step],
    budget: BitBudget | None,
) -> LayerResult:
    """Quantize and store batch by batch, and send tokens through what was stored."""
    settings = run.settings.for_layer(layer.stack, layer.layer)
    store = LayerStore(run, layer.stack, layer.layer)
    replayed = 0
    place = f"{layer.stack}/layers_{layer.layer}"
    own = budget if settings.quantization_grid.has_steps else None

    def choose(name: str, num_weights: int, measure: Callable[[float, bool], float]) -> float:
        assert own is not None
        return own.step_for(f"{place}/{name}", num_weights, measure)

    for step in steps:
        batch, quantized = step.batch, {}
        found = step.round.found[run.processes.index]
        if batch.experts and found:
            quantized = store.load_batch(batch.experts)
            replayed += 1
        if not all(step.round.found):
            # A process that has its batch takes part: the others' tokens may lie with it.
            kernels: Kernels = {} if found else reader.take(step.key)
            chosen = None if own is None else choose
            computed = quantize_batch(batch, kernels, settings, step.round.missing, chosen)
            if not found:
                quantized = computed
                store.save_batch(batch.experts, quantized)
        if own is not None and quantized:
            _note(own, place, quantized, store.bits_of_last_batch())
        stored = {n: dequantized_kernel(batch, k, settings) for n, k in quantized.items()}
        run_batch(batch, stored, settings)
        step.done()
    return LayerResult(store.finish(), batches_replayed=replayed)


def _note(
    budget: BitBudget, place: str, kernels: QuantizedKernels, bits: Mapping[str, int]
) -> None:
    """Note in the budget what a batch has taken."""
    for name, kernel in kernels.items():
        step = float(kernel.statistics["step"][-1])
        budget.spend(f"{place}/{name}", kernel.codes.size, bits[name], step)


def _replay(
    run: Run,
    reader: KernelReader,
    layer: LayerSchedule,
    steps: Iterator[_Step],
    budget: BitBudget | None,
) -> LayerResult:
    """Send tokens through the codes of a layer that is in the output already."""
    settings = run.settings.for_layer(layer.stack, layer.layer)
    store = LayerStore(run, layer.stack, layer.layer)
    reports = store.reopen()
    if budget is not None and settings.quantization_grid.has_steps:
        for name, (weights, bits) in store.own_bits().items():
            budget.spend(f"{layer.stack}/layers_{layer.layer}/{name}", weights, bits, None)
    replayed = 0
    for step in steps:
        batch, kernels = step.batch, {}
        replayed += bool(batch.experts)
        if batch.experts and batch.tokens is not None:
            stored = store.read_batch(batch.experts)
            kernels = {n: dequantized_kernel(batch, k, settings) for n, k in stored.items()}
        run_batch(batch, kernels, settings)
        step.done()
    return LayerResult(reports, batches_replayed=replayed)


def _keep(
    run: Run,
    reader: KernelReader,
    layer: LayerSchedule,
    steps: Iterator[_Step],
    budget: BitBudget | None,
) -> LayerResult:
    """Copy the kernels of a layer that is not compressed, and send tokens through them."""
    store = KeptLayer(run, layer.stack, layer.layer)
    for step in steps:
        batch, kernels = step.batch, {}
        if batch.experts:
            kept = store.append(reader.take(step.key))
            kernels = {n: batch.spread(kernel.astype(np.float32)) for n, kernel in kept.items()}
        run_batch(batch, kernels, run.settings)
        step.done()
    parameters, bits = store.close()
    return LayerResult([], dense_parameters=parameters, dense_bits=bits)
