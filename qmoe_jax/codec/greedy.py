"""Fast greedy longest-match encoding of ternary rows. Reference: `reference.encode_row`."""

import numpy as np
from jaxtyping import Int32, UInt8, UInt16

from qmoe_jax.codec.dictionary import ROOT, dictionary
from qmoe_jax.host_threads import compiled, map_row_chunks


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
    kernel, trie = compiled(_encode_chunk), dictionary().trie

    def encode_chunk(rows: slice) -> np.ndarray:
        chunk = np.ascontiguousarray(codes[rows])
        scratch = np.empty(chunk.shape[0] * ((width + 1) // 2), np.uint16)
        length = kernel(chunk, trie, scratch, counts[rows])
        return scratch[:length].copy()

    return np.concatenate(map_row_chunks(encode_chunk, rows, width)), counts


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
