"""A short part of fuzz_codec.py and of fuzz_coverage.py; the full runs are commands."""

import random

import fuzz_codec
import fuzz_coverage
import independent_reader
import numpy as np
import pytest

from qmoe_jax.codec import codings

COUNT = 1000
LIMITS = {"seed": 1, "max_compiled": 2}


def test_damaged_tensors_are_refused_or_decode_as_the_reference_does():
    fuzzer = fuzz_codec.fuzz(range(COUNT), **LIMITS)
    counts = fuzzer.report()
    assert set(counts) == {*codings.coding_names(), "total"}
    for coding in codings.coding_names():
        # The run is worth something: both outcomes occur, and XLA takes part.
        for outcome in ("refused", "changed", "decoded"):
            assert counts[coding].get(outcome), (coding, outcome, counts)
    assert counts["total"]["refused_decoded"] > 0


def test_a_decoder_that_is_wrong_is_found(monkeypatch):
    decode = fuzz_codec.decode_expert
    monkeypatch.setattr(fuzz_codec, "decode_expert", lambda *args: decode(*args) ^ 1)
    with pytest.raises(fuzz_codec.Finding, match="differently.*(.|\n)*--first"):
        fuzz_codec.fuzz(range(COUNT), **LIMITS)


def test_a_reader_that_lets_damage_pass_is_found(monkeypatch):
    monkeypatch.setattr(fuzz_codec.codings, "validate", lambda coded: None)
    with pytest.raises(fuzz_codec.Finding):
        fuzz_codec.fuzz(range(COUNT), **LIMITS)


def test_guided_inputs_of_tensors(monkeypatch):
    """Valid seeds, and damage to them, without atheris; a reader that is wrong is found."""
    target = fuzz_coverage.Tensors()
    seeds, rng = target.seeds(), random.Random(0)
    for seed in seeds[::6]:
        target(seed)
        for _ in range(2):
            data = bytearray(seed)
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            target(bytes(data[: rng.choice((len(data), rng.randrange(len(data))))]))
    read = independent_reader.read_tensor
    wrong = {
        "different codes": lambda *arguments: (read(*arguments)[0] + 1, None),
        "theirs refuses": lambda *arguments: independent_reader.require(False, "no"),
    }
    for message, reader in wrong.items():
        monkeypatch.setattr(independent_reader, "read_tensor", reader)
        with pytest.raises(fuzz_coverage.Finding, match=message):
            target(seeds[0])


def test_guided_inputs_of_checkpoints(monkeypatch):
    """Some edits of each kind, and none; a reader that accepts all is found."""
    target = fuzz_coverage.Checkpoints()
    try:
        rng = np.random.default_rng(1)
        target(b"")
        for _ in range(30):
            target(rng.bytes(6 * int(rng.integers(1, 4))))
        read = independent_reader.read_checkpoint
        found = read(target.path)
        monkeypatch.setattr(independent_reader, "read_checkpoint", lambda path: found)
        with pytest.raises(fuzz_coverage.Finding, match="ours: .*; theirs: accepted"):
            target(b"\xff\xff\0\xff\0\0")  # one of the files is cut to nothing
    finally:
        target.close()
