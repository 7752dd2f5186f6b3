"""What an adaptive mixing coder would need for lattice codes: a bound to measure codings by.

Every binary decision of a code (zero or not, sign, magnitude above 1, above 2, ...) is predicted by
a logistic mixture of adaptive shares, each kept for a context: the column, learnt slowly and fast;
the row; the step; the column over all experts; the row over all experts; the two neighbours before
it and the two above with the column's share. A column's shares begin with those of its step. Signs
thereby know rows and columns, which in one of the two are embedding dimensions, and the neighbours'
signs. Nothing is sent but the codes: what a model learns is in the count, and steps are known to it
for free. It is no design: one code takes about a microsecond, one after another.
"""

import functools
from typing import Any

import numpy as np
from jaxtyping import Float64, UInt8

KINDS = ("zeros", "signs", "magnitude 2", "larger")
_NUM_INPUTS = 9
_RATE = 0.002
_FIRST_WEIGHT = 0.3


def bound_bits(
    codes: UInt8[np.ndarray, "experts rows width"], steps: UInt8[np.ndarray, "experts width"]
) -> Float64[np.ndarray, "4"]:
    """Count the bits of all codes of a tensor, by KINDS."""
    return _compiled()(np.ascontiguousarray(codes), np.ascontiguousarray(steps))


@functools.cache
def _compiled() -> Any:
    import numba

    globals()["_learn"] = numba.njit(_learn)  # which the loop calls by that name
    return numba.njit(fastmath=True)(_bound)


def _bound(codes, steps):
    """Count. Runs under numba."""
    experts, rows, width = codes.shape
    bits = np.zeros(4)
    mixing = np.full((4, 16, _NUM_INPUTS), _FIRST_WEIGHT)
    # Shares of ones by context, and how often each was seen.
    by_step, seen_step = np.full((4, 256), 0.5), np.zeros((4, 256))
    by_place, seen_place = np.full((4, width), 0.5), np.zeros((4, width))
    by_near, seen_near = np.full((4, 4096), 0.5), np.zeros((4, 4096))
    by_line, seen_line = np.full((4, rows), 0.5), np.zeros((4, rows))
    share, stretched = np.zeros(_NUM_INPUTS), np.zeros(_NUM_INPUTS)
    for expert in range(experts):
        slow, seen_slow = np.full((4, width), 0.5), np.zeros((4, width))
        fast, seen_fast = np.full((4, width), 0.5), np.zeros((4, width))
        by_row, seen_row = np.full((4, rows), 0.5), np.zeros((4, rows))
        for column in range(width):
            for kind in range(4):
                slow[kind, column] = fast[kind, column] = by_step[kind, steps[expert, column]]
        for row in range(rows):
            for column in range(width):
                code = codes[expert, row, column]
                magnitude = (code + 1) >> 1
                step = steps[expert, column]
                left = codes[expert, row, column - 1] if column > 0 else 0
                left2 = codes[expert, row, column - 2] if column > 1 else 0
                above = codes[expert, row - 1, column] if row > 0 else 0
                above2 = codes[expert, row - 2, column] if row > 1 else 0
                sizes = (
                    min((left + 1) >> 1, 2)
                    + 3 * min((left2 + 1) >> 1, 2)
                    + 9 * min((above + 1) >> 1, 2)
                    + 27 * min((above2 + 1) >> 1, 2)
                )
                signs = (above & 1) + 2 * (above > 0) + 4 * (left & 1) + 8 * (left > 0)
                kind = 0
                reached = 2
                while True:
                    if kind == 0:
                        bit = 1 if magnitude > 0 else 0
                    elif kind == 1:
                        bit = code & 1
                    elif kind == 2:
                        bit = 1 if magnitude > 1 else 0
                    else:
                        bit = 1 if magnitude > reached else 0
                    level = min(15, int(slow[kind, column] * 16))
                    near = ((signs if kind == 1 else sizes) * 16 + level) & 4095
                    share[0] = slow[kind, column]
                    share[1] = fast[kind, column]
                    share[2] = by_row[kind, row]
                    share[3] = by_step[kind, step]
                    share[4] = by_place[kind, column]
                    share[5] = by_near[kind, near]
                    share[6] = by_line[kind, row]
                    share[7] = share[8] = 0.9
                    weights = mixing[kind, min(15, int(np.log2(seen_slow[kind, column] + 1)))]
                    total = 0.0
                    for index in range(_NUM_INPUTS):
                        own = min(max(share[index], 0.0005), 0.9995)
                        stretched[index] = np.log(own / (1 - own))
                        total += weights[index] * stretched[index]
                    mixed = min(max(1 / (1 + np.exp(-total)), 0.0002), 0.9998)
                    bits[kind] -= np.log2(mixed) if bit else np.log2(1 - mixed)
                    for index in range(_NUM_INPUTS):
                        weights[index] += _RATE * (bit - mixed) * stretched[index]
                    _learn(slow, seen_slow, kind, column, bit, 1000.0, 6.0)
                    _learn(fast, seen_fast, kind, column, bit, 30.0, 1.5)
                    _learn(by_row, seen_row, kind, row, bit, 1000.0, 6.0)
                    _learn(by_step, seen_step, kind, step, bit, 2000.0, 1.5)
                    _learn(by_place, seen_place, kind, column, bit, 2000.0, 1.5)
                    _learn(by_near, seen_near, kind, near, bit, 1000.0, 1.5)
                    _learn(by_line, seen_line, kind, row, bit, 2000.0, 1.5)
                    if kind == 1:
                        kind = 2
                    elif bit == 0:
                        break
                    elif kind < 3:
                        kind += 1
                    else:
                        reached += 1
    return bits


def _learn(share, seen, kind, context, bit, most, prior):
    """Move a share towards a bit, ever slower. Runs under numba."""
    seen[kind, context] += 1
    step = min(seen[kind, context], most) + prior
    share[kind, context] += (bit - share[kind, context]) / step
