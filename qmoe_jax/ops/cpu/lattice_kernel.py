"""Products with "lattice" codes: blocks of 32 rows, decoded to masks of rows and multiplied.

FORMAT.md, "Coding `lattice`". Codewords become bit strings; the strings, for each column, a word
of the 32 rows that are not zero and one of those that are negative; the words add x to sums or
subtract it. The arrays may hold anything: every string is cut to its bits, every read lies in the
block, and loops end, for each codeword has at least one bit.

Each row has its own sums, over its columns in the order in which they are stored: no result
depends on how blocks are shared out.

Tried, on one core of a Zen 4 shared with others, 3072 x 768 at c = 4, one token, G weights/s: with
numba's own indexing, whose test for negative indices costs more than the decoding, 3.5; groups of
two columns at once and signs dealt while vectors add, 4.5; no funnel shifts, 4.7; loads without
that test, strings cleared by words and eight raw bytes at a time, 6.0.
"""

import numpy as np

from qmoe_jax.codec.lattice_dictionaries import NUM_CODEWORDS, NUM_DICTIONARIES, RAW_DICTIONARY
from qmoe_jax.ops.cpu.bit_strings import (
    MOST_BITS,
    bits_at,
    clear_string,
    copy_bytes,
    count_string,
    decode_plain,
    decode_run,
    overrun,
)
from qmoe_jax.ops.cpu.machine_code import (
    add_columns,
    count_ones,
    deal_columns,
    deposit,
    get,
    in_both,
    jitted,
    load_word,
    put,
    store_word,
)
from qmoe_jax.ops.cpu.work_sharing import stored_length

FLAGS, RESTS, PLANE_1, PLANE_2, PLANE_3, PLANE_4, SIGNS = range(7)
ROWS = 32
ZERO_COLUMN = 255
NUM_REGIONS = 9
_SHORT = 6
"""The first dictionary whose entries, and those of all behind it, have at most MOST_BITS."""
_BYTES = np.uint64(0x0101010101010101)
_OUT_OF_REACH = 2**40

_add_1, _add_2, _add_4, _add_8 = (add_columns(tokens) for tokens in (1, 2, 4, 8))
_deal_1 = deal_columns(1, keep=False)
_deal_2, _deal_4, _deal_8 = (deal_columns(tokens, keep=True) for tokens in (2, 4, 8))


@in_both
def region_bytes(width: int) -> int:
    """Bytes of a region of scratch: no string of a block has more bits than 32 columns."""
    return overrun(ROWS * (width + 1))


def dictionary_entries(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return entries as `decode_string` takes them, and the bits of each dictionary's longest."""
    both = table[..., 0].astype(np.uint64) | table[..., 1].astype(np.uint64) << np.uint64(32)
    length, lead = both & np.uint64(255), both >> np.uint64(8) & np.uint64(255)
    longest = length.max(axis=1).astype(np.int64)
    assert (longest[_SHORT:] <= MOST_BITS).all()
    short = length | (both >> np.uint64(16)) << np.minimum(lead, 55) + np.uint64(8)
    entries = np.where(np.arange(NUM_DICTIONARIES)[:, None] < _SHORT, both, short)
    return entries.reshape(-1), longest


@jitted
def decode_string(data, at, stop, ends, entries, longest, wanted, out, base):
    """Decode a bit string into scratch; return the byte behind its codewords.

    Args:
      data: uint8, all stored bytes.
      at: the string's first; none is read from `stop` on.
      ends: int64 [16]: the codeword from which on each dictionary no longer counts.
      entries: of `dictionary_entries`: from _SHORT on as `decode_run` takes them, before as stored.
      wanted: bits of the string.
      out: scratch, from the byte `base` on.
    """
    clear_string(out, base, wanted)
    begin = at
    position = 0
    for dictionary in range(NUM_DICTIONARIES):
        if position >= wanted or at >= stop:
            break
        limit = min(stop, begin + get(ends, dictionary))
        if at >= limit:
            continue
        first = dictionary * NUM_CODEWORDS
        if dictionary >= _SHORT:
            if dictionary == RAW_DICTIONARY:
                at, position = decode_plain(data, at, limit, wanted, out, base, position)
            most = get(longest, dictionary)
            at, position = decode_run(
                data, at, limit, entries, first, most, wanted, out, base, position
            )
            continue
        while at < limit and position < wanted:
            entry = get(entries, first + get(data, at))
            at += 1
            place = position + np.int64(entry >> np.uint64(8) & np.uint64(255))
            byte = base + (place >> 3)
            bits = load_word(out, byte) | (entry >> np.uint64(16)) << np.uint64(place & 7)
            store_word(out, byte, bits)
            position += np.int64(entry & np.uint64(255))
    return at


@jitted
def read_firsts(scratch, flags, firsts, first, behind, pairs):
    """Find first rows of the groups of two columns at a time, and the rows behind them.

    Args:
      scratch: holds flags and firsts from these bytes on.
      first: uint64 [pairs], a byte for a group; gets the bit of the first row, or none.
      behind: the same; gets the bits of all rows behind the first.
      pairs: of columns.

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
    data, at, stop, ends, entries, longest, num_grouped, visited, scratch, pair_entries, x, sums
):
    """sums[t] = (rows of a block) x[:, t], leans of rows left out.

    Args:
      data: uint8, all stored bytes.
      at: the block's first; it ends before `stop`.
      ends: int64 [7, 16], as for `decode_string`.
      entries: of `dictionary_entries`, with `longest`.
      num_grouped: of the `visited` columns.
      scratch: uint8 [NUM_REGIONS, region_bytes].
      pair_entries: uint64 [2, pairs + 1, 4], for `deal_columns`.
      x: float32, x of visited columns times step, in tiles: see `tile_of`.
      sums: float32 [tokens, 32].
    """
    region = scratch.shape[1]
    flat = scratch.reshape(-1)
    masks, flags, firsts, rests = 0, region, 2 * region, 3 * region
    second, third, fourth, signs = 4 * region, 5 * region, 6 * region, 7 * region
    pairs = (visited + 1) >> 1
    tokens = sums.shape[0]
    sums[:] = 0

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
        spare = pair_entries.reshape(-1)
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

    every, some = pair_entries[0], pair_entries[1]
    found = deal_all(flat, masks, signs, second, every, some, pairs, x, sums, tokens)
    if found == 0:
        return
    # What is 2 or more is added once more, what is 3 or more again, each from the one before.
    add_all(some, found, x, 2 * pairs, 0, sums, tokens)
    found = keep_larger(some, found, flat, third)
    if found == 0:
        return
    add_all(some, found, x, 2 * pairs, 0, sums, tokens)
    found = keep_larger(some, found, flat, fourth)
    for number in range(found):
        large = some[number, 0]
        place = 0
        while large:
            if large & np.uint64(1):
                times = np.float32(1)
                if at < stop:
                    times += np.float32(get(data, at))
                    at += 1
                if some[number, 1] >> np.uint64(place) & np.uint64(1):
                    times = -times
                column = 2 * np.int64(some[number, 2]) + (place >> 5)
                for token in range(tokens):
                    first_token, tile = tile_of(token, tokens)
                    value = x[first_token * 2 * pairs + column * tile + token - first_token]
                    sums[token, place & 31] += times * value
            large >>= np.uint64(1)
            place += 1


@jitted
def tile_of(token, tokens):
    """Return first token and size of a token's tile: eights, then at most a 4, a 2 and a 1."""
    first = token & -8
    size = 8
    while first + size > tokens or token >= first + size:
        if first + size <= tokens:
            first += size
        size >>= 1
    return first, size


@jitted
def keep_larger(some, count, flat, string):
    """Deal the bits of a string to entries; keep those that get any, with these bits."""
    rank = 0
    found = 0
    for number in range(count):
        ones = some[number, 0]
        large = deposit(bits_at(flat, string, rank), ones)
        rank += count_ones(ones)
        some[found, 0] = large
        some[found, 1] = some[number, 1]
        some[found, 2] = some[number, 2]
        found += large != 0
    return found


@jitted
def deal_all(flat, masks, signs, second, every, some, pairs, x, sums, tokens):
    """`deal_columns` for all tokens: the first tile deals, the others find its entries."""
    if tokens >= 8:
        found = _deal_8(flat, masks, signs, second, every, some, pairs, x, sums)
        token = 8
    elif tokens >= 4:
        found = _deal_4(flat, masks, signs, second, every, some, pairs, x, sums)
        token = 4
    elif tokens >= 2:
        found = _deal_2(flat, masks, signs, second, every, some, pairs, x, sums)
        token = 2
    else:
        return _deal_1(flat, masks, signs, second, every, some, pairs, x, sums)
    if token < tokens:
        add_all(every, pairs, x, 2 * pairs, token, sums, tokens)
    return found


@jitted
def add_all(entries, count, x, columns, token, sums, tokens):
    """`add_columns` for all tokens from the number `token` on."""
    while token < tokens:
        left = tokens - token
        if left >= 8:
            _add_8(entries, count, x, columns, token, sums)
            token += 8
        elif left >= 4:
            _add_4(entries, count, x, columns, token, sums)
            token += 4
        elif left >= 2:
            _add_2(entries, count, x, columns, token, sums)
            token += 2
        else:
            _add_1(entries, count, x, columns, token, sums)
            token += 1


@jitted
def prepare_expert(
    expert, schedules, dictionaries, leans, columns, bases, origins, steps, by_column, ends, counts,
    order, column_steps,
):  # fmt: skip
    """Fill `ends`, and order and steps of the visited columns; return how many there are.

    Args:
      steps: float32 [256], steps in units of the origin.
      by_column: whether leans are of columns.
      ends: int64 [7, 16].
      counts: int64 [257], scratch.
      order: int32 [width].
      column_steps: float32 [width], with the sign of the column's lean.
    """
    width = columns.shape[1]
    for number in range(3):
        string = (FLAGS, PLANE_1, PLANE_2)[number]
        total = 0
        for dictionary in range(NUM_DICTIONARIES - 1):
            total += np.int64(schedules[expert, number, dictionary])
            ends[string, dictionary] = total
        ends[string, NUM_DICTIONARIES - 1] = _OUT_OF_REACH
    for number in range(4):
        string = (RESTS, PLANE_3, PLANE_4, SIGNS)[number]
        own = min(np.int64(dictionaries[expert, number]), NUM_DICTIONARIES - 1)
        for dictionary in range(NUM_DICTIONARIES):
            ends[string, dictionary] = _OUT_OF_REACH if dictionary >= own else 0
    # A counting sort by byte, stable.
    counts[:] = 0
    for column in range(width):
        counts[np.int64(columns[expert, column]) + 1] += 1
    for byte in range(256):
        counts[byte + 1] += counts[byte]
    visited = counts[ZERO_COLUMN]
    for column in range(width):
        byte = np.int64(columns[expert, column])
        if byte == ZERO_COLUMN:
            continue
        place = counts[byte]
        counts[byte] += 1
        order[place] = column
        index = min(np.int64(bases[expert, byte >> 5]) + (byte & 31), 255)
        step = origins[expert] * steps[index]
        if by_column and leans[expert, column >> 3] >> (column & 7) & 1:
            step = -step
        column_steps[place] = step
    return visited


@jitted
def place_tokens(x, tokens, order, column_steps, visited, placed):
    """Put x of visited columns, times their steps, into tiles of tokens.

    Args:
      x: float32 [all tokens, width].
      tokens: int64, which of them.
      order: int32, the visited columns, and their steps in `column_steps`.
      visited: how many there are; a column of zeros follows if that is odd.
      placed: float32 [tokens times columns]; tiles of [columns, tokens of the tile].
    """
    columns = (visited + 1) & -2
    token = 0
    while token < tokens.size:
        size = tile_of(token, tokens.size)[1]
        base = token * columns
        for part in range(size):
            row = x[tokens[token + part]]
            for place in range(visited):
                put(
                    placed,
                    base + place * size + part,
                    get(row, np.int64(get(order, place))) * get(column_steps, place),
                )
            if columns > visited:
                placed[base + visited * size + part] = 0
        token += size


@jitted
def multiply_piece(
    words, expert_offsets, lengths, length_bytes, grouped_columns, schedules, dictionaries, leans,
    columns, bases, origins, steps, entries, longest, x, order, starts, busy, first, last, most, y,
    scratch, pair_entries, ends, counts, places, column_steps, placed, all_sums,
):  # fmt: skip
    """Write y of a piece of the work: blocks `first` to `last` - 1 of all busy experts' blocks.

    Args:
      words: uint8, the stored words' bytes; the arrays behind are the stored ones, but
      lengths: uint8, of blocks, as `stored_length` takes them with `length_bytes`.
      steps: float32 [256].
      entries: of `dictionary_entries`, with `longest`.
      x: float32 [tokens, width].
      order: int64 [tokens], sorted by expert.
      starts: int64 [experts + 1], first place of each expert among them.
      busy: int64, experts that have tokens.
      first: a block: number of the expert among the busy ones, times blocks, plus block.
      last: the block behind the last.
      most: tokens of an expert that are multiplied at a time.
      y: float32 [tokens, rows].
      scratch: and the rest: of this thread.
    """
    rows, width = y.shape[1], columns.shape[1]
    blocks = (rows + ROWS - 1) // ROWS
    by_column = rows >= width
    size = words.size
    unit = first
    while unit < last:
        expert = busy[unit // blocks]
        first_block = unit % blocks
        last_block = min(blocks, first_block + last - unit)
        unit += last_block - first_block
        visited = prepare_expert(
            expert, schedules, dictionaries, leans, columns, bases, origins, steps, by_column,
            ends, counts, places, column_steps,
        )  # fmt: skip
        num_grouped = min(max(np.int64(grouped_columns[expert]), 0), visited)
        begin = 4 * np.int64(expert_offsets[expert])
        for block in range(first_block):
            begin += stored_length(lengths, length_bytes, expert * blocks + block)
        for token in range(starts[expert], starts[expert + 1], most):
            own = order[token : min(token + most, starts[expert + 1])]
            place_tokens(x, own, places, column_steps, visited, placed)
            sums = all_sums[: own.size]
            at = begin
            for block in range(first_block, last_block):
                stop = at + stored_length(lengths, length_bytes, expert * blocks + block)
                multiply_block(
                    words, min(max(at, 0), size), min(max(stop, 0), size), ends, entries, longest,
                    num_grouped, visited, scratch, pair_entries, placed, sums,
                )  # fmt: skip
                at = stop
                row = ROWS * block
                for part in range(own.size):
                    line = y[own[part]]
                    for place in range(min(ROWS, rows - row)):
                        value = sums[part, place]
                        if not by_column:
                            lean = leans[expert, (row + place) >> 3] >> ((row + place) & 7) & 1
                            value = -value if lean else value
                        line[row + place] = value
