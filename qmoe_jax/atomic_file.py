"""Files that are there whole or not at all: written under another name, synced and renamed."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from qmoe_jax.errors import CheckpointError


@contextlib.contextmanager
def open_atomically(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Open a local file to be written anew; it takes its name when the block ends.

    After a kill at any moment the file is the old one or the new one, whole. A block that raises
    leaves the old one and nothing else. Until the end the content is in `.<name>.partial` beside
    it, which the next write takes over: one writer at a time.

    Raises:
      OSError: it cannot be written.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
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
