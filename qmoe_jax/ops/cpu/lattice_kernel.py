"""The product with "lattice" codes: a block of 32 rows decoded to masks of rows, and multiplied.

FORMAT.md, "Coding `lattice`". Codewords become bit strings; the strings, for each column, a word of
32 rows that are not zero and one of those that are negative; the words add x to sums or subtract it.
Nothing depends on what the arrays hold but values: every string is cut to its bits, every read lies in
the block, and loops end, for each codeword has at least one bit.
"""

import numpy as np

from qmoe_jax.codec.lattice_dictionaries import NUM_CODEWORDS, NUM_DICTIONARIES, RAW_DICTIONARY
from qmoe_jax.ops.cpu.machine_code import (
    add_columns,
    count_ones,
    deal_columns,
    deposit,
    get,
    jitted,
    load_word,
    put,
    reverse_bits,
    store_word,
)

FLAGS, RESTS, PLANE_1, PLANE_2, PLANE_3, PLANE_4, SIGNS = range(7)
ROWS = 32
_SHORT = 6
"""From this dictionary on, entries have at most 56 bits: they and seven bits before fit a word."""
_BYTES = np.uint64(0x0101010101010101)
_SWAPS = (
    (np.uint64(1), np.uint64(0x5555555555555555)),
    (np.uint64(2), np.uint64(0x3333333333333333)),
    (np.uint64(4), np.uint64(0x0F0F0F0F0F0F0F0F)),
)
_SLACK = 96

_add_1, _add_2, _add_4, _add_8 = (add_columns(tokens) for tokens in (1, 2, 4, 8))
_deal_1 = deal_columns(1, keep=False)
_deal_2, _deal_4, _deal_8 = (deal_columns(tokens, keep=True) for tokens in (2, 4, 8))


@jitted
def decode_string(data, at, stop, ends, entries, longest, wanted, out, base):
    """Decode a bit string of `wanted` bits into out from the byte `base` on; return what follows.

    entries: uint64 [16 x 256]. Of the dictionaries from _SHORT on, bits 8 + i are bit i of the entry;
    of those before, as the format has it. Bits 0-7 are the length in both.
    """
    for place in range(base, base + (wanted >> 3) + 40, 8):
        store_word(out, place, np.uint64(0))
    begin = at
    position = 0
    for dictionary in range(NUM_DICTIONARIES):
        if position >= wanted or at >= stop:
            break
        limit = min(stop, begin + ends[dictionary])
        if at >= limit:
            continue
        first = dictionary * NUM_CODEWORDS
        if dictionary < _SHORT:
            while at < limit and position < wanted:
                entry = get(entries, first + get(data, at))
                at += 1
                place = position + np.int64(entry >> np.uint64(8) & np.uint64(255))
                byte = base + (place >> 3)
                bits = load_word(out, byte)
                bits |= (entry >> np.uint64(16)) << np.uint64(place & 7)
                store_word(out, byte, bits)
                position += np.int64(entry & np.uint64(255))
            continue
        # The bytes from that of `position` on, as far as they are known.
        window = load_word(out, base + (position >> 3))
        most = longest[dictionary]
        if dictionary == RAW_DICTIONARY:  # bits as they are, the first one highest in its byte
            while at <= limit - 8 and position + 64 <= wanted:
                bits = load_word(data, at)
                for step, mask in _SWAPS:
                    bits = (bits & mask) << step | (bits >> step) & mask
                at += 8
                shift = np.uint64(position & 7)
                store_word(out, base + (position >> 3), window | bits << shift)
                window = bits >> (np.uint64(56) - shift) >> np.uint64(8)
                store_word(out, base + (position >> 3) + 8, window)
                position += 64
        if most <= 14:
            last = min(limit - 4, stop - 4)
            while at <= last and position + 4 * most <= wanted:
                entry = get(entries, first + get(data, at))
                second = get(entries, first + get(data, at + 1))
                third = get(entries, first + get(data, at + 2))
                fourth = get(entries, first + get(data, at + 3))
                at += 4
                length = entry & np.uint64(255)
                bits = entry >> np.uint64(8)
                bits |= (second >> np.uint64(8)) << length
                length += second & np.uint64(255)
                more = third >> np.uint64(8)
                more |= (fourth >> np.uint64(8)) << (third & np.uint64(255))
                bits |= more << length
                length += third & np.uint64(255)
                length += fourth & np.uint64(255)
                shift = np.uint64(position & 7)
                window |= bits << shift
                store_word(out, base + (position >> 3), window)
                window >>= (shift + length) & np.uint64(0xF8)
                position += np.int64(length)
        elif most <= 28:
            while at <= limit - 2 and position + 2 * most <= wanted:
                entry = get(entries, first + get(data, at))
                second = get(entries, first + get(data, at + 1))
                at += 2
                length = entry & np.uint64(255)
                bits = entry >> np.uint64(8)
                bits |= (second >> np.uint64(8)) << length
                length += second & np.uint64(255)
                shift = np.uint64(position & 7)
                window |= bits << shift
                store_word(out, base + (position >> 3), window)
                window >>= (shift + length) & np.uint64(0xF8)
                position += np.int64(length)
        while at < limit and position < wanted:
            entry = get(entries, first + get(data, at))
            at += 1
            length = entry & np.uint64(255)
            shift = np.uint64(position & 7)
            window |= (entry >> np.uint64(8)) << shift
            store_word(out, base + (position >> 3), window)
            window >>= (shift + length) & np.uint64(0xF8)
            position += np.int64(length)
    return at


@jitted
def copy_bytes(data, at, size, out, base, room):
    """Copy bytes; zeros behind them, up to the number `room` and a word."""
    for place in range(0, room + 8, 8):
        store_word(out, base + place, np.uint64(0))
    done = 0
    while done + 8 <= size:
        store_word(out, base + done, load_word(data, at + done))
        done += 8
    while done < size:
        put(out, base + done, get(data, at + done))
        done += 1


@jitted
def bits_at(out, base, rank):
    """64 bits of a string from bit `rank` on."""
    byte = base + (rank >> 3)
    shift = np.uint64(rank & 7)
    # Bits that both have are the same. As a funnel shift it would be slow on AMD's cores.
    return load_word(out, byte) >> shift | load_word(out, byte + 1) << (np.uint64(8) - shift)


@jitted
def count_string(out, base, wanted):
    """Ones among the first `wanted` bits of a string; what is behind them is cleared."""
    ones = 0
    words = wanted >> 6
    for word in range(words):
        ones += count_ones(load_word(out, base + 8 * word))
    last = base + 8 * words
    bits = load_word(out, last)
    bits &= (np.uint64(1) << np.uint64(wanted & 63)) - np.uint64(1)
    store_word(out, last, bits)
    return ones + count_ones(bits)


@jitted
def read_firsts(scratch, flags, firsts, first, behind, pairs):
    """Of the groups of two columns at a time: first rows, and the rows behind them.

    Args:
      scratch: holds flags and firsts from these bytes on.
      first: uint64 [pairs], for a byte a group; the bit of the first row is set, or none is.
      behind: the same; all rows behind the first.

    Returns:
      Bits in `behind`.
    """
    field = 0
    for pair in range(pairs):
        spread = deposit(np.uint64(get(scratch, flags + pair)), _BYTES)
        window = load_word(scratch, firsts + (field >> 3)) >> np.uint64(field & 7)
        put(first, pair, deposit(window, (spread << np.uint64(3)) - spread))
        put(behind, pair, spread)
        field += 3 * count_ones(spread)
    rests = 0
    for pair in range(pairs):  # in vectors of words
        row, spread = get(first, pair), get(behind, pair)
        one = spread + (row & _BYTES)
        bit = (row >> np.uint64(1)) & _BYTES
        bit = (bit << np.uint64(8)) - bit
        one = (one & ~bit) | ((one << np.uint64(2)) & bit)
        bit = (row >> np.uint64(2)) & _BYTES
        bit = (bit << np.uint64(8)) - bit
        one = (one & ~bit) | ((one << np.uint64(4)) & bit)
        rest = ((spread << np.uint64(8)) - spread) & ~(one | (one - spread))
        put(first, pair, one)
        put(behind, pair, rest)
        rests += count_ones(rest)
    return rests


@jitted
def read_rests(scratch, rests, masks, first, behind, pairs):
    """Complete the words of grouped columns and store them from the byte `masks` on."""
    rank = 0
    for pair in range(pairs):
        rows = get(behind, pair)
        window = load_word(scratch, rests + (rank >> 3)) >> np.uint64(rank & 7)
        rank += count_ones(rows)
        store_word(scratch, masks + 8 * pair, get(first, pair) | deposit(window, rows))


@jitted
def multiply_block(
    data, at, stop, ends, entries, longest, num_grouped, visited, scratch, entries_of, x, sums
):
    """sums[t] = (rows of a block) x[:, t], leans of rows left out.

    Args:
      data: uint8, all stored bytes.
      at, stop: the block's bytes among them.
      ends: int64 [7, 16], as `lattice_blocks.Strings.ends`.
      entries, longest: of `dictionary_entries`.
      num_grouped, visited: columns.
      scratch: uint8 [9, region]; `region_bytes`.
      entries_of: uint64 [2, pairs + 1, 4], for `deal_columns`.
      x: float32 [2 pairs, tokens] by visited column, times step.
      sums: float32 [tokens, 32].
    """
    region = scratch.shape[1]
    flat = scratch.reshape(-1)
    masks, minus, flags, firsts, rests = 0, region, 2 * region, 3 * region, 4 * region
    second, third, fourth, signs = 5 * region, 6 * region, 7 * region, 8 * region
    pairs = (visited + 1) >> 1

    if num_grouped > 0:
        at = decode_string(
            data, at, stop, ends[FLAGS], entries, longest, 4 * num_grouped, flat, flags
        )
        num_flags = count_string(flat, flags, 4 * num_grouped)
        size = (3 * num_flags + 7) >> 3
        held = min(size, stop - at)
        copy_bytes(data, at, held, flat, firsts, size)
        at += held
        halves = (num_grouped + 1) >> 1
        spare = entries_of.reshape(-1)
        first, behind = spare[:halves], spare[halves : 2 * halves]
        num_rests = read_firsts(flat, flags, firsts, first, behind, halves)
        at = decode_string(data, at, stop, ends[RESTS], entries, longest, num_rests, flat, rests)
        read_rests(flat, rests, masks, first, behind, halves)
    wanted = ROWS * (visited - num_grouped)
    at = decode_string(
        data, at, stop, ends[PLANE_1], entries, longest, wanted, flat, masks + 4 * num_grouped
    )
    num_ones = count_string(flat, masks, ROWS * visited)
    at = decode_string(data, at, stop, ends[PLANE_2], entries, longest, num_ones, flat, second)
    num_second = count_string(flat, second, num_ones)
    at = decode_string(data, at, stop, ends[PLANE_3], entries, longest, num_second, flat, third)
    num_third = count_string(flat, third, num_second)
    at = decode_string(data, at, stop, ends[PLANE_4], entries, longest, num_third, flat, fourth)
    at = decode_string(data, at, stop, ends[SIGNS], entries, longest, num_ones, flat, signs)

    tokens = sums.shape[0]
    sums[:] = 0
    every, some = entries_of[0], entries_of[1]
    found = deal_all(flat, masks, signs, second, every, some, pairs, x, sums, tokens)
    if found == 0:
        return
    add_all(some, found, x, 0, sums, tokens)
    # What is 3 or more is added once more, and so on, each list from the one before.
    rank = 0
    count = found
    found = 0
    for number in range(count):
        ones = some[number, 0]
        large = deposit(bits_at(flat, third, rank), ones)
        rank += count_ones(ones)
        some[found, 0] = large
        some[found, 1] = some[number, 1]
        some[found, 2] = some[number, 2]
        found += large != 0
    if found == 0:
        return
    add_all(some, found, x, 0, sums, tokens)
    rank = 0
    for number in range(found):
        ones = some[number, 0]
        large = deposit(bits_at(flat, fourth, rank), ones)
        rank += count_ones(ones)
        place = 0
        while large:
            if large & np.uint64(1):
                times = np.float32(1)
                if at < stop:
                    times += np.float32(data[at])
                    at += 1
                if some[number, 1] >> np.uint64(place) & np.uint64(1):
                    times = -times
                column = 2 * np.int64(some[number, 2]) + (place >> 5)
                for token in range(tokens):
                    sums[token, place & 31] += times * x[column, token]
            large >>= np.uint64(1)
            place += 1


@jitted
def deal_all(flat, masks, signs, second, every, some, pairs, x, sums, tokens):
    """`deal_columns` for all tokens: the first tile deals, the others find its entries."""
    if tokens >= 8:
        found = _deal_8(flat, masks, signs, second, every, some, pairs, x, tokens, sums)
        token = 8
    elif tokens >= 4:
        found = _deal_4(flat, masks, signs, second, every, some, pairs, x, tokens, sums)
        token = 4
    elif tokens >= 2:
        found = _deal_2(flat, masks, signs, second, every, some, pairs, x, tokens, sums)
        token = 2
    else:
        return _deal_1(flat, masks, signs, second, every, some, pairs, x, tokens, sums)
    if token < tokens:
        add_all(every, pairs, x, token, sums, tokens)
    return found


@jitted
def add_all(entries, count, x, token, sums, tokens):
    """`add_columns` for all tokens from the number `token` on."""
    while token < tokens:
        left = tokens - token
        if left >= 8:
            _add_8(entries, count, x, token, tokens, sums)
            token += 8
        elif left >= 4:
            _add_4(entries, count, x, token, tokens, sums)
            token += 4
        elif left >= 2:
            _add_2(entries, count, x, token, tokens, sums)
            token += 2
        else:
            _add_1(entries, count, x, token, tokens, sums)
            token += 1


def region_bytes(width: int) -> int:
    """Bytes of a region of scratch: a bit for each weight of a block, and what strings overrun."""
    return 4 * (width + 2) + _SLACK


def dictionary_entries(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return `entries` as `decode_string` takes them, and the bits of each dictionary's longest."""
    both = table[..., 0].astype(np.uint64) | table[..., 1].astype(np.uint64) << np.uint64(32)
    length, lead = both & np.uint64(255), both >> np.uint64(8) & np.uint64(255)
    short = length | (both >> np.uint64(16)) << lead + np.uint64(8)
    entries = np.where(np.arange(NUM_DICTIONARIES)[:, None] < _SHORT, both, short)
    return entries.reshape(-1), length.max(axis=1).astype(np.int64)
