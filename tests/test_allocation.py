"""Steps for kernels at one slope of KL against bits."""

import json

import numpy as np
import pytest
from factories import CALIBRATION, QUICK

import qmoe_jax
from qmoe_jax.checkpoints.compressed import open_compressed_checkpoint
from qmoe_jax.errors import TokensError
from qmoe_jax.pipeline import compress as compress_module
from qmoe_jax.pipeline.allocation import Probe, allocate, measure_probes
from qmoe_jax.quantization.settings import CompressionSettings

STEPS = (3.0, 5.0, 9.0)


def probe(kernel, sensitivity, weights=1000, steps=STEPS):
    """A kernel of which bits are 2.6 / step and KL sensitivity * step^2."""
    at = np.asarray(steps)
    return Probe(
        kernel, weights, steps, tuple((2.6 / at).tolist()), tuple((sensitivity * at**2).tolist())
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


def test_one_step_is_enough():
    """Then bits and KL go with the step as they do in most kernels."""
    probes = [probe("a", 8e-4, steps=(5.0,)), probe("b", 1e-4, steps=(5.0,))]
    steps = allocate(probes, 0.5)
    assert steps["a"] < 5 < steps["b"]
    assert 1.5 < steps["b"] / steps["a"] < 2.5


@pytest.mark.parametrize(("bits", "step"), [(50.0, 1.0), (0.001, 20.0)])
def test_out_of_reach_the_nearest_is_taken(bits, step):
    assert allocate([probe("a", 1e-4)], bits)["a"] == pytest.approx(step, rel=0.02)


def test_a_kernel_that_changes_nothing_gets_the_largest_step():
    harmless = Probe("b", 1000, (5.0,), (0.5,), (-1e-12,))
    assert allocate([probe("a", 1e-4), harmless], 0.5)["b"] > 15


@pytest.fixture(scope="module")
def probed(base):
    module, variables = qmoe_jax.load_switch(base)
    settings = CompressionSettings(grid="lattice")
    return measure_probes(
        *(module, variables, CALIBRATION, settings),
        steps=(3.0, 9.0),
        num_kl_examples=16,
        batch_size=8,
    )


def test_measured_on_a_model(probed):
    assert [p.kernel for p in probed][:2] == ["encoder/layers_1/wi", "encoder/layers_1/wo"]
    for found in probed:
        assert found.bits[0] > found.bits[1] > 0
        assert found.kl[1] > found.kl[0] > 0


def test_some_experts_tell_what_all_would(base, probed):
    """A sample counts for all: of the order of what all experts give, not of a part of it."""
    module, variables = qmoe_jax.load_switch(base)
    all_experts = measure_probes(
        *(module, variables, CALIBRATION, CompressionSettings(grid="lattice")),
        steps=(3.0, 9.0),
        expert_share=1.0,
        num_kl_examples=16,
        batch_size=8,
    )
    ratios = [a.kl[1] / b.kl[1] for a, b in zip(probed, all_experts, strict=True)]
    assert 0.4 < np.exp(np.mean(np.log(ratios))) < 2.5


MEASURED = {"grid": "lattice", "allocation": "measured", "target_bits_per_weight": 0.9}


def interrupt(*_, **__):
    raise KeyboardInterrupt


class TestCompress:
    @staticmethod
    def stop_behind_the_measurement(base, output, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setattr(compress_module, "BlockLoop", interrupt)
            with pytest.raises(KeyboardInterrupt):
                qmoe_jax.compress(base, output, CALIBRATION, **MEASURED, **QUICK)

    def test_steps_differ_and_the_target_is_met(self, base, tmp_path):
        report = qmoe_jax.compress(base, tmp_path / "out", CALIBRATION, **MEASURED, **QUICK)
        assert report.bits_per_weight == pytest.approx(0.9, rel=0.03)
        assert report.settings["allocation"] == "measured"
        told = open_compressed_checkpoint(tmp_path / "out").compression["settings"]
        assert told["allocation"] == "measured"
        assert len(set(told["kernel_steps"].values())) > 1

    def test_a_resumed_run_measures_no_more(self, base, tmp_path, monkeypatch):
        whole = qmoe_jax.compress(base, tmp_path / "whole", CALIBRATION, **MEASURED, **QUICK)

        self.stop_behind_the_measurement(base, tmp_path / "out", monkeypatch)
        monkeypatch.setattr(compress_module, "measure_probes", interrupt)
        resumed = qmoe_jax.compress(base, tmp_path / "out", CALIBRATION, **MEASURED, **QUICK)
        assert resumed.settings["kernel_steps"] == whole.settings["kernel_steps"]
        files = {p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*")}
        for name in files:
            ours, theirs = tmp_path / "out" / name, tmp_path / "whole" / name
            if ours.is_file():
                assert ours.read_bytes() == theirs.read_bytes(), name

    def test_it_needs_text(self, base, tmp_path):
        with pytest.raises(TokensError, match='allocation="measured"'):
            qmoe_jax.compress(
                base, tmp_path / "out", grid="lattice", method="rtn", allocation="measured"
            )

    def test_a_damaged_record_is_named(self, base, tmp_path, monkeypatch):
        self.stop_behind_the_measurement(base, tmp_path / "out", monkeypatch)
        (record,) = tmp_path.rglob("allocation.json")
        assert json.loads(record.read_text())
        record.write_text("[1]")
        with pytest.raises(qmoe_jax.CheckpointError, match=r"allocation\.json is damaged"):
            qmoe_jax.compress(base, tmp_path / "out", CALIBRATION, **MEASURED, **QUICK)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": "ternary", "allocation": "measured"}, 'no layer has grid="lattice"'),
        ({"allocation": "even"}, "allocation is 'even'; choose one of 'uniform', 'measured'"),
        (
            {"allocation": "measured", "kernel_steps": {"*": 4.0}},
            "leave one of the two out",
        ),
    ],
)
def test_settings_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        CompressionSettings(**{"grid": "lattice"} | changes)
