"""XLA expansion of "tunstall" rows to codes; no knowledge of experts or files.

The steps: look up the codewords' entries; their places are cumulative sums of their lengths; put
their masks into the row's bit mask, 32 weights a word. The rank of each word's first non-zero
weight is a cumulative sum of population counts, and tells which 32 of the row's sign bits begin
there; deal them out to the set bits of the word in 32 unrolled steps, which XLA fuses into one loop
over words.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int32, UInt8, UInt32

from qmoe_jax.codec.bit_words import WORD, add_words, apart, deal, funnel, inclusive_scan
from qmoe_jax.codec.tunstall import MAX_ENTRY_NONZEROS, NUM_CODEWORDS


def expand_rows(
    words: UInt32[jax.Array, "words"],
    first_word: Int32[jax.Array, ""],
    row_ends: Int32[jax.Array, "rows"],
    row_starts: Int32[jax.Array, "rows"],
    table: UInt32[jax.Array, "256 2"],
    row_codes: UInt8[jax.Array, "rows 4"] | None,
    width: int,
    max_row_codewords: int,
) -> UInt8[jax.Array, "rows width"]:
    """Expand rows to codes.

    Args:
      words: the bytes of all experts, four a word, the first lowest.
      first_word: index of the expert's first word.
      row_ends: byte after each row's last, counted from the expert's first byte.
      row_starts: each row's first byte, counted the same way.
      table: of the expert's dictionary, see TunstallFamily.
      row_codes: the codes of symbols 0 to 3 in each row, in a coding with escapes; None in one
        without, where codes are symbols.
      width: weights in a row.
      max_row_codewords: codewords of a row after this many are ignored.
    """
    rows = row_starts.shape[0]
    num_words = -(-width // WORD)
    if words.size == 0 or rows == 0 or max_row_codewords == 0:
        return jnp.zeros((rows, width), jnp.uint8)

    some = row_ends[-1] > 0  # true of every valid expert

    def look_up() -> tuple[jax.Array, ...]:
        at = row_starts[:, None] + jnp.arange(max_row_codewords, dtype=jnp.int32)[None]
        holding = jnp.take(words, first_word + (at >> 2), mode="clip")
        codeword = holding >> (8 * (at & 3)).astype(jnp.uint32) & jnp.uint32(255)
        low, high = jnp.take(table[:, 0], codeword), jnp.take(table[:, 1], codeword)
        length = (low & jnp.uint32(63)).astype(jnp.int32)
        return codeword.astype(jnp.int32), low, high, inclusive_scan(length) - length

    codeword, low, high, start = apart(some, look_up)
    present = start < width
    masks = apart(some, lambda: _place_masks(low, high, start, present, num_words))
    tail = width % WORD
    if tail:
        masks = masks.at[:, -1].set(masks[:, -1] & jnp.uint32((1 << tail) - 1))
    count = jax.lax.population_count(masks).astype(jnp.int32)
    rank = inclusive_scan(count) - count

    # Sign r of a row is bit 8 row_end - 1 - r of the expert.
    below = 8 * row_ends[:, None] - rank - WORD
    index = first_word + (below >> 5)
    signs = funnel(
        jnp.take(words, index, mode="clip"), jnp.take(words, index + 1, mode="clip"), below & 31
    )
    high_plane = apart(some, lambda: deal(masks, signs))
    planes = [masks & ~high_plane, high_plane]
    if row_codes is not None:
        flags = apart(some, lambda: _escaped_ranks(codeword, low, high, present, num_words))
        # The same for flag r, which is bit 31 - r mod 32 of word r / 32 of its row.
        word = jnp.arange(rows, dtype=jnp.int32)[:, None] * (num_words + 1) + (rank >> 5)
        flags = jnp.pad(flags, ((0, 0), (0, 1))).reshape(-1)
        upper, lower = jnp.take(flags, word, mode="clip"), jnp.take(flags, word + 1, mode="clip")
        shift = (rank & 31).astype(jnp.uint32)
        flags = upper << shift | (lower >> 1) >> (31 - shift)
        escaped = apart(some, lambda: deal(masks, flags))
        planes = apart(some, lambda: _recode(masks, high_plane, escaped, row_codes))
    shifts = jnp.arange(WORD, dtype=jnp.uint32)[None, None]
    bits = [(plane[..., None] >> shifts & jnp.uint32(1)).astype(jnp.uint8) for plane in planes]
    return (bits[0] + 2 * bits[1]).reshape(rows, num_words * WORD)[:, :width]


def _place_masks(
    low: UInt32[jax.Array, "rows codewords"],
    high: UInt32[jax.Array, "rows codewords"],
    start: Int32[jax.Array, "rows codewords"],
    present: Bool[jax.Array, "rows codewords"],
    num_words: int,
) -> UInt32[jax.Array, "rows words"]:
    """Set the non-zero bits of entries (two table words each) that begin at weight `start`."""
    lower = jnp.where(present, low >> 6 | high << 26, jnp.uint32(0))
    upper = jnp.where(present, high >> 6, jnp.uint32(0))
    shift = (start & 31).astype(jnp.uint32)
    carry = 31 - shift  # of a value already shifted right by 1: XLA has no defined shift by 32
    parts = [lower << shift, (lower >> 1) >> carry | upper << shift, (upper >> 1) >> carry]
    return add_words(parts, start >> 5, num_words)


def _escaped_ranks(
    codeword: Int32[jax.Array, "rows codewords"],
    low: UInt32[jax.Array, "rows codewords"],
    high: UInt32[jax.Array, "rows codewords"],
    present: Bool[jax.Array, "rows codewords"],
    num_words: int,
) -> UInt32[jax.Array, "rows words"]:
    """Return a bit for each escaped rank, rank 0 in the highest bit of word 0."""
    place = codeword - (NUM_CODEWORDS - MAX_ENTRY_NONZEROS)
    count = jax.lax.population_count(low >> 6) + jax.lax.population_count(high)
    rank = inclusive_scan(count.astype(jnp.int32)) - count.astype(jnp.int32) + place
    bits = jnp.uint32(1) << (31 - (rank & 31)).astype(jnp.uint32)
    bits = jnp.where(present & (place >= 0), bits, jnp.uint32(0))
    return add_words([bits], rank >> 5, num_words)


def _recode(
    masks: UInt32[jax.Array, "rows words"],
    high_plane: UInt32[jax.Array, "rows words"],
    escaped: UInt32[jax.Array, "rows words"],
    row_codes: UInt8[jax.Array, "rows 4"],
) -> list[UInt32[jax.Array, "rows words"]]:
    """Bit 0 and bit 1 of the codes, 32 to a word, from a row's codes of symbols 0 to 3."""
    symbols = [~masks, masks & ~(high_plane | escaped), high_plane & ~escaped, escaped]
    planes = []
    for bit in (0, 1):
        wanted = -(row_codes >> bit & jnp.uint8(1)).astype(jnp.uint32)  # all bits, or none
        planes.append(sum(symbols[s] & wanted[:, s, None] for s in range(4)))
    return planes
