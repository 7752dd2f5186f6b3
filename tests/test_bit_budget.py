"""The search of a step, and the budget of a run."""

import pytest
from factories import CALIBRATION, QUICK, same_tree
from markers import slow
from test_resume import Stopped, stop_after

import qmoe_jax
from qmoe_jax.pipeline.bit_budget import BitBudget
from qmoe_jax.quantization.settings import CompressionSettings
from qmoe_jax.quantization.step_search import (
    moved_step,
    step_for_bits,
    typical_bits,
    typical_step,
)

KERNELS = {"a": 4000, "b": 1000, "c": 2000}


@pytest.mark.parametrize("step", [0.1, 1.0, 3.0, 9.0])
def test_the_typical_curve(step):
    assert typical_step(typical_bits(step)) == pytest.approx(step)
    assert typical_bits(0.99 * step) > typical_bits(step)
    assert moved_step(2 * step, typical_bits(step), 0.4) == pytest.approx(2 * typical_step(0.4))


@pytest.mark.parametrize("wanted", [0.3, 0.6, 1.0, 2.0])
def test_a_search_takes_few_measurements(wanted):
    """Of a curve at another place and with side information on top."""
    measured = []

    def measure(step):
        measured.append(step)
        return typical_bits(0.8 * step) * 1.1 + 0.02

    assert measure(step_for_bits(measure, wanted)) == pytest.approx(wanted, rel=0.003)
    assert len(measured) <= 5


class TestBudget:
    def test_one_step_is_the_same_bits_for_all(self):
        budget = BitBudget(KERNELS, dict.fromkeys(KERNELS, 4.0), 0.5)
        assert [budget.bits_for(name) for name in KERNELS] == pytest.approx([0.5] * 3, rel=1e-6)

    def test_steps_are_in_the_ratio_given(self):
        steps = {"a": 3.0, "b": 6.0, "c": 9.0}
        budget = BitBudget(KERNELS, steps, 0.5)
        bits = {name: budget.bits_for(name) for name in KERNELS}
        assert sum(bits[n] * KERNELS[n] for n in KERNELS) == pytest.approx(3500, rel=1e-6)
        assert typical_step(bits["b"]) == pytest.approx(2 * typical_step(bits["a"]), rel=1e-6)

    def test_what_was_spent_too_much_is_made_up_for(self):
        budget = BitBudget(KERNELS, dict.fromkeys(KERNELS, 4.0), 0.5)
        budget.spend("a", 4000, 2300, 3.9)
        assert budget.bits_for("b") == pytest.approx(1200 / 3000, rel=1e-6)
        budget.spend("b", 500, 200, 4.4)
        # A later batch goes by the one before, without a measurement.
        step = budget.step_for("b", 500, lambda *_: pytest.fail("not to be measured"))
        assert step == pytest.approx(4.4)
        budget.spend("b", 500, 200, 4.4)
        asked = []

        def measure(step, all_experts):
            asked.append(all_experts)
            return typical_bits(step)

        for weights in (1000, 2000):
            step = budget.step_for("c", weights, measure)
            assert step == pytest.approx(typical_step(0.4), rel=0.01)
        # Only the last batch of all is measured whole.
        assert asked == [False, True]

    def test_kernels_of_the_last_experts_make_up_for_each_other(self):
        names = ("decoder/layers_3/wi", "decoder/layers_3/wo")
        budget = BitBudget(dict.fromkeys(names, 1000), dict.fromkeys(names, 4.0), 0.5)
        asked = []

        def stuck(step, all_experts):
            asked.append(all_experts)
            return 0.6

        budget.step_for(names[0], 1000, stuck)
        assert all(asked)
        # Both are spent when both are quantized.
        assert budget.bits_for(names[1]) == pytest.approx(0.4, rel=0.01)
        budget.spend(names[0], 1000, 610, 3.0)
        assert budget.bits_for(names[1]) == pytest.approx(0.39, rel=1e-6)

    def test_another_layer_makes_up_for_the_last_experts_of_this_one(self):
        names = ("encoder/layers_1/wo", "decoder/layers_1/wo")
        budget = BitBudget(dict.fromkeys(names, 1000), dict.fromkeys(names, 4.0), 0.5)
        asked = []

        def measure(step, all_experts):
            asked.append(all_experts)
            return typical_bits(step)

        budget.step_for(names[0], 1000, measure)
        assert not any(asked)

    def test_nothing_left_asks_for_little(self):
        budget = BitBudget(KERNELS, dict.fromkeys(KERNELS, 4.0), 0.5)
        budget.spend("a", 4000, 9000, None)
        assert budget.bits_for("c") == pytest.approx(0.02)


@pytest.mark.parametrize("target", [1.0, *slow(0.8, 2.0)])
def test_a_target_is_met(base, tmp_path, target):
    report = qmoe_jax.compress(
        base, tmp_path / "out", CALIBRATION, grid="lattice", target_bits_per_weight=target, **QUICK
    )
    assert report.bits_per_weight == pytest.approx(target, rel=0.01)
    assert not any("bits a weight instead of" in warning for warning in report.warnings())


@pytest.mark.slow
def test_a_stopped_run_ends_with_the_same_bytes(base, tmp_path, monkeypatch):
    settings = QUICK | {
        "grid": "lattice",
        "target_bits_per_weight": 0.9,
        "kernel_steps": {"*/wo": 5.0},
    }
    whole = qmoe_jax.compress(base, tmp_path / "whole", CALIBRATION, **settings)
    assert whole.bits_per_weight == pytest.approx(0.9, rel=0.01)
    bits = {k.name.rpartition("/")[2]: k.bits["bits_per_weight"] for k in whole.kernels}
    assert bits["wo"] < bits["wi"]
    stop_after(monkeypatch, 4)
    with pytest.raises(Stopped):
        qmoe_jax.compress(base, tmp_path / "out", CALIBRATION, **settings)
    monkeypatch.undo()
    report = qmoe_jax.compress(base, tmp_path / "out", CALIBRATION, **settings)
    assert report.num_replayed == 4
    assert same_tree(tmp_path / "out", tmp_path / "whole")
    assert report.kernels == whole.kernels


def test_what_cannot_be_met_is_remarked_on(base, tmp_path):
    """Small kernels: their side information alone is more."""
    report = qmoe_jax.compress(
        *(base, tmp_path / "out", CALIBRATION),
        grid="lattice",
        target_bits_per_weight=0.05,
        **QUICK,
    )
    assert any("instead of 0.05" in warning for warning in report.warnings())


def test_only_the_lattice_has_a_target():
    with pytest.raises(ValueError, match=r"target_bits_per_weight is 0\.5, but no layer has grid"):
        CompressionSettings(grid="ternary", target_bits_per_weight=0.5)
    with pytest.raises(ValueError, match=r"target_bits_per_weight is 7\.0; it must be above 0"):
        CompressionSettings(grid="lattice", target_bits_per_weight=7.0)
    CompressionSettings(
        grid="ternary",
        target_bits_per_weight=0.5,
        layer_overrides={"encoder/*": {"grid": "lattice"}},
    )
