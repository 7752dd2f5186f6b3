"""Folders of resumable runs: settings, the lock, files that are whole or not at all."""

import pytest

from qmoe_jax.atomic_file import write_atomically
from qmoe_jax.errors import CheckpointError
from qmoe_jax.run_folder import RunFolder, difference


def test_the_same_settings_go_on_and_others_are_refused(tmp_path):
    settings = {"model": {"path": "a", "step": 3}, "seed": 0}
    with RunFolder(tmp_path / "run", settings) as folder:
        write_atomically(folder.path / "part.npz", b"part")
    with RunFolder(tmp_path / "run", settings):
        pass
    other = {"model": {"path": "a", "step": 4}, "seed": 0}
    for _ in range(2):  # a refusal lets go of the lock
        with pytest.raises(CheckpointError, match=r"other settings \(model\.step: 3 became 4\)"):
            RunFolder(tmp_path / "run", other)
    assert (tmp_path / "run" / "part.npz").read_bytes() == b"part"
    with RunFolder(tmp_path / "run", other, discard=True) as folder:
        assert not list(folder.path.glob("*.npz"))
    with RunFolder(tmp_path / "run", other):
        pass


def test_one_process_at_a_time(tmp_path):
    with (
        RunFolder(tmp_path, {}),
        pytest.raises(CheckpointError, match="another process is working in"),
    ):
        RunFolder(tmp_path, {})
    RunFolder(tmp_path, {}).close()


def test_damaged_settings_are_other_settings(tmp_path):
    (tmp_path / "run.json").write_text('{"seed": ')
    with pytest.raises(CheckpointError, match="seed: None became 0"):
        RunFolder(tmp_path, {"seed": 0})


def test_what_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        CheckpointError, match=r"cannot write .*file; choose|cannot write .*file \("
    ):
        RunFolder(tmp_path / "file", {})


def test_difference_names_a_few():
    before, now = ({str(i): i + shift for i in range(12)} for shift in (0, 1))
    text = difference(before, now)
    assert text.startswith("0: 0 became 1; ")
    assert text.endswith("; and 4 more")
    assert difference({"a": {"b": 1}}, {"a": {}}) == "a.b: 1 became None"
