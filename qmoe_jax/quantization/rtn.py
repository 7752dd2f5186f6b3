"""Round-to-nearest: every weight on its own, no calibration (the baseline of QMoE, section 5)."""

from typing import NamedTuple

from jaxtyping import Array, Float, UInt8

from qmoe_jax.quantization.grids import Grid


class RtnResult(NamedTuple):
    """A kernel rounded to nearest.

    Attributes:
      codes: uint8 `[in, out]`, in the orientation of the kernel.
      levels: float32 `[out, 2]`, values that bfloat16 represents exactly.
    """

    codes: UInt8[Array, "in out"]
    levels: Float[Array, "out 2"]


def round_to_nearest(kernel: Float[Array, "in out"], grid: Grid) -> RtnResult:
    """Quantize the kernel of one expert, each weight to the code that the grid gives it."""
    levels = grid.fit(kernel)
    return RtnResult(grid.quantize(kernel, levels), levels)
