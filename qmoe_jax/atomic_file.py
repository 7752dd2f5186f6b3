"""Files that are there whole or not at all: written under another name, synced and renamed."""

import contextlib
import glob
import json
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from qmoe_jax.errors import CheckpointError


@contextlib.contextmanager
def open_atomically(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open a local file to be written anew; it takes its name when the block ends.

    After a kill at any moment the file is the old one or the new one, whole. A block that raises
    leaves the old one and nothing else. Until the end the content is beside it, in a file whose
    name has the process's number: of two processes that write at once the later one's file stays.
    What a killed process of this machine left there, the next write removes.

    Raises:
      OSError: it cannot be written.
    """
    path = Path(path)
    ours = f".{path.name}.{platform.node()}-"
    partial = path.with_name(f"{ours}{os.getpid()}.partial")
    _remove_left(path.parent, ours)
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def _remove_left(folder: Path, ours: str) -> None:
    """Remove the partial files of processes that have ended."""
    for left in folder.glob(f"{glob.escape(ours)}*.partial"):
        number = left.name.removeprefix(ours).removesuffix(".partial")
        if number.isdigit() and not _is_running(int(number)):
            left.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


def write_json(
    path: str | os.PathLike[str], content: Any, *, indent: int = 1, sort_keys: bool = False
) -> None:
    """Write a file of indented JSON, as `open_atomically` does.

    Raises:
      OSError: it cannot be written.
      TypeError: the content is no JSON; the old file stays.
    """
    text = json.dumps(content, indent=indent, sort_keys=sort_keys) + "\n"
    with open_atomically(path) as file:
        file.write(text.encode())


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file of a run: after a kill at any moment it is the old one or the new one, whole.

    Raises:
      CheckpointError: it cannot be written.
    """
    try:
        with open_atomically(path) as file:
            file.write(content)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path} ({error}); free some space and run the same command again"
        ) from error
