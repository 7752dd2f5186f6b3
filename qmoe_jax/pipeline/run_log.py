"""What a run tells of itself while it goes: a machine-readable log, and the memory it has taken.

The log has one JSON object a line, a line a finished layer.
"""

import ctypes
import functools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qmoe_jax.errors import CheckpointError
from qmoe_jax.outputs import output_file


class RunLog:
    """Appends to a file; a resumed run goes on in the same one.

    Every line has `event` and `time` (seconds since 1970).
    """

    def __init__(self, path: str | os.PathLike[str] | None):
        """Open the log; None logs nothing.

        Raises:
          CheckpointError: nothing can be written there, or another file is there.
        """
        self._path = None if path is None else output_file(path, "the log", _is_log)

    def write(self, event: str, **fields: Any) -> None:
        """Add a line.

        Raises:
          CheckpointError: it cannot be written.
        """
        if self._path is None:
            return
        line = json.dumps({"event": event, "time": round(time.time(), 3), **fields})
        try:
            with open(self._path, "a") as file:
                file.write(line + "\n")
        except OSError as error:
            raise CheckpointError(f"cannot write the log {self._path}: {error}") from error


def _is_log(file: Path) -> bool:
    """Whether the file begins as a log does."""
    try:
        with open(file, "rb") as lines:
            return "event" in json.loads(lines.readline())
    except (OSError, ValueError, TypeError):
        return False


def peak_host_bytes() -> int:
    """Return the most memory that this process has held so far (resident set)."""
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def return_free_memory() -> None:
    """Give the system back what the allocator keeps of freed memory; glibc only, else nothing.

    Arrays of a layer are freed in another order than they came, and what lies between the
    remaining ones would stay with the process and grow from layer to layer.
    """
    _malloc_trim()(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int]:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library; Windows
        return lambda _: 0
