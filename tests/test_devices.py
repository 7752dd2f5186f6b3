"""Several devices in one process, and several processes: the same model comes out."""

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from factories import CALIBRATION, TERNARY, codes_of, random_tokens, same_tree

import qmoe_jax
from qmoe_jax.calibration.tokens import write_tokens

VALIDATION = random_tokens(9, 11)

_PROGRAM = """
import json, sys
job = json.loads(sys.argv[1])
import jax
if job["num_processes"] > 1:
    jax.distributed.initialize(
        coordinator_address=job["address"],
        num_processes=job["num_processes"],
        process_id=job["process"],
    )
import qmoe_jax
assert len(jax.local_devices()) == job["num_devices"]
report = qmoe_jax.compress(
    job["checkpoint"], job["output"], job["tokens"], validation_tokens=job["validation"],
    num_devices=None, **job["settings"])
print(json.dumps({"loss": report.validation.loss, "bytes_read": report.bytes_read,
                  "replayed": report.num_replayed, "bits": report.bits_per_weight}))
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(num_processes, num_devices, checkpoint, output, files, **settings):
    """Starts a compression in new processes."""
    address = f"127.0.0.1:{free_port()}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(num_devices)}
    processes = []
    for process in range(num_processes):
        job = {
            "num_processes": num_processes,
            "num_devices": num_devices,
            "process": process,
            "address": address,
            "checkpoint": str(checkpoint),
            "output": str(output),
            "tokens": str(files["tokens"]),
            "validation": str(files["validation"]),
            "settings": TERNARY | settings,
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, json.dumps(job)],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return processes


def compress_in(*args, **settings):
    """Runs a compression in new processes; returns what each printed."""
    results = []
    for process in start(*args, **settings):
        printed, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
        results.append(json.loads(printed.splitlines()[-1]))
    return results


def share_of_equal_codes(ours, theirs):
    a, b = codes_of(ours), codes_of(theirs)
    assert a.keys() == b.keys()
    equal = sum(int(np.sum(a[key] == b[key])) for key in a)
    return equal / sum(array.size for array in a.values())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    paths = {"tokens": folder / "tokens.npz", "validation": folder / "validation.npz"}
    write_tokens(paths["tokens"], CALIBRATION.tokens, CALIBRATION.metadata)
    write_tokens(paths["validation"], VALIDATION.tokens, VALIDATION.metadata)
    return paths


@pytest.fixture(scope="module")
def checkpoint(golden_checkpoint):
    return golden_checkpoint("base", "t5x_float32_inference")


@pytest.fixture(scope="module")
def alone(checkpoint, files, tmp_path_factory):
    """One device: the output and its report."""
    path = tmp_path_factory.mktemp("alone") / "out"
    report = qmoe_jax.compress(
        checkpoint, path, files["tokens"], validation_tokens=files["validation"], **TERNARY
    )
    return path, report


@pytest.mark.parametrize(
    ("num_processes", "num_devices"), [pytest.param(1, 4, marks=pytest.mark.slow), (2, 2)]
)
def test_several_devices_give_the_same_model(
    checkpoint, files, alone, tmp_path, num_processes, num_devices
):
    path, report = alone
    out = tmp_path / "out"
    results = compress_in(num_processes, num_devices, checkpoint, out, files)
    for result in results:
        assert result["loss"] == pytest.approx(report.validation.loss, abs=1e-3)
        assert result["bits"] == pytest.approx(report.bits_per_weight, rel=1e-3)
    assert share_of_equal_codes(path, out) >= 0.999
    print(f"{num_processes} x {num_devices}: bytes read {[r['bytes_read'] for r in results]}")
    experts = sum(k.num_weights for k in report.kernels) * 4
    dense = report.bytes_read - experts
    for result in results:
        assert result["bytes_read"] - dense == experts // num_processes
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.slow
def test_more_processes_than_batches_of_experts(checkpoint, files, alone, tmp_path):
    """8 experts, 3 processes: shares of 2, 3 and 3, in batches of 2 and 1."""
    results = compress_in(3, 1, checkpoint, tmp_path / "out", files, expert_batch=2, move_wo=True)
    assert len({result["loss"] for result in results}) == 1
    reference = tmp_path / "reference"
    qmoe_jax.compress(checkpoint, reference, files["tokens"], move_wo=True, **TERNARY)
    assert share_of_equal_codes(reference, tmp_path / "out") >= 0.999


@pytest.mark.slow
def test_killed_processes_go_on_and_end_with_the_same_bytes(checkpoint, files, tmp_path):
    """2 processes, both killed at a random moment, again and again, until a run gets to its end."""
    where, settings = (checkpoint, tmp_path / "out", files), {"expert_batch": 1}
    undisturbed = tmp_path / "undisturbed"
    duration = 0.0
    for _ in range(2):  # the first one compiles, as those that are killed do not
        shutil.rmtree(undisturbed, ignore_errors=True)
        started = time.monotonic()
        results = compress_in(2, 1, checkpoint, undisturbed, files, **settings)
        duration = time.monotonic() - started
        assert [result["replayed"] for result in results] == [0, 0]

    rng = random.Random(0)
    kills = 0
    for _ in range(10):
        processes = start(2, 1, *where, **settings)
        time.sleep(rng.uniform(0.4, 0.95) * duration)
        running = [process for process in processes if process.poll() is None]
        for process in running:
            process.kill()
        for process in processes:
            process.communicate()
        kills += bool(running)
        if where[1].exists() and kills:
            break
        shutil.rmtree(where[1], ignore_errors=True)  # it was faster than any kill
    else:
        results = compress_in(2, 1, *where, **settings)
        assert all(result["replayed"] > 0 for result in results)
    print(f"{kills} times killed")
    assert kills > 0
    assert same_tree(where[1], undisturbed)
    assert not (tmp_path / "out.partial").exists()
