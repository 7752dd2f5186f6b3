"""Hugging Face's Switch Transformers, to a native T5X checkpoint and back.

Values stay what they are: a kernel is transposed, and the kernels of a layer's experts are stacked.
Source of the layout: `modeling_switch_transformers.py` of Hugging Face's transformers; names are in
`huggingface_names`.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qmoe_jax.atomic_file import open_atomically
from qmoe_jax.checkpoints import huggingface_config, huggingface_names, names
from qmoe_jax.checkpoints.compressed import is_compressed_checkpoint, open_compressed_checkpoint
from qmoe_jax.checkpoints.compressed_parts import CodedExperts
from qmoe_jax.checkpoints.dequantize import NativeDtype, check_complete, dense_experts
from qmoe_jax.checkpoints.geometry import infer_config, parameter_shapes
from qmoe_jax.checkpoints.huggingface_config import MARK, carries_mark
from qmoe_jax.checkpoints.huggingface_weights import (
    INDEX,
    WHOLE,
    HuggingFaceWeights,
    listed,
    safetensors_package,
)
from qmoe_jax.checkpoints.t5x import T5XCheckpoint, open_t5x_checkpoint
from qmoe_jax.checkpoints.t5x_writer import T5XCheckpointWriter
from qmoe_jax.config import SwitchConfig
from qmoe_jax.errors import CheckpointError
from qmoe_jax.outputs import FolderKind, OutputFolder, check_no_input, output_file
from qmoe_jax.paths import local_path
from qmoe_jax.progress import progress as show_progress

VOCABULARY = "spiece.model"
"""What Hugging Face calls a sentencepiece model."""

# A bias that T5's own conversion once wrote; transformers leaves it out too.
_UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
_SHARD_BYTES = 1 << 30


# --- Import ---


def import_huggingface(
    path: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    step: int = 0,
    progress: bool = True,
) -> Path:
    """Write `FOLDER/checkpoint_<step>`, a native T5X checkpoint, from a Hugging Face folder.

    Experts are read a few at a time, as many as a stored chunk has (16 MiB, at least one), from
    whichever shard has them. A `spiece.model` is copied into `FOLDER`.

    Args:
      path: local folder with `config.json` and `model.safetensors` or `pytorch_model.bin`, or
        shards of either with their index.
      folder: local folder; the checkpoint in it appears once it is whole.
      step: the training step that T5X shall see.
      progress: show a progress bar.

    Returns:
      Path of the new checkpoint.

    Raises:
      CheckpointError: a file is missing, truncated or of another model; parameters that do not form
        a Switch Transformer; another architecture; or the new checkpoint exists already.
    """
    source = local_path(path, "the Hugging Face folder")
    fields = huggingface_config.read_fields(
        source / "config.json",
        "give the folder of a Hugging Face model, which holds config.json and its parameters",
    )
    weights = HuggingFaceWeights(source)
    try:
        config = huggingface_config.config_of_weights(fields, weights.shapes.keys())
    except CheckpointError as error:
        raise CheckpointError(f"{source / 'config.json'}: {error}") from error
    if config.relpos_max_distance != infer_config(parameter_shapes(config)).relpos_max_distance:
        raise CheckpointError(
            f"{source / 'config.json'}: relative_attention_max_distance is "
            f"{config.relpos_max_distance}, but a T5X checkpoint does not say it and is read with "
            "128, as the public models have it"
        )
    embedding = _check_names(weights, config)
    vocabulary = _claim_vocabulary(source, local_path(folder, "the folder of the output"))
    writer = T5XCheckpointWriter(folder, step)
    check_no_input(writer.path, [source])
    shapes = parameter_shapes(config)
    dense = huggingface_names.dense_parameters(config)
    count = sum(shape[0] for name, shape in shapes.items() if names.is_expert_kernel(name))
    try:
        shown = show_progress(title="importing", unit="experts", total=count, shown=progress)
        with shown as bar:
            for name, shape in shapes.items():
                if names.is_expert_kernel(name):
                    _copy_experts(weights, writer, name, shape, bar.update)
                    continue
                hf_name, transposed = dense[name]
                array = _native(weights.read(embedding if name == names.EMBEDDING else hf_name))
                writer.create(name, shape, array.dtype.name)
                writer.write(name, np.ascontiguousarray(array.T) if transposed else array)
        if vocabulary is not None:
            with open_atomically(vocabulary) as file:
                file.write((source / VOCABULARY).read_bytes())
        return writer.finish()
    except BaseException:
        writer.discard()
        raise


def _native(array: np.ndarray) -> np.ndarray:
    """Every float16 is a float32; T5X's checkpoints have no float16."""
    return array.astype(np.float32) if array.dtype == np.float16 else array


def _check_names(weights: HuggingFaceWeights, config: SwitchConfig) -> str:
    """Refuse parameters that are missing, too many or of another shape; return the embedding's."""
    expected = dict(_hf_shapes(config))
    copies = huggingface_names.embedding_copies(config)
    shared = expected.pop(huggingface_names.HF_EMBEDDING)
    embeddings = [n for n in (huggingface_names.HF_EMBEDDING, *copies) if n in weights.shapes]
    geometry = (
        f"config.json says {config.num_encoder_layers} encoder and {config.num_decoder_layers} "
        f"decoder layers, {config.num_experts} experts in each sparse layer"
    )
    missing = expected.keys() - weights.shapes.keys()
    if not embeddings:
        missing |= {huggingface_names.HF_EMBEDDING}
    if missing:
        raise CheckpointError(
            f"{weights.folder} lacks {listed(missing)}: {geometry}. The model is incomplete or "
            "config.json is of another one, copy it again."
        )
    if extra := weights.shapes.keys() - expected.keys() - {*embeddings, _UNUSED}:
        first = min(extra)
        raise CheckpointError(
            f"{weights.place(first)} is no parameter of this model ({len(extra)} such): {geometry}."
            " The shard is of another model, or config.json is."
        )
    for name, shape in {**expected, **dict.fromkeys(embeddings, shared)}.items():
        if weights.shapes[name] != shape:
            raise CheckpointError(
                f"{weights.place(name)} has shape {list(weights.shapes[name])}, but config.json "
                f"implies {list(shape)}: the shard is of another model, or config.json is"
            )
    first, *others = embeddings
    array = weights.read(first) if others else None
    for name in others:
        copy = weights.read(name)
        # Hugging Face's float32 base-128 has a bfloat16 lm_head beside a float32 embedding.
        if not np.array_equal(copy, np.asarray(array).astype(copy.dtype)):
            raise CheckpointError(
                f"{weights.place(name)} differs from {first}; with tie_word_embeddings "
                f"{config.tied_logits} both are the one token embedding that T5X's model has. The "
                "file is damaged, or of another model."
            )
    return first


def _hf_shapes(config: SwitchConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of every parameter as Hugging Face has it, in the order of ours."""
    dense = huggingface_names.dense_parameters(config)
    for name, shape in parameter_shapes(config).items():
        if names.is_expert_kernel(name):
            for hf_name in huggingface_names.expert_weights(name, shape[0]):
                yield hf_name, shape[:0:-1]
        else:
            hf_name, transposed = dense[name]
            yield hf_name, shape[::-1] if transposed else shape


def _copy_experts(
    weights: HuggingFaceWeights,
    writer: T5XCheckpointWriter,
    name: str,
    shape: tuple[int, ...],
    advance: Callable[[int], object],
) -> None:
    hf_names = huggingface_names.expert_weights(name, shape[0])
    dtypes = {weights.dtypes[hf_name] for hf_name in hf_names}
    dtype = "bfloat16" if dtypes == {"bfloat16"} else "float32"
    batch = writer.create(name, shape, dtype)
    for start in range(0, shape[0], batch):
        kernels = [weights.read(hf_name).T for hf_name in hf_names[start : start + batch]]
        writer.write(name, np.stack(kernels).astype(dtype), start)
        advance(len(kernels))


def _claim_vocabulary(source: Path, folder: Path) -> Path | None:
    """Return where the sentencepiece model goes; None where there is none, or it is there."""
    content = source / VOCABULARY
    if not content.is_file():
        return None
    target = folder / VOCABULARY
    if target.is_file() and target.read_bytes() == content.read_bytes():
        return None
    return output_file(target, "the vocabulary", lambda file: False, inputs=[content])


# --- Export ---

_KIND = FolderKind(
    "a Hugging Face model that this package wrote",
    lambda name: (
        re.fullmatch(
            r"config\.json|spiece\.model|tokenizer_config\.json|"
            r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?",
            name,
        )
        is not None
    ),
    carries_mark,
)


def export_huggingface(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    dtype: NativeDtype = "float32",
    vocabulary: str | os.PathLike[str] | None = None,
    extra_ids: int = 100,
    shard_bytes: int = _SHARD_BYTES,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Write a Hugging Face folder from a native T5X or a compressed checkpoint.

    Codes are decoded, a few experts at a time; at most one shard is in memory.

    Args:
      checkpoint: native or compressed, local or gs://.
      output: local folder; visible once it is whole.
      dtype: "float32" keeps every value; "bfloat16" is half the size, keeps ternary experts and
        what is stored as bfloat16, and rounds the rest, routers too.
      vocabulary: sentencepiece model of the checkpoint, to be stored as `spiece.model`.
      extra_ids: sentinels that `vocabulary` does not hold itself, and transformers puts above it; 0
        of T5X's cc_all.32000.100extra, 100 of Hugging Face's own.
      shard_bytes: most bytes of a safetensors file, unless one parameter is larger.
      overwrite: replace what is at `output`, if this wrote it.
      progress: show a progress bar.

    Returns:
      Path of the new folder.

    Raises:
      CheckpointError: no or a damaged checkpoint, a geometry that Hugging Face's Switch
        Transformers cannot express, safetensors not installed, or something is at `output`.
      CodecError: damaged codes.
    """
    if shard_bytes < 1:
        raise CheckpointError(f"shard_bytes is {shard_bytes}; give a positive number of bytes")
    safetensors_package()
    source = _Source(checkpoint, dtype)
    fields = huggingface_config.config_to_hf(source.config, dtype)
    words = None if vocabulary is None else local_path(vocabulary, "the vocabulary")
    if words is not None and not words.is_file():
        raise CheckpointError(f"{words} is no file: give the checkpoint's sentencepiece model")
    inputs = [path for path in (checkpoint, vocabulary) if path is not None]
    folder = OutputFolder(output, _KIND, inputs=inputs, overwrite=overwrite)
    folder.begin(anew=True)
    try:
        _write_json(folder.partial / "config.json", fields | MARK)
        if words is not None:
            shutil.copyfile(words, folder.partial / VOCABULARY)
            tokenizer = {"tokenizer_class": "T5Tokenizer", "extra_ids": extra_ids, "legacy": True}
            _write_json(folder.partial / "tokenizer_config.json", tokenizer)
        _write_shards(folder.partial, source, shard_bytes, progress)
        return folder.finish()
    except BaseException:
        folder.discard()
        raise


class _Entry(NamedTuple):
    """A parameter to be written: Hugging Face's name, bytes, our name, and which expert's it is."""

    name: str
    bytes: int
    ours: str
    expert: int | None


class _Source:
    """Parameters of a native or a compressed checkpoint, one at a time and as Hugging Face's."""

    def __init__(self, path: str | os.PathLike[str], dtype: NativeDtype):
        self._dtype: NativeDtype = dtype
        self._native: T5XCheckpoint | None = None
        if is_compressed_checkpoint(path):
            self._compressed = open_compressed_checkpoint(path)
            self.config = self._compressed.config
            check_complete(self._compressed)
        else:
            self._native = open_t5x_checkpoint(path)
            self.config = infer_config(self._native.shapes)
        self._dense = huggingface_names.dense_parameters(self.config)
        self._verified: dict[str, CodedExperts] = {}

    def entries(self) -> list[_Entry]:
        """Return what to write, experts of a kernel one after the other."""
        item = 4 if self._dtype == "float32" else 2
        found = []
        for name, shape in parameter_shapes(self.config).items():
            size = item * int(np.prod(shape, dtype=np.int64))
            if names.is_expert_kernel(name):
                hf_names = huggingface_names.expert_weights(name, shape[0])
                found += [_Entry(n, size // shape[0], name, e) for e, n in enumerate(hf_names)]
            else:
                found.append(_Entry(self._dense[name].name, size, name, None))
            if name == names.EMBEDDING and not self.config.tied_logits:
                # Where logits are tied transformers ties these by itself; where they are not, it
                # fills what it does not find with random values.
                copies = huggingface_names.embedding_copies(self.config)
                found += [_Entry(copy, size, name, None) for copy in copies]
        return found

    def read(self, entries: list[_Entry]) -> Iterator[tuple[str, np.ndarray]]:
        """Read parameters in the order of `entries`, as Hugging Face has them."""
        at = 0
        while at < len(entries):
            name, expert = entries[at].ours, entries[at].expert
            if expert is None:
                array = self._read_dense(name).astype(self._dtype)
                transposed = self._dense[name].transposed
                yield entries[at].name, np.ascontiguousarray(array.T if transposed else array)
                at += 1
                continue
            run = [entry for entry in entries[at:] if entry.ours == name]
            for entry, kernel in zip(run, self._experts(name, expert, len(run)), strict=True):
                yield entry.name, np.ascontiguousarray(kernel.T, dtype=self._dtype)
            at += len(run)

    def _read_dense(self, name: str) -> np.ndarray:
        if self._native is not None:
            return self._native.read(name)
        return self._compressed.read_dense([name])[name]

    def _experts(self, name: str, start: int, count: int) -> Iterator[np.ndarray]:
        """Kernels `[in, out]` of the experts from start on."""
        kernel = name.removesuffix("/kernel")
        if self._native is not None:
            for expert in range(start, start + count):
                yield self._native.read(name, expert)
        elif kernel in self._compressed.specs:
            shape = parameter_shapes(self.config)[name]
            if kernel not in self._verified:
                self._verified[kernel] = CodedExperts(self._compressed, kernel)
                self._verified[kernel].verify()
            experts = self._verified[kernel]
            yield from dense_experts(experts, shape, self._dtype, start, start + count)
        else:  # a layer that was left as it is
            yield from self._compressed.read_dense([name])[name][start : start + count]


def _write_shards(folder: Path, source: _Source, shard_bytes: int, progress: bool) -> None:
    shards: list[list[_Entry]] = [[]]
    filled = 0
    for entry in source.entries():
        if shards[-1] and filled + entry.bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.bytes
    from safetensors.numpy import save_file

    places: dict[str, str] = {}
    shown = show_progress(
        title="exporting",
        unit="parameters",
        total=sum(map(len, shards)),
        shown=progress,
    )
    with shown as bar:
        for number, entries in enumerate(shards, 1):
            file = WHOLE
            if len(shards) > 1:
                file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            arrays = {}
            for name, array in source.read(entries):
                arrays[name] = array
                bar.update(1)
            try:
                # transformers refuses files that do not say so.
                save_file(arrays, os.fspath(folder / file), metadata={"format": "pt"})
            except Exception as error:
                raise CheckpointError(
                    f"cannot write {folder / file}: {error}. Check free space and permissions, "
                    "then run again."
                ) from error
            places |= dict.fromkeys(arrays, file)
    if len(shards) > 1:
        total = sum(entry.bytes for entries in shards for entry in entries)
        _write_json(
            folder / INDEX,
            {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))},
        )


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
