"""Ctrl-C: one line that says how to go on, no traceback, and the same command does go on.

A reader that closes its end of a pipe is no mistake either.
"""

import signal
import subprocess
import sys
import time

import golden_data
import pytest
from factories import same_tree

pytest.importorskip("gin")
CHECKPOINT = golden_data.DEMO / "checkpoint_4200"
COMMAND = (
    *(sys.executable, "-m", "qmoe_jax", "compress", f"--gin.CHECKPOINT='{CHECKPOINT}'"),
    *("--gin.TOKENS=None", "--gin.CompressionSettings.method='rtn'"),
)


def test_an_interrupted_compression_goes_on(tmp_path):
    def start(output):
        return subprocess.Popen(
            [*COMMAND, f"--gin.OUTPUT='{output}'"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
        )

    process = start("stopped")
    deadline = time.monotonic() + 120
    # Layers are streamed into the unfinished output.
    while not (tmp_path / "stopped.partial").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    last = errors.splitlines()[-1]
    assert last == "qmoe-jax compress: interrupted; the same command goes on where it was"
    assert not (tmp_path / "stopped").exists()

    for output in ("stopped", "undisturbed"):
        process = start(output)
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    assert same_tree(tmp_path / "stopped", tmp_path / "undisturbed")


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "--list"]])
def test_a_reader_that_has_had_enough(arguments):
    process = subprocess.Popen(
        [*COMMAND[:3], *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=120) == 141
    assert errors == ""
