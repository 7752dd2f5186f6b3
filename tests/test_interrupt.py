"""Ctrl-C: one line that says how to go on, no traceback, and the same command does go on.

A reader that closes its end of a pipe is no mistake either.
"""

import gc
import os
import pty
import signal
import subprocess
import sys
import time

import golden_data
import pytest
from command import start_and_wait
from factories import same_tree

from qmoe_jax.__main__ import main

pytest.importorskip("gin")
CHECKPOINT = golden_data.DEMO / "checkpoint_4200"
PROGRAM = (sys.executable, "-m", "qmoe_jax")
# A shell's background jobs, and so their children, begin with SIGINT ignored.
INTERRUPTIBLE = (
    "import runpy, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "sys.argv[0] = 'qmoe-jax'; runpy.run_module('qmoe_jax', run_name='__main__')"
)
ARGUMENTS = (
    *("compress", f"--gin.CHECKPOINT='{CHECKPOINT}'"),
    *("--gin.TOKENS=None", "--gin.CompressionSettings.method='rtn'"),
)


@pytest.mark.slow
def test_an_interrupted_compression_goes_on(tmp_path):
    process = start_and_wait(
        *("qmoe_jax.pipeline.expert_layer", "quantize_batch", 1),
        *(*ARGUMENTS, "--gin.OUTPUT='stopped'"),
        stderr=subprocess.PIPE,
        cwd=tmp_path,
    )
    # Layers are streamed into the unfinished output.
    assert (tmp_path / "stopped.partial").exists()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    last = errors.splitlines()[-1]
    assert last == "qmoe-jax compress: interrupted; the same command goes on where it was"
    assert not (tmp_path / "stopped").exists()

    for output in ("stopped", "undisturbed"):
        done = subprocess.run(
            [*PROGRAM, *ARGUMENTS, f"--gin.OUTPUT='{output}'"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
    assert same_tree(tmp_path / "stopped", tmp_path / "undisturbed")


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "--list"]])
def test_a_reader_that_has_had_enough(arguments):
    closed, stdout = os.pipe()
    os.close(closed)
    try:
        done = subprocess.run(
            [*PROGRAM, *arguments], stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=120
        )
    finally:
        os.close(stdout)
    assert done.returncode == 141
    assert done.stderr == ""


def test_an_interruption_inside_a_callback_is_not_lost(monkeypatch, capsys):
    """Python drops exceptions of the garbage collector's callbacks, of which JAX has one."""
    pressed = []

    def callback(phase, info):
        if not pressed:
            pressed.append(phase)
            raise KeyboardInterrupt

    def interrupted(arguments):
        gc.callbacks.append(callback)
        gc.collect()
        time.sleep(20)
        return 0

    monkeypatch.setattr("qmoe_jax.cli.inspect.main", interrupted)
    hook = sys.unraisablehook
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert main(["inspect"]) == 130
    finally:
        signal.signal(signal.SIGINT, previous)
        gc.callbacks.remove(callback)
    assert pressed
    assert "qmoe-jax inspect: interrupted" in capsys.readouterr().err
    assert sys.unraisablehook is hook


def test_ctrl_c_at_the_prompt_of_infer_ends_it():
    """As Ctrl-D does: nothing is being done that a later run could go on with."""
    pytest.importorskip("sentencepiece")
    vocabulary = golden_data.DEMO / "sentencepiece.model"
    bindings = [f"--gin.CHECKPOINT='{CHECKPOINT}'", f"--gin.VOCABULARY='{vocabulary}'"]
    terminal, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTIBLE, "infer", *bindings],
        stdin=theirs,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(theirs)
    assert process.stderr is not None
    assert "Ctrl-D ends" in process.stderr.readline()
    assert process.stderr.read(2) == "> "
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    os.close(terminal)
    assert process.returncode == 0, errors
    assert "interrupted" not in errors
