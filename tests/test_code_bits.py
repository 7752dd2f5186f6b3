"""Estimated bits of lattice codes."""

import numpy as np
import pytest

from qmoe_jax.quantization.code_bits import estimated_bits


def binary_entropy(share):
    return -(share * np.log2(share) + (1 - share) * np.log2(1 - share))


def test_columns_of_two_kinds_and_zeros():
    """Columns of zeros cost their side information only, others their own kind's entropy."""
    rng = np.random.default_rng(0)
    rows = 4000
    shares = np.array([0.1] * 20 + [0.4] * 20 + [0.0] * 24)
    codes = (rng.random((2, rows, 64)) < shares).astype(np.uint8)
    expected = rows * (20 * binary_entropy(0.1) + 20 * binary_entropy(0.4)) + 64 * 11 + 32
    np.testing.assert_allclose(estimated_bits(codes), [expected] * 2, rtol=0.01)
    one_kind = rows * 40 * binary_entropy(0.25)
    assert expected < 0.95 * one_kind


def test_signs_and_larger_multiples_count():
    codes = np.random.default_rng(1).integers(0, 4, (1, 1000, 8)).astype(np.uint8)
    assert estimated_bits(codes)[0] == pytest.approx(2 * 8000 + 8 * 11 + 32, rel=0.01)


def test_nothing():
    np.testing.assert_array_equal(estimated_bits(np.zeros((1, 5, 4), np.uint8)), [4 * 11 + 32])
    assert estimated_bits(np.zeros((0, 5, 4), np.uint8)).shape == (0,)
