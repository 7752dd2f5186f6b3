"""Compressed checkpoints written to gs://: the same files as on a disk, the manifest last."""

from fake_gcs import run_with_gcs

_RECODE = """
import sys
from functools import partial
from qmoe_jax.checkpoints.compressed import open_compressed_checkpoint
from qmoe_jax.checkpoints.recode import recode_checkpoint
from qmoe_jax.errors import CheckpointError
source, first, second, stored = sys.argv[1:]
recode = partial(recode_checkpoint, progress=False)
recode(source, first, "qmoe")
recode(first, second, "tunstall")
recode(source, stored, "qmoe")
print(len(open_compressed_checkpoint(stored).specs))
try:
    recode(first, stored, "tunstall")
except CheckpointError as error:
    print(str(error).partition(";")[0])
recode(first, stored, "tunstall", overwrite=True)
"""


def contents(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_files_are_those_of_a_local_checkpoint(gptq, tmp_path):
    """Written, refused, and replaced by one in another coding, whose arrays are other ones."""
    root, written = tmp_path / "root", []
    outputs = [tmp_path / "first", tmp_path / "second", "gs://bucket/mine/out"]
    said = run_with_gcs(_RECODE, [gptq[0], *outputs], root, tmp_path, written)
    assert said == ["8", "gs://bucket/mine/out exists already"]
    assert contents(root / "mine" / "out") == contents(tmp_path / "second")
    assert written.count("mine/out/manifest.json") == 2
    assert written[-1] == "mine/out/manifest.json"
