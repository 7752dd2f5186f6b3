"""The adapter file: low-rank corrections of kernels, saved apart from the checkpoint they are for.

One `.npz`, a few MB, with float32 arrays and a JSON header (UTF-8 bytes, `header`):

| array | shape | of |
| --- | --- | --- |
| `PATH/a`, `PATH/b` | [in, rank], [rank, out] | the kernel `PATH/kernel`, which becomes W + a b |
| the same | [experts, in, rank], [experts, rank, out] | experts' kernels, each its own correction |
| the same | [1, in, rank], [1, rank, out] | experts' kernels, one correction for all of a layer |
"""

import dataclasses
import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float32

from qmoe_jax.atomic_file import open_atomically
from qmoe_jax.checkpoints.geometry import parameter_shapes
from qmoe_jax.config import SwitchConfig
from qmoe_jax.errors import CheckpointError
from qmoe_jax.paths import local_path

FORMAT = "qmoe_jax.adapters"
FORMAT_VERSION = 1

AdapterArrays = Mapping[str, Float32[np.ndarray, "..."]]


@dataclasses.dataclass(frozen=True)
class Adapters:
    """What an adapter file holds.

    Attributes:
      arrays: float32, `PATH/a` and `PATH/b` by name.
      metadata: JSON: what they were trained on, with which settings.
    """

    arrays: AdapterArrays
    metadata: Mapping[str, Any]

    def sha256(self) -> str:
        """Return a digest of the arrays, by which runs tell adapters apart."""
        return _digest(self.arrays)

    def check(self, config: SwitchConfig) -> None:
        """Refuse adapters that do not fit a model.

        Raises:
          CheckpointError: a kernel that it does not have, or has in another shape; or half a pair.
        """
        shapes = parameter_shapes(config)
        for name, array in self.arrays.items():
            path, _, part = name.rpartition("/")
            shape = shapes.get(f"{path}/kernel")
            if part not in ("a", "b") or shape is None:
                raise CheckpointError(
                    f"the adapters are for {name}, and the model has no kernel {path}; they belong "
                    "to another model"
                )
            other = self.arrays.get(f"{path}/{'b' if part == 'a' else 'a'}")
            if other is None:
                raise CheckpointError(
                    f"the adapters of {path} have {part!r} alone; 'a' and 'b' are needed"
                )
            a, b = (array, other) if part == "a" else (other, array)
            fits = (
                a.ndim == b.ndim == len(shape)
                and a.shape[-1] == b.shape[-2]
                and (a.shape[-2], b.shape[-1]) == shape[-2:]
                and all(
                    n in (1, full)
                    for half in (a, b)
                    for n, full in zip(half.shape[:-2], shape[:-2], strict=True)
                )
            )
            if not fits:
                raise CheckpointError(
                    f"the adapters of {path} have the shapes {a.shape} and {b.shape}; the model's "
                    f"kernel is {shape}. They belong to another model"
                )


def write_adapters(
    path: str | os.PathLike[str], arrays: AdapterArrays, metadata: Mapping[str, Any]
) -> None:
    """Write an adapter file, whole or not at all; equal contents give equal bytes.

    Raises:
      OSError: it cannot be written.
    """
    file_path = local_path(path, "the adapter file")
    arrays = {name: np.asarray(array, np.float32) for name, array in sorted(arrays.items())}
    header = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "sha256": _digest(arrays),
        "metadata": dict(metadata),
    }
    text = json.dumps(header, sort_keys=True).encode()
    with open_atomically(file_path) as file:
        # pyright takes the arrays for savez's own flags.
        np.savez(file, header=np.frombuffer(text, np.uint8), **arrays)  # pyright: ignore[reportArgumentType]


def read_adapters(path: str | os.PathLike[str]) -> Adapters:
    """Read and check an adapter file.

    Raises:
      CheckpointError: it is missing, truncated, altered, of another version, or something else.
    """
    file_path = local_path(path, "the adapter file")
    if not file_path.is_file():
        raise CheckpointError(
            f"there is no adapter file {file_path}; give the adapters.npz of a run of "
            "`qmoe-jax finetune` with TRAINABLE = 'lora'"
        )
    try:
        with open(file_path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        header = json.loads(arrays.pop("header").tobytes())
        found, digest = (header["format"], header["version"]), header["sha256"]
        metadata = dict(header["metadata"])
    except (ValueError, OSError, EOFError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file_path} is no adapter file, or is truncated ({error}); copy it again"
        ) from error
    except (zipfile.BadZipFile, zlib.error) as error:
        raise CheckpointError(f"{file_path} is damaged ({error}); copy it again") from error
    if found != (FORMAT, FORMAT_VERSION):
        raise CheckpointError(
            f"{file_path} is {found[0]!r} version {found[1]!r}; this program reads {FORMAT!r} "
            f"version {FORMAT_VERSION}"
        )
    if any(array.dtype != np.float32 for array in arrays.values()) or digest != _digest(arrays):
        raise CheckpointError(f"{file_path} was altered: its arrays have another sha256; copy it")
    return Adapters(arrays, metadata)


def _digest(arrays: AdapterArrays) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.shape} float32\n".encode())
        digest.update(np.ascontiguousarray(array, "<f4").tobytes())
    return digest.hexdigest()
