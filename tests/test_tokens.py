"""The token file: round trip, batches, and every way in which it can be wrong."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from golden_data import DEMO

from qmoe_jax.calibration import tokens
from qmoe_jax.errors import TokensError

METADATA = tokens.TokenMetadata(
    task="test",
    split="train",
    vocabulary_size=4068,
    sentinel_first=3968,
    sentinel_count=100,
    eos_id=1,
    seed=0,
    source="random ids",
)


def random_batch(num_examples=7, inputs_length=9, targets_length=6):
    rng = np.random.default_rng(0)
    inputs = [
        rng.integers(2, 4068, rng.integers(1, inputs_length + 1)) for _ in range(num_examples)
    ]
    targets = [
        rng.integers(2, 4068, rng.integers(1, targets_length + 1)) for _ in range(num_examples)
    ]
    return tokens.from_sequences(
        inputs, targets, inputs_length=inputs_length, targets_length=targets_length
    )


def assert_equal(left, right):
    for name in tokens.ARRAY_NAMES:
        np.testing.assert_array_equal(getattr(left, name), getattr(right, name))


def rewrite(path, **changes):
    """Replaces entries of an .npz; None drops one."""
    with np.load(path) as archive:
        entries = {name: archive[name] for name in archive.files}
    entries.update(changes)
    np.savez(path, **{name: array for name, array in entries.items() if array is not None})


def rewrite_header(path, **changes):
    with np.load(path) as archive:
        header = json.loads(archive["header"].tobytes())
    header.update(changes)
    rewrite(path, header=np.frombuffer(json.dumps(header).encode(), np.uint8))


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "folder" / "tokens.npz"
    tokens.write_tokens(path, random_batch(), METADATA)
    return path


def test_round_trip(path):
    read = tokens.read_tokens(path, num_embeddings=4096)
    assert read.metadata == METADATA
    assert len(read) == read.tokens.num_real == 7
    assert_equal(read.tokens, random_batch())


def test_equal_contents_give_equal_bytes_and_no_temporary_stays(path, tmp_path):
    other = tmp_path / "other.npz"
    tokens.write_tokens(other, random_batch(), METADATA)
    assert other.read_bytes() == path.read_bytes()
    assert os.listdir(path.parent) == ["tokens.npz"]


def test_a_failed_write_leaves_the_old_file(path, monkeypatch):
    before = path.read_bytes()

    def fail(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez_compressed", fail)
    with pytest.raises(OSError, match="disk full"):
        tokens.write_tokens(path, random_batch(3), METADATA)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["tokens.npz"]


def test_from_sequences_pads_and_shifts():
    batch = tokens.from_sequences(
        [np.array([5, 6, 1])], [np.array([7, 8, 1])], inputs_length=5, targets_length=5
    )
    assert batch.encoder_input_tokens.tolist() == [[5, 6, 1, 0, 0]]
    assert batch.decoder_target_tokens.tolist() == [[7, 8, 1, 0, 0]]
    assert batch.decoder_input_tokens.tolist() == [[0, 7, 8, 0, 0]]
    assert batch.decoder_loss_weights.tolist() == [[1, 1, 1, 0, 0]]
    assert batch.num_target_tokens == 3


def test_from_sequences_cuts_nothing_off():
    with pytest.raises(TokensError, match=r"inputs of 3 tokens.*raise inputs_length to at least 3"):
        tokens.from_sequences(
            [np.array([5, 6, 1])], [np.array([1])], inputs_length=2, targets_length=2
        )
    with pytest.raises(TokensError, match="0 inputs"):
        tokens.from_sequences([], [], inputs_length=2, targets_length=2)


def test_batches_are_full_and_say_what_is_real(path):
    read = tokens.read_tokens(path)
    batches = list(read.batches(3))
    assert [batch.num_real for batch in batches] == [3, 3, 1]
    assert all(len(batch) == 3 for batch in batches)
    for name in tokens.ARRAY_NAMES:
        joined = np.concatenate([getattr(batch, name) for batch in batches])
        np.testing.assert_array_equal(joined[:7], getattr(read.tokens, name))
        assert not joined[7:].any()
    assert_equal(read[2:4].tokens, next(read[2:].batches(2)))
    with pytest.raises(TokensError, match="batch_size is 0"):
        next(read.batches(0))


def test_sentinels():
    ids = np.array([[0, 3967, 3968, 4067, 4068]])
    assert METADATA.is_sentinel(ids).tolist() == [[False, False, True, True, False]]


def test_missing(tmp_path):
    with pytest.raises(TokensError, match=r"There is no token file .*absent\.npz; write one"):
        tokens.read_tokens(tmp_path / "absent.npz")


@pytest.mark.parametrize("num_bytes", [0, 10, 500, -1])
def test_truncated(path, num_bytes):
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(TokensError, match=r"is no complete \.npz"):
        tokens.read_tokens(path)


def test_single_array_is_no_token_file(path):
    with open(path, "wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(TokensError, match=r"is no complete \.npz"):
        tokens.read_tokens(path)


def test_wrong_version(path):
    rewrite_header(path, version=2)
    with pytest.raises(TokensError, match=r"version 2; this program reads .* version 1"):
        tokens.read_tokens(path)


def test_damaged_header(path):
    rewrite(path, header=np.frombuffer(b"{", np.uint8))
    with pytest.raises(TokensError, match=r"header of .* is damaged"):
        tokens.read_tokens(path)


def test_incomplete_metadata(path):
    rewrite_header(path, metadata={"task": "test"})
    with pytest.raises(TokensError, match=r"metadata of .* needed are .*'eos_id'"):
        tokens.read_tokens(path)


def test_altered_array(path):
    altered = random_batch().encoder_input_tokens.copy()
    altered[0, 0] += 1
    rewrite(path, encoder_input_tokens=altered)
    with pytest.raises(TokensError, match=r"sha256 .* was altered"):
        tokens.read_tokens(path)


def test_array_missing_or_mis_shaped(path):
    rewrite(path, decoder_loss_weights=None)
    with pytest.raises(TokensError, match=r"lacks integer arrays \['decoder_loss_weights'\]"):
        tokens.read_tokens(path)
    rewrite(path, decoder_loss_weights=np.zeros((7, 5), np.int32))
    with pytest.raises(TokensError, match=r"one \[examples, targets_length\]"):
        tokens.read_tokens(path)
    rewrite(path, decoder_loss_weights=np.zeros((7, 6), np.float32))
    with pytest.raises(TokensError, match="float32"):
        tokens.read_tokens(path)


def test_other_vocabulary(path):
    with pytest.raises(TokensError, match=r"model has 100 embeddings.*another vocabulary"):
        tokens.read_tokens(path, num_embeddings=100)


def test_write_refuses(tmp_path):
    batch = random_batch()
    small = dataclasses.replace(METADATA, vocabulary_size=100)
    with pytest.raises(TokensError, match="vocabulary has 0 to 99"):
        tokens.write_tokens(tmp_path / "a.npz", batch, small)
    with pytest.raises(TokensError, match=r"4 of 7 examples .* are filler"):
        tokens.write_tokens(tmp_path / "a.npz", dataclasses.replace(batch, num_real=3), METADATA)
    doubled = dataclasses.replace(batch, decoder_loss_weights=2 * batch.decoder_loss_weights)
    with pytest.raises(TokensError, match="not all 0 or 1"):
        tokens.write_tokens(tmp_path / "a.npz", doubled, METADATA)
    arrays = {name: array[:0] for name, array in batch.arrays().items()}
    with pytest.raises(TokensError, match="no examples"):
        tokens.write_tokens(tmp_path / "a.npz", tokens.TokenBatch(**arrays, num_real=0), METADATA)
    assert os.listdir(tmp_path) == []


def test_the_digest_that_runs_record(path):
    """Of the bytes alone, whatever the file; the header's covers shapes too."""
    found = tokens.read_tokens(path)
    content = b"".join(array.tobytes() for array in found.tokens.arrays().values())
    assert found.sha256() == hashlib.sha256(content).hexdigest()
    assert found[:1].sha256() != found.sha256()


def test_plain_arrays_of_the_demo(tmp_path):
    path = DEMO / "validation_tokens.npz"
    read = tokens.read_plain_tokens(path, METADATA, num_embeddings=4096)
    assert read.tokens.encoder_input_tokens.shape == (1024, 128)
    assert read.tokens.num_target_tokens == 29696
    with np.load(path) as archive:
        np.testing.assert_array_equal(
            read.tokens.decoder_input_tokens, archive["decoder_input_tokens"].reshape(-1, 32)
        )
    # The file follows the rule of from_sequences for the decoder's inputs.
    rebuilt = tokens.from_sequences(
        list(read.tokens.encoder_input_tokens),
        [row[row != 0] for row in read.tokens.decoder_target_tokens],
        inputs_length=128,
        targets_length=32,
    )
    assert_equal(rebuilt, read.tokens)
    with pytest.raises(TokensError, match=r"no header.*read_plain_tokens"):
        tokens.read_tokens(path)
    with pytest.raises(TokensError, match="model has 4000 embeddings"):
        tokens.read_plain_tokens(path, METADATA, num_embeddings=4000)
    np.savez(tmp_path / "other.npz", encoder_input_tokens=np.zeros((2, 3), np.int64))
    with pytest.raises(TokensError, match="lacks integer arrays"):
        tokens.read_plain_tokens(tmp_path / "other.npz", METADATA)


def test_reading_needs_no_tensorflow():
    program = (
        "import sys, qmoe_jax.calibration.tokens, qmoe_jax.cli.prepare_tokens, "
        "qmoe_jax.calibration.tasks, qmoe_jax.demo.docstrings\n"
        "heavy = {'tensorflow', 'seqio', 'tensorflow_datasets', 'jax'} & set(sys.modules)\n"
        "sys.exit(repr(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
