"""Files that are there whole or not at all, whatever stops the writing."""

import json
import os
import signal
import subprocess
import sys

import pytest

from qmoe_jax import atomic_file
from qmoe_jax.atomic_file import open_atomically, write_atomically, write_json
from qmoe_jax.errors import CheckpointError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_file_appears_when_its_content_is_whole(tmp_path):
    path = tmp_path / "x"
    with open_atomically(path) as file:
        file.write(b"one")
        assert not path.exists()
    assert path.read_bytes() == b"one"
    with open_atomically(str(path)) as file:
        file.write(b"two")
        assert path.read_bytes() == b"one"
    assert path.read_bytes() == b"two"
    assert names(tmp_path) == ["x"]


def test_content_is_on_disk_before_the_name_is(tmp_path, monkeypatch):
    steps = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, r=real: (steps.append(n), r(*a))[1])
    write_atomically(tmp_path / "x", b"one")
    assert steps == ["fsync", "replace"]


@pytest.mark.parametrize("at", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, at):
    write_atomically(tmp_path / "x", b"old")

    def fail(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, at, fail)
        with pytest.raises(CheckpointError, match="no space left.*free some space"):
            write_atomically(tmp_path / "x", b"new")
        with pytest.raises(OSError, match="no space left"), open_atomically(tmp_path / "x"):
            pass
    assert names(tmp_path) == ["x"]
    assert (tmp_path / "x").read_bytes() == b"old"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_block_that_raises_leaves_nothing(tmp_path, error):
    def write_half():
        with open_atomically(tmp_path / "x") as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        write_half()
    assert names(tmp_path) == []


@pytest.mark.parametrize("old", [None, b"old"])
def test_killed_before_the_rename_the_old_file_stays(tmp_path, old):
    """What a killed process left is removed by the next one."""
    path = tmp_path / "x"
    if old is not None:
        path.write_bytes(old)
    program = (
        "import os, signal, sys\n"
        "from qmoe_jax.atomic_file import write_atomically\n"
        "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_atomically(sys.argv[1], b'new')\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, str(path)])
    assert killed.returncode == -signal.SIGKILL
    assert (path.read_bytes() if path.exists() else None) == old
    write_atomically(path, b"newer")
    assert names(tmp_path) == ["x"]
    assert path.read_bytes() == b"newer"


def test_two_processes_at_once_do_not_meet(tmp_path):
    """The other one writes in the middle of ours, and its content is there until ours is whole."""
    path = tmp_path / "x"
    other = (
        "import sys\nfrom qmoe_jax.atomic_file import write_atomically\n"
        "write_atomically(sys.argv[1], b'theirs')\n"
    )
    with open_atomically(path) as file:
        file.write(b"ours")
        subprocess.run([sys.executable, "-c", other, str(path)], check=True)
        assert path.read_bytes() == b"theirs"
    assert path.read_bytes() == b"ours"
    assert names(tmp_path) == ["x"]


def test_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in ("absent", "file"):
        path = tmp_path / folder / "x"
        with pytest.raises(CheckpointError, match=rf"cannot write .*{folder}/x \(.*free some"):
            write_atomically(path, b"")
        with pytest.raises(OSError, match=folder), open_atomically(path):
            pass


def test_json(tmp_path):
    write_json(tmp_path / "x.json", {"b": [1], "a": "\u00e9"})
    assert (tmp_path / "x.json").read_bytes() == b'{\n "b": [\n  1\n ],\n "a": "\\u00e9"\n}\n'
    write_json(tmp_path / "x.json", {"b": 1, "a": 2}, indent=2, sort_keys=True)
    assert (tmp_path / "x.json").read_text() == '{\n  "a": 2,\n  "b": 1\n}\n'
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", atomic_file)
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 2, "b": 1}
    assert names(tmp_path) == ["x.json"]
