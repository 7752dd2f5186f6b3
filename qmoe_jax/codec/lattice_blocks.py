"""Fast "lattice" encoding of blocks of rows, and a walk over stored blocks.

FORMAT.md, "Coding `lattice`"; the reference is `reference_lattice`. All of it works on one expert.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Int64, UInt8

from qmoe_jax.codec.lattice_dictionaries import NUM_DICTIONARIES, lattice_dictionaries
from qmoe_jax.host_threads import compiled, map_row_chunks

BLOCK_ROWS = 32
NUM_STRINGS = 5
"""Bit strings of a block: four planes of magnitudes, then signs."""
MAX_REMAINDER = 123
"""A remainder is |z| - 4, and |z| is at most 127."""
NUM_COUNTED = 256

FAULTS = {
    1: "ends before its codewords do",
    2: "has ones after the end of a bit string",
    3: "has a remainder above 123",
    4: "has a size other than its codewords and remainders need",
    5: "has weights in rows that the tensor does not have",
}
"""What a walk can find wrong with a block."""


class Strings(NamedTuple):
    """How an expert's bit strings are coded."""

    order: Int32[np.ndarray, "visited"]
    """Columns in the order of their positions."""
    row_lean: UInt8[np.ndarray, "rows"]
    column_lean: UInt8[np.ndarray, "width"]
    """Sign bits are stored relative to these, 0 or 1."""
    ends: Int64[np.ndarray, "strings dictionaries"]
    """Codeword of a string from which on each dictionary no longer counts; rising, the last is
    out of reach."""


class BlockWalk(NamedTuple):
    """What a walk over stored blocks finds."""

    faults: Int32[np.ndarray, "blocks"]
    """0, or a key of FAULTS."""
    counts: Int64[np.ndarray, "blocks 256"]
    """How often each code occurs in the block's rows, zero columns left out."""
    string_bytes: Int64[np.ndarray, "blocks 6"]
    """Bytes of each string, and of the remainders."""


def encode_blocks(
    codes: UInt8[np.ndarray, "rows width"],
    strings: Strings,
) -> tuple[UInt8[np.ndarray, "bytes"], Int64[np.ndarray, "blocks"]]:
    """Encode an expert: the bytes of all blocks one after another, and the bytes of each."""
    rows, width = codes.shape
    lengths = np.zeros(-(-rows // BLOCK_ROWS), np.int64)

    def encode_chunk(chunk: slice) -> np.ndarray:
        first, last = BLOCK_ROWS * chunk.start, min(BLOCK_ROWS * chunk.stop, rows)
        visited = strings.order.size
        # A codeword a bit at the very most: four planes, signs, and a remainder.
        scratch = np.empty((chunk.stop - chunk.start) * (6 * BLOCK_ROWS * visited + 8), np.uint8)
        length = compiled(_encode_chunk)(
            np.ascontiguousarray(codes[first:last]),
            strings.order,
            strings.row_lean[first:last],
            strings.column_lean,
            strings.ends,
            lattice_dictionaries().trie,
            scratch,
            lengths[chunk],
        )
        return scratch[:length].copy()

    parts = map_row_chunks(encode_chunk, lengths.size, BLOCK_ROWS * width)
    return (np.concatenate(parts) if parts else np.zeros(0, np.uint8)), lengths


def walk_blocks(
    data: UInt8[np.ndarray, "bytes"],
    starts: Int64[np.ndarray, "blocks"],
    stops: Int64[np.ndarray, "blocks"],
    rows: int,
    strings: Strings,
) -> BlockWalk:
    """Check and count blocks without keeping their codes. All bounds must lie within data."""
    blocks = starts.size
    walk = BlockWalk(
        np.zeros(blocks, np.int32),
        np.zeros((blocks, NUM_COUNTED), np.int64),
        np.zeros((blocks, NUM_STRINGS + 1), np.int64),
    )

    def walk_chunk(chunk: slice) -> None:
        first, last = BLOCK_ROWS * chunk.start, min(BLOCK_ROWS * chunk.stop, rows)
        compiled(_walk_chunk)(
            data,
            starts[chunk],
            stops[chunk],
            strings.order,
            strings.row_lean[first:last],
            strings.column_lean,
            strings.ends,
            lattice_dictionaries().table,
            *(part[chunk] for part in walk),
        )

    map_row_chunks(walk_chunk, blocks, BLOCK_ROWS * max(1, strings.order.size))
    return walk


class Counts(NamedTuple):
    """What an expert's codes look like, before any choice."""

    columns: Int64[np.ndarray, "5 width"]
    """Of each column the weights that are not 0, those of magnitude 2, 3 and 4 or more, and those
    below 0."""
    rows: Int64[np.ndarray, "2 rows"]
    """Of each row the weights that are not 0, and those below 0."""


def count_codes(codes: UInt8[np.ndarray, "rows width"]) -> Counts:
    """Count in one pass over an expert."""
    rows, width = codes.shape
    by_row = np.zeros((2, rows), np.int64)

    def count_chunk(chunk: slice) -> np.ndarray:
        by_column = np.zeros((5, width), np.int64)
        compiled(_count_chunk)(
            np.ascontiguousarray(codes[chunk]), by_column, by_row[0, chunk], by_row[1, chunk]
        )
        return by_column

    parts = map_row_chunks(count_chunk, rows, width)
    return Counts(sum(parts, np.zeros((5, width), np.int64)), by_row)


def count_codewords(
    bits: UInt8[np.ndarray, "bits"],
    wanted: UInt8[np.ndarray, "bits"],
) -> Int64[np.ndarray, "dictionaries"]:
    """Count codewords by dictionary, if every entry comes from the one that its first bit wants."""
    return compiled(_count_codewords)(bits, wanted, lattice_dictionaries().trie)


def _encode_chunk(codes, order, row_lean, column_lean, ends, trie, data, lengths):
    """Encode blocks into data; return how many bytes were written. Runs under numba."""
    rows, width = codes.shape
    visited = order.size
    nonzero = np.zeros(width, np.uint32)
    negative = np.zeros(width, np.uint32)
    large = np.zeros(width, np.uint32)
    bits = np.zeros((5, BLOCK_ROWS * visited), np.uint8)
    position = 0
    for block in range(lengths.size):
        start = position
        first = block * BLOCK_ROWS
        nonzero[:] = 0
        negative[:] = 0
        large[:] = 0
        for row in range(min(BLOCK_ROWS, rows - first)):
            line = codes[first + row]
            shift = np.uint32(row)
            lean = np.uint8(row_lean[first + row])
            for column in range(width):
                code = line[column]
                nonzero[column] |= np.uint32(code > 0) << shift
                negative[column] |= np.uint32((code ^ lean) & 1) << shift
                large[column] |= np.uint32(code > 2) << shift
        counts = np.zeros(5, np.int64)
        for index in range(visited):
            column = order[index]
            mask = nonzero[column]
            place = BLOCK_ROWS * index
            for row in range(BLOCK_ROWS):
                bits[0, place + row] = mask >> np.uint32(row) & np.uint32(1)
            if mask == 0:
                continue
            lean = np.uint32(column_lean[column])
            for row in range(BLOCK_ROWS):
                if not mask >> np.uint32(row) & np.uint32(1):
                    continue
                is_large = large[column] >> np.uint32(row) & np.uint32(1)
                bits[4, counts[4]] = negative[column] >> np.uint32(row) & np.uint32(1) ^ lean
                counts[4] += 1
                bits[1, counts[1]] = is_large
                counts[1] += 1
                if is_large:
                    code = codes[first + row, column]
                    bits[2, counts[2]] = code > 4
                    counts[2] += 1
                    if code > 4:
                        bits[3, counts[3]] = code > 6
                        counts[3] += 1
        counts[0] = BLOCK_ROWS * visited
        for string in range(5):
            dictionary = 0
            written = 0
            node = 0
            tree = trie[0]
            for index in range(counts[string]):
                if node == 0:
                    while written >= ends[string, dictionary]:
                        dictionary += 1
                    tree = trie[dictionary]
                node = tree[node, bits[string, index]]
                if node < 0:
                    data[position] = -1 - node
                    position += 1
                    written += 1
                    node = 0
            while node > 0:
                node = tree[node, 0]
            if node < 0:
                data[position] = -1 - node
                position += 1
        if counts[3] > 0:
            for index in range(visited):
                column = order[index]
                if large[column] == 0:
                    continue
                for row in range(min(BLOCK_ROWS, rows - first)):
                    code = codes[first + row, column]
                    if code > 6:
                        data[position] = (code + 1) // 2 - 4
                        position += 1
        lengths[block] = position - start
    return position


def _walk_chunk(
    data,
    starts,
    stops,
    order,
    row_lean,
    column_lean,
    ends,
    table,
    faults,
    counts,
    string_bytes,
):
    """Decode blocks and note what is wrong and how often codes occur. Runs under numba."""
    rows = row_lean.size
    visited = order.size
    bits = np.zeros((5, BLOCK_ROWS * visited + 256), np.uint8)
    for block in range(starts.size):
        at, stop = starts[block], stops[block]
        fault = 0
        own_rows = min(BLOCK_ROWS, rows - block * BLOCK_ROWS)
        wanted = BLOCK_ROWS * visited
        ones = np.zeros(5, np.int64)
        for string in range(5):
            if string == 4:
                wanted = ones[0]
            elif string > 0:
                wanted = ones[string - 1]
            begin = at
            dictionary = 0
            length = 0
            while length < wanted and fault == 0:
                if at >= stop:
                    fault = 1
                    break
                while at - begin >= ends[string, dictionary]:
                    dictionary += 1
                low = np.uint64(table[dictionary, data[at], 0])
                entry = low | np.uint64(table[dictionary, data[at], 1]) << np.uint64(32)
                at += 1
                size = np.int64(entry & np.uint64(255))
                lead = np.int64(entry >> np.uint64(8) & np.uint64(255))
                mask = entry >> np.uint64(16)
                for place in range(min(size, wanted - length)):
                    bits[string, length + place] = 0
                place = length + lead
                while mask:
                    if mask & np.uint64(1):
                        if place >= wanted:
                            fault = 2
                            break
                        bits[string, place] = 1
                        ones[string] += 1
                    mask >>= np.uint64(1)
                    place += 1
                length += size
            string_bytes[block, string] = at - begin
            if fault:
                break
        string_bytes[block, 5] = ones[3]
        if fault == 0 and at + ones[3] != stop:
            fault = 4
        if fault == 0:
            ranks = np.zeros(5, np.int64)
            for index in range(BLOCK_ROWS * visited):
                row = index & (BLOCK_ROWS - 1)
                if not bits[0, index]:
                    if row < own_rows:
                        counts[block, 0] += 1
                    continue
                if row >= own_rows:
                    fault = 5
                    break
                magnitude = 1
                sign = bits[4, ranks[0]]
                if bits[1, ranks[0]]:
                    magnitude = 2
                    if bits[2, ranks[1]]:
                        magnitude = 3
                        if bits[3, ranks[2]]:
                            remainder = data[at + ranks[3]]
                            if remainder > MAX_REMAINDER:
                                fault = 3
                                break
                            magnitude = 4 + np.int64(remainder)
                            ranks[3] += 1
                        ranks[2] += 1
                    ranks[1] += 1
                ranks[0] += 1
                sign ^= row_lean[block * BLOCK_ROWS + row] ^ column_lean[order[index // BLOCK_ROWS]]
                counts[block, 2 * magnitude - sign] += 1
        faults[block] = fault


def _count_chunk(codes, by_column, nonzero, negative):
    """Count. Runs under numba."""
    rows, width = codes.shape
    part = np.zeros((5, width), np.uint8)
    for row in range(rows):
        line = codes[row]
        any_large = False
        for column in range(width):
            code = line[column]
            part[0, column] += code > 0
            part[1, column] += code > 2
            part[4, column] += code & 1
            any_large |= code > 4
        if any_large:
            for column in range(width):
                part[2, column] += line[column] > 4
                part[3, column] += line[column] > 6
        own_nonzero = 0
        own_negative = 0
        for column in range(width):
            own_nonzero += line[column] > 0
            own_negative += line[column] & 1
        nonzero[row] = own_nonzero
        negative[row] = own_negative
        if row % 255 == 254 or row == rows - 1:  # before a byte is full
            for kind in range(5):
                for column in range(width):
                    by_column[kind, column] += part[kind, column]
            part[:] = 0


def _count_codewords(bits, wanted, trie):
    """Count. Runs under numba."""
    counts = np.zeros(NUM_DICTIONARIES, np.int64)
    node = 0
    dictionary = 0
    for index in range(bits.size):
        if node == 0:
            dictionary = wanted[index]
        node = trie[dictionary, node, bits[index]]
        if node < 0:
            counts[dictionary] += 1
            node = 0
    if node > 0:
        counts[dictionary] += 1
    return counts
