"""A kernel moved to make up for errors in its inputs, beside least squares in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import CALIBRATION, QUICK, codes_of

import qmoe_jax
from qmoe_jax.calibration.hessian import init_hessian, update_hessian
from qmoe_jax.quantization.moved_kernel import Missing, moved_kernels, update_missing
from qmoe_jax.quantization.settings import CompressionSettings

EXPERTS, TOKENS, NUM_IN, NUM_OUT = 3, 40, 6, 4
DAMPING = 0.1


def make(seed=0):
    """Exact inputs, those with errors, kernels, and which tokens are any; expert 1 has none."""
    rng = np.random.default_rng(seed)
    exact = rng.normal(size=(EXPERTS, TOKENS, NUM_IN)).astype(np.float32)
    hidden = exact + 0.3 * rng.normal(size=exact.shape).astype(np.float32)
    kernels = rng.normal(size=(EXPERTS, NUM_IN, NUM_OUT)).astype(np.float32)
    real = rng.random((EXPERTS, TOKENS)) < 0.8
    real[1] = False
    return exact, hidden, kernels, real


def moved(exact, hidden, kernels, real, chunk=TOKENS, mesh=None):
    exact, hidden, kernels, real = map(jnp.asarray, (exact, hidden, kernels, real))
    hessians = init_hessian(EXPERTS, NUM_IN)
    missing = Missing(jnp.zeros((EXPERTS, NUM_IN, NUM_OUT), jnp.float32))
    for start in range(0, TOKENS, chunk):
        part = np.s_[:, start : start + chunk]
        hessians = update_hessian(hessians, hidden[part], real[part])
        missing = update_missing(missing, hidden[part], exact[part], kernels, real[part])
    return np.asarray(moved_kernels(kernels, hessians.sums, missing, DAMPING, mesh=mesh))


@pytest.mark.parametrize("chunk", [TOKENS, 16])
def test_least_squares(chunk):
    """Ridge regression of h W on h', towards W."""
    exact, hidden, kernels, real = make()
    found = moved(exact, hidden, kernels, real, chunk)
    for expert in (0, 2):
        h, near = (a[expert][real[expert]].astype(np.float64) for a in (exact, hidden))
        kernel = kernels[expert].astype(np.float64)
        ridge = np.sqrt(DAMPING * np.mean(np.diag(near.T @ near)))
        stacked = np.concatenate([near, ridge * np.eye(NUM_IN)])
        targets = np.concatenate([h @ kernel, ridge * kernel])
        expected = np.linalg.lstsq(stacked, targets, rcond=None)[0]
        np.testing.assert_allclose(found[expert], expected, rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(found[1], kernels[1])


def test_exact_inputs_move_nothing():
    exact, _, kernels, real = make()
    np.testing.assert_array_equal(moved(exact, exact, kernels, real), kernels)


def test_padding_does_not_matter():
    exact, hidden, kernels, real = make()
    expected = moved(exact, hidden, kernels, real)
    exact[~real], hidden[~real] = np.nan, np.inf
    np.testing.assert_array_equal(moved(exact, hidden, kernels, real), expected)


def test_an_expert_with_infinite_inputs_stays():
    exact, hidden, kernels, real = make()
    expected = moved(exact, hidden, kernels, real)
    real[2, 0] = True
    hidden[2, 0, 0] = np.inf
    found = moved(exact, hidden, kernels, real)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[2], kernels[2])


def test_over_a_mesh():
    """One device here; several are in tests/test_devices.py."""
    arrays = make()
    mesh = jax.make_mesh((1,), ("experts",))
    np.testing.assert_array_equal(moved(*arrays, mesh=mesh), moved(*arrays))


class TestSettings:
    def test_by_default_for_the_lattice_alone(self):
        assert CompressionSettings().moves_wo
        assert not CompressionSettings(grid="ternary").moves_wo
        assert CompressionSettings(grid="ternary", move_wo=True).moves_wo
        assert not CompressionSettings(move_wo=False).moves_wo
        assert not CompressionSettings(method="rtn").moves_wo

    def test_only_wo_is_moved(self, base, tmp_path):
        for name, wanted in (("with", True), ("without", False)):
            qmoe_jax.compress(base, tmp_path / name, CALIBRATION, move_wo=wanted, **QUICK)
        ours, theirs = codes_of(tmp_path / "with"), codes_of(tmp_path / "without")
        # Later layers have other inputs.
        keys = [key for key in ours if "encoder" in key and "layers_1" in key]
        assert len(keys) == 2
        for key in keys:
            assert np.array_equal(ours[key], theirs[key]) == ("'wi'" in key), key
