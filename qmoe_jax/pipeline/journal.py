"""The journal: what is finished, on disk, so that a killed run goes on.

A finished batch of experts is one file, and so is the record of a finished layer, whose batches
are then in the output and leave the journal. Each is written under a temporary name, synced and
renamed: it is there whole or not at all. Hidden states are not kept. A resumed run replays the
forward pass through the codes that it finds, with the programs of the first run, and so ends with
the same bytes.
"""

import contextlib
import dataclasses
import fcntl
import io
import json
import os
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from qmoe_jax.atomic_file import write_atomically
from qmoe_jax.codec import codings
from qmoe_jax.codec.codings import get_coding
from qmoe_jax.codec.tensor import CodedTensor, TensorSpec
from qmoe_jax.errors import CheckpointError, CodecError
from qmoe_jax.run_folder import difference

_RUN = "run.json"
_LAYER = ".layer.json"
_LOCK = "lock"


@dataclasses.dataclass(frozen=True)
class FinishedKernel:
    """One kernel of a finished batch of experts.

    Attributes:
      coded: its codes as they will be stored.
      statistics: arrays [experts] by name, of `expert_pass.QuantizedKernel`.
    """

    coded: CodedTensor
    statistics: dict[str, np.ndarray]


FinishedKernels = dict[str, FinishedKernel]


class Journal:
    """Finished expert batches and layers of a run, in a folder that only one process may hold."""

    def __init__(self, folder: str | os.PathLike[str], run: Mapping[str, Any], *, discard: bool):
        """Open or begin a journal.

        Args:
          folder: where the batches are.
          run: what determines the output; a journal of another run is refused.
          discard: instead, throw a journal of another run away.

        Raises:
          CheckpointError: another process holds it, or it belongs to a run with other settings.
        """
        self._folder = Path(folder)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self._folder / _LOCK)
        except OSError as error:
            raise CheckpointError(f"cannot write to {folder}: {error}") from error
        previous = self._read_run()
        if previous is not None and previous != dict(run):
            if not discard:
                self._lock.close()
                raise CheckpointError(
                    f"{self._folder.parent} holds an unfinished run with other settings "
                    f"({difference(previous, run)}). Go on with the same settings, or pass "
                    "overwrite=True to throw it away."
                )
            self._forget_all()
        if previous != dict(run):
            try:
                write_atomically(self._folder / _RUN, json.dumps(run, indent=1).encode())
            except CheckpointError:
                self._lock.close()
                raise

    def close(self) -> None:
        """Let other processes in."""
        self._lock.close()

    def clear(self) -> None:
        """Delete what the journal has written, and the folder if nothing else is in it."""
        self._forget_all()
        for name in (_RUN, _LOCK):
            (self._folder / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # it holds files of others
            self._folder.rmdir()

    def _forget_all(self) -> None:
        for pattern in ("*.npz", "*" + _LAYER):
            for path in self._folder.glob(pattern):
                path.unlink()

    def __len__(self) -> int:
        return sum(1 for _ in self._folder.glob("*.npz"))

    @property
    def num_layers(self) -> int:
        """Finished layers."""
        return sum(1 for _ in self._folder.glob("*" + _LAYER))

    def has_batch(self, name: str) -> bool:
        """Whether a batch of experts is there."""
        return self._batch_path(name).exists()

    def load_batch(self, name: str, only: str | None = None) -> FinishedKernels:
        """Return the kernels of a finished batch of experts by name, or `only` one of them.

        Raises:
          CheckpointError: the file is damaged.
        """
        path = self._batch_path(name)
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
                return _from_arrays(arrays, only)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile, CodecError) as error:
            raise CheckpointError(
                f"{path} is damaged ({error}); delete it, and the run computes it again"
            ) from error

    def save_batch(self, name: str, kernels: FinishedKernels) -> None:
        """Store a finished batch of experts.

        Raises:
          CheckpointError: it cannot be written.
        """
        content = io.BytesIO()
        np.savez(content, allow_pickle=False, **_to_arrays(kernels))
        write_atomically(self._batch_path(name), content.getvalue())

    def load_layer(self, name: str) -> Any:
        """Return the record of a finished layer; None where there is none.

        Raises:
          CheckpointError: the file is damaged.
        """
        path = self._folder / (name + _LAYER)
        if not path.exists():
            return None
        try:
            return json.loads(path.read_bytes())
        except ValueError as error:
            raise CheckpointError(
                f"{path} is damaged ({error}); run again with overwrite=True to begin anew"
            ) from error

    def save_layer(self, name: str, record: Any) -> None:
        """Store what must be known of a layer whose codes are in the output.

        Raises:
          CheckpointError: it cannot be written.
        """
        write_atomically(self._folder / (name + _LAYER), json.dumps(record).encode())

    def forget_batches(self, names: Iterable[str]) -> None:
        """Delete batches of experts, those that there are."""
        for name in names:
            self._batch_path(name).unlink(missing_ok=True)

    def _batch_path(self, name: str) -> Path:
        return self._folder / f"{name}.npz"

    def _read_run(self) -> dict[str, Any] | None:
        path = self._folder / _RUN
        if not path.exists():
            return None
        try:
            return json.loads(path.read_bytes())
        except ValueError:
            return {}


def _lock(path: Path) -> IO[bytes]:
    file = open(path, "wb")  # noqa: SIM115 - held as long as the run
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise CheckpointError(
            f"another process is writing {path.parent.parent}; wait for it or choose another output"
        ) from error
    return file


def _to_arrays(kernels: FinishedKernels) -> dict[str, np.ndarray]:
    """Flat arrays for .npz; bfloat16 as its bits, which .npz has no name for."""
    arrays = {}
    for name, kernel in kernels.items():
        spec = json.dumps(kernel.coded.spec.to_json()).encode()
        arrays[f"{name}/spec"] = np.frombuffer(spec, np.uint8)
        for key, array in kernel.coded.arrays.items():
            is_bfloat16 = array.dtype == ml_dtypes.bfloat16
            arrays[f"{name}/coded/{key}"] = array.view(np.uint16) if is_bfloat16 else array
        for key, statistic in kernel.statistics.items():
            arrays[f"{name}/statistics/{key}"] = statistic
    return arrays


def _from_arrays(arrays: Mapping[str, np.ndarray], only: str | None) -> FinishedKernels:
    """Inverse of `_to_arrays`."""
    kernels = {}
    for name in [entry.removesuffix("/spec") for entry in arrays if entry.endswith("/spec")]:
        if only not in (None, name):
            continue
        spec = TensorSpec.from_json(json.loads(arrays[f"{name}/spec"].tobytes()))
        coded = {key: arrays[f"{name}/coded/{key}"] for key in get_coding(spec.coding).array_names}
        coded["levels"] = coded["levels"].view(ml_dtypes.bfloat16)
        prefix = f"{name}/statistics/"
        kernels[name] = FinishedKernel(
            coded=CodedTensor(spec, coded),
            statistics={
                key.removeprefix(prefix): arrays[key] for key in arrays if key.startswith(prefix)
            },
        )
        codings.validate(kernels[name].coded)
    return kernels
