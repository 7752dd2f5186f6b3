"""The machine-readable log of a run: one JSON object a line, a line a finished layer."""

import json
import os
import time
from typing import Any

from qmoe_jax.errors import CheckpointError


class RunLog:
    """Appends to a file; a resumed run goes on in the same one.

    Every line has `event` and `time` (seconds since 1970).
    """

    def __init__(self, path: str | os.PathLike[str] | None):
        """Open the log; None logs nothing."""
        self._path = path

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
