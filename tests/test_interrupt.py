"""Ctrl-C: one line that says how to go on, no traceback, and the same command does go on.

A reader that closes its end of a pipe is no mistake either.
"""

import os
import signal
import subprocess
import sys

import golden_data
import pytest
from factories import same_tree

pytest.importorskip("gin")
CHECKPOINT = golden_data.DEMO / "checkpoint_4200"
ARGUMENTS = (
    *("compress", f"--gin.CHECKPOINT='{CHECKPOINT}'"),
    *("--gin.TOKENS=None", "--gin.CompressionSettings.method='rtn'"),
)
COMMAND = (sys.executable, "-m", "qmoe_jax")

# The same command, which waits for its signal in its second layer. A shell's background jobs begin
# with the signal ignored, and so do their children.
WAITING_COMMAND = (
    sys.executable,
    "-c",
    """
import runpy, signal, time
from qmoe_jax.pipeline import expert_layer

def quantize_batch(batch, *arguments, compute=expert_layer.quantize_batch, layers=[]):
    if layers:
        print("waiting", flush=True)
        time.sleep(600)
    layers.append(batch)
    return compute(batch, *arguments)

expert_layer.quantize_batch = quantize_batch
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("qmoe_jax", run_name="__main__", alter_sys=True)
""",
)


def test_an_interrupted_compression_goes_on(tmp_path):
    def start(command, output):
        return subprocess.Popen(
            [*command, *ARGUMENTS, f"--gin.OUTPUT='{output}'"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
        )

    process = start(WAITING_COMMAND, "stopped")
    assert process.stdout is not None
    waiting = process.stdout.readline()
    # Layers are streamed into the unfinished output.
    unfinished = (tmp_path / "stopped.partial").exists()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert (waiting, unfinished) == ("waiting\n", True), errors
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    last = errors.splitlines()[-1]
    assert last == "qmoe-jax compress: interrupted; the same command goes on where it was"
    assert not (tmp_path / "stopped").exists()

    for output in ("stopped", "undisturbed"):
        process = start(COMMAND, output)
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    assert same_tree(tmp_path / "stopped", tmp_path / "undisturbed")


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "--list"]])
def test_a_reader_that_has_had_enough(arguments):
    closed, stdout = os.pipe()
    os.close(closed)
    try:
        done = subprocess.run(
            [*COMMAND, *arguments], stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=120
        )
    finally:
        os.close(stdout)
    assert done.returncode == 141
    assert done.stderr == ""
