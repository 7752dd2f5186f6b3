"""Grids: which values the weights of a kernel may take, and which of them a weight is rounded to.

A grid owns three decisions and nothing else: the numbers that are stored beside the codes of a
kernel (`levels`), the code of a weight, and the value of a code. GPTQ, round-to-nearest and the
codec see only the protocol `Grid`. Here are the grids of the paper, whose levels are two numbers of
an output row; `lattice.py` has the one whose steps differ by input feature.

What is stored is rounded to its stored form in `fit_kernel`, before any weight is quantized: what
GPTQ optimises is what a decoder reconstructs, bit for bit.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from qmoe_jax.quantization.groups import levels_of_groups, num_groups, rows_of_levels

_MAX_FLOAT32 = 3.4028234663852886e38
# The largest finite bfloat16, so that rounding up never stores an infinity.
_MAX_BFLOAT16 = 3.3895313892515355e38
# The smallest normal float32: below it a device may flush to zero, and a division by it overflows.
_MIN_NORMAL = 1.1754943508222875e-38


# What a grid stores beside the codes of a kernel, a pytree: float32 [rows, 2] for levels of rows,
# rows being output features or their groups (`groups`); `lattice.Steps` for the lattice.
Levels = Any


@runtime_checkable
class Grid(Protocol):
    """What GPTQ, round-to-nearest and the codec need of a grid.

    Every grid represents zero exactly: `dequantize(quantize(0)) == 0` for any levels that are
    fitted. Implementations are frozen dataclasses: hashable, so that jit takes them as static
    arguments.
    """

    @property
    def name(self) -> str:
        """The name in configs and file headers."""
        ...

    @property
    def num_codes(self) -> int:
        """Codes are 0 to num_codes - 1."""
        ...

    @property
    def has_steps(self) -> bool:
        """Whether levels are steps of the input features, known when the Hessian is factorised.

        Such a grid is also made unbiased after a sweep, by `scaled`.
        """
        ...

    def fit_kernel(
        self,
        kernel: Float[Array, "in out"],
        factor_diagonal: Float[Array, " in"],
        step: float | Float[Array, ""],
        group_size: int | None,
    ) -> Levels:
        """Return what is stored beside the codes of a kernel.

        Args:
          kernel: finite, float32.
          factor_diagonal: V_jj of each input feature (`gptq`); ones without a Hessian. Only for
            grids that have steps, as the next.
          step: how coarse, in units of the kernel's weights.
          group_size: input features that share a pair of levels; None is all.

        Raises:
          ValueError: the grid has no groups, or the size does not divide the row.
        """
        ...

    def of_groups(self, levels: Levels, num_out: int) -> Float[Array, "groups rows numbers"]:
        """Return the numbers of each group of neighbouring input features, as the next two take it.

        `rows` is 1 where all output features share them; groups are of one size.
        """
        ...

    def quantize(
        self, weights: Float[Array, "*columns out"], numbers: Float[Array, "rows numbers"], /
    ) -> UInt8[Array, "*columns out"]:
        """Return the code of each weight: of the nearest value, any of those that are equally near.

        `host_gptq` finds it from `dequantize` alone for grids without steps.
        """
        ...

    def dequantize(
        self, codes: UInt8[Array, "*columns out"], numbers: Float[Array, "rows numbers"], /
    ) -> Float[Array, "*columns out"]:
        """Return the float32 value of each code."""
        ...

    def scaled(self, levels: Levels, gain: Float[Array, ""]) -> Levels:
        """Return levels whose values are `gain` times as large, for grids that have steps."""
        ...


def quantize_kernel(
    grid: Grid, kernel: Float[Array, "in out"], levels: Levels
) -> UInt8[Array, "in out"]:
    """Return the nearest code of each weight."""
    numbers = grid.of_groups(levels, kernel.shape[1])
    grouped = kernel.reshape(numbers.shape[0], -1, kernel.shape[1])
    return jax.vmap(grid.quantize)(grouped, numbers).reshape(kernel.shape)


def dequantize_kernel(
    grid: Grid, codes: UInt8[Array, "in out"], levels: Levels
) -> Float[Array, "in out"]:
    """Return the float32 value of each code of a kernel."""
    numbers = grid.of_groups(levels, codes.shape[1])
    grouped = codes.reshape(numbers.shape[0], -1, codes.shape[1])
    return jax.vmap(grid.dequantize)(grouped, numbers).reshape(codes.shape)


class _RowGrid:
    """What the grids with two levels a row have in common; `fit` is their own."""

    has_steps = False

    def fit(self, kernel: Float[Array, "in out"]) -> Float[Array, "out 2"]:
        """Fit the levels of each output row, float32 values that bfloat16 represents exactly."""
        raise NotImplementedError

    def fit_kernel(
        self,
        kernel: Float[Array, "in out"],
        factor_diagonal: Float[Array, " in"],
        step: float | Float[Array, ""],
        group_size: int | None,
    ) -> Float[Array, "rows 2"]:
        """Fit every group of every row; neither the Hessian nor a step matters."""
        del factor_diagonal, step
        groups = num_groups(kernel.shape[0], group_size)
        return rows_of_levels(jax.vmap(self.fit)(kernel.reshape(groups, -1, kernel.shape[1])))

    def of_groups(
        self, levels: Float[Array, "rows 2"], num_out: int
    ) -> Float[Array, "groups out 2"]:
        """Return the two levels of each output feature."""
        return levels_of_groups(levels, num_out)

    def scaled(self, levels: Float[Array, "rows 2"], gain: Float[Array, ""]) -> Levels:
        """Refuse: these levels are fitted to extremes."""
        raise TypeError("levels of rows are not scaled")


@dataclasses.dataclass(frozen=True)
class Ternary(_RowGrid):
    """Ternary `{low, 0, high}` with low and high at the row's extremes (QMoE, section 3).

    levels: `(low, high)`, low <= 0 <= high; a row of zeros has (-1, 1).
    codes: 0 is zero, 1 is low, 2 is high. The thresholds lie half way. A level that is zero is
    never chosen: code 0 has the same value, and zeros are what the dictionary code is short for.
    """

    name: str = dataclasses.field(default="ternary", init=False)
    num_codes: int = dataclasses.field(default=3, init=False)

    def fit(self, kernel: Float[Array, "in out"]) -> Float[Array, "out 2"]:
        """(low, high) of each output row: its minimum and maximum, both clipped at zero."""
        kernel = kernel.astype(jnp.float32)
        low, high = _round_to_bfloat16(*_extremes(kernel))
        # After rounding, because a device may flush a row of denormals to zero.
        is_zero = (low == 0) & (high == 0)
        low = jnp.where(is_zero, -1.0, low)
        high = jnp.where(is_zero, 1.0, high)
        return jnp.stack([low, high], axis=-1)

    def quantize(
        self, weights: Float[Array, "*rows out"], levels: Float[Array, "out 2"]
    ) -> UInt8[Array, "*rows out"]:
        """2 above high / 2, 1 below low / 2, else 0 (a weight on a threshold is 0)."""
        low, high = levels[:, 0], levels[:, 1]
        is_low = weights < jnp.where(low < 0, low / 2, -jnp.inf)
        is_high = weights > jnp.where(high > 0, high / 2, jnp.inf)
        return jnp.where(is_high, 2, jnp.where(is_low, 1, 0)).astype(jnp.uint8)

    def dequantize(
        self, codes: UInt8[Array, "*rows out"], levels: Float[Array, "out 2"]
    ) -> Float[Array, "*rows out"]:
        """0, low and high for the codes 0, 1 and 2."""
        low, high = levels[:, 0], levels[:, 1]
        return jnp.where(codes == 2, high, jnp.where(codes == 1, low, 0.0))


@dataclasses.dataclass(frozen=True)
class TwoBit(_RowGrid):
    """Four evenly spaced values that contain zero (the asymmetric 2-bit grid of GPTQ).

    levels: `(scale, zero)`, scale > 0, zero in {0, 1, 2, 3} (a code, stored as a float).
    codes: `clip(round(w / scale) + zero, 0, 3)`, value `scale * (code - zero)`; ties of `round` go
    to the even number. A row of zeros has the grid of the range -1 to 1.
    """

    name: str = dataclasses.field(default="2bit", init=False)
    num_codes: int = dataclasses.field(default=4, init=False)

    def fit(self, kernel: Float[Array, "in out"]) -> Float[Array, "out 2"]:
        """(scale, zero) of each output row: its range, which includes zero, in three steps."""
        kernel = kernel.astype(jnp.float32)
        low, high = _extremes(kernel)
        scale = high / 3 - low / 3  # not (high - low) / 3, which may overflow
        is_zero = ~(scale >= _MIN_NORMAL)
        scale = jnp.where(is_zero, 2.0 / 3.0, scale)
        low = jnp.where(is_zero, -1.0, low)
        (scale,) = _round_to_bfloat16(jnp.minimum(scale, _MAX_FLOAT32 / 3.1))  # 3 scale is finite
        zero = jnp.clip(jnp.round(-low / scale), 0.0, 3.0)
        return jnp.stack([scale, zero], axis=-1)

    def quantize(
        self, weights: Float[Array, "*rows out"], levels: Float[Array, "out 2"]
    ) -> UInt8[Array, "*rows out"]:
        """Return the nearest of the four values, as a code from 0 to 3."""
        scale, zero = levels[:, 0], levels[:, 1]
        return jnp.clip(jnp.round(weights / scale) + zero, 0.0, 3.0).astype(jnp.uint8)

    def dequantize(
        self, codes: UInt8[Array, "*rows out"], levels: Float[Array, "out 2"]
    ) -> Float[Array, "*rows out"]:
        """scale * (code - zero)."""
        scale, zero = levels[:, 0], levels[:, 1]
        return scale * (codes.astype(jnp.float32) - zero)


def _extremes(
    kernel: Float[Array, "in out"],
) -> tuple[Float[Array, " out"], Float[Array, " out"]]:
    """Minimum and maximum of each output row, both widened to include zero."""
    low = jnp.minimum(jnp.min(kernel, axis=0), 0.0)
    high = jnp.maximum(jnp.max(kernel, axis=0), 0.0)
    return low, high


def _round_to_bfloat16(*values: Float[Array, " out"]) -> tuple[Float[Array, " out"], ...]:
    """Round to the nearest finite bfloat16, still as float32."""
    return tuple(
        jnp.clip(value, -_MAX_BFLOAT16, _MAX_BFLOAT16).astype(jnp.bfloat16).astype(jnp.float32)
        for value in values
    )
