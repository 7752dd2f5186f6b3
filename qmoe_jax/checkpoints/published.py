"""The layout of the published QMoE models (base-128, large-128, c-2048 of ISTA-DASLab), both ways.

    config.json      of Hugging Face's Switch Transformers (published_config)
    noexp.pt         every parameter but the expert kernels, by Hugging Face's names
    exp00.pt, ...    one a sparse layer, encoder first; of each expert kernel `<module>.wi` or `.wo`
      .w_comp        int16 [N]          codewords, as unsigned numbers
      .row_off       int32 [out + 1]    index in w_comp of each row's first codeword; last N
      .ter_minmax    bfloat16 [2 * out] min and max of each row in turn: our levels low and high
      .weight        bfloat16 [0]
    sizes.pt         N of each expert kernel, by module

Codewords and their order are those of the coding "qmoe", so nothing is decoded: kernels change
only how they are laid out. Source: `sub1.py` and `sub1_cuda_kernel.cu` of the QMoE code.
"""

import json
import os
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from qmoe_jax.checkpoints import huggingface_names, names, published_config, torch_files
from qmoe_jax.checkpoints.compressed import CompressedCheckpoint, open_compressed_checkpoint
from qmoe_jax.checkpoints.compressed_writer import CompressedCheckpointWriter
from qmoe_jax.checkpoints.geometry import parameter_shapes
from qmoe_jax.checkpoints.huggingface_config import MARK, carries_mark, read_fields
from qmoe_jax.codec import codings
from qmoe_jax.codec.coding_qmoe import row_bound
from qmoe_jax.codec.tensor import (
    CodedTensor,
    TensorSpec,
    check_offsets,
    row_length_dtype,
    to_offsets,
)
from qmoe_jax.config import SwitchConfig
from qmoe_jax.errors import CheckpointError, CodecError
from qmoe_jax.outputs import FolderKind, OutputFolder
from qmoe_jax.paths import local_path
from qmoe_jax.progress import progress as show_progress

_CODING = "qmoe"
_KERNELS = ("wi", "wo")
_PARTS = ("w_comp", "row_off", "ter_minmax", "weight")
_DENSE_DTYPES = ("bfloat16", "float32")
_MOST_LISTED = 4


def _expert_file(index: int) -> str:
    return f"exp{index:02d}.pt"


_KIND = FolderKind(
    "a model that this package exported",
    lambda name: re.fullmatch(r"config\.json|(noexp|sizes|exp\d+)\.pt", name) is not None,
    carries_mark,
)


# --- Import ---


def import_published(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    overwrite: bool = False,
    progress: bool = True,
) -> None:
    """Convert a published QMoE model to a compressed checkpoint, one sparse layer at a time.

    Weights stay bit for bit what they are. Parameters in noexp.pt keep their dtype: bfloat16, or
    float32, in which Hugging Face has part of base-128. The splits of rows into codewords stay too.

    Args:
      path: local folder of the published model.
      output: folder or gs:// prefix of the compressed checkpoint; visible once it is whole.
      overwrite: replace what is at `output`.
      progress: show a progress bar.

    Raises:
      CheckpointError: PyTorch is not installed; a file or key is missing, unexpected, truncated,
        or of another shape or dtype than config.json says; codewords do not form rows; or there is
        something at `output`.
    """
    folder = local_path(path, "the published model")
    config = _read_config(folder)
    layers = huggingface_names.sparse_layers(config)
    _check_expert_files(folder, len(layers))
    sizes = _read_sizes(folder, config)
    writer = CompressedCheckpointWriter(output, overwrite=overwrite, inputs=[path])
    for name, array in _read_dense(folder, config).items():
        writer.write_dense(name, array)
    for index, (stack, layer) in enumerate(
        show_progress(layers, title="importing", unit="layers", shown=progress)
    ):
        file = folder / _expert_file(index)
        tensors = torch_files.load(file)
        _check_keys(file, tensors, _expert_keys(config, stack, layer), config)
        for kernel in _KERNELS:
            coded = _read_kernel(file, tensors, sizes, config, (stack, layer, kernel))
            writer.write_coded(f"{names.mlp_prefix(stack, layer)}/expert/{kernel}", coded)
    writer.finish(config, {"imported_from": "published QMoE layout"})


def _read_config(folder: pathlib.Path) -> SwitchConfig:
    file = folder / "config.json"
    fields = read_fields(
        file,
        "give the folder of a published QMoE model, which holds config.json, noexp.pt, exp*.pt and "
        "sizes.pt",
    )
    try:
        return published_config.config_from_hf(fields)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error


def _check_expert_files(folder: pathlib.Path, count: int) -> None:
    expected = {_expert_file(index) for index in range(count)}
    found = {file.name for file in folder.glob("exp*.pt")}
    if missing := expected - found:
        raise CheckpointError(
            f"{folder} lacks {_listed(missing)}: config.json says {count} sparse layers, each of "
            "which has a file. The model is incomplete, copy it again."
        )
    if extra := found - expected:
        raise CheckpointError(
            f"{folder} has {_listed(extra)}, but config.json says {count} sparse layers, each of "
            "which has one file: the folder mixes two models, copy one into an empty folder"
        )


def _read_sizes(folder: pathlib.Path, config: SwitchConfig) -> dict[str, int]:
    """Return the number of codewords of each expert kernel, by Hugging Face's module."""
    file = folder / "sizes.pt"
    sizes = torch_files.load(file)
    modules = [
        module
        for stack, layer in huggingface_names.sparse_layers(config)
        for module in _expert_modules(config, stack, layer)
    ]
    _check_keys(file, sizes, modules, config)
    for module, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise CheckpointError(
                f"{file}: {module} is {size!r}, expected a number of codewords: copy the model "
                "again"
            )
    return sizes


def _read_dense(folder: pathlib.Path, config: SwitchConfig) -> dict[str, np.ndarray]:
    file = folder / "noexp.pt"
    tensors = torch_files.load(file)
    parameters = huggingface_names.dense_parameters(config)
    copies = huggingface_names.embedding_copies(config)
    _check_keys(file, tensors, [*copies, *(p.name for p in parameters.values())], config)
    shapes = parameter_shapes(config)
    arrays = {}
    for name, (hf_name, transposed) in parameters.items():
        shape = shapes[name][::-1] if transposed else shapes[name]
        array = torch_files.to_numpy(tensors[hf_name], f"{file}: {hf_name}", _DENSE_DTYPES, shape)
        if not np.isfinite(array).all():
            raise CheckpointError(
                f"{file}: {hf_name} holds NaN or infinite values: the file is damaged, copy the "
                "model again"
            )
        arrays[name] = np.ascontiguousarray(array.T) if transposed else array
    embedding = arrays[names.EMBEDDING]
    for hf_name in copies:
        where = f"{file}: {hf_name}"
        copy = torch_files.to_numpy(tensors[hf_name], where, _DENSE_DTYPES, embedding.shape)
        # Hugging Face's float32 base-128 has a bfloat16 lm_head beside a float32 embedding.
        if not np.array_equal(copy, embedding.astype(copy.dtype)):
            raise CheckpointError(
                f"{where} differs from shared.weight, but config.json ties them "
                f"(tie_word_embeddings is {config.tied_logits}): the file is damaged, or "
                "config.json is of another model"
            )
    return arrays


def _read_kernel(
    file: pathlib.Path,
    tensors: Mapping[str, Any],
    sizes: Mapping[str, int],
    config: SwitchConfig,
    place: tuple[str, int, str],
) -> CodedTensor:
    """Join the kernels of all experts of one layer, (stack, layer, wi or wo), as a coded tensor."""
    stack, layer, kernel = place
    shape = parameter_shapes(config)[names.expert_kernel(stack, layer, kernel)]
    experts, in_features, out_features = shape
    modules = [huggingface_names.expert_kernel(stack, layer, e, kernel) for e in range(experts)]
    what = f"{file}: {stack}.block.{layer}, experts' {kernel}"
    try:
        expert_offsets = to_offsets(np.array([sizes[m] for m in modules], np.int64), "sizes")
    except CodecError as error:
        raise CheckpointError(f"{what}: {error}") from error
    codewords = np.empty(expert_offsets[-1], np.uint16)
    counts = np.empty((experts, out_features), np.int32)
    levels = np.empty((experts, out_features, 2), ml_dtypes.bfloat16)
    for expert, module in enumerate(modules):
        here = f"{file}: {module}"
        part = torch_files.to_numpy(
            tensors[f"{module}.w_comp"], f"{here}.w_comp", ("int16",), (None,)
        )
        if part.size != sizes[module]:
            raise CheckpointError(
                f"{here}.w_comp has {part.size} codewords, but sizes.pt says {sizes[module]}: the "
                "files are of two models, or one is damaged; copy both again"
            )
        codewords[expert_offsets[expert] : expert_offsets[expert + 1]] = part.view(np.uint16)
        row_offsets = torch_files.to_numpy(
            tensors[f"{module}.row_off"], f"{here}.row_off", ("int32",), (out_features + 1,)
        )
        try:
            check_offsets(f"{here}.row_off", row_offsets, part.size, "codewords in w_comp")
        except CodecError as error:
            raise CheckpointError(f"{error} Copy the model again.") from error
        counts[expert] = np.diff(row_offsets)
        levels[expert] = torch_files.to_numpy(
            tensors[f"{module}.ter_minmax"],
            f"{here}.ter_minmax",
            ("bfloat16",),
            (2 * out_features,),
        ).reshape(out_features, 2)
        torch_files.to_numpy(tensors[f"{module}.weight"], f"{here}.weight", _DENSE_DTYPES, (0,))
    try:
        bound = row_bound(int(counts.max(initial=0)), in_features)
        arrays = {
            "codewords": codewords,
            "expert_offsets": expert_offsets,
            "row_lengths": counts.astype(row_length_dtype(bound)),
            "levels": levels,
        }
        coded = CodedTensor(TensorSpec(_CODING, experts, out_features, in_features, bound), arrays)
        codings.validate(coded)
    except CodecError as error:
        raise CheckpointError(
            f"{what} are no valid codes: {error} The file is damaged or config.json is of another "
            "model: copy the model again."
        ) from error
    return coded


# --- Export ---


def export_published(
    checkpoint: str | os.PathLike[str],
    output: str | os.PathLike[str],
    overwrite: bool = False,
    progress: bool = True,
) -> None:
    """Convert a compressed checkpoint to the layout of the published QMoE models.

    Dense parameters keep their dtype; the original's loader rounds them to bfloat16.

    Args:
      checkpoint: a compressed checkpoint whose experts have the coding "qmoe", local or gs://.
      output: local folder; visible once it is whole.
      overwrite: replace what is at `output`.
      progress: show a progress bar.

    Raises:
      CheckpointError: another coding, a geometry that the layout cannot hold, a damaged or
        incomplete checkpoint, PyTorch not installed, or something is at `output`.
      CodecError: damaged codes.
    """
    source = open_compressed_checkpoint(checkpoint)
    config = source.config
    fields = published_config.config_to_hf(config)
    _check_exportable(source)
    folder = OutputFolder(output, _KIND, inputs=[checkpoint], overwrite=overwrite)
    folder.begin(anew=True)
    partial = folder.partial
    try:
        content = json.dumps(fields | MARK, indent=2, sort_keys=True) + "\n"
        (partial / "config.json").write_text(content)
        torch_files.save(partial / "noexp.pt", _dense_to_hf(source))
        sizes: dict[str, int] = {}
        layers = huggingface_names.sparse_layers(config)
        for index, (stack, layer) in enumerate(
            show_progress(layers, title="exporting", unit="layers", shown=progress)
        ):
            tensors: dict[str, np.ndarray] = {}
            for kernel in _KERNELS:
                coded = source.read_coded(f"{names.mlp_prefix(stack, layer)}/expert/{kernel}")
                for expert in range(config.num_experts):
                    module = huggingface_names.expert_kernel(stack, layer, expert, kernel)
                    parts = _split_expert(coded, expert)
                    sizes[module] = parts["w_comp"].size
                    tensors |= {f"{module}.{part}": array for part, array in parts.items()}
            torch_files.save(partial / _expert_file(index), tensors)
        torch_files.save(partial / "sizes.pt", sizes)
        folder.finish()
    except BaseException:
        folder.discard()
        raise


def _check_exportable(source: CompressedCheckpoint) -> None:
    config = source.config
    if other := sorted({spec.coding for spec in source.specs.values()} - {_CODING}):
        ternary = codings.codings_of_grid(codings.get_coding(_CODING).grid)
        remedy = f"convert it first, qmoe-jax convert coding {_CODING} {source.url} OUTPUT"
        if not set(other) <= set(ternary):
            remedy = f"compress the model again with grid='ternary', expert_coding={_CODING!r}"
        raise CheckpointError(
            f"the experts of {source.url} have the coding {' and '.join(other)}, but the published "
            f"layout holds codewords of {_CODING!r} only: {remedy}"
        )
    shapes = parameter_shapes(config)
    kernels = {name for name in shapes if names.is_expert_kernel(name)}
    found = {f"{name}/kernel" for name in source.specs} | set(source.dense_names)
    if found != shapes.keys() or {f"{name}/kernel" for name in source.specs} != kernels:
        wrong = (found ^ shapes.keys()) | (kernels & set(source.dense_names))
        raise CheckpointError(
            f"{source.url} does not hold the parameters of its config, all experts as codes: see "
            f"{_listed(wrong)}. Compress the model again."
        )
    for name, spec in source.specs.items():
        experts, in_features, out_features = shapes[f"{name}/kernel"]
        if (spec.num_experts, spec.rows, spec.width) != (
            experts,
            out_features,
            in_features,
        ):
            raise CheckpointError(
                f"{name} of {source.url} has the spec {spec}, but its config implies {experts} "
                f"experts of [{out_features}, {in_features}]: compress the model again, without "
                "group_size, which the published layout has no place for"
            )


def _dense_to_hf(source: CompressedCheckpoint) -> dict[str, np.ndarray]:
    arrays = source.read_dense()
    tensors = {
        hf_name: arrays[name].T if transposed else arrays[name]
        for name, (hf_name, transposed) in huggingface_names.dense_parameters(source.config).items()
    }
    embedding = arrays[names.EMBEDDING]
    return tensors | dict.fromkeys(huggingface_names.embedding_copies(source.config), embedding)


def _split_expert(coded: CodedTensor, expert: int) -> dict[str, np.ndarray]:
    """Return the four arrays of one expert's kernel."""
    start, stop = coded.arrays["expert_offsets"][expert : expert + 2]
    return {
        "w_comp": coded.arrays["codewords"][start:stop].view(np.int16),
        "row_off": to_offsets(coded.arrays["row_lengths"][expert], "row_off"),
        "ter_minmax": coded.arrays["levels"][expert].reshape(-1),
        "weight": np.zeros(0, ml_dtypes.bfloat16),
    }


# --- Keys ---


def _expert_modules(config: SwitchConfig, stack: str, layer: int) -> list[str]:
    return [
        huggingface_names.expert_kernel(stack, layer, expert, kernel)
        for expert in range(config.num_experts)
        for kernel in _KERNELS
    ]


def _expert_keys(config: SwitchConfig, stack: str, layer: int) -> list[str]:
    return [f"{m}.{part}" for m in _expert_modules(config, stack, layer) for part in _PARTS]


def _check_keys(
    file: pathlib.Path, content: Mapping[str, Any], expected: Iterable[str], config: SwitchConfig
) -> None:
    expected = set(expected)
    geometry = (
        f"config.json says {config.num_encoder_layers} encoder and {config.num_decoder_layers} "
        f"decoder layers, {config.num_experts} experts in each sparse layer"
    )
    if missing := expected - content.keys():
        raise CheckpointError(
            f"{file} lacks {_listed(missing)}: {geometry}. The file is incomplete or of another "
            "model, copy the model again."
        )
    if extra := content.keys() - expected:
        raise CheckpointError(
            f"{file} has unexpected {_listed(extra)}: {geometry}. The files are of two models, or "
            "config.json is not this model's."
        )


def _listed(found: Iterable[str]) -> str:
    listed = sorted(found)
    more = len(listed) - _MOST_LISTED
    return ", ".join(listed[:_MOST_LISTED]) + (f" and {more} more" if more > 0 else "")
