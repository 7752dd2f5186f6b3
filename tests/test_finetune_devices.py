"""Fine-tuning on several devices is fine-tuning on one, but for rounding."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import tiny_switch

import qmoe_jax
from qmoe_jax.training.finetune import finetune
from qmoe_jax.training.settings import FinetuneSettings

_PROGRAM = """
import json, sys
sys.path[:0] = json.loads(sys.argv[1])
import test_finetune_devices
test_finetune_devices.compare(json.loads(sys.argv[2]))
"""

TRAIN, HELD_OUT = tiny_switch.copying_tokens(0, 64), tiny_switch.copying_tokens(1, 16)
SETTINGS = FinetuneSettings(
    trainable=("lora", "gains", "norms"),
    train_steps=4,
    batch_size=16,
    microbatches=2,
    learning_rate=0.01,
    lora_rank=2,
    lora_kernels=("*attention/query", "*/expert/wo"),
    dropout_rate=0.1,
    expert_dropout_rate=0.2,
    eval_steps=4,
    save_steps=2,
    log_steps=1,
)


def compare(job):
    """In a process of four devices: run on one and on four, twice; print what came out."""
    import jax
    import numpy as np

    from qmoe_jax.training import loop

    assert len(jax.devices()) == 4
    settings = dataclasses.replace(SETTINGS, **job["settings"])
    options = {"validation_tokens": HELD_OUT, "progress": False, "tensorboard": False}
    options |= job["options"]
    real, seen = loop.save_state, {}

    def keep(folder, state):
        trained = {name: np.asarray(value) for name, value in state.trained.items()}
        places = {len(value.sharding.device_set) for value in state.trained.values()}
        seen[folder.name, state.step] = trained, places
        real(folder, state)

    loop.save_state = keep
    run = loop.Loop._one
    left = [10**6]

    def stopping(self, *arguments):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return run(self, *arguments)

    loop.Loop._one = stopping
    reports = {}
    for name, num_devices, steps in (("one", 1, None), ("four", 4, None), ("stopped", 4, 3)):
        folder = os.path.join(job["folder"], name)
        if steps is not None:
            left[0] = steps
            try:
                finetune(job["checkpoint"], folder, TRAIN, settings, num_devices=4, **options)
            except KeyboardInterrupt:
                left[0] = 10**6
        reports[name] = finetune(
            job["checkpoint"], folder, TRAIN, settings, num_devices=num_devices, **options
        )
    last = settings.train_steps
    one, four, stopped = (seen[name, last][0] for name in ("one", "four", "stopped"))
    start = seen["one", 2][0]
    print(
        json.dumps(
            {
                "places": sorted(seen["four", last][1]),
                "shapes": {n: a.shape == one[n].shape for n, a in four.items()},
                "apart": {n: float(abs(a - one[n]).max()) for n, a in four.items()},
                "moved": {n: float(abs(a - one[n]).max()) for n, a in start.items()},
                "same": {n: bool((a == four[n]).all()) for n, a in stopped.items()},
                "reports": reports,
            }
        )
    )


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    return tiny_switch.write_checkpoint(tmp_path_factory.mktemp("native"))


def compress(native, folder, grid):
    options = {"2bit": {"expert_coding": "packed2"}, "lattice": {}}[grid]
    qmoe_jax.compress(native, folder, grid=grid, method="rtn", progress=False, **options)
    return folder


def run(checkpoint, folder, settings=(), **options):
    job = {"checkpoint": str(checkpoint), "folder": str(folder), "settings": dict(settings)}
    here = os.path.dirname(__file__)
    paths = json.dumps([here, os.path.dirname(here)])
    process = subprocess.run(
        [sys.executable, "-c", _PROGRAM, paths, json.dumps(job | {"options": options})],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def check(found, folder):
    assert found["places"] == [4]
    assert all(found["shapes"].values())
    for name, apart in found["apart"].items():
        assert apart < 2e-3 * found["moved"][name], name
    one, four, stopped = (found["reports"][name] for name in ("one", "four", "stopped"))
    for when, figures in one["validation"].items():
        for name, value in figures.items():
            assert four["validation"][when][name] == pytest.approx(value, rel=1e-5), (when, name)
    losses = [
        [json.loads(line)["train"]["loss"] for line in lines if "train" in line]
        for lines in (
            (folder / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "four")
        )
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    # On as many devices a run that was stopped ends with the same bits.
    assert all(found["same"].values())
    assert stopped["validation"] == four["validation"]


def test_four_devices_do_what_one_does(native, tmp_path):
    """Corrections of dense kernels and of experts, levels and norms, with dropout."""
    found = run(compress(native, tmp_path / "2bit", "2bit"), tmp_path)
    assert any("/expert/wo/a" in name for name in found["apart"])
    assert any(name.endswith("levels") for name in found["apart"])
    check(found, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("grid", "settings", "options"),
    [
        ("lattice", {}, {}),
        ("2bit", {"lora_shared": True, "microbatches": 1}, {"expert_capacity_factor": 2.0}),
        (None, {"trainable": ["dense", "experts"]}, {"expert_capacity_factor": 1.0}),
    ],
)
def test_other_kinds_and_routings(native, tmp_path, grid, settings, options):
    checkpoint = native if grid is None else compress(native, tmp_path / grid, grid)
    check(run(checkpoint, tmp_path, settings, **options), tmp_path)


def test_a_batch_that_devices_do_not_divide(native, tmp_path, monkeypatch):
    from qmoe_jax.training import finetune as training

    monkeypatch.setattr(training, "local_devices", lambda count: [None] * count)
    settings = dataclasses.replace(SETTINGS, batch_size=12)
    message = (
        "batch_size is 12 in 2 microbatches: 6 examples at a time, which 4 devices do not divide; "
        "give a batch_size that is a multiple of 8"
    )
    with pytest.raises(ValueError, match=message):
        finetune(native, tmp_path / "run", TRAIN, settings, num_devices=4)
    assert not (tmp_path / "run").exists()


def test_devices_that_are_not_there(native, tmp_path):
    with pytest.raises(ValueError, match="num_devices is 64; this process has"):
        finetune(native, tmp_path / "run", TRAIN, SETTINGS, num_devices=64)
