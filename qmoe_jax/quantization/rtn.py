"""Round-to-nearest: every weight on its own, no calibration (the baseline of QMoE, section 5)."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from qmoe_jax.quantization.grids import Grid, Levels, quantize_kernel


class RtnResult(NamedTuple):
    """A kernel rounded to nearest.

    Attributes:
      codes: uint8 `[in, out]`, in the orientation of the kernel.
      levels: as the grid fits them (`grids.Levels`).
    """

    codes: UInt8[Array, "in out"]
    levels: Levels


def round_to_nearest(
    kernel: Float[Array, "in out"],
    grid: Grid,
    group_size: int | None = None,
    step: float | Float[Array, ""] = 1.0,
) -> RtnResult:
    """Quantize the kernel of one expert, each weight to the code that the grid gives it.

    Args:
      kernel: finite.
      grid: which values a row may take.
      group_size: input features that share a pair of levels; None is all.
      step: of a grid that has steps; here it is the same for all input features.
    """
    levels = grid.fit_kernel(kernel, jnp.ones(kernel.shape[0]), step, group_size)
    return RtnResult(quantize_kernel(grid, kernel, levels), levels)
