"""What libraries in C++ write to the process's stderr, kept from the reader unless it explains."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def captured_stderr() -> Iterator[None]:
    """Keep what is written to file descriptor 2; it is shown where the block raises an error.

    Such lines are written before a library can be told to be quiet, or whatever it is told.
    """
    try:
        saved = os.dup(2)
    except OSError:  # closed: nobody sees anything
        yield
        return
    with tempfile.TemporaryFile() as file:
        _flush()
        os.dup2(file.fileno(), 2)
        failed = False
        try:
            yield
        except Exception:
            failed = True
            raise
        finally:
            _flush()
            os.dup2(saved, 2)
            os.close(saved)
            if failed:
                file.seek(0)
                with contextlib.suppress(OSError):
                    os.write(2, file.read())


def _flush() -> None:
    if sys.stderr is not None:
        sys.stderr.flush()
