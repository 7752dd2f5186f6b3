"""A short part of fuzz_codec.py; the full run is a command."""

import fuzz_codec
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
