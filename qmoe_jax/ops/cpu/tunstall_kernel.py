"""Products with "tunstall" codes: a row decoded to bits and signs, and multiplied.

FORMAT.md, "Coding `tunstall`". The arrays may hold anything: a row is cut to its width, every read
lies in the stored bytes, and loops end, for each codeword has at least one bit.

Sums of a row are over its weights in one order: no result depends on how rows are shared out.
"""

import numpy as np

from qmoe_jax.codec.tunstall import NUM_CODEWORDS, NUM_DICTIONARIES
from qmoe_jax.ops.cpu.bit_strings import (
    MOST_BITS,
    clear_string,
    copy_backwards,
    count_string,
    decode_run,
    overrun,
)
from qmoe_jax.ops.cpu.machine_code import (
    bfloat16_value,
    get,
    in_both,
    jitted,
    load_word,
    multiply_row,
    store_word,
)
from qmoe_jax.ops.cpu.work_sharing import stored_length

ROWS = 32
"""Rows of which work is shared out."""

_row_1, _row_2, _row_4, _row_8 = (multiply_row(tokens) for tokens in (1, 2, 4, 8))


@in_both
def padded_width(width: int) -> int:
    """Width of tokens as `multiply_piece` places them."""
    return -(-width // 64) * 64


@in_both
def scratch_bytes(width: int) -> int:
    """Bytes of one of the two strings of a row."""
    return overrun(padded_width(width))


def dictionary_entries(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return entries, and the bits of each dictionary's longest.

    As `decode_run` takes them where these are at most MOST_BITS; else as they are stored.
    """
    both = table[..., 0].astype(np.uint64) | table[..., 1].astype(np.uint64) << np.uint64(32)
    length = both & np.uint64(63)
    longest = length.max(axis=1).astype(np.int64)
    short = length | (both >> np.uint64(6)) << np.uint64(8)
    entries = np.where(longest[:, None] <= MOST_BITS, short, both)
    return entries.reshape(-1), longest


@jitted
def decode_row(data, at, stop, entries, first, most, width, out):
    """Decode a row's bits into scratch."""
    clear_string(out, 0, width)
    if most <= MOST_BITS:
        decode_run(data, at, stop, entries, first, most, width, out, 0, 0)
        return
    position = 0
    while at < stop and position < width:
        entry = get(entries, first + get(data, at))
        at += 1
        mask = entry >> np.uint64(6)
        byte = position >> 3
        shift = np.uint64(position & 7)
        store_word(out, byte, load_word(out, byte) | mask << shift)
        store_word(out, byte + 8, mask >> (np.uint64(56) - shift) >> np.uint64(8))
        position += np.int64(entry & np.uint64(63))


@jitted
def multiply_all(bits, signs, words, low, high, x, sums, tokens):
    """`multiply_row` for all tokens."""
    width = x.shape[1]
    token = 0
    while token < tokens:
        left = tokens - token
        if left >= 8:
            _row_8(bits, signs, words, low, high, x, width, token, sums)
            token += 8
        elif left >= 4:
            _row_4(bits, signs, words, low, high, x, width, token, sums)
            token += 4
        elif left >= 2:
            _row_2(bits, signs, words, low, high, x, width, token, sums)
            token += 2
        else:
            _row_1(bits, signs, words, low, high, x, width, token, sums)
            token += 1


@jitted
def multiply_piece(
    words, expert_offsets, dictionaries, shortest_rows, lengths, length_bytes, levels, entries,
    longest, x, order, starts, busy, first, last, most, y, bits, signs, placed, sums,
):  # fmt: skip
    """Write y of a piece of the work: blocks `first` to `last` - 1 of all busy experts' blocks.

    Args:
      words: uint8, the stored words' bytes; the arrays behind are the stored ones, but
      lengths: uint8, of rows, as `stored_length` takes them with `length_bytes`.
      levels: uint16 [experts, rows, 2], bits of bfloat16.
      entries: of `dictionary_entries`, with `longest`.
      x: float32 [tokens, width].
      order: int64 [tokens], sorted by expert.
      starts: int64 [experts + 1], first place of each expert among them.
      busy: int64, experts that have tokens.
      first: a block of 32 rows: number of the expert among the busy ones, times blocks, plus block.
      last: the block behind the last.
      most: tokens of an expert that are multiplied at a time.
      y: float32 [tokens, rows].
      bits: and the rest: of this thread.
    """
    rows = y.shape[1]
    width = x.shape[1]
    blocks = (rows + ROWS - 1) // ROWS
    num_words = (width + 63) >> 6
    size = words.size
    unit = first
    while unit < last:
        expert = busy[unit // blocks]
        first_row = ROWS * (unit % blocks)
        last_row = min(rows, first_row + ROWS * (last - unit))
        unit += (last_row - first_row + ROWS - 1) // ROWS
        dictionary = min(np.int64(dictionaries[expert]), NUM_DICTIONARIES - 1)
        shortest = np.int64(shortest_rows[expert])
        begin = 4 * np.int64(expert_offsets[expert])
        for row in range(first_row):
            begin += shortest + stored_length(lengths, length_bytes, expert * rows + row)
        for token in range(starts[expert], starts[expert + 1], most):
            own = order[token : min(token + most, starts[expert + 1])]
            for part in range(own.size):
                for place in range(width):
                    placed[part, place] = x[own[part], place]
                placed[part, width:] = 0
            at = begin
            for row in range(first_row, last_row):
                end = at + shortest + stored_length(lengths, length_bytes, expert * rows + row)
                stop = min(max(end, 0), size)
                decode_row(
                    words, min(max(at, 0), size), stop, entries, NUM_CODEWORDS * dictionary,
                    longest[dictionary], width, bits,
                )  # fmt: skip
                at = end
                ones = count_string(bits, 0, width)
                copy_backwards(words, stop, ones, signs, 0)
                low = bfloat16_value(levels[expert, row, 0])
                high = bfloat16_value(levels[expert, row, 1])
                multiply_all(bits, signs, num_words, low, high, placed, sums, own.size)
                for part in range(own.size):
                    y[own[part], row] = sums[part]
