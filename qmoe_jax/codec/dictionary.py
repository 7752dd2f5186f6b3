"""The dictionary of the "qmoe" coding: 65,536 likely runs of ternary codes, one per codeword.

Frantar & Alistarh 2023 (arXiv 2310.16795), section 4. FORMAT.md, "Dictionary", is normative; the
order of entries hangs on float64 rounding, so the builder checks its result against the hashes of
the published one and never returns a table that differs.
"""

import functools
import hashlib
import heapq
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8, UInt32

from qmoe_jax.errors import CodecError

NUM_ENTRIES = 2**16
MAX_ENTRY_PAIRS = 14
NUM_PAIRS = 9
ROOT = NUM_ENTRIES  # the trie's row for the empty sequence
ZERO_SHARE = 0.885

TABLE_SHA256 = "c09862c453fe122634070a475357ff81a679aff65829d84a56f806c02a54ed45"
TRIE_SHA256 = "fc77a88c6c9c32a0a884b2736ac78c25239a162817d133dc8457c8f0770a8b0b"


class Dictionary(NamedTuple):
    """The entries in the two forms that encoding and decoding need, and once more plainly.

    All arrays are read-only: every caller of `dictionary()` shares them.
    """

    table: UInt32[np.ndarray, "131072"]
    """Two words an entry: words 2c and 2c+1 hold pairs 0-6 and 7-13 of codeword c. In each word
    bits 0-3 are the entry's length in pairs, and bits 4+4j.. the two codes of pair j, 2 bits each,
    the first code lower."""
    trie: Int32[np.ndarray, "65537 9"]
    """trie[c, p]: the entry that is entry c followed by pair p, or -1. Row ROOT is the start."""
    lengths: UInt8[np.ndarray, "65536"]
    """Length of each entry in pairs, 1 to 14."""
    pairs: UInt8[np.ndarray, "65536 14"]
    """Pair symbols (first code + 3 * second code), 0 after the entry's end."""


@functools.cache
def dictionary() -> Dictionary:
    """Build the dictionary (about a second, once a process) and check it against its hashes."""
    pairs, lengths, trie = _likeliest_sequences()
    result = Dictionary(_pack_table(pairs, lengths), trie, lengths, pairs)
    for name, array, expected in (
        ("table", result.table, TABLE_SHA256),
        ("trie", result.trie, TRIE_SHA256),
    ):
        found = sha256_little_endian(array)
        if found != expected:
            raise CodecError(
                f"The dictionary's {name} has sha256 {found}, but the format requires "
                f"{expected}. The order of entries needs IEEE float64 products without extended "
                "precision or fused multiply-add: run a Python built for such a platform."
            )
    for array in result:
        array.flags.writeable = False
    return result


def sha256_little_endian(array: np.ndarray) -> str:
    """Hash a 32-bit array as little-endian bytes, whatever the platform's byte order."""
    return hashlib.sha256(array.astype(array.dtype.newbyteorder("<")).tobytes()).hexdigest()


def pair_probabilities() -> list[float]:
    """Float64 probability of the pair symbols 0..8.

    The product is taken as (1.0 * p[a]) * p[b] with b the symbol's remainder modulo 3.
    """
    nonzero = (1 - ZERO_SHARE) / 2
    single = [ZERO_SHARE, nonzero, nonzero]
    return [1.0 * a * b for a in single for b in single]


def _likeliest_sequences() -> tuple[
    UInt8[np.ndarray, "65536 14"], UInt8[np.ndarray, "65536"], Int32[np.ndarray, "65537 9"]
]:
    """Return the NUM_ENTRIES likeliest non-empty pair sequences, most likely first.

    A sequence is never likelier than its own beginning, so a heap that is fed a sequence's nine
    continuations when the sequence is taken yields them in order, and the set is prefix-closed.
    Heap keys are (-probability, sequence): equal products are taken in lexicographic order.
    """
    probabilities = pair_probabilities()
    symbols = [bytes([pair]) for pair in range(NUM_PAIRS)]
    sequences: list[bytes] = []
    trie = np.full((NUM_ENTRIES + 1, NUM_PAIRS), -1, np.int32)
    heap = [(-p, s, ROOT) for p, s in zip(probabilities, symbols, strict=True)]
    heapq.heapify(heap)
    while len(sequences) < NUM_ENTRIES:
        key, sequence, parent = heapq.heappop(heap)
        index = len(sequences)
        sequences.append(sequence)
        trie[parent, sequence[-1]] = index
        if len(sequence) < MAX_ENTRY_PAIRS:
            for p, s in zip(probabilities, symbols, strict=True):
                heapq.heappush(heap, (key * p, sequence + s, index))

    lengths = np.array([len(s) for s in sequences], np.uint8)
    padded = b"".join(s.ljust(MAX_ENTRY_PAIRS, b"\0") for s in sequences)
    pairs = np.frombuffer(padded, np.uint8).reshape(NUM_ENTRIES, MAX_ENTRY_PAIRS).copy()
    return pairs, lengths, trie


def _pack_table(
    pairs: UInt8[np.ndarray, "65536 14"], lengths: UInt8[np.ndarray, "65536"]
) -> UInt32[np.ndarray, "131072"]:
    nibbles = (pairs % 3 | (pairs // 3) << 2).astype(np.uint32).reshape(NUM_ENTRIES, 2, 7)
    shifts = np.arange(4, 32, 4, dtype=np.uint32)
    words = (nibbles << shifts).sum(axis=-1, dtype=np.uint32) | lengths[:, None]
    return words.reshape(-1)
