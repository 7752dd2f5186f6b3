"""Writes native T5X checkpoints: a msgpack file `checkpoint` beside a zarr array per parameter.

Without optimizer state, as T5X saves what is only for inference. `checkpoints.layouts` describes
the layout, and reads it.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from flax import serialization

from qmoe_jax.checkpoints import names
from qmoe_jax.checkpoints.storage import short_message
from qmoe_jax.errors import CheckpointError
from qmoe_jax.outputs import FolderKind, OutputFolder
from qmoe_jax.paths import local_path

_VERSION = 3
_KIND = FolderKind(
    "a T5X checkpoint",
    lambda name: name == "checkpoint" or name.startswith("target."),
    lambda folder: (folder / "checkpoint").is_file(),
)
_CHUNK_BYTES = 1 << 24
_DTYPES = {"float32": ("<f4", 4), "bfloat16": ("bfloat16", 2)}  # zarr's name, bytes


class T5XCheckpointWriter:
    """Writes `FOLDER/checkpoint_<step>`, parameter by parameter or slice by slice.

    The checkpoint has a temporary name until `finish`: T5X never sees half of it. Local folders
    only.

    Attributes:
      path: where the checkpoint will be.
    """

    def __init__(self, folder: str | os.PathLike[str], step: int, *, overwrite: bool = False):
        """Begin a checkpoint; what an unfinished writer left behind is deleted.

        Args:
          folder: local.
          step: training steps, of its name.
          overwrite: replace a T5X checkpoint that is there, once the new one is whole.

        Raises:
          CheckpointError: it exists already, the folder is no local one, or the step is negative.
        """
        if step < 0:
            raise CheckpointError(f"step is {step}; a training step is at least 0")
        path = local_path(folder, "the folder of the output").absolute() / f"checkpoint_{step}"
        if os.path.lexists(path) and not overwrite:
            raise CheckpointError(f"{path} exists already; choose another folder or step")
        self._step = step
        self._folder = OutputFolder(path, _KIND, overwrite=overwrite)
        self._folder.begin(anew=True)
        self.path, self._partial = self._folder.path, self._folder.partial
        self._specs: dict[str, dict[str, Any]] = {}
        self._arrays: dict[str, ts.TensorStore] = {}

    def create(self, name: str, shape: tuple[int, ...], dtype: str) -> int:
        """Make room for a parameter.

        Args:
          name: its '/'-joined name, as `encoder/layers_1/mlp/expert/wi/kernel`.
          shape: of the array.
          dtype: "float32" or "bfloat16".

        Returns:
          How many entries of the first axis a stored chunk has (1 for a scalar): writing as many at
          a time, or a multiple, touches every chunk once.

        Raises:
          CheckpointError: another dtype, or it cannot be written.
        """
        if dtype not in _DTYPES:
            raise CheckpointError(f"{name} is {dtype}; a T5X checkpoint has {' or '.join(_DTYPES)}")
        zarr_dtype, item_bytes = _DTYPES[dtype]
        entry_bytes = item_bytes * int(np.prod(shape[1:], dtype=np.int64))
        entries = max(1, min(_CHUNK_BYTES // max(1, entry_bytes), shape[0] if shape else 1))
        metadata = {
            "shape": list(shape),
            "chunks": [entries, *(max(1, size) for size in shape[1:])] if shape else [],
            "compressor": {"id": "gzip", "level": 1},
        }
        array = names.to_dotted(name)
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": f"{self._partial}/{array}/"},
            "metadata": {**metadata, "dtype": zarr_dtype},
            # T5X, and our reader, want every chunk to be there, zeros included.
            "store_data_equal_to_fill_value": True,
            "create": True,
            "delete_existing": True,
        }
        self._arrays[name] = self._checked(name, lambda: ts.open(spec).result())
        self._specs[name] = {
            "driver": "zarr",
            "dtype": dtype,
            "kvstore": {"driver": "file", "path": f"{array}/"},
            "metadata": metadata,
        }
        return entries

    def write(self, name: str, array: np.ndarray, start: int = 0) -> None:
        """Write entries of a created parameter, from an index of its first axis on.

        Raises:
          CheckpointError: it cannot be written.
        """
        store = self._arrays[name]
        part = store[start : start + array.shape[0]] if array.ndim else store
        self._checked(name, lambda: part.write(array).result())

    def finish(self) -> Path:
        """Write the msgpack file, last, and give the checkpoint its name.

        Raises:
          CheckpointError: it cannot be written.
        """
        tree = {
            "version": _VERSION,
            "optimizer": {
                "state": {"step": np.int32(self._step)},
                "target": names.unflatten(dict(self._specs)),
            },
        }
        content = serialization.msgpack_serialize(tree)
        self._checked(
            "the msgpack file", lambda: (self._partial / "checkpoint").write_bytes(content)
        )
        return self._folder.finish()

    def discard(self) -> None:
        """Delete what was written, for a caller that cannot finish."""
        self._folder.discard()

    def _checked(self, name: str, action: Any) -> Any:
        try:
            return action()
        except Exception as error:
            raise CheckpointError(
                f"cannot write {name} to {self._partial}: {short_message(error)}. "
                "Check free space and permissions, then run again."
            ) from error
