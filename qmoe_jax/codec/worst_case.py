"""How many bytes an expert takes at the most, whatever its codes.

Of a dictionary coding that is no matter of the longest code for a weight alone: rows are split into
entries in one way, and `tunstall` chooses an expert's dictionary by its own zero share, so that an
expert full of non-zero weights is never stored with the dictionary for sparse ones. The encoder of
`lattice` stores bits as they are where its choices would take more than that.
"""

import functools
import math

import numpy as np

from qmoe_jax.codec.dictionary import NUM_PAIRS, dictionary
from qmoe_jax.codec.lattice_blocks import BLOCK_ROWS
from qmoe_jax.codec.lattice_choices import MAX_SCHEDULED
from qmoe_jax.codec.lattice_dictionaries import lattice_dictionaries
from qmoe_jax.codec.tunstall import NUM_DICTIONARIES, ZERO_WEIGHTS, tunstall_family

LEVEL_BYTES = 4  # of a row: two bfloat16
_LENGTH_BYTES = 2  # of a row, at the most
_OFFSET_BYTES = 4  # of an expert


def packed_bytes(rows: int, width: int) -> int:
    """Return the bytes of an expert of `packed2`: always the same."""
    return rows * (-(-width // 4) + LEVEL_BYTES)


def qmoe_bytes(rows: int, width: int) -> int:
    """Bound the bytes of an expert of `qmoe`.

    The encoder takes the longest entry that matches. All sequences up to some length are entries,
    so each but a row's last is as long.
    """
    codewords = math.ceil(math.ceil(width / 2) / _shortest_match())
    return rows * (2 * codewords + _LENGTH_BYTES + LEVEL_BYTES) + _OFFSET_BYTES


@functools.cache
def _shortest_match() -> int:
    """Return the length, in pairs, up to which every sequence is an entry."""
    counts = np.bincount(dictionary().lengths)
    length = 1
    while length + 1 < len(counts) and counts[length + 1] == NUM_PAIRS ** (length + 1):
        length += 1
    return length


def lattice_bytes(rows: int, width: int) -> int:
    """Bound the bytes of an expert of `lattice`."""
    blocks = -(-rows // BLOCK_ROWS)
    side = blocks * 4 + 4 + 3 * 15 * 2 + 4 + -(-min(rows, width) // 8) + width + 8 + 4
    return raw_lattice_bytes(rows, width) + 3 + _OFFSET_BYTES + side


def raw_lattice_bytes(rows: int, width: int) -> int:
    """Bound the bytes of an expert's blocks where no column is grouped and bits are not coded.

    Of every weight a bit of plane 1, and where all are 4 or more a bit of each other string and a
    byte. A schedule cannot have more than 65,535 codewords of a dictionary: bits behind these are
    of the last one, the more the shorter its shortest entry.
    """
    total = 0
    for first in range(0, rows, BLOCK_ROWS):
        weights = min(BLOCK_ROWS, rows - first) * width
        plane_2 = _scheduled_bytes(weights)
        total += _scheduled_bytes(BLOCK_ROWS * width) + plane_2 + 3 * -(-weights // 8) + weights
    return total


def _scheduled_bytes(bits: int) -> int:
    raw = 8 * MAX_SCHEDULED
    if bits <= raw:
        return -(-bits // 8)
    shortest = int((lattice_dictionaries().table[-1, :, 0] & 0xFF).min())
    return MAX_SCHEDULED + -(-(bits - raw) // shortest)


def tunstall_bytes(num_escapes: int, rows: int, width: int) -> int:
    """Bound the bytes of an expert of a `tunstall` coding.

    Args:
      num_escapes: of its family.
      rows: of an expert.
      width: weights of a row.
    """
    most = max(_bytes_per_weight(num_escapes, number) for number in range(NUM_DICTIONARIES))
    family = tunstall_family(num_escapes)
    # A row's last entry may reach beyond it, and its last byte of sign bits be begun.
    last = 1 + int(family.nonzeros.max()) * _nonzero_bytes(num_escapes) + 7 / 8
    expert = 4 + 1 + _OFFSET_BYTES + 3  # shortest row, dictionary, offset, filler of a word
    in_row = last + _LENGTH_BYTES + LEVEL_BYTES
    return math.ceil(rows * (width * most + in_row)) + expert


def _nonzero_bytes(num_escapes: int) -> float:
    """Return what a non-zero weight takes beside its entry: a sign bit, and an escape."""
    return 1 / 8 + (1 if num_escapes else 0)


@functools.cache
def _bytes_per_weight(num_escapes: int, number: int) -> float:
    """Bound the bytes a weight of whole entries, of an expert that has a dictionary.

    An entry is a point: non-zero weights, and bytes, both for a weight of it. An expert is a mean
    of such points, with no more non-zero weights than its dictionary is chosen for: the highest
    such mean lies on an entry that has no more, or on the line between one of fewer and one of
    more.
    """
    family = tunstall_family(num_escapes)
    used = family.lengths[number] > 0
    lengths = family.lengths[number][used].astype(float)
    nonzeros = family.nonzeros[number][used].astype(float)
    share = nonzeros / lengths
    cost = (1 + nonzeros * _nonzero_bytes(num_escapes)) / lengths
    fewest_zeros = 0.0 if number == 0 else sum(ZERO_WEIGHTS[number - 1 : number + 1]) / 2048
    most = 1 - fewest_zeros
    below, above = share <= most, share > most
    candidates = [cost[below].max(initial=0.0)]
    if above.any() and below.any():
        left, right = share[below][:, None], share[above][None, :]
        part = (most - left) / (right - left)
        mixed = (1 - part) * cost[below][:, None] + part * cost[above][None, :]
        candidates.append(mixed.max())
    return float(max(candidates))
