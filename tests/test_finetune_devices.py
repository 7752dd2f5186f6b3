"""Fine-tuning on several devices is fine-tuning on one, but for rounding."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tiny_switch
from test_finetune import HELD_OUT, QUICK, SILENT, TRAIN

import qmoe_jax
from qmoe_jax.training import finetune as training
from qmoe_jax.training import loop
from qmoe_jax.training.finetune import finetune

_PROGRAM = """
import json, sys
sys.path[:0] = json.loads(sys.argv[1])
import jax
from test_finetune_devices import train
assert len(jax.devices()) == 4
job = json.loads(sys.argv[2])
train(job, "four", 4)
if job["stop"]:
    train(job, "stopped", 4, stop=5)
    train(job, "stopped", 4)
"""


def train(job, name, num_devices, stop=None):
    """Run, or begin; what is trained is kept beside the run's folder, whenever it saves."""
    settings = dataclasses.replace(QUICK, **job["settings"])
    options = SILENT | job["options"]
    if job["validate"]:
        options["validation_tokens"] = HELD_OUT
    real_save, real_step, steps = loop.save_state, loop.Loop._one, []

    def save(folder, state):
        assert {len(a.sharding.device_set) for a in state.trained.values()} == {num_devices}
        np.savez(os.path.join(job["folder"], f"{name}_{state.step}.npz"), **state.trained)
        real_save(folder, state)

    def step(self, *arguments):
        if len(steps) == stop:
            raise KeyboardInterrupt
        steps.append(self)
        return real_step(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "save_state", save)
        patch.setattr(loop.Loop, "_one", step)
        try:
            folder = os.path.join(job["folder"], name)
            finetune(job["checkpoint"], folder, TRAIN, settings, num_devices=num_devices, **options)
        except KeyboardInterrupt:
            assert stop is not None


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    return tiny_switch.write_checkpoint(tmp_path_factory.mktemp("native"))


def compress(native, folder, grid):
    """As test_finetune does, so that the program of one device is compiled once for both."""
    options = {"2bit": {"expert_coding": "packed2"}, "lattice": {}}[grid]
    qmoe_jax.compress(native, folder, grid=grid, method="rtn", progress=False, **options)
    return folder


def compare(checkpoint, folder, settings=(), *, stop=True, validate=True, **options):
    """On one device here, on four in another process."""
    job = {"checkpoint": str(checkpoint), "folder": str(folder), "settings": dict(settings)}
    job |= {"stop": stop, "validate": validate, "options": options}
    train(job, "one", 1)
    here = os.path.dirname(__file__)
    paths = json.dumps([here, os.path.dirname(here)])
    process = subprocess.run(
        [sys.executable, "-c", _PROGRAM, paths, json.dumps(job)],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr

    def trained(name, step):
        return dict(np.load(folder / f"{name}_{step}.npz"))

    def logged(name):
        lines = (folder / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    last = QUICK.train_steps
    early, one, four = trained("one", 2), trained("one", last), trained("four", last)
    assert one.keys() == four.keys()
    for name, value in one.items():
        assert np.abs(value - early[name]).max() > 0
        difference = np.abs(four[name] - value).max()
        assert difference < 1e-3 * np.abs(value - early[name]).max(), name
    for mine, other in zip(logged("one"), logged("four"), strict=True):
        assert mine.keys() == other.keys()
        kind = "train" if "train" in mine else "validation"
        assert other[kind] == pytest.approx(mine[kind], rel=1e-5)
    if stop:  # on as many devices it ends with the same bits
        stopped = trained("stopped", last)
        assert all((stopped[name] == value).all() for name, value in four.items())
        assert logged("stopped") == logged("four")
    return one


@pytest.mark.slow
def test_four_devices_do_what_one_does(native, tmp_path):
    """Corrections of dense kernels and of experts, levels and norms, with dropout."""
    checkpoint = compress(native, tmp_path / "2bit", "2bit")
    trained = compare(checkpoint, tmp_path, stop=False, validate=False)
    assert any("/expert/wo/a" in name for name in trained)
    assert any(name.endswith("levels") for name in trained)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("grid", "settings", "options"),
    [
        ("2bit", {}, {}),
        ("lattice", {}, {}),
        ("2bit", {"lora_shared": True, "microbatches": 1}, {"expert_capacity_factor": 2.0}),
        (None, {"trainable": ["dense", "experts"]}, {"expert_capacity_factor": 1.0}),
    ],
)
def test_other_kinds_and_routings(native, tmp_path, grid, settings, options):
    checkpoint = native if grid is None else compress(native, tmp_path / grid, grid)
    compare(checkpoint, tmp_path, settings, **options)


def test_a_batch_that_devices_do_not_divide(native, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "local_devices", lambda count: [None] * count)
    settings = dataclasses.replace(QUICK, batch_size=12)
    message = (
        "batch_size is 12 in 2 microbatches: 6 examples at a time, which 4 devices do not divide; "
        "give a batch_size that is a multiple of 8"
    )
    with pytest.raises(ValueError, match=message):
        finetune(native, tmp_path / "run", TRAIN, settings, num_devices=4)
    assert not (tmp_path / "run").exists()


def test_devices_that_are_not_there(native, tmp_path):
    with pytest.raises(ValueError, match="num_devices is 64; this process has"):
        finetune(native, tmp_path / "run", TRAIN, QUICK, num_devices=64)
