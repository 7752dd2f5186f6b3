"""Random codes for the kernels' tests, here and on a GPU."""

from typing import Any

import ml_dtypes
import numpy as np

from qmoe_jax.codec import reference
from qmoe_jax.codec.codings import get_coding
from qmoe_jax.codec.tensor import CodedTensor

BF16 = ml_dtypes.bfloat16


def lattice_codes(
    rng: np.random.Generator, shape: tuple[int, int, int], zero_share: float
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Codes of the lattice with so many zeros, and their levels.

    Some columns are sparse, some are zero throughout; a few weights are of every magnitude.
    """
    magnitudes = np.minimum(rng.geometric(0.7, shape), 127)
    magnitudes = np.where(rng.random(shape) < 0.002, rng.integers(1, 128, shape), magnitudes)
    of_column = rng.choice([0.0, 0.1, 1.0, 1.0, 1.0], (shape[0], 1, shape[2]))
    present = rng.random(shape) < (1 - zero_share) * of_column
    is_negative = rng.random(shape) < rng.choice([0.3, 0.7], (shape[0], 1, shape[2]))
    codes = np.where(present, 2 * magnitudes - is_negative, 0).astype(np.uint8)
    steps = rng.integers(0, 255, (shape[0], shape[2]))
    origins = rng.uniform(0.5, 2, shape[0])
    return codes, {"step_index": steps.astype(np.uint8), "origin": origins.astype(np.float32)}


def levels_like(coding: str, shape: tuple[int, int, int], low: float, high: float) -> Any:
    """The same two levels in every row; of the lattice a step of 2^(-1/16)."""
    if get_coding(coding).grid != "lattice":
        return np.tile(np.array([low, high], BF16), (*shape[:2], 1))
    steps = np.ones((shape[0], shape[2]), np.uint8)
    return {"step_index": steps, "origin": np.ones(shape[0], np.float32)}


def product_weights(coded: CodedTensor) -> np.ndarray:
    """[experts, out, in] by the reference decoder, as products have them.

    They are bfloat16, but of "lattice": its products have steps and sums in float32.
    """
    codes = get_coding(coded.spec.coding).decode_numpy_reference(coded)
    weights = reference.dequantize(coded, codes)
    return weights if coded.spec.coding == "lattice" else weights.astype(BF16)


def assert_products(
    y: np.ndarray, coded: CodedTensor, weights: np.ndarray, x: np.ndarray, experts: np.ndarray
) -> None:
    """y against float64 products, within the rounding of float32 sums.

    Args:
      y: products.
      coded: the codes.
      weights: of `product_weights`.
      x: tokens.
      experts: of each token; below 0 there is none, and y is 0.
    """
    # One lane's additions, and those over lanes or warps.
    terms = coded.spec.width / (1 if coded.spec.coding == "lattice" else 8) + 16
    assert np.isfinite(y).all()
    for token, expert in enumerate(experts):
        if expert < 0:
            np.testing.assert_array_equal(y[token], 0)
            continue
        w, column = weights[expert].astype(np.float64), x[token].astype(np.float64)
        sizes = np.abs(w)
        if coded.spec.coding == "tunstall_2bit":  # sums of all x times what symbol 0 weighs
            sizes = sizes + 2 * np.abs(w).max(axis=1, keepdims=True)
        error = np.abs(y[token] - w @ column)
        assert (error <= terms * 2.0**-24 * (sizes @ np.abs(column)) + 1e-37).all(), error.max()
