"""The experts of one sparse layer on their way into the output: journal, output, record.

A batch of experts is encoded and kept in the journal. When all are there, each kernel's codes move
to the output, a batch at a time; then a record of the layer replaces the batches. This is the only
part of the pipeline that knows how codes are stored, and, with `Processes`, where processes wait
for each other: every method that communicates is called by all, in the same order.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float, Shaped, UInt8

from qmoe_jax.checkpoints import names
from qmoe_jax.codec import codings, stats
from qmoe_jax.codec.codings import get_coding
from qmoe_jax.codec.decode import decode_expert
from qmoe_jax.codec.outline import CodedOutline, item_bytes
from qmoe_jax.codec.tensor import CodedTensor, TensorSpec
from qmoe_jax.errors import CodecError
from qmoe_jax.pipeline.expert_pass import QuantizedKernel, QuantizedKernels
from qmoe_jax.pipeline.report import KernelReport, kernel_report
from qmoe_jax.pipeline.run import Run
from qmoe_jax.pipeline.schedule import batch_name, batches, layer_name
from qmoe_jax.pipeline.stored_codes import encode_codes, levels_of


class LayerStore:
    """The codes of one layer's experts."""

    def __init__(self, run: Run, stack: str, layer: int):
        """Begin with nothing known of the layer."""
        self._run = run
        self._stack, self._layer = stack, layer
        self._coding = run.settings.for_layer(stack, layer).coding
        self._paths = {
            name: names.expert_kernel(stack, layer, name).removesuffix("/kernel")
            for name in run.kernel_names
        }
        self._entries: list[str] = []
        self._outlines: dict[str, list[CodedOutline]] = {n: [] for n in self._paths}
        self._statistics: dict[str, list[dict[str, Any]]] = {n: [] for n in self._paths}

    # --- A layer that is being compressed ---

    def save_batch(self, experts: range, kernels: QuantizedKernels) -> None:
        """Encode a batch of experts and keep it in the journal.

        Raises:
          CheckpointError: it cannot be written.
        """
        coded = {n: encode_codes(k.codes, k.levels, self._coding) for n, k in kernels.items()}
        arrays: dict[str, np.ndarray] = {}
        for name, tensor in coded.items():
            arrays |= _to_arrays(name, tensor, kernels[name].statistics)
        entry = self._entry(experts)
        self._run.journal.save_batch(entry, arrays)
        self._note(entry, coded, {n: k.statistics for n, k in kernels.items()})

    def bits_of_last_batch(self) -> dict[str, int]:
        """Return the stored bits of the batch that was saved or loaded last, by kernel."""
        return {name: sum(own[-1]["expert_bits"]) for name, own in self._statistics.items()}

    def load_batch(self, experts: range) -> QuantizedKernels:
        """Read a finished batch of experts from the journal.

        Raises:
          CheckpointError: it is damaged.
        """
        entry = self._entry(experts)
        loaded = {n: _from_journal(self._run, entry, n) for n in self._paths}
        coded = {n: tensor for n, (tensor, _) in loaded.items()}
        statistics = {n: own for n, (_, own) in loaded.items()}
        self._note(entry, coded, statistics)
        return {n: self._quantized(n, coded[n], statistics[n]) for n in self._paths}

    def finish(self) -> list[KernelReport]:
        """Move all kernels from the journal to the output, and leave a record instead.

        Raises:
          CheckpointError: the output cannot be written.
        """
        run, layer = self._run, layer_name(self._stack, self._layer)
        record = {path: self._move(name, path) for name, path in self._paths.items()}
        reports = [self._register(path, record[path]) for path in self._paths.values()]
        run.journal.save_layer(layer, record)
        # Not before every process has its record: one that lacks it needs the others' batches.
        run.processes.barrier(layer)
        run.journal.forget_batches(self._entries)
        return reports

    def _move(self, name: str, path: str) -> dict[str, Any]:
        """Write a kernel's codes to the output; return its part of the layer's record."""
        run = self._run
        gather, outlines = run.processes.gather_json, self._outlines[name]
        own = CodedOutline.join(outlines).to_json() if outlines else None
        outline = CodedOutline.join([CodedOutline.from_json(o) for o in gather(own) if o])
        if run.processes.is_primary:
            run.writer.create_coded(path, outline)
        run.processes.barrier(f"create {path}")
        coded = (_from_journal(run, entry, name)[0] for entry in self._entries)
        part = run.writer.write_coded_part(path, outline, run.experts.start, coded)
        parts = gather(part)
        statistics = [batch for own in gather(self._statistics[name]) for batch in own]
        counts = np.sum([batch["symbol_counts"] for batch in statistics], axis=0)
        report = kernel_report(
            path,
            num_experts=outline.spec.num_experts,
            num_weights=outline.spec.num_weights,
            bits=stats.outline_bits(outline, counts.astype(np.int64)),
            batches=statistics,
        )
        record = {
            "outline": outline.to_json(),
            "parts": parts,
            "report": dataclasses.asdict(report),
        }
        return record | {"expert_bits": [b for batch in statistics for b in batch["expert_bits"]]}

    # --- A layer that is in the output already ---

    def reopen(self) -> list[KernelReport]:
        """Make a finished layer known to the writer, from its record, and check its codes.

        Raises:
          CheckpointError: record or codes are damaged.
        """
        run = self._run
        # What a kill between the record and this left behind.
        mine = batches(run.experts, run.batch_size)
        run.journal.forget_batches(self._entry(experts) for experts in mine)
        record = run.journal.load_layer(layer_name(self._stack, self._layer))
        reports = []
        for path in self._paths.values():
            reports.append(self._register(path, record[path]))
            part = record[path]["parts"][run.processes.index]
            run.writer.verify_coded_part(path, run.experts.start, part)
        return reports

    def own_bits(self) -> dict[str, tuple[int, int]]:
        """Return weights and stored bits of this process's experts, by kernel."""
        run = self._run
        record = run.journal.load_layer(layer_name(self._stack, self._layer))
        own = slice(run.experts.start, run.experts.stop)
        found = {}
        for name, path in self._paths.items():
            each = TensorSpec.from_json(record[path]["outline"]["spec"])
            weights = len(run.experts) * each.rows * each.width
            found[name] = weights, sum(record[path]["expert_bits"][own])
        return found

    def read_batch(self, experts: range) -> QuantizedKernels:
        """Read some experts of a reopened layer from the output.

        Raises:
          CheckpointError: an array is missing or truncated.
        """
        read = functools.partial(
            self._run.writer.read_coded, start=experts.start, stop=experts.stop
        )
        return {n: self._quantized(n, read(path), {}) for n, path in self._paths.items()}

    # --- Both ---

    def _register(self, path: str, record: Mapping[str, Any]) -> KernelReport:
        outline = CodedOutline.from_json(record["outline"])
        self._run.writer.register_coded(path, outline, record["parts"])
        return KernelReport(**record["report"])

    def _note(
        self,
        entry: str,
        coded: Mapping[str, CodedTensor],
        statistics: Mapping[str, Mapping[str, np.ndarray]],
    ) -> None:
        """Remember what `finish` needs of a batch: sizes and statistics, not the codes."""
        self._entries.append(entry)
        for name, tensor in coded.items():
            self._outlines[name].append(CodedOutline.of(tensor))
            counts = get_coding(tensor.spec.coding).symbol_counts(tensor)
            self._statistics[name].append(
                {key: array.tolist() for key, array in statistics[name].items()}
                | {"symbol_counts": counts.tolist()}
                | {"expert_bits": stats.expert_bits(tensor).tolist()}
            )

    def _quantized(
        self, name: str, coded: CodedTensor, statistics: dict[str, np.ndarray]
    ) -> QuantizedKernel:
        config = self._run.config
        arrays = {key: jnp.asarray(array) for key, array in coded.arrays.items()}
        return QuantizedKernel(
            codes=np.asarray(_decode(coded.spec, arrays)),
            levels=levels_of(coded),
            in_features=config.expert_mlp_dim if name == "wo" else config.embed_dim,
            statistics=statistics,
        )

    def _entry(self, experts: range) -> str:
        return batch_name(self._stack, self._layer, experts)


class KeptLayer:
    """The expert kernels of a layer that stays dense, written to the output batch by batch."""

    def __init__(self, run: Run, stack: str, layer: int):
        """Make room in the output.

        Raises:
          CheckpointError: it cannot be written.
        """
        self._run = run
        self._names = {n: names.expert_kernel(stack, layer, n) for n in run.kernel_names}
        source = run.source
        self._dtypes = {
            name: run.settings.stored_dtype(parameter, source.dtypes[parameter].name)
            for name, parameter in self._names.items()
        }
        if run.processes.is_primary:
            for name, parameter in self._names.items():
                run.writer.create_dense(parameter, self._dtypes[name], source.shapes[parameter])
        run.processes.barrier(f"create {stack} {layer}")
        self._stop = run.experts.start
        self._writers = {
            name: run.writer.dense_part(parameter, self._stop)
            for name, parameter in self._names.items()
        }

    def append(
        self, kernels: Mapping[str, Float[np.ndarray, "experts in out"]]
    ) -> dict[str, Shaped[np.ndarray, "experts in out"]]:
        """Write this process's next experts; return them as they are stored.

        Raises:
          CheckpointError: they cannot be written.
        """
        kept = {n: kernel.astype(jnp.dtype(self._dtypes[n])) for n, kernel in kernels.items()}
        for name, kernel in kept.items():
            self._writers[name].append(kernel)
        self._stop += len(next(iter(kept.values())))
        return kept

    def close(self) -> tuple[int, int]:
        """Finish the layer; return the number of its parameters and the bits that they take.

        Raises:
          CheckpointError: it cannot be written.
        """
        run = self._run
        count = bits = 0
        for name, parameter in self._names.items():
            dtype, shape = self._dtypes[name], run.source.shapes[parameter]
            checksums = run.processes.gather_json([self._stop, self._writers[name].close()])
            run.writer.register_dense(parameter, dtype, shape, checksums)
            size = int(np.prod(shape, dtype=np.int64))
            count += size
            bits += 8 * size * item_bytes(dtype)
        return count, bits


def _to_arrays(
    name: str, coded: CodedTensor, statistics: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Put a kernel into flat arrays; bfloat16 as its bits, which .npz cannot name."""
    spec = json.dumps(coded.spec.to_json()).encode()
    arrays: dict[str, np.ndarray] = {f"{name}/spec": np.frombuffer(spec, np.uint8)}
    for key, array in coded.arrays.items():
        is_bfloat16 = array.dtype == ml_dtypes.bfloat16
        arrays[f"{name}/coded/{key}"] = array.view(np.uint16) if is_bfloat16 else array
    for key, statistic in statistics.items():
        arrays[f"{name}/statistics/{key}"] = statistic
    return arrays


def _from_journal(run: Run, entry: str, name: str) -> tuple[CodedTensor, dict[str, np.ndarray]]:
    """Read a kernel of a finished batch back: its codes, checked, and its statistics."""
    arrays = run.journal.load_batch(entry, f"{name}/")
    try:
        spec = TensorSpec.from_json(json.loads(arrays[f"{name}/spec"].tobytes()))
        coded = {key: arrays[f"{name}/coded/{key}"] for key in get_coding(spec.coding).array_names}
        if "levels" in coded:
            coded["levels"] = coded["levels"].view(ml_dtypes.bfloat16)
        tensor = CodedTensor(spec, coded)
        codings.validate(tensor)
    except (ValueError, KeyError, CodecError) as error:
        raise run.journal.damaged(entry, error) from error
    prefix = f"{name}/statistics/"
    statistics = {
        key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)
    }
    return tensor, statistics


@functools.partial(jax.jit, static_argnames="spec")
def _decode(spec: TensorSpec, arrays: dict[str, Array]) -> UInt8[Array, "experts rows width"]:
    return jax.lax.map(functools.partial(decode_expert, spec, arrays), jnp.arange(spec.num_experts))
