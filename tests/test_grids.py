"""Grids: levels that survive bfloat16, codes in range, never NaN."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmoe_jax.quantization.grids import Ternary, TwoBit
from qmoe_jax.quantization.rtn import round_to_nearest
from qmoe_jax.quantization.settings import CompressionSettings

GRIDS = [Ternary(), TwoBit()]

# One output row each, as [in].
EDGE_ROWS = {
    "zero": [0.0, 0.0, 0.0, 0.0],
    "constant": [0.3, 0.3, 0.3, 0.3],
    "one_sided": [-0.1, -0.5, -0.25, 0.0],
    "positive": [0.1, 0.5, 0.25, 2.0],
    "denormal": [1e-40, -1e-42, 0.0, 3e-45],
    "least_normal": [1.2e-38, -1.2e-38, 0.0, 2e-38],
    "huge": [3.4e38, -3.4e38, 1.0, 0.0],
    "spread": [1e-30, 1e30, -1e-30, 0.0],
}


def as_bfloat16(x):
    return x.astype(jnp.bfloat16).astype(jnp.float32)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)
@pytest.mark.parametrize("row", EDGE_ROWS, ids=str)
def test_edge_rows(grid, row):
    for values in (EDGE_ROWS[row], EDGE_ROWS[row][:1]):
        kernel = jnp.asarray(values, jnp.float32)[:, None]
        codes, levels = round_to_nearest(kernel, grid)
        restored = grid.dequantize(codes, levels)
        assert np.isfinite(np.asarray(levels)).all()
        assert np.isfinite(np.asarray(restored)).all()
        assert int(codes.max()) < grid.num_codes
        np.testing.assert_array_equal(levels, as_bfloat16(levels))
        zero = grid.quantize(jnp.zeros((1, 1)), levels)
        assert float(grid.dequantize(zero, levels)[0, 0]) == 0.0


@given(
    values=st.lists(st.floats(-1e3, 1e3, width=32, allow_subnormal=False), min_size=6, max_size=6)
)
@settings(max_examples=50, deadline=None)
def test_any_row_is_finite_and_in_range(values):
    for grid in GRIDS:
        kernel = jnp.asarray(values, jnp.float32).reshape(3, 2)
        codes, levels = round_to_nearest(kernel, grid)
        restored = np.asarray(grid.dequantize(codes, levels))
        assert np.isfinite(restored).all()
        assert int(codes.max()) < grid.num_codes
        spread = np.maximum(np.asarray(kernel).max(0), 0) - np.minimum(np.asarray(kernel).min(0), 0)
        # Rounding moves a weight by half a step at most, and bfloat16 adds 2^-8 of the range.
        assert (np.abs(restored - kernel) <= spread * (0.5 + 2**-7) + 1e-30).all()
        # No other value is nearer, but for the rounding of a division.
        for code in range(grid.num_codes):
            other = np.asarray(grid.dequantize(jnp.full_like(codes, code), levels))
            nearer = np.abs(other - kernel) < np.abs(restored - kernel) - 1e-6 * spread
            assert not nearer.any()


def test_ternary_by_hand():
    kernel = jnp.asarray([[-1.0], [-0.51], [-0.5], [0.0], [1.0], [1.01], [2.0]])
    codes, levels = round_to_nearest(kernel, Ternary())
    np.testing.assert_array_equal(levels, [[-1.0, 2.0]])
    # A weight on a threshold is zero.
    np.testing.assert_array_equal(codes[:, 0], [1, 1, 0, 0, 0, 2, 2])
    np.testing.assert_array_equal(
        Ternary().dequantize(codes, levels)[:, 0], [-1.0, -1.0, 0.0, 0.0, 0.0, 2.0, 2.0]
    )


def test_ternary_fits_bfloat16_extremes():
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.normal(size=(50, 20)), jnp.float32)
    levels = Ternary().fit(kernel)
    np.testing.assert_array_equal(levels[:, 0], as_bfloat16(kernel.min(0)))
    np.testing.assert_array_equal(levels[:, 1], as_bfloat16(kernel.max(0)))


def test_ternary_zero_row_and_unused_level():
    levels = Ternary().fit(jnp.zeros((3, 1)))
    np.testing.assert_array_equal(levels, [[-1.0, 1.0]])
    # GPTQ may push a weight of a one-sided row below zero: it gets the zero code, not a second one.
    one_sided = Ternary().fit(jnp.asarray([[0.0], [1.0]]))
    assert int(Ternary().quantize(jnp.asarray([[-5.0]]), one_sided)[0, 0]) == 0


def test_two_bit_by_hand():
    kernel = jnp.asarray([[-1.0], [0.4], [0.6], [2.0]])
    codes, levels = round_to_nearest(kernel, TwoBit())
    np.testing.assert_array_equal(levels, [[1.0, 1.0]])
    np.testing.assert_array_equal(codes[:, 0], [0, 1, 2, 3])
    np.testing.assert_array_equal(TwoBit().dequantize(codes, levels)[:, 0], [-1.0, 0.0, 1.0, 2.0])


def test_two_bit_zero_row_is_zero():
    codes, levels = round_to_nearest(jnp.zeros((3, 1)), TwoBit())
    np.testing.assert_array_equal(TwoBit().dequantize(codes, levels), np.zeros((3, 1)))


def test_grids_are_hashable_and_named_as_in_settings():
    assert {Ternary(): 1}[Ternary()] == 1
    for name in ("ternary", "2bit"):
        assert CompressionSettings(grid=name).quantization_grid.name == name
