"""One sparse layer: its experts batch by batch, from the checkpoint to the output.

With several processes, each works on its own experts, and all keep step: they exchange tokens.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, UInt8

from qmoe_jax.checkpoints import names
from qmoe_jax.checkpoints.compressed_writer import CompressedCheckpointWriter
from qmoe_jax.checkpoints.t5x import T5XCheckpoint
from qmoe_jax.codec.codings import get_coding
from qmoe_jax.codec.decode import decode_expert
from qmoe_jax.codec.encode import encode
from qmoe_jax.codec.outline import CodedOutline
from qmoe_jax.codec.tensor import CodedTensor, TensorSpec
from qmoe_jax.config import SwitchConfig
from qmoe_jax.pipeline.devices import Devices
from qmoe_jax.pipeline.expert_pass import (
    ExpertBatch,
    QuantizedKernel,
    dequantized_kernel,
    quantize_batch,
    run_batch,
)
from qmoe_jax.pipeline.journal import FinishedKernel, FinishedKernels, Journal
from qmoe_jax.pipeline.kernel_reader import BatchKey, KernelReader
from qmoe_jax.pipeline.layer_tokens import LayerTokens
from qmoe_jax.pipeline.processes import Processes
from qmoe_jax.pipeline.report import KernelReport, kernel_report
from qmoe_jax.quantization.settings import CompressionSettings


@dataclasses.dataclass
class ExpertLayers:
    """What all sparse layers of a run share.

    Attributes:
      source: the native checkpoint.
      config: geometry.
      settings: of the run; a layer may override some.
      writer: the output.
      journal: what is finished.
      devices: of this process.
      processes: who takes part.
      bar: makes a progress bar.
      kernels: a report per finished expert kernel.
      num_replayed: batches of experts that this process has found finished.
      dense_bits: bits of expert kernels that were left as they are.
      dense_parameters: their number.
    """

    source: T5XCheckpoint
    config: SwitchConfig
    settings: CompressionSettings
    writer: CompressedCheckpointWriter
    journal: Journal
    devices: Devices
    processes: Processes
    bar: Callable[..., Any]
    kernels: list[KernelReport] = dataclasses.field(default_factory=list)
    num_replayed: int = 0
    dense_bits: int = 0
    dense_parameters: int = 0

    def __post_init__(self) -> None:
        self.kernel_names = (*self.config.wi_names, "wo")
        self._logged = (0, 0.0)
        self.reader = KernelReader(self.source, self.kernel_names, self._to_read())

    def close(self) -> None:
        """Stop reading ahead."""
        self.reader.close()

    @property
    def batch_size(self) -> int:
        """Experts that this process works on at a time, padding included."""
        wanted = self.settings.expert_batch * len(self.devices)
        return self.devices.rounded_up(min(wanted, max(1, len(self._share(self.processes.index)))))

    def _share(self, process: int) -> range:
        return self.processes.share(self.config.num_experts, process)

    def _batches(self, process: int) -> list[range]:
        share = self._share(process)
        step = self.settings.expert_batch * len(self.devices)
        return [share[at : at + step] for at in range(0, len(share), step)]

    def _rounds(self) -> Iterator[list[range]]:
        """Yield a batch of experts for each process; an empty one where it has no more."""
        all_batches = [self._batches(process) for process in range(self.processes.count)]
        for batches in itertools.zip_longest(*all_batches, fillvalue=range(0)):
            yield list(batches)

    def _to_read(self) -> Iterator[BatchKey]:
        """Return the batches whose kernels this process will read."""
        for stack, layer in self.config.sparse_layers:
            dense = self.settings.for_layer(stack, layer).method == "none"
            if not dense and self.journal.load_layer(_layer_name(stack, layer)) is not None:
                continue
            for experts in self._batches(self.processes.index):
                if dense or not self.journal.has_batch(_batch_name(stack, layer, experts)):
                    yield BatchKey(stack, layer, experts.start, experts.stop)

    def run(
        self, stack: str, layer: int, norm_scale: np.ndarray, tokens: LayerTokens | None
    ) -> dict[str, Any]:
        """Compress the experts of a layer and send its tokens through the result.

        Args:
          stack: "encoder" or "decoder".
          layer: number of the layer.
          norm_scale: scale of its `pre_mlp_layer_norm`.
          tokens: routed tokens; outputs of the experts replace them. None without calibration.

        Returns:
          What the log says of the layer.

        Raises:
          CheckpointError: the source cannot be read or the output not be written.
        """
        started = time.monotonic()
        settings = self.settings.for_layer(stack, layer)
        num_kernels = len(self.kernels)
        replayed_before = self.num_replayed
        share = self._share(self.processes.index)
        rounds = list(self._rounds())
        with self.bar(
            total=len(share), desc=f"{stack} layer {layer}: experts", unit="expert"
        ) as bar:
            batches = (
                (
                    ExpertBatch(
                        experts=all_experts[self.processes.index],
                        all_experts=all_experts,
                        tokens=tokens,
                        norm_scale=jnp.asarray(norm_scale),
                        activations=self.config.mlp_activations,
                        devices=self.devices,
                        size=self.batch_size,
                    ),
                    functools.partial(self._progress, bar),
                )
                for all_experts in rounds
            )
            if settings.method == "none":
                self._keep(stack, layer, batches)
            else:
                record = self.journal.load_layer(_layer_name(stack, layer))
                if all(self.processes.gather_json(record is not None)):
                    self._replay(stack, layer, settings, batches, record)
                else:
                    self._compress(stack, layer, settings, batches)
        seconds = time.monotonic() - started
        # Since the layer before: part of this was read while that was worked on.
        num_bytes, read_seconds = self.reader.num_bytes, self.reader.seconds
        read = num_bytes - self._logged[0], read_seconds - self._logged[1]
        self._logged = num_bytes, read_seconds
        return {
            "stack": stack,
            "layer": layer,
            "method": settings.method,
            "kernels": [dataclasses.asdict(kernel) for kernel in self.kernels[num_kernels:]],
            "batches_replayed": self.num_replayed - replayed_before,
            "seconds": round(seconds, 3),
            "experts_per_second": round(len(share) / seconds, 3),
            "bytes_read": read[0],
            "read_seconds": round(read[1], 3),
        }

    def _progress(self, bar: Any, num_experts: int) -> None:
        if self.reader.seconds:
            bar.set_postfix_str(
                f"{self.reader.num_bytes / self.reader.seconds / 1e9:.2f} GB/s read"
            )
        bar.update(num_experts)

    def _compress(
        self,
        stack: str,
        layer: int,
        settings: CompressionSettings,
        batches: Iterator[tuple[ExpertBatch, Callable[[int], None]]],
    ) -> None:
        finished_names: list[str] = []
        outlines: dict[str, list[CodedOutline]] = {name: [] for name in self.kernel_names}
        statistics: dict[str, list[dict[str, Any]]] = {n: [] for n in self.kernel_names}
        for batch, progress in batches:
            entry = _batch_name(stack, layer, batch.experts)
            quantized, finished = self._finished_batch(stack, layer, settings, batch, entry)
            kernels = {
                name: dequantized_kernel(batch, kernel, settings)
                for name, kernel in quantized.items()
            }
            run_batch(batch, kernels, settings)
            if batch.experts:
                finished_names.append(entry)
            for name, kernel in finished.items():
                outlines[name].append(CodedOutline.of(kernel.coded))
                counts = get_coding(settings.coding).symbol_counts(kernel.coded)
                statistics[name].append(
                    {k: a.tolist() for k, a in kernel.statistics.items()}
                    | {"symbol_counts": counts.tolist()}
                )
            progress(len(batch.experts))
        record = {}
        for name in self.kernel_names:
            path = names.expert_kernel(stack, layer, name).removesuffix("/kernel")
            record[path] = self._write(
                path, outlines.pop(name), statistics.pop(name), name, finished_names
            )
            self._register(path, record[path])
        self.journal.save_layer(_layer_name(stack, layer), record)
        # Not before every process has its record: one that lacks it needs the others' batches.
        self.processes.barrier(_layer_name(stack, layer))
        self.journal.forget_batches(finished_names)

    def _finished_batch(
        self,
        stack: str,
        layer: int,
        settings: CompressionSettings,
        batch: ExpertBatch,
        entry: str,
    ) -> tuple[dict[str, QuantizedKernel], FinishedKernels]:
        """Return the codes of a batch of experts: from the journal, or computed and put there."""
        is_there = not batch.experts or self.journal.has_batch(entry)
        all_there = self.processes.gather_json(is_there)
        quantized: dict[str, QuantizedKernel] = {}
        finished: FinishedKernels = {}
        if batch.experts and is_there:
            finished = self.journal.load_batch(entry)
            quantized = {
                name: self._quantized(name, kernel.coded, kernel.statistics)
                for name, kernel in finished.items()
            }
            self.num_replayed += 1
        if not all(all_there):
            kernels = {}
            if not is_there:
                key = BatchKey(stack, layer, batch.experts.start, batch.experts.stop)
                kernels = self.reader.take(key)
            asking = [
                range(0) if there else experts
                for there, experts in zip(all_there, batch.all_experts, strict=True)
            ]
            computed = quantize_batch(batch, kernels, settings, asking)
            if not is_there:
                quantized = computed
                finished = {
                    name: FinishedKernel(
                        encode(kernel.codes, kernel.levels, settings.coding), kernel.statistics
                    )
                    for name, kernel in quantized.items()
                }
                self.journal.save_batch(entry, finished)
        return quantized, finished

    def _write(
        self,
        path: str,
        outlines: list[CodedOutline],
        statistics: list[dict[str, Any]],
        kernel: str,
        entries: Sequence[str],
    ) -> dict[str, Any]:
        """Move a kernel's codes from the journal to the output; return the layer's record."""
        own = CodedOutline.join(outlines).to_json() if outlines else None
        known = [o for o in self.processes.gather_json(own) if o is not None]
        outline = CodedOutline.join([CodedOutline.from_json(o) for o in known])
        if self.processes.is_primary:
            self.writer.create_coded(path, outline)
        self.processes.barrier(f"create {path}")
        coded = (self.journal.load_batch(entry, kernel)[kernel].coded for entry in entries)
        first_expert = self._share(self.processes.index).start
        part = self.writer.write_coded_part(path, outline, first_expert, coded)
        parts = self.processes.gather_json(part)
        all_statistics = [s for own in self.processes.gather_json(statistics) for s in own]
        report = kernel_report(path, outline, all_statistics)
        return {
            "outline": outline.to_json(),
            "parts": parts,
            "report": dataclasses.asdict(report),
        }

    def _register(self, path: str, record: dict[str, Any]) -> None:
        self.writer.register_coded(path, CodedOutline.from_json(record["outline"]), record["parts"])
        self.kernels.append(KernelReport(**record["report"]))

    def _replay(
        self,
        stack: str,
        layer: int,
        settings: CompressionSettings,
        batches: Iterator[tuple[ExpertBatch, Callable[[int], None]]],
        record: dict[str, Any],
    ) -> None:
        """Send tokens through the codes of a layer that is in the output already."""
        # What a kill between the record and this left behind.
        index = self.processes.index
        self.journal.forget_batches(
            _batch_name(stack, layer, experts) for experts in self._batches(index)
        )
        paths = {}
        for name in self.kernel_names:
            path = names.expert_kernel(stack, layer, name).removesuffix("/kernel")
            self._register(path, record[path])
            self.writer.verify_coded_part(
                path, self._share(index).start, record[path]["parts"][index]
            )
            paths[name] = path
        for batch, progress in batches:
            experts, kernels = batch.experts, {}
            if experts:
                self.num_replayed += 1
            if experts and batch.tokens is not None:
                for name, path in paths.items():
                    coded = self.writer.read_coded(path, experts.start, experts.stop)
                    kernels[name] = dequantized_kernel(
                        batch, self._quantized(name, coded, {}), settings
                    )
            run_batch(batch, kernels, settings)
            progress(len(experts))

    def _keep(
        self,
        stack: str,
        layer: int,
        batches: Iterator[tuple[ExpertBatch, Callable[[int], None]]],
    ) -> None:
        """Copy the kernels of a layer that is not to be compressed, and send tokens through."""
        first_expert = self._share(self.processes.index).start
        parameters = {n: names.expert_kernel(stack, layer, n) for n in self.kernel_names}
        dtypes = {}
        for name, parameter in parameters.items():
            stored = self.source.dtypes[parameter].name
            dtypes[name] = stored if self.settings.dense_dtype == "source" else "bfloat16"
            if self.processes.is_primary:
                self.writer.create_dense(parameter, dtypes[name], self.source.shapes[parameter])
        self.processes.barrier(f"create {stack} {layer}")
        writers = {n: self.writer.dense_part(p, first_expert) for n, p in parameters.items()}
        stop = first_expert
        for batch, progress in batches:
            kernels = {}
            if batch.experts:
                key = BatchKey(stack, layer, batch.experts.start, batch.experts.stop)
                for name, kernel in self.reader.take(key).items():
                    dtype = ml_dtypes.bfloat16 if dtypes[name] == "bfloat16" else dtypes[name]
                    kept = kernel.astype(dtype)
                    writers[name].append(kept)
                    kernels[name] = batch.spread(kept.astype(np.float32))
                stop = batch.experts.stop
            run_batch(batch, kernels, self.settings)
            progress(len(batch.experts))
        for name, parameter in parameters.items():
            checksums = self.processes.gather_json([stop, writers[name].close()])
            shape = self.source.shapes[parameter]
            self.writer.register_dense(parameter, dtypes[name], shape, checksums)
            size = int(np.prod(shape, dtype=np.int64))
            self.dense_parameters += size
            self.dense_bits += size * (16 if dtypes[name] == "bfloat16" else 32)

    def _quantized(
        self, name: str, coded: CodedTensor, statistics: dict[str, np.ndarray]
    ) -> QuantizedKernel:
        """Return a kernel from its stored codes."""
        arrays = {key: jnp.asarray(array) for key, array in coded.arrays.items()}
        return QuantizedKernel(
            codes=np.asarray(_decode(coded.spec, arrays)),
            levels=coded.arrays["levels"],
            in_features=self.config.expert_mlp_dim if name == "wo" else self.config.embed_dim,
            statistics=statistics,
        )


def _layer_name(stack: str, layer: int) -> str:
    return f"{stack}_layer_{layer}"


def _batch_name(stack: str, layer: int, experts: range) -> str:
    return f"{_layer_name(stack, layer)}_experts_{experts.start}_{experts.stop}"


@functools.partial(jax.jit, static_argnames="spec")
def _decode(spec: TensorSpec, arrays: dict[str, Array]) -> UInt8[Array, "experts out in"]:
    return jax.lax.map(functools.partial(decode_expert, spec, arrays), jnp.arange(spec.num_experts))
