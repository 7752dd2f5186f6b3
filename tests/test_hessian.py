"""Hessian sums: the definition, masks, and independence of the split into chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qmoe_jax.calibration.hessian import finalize_hessian, init_hessian, update_hessian

EXPERTS, TOKENS, NUM_IN = 3, 24, 5


def make_tokens(seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.normal(size=(EXPERTS, TOKENS, NUM_IN)).astype(np.float32)
    mask = rng.random((EXPERTS, TOKENS)) < 0.7
    mask[1] = False
    return tokens, mask


def accumulate(tokens, mask, size):
    state = init_hessian(EXPERTS, NUM_IN)
    for start in range(0, tokens.shape[1], size):
        chunk = slice(start, start + size)
        state = update_hessian(state, jnp.asarray(tokens[:, chunk]), jnp.asarray(mask[:, chunk]))
    return finalize_hessian(state)


def test_definition():
    """H = 2/n X^T X over the tokens of the mask, in float64."""
    tokens, mask = make_tokens()
    hessians, counts = accumulate(tokens, mask, TOKENS)
    for expert in (0, 2):
        x = tokens[expert][mask[expert]].astype(np.float64)
        np.testing.assert_allclose(hessians[expert], 2 / len(x) * x.T @ x, rtol=1e-5, atol=1e-6)
        assert counts[expert] == len(x)


def test_no_tokens_is_zero():
    hessians, counts = accumulate(*make_tokens(), TOKENS)
    assert counts[1] == 0
    np.testing.assert_array_equal(hessians[1], np.zeros((NUM_IN, NUM_IN)))


@pytest.mark.parametrize("size", [1, 5, 8, 24])
def test_independent_of_the_chunks(size):
    tokens, mask = make_tokens()
    hessians, counts = accumulate(tokens, mask, size)
    expected, expected_counts = accumulate(tokens, mask, TOKENS)
    np.testing.assert_allclose(hessians, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(counts, expected_counts)


def test_masked_tokens_may_hold_nan():
    tokens, mask = make_tokens()
    expected, _ = accumulate(tokens, mask, TOKENS)
    tokens[~mask] = np.nan
    hessians, _ = accumulate(tokens, mask, TOKENS)
    np.testing.assert_array_equal(hessians, expected)


def test_weights_count_like_repeated_tokens():
    tokens, _ = make_tokens()
    hessians, counts = accumulate(tokens, np.full((EXPERTS, TOKENS), 2.0, np.float32), TOKENS)
    expected, _ = accumulate(tokens, np.ones((EXPERTS, TOKENS), bool), TOKENS)
    np.testing.assert_allclose(hessians, expected, rtol=1e-6)
    np.testing.assert_array_equal(counts, np.full(EXPERTS, 2.0 * TOKENS))


def test_bfloat16_tokens_are_summed_in_float32():
    tokens, mask = make_tokens()
    state = init_hessian(EXPERTS, NUM_IN)
    rounded = jnp.asarray(tokens, jnp.bfloat16)
    hessians, _ = finalize_hessian(update_hessian(state, rounded, jnp.asarray(mask)))
    expected, _ = accumulate(np.asarray(rounded, np.float32), mask, TOKENS)
    assert hessians.dtype == jnp.float32
    np.testing.assert_array_equal(hessians, expected)


def test_one_shape_compiles_once():
    tokens, mask = make_tokens()
    accumulate(tokens, mask, 6)
    before = update_hessian._cache_size()
    accumulate(tokens, mask, 6)
    assert update_hessian._cache_size() == before
    assert isinstance(init_hessian(EXPERTS, NUM_IN).sums, jax.Array)
