"""What a "lattice" encoder is free to choose for an expert: order of columns, dictionaries, leans.

FORMAT.md, "Coding `lattice`": readers accept any choice; these are made for size. All of it follows
from the expert's own codes and steps, so that bytes do not depend on how experts are batched.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int32, Int64, UInt8, UInt16

from qmoe_jax.codec.lattice_blocks import (
    BLOCK_ROWS,
    GROUP_ROWS,
    GROUPS,
    Counts,
    count_codewords,
)
from qmoe_jax.codec.lattice_dictionaries import NUM_DICTIONARIES, RAW_DICTIONARY, ZERO_SHARES

NUM_CLASSES = 8
CLASS_STEPS = 32
"""A class of columns takes so many steps that follow one another."""
ZERO_COLUMN = 255
"""Byte of a column that is zero throughout."""
NUM_STEPS = 256
"""Steps of the table. An expert may use all but one of the ends."""
# The last class's last byte is the zero column's.
_CLASS_SIZES = CLASS_STEPS - (np.arange(NUM_CLASSES) == NUM_CLASSES - 1)
# Groups take fewer bits than plane 1 up to about this share of non-zero weights.
_MAX_GROUPED_SHARE = 0.15
_SAMPLED_BLOCKS = 4
MAX_SCHEDULED = 2**16 - 1
"""A schedule has at most so many codewords of a dictionary."""


class Columns(NamedTuple):
    """How an expert's columns are ordered and what steps they have."""

    columns: UInt8[np.ndarray, "width"]
    """Class and step of each column, or ZERO_COLUMN."""
    bases: UInt8[np.ndarray, "8"]
    """First step of each class."""


class Dictionaries(NamedTuple):
    """Which strings an expert's columns are in, and by which dictionaries."""

    num_grouped: int
    """The first so many visited columns are grouped."""
    schedules: UInt16[np.ndarray, "3 15"]
    """Of the flags, of plane 1 and of plane 2: codewords of all dictionaries but the last."""
    plain: UInt8[np.ndarray, "4"]
    """Dictionary of the rests, of plane 3, of plane 4 and of the signs."""


def choose_columns(
    counts: Int64[np.ndarray, "width"], steps: UInt8[np.ndarray, "width"], rows: int
) -> Columns:
    """Sort columns into classes of like counts, sparse ones first.

    Args:
      counts: non-zero weights of each column.
      steps: of each column.
      rows: weights of a column.
    """
    columns = np.full(counts.size, ZERO_COLUMN, np.uint8)
    live = np.flatnonzero(counts)
    ranked = live[np.lexsort((steps[live], counts[live]))]
    own_steps = steps[ranked].astype(np.int64)
    wanted = _classes(counts[ranked] / max(rows, 1))
    bases = _cover(_choose_bases(own_steps, wanted), own_steps, wanted)
    # A column whose step its class does not have goes to the nearest class that has it.
    distance = np.abs(np.arange(NUM_CLASSES) - wanted[:, None])
    chosen = np.where(_has(bases, own_steps), distance, NUM_CLASSES).argmin(axis=1)
    columns[ranked] = CLASS_STEPS * chosen + own_steps - bases[chosen]
    return Columns(columns, bases.astype(np.uint8))


def _choose_bases(
    steps: Int64[np.ndarray, "ranked"], classes: Int64[np.ndarray, "ranked"]
) -> Int64[np.ndarray, "8"]:
    """Let every class have the steps of as many of its columns as it can."""
    bases = np.zeros(NUM_CLASSES, np.int64)
    for number in range(NUM_CLASSES):
        own = np.bincount(steps[classes == number], minlength=256)
        below = np.concatenate([[0], np.cumsum(own)])
        windows = below[_CLASS_SIZES[number] :] - below[: -_CLASS_SIZES[number]]
        best = np.flatnonzero(windows == windows.max())
        bases[number] = best[best.size // 2]
    return bases


def _cover(
    bases: Int64[np.ndarray, "8"],
    steps: Int64[np.ndarray, "ranked"],
    classes: Int64[np.ndarray, "ranked"],
) -> Int64[np.ndarray, "8"]:
    """Move bases until some class has each step: those that lose the fewest columns by it."""
    fixed: set[int] = set()
    while (missing := steps[~_has(bases, steps).any(axis=1)]).size:
        if len(fixed) == NUM_CLASSES:
            # Classes as ranges of steps have all of them, but for one at an end.
            return int(steps.max() == 255) + CLASS_STEPS * np.arange(NUM_CLASSES)
        step = int(missing[0])
        losses: list[tuple[int, int, int]] = []
        for number in set(range(NUM_CLASSES)) - fixed:
            last = step - _CLASS_SIZES[number] + 1
            base = step if step < bases[number] else last
            own = steps[classes == number]
            kept = (own >= base) & (own < base + _CLASS_SIZES[number])
            losses.append((own.size - int(kept.sum()), number, base))
        _, number, base = min(losses)
        bases[number] = base
        fixed.add(number)
    return bases


def _has(
    bases: Int64[np.ndarray, "8"], steps: Int64[np.ndarray, "ranked"]
) -> Bool[np.ndarray, "ranked 8"]:
    """Tell which classes have each step."""
    offsets = steps[:, None] - bases
    return (offsets >= 0) & (offsets < _CLASS_SIZES)


def _classes(shares: Float64[np.ndarray, "ranked"]) -> Int64[np.ndarray, "ranked"]:
    """Cut rising shares of non-zero weights into classes within which they are alike.

    What a class costs for its shares not being one is their variance on the scale of angles, 2
    asin sqrt p. Of many columns, classes as wide as density^(-1/3) make it least (Panter and Dite).
    """
    angles = 2 * np.arcsin(np.sqrt(shares))
    density, edges = np.histogram(angles, 64)
    places = np.concatenate([[0.0], np.cumsum(np.cbrt(density))])
    at = np.interp(angles, edges, places / max(places[-1], 1))
    return np.minimum(at * NUM_CLASSES, NUM_CLASSES - 1).astype(np.int64)


def order_of(columns: UInt8[np.ndarray, "width"]) -> Int32[np.ndarray, "visited"]:
    """Columns that are not zero, by rising byte."""
    order = np.argsort(columns, kind="stable").astype(np.int32)
    return order[: int((columns != ZERO_COLUMN).sum())]


def choose_leans(counts: Counts) -> UInt8[np.ndarray, "shorter"]:
    """Tell which rows, or columns if they are no more, are negative more often than positive."""
    nonzero, negative = _of_shorter_side(counts)
    return (2 * negative > nonzero).astype(np.uint8)


def nearest_dictionary(shares: Float64[np.ndarray, "*shape"]) -> Int64[np.ndarray, "*shape"]:
    """Return the number of the dictionary that is nearest to each share of ones."""
    zeros = 1024 * (1 - shares)
    middles = (np.array(ZERO_SHARES[1:]) + np.array(ZERO_SHARES[:-1])) / 2
    return (zeros[..., None] < middles).sum(axis=-1)


def choose_dictionaries(
    codes: UInt8[np.ndarray, "rows width"],
    counts: Counts,
    order: Int32[np.ndarray, "visited"],
) -> Dictionaries:
    """Choose which columns are grouped, and the dictionaries of all strings.

    A schedule is the mean over some blocks of how many codewords fall to each dictionary if every
    entry comes from the dictionary that is best for the columns around it.
    """
    rows = codes.shape[0]
    blocks = -(-rows // BLOCK_ROWS)
    sampled = np.unique(np.linspace(0, blocks - 1, min(blocks, _SAMPLED_BLOCKS)).astype(int))
    reach = max(1, order.size // 32)
    nonzero = _around(counts.columns[0, order], reach)
    weights = _around(np.full(order.size, rows), reach)
    shares = nonzero / np.maximum(weights, 1)
    dense = np.flatnonzero(shares > _MAX_GROUPED_SHARE)
    num_grouped = int(dense[0]) if dense.size else order.size
    # The dictionary that each string wants, by column.
    of_flags = _rising(nearest_dictionary(1 - (1 - shares[:num_grouped]) ** GROUP_ROWS))
    of_first = _rising(nearest_dictionary(shares[num_grouped:]))
    of_second = _around(counts.columns[1, order], reach) / np.maximum(nonzero, 1)
    of_second = _rising(nearest_dictionary(of_second))
    schedules = np.zeros((3, NUM_DICTIONARIES), np.float64)
    num_rests = ones_in_rests = 0
    for block in sampled:
        own = codes[BLOCK_ROWS * block : BLOCK_ROWS * (block + 1)][:, order]
        full = np.zeros((order.size, BLOCK_ROWS), np.uint8)
        full[:, : own.shape[0]] = own.T
        bits = full > 0
        groups = bits[:num_grouped].reshape(-1, GROUP_ROWS)
        flags = np.asarray(groups.any(axis=1))
        num_rests += int((GROUP_ROWS - 1 - groups.argmax(axis=1))[flags].sum())
        ones_in_rests += int(groups.sum()) - int(flags.sum())
        schedules[0] += count_codewords(flags.view(np.uint8), np.repeat(of_flags, GROUPS))
        first = bits[num_grouped:].reshape(-1).view(np.uint8)
        schedules[1] += count_codewords(first, np.repeat(of_first, BLOCK_ROWS))
        bits = bits.reshape(-1)
        second = (full.reshape(-1)[bits] > 2).view(np.uint8)
        schedules[2] += count_codewords(second, np.repeat(of_second, BLOCK_ROWS)[bits])
    schedules = np.minimum(np.rint(schedules / max(1, sampled.size)), MAX_SCHEDULED)
    schedules = _without_end(schedules)

    all_nonzero, all_two, all_three, all_four, _ = counts.columns.sum(axis=1).tolist()
    of_side, negative = _of_shorter_side(counts)
    against_lean = int(np.minimum(negative, of_side - negative).sum())
    ones = np.array([ones_in_rests, all_three, all_four, against_lean])
    plain = nearest_dictionary(ones / np.maximum([num_rests, all_two, all_three, all_nonzero], 1))
    return Dictionaries(num_grouped, schedules[:, :-1].astype(np.uint16), plain.astype(np.uint8))


def _without_end(
    schedules: Float64[np.ndarray, "3 dictionaries"],
) -> Float64[np.ndarray, "3 dictionaries"]:
    """Let the last dictionary that a schedule uses go on: blocks may have more codewords."""
    schedules = schedules.copy()
    for schedule in schedules:
        used = np.flatnonzero(schedule)
        schedule[used[-1] if used.size else RAW_DICTIONARY] = MAX_SCHEDULED
    return schedules


def raw_dictionaries() -> Dictionaries:
    """Return choices by which eight bits take a byte: no column grouped, nothing coded."""
    schedules = np.zeros((3, NUM_DICTIONARIES - 1), np.uint16)
    schedules[:, RAW_DICTIONARY] = MAX_SCHEDULED
    return Dictionaries(0, schedules, np.full(4, RAW_DICTIONARY, np.uint8))


def _of_shorter_side(counts: Counts) -> tuple[np.ndarray, np.ndarray]:
    """Non-zero and negative weights of each row, or of each column if they are no more."""
    if counts.rows.shape[1] < counts.columns.shape[1]:
        return counts.rows[0], counts.rows[1]
    return counts.columns[0], counts.columns[4]


def _around(counts: np.ndarray, reach: int) -> np.ndarray:
    """Sum of each count and of `reach` before and behind it."""
    sums = np.concatenate([[0], np.cumsum(counts)])
    place = np.arange(counts.size)
    return sums[np.minimum(place + reach + 1, counts.size)] - sums[np.maximum(place - reach, 0)]


def _rising(dictionaries: np.ndarray) -> np.ndarray:
    return np.maximum.accumulate(dictionaries).astype(np.uint8)
