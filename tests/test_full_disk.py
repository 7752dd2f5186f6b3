"""A full disk: the run says so, keeps what is finished, and goes on once there is room."""

import shutil
import subprocess

import pytest
from factories import CALIBRATION, TERNARY, same_tree

import qmoe_jax
from qmoe_jax.errors import CheckpointError


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, and a function that sets its size in KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    made = mount and subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True, text=True
    )
    if not made or made.returncode:
        pytest.skip("no file system can be mounted here (it needs root)")

    def resize(kib):
        options = f"remount,size={kib}k"
        subprocess.run([mount, "-o", options, folder], check=True)

    yield folder, resize
    subprocess.run(["umount", folder], check=True)


def test_a_run_on_a_full_disk_goes_on_with_the_same_bytes(base, small_disk, tmp_path):
    folder, resize = small_disk
    qmoe_jax.compress(base, tmp_path / "undisturbed", CALIBRATION, **TERNARY)
    refused = 0
    # From no room for the journal to no room for the manifest.
    for kib in (64, 300, 360, 420, 480, 540, 600):
        resize(kib)
        try:
            qmoe_jax.compress(base, folder / "out", CALIBRATION, **TERNARY)
        except CheckpointError as error:
            assert "cannot write" in str(error)  # noqa: PT017 - how often is not known
            assert not (folder / "out").exists()
            refused += 1
        else:
            break
    assert refused >= 3
    resize(16_000)
    if not (folder / "out").exists():
        report = qmoe_jax.compress(base, folder / "out", CALIBRATION, **TERNARY)
        assert report.num_replayed > 0
    assert same_tree(folder / "out", tmp_path / "undisturbed")


def test_no_room_for_hidden_states(base, small_disk, tmp_path):
    folder, _ = small_disk
    with pytest.raises(CheckpointError, match="cannot reserve .* choose another buffer_dir"):
        qmoe_jax.compress(base, tmp_path / "out", CALIBRATION, buffer_dir=folder, **TERNARY)
    assert not (tmp_path / "out").exists()
