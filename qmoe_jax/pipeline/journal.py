"""The journal: what is finished, on disk, so that a killed run goes on.

A finished batch of experts is one file, and so is the record of a finished layer, whose batches
are then in the output and leave the journal. Each is there whole or not at all. Hidden states are
not kept. A resumed run replays the forward pass through the codes that it finds, with the programs
of the first run, and so ends with the same bytes.
"""

import contextlib
import io
import json
import os
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qmoe_jax.atomic_file import write_atomically
from qmoe_jax.errors import CheckpointError
from qmoe_jax.outputs import is_json_object
from qmoe_jax.pipeline.schedule import Finished
from qmoe_jax.run_folder import check_own_folder, difference, lock_folder

_RUN = "run.json"
_ALLOCATION = "allocation.json"
_LAYER = ".layer.json"
_BATCH = ".npz"
_LOCK = "lock"
_OWN = re.compile(r"\w+_layer_\d+(\.layer\.json|_experts_\d+_\d+\.npz)")


def check_journal_folder(folder: Path) -> None:
    """Refuse a user's folder with files that a journal would take for its own, and delete.

    Args:
      folder: need not be there; one of several processes has its journal in a folder below it.

    Raises:
      CheckpointError: such a folder.
    """
    is_run = is_json_object(folder / _RUN, ("checkpoint", "settings", "versions"))

    def is_own(name: str) -> bool:
        if name in (_RUN, _ALLOCATION):
            return is_run
        return not name.endswith((_BATCH, _LAYER)) or _OWN.fullmatch(name) is not None

    check_own_folder(folder, is_own)


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
        except OSError as error:
            raise CheckpointError(f"cannot write to {folder}: {error}") from error
        self._lock = lock_folder(self._folder, _LOCK, what=f"writing {self._folder.parent}")
        try:
            self._claim(run, discard)
        except BaseException:
            self.close()
            raise

    def _claim(self, run: Mapping[str, Any], discard: bool) -> None:
        previous = self._read_run()
        if previous == dict(run):
            return
        if previous is not None:
            if not discard:
                raise CheckpointError(
                    f"{self._folder.parent} holds an unfinished run with other settings "
                    f"({difference(previous, run)}). Go on with the same settings, or pass "
                    "overwrite=True to throw it away."
                )
            self._forget_all()
        write_atomically(self._folder / _RUN, json.dumps(run, indent=1).encode())

    def close(self) -> None:
        """Let other processes in."""
        self._lock.release()

    def clear(self) -> None:
        """Delete what the journal has written, and the folder if nothing else is in it."""
        self._forget_all()
        for name in (_RUN, _ALLOCATION, _LOCK):
            (self._folder / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # it holds files of others
            self._folder.rmdir()

    def _forget_all(self) -> None:
        (self._folder / _ALLOCATION).unlink(missing_ok=True)
        for pattern in ("*" + _BATCH, "*" + _LAYER):
            for path in self._folder.glob(pattern):
                path.unlink()

    def finished(self) -> Finished:
        """List what is there."""
        return Finished(
            *(
                frozenset(
                    path.name.removesuffix(ending) for path in self._folder.glob("*" + ending)
                )
                for ending in (_LAYER, _BATCH)
            )
        )

    def save_allocation(self, steps: Mapping[str, float]) -> None:
        """Keep the steps that were chosen for the kernels: a resumed run takes the same."""
        text = json.dumps(dict(steps), indent=1)
        write_atomically(self._folder / _ALLOCATION, text.encode())

    def load_allocation(self) -> dict[str, float] | None:
        """Return the steps that were chosen for the kernels; None before.

        Raises:
          CheckpointError: the file is damaged.
        """
        path = self._folder / _ALLOCATION
        try:
            steps = json.loads(path.read_text())
            return {str(kernel): float(step) for kernel, step in steps.items()}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path} is damaged ({error}); delete it, and the run measures again"
            ) from error

    def load_batch(self, name: str, prefix: str) -> dict[str, np.ndarray]:
        """Read those arrays of a finished batch of experts whose names begin with `prefix`.

        Raises:
          CheckpointError: the file is damaged.
        """
        try:
            with (
                open(self._batch_path(name), "rb") as file,
                np.load(file, allow_pickle=False) as arrays,
            ):
                return {key: arrays[key] for key in arrays if key.startswith(prefix)}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise self.damaged(name, error) from error

    def damaged(self, name: str, error: Exception) -> CheckpointError:
        """Make the error that says that a batch of experts is damaged, and the remedy."""
        return CheckpointError(
            f"{self._batch_path(name)} is damaged ({error}); delete it, and the run computes it "
            "again"
        )

    def save_batch(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Store a finished batch of experts.

        Raises:
          CheckpointError: it cannot be written.
        """
        content = io.BytesIO()
        # pyright takes the arrays for savez's own flags.
        np.savez(content, allow_pickle=False, **arrays)  # pyright: ignore[reportArgumentType]
        write_atomically(self._batch_path(name), content.getvalue())

    def load_layer(self, name: str) -> Any:
        """Read the record of a finished layer.

        Raises:
          CheckpointError: the file is damaged.
        """
        path = self._folder / (name + _LAYER)
        try:
            return json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
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
        return self._folder / (name + _BATCH)

    def _read_run(self) -> dict[str, Any] | None:
        path = self._folder / _RUN
        if not path.exists():
            return None
        try:
            return json.loads(path.read_bytes())
        except ValueError:
            return {}
