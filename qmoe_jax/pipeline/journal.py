"""The journal: every finished expert batch on disk, so that a killed run goes on.

A batch is one file, written under a temporary name, synced and renamed: it is there whole or not at
all. Hidden states are not kept. A resumed run replays the forward pass through the codes that it
finds, with the programs of the first run, and so ends with the same bytes.
"""

import fcntl
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from qmoe_jax.codec.encode import encode
from qmoe_jax.errors import CheckpointError
from qmoe_jax.pipeline.expert_pass import QuantizedKernel, QuantizedKernels

_RUN = "run.json"


class Journal:
    """Finished expert batches of one run, in a folder that only one process may hold.

    Attributes:
      num_replayed: batches that were found instead of computed.
    """

    def __init__(self, folder: str | os.PathLike[str], run: Mapping[str, Any], *, discard: bool):
        """Opens or begins a journal.

        Args:
          folder: where the batches are.
          run: what determines the output; a journal of another run is refused.
          discard: instead, throw a journal of another run away.

        Raises:
          CheckpointError: another process holds it, or it belongs to a run with other settings.
        """
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self._folder / "lock")
        self.num_replayed = 0
        previous = self._read_run()
        if previous is not None and previous != dict(run):
            if not discard:
                self._lock.close()
                raise CheckpointError(
                    f"{self._folder.parent} holds an unfinished run with other settings "
                    f"({_difference(previous, run)}). Go on with the same settings, or pass "
                    "overwrite=True to throw it away."
                )
            for path in self._folder.glob("*.npz"):
                path.unlink()
        _write_atomically(self._folder / _RUN, json.dumps(run, indent=1).encode())

    def close(self) -> None:
        """Lets other processes in."""
        self._lock.close()

    def __len__(self) -> int:
        return sum(1 for _ in self._folder.glob("*.npz"))

    def load(self, name: str) -> QuantizedKernels | None:
        """The kernels of a finished batch of experts by name; None where there is none."""
        path = self._folder / f"{name}.npz"
        if not path.exists():
            return None
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
                kernels = _from_arrays(arrays)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise CheckpointError(
                f"{path} is damaged ({error}); delete it, and the run computes it again"
            ) from error
        self.num_replayed += 1
        return kernels

    def save(self, name: str, kernels: QuantizedKernels) -> None:
        """Stores a finished batch of experts.

        Raises:
          CheckpointError: it cannot be written.
        """
        path = self._folder / f"{name}.npz"
        partial = path.with_suffix(".partial")
        try:
            with open(partial, "wb") as file:
                np.savez(file, allow_pickle=False, **_to_arrays(kernels))
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise CheckpointError(
                f"cannot write {path} ({error}); free some space and run the same command again, "
                "it goes on from here"
            ) from error

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


def _write_atomically(path: Path, content: bytes) -> None:
    partial = path.with_suffix(".partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def _difference(previous: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    """What differs between two runs, `settings.grid: 'ternary' became '2bit'`."""
    before, now = _flat(previous), _flat(run)
    changed = [
        f"{key}: {before.get(key)!r} became {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    return "; ".join(changed[:8]) + (f"; and {len(changed) - 8} more" if len(changed) > 8 else "")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _to_arrays(kernels: QuantizedKernels) -> dict[str, np.ndarray]:
    """Flat arrays for .npz: codes four to a byte, levels as their bits (.npz has no bfloat16)."""
    arrays = {}
    for name, kernel in kernels.items():
        packed = encode(kernel.codes, kernel.levels, "packed2").arrays["packed"]
        arrays[f"{name}/codes"] = packed
        arrays[f"{name}/shape"] = np.array(kernel.codes.shape, np.int64)
        arrays[f"{name}/levels"] = kernel.levels.view(np.uint16)
        for key, statistic in kernel.statistics.items():
            arrays[f"{name}/statistics/{key}"] = statistic
    return arrays


def _from_arrays(arrays: Mapping[str, np.ndarray]) -> QuantizedKernels:
    """Inverse of `_to_arrays`."""
    kernels = {}
    for entry in arrays:
        name, _, kind = entry.partition("/")
        if kind != "shape":
            continue
        experts, out, width = arrays[entry].tolist()
        shifts = np.arange(0, 8, 2, dtype=np.uint8)
        codes = arrays[f"{name}/codes"][..., None] >> shifts & 3
        prefix = f"{name}/statistics/"
        kernels[name] = QuantizedKernel(
            codes=codes.reshape(experts, out, -1)[..., :width],
            levels=arrays[f"{name}/levels"].view(ml_dtypes.bfloat16),
            statistics={
                key.removeprefix(prefix): arrays[key] for key in arrays if key.startswith(prefix)
            },
        )
    return kernels
