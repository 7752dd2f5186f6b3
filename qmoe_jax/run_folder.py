"""A folder that a resumable run works in: held by one process, for one set of settings.

Files in it are written atomically.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from qmoe_jax.atomic_file import write_atomically
from qmoe_jax.errors import CheckpointError

_SETTINGS = "run.json"
_MAX_NAMED = 8


class RunFolder:
    """Claims a folder for a run with these settings; a context manager that lets it go again."""

    def __init__(
        self, path: str | os.PathLike[str], settings: Mapping[str, Any], *, discard: bool = False
    ):
        """Make the folder or go on in it.

        Args:
          path: the folder.
          settings: what determines the results, JSON; kept in `run.json`.
          discard: where the folder belongs to other settings, throw its `.npz` files away.

        Raises:
          CheckpointError: another process holds the folder, it belongs to a run with other
            settings, or it cannot be written.
        """
        self.path = Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"cannot write {self.path} ({error}); choose another output"
            ) from error
        self._lock = lock_folder(self.path, ".lock", what=f"working in {self.path}")
        try:
            self._claim(json.loads(json.dumps(settings)), discard)
        except BaseException:
            self.close()
            raise

    def _claim(self, settings: dict[str, Any], discard: bool) -> None:
        file = self.path / _SETTINGS
        if file.exists():
            try:
                previous = json.loads(file.read_bytes())
            except ValueError:
                previous = {}
            if previous == settings:
                return
            if not discard:
                raise CheckpointError(
                    f"{self.path} holds a run with other settings "
                    f"({difference(previous, settings)}). Use the same settings, choose another "
                    "output, or pass overwrite=True to throw it away."
                )
            for path in self.path.glob("*.npz"):
                path.unlink()
        write_atomically(file, json.dumps(settings, indent=1, sort_keys=True).encode())

    def close(self) -> None:
        """Let other processes in."""
        self._lock.release()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return what differs between two settings: `tokens.seed: 0 became 1; ...`."""
    old, new = _flat(before), _flat(now)
    changed = [
        f"{key}: {old.get(key)!r} became {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    more = len(changed) - _MAX_NAMED
    return "; ".join(changed[:_MAX_NAMED]) + (f"; and {more} more" if more > 0 else "")


def lock_folder(folder: Path, name: str, *, what: str) -> FileLock:
    """Lock a folder for this process, without waiting; `release` lets others in.

    Args:
      folder: exists.
      name: of the lock's file in it.
      what: a process that holds it is doing, for the message.

    Raises:
      CheckpointError: another process holds it, or the file cannot be written.
    """
    # Released by whichever thread closes the run.
    lock = FileLock(folder / name, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise CheckpointError(
            f"another process is {what}; wait for it or choose another output"
        ) from error
    except (OSError, NotImplementedError) as error:
        raise CheckpointError(f"cannot write {folder} ({error}); choose another output") from error
    return lock


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
