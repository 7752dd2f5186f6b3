"""What lattice codes would take at their entropy: the estimate that a size target is met with.

Zero shares differ much by column and hardly by row, so columns are sorted into classes by zero
share, each with symbols of its own frequency, and columns that hold zeros only are not stored.
Counted are the ideal length of all symbols in their classes, the class and the step of a column,
and the origin. Not counted is what a real coding adds: row lengths, words of whole bits, frequency
tables. `estimated_bits` is the one place that a coding's own sizes are to replace.
"""

import math

import numpy as np
from jaxtyping import Int64, UInt8

from qmoe_jax.host_threads import compiled

_CLASSES = 8
_BITS_A_COLUMN = math.log2(_CLASSES) + 8  # its class and its step
_BITS_AN_EXPERT = 32  # the origin


def estimated_bits(
    codes: UInt8[np.ndarray, "experts rows width"],
) -> Int64[np.ndarray, " experts"]:
    """Return the bits that lattice codes and their steps would take, of each expert."""
    return np.array([math.ceil(_expert_bits(own)) for own in codes], np.int64)


def _expert_bits(codes: UInt8[np.ndarray, "rows width"]) -> float:
    rows, width = codes.shape
    side = width * _BITS_A_COLUMN + _BITS_AN_EXPERT
    zeros = np.zeros(width, np.int64)
    compiled(_count_zeros)(codes, zeros)
    alive = zeros < rows
    if not alive.any():
        return side
    odds = np.log2((rows - zeros[alive]) / (zeros[alive] + 0.5))
    edges = np.linspace(odds.min(), odds.max(), _CLASSES + 1)[1:-1]
    classes = np.full(width, _CLASSES, np.uint8)  # that of columns of zeros
    classes[alive] = np.searchsorted(edges, odds)
    counts = np.zeros((_CLASSES + 1, 256), np.int64)
    compiled(_count_symbols)(codes, classes, counts)
    return side + sum(_entropy_bits(own) for own in counts[:_CLASSES])


def _entropy_bits(counts: np.ndarray) -> float:
    """Ideal length of symbols that occur so often."""
    seen, total = counts[counts > 0], max(int(counts.sum()), 1)
    return float(total * np.log2(total) - (seen * np.log2(seen)).sum())


def _count_zeros(codes, zeros):
    for row in range(codes.shape[0]):
        for column in range(codes.shape[1]):
            zeros[column] += codes[row, column] == 0


def _count_symbols(codes, classes, counts):
    for row in range(codes.shape[0]):
        for column in range(codes.shape[1]):
            counts[classes[column], codes[row, column]] += 1
