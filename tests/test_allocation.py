"""Steps for kernels at one slope of KL against bits."""

import numpy as np
import pytest
from factories import CALIBRATION, QUICK

import qmoe_jax
from qmoe_jax.pipeline.allocation import PROBE_STEPS, Probe, allocate, measure_probes


def probe(kernel, sensitivity, weights=1000):
    """A kernel of which bits are 2.6 / step and KL sensitivity * step^2."""
    steps = np.asarray(PROBE_STEPS)
    return Probe(
        kernel,
        weights,
        PROBE_STEPS,
        tuple((2.6 / steps).tolist()),
        tuple((sensitivity * steps**2).tolist()),
    )


def test_equal_kernels_get_equal_steps():
    steps = allocate([probe("a", 1e-4), probe("b", 1e-4)], 0.65)
    assert steps["a"] == steps["b"] == pytest.approx(4.0, rel=0.02)


def test_one_slope_and_the_target():
    """dKL/dbits = -2 s c^3 / 2.6 n: steps go as (n / s)^(1/3)."""
    probes = [probe("a", 8e-4), probe("b", 1e-4), probe("c", 1e-4, weights=2000)]
    steps = allocate(probes, 0.65)
    assert steps["b"] / steps["a"] == pytest.approx(2.0, rel=0.03)
    assert steps["c"] / steps["b"] == pytest.approx(2 ** (1 / 3), rel=0.03)
    bits = sum(p.num_weights * 2.6 / steps[p.kernel] for p in probes) / 4000
    assert bits == pytest.approx(0.65, rel=0.02)


def test_what_was_not_probed_is_refused():
    with pytest.raises(ValueError, match=r"bits_per_weight is 5\.0; what was probed allows 0\.20"):
        allocate([probe("a", 1e-4)], 5.0)


def test_measured_on_a_model(base, tmp_path):
    options = {name: value for name, value in QUICK.items() if name != "progress"}
    probes = measure_probes(
        base, CALIBRATION, steps=(3.0, 9.0), num_kl_examples=16, **options | {"batch_size": 8}
    )
    assert [p.kernel for p in probes][:2] == ["encoder/layers_1/wi", "encoder/layers_1/wo"]
    for found in probes:
        assert found.bits[0] > found.bits[1] > 0
        assert found.kl[1] > found.kl[0] > 0
    steps = allocate(probes, 0.7)
    report = qmoe_jax.compress(
        base, tmp_path / "out", CALIBRATION, grid="lattice", kernel_steps=steps, **QUICK
    )
    assert report.bits_per_weight == pytest.approx(0.7, rel=0.15)
