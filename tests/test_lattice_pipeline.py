"""Lattice models through the pipeline: stored, loaded, resumed, overridden."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from factories import CALIBRATION, QUICK, codes_of, same_tree, shortened
from markers import needs_compiler, slow
from test_resume import Stopped, stop_after

import qmoe_jax
from qmoe_jax.checkpoints.dequantize import dequantize_checkpoint
from qmoe_jax.evaluation.metrics import evaluate_loss
from qmoe_jax.models.load import dequantized
from qmoe_jax.quantization.settings import CompressionSettings

LATTICE = QUICK | {"grid": "lattice", "step": 3.0}


@pytest.fixture(scope="module")
def lattice(base, tmp_path_factory):
    path = tmp_path_factory.mktemp("lattice") / "out"
    return path, qmoe_jax.compress(base, path, CALIBRATION, **LATTICE)


def test_report_and_codes(base, lattice, tmp_path):
    path, report = lattice
    assert 0.5 < report.bits_per_weight < 1.6
    assert all(kernel.overload_share == 0 for kernel in report.kernels)
    assert all(0 < kernel.relative_layer_error < 0.5 for kernel in report.kernels)
    assert not any("127 steps" in warning for warning in report.warnings())
    coarse = qmoe_jax.compress(base, tmp_path / "out", CALIBRATION, **LATTICE | {"step": 6.0})
    assert coarse.bits_per_weight < report.bits_per_weight
    assert coarse.zeros > report.zeros
    fine, rough = codes_of(path), codes_of(tmp_path / "out")
    assert any(np.any(fine[key] != rough[key]) for key in fine)


def test_codes_lose_nothing(lattice, tmp_path):
    module, variables = qmoe_jax.load_switch(lattice[0])
    batches = [batch.arrays() for batch in CALIBRATION[:16].batches(16)]
    through_codes = evaluate_loss(module, variables, batches)
    dense = evaluate_loss(*dequantized(module, variables), batches)
    assert through_codes.loss == pytest.approx(dense.loss, abs=1e-4)
    path = dequantize_checkpoint(lattice[0], tmp_path, progress=False)
    native = evaluate_loss(*qmoe_jax.load_switch(path), batches)
    assert native.loss == pytest.approx(dense.loss, abs=1e-4)


@needs_compiler
def test_cuda_kernels_give_the_same_logits(lattice, launcher):
    """Emulated. What they derive is found at loading, and once a kernel."""
    tokens = jnp.asarray(np.random.default_rng(0).integers(2, 60, (2, 5)), jnp.int32)
    logits = {}
    for implementation in ("xla", "cuda"):
        module, variables = shortened(
            *qmoe_jax.load_switch(lattice[0], "float32", implementation=implementation), 2
        )
        if implementation == "cuda":
            assert {name for name, _ in launcher.calls} == {"find_lattice_cursors"}
            launcher.calls.clear()
        apply = jax.jit(functools.partial(module.apply, enable_dropout=False))
        logits[implementation] = np.asarray(apply(variables, tokens, tokens, tokens))
    assert {name for name, _ in launcher.calls} <= {"fused_lattice_t2", "fused_lattice_t16"}
    assert launcher.calls
    np.testing.assert_allclose(logits["cuda"], logits["xla"], atol=2e-5)


@pytest.mark.parametrize("option", [{"move_wo": False}, *slow({"act_order": True})])
def test_options(base, lattice, tmp_path, option):
    report = qmoe_jax.compress(base, tmp_path / "out", CALIBRATION, **LATTICE, **option)
    assert report.bits_per_weight == pytest.approx(lattice[1].bits_per_weight, rel=0.05)
    ours, theirs = codes_of(lattice[0]), codes_of(tmp_path / "out")
    assert any(np.any(ours[key] != theirs[key]) for key in ours)


def test_without_calibration(base, tmp_path):
    report = qmoe_jax.compress(base, tmp_path / "out", method="rtn", **LATTICE)
    assert report.bits_per_weight > 0.5


def test_a_stopped_run_ends_with_the_same_bytes(base, lattice, tmp_path, monkeypatch):
    for stop in (4, 3):
        with monkeypatch.context() as patch:
            stop_after(patch, stop)
            with pytest.raises(Stopped):
                qmoe_jax.compress(base, tmp_path / "out", CALIBRATION, **LATTICE)
    report = qmoe_jax.compress(base, tmp_path / "out", CALIBRATION, **LATTICE)
    assert report.num_replayed == 7
    assert same_tree(tmp_path / "out", lattice[0])
    assert report.kernels == lattice[1].kernels


def test_a_layer_may_have_its_own_step(base, lattice, tmp_path):
    report = qmoe_jax.compress(
        *(base, tmp_path / "out", CALIBRATION),
        layer_overrides={"encoder/*": {"step": 8.0}, "decoder/*": {"grid": "ternary"}},
        **LATTICE,
    )
    for ours, before in zip(report.kernels, lattice[1].kernels, strict=True):
        if ours.name.startswith("encoder"):
            assert ours.bits["total"] < before.bits["total"]
        else:
            assert ours.step is None


def test_a_kernel_may_have_its_own_step(base, lattice, tmp_path):
    steps = {"*/wo": 6.0, "encoder/layers_1/wo": 1.5}
    report = qmoe_jax.compress(base, tmp_path / "out", CALIBRATION, kernel_steps=steps, **LATTICE)
    for ours, before in zip(report.kernels, lattice[1].kernels, strict=True):
        if ours.name == "encoder/layers_1/mlp/expert/wo":
            assert ours.bits["total"] > before.bits["total"]
        elif ours.name.endswith("/wo"):
            assert ours.bits["total"] < before.bits["total"]
    assert report.kernels[0] == lattice[1].kernels[0]
    with pytest.raises(ValueError, match=r"kernel_steps has 'encoder/layers_2/wo', which matches"):
        qmoe_jax.compress(
            *(base, tmp_path / "other", CALIBRATION),
            kernel_steps={"encoder/layers_2/wo": 2.0},
            **LATTICE,
        )


def test_bad_settings():
    with pytest.raises(ValueError, match=r"kernel_steps\['a'\] is -1\.0; it must be above 0"):
        CompressionSettings(grid="lattice", kernel_steps={"a": -1.0})
    with pytest.raises(ValueError, match=r"step is 0\.0; it must be above"):
        CompressionSettings(grid="lattice", step=0.0)
    with pytest.raises(ValueError, match="group_size is 64, but the lattice has a step"):
        CompressionSettings(grid="lattice", group_size=64)
    with pytest.raises(
        ValueError, match="expert_coding is 'tunstall'; choose one of 'auto', 'latt"
    ):
        CompressionSettings(grid="lattice", expert_coding="tunstall")
