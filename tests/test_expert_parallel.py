"""Experts split over devices give what they give on one."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

import qmoe_jax
from qmoe_jax.ops.expert_parallel import expert_mesh
from qmoe_jax.ops.local_devices import local_devices
from qmoe_jax.pipeline.devices import Devices

_PROGRAM = """
import json, sys
job = json.loads(sys.argv[1])
sys.path.insert(0, job["tests"])
import jax, numpy as np
import qmoe_jax
from factories import shortened
from qmoe_jax.generation.sampling import greedy_generate
batch = np.load(job["batch"])
out = {}
for name, path in job["paths"].items():
    split = qmoe_jax.load_switch(path, "float32", num_devices=4)
    for factor in job["factors"][name]:
        # One layer of each kind in both stacks.
        one = shortened(*qmoe_jax.load_switch(path, "float32", factor), 2)
        split = shortened(*qmoe_jax.load_switch(path, "float32", factor, num_devices=4), 2)
        results = [
            jax.jit(lambda v, *b, module=module: module.apply(v, *b, enable_dropout=False))(
                variables, batch["e"], batch["i"], batch["t"])
            for module, variables in (one, split)
        ]
        out[f"{name} {factor}"] = float(abs(results[0] - results[1]).max())
    experts = split[1]["params"]["encoder"]["layers_1"]["mlp"]["expert"]["wi"]
    out[f"{name} shards"] = {
        key: [list(array.shape), list(array.addressable_shards[0].data.shape)]
        for key, array in experts.items()
    }
    if name != "ternary":
        continue
    tokens = [
        np.asarray(greedy_generate(module, variables, batch["e"], max_decode_length=5))
        for module, variables in (one, split)
    ]
    out[f"{name} tokens"] = bool((tokens[0] == tokens[1]).all())
try:
    qmoe_jax.load_switch(path, num_devices=3)
except ValueError as error:
    out["refusal"] = str(error)
print(json.dumps(out))
"""


# The arrays of 2 bit are others, what is done with them is not.
FACTORS = {"native": [1.0], "ternary": [None], "2bit": []}
OTHER_FACTORS = {"native": [None], "ternary": [1.0], "2bit": [None]}


@pytest.fixture(scope="module")
def run(golden_checkpoint, tmp_path_factory):
    """`run(factors)`: what one device and four give with these capacity factors."""
    folder = tmp_path_factory.mktemp("split")
    native = golden_checkpoint("base", "t5x_float32_inference")
    paths = {"native": str(native)}
    for grid in ("ternary", "2bit"):
        paths[grid] = str(folder / grid)
        qmoe_jax.compress(native, paths[grid], method="rtn", grid=grid, progress=False)
    rng = np.random.default_rng(0)
    encoder = rng.integers(3, 500, (3, 12))
    target = rng.integers(3, 500, (3, 7))
    np.savez(folder / "batch.npz", e=encoder, i=np.pad(target[:, :-1], ((0, 0), (1, 0))), t=target)

    def run(factors):
        job = {"paths": paths, "batch": str(folder / "batch.npz"), "factors": factors}
        job["tests"] = os.path.dirname(__file__)
        process = subprocess.run(
            [sys.executable, "-c", _PROGRAM, json.dumps(job)],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"},
            capture_output=True,
            text=True,
        )
        assert process.returncode == 0, process.stderr
        return json.loads(process.stdout.splitlines()[-1])

    return run


@pytest.fixture(scope="module")
def results(run):
    return run(FACTORS)


@pytest.mark.parametrize("model", ["native 1.0", "ternary None"])
def test_logits_are_the_same(results, model):
    """With a capacity, and dropless through codes."""
    assert results[model] < 1e-5


@pytest.mark.slow
def test_logits_are_the_same_with_the_other_factors(run):
    results = run(OTHER_FACTORS)
    for model in ("native None", "ternary 1.0", "2bit None"):
        assert results[model] < 1e-5, model


@pytest.mark.parametrize("model", ["native", "ternary", "2bit"])
def test_a_device_holds_its_own_experts_only(results, model):
    for name, (whole, own) in results[f"{model} shards"].items():
        assert own[0] == whole[0] // 4, name
        assert own[1:] == whole[1:], name


def test_generated_tokens_are_the_same(results):
    assert results["ternary tokens"]


def test_experts_that_do_not_divide_are_refused(results):
    assert "8 experts cannot be split evenly over 3 devices" in results["refusal"]


@pytest.mark.parametrize("take", [local_devices, expert_mesh, Devices.local])
def test_devices_that_are_not_there(take):
    """One check for all that spread over devices, with one message."""
    have = len(jax.local_devices())
    for count in (0, have + 1):
        with pytest.raises(
            ValueError,
            match=rf"num_devices is {count}; this process has {have} .* give 1 to {have}",
        ):
            take(count)


def test_devices_of_this_process():
    assert local_devices(None) == jax.local_devices()
    assert local_devices(1) == jax.local_devices()[:1]
