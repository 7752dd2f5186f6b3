"""The dictionaries of the "tunstall" codings: complete binary trees over zero and non-zero weights.

FORMAT.md, "Dictionaries of `tunstall`", is normative. Probabilities are compared as integers, so
that every platform builds the same trees; the hashes are checked all the same.
"""

import functools
import hashlib
import heapq
import itertools
from typing import NamedTuple

import numpy as np
from jaxtyping import Int16, UInt8, UInt32

from qmoe_jax.errors import CodecError

NUM_CODEWORDS = 256
MAX_ENTRY_WEIGHTS = 58
MAX_ENTRY_NONZEROS = 8
"""So many at most in an entry of an escaping family: an escape names one of them."""
ZERO_WEIGHTS = (512, 640, 736, 800, 848, 880, 904, 928, 952, 976)
"""Zero share for which each dictionary is made, in 1/1024."""
NUM_DICTIONARIES = len(ZERO_WEIGHTS)

_SHA256 = {
    0: "4800547715427566f5a9cbc682d179b4258206174aab504ab161d9556a15fb07",
    MAX_ENTRY_NONZEROS: "49b2ad2d8e328632f22f57a1d5605f9cc43fd0aa4fce4ad994da4b2c11eed9e1",
}


class TunstallFamily(NamedTuple):
    """All dictionaries of a coding, numbered as ZERO_WEIGHTS. The arrays are read-only."""

    num_escapes: int
    """The last so many codewords are escapes: 0 (ternary) or 8 (2-bit)."""
    table: UInt32[np.ndarray, "dictionaries 256 2"]
    """Two words a codeword, as one 64-bit number with the first word lower: bits 0-5 the entry's
    length in weights, bit 6 + i whether weight i is not zero. Zeros for escapes."""
    lengths: UInt8[np.ndarray, "dictionaries 256"]
    """Weights of each entry, 1 to 58; 0 for escapes."""
    nonzeros: UInt8[np.ndarray, "dictionaries 256"]
    """Non-zero weights of each entry."""
    trie: Int16[np.ndarray, "dictionaries nodes 2"]
    """trie[d, node, b]: where a zero (b = 0) or non-zero weight leads from a node: another node,
    or -1 - codeword at an entry's end. Node 0 is the root."""


@functools.cache
def tunstall_family(num_escapes: int) -> TunstallFamily:
    """Build the ten dictionaries (under a second, once a process) and check their hash."""
    num_entries = NUM_CODEWORDS - num_escapes
    table = np.zeros((NUM_DICTIONARIES, NUM_CODEWORDS, 2), np.uint32)
    lengths = np.zeros((NUM_DICTIONARIES, NUM_CODEWORDS), np.uint8)
    nonzeros = np.zeros((NUM_DICTIONARIES, NUM_CODEWORDS), np.uint8)
    trie = np.zeros((NUM_DICTIONARIES, num_entries - 1, 2), np.int16)
    for number, zero_weight in enumerate(ZERO_WEIGHTS):
        entries = _grow(zero_weight, num_entries)
        for codeword, entry in enumerate(entries):
            mask = sum(1 << place for place, bit in enumerate(entry) if bit)
            bits = len(entry) | mask << 6
            table[number, codeword] = bits & 0xFFFFFFFF, bits >> 32
            lengths[number, codeword] = len(entry)
            nonzeros[number, codeword] = sum(entry)
        trie[number] = _nodes(entries)
    found = hashlib.sha256(table.astype("<u4").tobytes()).hexdigest()
    if found != _SHA256[num_escapes]:
        raise CodecError(
            f"The 'tunstall' dictionaries with {num_escapes} escapes have sha256 {found}, but "
            f"the format requires {_SHA256[num_escapes]}. Restore codec/tunstall.py."
        )
    family = TunstallFamily(num_escapes, table, lengths, nonzeros, trie)
    for array in family[1:]:
        array.flags.writeable = False
    return family


def choose_dictionary(num_zeros: int, num_weights: int) -> int:
    """Return the number of the dictionary with the nearest zero share; of two, the denser."""
    middles = (a + b for a, b in itertools.pairwise(ZERO_WEIGHTS))
    return sum(2048 * num_zeros > middle * num_weights for middle in middles)


def _grow(zero_weight: int, num_entries: int) -> list[tuple[int, ...]]:
    """Split the likeliest leaf until there are num_entries; return the leaves in order.

    Heap keys are probabilities times -1024^58, then sequences: equals are taken in lexicographic
    order.
    """
    leaves: list[tuple[int, tuple[int, ...]]] = [(-(1024**MAX_ENTRY_WEIGHTS), ())]
    done: list[tuple[int, ...]] = []
    while len(leaves) + len(done) < num_entries:
        key, entry = heapq.heappop(leaves)
        if len(entry) == MAX_ENTRY_WEIGHTS:
            done.append(entry)
            continue
        for bit, weight in enumerate((zero_weight, 1024 - zero_weight)):
            heapq.heappush(leaves, (key // 1024 * weight, (*entry, bit)))
    return sorted(done + [entry for _, entry in leaves])


def _nodes(entries: list[tuple[int, ...]]) -> np.ndarray:
    """Return the tree of the entries as TunstallFamily.trie, nodes in lexicographic order."""
    inner = sorted({entry[:n] for entry in entries for n in range(len(entry))})
    number = {node: index for index, node in enumerate(inner)}
    codeword = {entry: index for index, entry in enumerate(entries)}
    trie = np.zeros((len(inner), 2), np.int16)
    for node, index in number.items():
        for bit in (0, 1):
            child = (*node, bit)
            trie[index, bit] = number[child] if child in number else -1 - codeword[child]
    return trie
