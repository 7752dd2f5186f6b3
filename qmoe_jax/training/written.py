"""The checkpoint that a run ends with: the source with what was trained in it, codes unchanged."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from qmoe_jax.checkpoints.compressed import is_compressed_checkpoint, open_compressed_checkpoint
from qmoe_jax.checkpoints.compressed_writer import CompressedCheckpointWriter
from qmoe_jax.checkpoints.t5x import open_t5x_checkpoint
from qmoe_jax.checkpoints.t5x_writer import T5XCheckpointWriter
from qmoe_jax.codec import codings
from qmoe_jax.codec.tensor import CodedTensor

PathLike = str | os.PathLike[str]


def write_trained(
    source: PathLike,
    folder: Path,
    step: int,
    parameters: Mapping[str, np.ndarray],
    record: Mapping[str, Any],
) -> Path:
    """Write `FOLDER/checkpoint_<step>`: compressed from a compressed source, else native.

    One array, or the codes of one kernel, is in memory at a time.

    Args:
      source: checkpoint that was trained.
      folder: where it goes.
      step: training steps, of the name.
      parameters: what replaces the source's, by the names of its arrays
        (`encoder/layers_1/mlp/expert/wi/levels`); rounded to the dtypes that they are stored in.
      record: how it was made, JSON; kept in the manifest as `finetuned`.

    Raises:
      CheckpointError: the source cannot be read, or the output not written.
      CodecError: levels that no tensor can have.
    """
    if not is_compressed_checkpoint(source):
        return _write_native(source, folder, step, parameters)
    checkpoint = open_compressed_checkpoint(source)
    path = folder / f"checkpoint_{step}"
    writer = CompressedCheckpointWriter(path, overwrite=True, inputs=[source])
    for name in checkpoint.dense_names:
        array = checkpoint.read_dense([name])[name]
        writer.write_dense(name, _replaced(name, array, parameters))
    for kernel in checkpoint.specs:
        coded = checkpoint.read_coded(kernel)
        arrays = {
            name: _replaced(f"{kernel}/{name}", array, parameters)
            for name, array in coded.arrays.items()
        }
        changed = CodedTensor(coded.spec, arrays)
        codings.validate(changed)
        writer.write_coded(kernel, changed)
    writer.finish(checkpoint.config, {**checkpoint.compression, "finetuned": dict(record)})
    return path


def stored_parameters(
    source: PathLike, parameters: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Return parameters as `write_trained` stores them: in the dtypes of the source."""
    if is_compressed_checkpoint(source):
        checkpoint = open_compressed_checkpoint(source)
        kernels = {n: n.rpartition("/")[0] for n in parameters if n not in checkpoint.dense_names}
        held = checkpoint.read_dense([n for n in parameters if n not in kernels])
        for name, kernel in kernels.items():
            held[name] = checkpoint.read_coded(kernel).arrays[name.rpartition("/")[2]]
    else:
        native = open_t5x_checkpoint(source, cache_bytes=0)
        held = {name: native.read(name) for name in parameters}
    return {name: _replaced(name, held[name], parameters) for name in parameters}


def _write_native(
    source: PathLike, folder: Path, step: int, parameters: Mapping[str, np.ndarray]
) -> Path:
    native = open_t5x_checkpoint(source, cache_bytes=0)
    writer = T5XCheckpointWriter(folder, step, overwrite=True)  # of a killed run
    try:
        for name in native.names:
            array = _replaced(name, native.read(name), parameters)
            writer.create(name, array.shape, array.dtype.name)
            writer.write(name, array)
        return writer.finish()
    except BaseException:
        writer.discard()
        raise


def _replaced(name: str, array: np.ndarray, parameters: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return what is stored under a name: the trained values in the dtype of the source's."""
    if name not in parameters:
        return array
    value = np.asarray(parameters[name], np.float32)
    if array.dtype == ml_dtypes.bfloat16 or array.dtype == np.float32:
        return value.astype(array.dtype)
    raise AssertionError(f"{name} is {array.dtype}, and was trained")
