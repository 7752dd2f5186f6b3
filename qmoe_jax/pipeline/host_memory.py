"""Memory of this process, as the system counts it."""

import ctypes
import functools
import sys
from collections.abc import Callable


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
