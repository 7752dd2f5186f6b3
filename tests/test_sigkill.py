"""SIGKILL at random moments: the run goes on and ends with the bytes of an undisturbed one."""

import random
import shutil
import signal
import subprocess
import sys
import time

import golden_data
import pytest
from factories import same_tree

from qmoe_jax.calibration.tokens import TokenMetadata, read_plain_tokens, write_tokens

NUM_KILLS = 50
SETTINGS = {"progress": False, "batch_size": 16, "expert_batch": 2, "token_chunk": 64}

_PROGRAM = """
import sys, qmoe_jax
checkpoint, output, tokens = sys.argv[1:]
report = qmoe_jax.compress(checkpoint, output, tokens, **{settings!r})
print(report.num_replayed)
"""


@pytest.mark.slow
def test_killed_runs_end_with_the_same_bytes(tmp_path):
    """The demo's model, experts two by two; some runs end before they are killed."""
    tokens = tmp_path / "tokens.npz"
    metadata = TokenMetadata("demo", "validation", 4068, 3968, 100, 1, 0, "")
    path = golden_data.DEMO / "validation_tokens.npz"
    examples = read_plain_tokens(path, metadata)[:48]
    write_tokens(tokens, examples.tokens, examples.metadata)
    program = _PROGRAM.format(settings=SETTINGS)
    checkpoint = golden_data.DEMO / "checkpoint_4200"

    def start(output):
        return subprocess.Popen(
            [sys.executable, "-c", program, str(checkpoint), str(output), str(tokens)],
            stdout=subprocess.PIPE,
            text=True,
        )

    undisturbed = tmp_path / "undisturbed"
    duration = 0.0
    for _ in range(2):  # the first one compiles, as those that are killed do not
        shutil.rmtree(undisturbed, ignore_errors=True)
        started = time.monotonic()
        process = start(undisturbed)
        assert process.communicate()[0].strip() == "0"
        assert process.returncode == 0
        duration = time.monotonic() - started

    rng = random.Random(0)
    output = tmp_path / "killed"
    kills, ended, resumed = 0, 0, 0
    while kills < NUM_KILLS or ended == 0:
        process = start(output)
        limit = rng.uniform(0.2, 1.0) * duration if kills < NUM_KILLS else None
        try:
            printed, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
        else:
            assert process.returncode == 0
            ended += 1
            resumed += int(printed) > 0
        if output.exists():
            assert same_tree(output, undisturbed)
            shutil.rmtree(output)
            shutil.rmtree(tmp_path / "killed.partial", ignore_errors=True)
    print(f"{kills} kills, {ended} runs that ended, {resumed} of them after a kill")
    assert resumed > 0
