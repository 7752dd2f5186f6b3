"""Files of PyTorch tensors: read without unpickling code, to and from NumPy without a copy.

PyTorch is imported when the first file is read or written. It is needed for nothing else.
"""

import importlib
import pathlib
import pickle
import zipfile
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from qmoe_jax.errors import CheckpointError


def _torch() -> Any:
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise CheckpointError(
            "these are PyTorch files, and PyTorch is not installed: pip install 'qmoe-jax[torch]' "
            "(a CPU build is enough)"
        ) from error


def load(path: pathlib.Path) -> dict[str, Any]:
    """Read a dict that `torch.save` wrote; tensors are memory-mapped.

    The checksum that PyTorch stores with every tensor is compared first.

    Raises:
      CheckpointError: no PyTorch, no such file, a truncated or damaged one, or one that holds
        anything but a dict with string keys.
    """
    torch = _torch()
    remedy = "copy the model again"
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: the model is incomplete, {remedy}")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(
                f"{path}: the record {damaged} does not match its checksum: the file is damaged, "
                f"{remedy}"
            )
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, zipfile.BadZipFile, pickle.UnpicklingError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}: {str(error).splitlines()[0]}): it is "
            f"truncated, damaged, or no file of PyTorch tensors; {remedy}"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, expected a dict with names as keys: it is "
            "no file of a model's parameters"
        )
    return content


def save(path: pathlib.Path, content: Mapping[str, np.ndarray | int]) -> None:
    """Write a dict of arrays (copied) and integers with `torch.save`."""
    torch = _torch()
    torch.save({name: _to_torch(torch, value) for name, value in content.items()}, path)


def _to_torch(torch: Any, value: np.ndarray | int) -> Any:
    if isinstance(value, int):
        return value
    # A copy of its own: torch.save writes the whole memory behind a view.
    copy = np.array(value, order="C")
    if copy.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(copy.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(copy)


def to_numpy(
    tensor: Any, name: str, dtypes: tuple[str, ...], shape: tuple[int | None, ...]
) -> np.ndarray:
    """Return the array of a tensor, after checking its dtype and shape.

    Args:
      tensor: a value that `load` returned.
      name: file and key, for messages.
      dtypes: names of the allowed dtypes, "bfloat16" for example.
      shape: None is any size.

    Raises:
      CheckpointError: no tensor, another dtype or another shape.
    """
    torch = _torch()
    if not isinstance(tensor, torch.Tensor):
        raise CheckpointError(f"{name} is a {type(tensor).__name__}, expected a tensor")
    dtype = str(tensor.dtype).removeprefix("torch.")
    fits = tensor.ndim == len(shape) and all(
        want is None or have == want for have, want in zip(tensor.shape, shape, strict=True)
    )
    if dtype not in dtypes or not fits or tensor.layout is not torch.strided:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise CheckpointError(
            f"{name} is {dtype} {list(tensor.shape)}, expected {' or '.join(dtypes)} [{wanted}]: "
            "the file is damaged, or of another model than config.json"
        )
    tensor = tensor.detach().contiguous()
    if dtype == "bfloat16":
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
