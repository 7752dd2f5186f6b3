"""The parameters in a Hugging Face folder, whole or in shards, read one at a time.

`model.safetensors` or `pytorch_model.bin`; or several of either, with an index beside them, whose
`weight_map` says which shard holds which parameter. Safetensors are read without PyTorch.
"""

import importlib
import json
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes  # noqa: F401  (makes "bfloat16" a dtype that NumPy knows by name)
import numpy as np

from qmoe_jax.checkpoints import torch_files
from qmoe_jax.errors import CheckpointError

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_TORCH_WHOLE = "pytorch_model.bin"
_TORCH_INDEX = "pytorch_model.bin.index.json"
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_REMEDY = "copy the model again"
_MOST_LISTED = 4


def safetensors_package() -> Any:
    """Import safetensors.

    Raises:
      CheckpointError: it is not installed.
    """
    try:
        importlib.import_module("safetensors.numpy")
        return importlib.import_module("safetensors")
    except ImportError as error:
        raise CheckpointError(
            "Hugging Face's safetensors are read and written by the package safetensors, which is "
            "not installed: pip install 'qmoe-jax[huggingface]'"
        ) from error


class HuggingFaceWeights:
    """The parameters of a Hugging Face folder; values are read when they are asked for.

    Memory is that of what is read, and of one shard that is mapped; PyTorch's stay mapped, since to
    open one again means to check it again.

    Attributes:
      folder: where the files are.
      shapes: by Hugging Face's name, `[out, in]` of a linear layer.
      dtypes: "float32", "float16" or "bfloat16", by name.
      bytes: of all files.
    """

    folder: pathlib.Path
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    bytes: int

    def __init__(self, folder: pathlib.Path):
        """Open every shard and read its header; safetensors win where both kinds are there.

        Raises:
          CheckpointError: no parameters in the folder; a shard is missing, truncated, damaged, or
            holds other parameters than the index says; or the package that reads it is missing.
        """
        self.folder = folder
        files = _shards(folder)
        self._shards: dict[str, _Safetensors | _Torch] = {}
        self._open: str | None = None
        self._places: dict[str, str] = {}
        self.shapes, self.dtypes, self.bytes = {}, {}, 0
        for file, expected in files.items():
            path = folder / file
            shard = (_Torch if file.endswith(".bin") else _Safetensors)(path)
            if expected is not None:
                _compare(path, expected, shard.shapes.keys())
            self._shards[file] = shard
            self._places |= dict.fromkeys(shard.shapes, file)
            self.shapes |= shard.shapes
            self.dtypes |= shard.dtypes
            self.bytes += path.stat().st_size

    def place(self, name: str) -> str:
        """Return the path of the shard that holds a parameter, and its name: for messages."""
        return f"{self.folder / self._places[name]}: {name}"

    def read(self, name: str) -> np.ndarray:
        """Read a parameter, in the dtype and layout that it is stored in.

        Raises:
          CheckpointError: it cannot be read, or holds NaN or infinite values.
        """
        place = self._places[name]
        if self._open not in (None, place):
            self._shards[self._open].close()
        self._open = place
        array = self._shards[place].read(name)
        if not np.isfinite(array).all():
            raise CheckpointError(
                f"{self.place(name)} holds NaN or infinite values: the file is damaged, or its "
                f"training diverged; {_REMEDY}"
            )
        return array


class _Safetensors:
    """One safetensors file."""

    def __init__(self, path: pathlib.Path):
        package = safetensors_package()
        self._path, self._error = path, package.SafetensorError
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: the model is incomplete, {_REMEDY}")
        self._package, self._file = package, None
        file = self._opened()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for name in file.keys():  # noqa: SIM118  (no mapping)
            entry = file.get_slice(name)
            if entry.get_dtype() not in _DTYPES:
                raise CheckpointError(
                    f"{path}: {name} is {entry.get_dtype()}, expected {', '.join(_DTYPES)}: "
                    "a quantized or another kind of model; give one with floating-point weights"
                )
            self.shapes[name] = tuple(entry.get_shape())
            self.dtypes[name] = _DTYPES[entry.get_dtype()]
        self.close()

    def _opened(self) -> Any:
        if self._file is None:
            try:
                self._file = self._package.safe_open(os.fspath(self._path), "np")
            except (self._error, OSError) as error:
                raise CheckpointError(
                    f"{self._path} cannot be read ({error}): it is truncated, damaged, or no file "
                    f"of safetensors; {_REMEDY}"
                ) from error
        return self._file

    def close(self) -> None:
        """Unmap the file until it is read again."""
        self._file = None

    def read(self, name: str) -> np.ndarray:
        """Read a parameter."""
        try:
            return self._opened().get_tensor(name)
        except (self._error, OSError) as error:
            raise CheckpointError(f"{self._path}: {name} cannot be read: {error}") from error


class _Torch:
    """One PyTorch file."""

    def __init__(self, path: pathlib.Path):
        self._path, self._content = path, torch_files.load(path)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for name, tensor in self._content.items():
            dtype = str(getattr(tensor, "dtype", type(tensor).__name__)).removeprefix("torch.")
            if dtype not in _DTYPES.values():
                raise CheckpointError(
                    f"{path}: {name} is {dtype}, expected {', '.join(_DTYPES.values())}: a "
                    "quantized or another kind of model; give one with floating-point weights"
                )
            self.shapes[name], self.dtypes[name] = tuple(tensor.shape), dtype

    def close(self) -> None:
        """Leave it mapped."""

    def read(self, name: str) -> np.ndarray:
        """Read a parameter."""
        return torch_files.to_numpy(
            self._content[name], f"{self._path}: {name}", (self.dtypes[name],), self.shapes[name]
        )


def _shards(folder: pathlib.Path) -> dict[str, set[str] | None]:
    """Return the names of the files, each with the parameters that an index says it has."""
    for whole, index in ((WHOLE, INDEX), (_TORCH_WHOLE, _TORCH_INDEX)):
        if (folder / index).is_file():
            return _read_index(folder / index)
        if (folder / whole).is_file():
            return {whole: None}
    raise CheckpointError(
        f"{folder} holds no parameters: expected {WHOLE}, {_TORCH_WHOLE}, or shards with "
        f"{INDEX} or {_TORCH_INDEX}"
    )


def _read_index(file: pathlib.Path) -> dict[str, set[str] | None]:
    try:
        places = json.loads(file.read_text("utf-8"))["weight_map"]
        if not isinstance(places, dict) or not places:
            raise TypeError("an empty weight_map")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file} is no index with a weight_map ({type(error).__name__}: {error}); {_REMEDY}"
        ) from error
    shards: dict[str, set[str] | None] = {}
    for name, shard in places.items():
        suffix = ".bin" if file.name == _TORCH_INDEX else ".safetensors"
        if not isinstance(shard, str) or shard != os.path.basename(shard) or "\0" in shard:
            raise CheckpointError(f"{file} says that {name} is in {shard!r}, expected a file name")
        if not shard.endswith(suffix):
            raise CheckpointError(f"{file} says that {name} is in {shard}, expected *{suffix}")
        names = shards.setdefault(shard, set())
        assert names is not None
        names.add(name)
    return shards


def _compare(path: pathlib.Path, expected: set[str], found: Iterable[str]) -> None:
    """Refuse a shard that is of another model, or of another number of shards."""
    found = set(found)
    wrong = {"lacks": expected - found, "has unexpected": found - expected}
    for what, which in wrong.items():
        if which:
            raise CheckpointError(
                f"{path} {what} {listed(which)}, going by the index beside it: the shard is of "
                f"another model or version; {_REMEDY}"
            )


def listed(names: Iterable[str]) -> str:
    """Name the first few, and how many more there are."""
    ordered = sorted(names)
    more = len(ordered) - _MOST_LISTED
    return ", ".join(ordered[:_MOST_LISTED]) + (f" and {more} more" if more > 0 else "")
