"""Fast "lattice" encoding of blocks of rows, and a walk over stored blocks.

FORMAT.md, "Coding `lattice`"; the reference is `reference_lattice`. All of it works on one expert.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Int64, UInt8

from qmoe_jax.codec.lattice_dictionaries import NUM_DICTIONARIES, lattice_dictionaries
from qmoe_jax.host_threads import compiled, map_row_chunks

BLOCK_ROWS = 32
GROUP_ROWS = 8
"""Rows of a group, of which sparse columns tell first whether they hold anything."""
GROUPS = BLOCK_ROWS // GROUP_ROWS
FLAGS, RESTS, PLANE_1, PLANE_2, PLANE_3, PLANE_4, SIGNS = range(7)
"""Bit strings of a block, in the order in which they are stored; firsts follow the flags."""
NUM_STRINGS = 7
MAX_REMAINDER = 123
"""A remainder is |z| - 4, and |z| is at most 127."""
NUM_COUNTED = 256

FAULTS = {
    1: "ends before its codewords do",
    2: "has ones after the end of a bit string",
    3: "has a remainder above 123",
    4: "has a size other than its strings and remainders need",
    5: "has weights in rows that the tensor does not have",
    6: "has set bits after its last first row",
}
"""What a walk can find wrong with a block."""


class Strings(NamedTuple):
    """How an expert's bit strings are coded."""

    order: Int32[np.ndarray, "visited"]
    """Columns in the order of their positions."""
    num_grouped: int
    """The first so many of them are stored by groups of rows."""
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
    part_bytes: Int64[np.ndarray, "blocks 9"]
    """Bytes of each string, of the firsts, and of the remainders."""


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
        # A codeword a bit at the very most: four planes (of grouped columns the first has no more
        # bits, and firsts), signs, and a remainder.
        most = (6 * BLOCK_ROWS + 2) * visited + 16
        scratch = np.empty((chunk.stop - chunk.start) * most, np.uint8)
        length = compiled(_encode_chunk)(
            np.ascontiguousarray(codes[first:last]),
            strings.order,
            strings.num_grouped,
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
        np.zeros((blocks, NUM_STRINGS + 2), np.int64),
    )

    def walk_chunk(chunk: slice) -> None:
        first, last = BLOCK_ROWS * chunk.start, min(BLOCK_ROWS * chunk.stop, rows)
        compiled(_walk_chunk)(
            data,
            starts[chunk],
            stops[chunk],
            strings.order,
            strings.num_grouped,
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


def _encode_chunk(codes, order, num_grouped, row_lean, column_lean, ends, trie, data, lengths):
    """Encode blocks into data; return how many bytes were written. Runs under numba."""
    rows, width = codes.shape
    visited = order.size
    nonzero = np.zeros(width, np.uint32)
    negative = np.zeros(width, np.uint32)
    large = np.zeros(width, np.uint32)
    bits = np.zeros((NUM_STRINGS, BLOCK_ROWS * visited), np.uint8)
    firsts = np.zeros(2 * visited + 1, np.uint8)
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
        counts = np.zeros(NUM_STRINGS, np.int64)
        num_firsts = 0
        for index in range(visited):
            column = order[index]
            mask = nonzero[column]
            if index < num_grouped:
                for group in range(GROUPS):
                    rest = mask >> np.uint32(GROUP_ROWS * group) & np.uint32(255)
                    bits[FLAGS, counts[FLAGS]] = rest > 0
                    counts[FLAGS] += 1
                    if rest == 0:
                        continue
                    row = 0
                    while not rest & np.uint32(1):
                        rest >>= np.uint32(1)
                        row += 1
                    at = 3 * num_firsts
                    shifted = row << (at & 7)
                    if at & 7 == 0:
                        firsts[at >> 3] = 0
                    firsts[at >> 3] |= shifted & 255
                    firsts[(at >> 3) + 1] = shifted >> 8
                    num_firsts += 1
                    for _ in range(row + 1, GROUP_ROWS):
                        rest >>= np.uint32(1)
                        bits[RESTS, counts[RESTS]] = rest & np.uint32(1)
                        counts[RESTS] += 1
            else:
                for row in range(BLOCK_ROWS):
                    bits[PLANE_1, counts[PLANE_1]] = mask >> np.uint32(row) & np.uint32(1)
                    counts[PLANE_1] += 1
            if mask == 0:
                continue
            lean = np.uint32(column_lean[column])
            for row in range(BLOCK_ROWS):
                if not mask >> np.uint32(row) & np.uint32(1):
                    continue
                is_large = large[column] >> np.uint32(row) & np.uint32(1)
                sign = negative[column] >> np.uint32(row) & np.uint32(1) ^ lean
                bits[SIGNS, counts[SIGNS]] = sign
                counts[SIGNS] += 1
                bits[PLANE_2, counts[PLANE_2]] = is_large
                counts[PLANE_2] += 1
                if is_large:
                    code = codes[first + row, column]
                    bits[PLANE_3, counts[PLANE_3]] = code > 4
                    counts[PLANE_3] += 1
                    if code > 4:
                        bits[PLANE_4, counts[PLANE_4]] = code > 6
                        counts[PLANE_4] += 1
        for string in range(NUM_STRINGS):
            if string == RESTS:
                for index in range((3 * num_firsts + 7) // 8):
                    data[position] = firsts[index]
                    position += 1
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
        if counts[PLANE_4] > 0:
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
    num_grouped,
    row_lean,
    column_lean,
    ends,
    table,
    faults,
    counts,
    part_bytes,
):
    """Decode blocks and note what is wrong and how often codes occur. Runs under numba."""
    rows = row_lean.size
    visited = order.size
    positions = BLOCK_ROWS * visited
    bits = np.zeros((NUM_STRINGS, positions + 256), np.uint8)
    nonzero = np.zeros(positions, np.uint8)
    for block in range(starts.size):
        at, stop = starts[block], stops[block]
        fault = 0
        ones = np.zeros(NUM_STRINGS, np.int64)
        wanted = np.zeros(NUM_STRINGS, np.int64)
        wanted[FLAGS] = GROUPS * num_grouped
        wanted[PLANE_1] = BLOCK_ROWS * (visited - num_grouped)
        firsts_at = at
        for string in range(NUM_STRINGS):
            if string == RESTS:
                firsts_at = at
                at += (3 * ones[FLAGS] + 7) // 8
                part_bytes[block, NUM_STRINGS] = at - firsts_at
                if at > stop:
                    fault = 1
                    break
                if ones[FLAGS] & 7 and data[at - 1] >> (3 * ones[FLAGS] & 7):
                    fault = 6
                    break
                for number in range(ones[FLAGS]):
                    place = 3 * number
                    window = np.int64(data[firsts_at + (place >> 3)])
                    if place & 7 > 5:
                        window |= np.int64(data[firsts_at + (place >> 3) + 1]) << 8
                    wanted[RESTS] += GROUP_ROWS - 1 - (window >> (place & 7) & 7)
            elif string == PLANE_2:
                wanted[PLANE_2] = ones[FLAGS] + ones[RESTS] + ones[PLANE_1]
                wanted[SIGNS] = wanted[PLANE_2]
            elif string in (PLANE_3, PLANE_4):
                wanted[string] = ones[string - 1]
            begin = at
            dictionary = 0
            length = 0
            while length < wanted[string] and fault == 0:
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
                for place in range(min(size, wanted[string] - length)):
                    bits[string, length + place] = 0
                place = length + lead
                while mask:
                    if mask & np.uint64(1):
                        if place >= wanted[string]:
                            fault = 2
                            break
                        bits[string, place] = 1
                        ones[string] += 1
                    mask >>= np.uint64(1)
                    place += 1
                length += size
            part_bytes[block, string] = at - begin
            if fault:
                break
        part_bytes[block, NUM_STRINGS + 1] = ones[PLANE_4]
        if fault == 0 and at + ones[PLANE_4] != stop:
            fault = 4
        if fault == 0:
            rank = 0  # of the next group with weights
            rest = 0  # the next bit of the rests
            for group in range(GROUPS * num_grouped):
                place = GROUP_ROWS * group
                for row in range(GROUP_ROWS):
                    nonzero[place + row] = 0
                if bits[FLAGS, group]:
                    field = 3 * rank
                    window = np.int64(data[firsts_at + (field >> 3)])
                    if field & 7 > 5:
                        window |= np.int64(data[firsts_at + (field >> 3) + 1]) << 8
                    first = window >> (field & 7) & 7
                    rank += 1
                    nonzero[place + first] = 1
                    for row in range(first + 1, GROUP_ROWS):
                        nonzero[place + row] = bits[RESTS, rest]
                        rest += 1
            first = BLOCK_ROWS * num_grouped
            for place in range(positions - first):
                nonzero[first + place] = bits[PLANE_1, place]
            own_rows = min(BLOCK_ROWS, rows - block * BLOCK_ROWS)
            ranks = np.zeros(4, np.int64)
            for place in range(positions):
                row = place & (BLOCK_ROWS - 1)
                if not nonzero[place]:
                    if row < own_rows:
                        counts[block, 0] += 1
                    continue
                if row >= own_rows:
                    fault = 5
                    break
                magnitude = 1
                sign = bits[SIGNS, ranks[0]]
                if bits[PLANE_2, ranks[0]]:
                    magnitude = 2
                    if bits[PLANE_3, ranks[1]]:
                        magnitude = 3
                        if bits[PLANE_4, ranks[2]]:
                            remainder = data[at + ranks[3]]
                            if remainder > MAX_REMAINDER:
                                fault = 3
                                break
                            magnitude = 4 + np.int64(remainder)
                            ranks[3] += 1
                        ranks[2] += 1
                    ranks[1] += 1
                ranks[0] += 1
                sign ^= row_lean[block * BLOCK_ROWS + row] ^ column_lean[order[place // BLOCK_ROWS]]
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
