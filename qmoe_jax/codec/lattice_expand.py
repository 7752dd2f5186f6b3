"""XLA expansion of an expert's "lattice" blocks to codes; no knowledge of files.

A column of a block is a word of 32 bits, one a row, so planes are computed 32 weights at a time:
codewords to bit strings, in chunks for all blocks at once; strings dealt to the ones of the plane
before; columns put back into their places; words to codes. Reads and writes stay in bounds whatever
the arrays hold, and loops end, for each codeword has at least one bit.

All strings but the first go through one loop: XLA does not share code between calls, and a loop for
each took four fifths of the time that an expansion needs to be compiled.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Int32, UInt8, UInt32

from qmoe_jax.codec.bit_words import WORD, apart, funnel, inclusive_scan
from qmoe_jax.varying import varying_zeros

FLAGS, RESTS, PLANE_1, PLANE_2, PLANE_3, PLANE_4, SIGNS = range(7)
_GROUPS = 4
# Codewords of a string that are looked up at a time: this share of its words, within bounds.
_SHARE = 8
_MIN_CHUNK, _MAX_CHUNK = 32, 4096
_REMAINDERS = 32  # of a block that are placed at a time


class LatticeStrings(NamedTuple):
    """How an expert's blocks are coded."""

    words: UInt32[jax.Array, "words"]
    """The bytes of all experts, four a word, the first lowest."""
    starts: Int32[jax.Array, "blocks"]
    """First byte of each block, counted from the expert's first."""
    stops: Int32[jax.Array, "blocks"]
    first_word: Int32[jax.Array, ""]
    """Index of the expert's first word."""
    ends: Int32[jax.Array, "strings dictionaries"]
    """Codeword of a string from which on each dictionary no longer counts."""
    table: UInt32[jax.Array, "dictionaries 256 2"]
    """See LatticeDictionaries."""


def expand_blocks(
    strings: LatticeStrings,
    places: Int32[jax.Array, "width"],
    num_visited: Int32[jax.Array, ""],
    num_grouped: Int32[jax.Array, ""],
    row_lean: UInt32[jax.Array, "blocks"],
    column_lean: UInt32[jax.Array, "width"],
) -> UInt8[jax.Array, "rows width"]:
    """Expand blocks to codes, 32 rows for each block.

    Args:
      strings: the stored blocks.
      places: where each column stands in the order of columns.
      num_visited: columns that blocks hold; those with a later place are zero.
      num_grouped: at most num_visited; the first so many are stored by groups of rows.
      row_lean: a bit for each row of a block, the first lowest.
      column_lean: all bits or none.
    """
    blocks, width = strings.starts.shape[0], places.shape[0]
    if strings.words.size == 0 or blocks == 0:
        return jnp.zeros((WORD * blocks, width), jnp.uint8)
    some = num_visited > 0
    groups = _read_groups(strings, num_grouped, width)
    found, at = _expand_strings(strings, groups, WORD * (num_visited - num_grouped), width)
    grouped = _grouped_columns(groups, found[RESTS], num_grouped)

    def first_plane() -> jax.Array:
        column = jnp.arange(width, dtype=jnp.int32)
        index = width * jnp.arange(blocks, dtype=jnp.int32)[:, None] + column - num_grouped
        behind = jnp.take(found[PLANE_1].reshape(-1), index, mode="clip")
        return jnp.where(column < num_grouped, grouped, behind) & jnp.where(
            column < num_visited, jnp.uint32(0xFFFFFFFF), jnp.uint32(0)
        )

    nonzero = apart(some, first_plane)

    def deal_all() -> tuple[jax.Array, ...]:
        ranks = _ranks(nonzero)
        windows = (_window(found[number], ranks) for number in (PLANE_2, SIGNS))
        return _deal(nonzero, *windows)

    large, negative = apart(some, deal_all)
    (third,) = apart(some, lambda: _deal(large, _window(found[PLANE_3], _ranks(large))))
    (fourth,) = apart(some, lambda: _deal(third, _window(found[PLANE_4], _ranks(third))))

    def into_places() -> tuple[jax.Array, ...]:
        planes = (nonzero, large, third, fourth, negative)
        index = width * jnp.arange(blocks, dtype=jnp.int32)[:, None] + places
        moved = [jnp.take(plane.reshape(-1), index, mode="clip") for plane in planes]
        moved[4] = (moved[4] ^ row_lean[:, None] ^ column_lean[None]) & moved[0]
        return tuple(moved)

    def bits(plane: jax.Array) -> jax.Array:
        shifts = jnp.arange(WORD, dtype=jnp.uint32)[None, :, None]
        return (plane[:, None, :] >> shifts & jnp.uint32(1)).astype(jnp.uint8)

    *magnitudes, negative = apart(some, into_places)
    codes = 2 * sum(map(bits, magnitudes)) - bits(negative)
    columns = jnp.zeros_like(places).at[places].set(jnp.arange(width, dtype=jnp.int32))
    codes = _add_remainders(codes, strings, at, fourth, columns)
    return codes.reshape(WORD * blocks, width)


class _Groups(NamedTuple):
    """What is known of the columns that are stored by groups of eight rows, before their rests.

    Of a column's four groups, those with weights have a field of three bits, its first weight, and
    a rest of up to seven bits; fields follow one another, and so do rests: a window of either is
    enough for all four.
    """

    flags: UInt32[jax.Array, "blocks width"]
    """A bit for each group that has weights."""
    firsts: UInt32[jax.Array, "blocks width"]
    """A byte a group: its first weight."""
    count: Int32[jax.Array, "blocks"]
    """Groups that have weights."""
    rest_ranks: Int32[jax.Array, "blocks width+1"]
    """Where the rests of each column begin, and where all end."""
    behind: Int32[jax.Array, "blocks"]
    """The byte behind the fields."""


def _read_groups(strings: LatticeStrings, num_grouped: Int32[jax.Array, ""], width: int) -> _Groups:
    """Expand which groups have weights, and read the fields behind."""
    blocks = strings.starts.shape[0]
    num_flags = jnp.broadcast_to(_GROUPS * num_grouped, (blocks,))
    words, firsts_at = _expand_string(
        strings, strings.ends[FLAGS], strings.starts, num_flags, -(-width // 8)
    )
    shifts = jnp.arange(0, WORD, _GROUPS, dtype=jnp.uint32)

    def read() -> tuple[jax.Array, ...]:
        flags = (words[..., None] >> shifts & jnp.uint32(15)).reshape(blocks, -1)[:, :width]
        through = inclusive_scan(jax.lax.population_count(flags).astype(jnp.int32))
        place = 8 * firsts_at[:, None] + 3 * jnp.pad(through[:, :-1], ((0, 0), (1, 0)))
        index = strings.first_word + (place >> 5)
        lower, upper = (jnp.take(strings.words, index + more, mode="clip") for more in (0, 1))
        fields = funnel(lower, upper, place & 31)
        firsts, rests = jnp.zeros_like(flags), jnp.zeros_like(flags)
        for group in range(_GROUPS):
            taken = flags >> group & jnp.uint32(1)
            first = taken * (fields & jnp.uint32(7))
            firsts |= first << 8 * group
            rests += taken * (7 - first)
            fields >>= 3 * taken
        ranks = jnp.pad(inclusive_scan(rests.astype(jnp.int32)), ((0, 0), (1, 0)))
        return flags, firsts, through[:, -1], ranks

    flags, firsts, count, ranks = apart(num_grouped > 0, read)
    return _Groups(flags, firsts, count, ranks, firsts_at + (3 * count + 7 >> 3))


def _grouped_columns(
    groups: _Groups, rests: UInt32[jax.Array, "blocks width"], num_grouped: Int32[jax.Array, ""]
) -> UInt32[jax.Array, "blocks width"]:
    """Put firsts and rests together."""

    def into_columns() -> jax.Array:
        window = _window(rests, groups.rest_ranks)
        columns = jnp.zeros_like(groups.flags)
        for group in range(_GROUPS):
            taken = groups.flags >> group & jnp.uint32(1)
            first = groups.firsts >> 8 * group & jnp.uint32(7)
            length = taken * (7 - first)
            rest = window & (jnp.uint32(1) << length) - jnp.uint32(1)
            columns |= (taken | rest << 1) << first << 8 * group
            window >>= length
        return columns

    return apart(num_grouped > 0, into_columns)


def _expand_strings(
    strings: LatticeStrings, groups: _Groups, ungrouped: Int32[jax.Array, ""], width: int
) -> tuple[UInt32[jax.Array, "strings blocks width"], Int32[jax.Array, "blocks"]]:
    """Expand the strings behind `FLAGS`, by their numbers; also the byte behind the last.

    Args:
      strings: the stored blocks.
      groups: of the columns that are stored by groups.
      ungrouped: weights of a block in the other columns.
      width: words that a string has at most.
    """
    blocks = strings.starts.shape[0]

    def one(number, state):
        found, ones, at = state
        # Each weight of a plane has a bit in the next; those that are not zero have a sign.
        wanted = jnp.select(
            [number == RESTS, number == PLANE_1, number == SIGNS],
            [
                groups.rest_ranks[:, -1],
                jnp.broadcast_to(ungrouped, (blocks,)),
                groups.count + ones[RESTS] + ones[PLANE_1],
            ],
            ones[number - 1] + jnp.where(number == PLANE_2, groups.count + ones[RESTS], 0),
        )
        words, at = _expand_string(strings, strings.ends[number], at, wanted, width)
        return found.at[number].set(words), ones.at[number].set(_count(words)), at

    sources = strings.words, strings.starts, groups.behind
    found = varying_zeros((SIGNS + 1, blocks, width), jnp.uint32, *sources)
    ones = varying_zeros((SIGNS + 1, blocks), jnp.int32, *sources)
    found, _, at = jax.lax.fori_loop(RESTS, SIGNS + 1, one, (found, ones, groups.behind))
    return found, at


def _expand_string(
    strings: LatticeStrings,
    ends: Int32[jax.Array, "dictionaries"],
    start: Int32[jax.Array, "blocks"],
    wanted: Int32[jax.Array, "blocks"],
    num_words: int,
) -> tuple[UInt32[jax.Array, "blocks words"], Int32[jax.Array, "blocks"]]:
    """Expand one bit string of every block; also the byte behind its codewords.

    Args:
      strings: the stored blocks.
      ends: of the string's dictionaries.
      start: its first byte in each block.
      wanted: its bits in each block.
      num_words: at least a 32nd of these.
    """
    blocks = start.shape[0]
    chunk = min(max(_MIN_CHUNK, num_words // _SHARE), _MAX_CHUNK)
    table = strings.table.reshape(-1, 2)
    row = num_words * jnp.arange(blocks, dtype=jnp.int32)[:, None]

    def more(state):
        _, length, done, _ = state
        return jnp.any((length < wanted) & (start + done < strings.stops))

    def step(state):
        first, length, done, words = state
        index = first + jnp.arange(chunk, dtype=jnp.int32)
        dictionary = (index[:, None] >= ends).sum(axis=1, dtype=jnp.int32)
        dictionary = jnp.minimum(dictionary, strings.table.shape[0] - 1)
        at = start[:, None] + index
        holding = jnp.take(strings.words, strings.first_word + (at >> 2), mode="clip")
        codeword = holding >> (8 * (at & 3)).astype(jnp.uint32) & jnp.uint32(255)
        entry = 256 * dictionary + codeword.astype(jnp.int32)
        low, high = jnp.take(table[:, 0], entry), jnp.take(table[:, 1], entry)
        size = (low & jnp.uint32(255)).astype(jnp.int32)
        through = length[:, None] + inclusive_scan(size)
        place = through - size
        present = (place < wanted[:, None]) & (at < strings.stops[:, None])
        lower = jnp.where(present, low >> 16 | high << 16, jnp.uint32(0))
        upper = jnp.where(present, high >> 16, jnp.uint32(0))
        place = place + (low >> 8 & jnp.uint32(255)).astype(jnp.int32)
        shift = (place & 31).astype(jnp.uint32)
        carry = 31 - shift  # of a value already shifted right by 1: XLA has no defined shift by 32
        parts = (
            lower << shift,
            (lower >> 1) >> carry | upper << shift,
            (upper >> 1) >> carry,
        )

        def add(words: jax.Array, part: int) -> jax.Array:
            word = (place >> 5) + part
            target = jnp.where(present & (word < num_words), row + word, words.size)
            return words.at[target].add(parts[part], mode="drop")

        words = add(add(words, 0), 1)
        # Few entries reach into a third word.
        words = jax.lax.cond(
            jnp.any(parts[2] != 0), lambda own: add(own, 2), lambda own: own, words
        )
        length = length + jnp.where(present, size, 0).sum(axis=1, dtype=jnp.int32)
        done = done + present.sum(axis=1, dtype=jnp.int32)
        return first + chunk, length, done, words

    zeros = varying_zeros((blocks,), jnp.int32, strings.words, start, wanted)
    words = varying_zeros((blocks * num_words,), jnp.uint32, strings.words, start, wanted)
    _, _, done, words = jax.lax.while_loop(more, step, (zeros[0] * 0, zeros, zeros, words))
    words = words.reshape(blocks, num_words)
    # Ones behind the string, which only damaged codewords have.
    left = jnp.clip(wanted[:, None] - WORD * jnp.arange(num_words, dtype=jnp.int32), 0, WORD)
    keep = jnp.where(
        left == WORD, jnp.uint32(0xFFFFFFFF), (1 << (left & 31)).astype(jnp.uint32) - 1
    )
    return words & keep, start + done


def _count(plane: UInt32[jax.Array, "blocks words"]) -> Int32[jax.Array, "blocks"]:
    return jax.lax.population_count(plane).sum(axis=1, dtype=jnp.int32)


def _ranks(plane: UInt32[jax.Array, "blocks words"]) -> Int32[jax.Array, "blocks words+1"]:
    """Ones before each word, and of all words."""
    through = inclusive_scan(jax.lax.population_count(plane).astype(jnp.int32))
    return jnp.pad(through, ((0, 0), (1, 0)))


def _window(
    string: UInt32[jax.Array, "blocks words"], ranks: Int32[jax.Array, "blocks words+1"]
) -> UInt32[jax.Array, "blocks words"]:
    """32 bits of a block's string from each rank on."""
    blocks, num_words = string.shape
    rank = ranks[:, :-1]
    index = (rank >> 5) + num_words * jnp.arange(blocks, dtype=jnp.int32)[:, None]
    flat = string.reshape(-1)  # a block's last word has no successor that counts
    lower, upper = (jnp.take(flat, index + more, mode="clip") for more in (0, 1))
    return funnel(lower, upper, rank & 31)


def _deal(
    mask: UInt32[jax.Array, "blocks words"], *windows: UInt32[jax.Array, "blocks words"]
) -> tuple[UInt32[jax.Array, "blocks words"], ...]:
    """Deal each window's bits to the ones of the mask, the lowest first."""
    dealt = [jnp.zeros_like(mask) for _ in windows]
    left = list(windows)
    for bit in range(WORD):
        taken = mask >> bit & jnp.uint32(1)
        for number in range(len(left)):
            dealt[number] |= (taken & left[number]) << bit
            left[number] = left[number] >> taken
    return tuple(dealt)


def _add_remainders(
    codes: UInt8[jax.Array, "blocks 32 width"],
    strings: LatticeStrings,
    at: Int32[jax.Array, "blocks"],
    plane: UInt32[jax.Array, "blocks words"],
    columns: Int32[jax.Array, "words"],
) -> UInt8[jax.Array, "blocks 32 width"]:
    """Add twice the remainders to the codes of the plane's weights. They are rare.

    Args:
      codes: of magnitude 4 where the plane has ones.
      strings: the stored blocks.
      at: where the remainders of each block begin.
      plane: the weights that have one.
      columns: the column that stands at each place.
    """
    blocks, _, width = codes.shape
    through = inclusive_scan(jax.lax.population_count(plane).astype(jnp.int32))
    block = jnp.arange(blocks, dtype=jnp.int32)[:, None]

    def step(state):
        first, codes = state
        rank = first + jnp.arange(_REMAINDERS, dtype=jnp.int32)
        word = jax.vmap(lambda row: jnp.searchsorted(row, rank, side="right"))(through)
        present = word < width
        word = jnp.minimum(word, width - 1).astype(jnp.int32)
        index = width * block + word
        bits = jnp.take(plane.reshape(-1), index, mode="clip")
        own = jax.lax.population_count(bits).astype(jnp.int32)
        before = jnp.take(through.reshape(-1), index, mode="clip") - own
        row = _select(bits, rank - before)
        place = at[:, None] + rank
        holding = jnp.take(strings.words, strings.first_word + (place >> 2), mode="clip")
        remainder = holding >> (8 * (place & 3)).astype(jnp.uint32) & jnp.uint32(255)
        remainder = jnp.where(place < strings.stops[:, None], remainder, 0)
        column = jnp.where(present, jnp.take(columns, word), width)
        added = (2 * remainder).astype(jnp.uint8)
        return first + _REMAINDERS, codes.at[block, row, column].add(added, mode="drop")

    first = varying_zeros((), jnp.int32, plane)
    return jax.lax.while_loop(
        lambda state: jnp.any(state[0] < through[:, -1]), step, (first, codes)
    )[1]


def _select(bits: UInt32[jax.Array, "*shape"], number: Int32[jax.Array, "*shape"]):
    """Find the place of a word's one of that number, by halves."""
    place = jnp.zeros_like(number)
    for half in (16, 8, 4, 2, 1):
        low = bits >> place.astype(jnp.uint32) & jnp.uint32((1 << half) - 1)
        below = jax.lax.population_count(low).astype(jnp.int32)
        skip = number >= below
        number = jnp.where(skip, number - below, number)
        place = jnp.where(skip, place + half, place)
    return place & 31
