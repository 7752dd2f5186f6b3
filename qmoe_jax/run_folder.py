"""A folder that a resumable run works in: held by one process, for one set of settings.

Files in it are written atomically.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from qmoe_jax.atomic_file import write_atomically
from qmoe_jax.errors import CheckpointError

_SETTINGS = "run.json"
_MARK = "qmoe_jax_run"  # tells our file from others of that name
_LOCK = ".lock"
_MAX_NAMED = 8


class RunFolder:
    """Claims a folder for a run with these settings; a context manager that lets it go again."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        settings: Mapping[str, Any],
        *,
        discard: bool = False,
        results: str = "shard_*.npz",
    ):
        """Make the folder or go on in it.

        Args:
          path: the folder.
          settings: what determines the results, JSON; kept in `run.json`.
          discard: throw away what an earlier run of ours left: the files that match `results`.
          results: pattern of the names of the files that hold results.

        Raises:
          CheckpointError: another process holds the folder, it belongs to a run with other
            settings or holds files and no run, or it cannot be written.
        """
        self.path = Path(path)
        check_run_folder(self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"cannot write {self.path} ({error}); choose another output"
            ) from error
        self._lock = lock_folder(self.path, _LOCK, what=f"working in {self.path}")
        try:
            self._claim(json.loads(json.dumps(settings)), results if discard else None)
        except BaseException:
            self.close()
            raise

    def _claim(self, settings: dict[str, Any], discarded: str | None) -> None:
        file = self.path / _SETTINGS
        if file.exists():
            previous = self._previous(file)
            if discarded is not None:
                for path in self.path.glob(discarded):
                    path.unlink()
            elif previous == settings:
                return
            else:
                raise CheckpointError(
                    f"{self.path} holds a run with other settings "
                    f"({difference(previous, settings)}). Use the same settings, choose another "
                    "output, or pass overwrite=True to throw it away."
                )
        content = json.dumps({_MARK: settings}, indent=1, sort_keys=True)
        write_atomically(file, content.encode())

    @staticmethod
    def _previous(file: Path) -> dict[str, Any]:
        """Read the settings of the run that the folder belongs to."""
        try:
            return dict(json.loads(file.read_bytes())[_MARK])
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(
                f"{file} is not that of a run of qmoe_jax, or is damaged; it stays as it is. "
                "Choose another output, or remove it yourself."
            ) from error

    def close(self) -> None:
        """Let other processes in."""
        self._lock.release()

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _is_begun(name: str) -> bool:
    """Whether a file of that name is there before the settings are."""
    return name == _LOCK or name.startswith(f".{_SETTINGS}.")


def check_run_folder(folder: Path) -> None:
    """Refuse a folder that holds files and no run, before anything is made there.

    Raises:
      CheckpointError: such a folder.
    """
    if not (folder / _SETTINGS).exists():
        check_own_folder(folder, _is_begun)


def check_own_folder(folder: Path, is_own: Callable[[str], bool]) -> None:
    """Refuse a folder that holds other files than a run's: they could be taken for its results.

    Args:
      folder: for a run; need not be there.
      is_own: whether a file of that name is a run's.

    Raises:
      CheckpointError: such a folder.
    """
    if not folder.is_dir():
        return
    if foreign := sorted(name for name in os.listdir(folder) if not is_own(name)):
        raise CheckpointError(
            f"{folder} holds {foreign[0]}, which is of no run of qmoe_jax; it stays as it is. "
            "Choose another folder, or an empty one"
        )


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
