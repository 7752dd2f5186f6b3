"""Bit strings of "tunstall" and "lattice": codewords, a byte each, to bits, a word at a time.

Strings lie in uint8 scratch from some byte on, the first bit lowest. Every function stays within
`overrun(bits)` bytes from there, whatever the codewords are.
"""

import numpy as np

from qmoe_jax.ops.cpu.machine_code import (
    count_ones,
    get,
    in_both,
    jitted,
    load_word,
    put,
    reverse_bits,
    store_word,
)

MOST_BITS = 56
"""Entries of at most so many bits fit a word behind seven bits of the entry before."""
_SWAPS = (
    (np.uint64(1), np.uint64(0x5555555555555555)),
    (np.uint64(2), np.uint64(0x3333333333333333)),
    (np.uint64(4), np.uint64(0x0F0F0F0F0F0F0F0F)),
)


@in_both
def overrun(bits: int) -> int:
    """Bytes of scratch for a string of at most so many bits, and what its last entry may add."""
    return (bits >> 3) + 96


@jitted
def clear_string(out, base, wanted):
    """Make room for a string: zeros."""
    for place in range(base, base + (wanted >> 3) + 40, 8):
        store_word(out, place, np.uint64(0))


@jitted
def decode_run(data, at, limit, entries, first, most, wanted, out, base, position):
    """Decode codewords of one dictionary, up to the string's end or the byte `limit`.

    Args:
      data: uint8, codewords; those before `limit` may be read.
      at: the next one.
      entries: uint64, from `first` on the dictionary: bits 0-7 of an entry are its length, bit
        8 + i its bit number i.
      most: bits of its longest entry, at most MOST_BITS.
      wanted: bits of the string.
      out: scratch; zero from the string's end so far.
      base: where the string begins there.
      position: bits that it has so far.

    Returns:
      `at` and `position` behind the last codeword.
    """
    # The bytes from that of `position` on, as far as they are known.
    window = load_word(out, base + (position >> 3))
    if most <= MOST_BITS // 4:
        while at <= limit - 4 and position + 4 * most <= wanted:
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
    elif most <= MOST_BITS // 2:
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
    return at, position


@jitted
def decode_plain(data, at, limit, wanted, out, base, position):
    """Decode bytes of eight bits, the first one highest, while a whole word of them is left."""
    window = load_word(out, base + (position >> 3))
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
    return at, position


@jitted
def bits_at(out, base, rank):
    """64 bits of a string from bit `rank` on."""
    byte = base + (rank >> 3)
    shift = np.uint64(rank & 7)
    # Bits that both have are the same. As a funnel shift it would be slow on AMD's cores.
    return load_word(out, byte) >> shift | load_word(out, byte + 1) << (np.uint64(8) - shift)


@jitted
def count_string(out, base, wanted):
    """Ones among the first `wanted` bits of a string; what is behind them in a word is cleared."""
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
def copy_backwards(data, end, bits, out, base):
    """Copy a string that begins with the highest bit of the byte before `end`, and goes down.

    Bytes before the first of data count as zeros.
    """
    for word in range((bits >> 6) + 2):
        first = end - 8 * (word + 1)
        value = np.uint64(0)
        if first >= 0:
            value = load_word(data, first)
        else:
            for place in range(-first, 8):
                value |= np.uint64(get(data, first + place)) << np.uint64(8 * place)
        store_word(out, base + 8 * word, reverse_bits(value))
