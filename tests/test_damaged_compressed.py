"""Damaged compressed checkpoints: each is refused, and the damage named."""

import json
import shutil

import pytest

import qmoe_jax
from qmoe_jax.errors import CheckpointError


class TestDamagedCompressedCheckpoint:
    @pytest.fixture
    def path(self, gptq, tmp_path):
        return shutil.copytree(gptq[0], tmp_path / "copy")

    def chunk(self, path, array):
        (folder,) = path.glob(f"coded/*encoder.layers_1*.wi/{array}")
        return next(file for file in sorted(folder.iterdir()) if not file.name.startswith("."))

    def test_a_flipped_bit(self, path):
        chunk = self.chunk(path, "words")
        content = bytearray(chunk.read_bytes())
        content[7] ^= 4
        chunk.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"wi/words .* checksum"):
            qmoe_jax.load_switch(path)

    def test_a_truncated_chunk(self, path):
        chunk = self.chunk(path, "levels")
        chunk.write_bytes(chunk.read_bytes()[:-3])
        with pytest.raises(CheckpointError, match="wi/levels"):
            qmoe_jax.load_switch(path)

    def test_a_missing_chunk(self, path):
        self.chunk(path, "levels").unlink()
        with pytest.raises(CheckpointError, match="wi/levels"):
            qmoe_jax.load_switch(path)

    def test_a_missing_array(self, path):
        shutil.rmtree(next(path.glob("dense/encoder.encoder_norm.scale")))
        with pytest.raises(CheckpointError, match="encoder/encoder_norm/scale"):
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
