"""The order of a run's work, as pure functions: who owns which experts, in which batches, and what
is read.

The reader that works ahead and the loop that consumes follow one schedule, made before the first
layer from what every process has finished.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from qmoe_jax.quantization.settings import CompressionSettings

Action = Literal["compress", "replay", "keep"]


class BatchKey(NamedTuple):
    """A batch of experts of one layer: experts start to stop - 1."""

    stack: str
    layer: int
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Finished:
    """What one process has finished.

    Attributes:
      layers: names of layers (`layer_name`).
      batches: names of batches of experts (`batch_name`).
    """

    layers: frozenset[str] = frozenset()
    batches: frozenset[str] = frozenset()

    def to_json(self) -> list[list[str]]:
        """Return the names, as processes tell them one another."""
        return [sorted(self.layers), sorted(self.batches)]

    @classmethod
    def from_json(cls, names: Sequence[Sequence[str]]) -> "Finished":
        """Invert `to_json`."""
        return cls(*map(frozenset, names))


@dataclasses.dataclass(frozen=True)
class Round:
    """One batch of experts in each process.

    Attributes:
      experts: of each process; empty where it has no more.
      found: whether each process has finished its batch already; True where it is empty.
    """

    experts: tuple[range, ...]
    found: tuple[bool, ...]

    @property
    def missing(self) -> tuple[range, ...]:
        """Experts of each process that are still to be quantized."""
        return tuple(
            range(0) if there else experts
            for experts, there in zip(self.experts, self.found, strict=True)
        )


@dataclasses.dataclass(frozen=True)
class LayerSchedule:
    """What is done with the experts of one sparse layer.

    Attributes:
      stack: "encoder" or "decoder".
      layer: its number.
      action: "compress"; "replay" the codes of a layer that is in the output already; or "keep"
        the kernels as they are.
      rounds: batches of experts, in order.
    """

    stack: str
    layer: int
    action: Action
    rounds: tuple[Round, ...]


def share(total: int, index: int, count: int) -> range:
    """Return the contiguous part of 0 to total - 1 that process `index` of `count` owns."""
    return range(total * index // count, total * (index + 1) // count)


def batches(experts: range, size: int) -> list[range]:
    """Cut a process's experts into batches of `size`; the last may be smaller."""
    return [experts[at : at + size] for at in range(0, len(experts), size)]


def rounds(num_experts: int, size: int, count: int) -> list[tuple[range, ...]]:
    """Put the batches of all processes side by side; an empty one where a process has no more."""
    each = [batches(share(num_experts, index, count), size) for index in range(count)]
    return list(itertools.zip_longest(*each, fillvalue=range(0)))


def make_schedule(
    sparse_layers: Sequence[tuple[str, int]],
    settings: CompressionSettings,
    *,
    num_experts: int,
    batch_size: int,
    finished: Sequence[Finished],
) -> tuple[LayerSchedule, ...]:
    """Schedule all sparse layers of a run; the same in every process.

    A layer is replayed only if every process has its record: one that lacks it needs the others'
    batches, which they keep until all have it.

    Args:
      sparse_layers: (stack, layer) in the order of the data flow.
      settings: of the run.
      num_experts: of a layer.
      batch_size: experts that a process works on at a time.
      finished: what each process has finished.
    """
    scheduled = []
    for stack, layer in sparse_layers:
        name = layer_name(stack, layer)
        action: Action = "compress"
        if settings.for_layer(stack, layer).method == "none":
            action = "keep"
        elif all(name in own.layers for own in finished):
            action = "replay"
        scheduled.append(
            LayerSchedule(
                stack,
                layer,
                action,
                tuple(
                    Round(
                        experts,
                        tuple(
                            not own or batch_name(stack, layer, own) in done.batches
                            for own, done in zip(experts, finished, strict=True)
                        ),
                    )
                    for experts in rounds(num_experts, batch_size, len(finished))
                ),
            )
        )
    return tuple(scheduled)


def kernel_reads(layers: Sequence[LayerSchedule], index: int) -> Iterator[BatchKey]:
    """Yield the batches whose kernels process `index` reads from the source, in order."""
    for layer in layers:
        for step in layer.rounds:
            experts = step.experts[index]
            is_read = layer.action == "keep" or (
                layer.action == "compress" and not step.found[index]
            )
            if experts and is_read:
                yield BatchKey(layer.stack, layer.layer, experts.start, experts.stop)


def layer_name(stack: str, layer: int) -> str:
    """Name a layer in the journal."""
    return f"{stack}_layer_{layer}"


def batch_name(stack: str, layer: int, experts: range) -> str:
    """Name a batch of experts in the journal."""
    return f"{layer_name(stack, layer)}_experts_{experts.start}_{experts.stop}"
