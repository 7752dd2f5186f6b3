"""Files that are there whole or not at all: written under another name, synced and renamed."""

import os
from pathlib import Path

from qmoe_jax.errors import CheckpointError


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a local file: after a kill at any moment it is the old one or the new one, whole.

    Raises:
      CheckpointError: it cannot be written.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(
            f"cannot write {path} ({error}); free some space and run the same command again"
        ) from error
