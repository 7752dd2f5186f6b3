"""SIGKILL at random moments: the run goes on and ends with the bytes of an undisturbed one."""

import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from test_compress import CALIBRATION, QUICK, same_tree

from qmoe_jax.calibration.tokens import write_tokens

NUM_KILLS = 12

_PROGRAM = """
import sys, qmoe_jax
checkpoint, output, tokens = sys.argv[1:]
report = qmoe_jax.compress(checkpoint, output, tokens, **{settings!r})
print(report.num_replayed)
"""


@pytest.mark.slow
def test_killed_runs_end_with_the_same_bytes(golden_checkpoint, tmp_path):
    tokens = tmp_path / "tokens.npz"
    write_tokens(tokens, CALIBRATION.tokens, CALIBRATION.metadata)
    program = _PROGRAM.format(settings={**QUICK, "expert_batch": 1})
    checkpoint = golden_checkpoint("base", "t5x_float32_inference")

    def start(output):
        return subprocess.Popen(
            [sys.executable, "-c", program, str(checkpoint), str(output), str(tokens)],
            stdout=subprocess.PIPE,
            text=True,
        )

    started = time.monotonic()
    undisturbed = start(tmp_path / "undisturbed")
    assert undisturbed.communicate()[0].strip() == "0"
    assert undisturbed.returncode == 0
    duration = time.monotonic() - started

    rng = random.Random(0)
    output = tmp_path / "killed"
    kills = 0
    while True:
        process = start(output)
        finished_batches = len(list(tmp_path.glob("killed.partial/work/*.npz")))
        try:
            printed, _ = process.communicate(
                timeout=rng.uniform(0.3, 1.0) * duration if kills < NUM_KILLS else None
            )
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
            if output.exists():  # killed on its way out: whole, and begun anew
                assert same_tree(output, tmp_path / "undisturbed")
                shutil.rmtree(output)
            continue
        assert process.returncode == 0
        break
    assert kills == NUM_KILLS
    assert int(printed) == finished_batches
    assert same_tree(output, tmp_path / "undisturbed")
