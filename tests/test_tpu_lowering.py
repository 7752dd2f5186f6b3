"""Compressed models are lowered for TPU, experts split over a mesh; nothing here runs on a TPU.

`jax.export` lowers for a platform that is not there: an operation or a callback without a TPU
lowering would fail. The same program, lowered for CPU too, gives what it gives without export.
"""

import json
import os
import subprocess
import sys

import pytest

import qmoe_jax

_PROGRAM = """
import json, re, sys
job = json.loads(sys.argv[1])
sys.path.insert(0, job["tests"])
import jax, numpy as np
from jax import export
from jax.sharding import NamedSharding, PartitionSpec
import qmoe_jax
from factories import shortened
rng = np.random.default_rng(0)
batch = [rng.integers(3, 500, shape).astype(np.int32) for shape in ((3, 12), (3, 7), (3, 7))]
out = {}
for name, (path, devices, run) in job["cases"].items():
    loaded = qmoe_jax.load_switch(
        path, "bfloat16" if name == "bfloat16" else "float32",
        num_devices=devices, implementation="xla")
    # One layer of each kind in both stacks.
    module, variables = shortened(*loaded, 2)
    apply = jax.jit(lambda v, *b: module.apply(v, *b, enable_dropout=False))
    tokens = batch
    if devices > 1:
        tokens = [jax.device_put(t, NamedSharding(module.mesh, PartitionSpec())) for t in batch]
    platforms = ["cpu", "tpu"] if run else ["tpu"]
    exported = export.export(apply, platforms=platforms)(variables, *tokens)
    again = export.deserialize(exported.serialize())
    text = again.mlir_module()
    leaves = jax.tree_util.tree_flatten_with_path(((variables, *tokens), {}))[0]
    split = {}
    for (place, leaf), sharding in zip(leaves, again.in_shardings_hlo, strict=True):
        path = jax.tree_util.keystr(place)
        if devices > 1 and "'expert'" in path:
            split[path] = sharding is not None and not sharding.is_replicated()
    out[name] = {
        "platforms": list(again.platforms),
        "devices": again.nr_devices,
        "logits": [str(again.out_avals[0].dtype), list(again.out_avals[0].shape)],
        "callbacks": sorted(set(re.findall(r"custom_call @(\\w*callback\\w*)", text))),
        "all_reduce": "all_reduce" in text,
        "split": split,
    }
    if run:
        found = jax.jit(again.call)(variables, *tokens)
        out[name]["difference"] = float(abs(found - apply(variables, *tokens)).max())
        out[name]["size"] = float(abs(found).max())
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def lower(base, tmp_path_factory):
    """`lower(run)`: what is lowered of two compressed models, by case; and run on the CPU."""
    folder = tmp_path_factory.mktemp("tpu")
    paths = {grid: str(folder / grid) for grid in ("ternary", "lattice")}
    for grid, path in paths.items():
        qmoe_jax.compress(base, path, method="rtn", grid=grid, progress=False)

    def lower(run):
        cases = {"lattice": (paths["lattice"], 4, run)}
        if not run:
            cases["ternary"] = (paths["ternary"], 4, False)
            cases["bfloat16"] = (paths["lattice"], 1, False)
        job = {"tests": os.path.dirname(__file__), "cases": cases}
        process = subprocess.run(
            [sys.executable, "-c", _PROGRAM, json.dumps(job)],
            env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"},
            capture_output=True,
            text=True,
        )
        assert process.returncode == 0, process.stderr
        return json.loads(process.stdout.splitlines()[-1])

    return lower


@pytest.fixture(scope="module")
def lowered(lower):
    return lower(False)


@pytest.mark.parametrize("case", ["ternary", "lattice", "bfloat16"])
def test_a_compressed_model_is_lowered_for_tpu(lowered, case):
    found = lowered[case]
    assert "tpu" in found["platforms"]
    assert found["devices"] == (1 if case == "bfloat16" else 4)
    assert found["logits"] == ["float32", [3, 7, 512]]
    assert found["callbacks"] == []


@pytest.mark.parametrize("case", ["ternary", "lattice"])
def test_each_device_of_the_mesh_gets_its_own_experts(lowered, case):
    found = lowered[case]
    assert found["all_reduce"]  # outputs of the experts are summed over the mesh
    assert len(found["split"]) > 5
    assert all(found["split"].values())


@pytest.mark.slow
def test_the_program_is_the_model(lower):
    """What was lowered for both platforms, run on four devices of the CPU."""
    found = lower(True)["lattice"]
    assert {"cpu", "tpu"} == set(found["platforms"])
    assert found["size"] > 0.1
    assert found["difference"] == 0.0
