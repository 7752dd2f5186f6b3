"""XLA expansion of stored symbols to codes; no knowledge of experts or files.

How codewords are expanded, and what lost. A codeword's place in its row is the sum of the lengths
before it, so lengths are looked up and summed along each row. Then entries, 4 bits a pair, are
shifted to their place and added into the 32-bit words of the row (8 pairs a word, an entry touches
at most 3). Entries do not overlap, so adding is the same as or-ing and its order does not matter.
Million weights/s on two CPU cores, 2080 x 6144 at 88.6 % zeros (0.73 bit a weight):

- 660: this: one scalar scatter-add for each of the 3 words.
- 700: one scatter-add of 3-word windows: within noise, and harder to read.
- 144: for each output word a binary search for the first entry, then a loop over the next ones.
- 139: a bit for each entry's start, population counts to number them, three gathers a pair.
-  96: jnp.repeat of codeword indices to pairs, two gathers a pair.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32, UInt8, UInt16, UInt32

from qmoe_jax.codec.dictionary import dictionary

_PAIRS_PER_WORD = 8


def expand_codewords(
    codewords: UInt16[jax.Array, "codewords"],
    row_starts: Int32[jax.Array, "rows"],
    row_ends: Int32[jax.Array, "rows"],
    width: int,
    max_row_codewords: int,
) -> UInt8[jax.Array, "rows width"]:
    """Expand rows of dictionary codewords to ternary codes.

    Args:
      codewords: all codewords; rows lie anywhere in it.
      row_starts: index of each row's first codeword.
      row_ends: index after each row's last codeword.
      width: codes in a row.
      max_row_codewords: codewords of a row after this many are ignored.
    """
    rows = row_starts.shape[0]
    if codewords.size == 0 or rows == 0:
        return jnp.zeros((rows, width), jnp.uint8)
    low_halves, high_halves, lengths = _entry_words()

    index = row_starts[:, None] + jnp.arange(max_row_codewords, dtype=jnp.int32)[None]
    present = index < row_ends[:, None]
    entry = jnp.take(codewords, index, mode="clip").astype(jnp.int32)
    length = jnp.where(present, jnp.take(lengths, entry).astype(jnp.int32), 0)
    start = jnp.cumsum(length, axis=1) - length

    low = jnp.where(present, jnp.take(low_halves, entry), jnp.uint32(0))
    high = jnp.where(present, jnp.take(high_halves, entry), jnp.uint32(0))
    shift = 4 * (start % _PAIRS_PER_WORD).astype(jnp.uint32)
    carry = 31 - shift  # of a value already shifted right by 1: XLA has no defined shift by 32
    word = start // _PAIRS_PER_WORD
    row = jnp.arange(rows, dtype=jnp.int32)[:, None]
    num_words = -(-width // (2 * _PAIRS_PER_WORD))
    words = jnp.zeros((rows, num_words), jnp.uint32)
    for part, bits in enumerate(
        (low << shift, (low >> 1) >> carry | high << shift, (high >> 1) >> carry)
    ):
        words = words.at[row, word + part].add(bits, mode="drop")
    return _unpack_pairs(words)[:, :width]


def unpack_2bit(
    packed: UInt8[jax.Array, "rows bytes"], width: int
) -> UInt8[jax.Array, "rows width"]:
    """Unpack 2-bit codes, four a byte, the first in the lowest bits."""
    shifts = jnp.arange(0, 8, 2, dtype=jnp.uint8)[None, None]
    codes = packed[..., None] >> shifts & jnp.uint8(3)
    return codes.reshape(packed.shape[0], 4 * packed.shape[1])[:, :width]


def _unpack_pairs(words: UInt32[jax.Array, "rows words"]) -> UInt8[jax.Array, "rows codes"]:
    shifts = jnp.arange(0, 32, 2, dtype=jnp.uint32)[None, None]
    codes = (words[..., None] >> shifts & jnp.uint32(3)).astype(jnp.uint8)
    return codes.reshape(words.shape[0], 16 * words.shape[1])


@functools.cache
def _entry_words() -> tuple[
    UInt32[np.ndarray, "65536"], UInt32[np.ndarray, "65536"], UInt8[np.ndarray, "65536"]
]:
    """Pairs 0-7 and 8-13 of each entry, 4 bits a pair from bit 0, and lengths in pairs.

    The table's own words (7 pairs after a length) would need a shift more for each codeword.
    """
    pairs = dictionary().pairs
    nibbles = np.zeros((pairs.shape[0], 2, _PAIRS_PER_WORD), np.uint32)
    nibbles.reshape(pairs.shape[0], -1)[:, : pairs.shape[1]] = pairs % 3 | (pairs // 3) << 2
    halves = (nibbles << np.arange(0, 32, 4, dtype=np.uint32)).sum(axis=-1, dtype=np.uint32)
    return halves[:, 0].copy(), halves[:, 1].copy(), dictionary().lengths
