"""Damaged compressed checkpoints: each is refused, and the damage named."""

import json
import shutil

import pytest
from stored_files import change_coded, flipped

import qmoe_jax
from qmoe_jax.errors import CheckpointError


class TestDamagedCompressedCheckpoint:
    @pytest.fixture
    def path(self, gptq, tmp_path):
        return shutil.copytree(gptq[0], tmp_path / "copy")

    def test_a_flipped_bit(self, path):
        change_coded(path, "encoder/layers_1/mlp/expert/wi", "words", flipped)
        with pytest.raises(CheckpointError, match=r"wi/words .* checksum"):
            qmoe_jax.load_switch(path)

    def test_a_truncated_chunk(self, path):
        chunk = path / "coded/packed/0"
        chunk.write_bytes(chunk.read_bytes()[:-3])
        with pytest.raises(CheckpointError, match=r"in .*coded/packed|from .*coded/packed"):
            qmoe_jax.load_switch(path)

    def test_a_missing_chunk(self, path):
        (path / "coded/packed/0").unlink()
        with pytest.raises(CheckpointError, match="cannot read .* from .*coded/packed"):
            qmoe_jax.load_switch(path)

    def test_a_missing_array(self, path):
        shutil.rmtree(path / "dense/packed")
        with pytest.raises(CheckpointError, match="cannot read .* from .*dense/packed"):
            qmoe_jax.load_switch(path)

    def test_a_truncated_manifest(self, path):
        manifest = path / "manifest.json"
        manifest.write_bytes(manifest.read_bytes()[:200])
        with pytest.raises(CheckpointError, match=r"manifest.json"):
            qmoe_jax.load_switch(path)

    def test_another_version(self, path):
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["format_version"] = 99
        (path / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(CheckpointError, match="version 99; this version reads"):
            qmoe_jax.load_switch(path)

    def test_nothing_there(self, tmp_path):
        with pytest.raises(CheckpointError):
            qmoe_jax.load_switch(tmp_path / "nothing")
