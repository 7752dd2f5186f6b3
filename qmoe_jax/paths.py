"""One rule for every path that a user gives.

`~` is the home folder; `gs://` is storage, where the function says so, and never a folder of that
name; `file://` is local. Checkpoints go through `checkpoints.storage`, which reads both kinds, and
all that is local only through here.
"""

import os
import re
from pathlib import Path

from qmoe_jax.errors import CheckpointError

# A URL, or what was meant to be one: `gs:/bucket` and `gs:bucket` are no folders here.
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://|(gs|gcs|s3|file|https?):")


def local_path(
    path: str | os.PathLike[str], what: str, error: type[ValueError] = CheckpointError
) -> Path:
    """Return a local path as the system takes it.

    Args:
      path: as a user gives it.
      what: it is, for the message: "the log".
      error: to raise.

    Raises:
      ValueError: of the type `error`: it is empty, a URL, or begins with a user that there is not.
    """
    text = expanded(path, what, error).removeprefix("file://")
    if "://" in text:
        raise error(f"{what} is {text!r}; give a local path, and copy between it and storage")
    return Path(text)


def expanded(
    path: str | os.PathLike[str], what: str, error: type[ValueError] = CheckpointError
) -> str:
    """Return a path, local or a URL, with `~` expanded.

    Args:
      path: as a user gives it.
      what: it is, for the message.
      error: to raise.

    Raises:
      ValueError: of the type `error`: it is empty, neither a URL nor a local path, or begins with a
        user that there is not.
    """
    text = os.fspath(path)
    if not text:
        raise error(f"{what} is an empty path; give one")
    if (scheme := _SCHEME.match(text)) and not scheme[1]:
        raise error(f"{what} is {text!r}; write {scheme[2]}://, or ./{text} for a local file")
    if text.startswith("gs://") and not text.removeprefix("gs://").partition("/")[0]:
        raise error(f"{what} is {text!r}, which names no bucket; write gs://bucket/folder")
    if not text.startswith("~"):
        return text
    text = os.path.expanduser(text)
    if text.startswith("~"):
        user = text.partition("/")[0]
        raise error(f"{what} is {text!r}, but there is no user {user[1:]!r}; write ./{text}")
    return text
