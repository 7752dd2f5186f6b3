"""The dictionaries of the "lattice" coding: complete binary trees over bits.

FORMAT.md, "Dictionaries of `lattice`", is normative. As for "tunstall", probabilities are compared
as integers and the table's hash is checked; entries may be longer, for columns of few non-zero
weights.
"""

import functools
import hashlib
import heapq
from typing import NamedTuple

import numpy as np
from jaxtyping import Int16, UInt32

from qmoe_jax.errors import CodecError

NUM_CODEWORDS = 256
MAX_ENTRY_BITS = 255
MAX_ENTRY_SPAN = 48
"""An entry has at most so many bits from its first one on."""
ZERO_SHARES = (1020, 1014, 1005, 994, 980, 962, 940, 914, 884, 848, 804, 748, 680, 608, 512, 384)
"""Share of zeros for which each dictionary is made, in 1/1024; falling, as columns get denser."""
NUM_DICTIONARIES = len(ZERO_SHARES)
RAW_DICTIONARY = ZERO_SHARES.index(512)
"""The one whose entries are all sequences of eight bits."""

_SHA256 = "3d5512d360c6956609c8de07c7a781837a7b23725156bf3e3fee53b31bf6e843"


class LatticeDictionaries(NamedTuple):
    """All dictionaries, numbered as ZERO_SHARES. The arrays are read-only."""

    table: UInt32[np.ndarray, "dictionaries 256 2"]
    """Two words a codeword, as one 64-bit number with the first word lower: bits 0-7 the entry's
    length, bits 8-15 the zeros before its first one (0 if it has none), bit 16 + i whether the bit
    number i from there is one."""
    trie: Int16[np.ndarray, "dictionaries nodes 2"]
    """trie[d, node, b]: where bit b leads from a node: another node, or -1 - codeword at an entry's
    end. Node 0 is the root."""


@functools.cache
def lattice_dictionaries() -> LatticeDictionaries:
    """Build the dictionaries (once a process) and check their hash."""
    table = np.zeros((NUM_DICTIONARIES, NUM_CODEWORDS, 2), np.uint32)
    trie = np.zeros((NUM_DICTIONARIES, NUM_CODEWORDS - 1, 2), np.int16)
    for number, zero_share in enumerate(ZERO_SHARES):
        entries = _grow(zero_share)
        for codeword, entry in enumerate(entries):
            first = entry.find("1")
            lead = max(first, 0)
            mask = int(entry[lead:][::-1], 2)
            bits = len(entry) | lead << 8 | mask << 16
            table[number, codeword] = bits & 0xFFFFFFFF, bits >> 32
        trie[number] = _nodes(entries)
    found = hashlib.sha256(table.astype("<u4").tobytes()).hexdigest()
    if found != _SHA256:
        raise CodecError(
            f"The 'lattice' dictionaries have sha256 {found}, but the format requires "
            f"{_SHA256}. Restore codec/lattice_dictionaries.py."
        )
    dictionaries = LatticeDictionaries(table, trie)
    for array in dictionaries:
        array.flags.writeable = False
    return dictionaries


def _grow(zero_share: int) -> list[str]:
    """Split the likeliest leaf that may grow until there are 256; return the leaves in order.

    Heap keys are probabilities times -1024^255, then sequences: equals are taken in lexicographic
    order.
    """
    leaves = [(-(1024**MAX_ENTRY_BITS), "")]
    done: list[str] = []
    while len(leaves) + len(done) < NUM_CODEWORDS:
        key, entry = heapq.heappop(leaves)
        span = len(entry) - entry.find("1") if "1" in entry else 0
        if len(entry) == MAX_ENTRY_BITS or span == MAX_ENTRY_SPAN:
            done.append(entry)
            continue
        heapq.heappush(leaves, (key // 1024 * zero_share, entry + "0"))
        heapq.heappush(leaves, (key // 1024 * (1024 - zero_share), entry + "1"))
    return sorted(done + [entry for _, entry in leaves])


def _nodes(entries: list[str]) -> np.ndarray:
    """Return the tree of the entries as LatticeDictionaries.trie, nodes in lexicographic order."""
    inner = sorted({entry[:n] for entry in entries for n in range(len(entry))})
    number = {node: index for index, node in enumerate(inner)}
    codeword = {entry: index for index, entry in enumerate(entries)}
    trie = np.zeros((len(inner), 2), np.int16)
    for node, index in number.items():
        for bit in (0, 1):
            child = f"{node}{bit}"
            trie[index, bit] = number[child] if child in number else -1 - codeword[child]
    return trie
