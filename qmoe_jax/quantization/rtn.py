"""Round-to-nearest: every weight on its own, no calibration (the baseline of QMoE, section 5)."""

from typing import NamedTuple

from jaxtyping import Array, Float, UInt8

from qmoe_jax.quantization.grids import Grid
from qmoe_jax.quantization.groups import fit_groups, quantize_groups, rows_of_levels


class RtnResult(NamedTuple):
    """A kernel rounded to nearest.

    Attributes:
      codes: uint8 `[in, out]`, in the orientation of the kernel.
      levels: float32 `[rows, 2]`, values that bfloat16 represents exactly; rows are output
        features, or their groups (`quantization.groups`).
    """

    codes: UInt8[Array, "in out"]
    levels: Float[Array, "rows 2"]


def round_to_nearest(
    kernel: Float[Array, "in out"], grid: Grid, group_size: int | None = None
) -> RtnResult:
    """Quantize the kernel of one expert, each weight to the code that the grid gives it."""
    levels = fit_groups(grid, kernel, group_size)
    return RtnResult(quantize_groups(grid, kernel, levels), rows_of_levels(levels))
