"""Compiled loops on all cores: numba kernels that release the GIL, on Python's own threads.

Not numba's `prange`: its portable threading layer ends the process when two Python threads enter it
at once.
"""

import functools
import inspect
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

# Rows are handed to threads in chunks of about this many weights, which also bounds the scratch
# space of every thread.
_CHUNK_WEIGHTS = 2**20


@functools.cache
def compiled(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Compile on first use (a second or two); numba's on-disk cache needs a writable install.

    A product and a sum may become one fused operation, rounded once.
    """
    import numba

    # Unwrapped, because a type-checking import hook may have put its own function around it.
    return numba.njit(nogil=True, fastmath={"contract"})(inspect.unwrap(kernel))


def map_row_chunks(work: Callable[[slice], Any], rows: int, width: int) -> list[Any]:
    """Call work on slices that cover range(rows), on all cores; results in the order of rows."""
    step = max(1, _CHUNK_WEIGHTS // width)
    chunks = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
    if len(chunks) <= 1:
        return [work(chunk) for chunk in chunks]
    with ThreadPoolExecutor(min(num_threads(), len(chunks))) as pool:
        return list(pool.map(work, chunks))


def num_threads() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
