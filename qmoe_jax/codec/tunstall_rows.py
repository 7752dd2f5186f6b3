"""Fast "tunstall" encoding of rows, and a walk over stored rows. Slow twins in `reference`.

Both work on *symbols*: 0 zero, 1 and 2 the non-zero weights told apart by a sign bit, 3 escaped.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Int64, UInt8

from qmoe_jax.codec.tunstall import MAX_ENTRY_NONZEROS, NUM_CODEWORDS, TunstallFamily
from qmoe_jax.host_threads import compiled, map_row_chunks

FAULTS = {
    1: "has no codewords left before its last weight",
    2: "has an escape that names no further non-zero weight of the entry behind it",
    3: "has a non-zero weight after its last weight",
    4: "has a size other than its codewords and sign bits need",
    5: "has set bits after its last sign bit",
    6: "has a set sign bit for an escaped weight",
}
"""What a walk can find wrong with a row."""


class EncodedRows(NamedTuple):
    """Rows one after another, without gaps."""

    data: UInt8[np.ndarray, "bytes"]
    num_bytes: Int32[np.ndarray, "rows"]
    num_codewords: Int32[np.ndarray, "rows"]


class RowWalk(NamedTuple):
    """What a walk over stored rows finds."""

    faults: Int32[np.ndarray, "rows"]
    """0, or a key of FAULTS."""
    num_codewords: Int32[np.ndarray, "rows"]
    symbol_counts: Int64[np.ndarray, "rows 4"]


def encode_rows(
    codes: UInt8[np.ndarray, "rows in"],
    symbols: UInt8[np.ndarray, "rows 4"],
    dictionaries: UInt8[np.ndarray, "rows"],
    family: TunstallFamily,
) -> EncodedRows:
    """Encode every row on its own.

    Args:
      codes: at least one in a row.
      symbols: symbols[row, code] is the code's symbol; 3 only with a family that has escapes.
      dictionaries: number of each row's dictionary.
      family: the coding's dictionaries.
    """
    rows, width = codes.shape
    num_bytes, num_codewords = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
    # A codeword a weight and an escape before it, at the very most, and a sign bit.
    most = width * (2 if family.num_escapes else 1) + width // 8 + 1

    def encode_chunk(chunk: slice) -> np.ndarray:
        part = np.ascontiguousarray(codes[chunk])
        scratch = np.empty(part.shape[0] * most, np.uint8)
        length = compiled(_encode_chunk)(
            part,
            symbols[chunk],
            dictionaries[chunk],
            family.trie,
            scratch,
            num_bytes[chunk],
            num_codewords[chunk],
        )
        return scratch[:length].copy()

    parts = map_row_chunks(encode_chunk, rows, width)
    data = np.concatenate(parts) if parts else np.zeros(0, np.uint8)
    return EncodedRows(data, num_bytes, num_codewords)


def walk_rows(
    data: UInt8[np.ndarray, "bytes"],
    row_starts: Int64[np.ndarray, "rows"],
    row_ends: Int64[np.ndarray, "rows"],
    dictionaries: UInt8[np.ndarray, "rows"],
    width: int,
    family: TunstallFamily,
) -> RowWalk:
    """Check and count rows without keeping their codes. All bounds must lie within data."""
    rows = row_starts.size
    walk = RowWalk(np.zeros(rows, np.int32), np.zeros(rows, np.int32), np.zeros((rows, 4), int))

    def walk_chunk(chunk: slice) -> None:
        compiled(_walk_chunk)(
            data,
            row_starts[chunk],
            row_ends[chunk],
            dictionaries[chunk],
            width,
            family.table,
            NUM_CODEWORDS - family.num_escapes,
            *(part[chunk] for part in walk),
        )

    map_row_chunks(walk_chunk, rows, width)
    return walk


def _encode_chunk(codes, symbols, dictionaries, trie, data, num_bytes, num_codewords):
    """Encode rows into data; return how many bytes were written. Runs under numba."""
    rows, width = codes.shape
    signs = np.zeros(width // 8 + 1, np.uint8)
    escaped = np.zeros(MAX_ENTRY_NONZEROS, np.bool_)
    first_escape = NUM_CODEWORDS - MAX_ENTRY_NONZEROS
    position = 0
    for row in range(rows):
        first = position
        tree = trie[dictionaries[row]]
        lut = symbols[row]
        node = 0
        rank = 0  # of the next non-zero weight in its row
        entry_rank = 0  # the same at the entry's start
        any_escaped = False
        for column in range(width):
            symbol = lut[codes[row, column]]
            if symbol == 0:
                node = tree[node, 0]
            else:
                if rank & 7 == 0:
                    signs[rank >> 3] = 0
                if symbol == 2:
                    signs[rank >> 3] |= 0x80 >> (rank & 7)
                elif symbol == 3:
                    escaped[rank - entry_rank] = True
                    any_escaped = True
                rank += 1
                node = tree[node, 1]
            if column == width - 1:
                while node > 0:
                    node = tree[node, 0]
            if node < 0:
                if any_escaped:
                    for place in range(rank - entry_rank):
                        if escaped[place]:
                            data[position] = first_escape + place
                            position += 1
                            escaped[place] = False
                    any_escaped = False
                data[position] = -1 - node
                position += 1
                node = 0
                entry_rank = rank
        num_codewords[row] = position - first
        for index in range((rank + 7) // 8 - 1, -1, -1):
            data[position] = signs[index]
            position += 1
        num_bytes[row] = position - first
    return position


def _walk_chunk(
    data,
    row_starts,
    row_ends,
    dictionaries,
    width,
    table,
    num_entries,
    faults,
    num_codewords,
    symbol_counts,
):
    """Decode rows and note what is wrong and how often symbols occur. Runs under numba."""
    for row in range(row_starts.size):
        start, end = row_starts[row], row_ends[row]
        entries = table[dictionaries[row]]
        at = start
        column = 0
        rank = 0
        num_escaped = 0
        escapes = 0  # of the next entry, one bit for each non-zero weight
        fault = 0
        while column < width and fault == 0:
            if at >= end:
                fault = 1
                break
            codeword = data[at]
            at += 1
            if codeword >= num_entries:
                place = codeword - num_entries
                if escapes >> place != 0:
                    fault = 2
                escapes |= 1 << place
                continue
            low, high = np.uint64(entries[codeword, 0]), np.uint64(entries[codeword, 1])
            bits = low | high << np.uint64(32)
            length = np.int64(bits & np.uint64(63))
            mask = bits >> np.uint64(6)
            entry_rank = rank
            for place in range(length):
                if mask >> np.uint64(place) & np.uint64(1):
                    if column + place >= width:
                        fault = 3
                        break
                    if escapes >> (rank - entry_rank) & 1:
                        num_escaped += 1
                        back = end - 1 - rank // 8
                        if back >= start and data[back] << (rank & 7) & 0x80:
                            fault = 6
                    rank += 1
            if fault == 0 and escapes >> (rank - entry_rank) != 0:
                fault = 2
            escapes = 0
            column += length
        num_codewords[row] = at - start
        if fault == 0 and at + (rank + 7) // 8 != end:
            fault = 4
        if fault == 0:
            used = rank & 7
            if used and data[at] << used & 0xFF:
                fault = 5
            high_signs = 0
            for index in range(at, end):
                byte = data[index]
                while byte:
                    high_signs += byte & 1
                    byte >>= 1
            symbol_counts[row, 0] = width - rank
            symbol_counts[row, 1] = rank - high_signs - num_escaped
            symbol_counts[row, 2] = high_signs
            symbol_counts[row, 3] = num_escaped
        faults[row] = fault
