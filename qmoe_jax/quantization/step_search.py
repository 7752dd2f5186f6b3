"""From bits to the step of the lattice: the shape of the curve is known, its place is measured.

Bits fall as log2(1 / step) where steps are small and as a power of the step where they are large.
The curve between is that of the demo model's kernels at steps 3 to 5, within 1.5 %; kernels differ
in its place more than in its shape. So a measurement places it, and a second one, where the first
says to look, is right to a fraction of a percent.
"""

import math
from collections.abc import Callable

MAX_STEP = 64.0
"""Hardly a code is left; larger steps are not searched."""

_MIN_STEP = 0.05
_SCALE, _POWER = 3.56, 1.4


def typical_bits(step: float) -> float:
    """Return the bits a weight that codes typically take at a step."""
    return math.log2(1 + (_SCALE / step) ** _POWER) / _POWER


def typical_step(bits: float) -> float:
    """Return the step at which codes typically take so many bits a weight."""
    return _SCALE / (2 ** (_POWER * bits) - 1) ** (1 / _POWER)


def moved_step(step: float, bits: float, wanted: float) -> float:
    """Return the step at which `wanted` bits are to be expected where `step` takes `bits`."""
    moved = step * typical_step(wanted) / typical_step(bits)
    return min(max(moved, _MIN_STEP), MAX_STEP)


def step_for_bits(
    measure: Callable[[float], float],
    wanted: float,
    *,
    start: float | None = None,
    tolerance: float = 0.003,
) -> float:
    """Search the step at which codes take so many bits a weight.

    Args:
      measure: bits a weight at a step.
      wanted: bits a weight.
      start: the step to begin with; the typical one where None.
      tolerance: share of `wanted` that they may differ by.
    """
    step = typical_step(wanted) if start is None else start
    step = min(max(step, _MIN_STEP), MAX_STEP)
    for _ in range(5):
        bits = measure(step)
        if abs(bits - wanted) <= tolerance * wanted:
            break
        step = moved_step(step, bits, wanted)
    return step
