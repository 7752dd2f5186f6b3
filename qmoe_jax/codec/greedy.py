"""Fast greedy longest-match encoding of ternary rows. Slow twin: `reference.encode_row`.

Threads are Python's own around a numba kernel that releases the GIL, not numba's `prange`: numba's
portable threading layer ends the process when two Python threads enter it at once.
"""

import functools
import inspect
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Int32, UInt8, UInt16

from qmoe_jax.codec.dictionary import ROOT, dictionary

# Rows are handed to threads in chunks of about this many weights, which also bounds the scratch
# space: one byte a weight for every thread.
_CHUNK_WEIGHTS = 2**20


def encode_rows(
    codes: UInt8[np.ndarray, "rows in"],
) -> tuple[UInt16[np.ndarray, "codewords"], Int32[np.ndarray, "rows"]]:
    """Encode every row on its own: at each point the longest dictionary entry that matches.

    Args:
      codes: uint8 [rows, in], all at most 2 (not checked here). A row of odd width is taken as if
        a 0 followed.

    Returns:
      codewords, uint16, all rows one after another, and the number of codewords in each row.
    """
    rows, width = codes.shape
    counts = np.zeros(rows, np.int32)
    if codes.size == 0:
        return np.zeros(0, np.uint16), counts
    kernel, trie = _kernel(), dictionary().trie
    step = max(1, _CHUNK_WEIGHTS // width)

    def encode_chunk(start: int) -> np.ndarray:
        chunk = np.ascontiguousarray(codes[start : start + step])
        scratch = np.empty(chunk.shape[0] * ((width + 1) // 2), np.uint16)
        length = kernel(chunk, trie, scratch, counts[start : start + step])
        return scratch[:length].copy()

    starts = range(0, rows, step)
    if len(starts) == 1:
        return encode_chunk(0), counts
    with ThreadPoolExecutor(min(_num_threads(), len(starts))) as pool:
        return np.concatenate(list(pool.map(encode_chunk, starts))), counts


def _num_threads() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@functools.cache
def _kernel() -> Callable[..., int]:
    """Compile on first use (about a second); numba's on-disk cache needs a writable install."""
    import numba

    # Unwrapped, because a type-checking import hook may have put its own function around it.
    return numba.njit(nogil=True)(inspect.unwrap(_encode_chunk))


def _encode_chunk(codes, trie, codewords, counts):
    """Encode all rows of codes into codewords; return how many were written. Runs under numba."""
    rows, width = codes.shape
    position = 0
    for row in range(rows):
        first = position
        node = ROOT
        for column in range(0, width, 2):
            pair = codes[row, column]
            if column + 1 < width:
                pair += 3 * codes[row, column + 1]
            following = trie[node, pair]
            if following < 0:
                codewords[position] = node
                position += 1
                following = trie[ROOT, pair]
            node = following
        codewords[position] = node
        position += 1
        counts[row] = position - first
    return position
