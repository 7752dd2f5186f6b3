"""How arrays of a compressed checkpoint lie on disk."""

import json

import ml_dtypes
import numpy as np
import pytest

from qmoe_jax.checkpoints import stored_arrays
from qmoe_jax.checkpoints.storage import open_folder
from qmoe_jax.checkpoints.stored_arrays import (
    ArrayPartWriter,
    array_entry,
    create_array,
    finish_read,
    start_read,
    write_array,
)
from qmoe_jax.errors import CheckpointError


def on_disk(path):
    files = [file for file in path.iterdir() if not file.name.startswith(".")]
    return json.loads((path / ".zarray").read_text()), sorted(f.stat().st_size for f in files)


def read(folder, entry):
    return finish_read(folder, "it", entry, start_read(folder, entry))


@pytest.mark.parametrize(("length", "chunk"), [(250, 84), (200, 100), (99, 99), (101, 51), (0, 1)])
def test_chunks_are_even(tmp_path, monkeypatch, length, chunk):
    """The last chunk is stored in full: 84 bytes three times, not 100."""
    monkeypatch.setattr(stored_arrays, "CHUNK_BYTES", 100)
    folder = open_folder(tmp_path)
    array = np.arange(length).astype(np.uint8)
    entry = write_array(folder, "words", array)
    metadata, sizes = on_disk(tmp_path / "words")
    assert metadata["chunks"] == [chunk]
    assert metadata["compressor"] is None
    assert sizes == [chunk] * -(-length // chunk)
    np.testing.assert_array_equal(read(folder, entry), array)


def test_compressed_chunks(tmp_path, monkeypatch):
    """Parts that two writers append to a shared chunk; any damage is found."""
    monkeypatch.setattr(stored_arrays, "CHUNK_BYTES", 1000)
    folder = open_folder(tmp_path)
    array = np.zeros((100, 10), ml_dtypes.bfloat16)
    array[::7] = 1.5
    create_array(folder, "norm", "bfloat16", array.shape, compressed=True)
    first, second = (ArrayPartWriter(folder, "norm", start) for start in (0, 70))
    second.append(array[70:])
    first.append(array[:30])
    first.append(array[30:70])
    checksums = [[70, first.close()], [100, second.close()]]
    entry = array_entry("norm", "bfloat16", array.shape, checksums)
    metadata, sizes = on_disk(tmp_path / "norm")
    assert metadata["chunks"] == [50, 10]
    assert metadata["compressor"] == {"id": "gzip", "level": 1}
    assert sum(sizes) < array.nbytes / 4
    np.testing.assert_array_equal(read(folder, entry), array)

    again = open_folder(tmp_path / "again")
    write_array(again, "norm", array, compressed=True)
    for name in ("0.0", "1.0", ".zarray"):  # equal bytes, whoever wrote them
        assert (tmp_path / "again" / "norm" / name).read_bytes() == (
            tmp_path / "norm" / name
        ).read_bytes()

    chunk = tmp_path / "norm" / "1.0"
    content = chunk.read_bytes()
    for damaged in (content[: len(content) // 2], b"", content[:-8] + bytes(8), bytes(40)):
        chunk.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="copy the checkpoint again"):
            read(open_folder(tmp_path), entry)
