"""One rule for every path that a user gives.

`~` is the home folder; `gs://` is storage, where the function says so, and never a folder of that
name; `file://` is local. Checkpoints go through `checkpoints.storage`, which reads both kinds, and
all that is local only through here.
"""

import os
from pathlib import Path

from qmoe_jax.errors import CheckpointError


def local_path(
    path: str | os.PathLike[str], what: str, error: type[ValueError] = CheckpointError
) -> Path:
    """Return a local path as the system takes it.

    Args:
      path: as a user gives it.
      what: it is, for the message: "the log".
      error: to raise.

    Raises:
      ValueError: of the type `error`: it is empty, or a URL.
    """
    text = os.fspath(path).removeprefix("file://")
    if "://" in text:
        raise error(f"{what} is {text}; give a local path, and copy between it and storage")
    if not text:
        raise error(f"{what} is an empty path; give a local one")
    return Path(os.path.expanduser(text))
