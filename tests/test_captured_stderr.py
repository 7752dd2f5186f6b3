"""What libraries write to the process's stderr: kept back, or shown where it explains an error."""

import os
import subprocess
import sys

import golden_data
import pytest
from markers import slow

from qmoe_jax.captured_stderr import captured_stderr

VOCABULARY = golden_data.DEMO / "sentencepiece.model"


def noise(error=None):
    """What C++ writes."""
    with captured_stderr():
        os.write(2, b"I0000 00:00:1 port.cc:153] oneDNN custom operations are on.\n")
        os.write(2, b"E0000 cuda_platform.cc:52] failed call to cuInit\n")
        if error is not None:
            raise error
    os.write(2, b"after\n")


def test_kept_back(capfd):
    noise()
    assert capfd.readouterr().err == "after\n"


def test_shown_where_the_block_fails(capfd):
    with pytest.raises(ImportError):
        noise(ImportError("a symbol is missing"))
    shown = capfd.readouterr().err
    assert "oneDNN" in shown
    assert "cuInit" in shown


def test_an_interruption_is_no_failure(capfd):
    with pytest.raises(KeyboardInterrupt):
        noise(KeyboardInterrupt())
    assert capfd.readouterr().err == ""


def test_without_a_stderr():
    """Closed by the shell, `2>&-`."""
    program = "import qmoe_jax.captured_stderr as c\nwith c.captured_stderr(): print('done')"
    command = f'exec "{sys.executable}" -c "{program}" 2>&-'
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "done\n")


@pytest.mark.parametrize("level", ["0", *slow(None, "3")])
def test_tensorflow_starts_without_a_line(tmp_path, level):
    """Whatever its own setting is; also where it looks for GPUs, and where a data set ends."""
    pytest.importorskip("seqio")
    (tmp_path / "a.txt").write_text("Return the number of the array. " * 60)
    environment = {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}
    if level is not None:
        environment["TF_CPP_MIN_LOG_LEVEL"] = level
    result = subprocess.run(
        [
            *(sys.executable, "-m", "qmoe_jax", "prepare-tokens", "--source", "text", "--files"),
            *("a.txt", "--vocabulary", VOCABULARY, "--inputs_length", "32", "--output", "x.npz"),
        ],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stderr.splitlines() if not line.startswith("note: ")]
    if level != "0":  # then its later lines are wanted
        assert lines == []
    assert not [line for line in lines if "oneDNN" in line or "cuInit" in line or "CUDA" in line]
