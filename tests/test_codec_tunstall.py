"""The "tunstall" codings: dictionaries, encoder, walk, expansion, size."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qmoe_jax.codec
from qmoe_jax.codec import codings, reference
from qmoe_jax.codec.coding_tunstall import _narrow
from qmoe_jax.codec.decode import decode_expert
from qmoe_jax.codec.encode import encode
from qmoe_jax.codec.stats import bits
from qmoe_jax.codec.tensor import TensorSpec, in_words
from qmoe_jax.codec.tunstall import (
    NUM_DICTIONARIES,
    ZERO_WEIGHTS,
    choose_dictionary,
    tunstall_family,
)
from qmoe_jax.codec.tunstall_rows import encode_rows, walk_rows
from qmoe_jax.errors import CodecError

BFLOAT16 = ml_dtypes.bfloat16
FORMAT = Path(qmoe_jax.codec.__file__).with_name("FORMAT.md").read_text(encoding="utf-8")
NAMES = {"tunstall": 0, "tunstall_2bit": 8}


def random_symbols(shape, zero_share=0.8, num_symbols=3, seed=0):
    rng = np.random.default_rng(seed)
    rest = [0.5, 0.5] if num_symbols == 3 else [0.48, 0.48, 0.04]
    shares = [zero_share, *((1 - zero_share) * np.array(rest))]
    return rng.choice(num_symbols, size=shape, p=shares).astype(np.uint8)


class TestDictionaries:
    @pytest.mark.parametrize("coding", NAMES)
    @pytest.mark.parametrize("number", [0, 5, 9])
    def test_are_those_of_the_slow_builder(self, coding, number):
        family = tunstall_family(NAMES[coding])
        entries = reference.tunstall_entries(number, NAMES[coding])
        assert len(entries) == 256 - NAMES[coding]
        for codeword, entry in enumerate(entries):
            low, high = family.table[number, codeword].tolist()
            stored = low | high << 32
            assert stored & 63 == len(entry) == family.lengths[number, codeword]
            assert [stored >> 6 + i & 1 for i in range(58)] == [*entry, *[0] * (58 - len(entry))]
            assert sum(entry) == family.nonzeros[number, codeword]

    @pytest.mark.parametrize(
        ("coding", "sha256"),
        [
            ("tunstall", "4800547715427566f5a9cbc682d179b4258206174aab504ab161d9556a15fb07"),
            ("tunstall_2bit", "49b2ad2d8e328632f22f57a1d5605f9cc43fd0aa4fce4ad994da4b2c11eed9e1"),
        ],
    )
    def test_hashes(self, coding, sha256, monkeypatch):
        assert sha256 in FORMAT
        tunstall_family(NAMES[coding])  # checks itself
        monkeypatch.setattr(
            "qmoe_jax.codec.tunstall.ZERO_WEIGHTS", (600, *ZERO_WEIGHTS[1:]), raising=True
        )
        with pytest.raises(CodecError, match=f"the format requires {sha256}"):
            tunstall_family.__wrapped__(NAMES[coding])

    def test_no_entry_has_more_nonzeros_than_there_are_escapes(self):
        assert tunstall_family(8).nonzeros.max() <= 8

    def test_zero_shares_stand_in_the_format(self):
        assert "| z | " + " | ".join(map(str, ZERO_WEIGHTS)) + " |" in FORMAT

    def test_choice(self):
        assert [choose_dictionary(z, 1024) for z in ZERO_WEIGHTS] == list(range(NUM_DICTIONARIES))
        assert choose_dictionary(0, 10) == 0
        assert choose_dictionary(10, 10) == 9
        assert choose_dictionary(576, 1024) == 0  # half way
        assert choose_dictionary(577, 1024) == 1
        assert choose_dictionary(0, 0) == 0

    def test_arrays_are_read_only(self):
        with pytest.raises(ValueError, match="read-only"):
            tunstall_family(0).trie[0] = 0


class TestRows:
    def assert_equals_slow(self, symbols, number, num_escapes):
        family = tunstall_family(num_escapes)
        entries = reference.tunstall_entries(number, num_escapes)
        rows, width = symbols.shape
        dictionaries = np.full(rows, number, np.uint8)
        identity = np.tile(np.arange(4, dtype=np.uint8), (rows, 1))
        data, num_bytes, num_codewords = encode_rows(symbols, identity, dictionaries, family)
        slow = [reference.encode_tunstall_row(row, entries) for row in symbols.tolist()]
        assert data.tobytes() == b"".join(slow)
        assert num_bytes.tolist() == [len(row) for row in slow]
        assert [reference.decode_tunstall_row(row, width, entries) for row in slow] == (
            symbols.tolist()
        )
        ends = np.cumsum(num_bytes, dtype=np.int64)
        walk = walk_rows(data, ends - num_bytes, ends, dictionaries, width, family)
        assert not walk.faults.any()
        np.testing.assert_array_equal(walk.num_codewords, num_codewords)
        expected = [np.bincount(row, minlength=4) for row in symbols]
        np.testing.assert_array_equal(walk.symbol_counts, expected)

    @pytest.mark.parametrize("num_escapes", [0, 8])
    @pytest.mark.parametrize("number", [0, 5, 9])
    @pytest.mark.parametrize("zero_share", [0.0, 0.6, 0.9, 1.0])
    @pytest.mark.parametrize("width", [1, 8, 201])
    def test_equal_slow_encoder(self, num_escapes, number, zero_share, width):
        num_symbols = 4 if num_escapes else 3
        symbols = random_symbols((4, width), zero_share, num_symbols, seed=width)
        self.assert_equals_slow(symbols, number, num_escapes)

    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.integers(0, 3), min_size=1, max_size=90), st.sampled_from([0, 5, 9]))
    def test_any_row_equals_slow_encoder(self, row, number):
        symbols = np.array([row], np.uint8)
        self.assert_equals_slow(symbols, number, 8)
        self.assert_equals_slow(np.minimum(symbols, 2), number, 0)

    @settings(max_examples=100, deadline=None)
    @given(st.binary(max_size=40), st.integers(1, 60), st.sampled_from([0, 8]))
    def test_any_row_that_walks_without_fault_decodes(self, data, width, num_escapes):
        """What the walk accepts is a row by the reference decoder, which ends where it should."""
        family, entries = tunstall_family(num_escapes), reference.tunstall_entries(0, num_escapes)
        array = np.frombuffer(data, np.uint8)
        bounds = np.zeros(1, np.int64), np.full(1, len(data), np.int64)
        walk = walk_rows(array, *bounds, np.zeros(1, np.uint8), width, family)
        if not walk.faults[0]:
            symbols = reference.decode_tunstall_row(data, width, entries)
            assert np.bincount(symbols, minlength=4).tolist() == walk.symbol_counts[0].tolist()

    def test_row_lengths_are_as_narrow_as_they_fit(self):
        assert _narrow(np.array([[0, 255]])).dtype == np.uint8
        assert _narrow(np.array([[0, 256]])).dtype == np.uint16
        with pytest.raises(CodecError, match="65536 bytes more than .* Split the rows"):
            _narrow(np.array([[0, 65536]]))

    def test_batches_of_unlike_rows(self):
        codes = np.zeros((2, 2, 4000), np.uint8)
        codes[1, 1] = 1
        levels = np.ones((2, 2, 2), BFLOAT16)
        whole = encode(codes, levels, "tunstall")
        assert whole.arrays["row_lengths"].dtype == np.uint16
        parts = [encode(codes[e : e + 1], levels[e : e + 1], "tunstall") for e in range(2)]
        assert parts[0].arrays["row_lengths"].dtype == np.uint8
        joined = codings.concatenate(parts)
        codings.validate(joined)
        for name, array in whole.arrays.items():
            np.testing.assert_array_equal(joined.arrays[name], array, err_msg=name, strict=True)

    def test_too_large_an_expert(self):
        with pytest.raises(CodecError, match="67108864 words; .* fewer than 67108864"):
            in_words(np.zeros(0, np.uint8), np.array([2**28]), 2**26)


class TestFormat:
    def assert_stands_in_format(self, coded, name):
        shown = coded.arrays[name].tobytes().hex(" ")
        assert re.search(rf"^    {name} +{shown}$", FORMAT, re.MULTILINE), f"{name} {shown}"

    def test_worked_row(self):
        row = [0, 0, 0, 0, 2, 0, 0, 0, 0, 1, 0, 0, 1, 2, 2, 1, 0, 0, 0, 0, 0, 1, 0]
        coded = encode(
            np.array([[row]], np.uint8), np.array([[[-0.5, 0.75]]], BFLOAT16), "tunstall"
        )
        assert coded.arrays["dictionaries"].tolist() == [2]
        for name in ("words", "shortest_rows", "row_lengths"):
            self.assert_stands_in_format(coded, name)
        for codeword in (0x36, 0x87, 0x24):
            words = tunstall_family(0).table[2, codeword]
            assert " ".join(f"{word:08x}" for word in words) in FORMAT
        size = bits(coded)
        # A word; two levels; offsets 2 x 32, dictionary 8, shortest row 32, row length 8.
        assert (size["codes"], size["levels"], size["offsets"]) == (32, 32, 112)

    def test_worked_row_of_2_bits(self):
        row = [2, 2, 1, 2, 3, 0, 2, 2, 2, 2, 1, 2, 2, 2, 2]
        coded = encode(
            np.array([[row]], np.uint8), np.array([[[0.5, 2.0]]], BFLOAT16), "tunstall_2bit"
        )
        assert coded.arrays["dictionaries"].tolist() == [2]
        self.assert_stands_in_format(coded, "words")


class TestSize:
    @pytest.mark.parametrize(
        ("shapes", "zero_share"),
        [
            (((768, 3072), (3072, 768)), 0.857),
            (((1024, 4096), (4096, 1024)), 0.864),
            (((520, 6144), (1536, 2080)), 0.886),
        ],
        ids=["base128", "large128", "c2048"],
    )
    def test_92_percent_of_the_limit(self, shapes, zero_share):
        stored = entropy = 0.0
        for shape in shapes:
            codes = random_symbols((1, *shape), zero_share)
            coded = encode(codes, np.ones((*codes.shape[:2], 2), BFLOAT16), "tunstall")
            size = bits(coded)
            stored += size["total"]
            entropy += size["entropy"] * codes.size
        assert entropy / stored >= 0.92

    def test_two_bits(self):
        """Shares as in the trained demo model: 1.32 bits of entropy seen from the row's zero."""
        rng = np.random.default_rng(0)
        symbols = rng.choice(4, size=(1, 256, 3072), p=[0.65, 0.188, 0.1555, 0.0065])
        zero = rng.choice([1, 2], size=(1, 256))
        codes = np.array([[1, 2, 0, 3], [2, 1, 3, 0]], np.uint8)[zero[..., None] - 1, symbols]
        levels = np.stack([np.ones(zero.shape), zero], axis=-1).astype(BFLOAT16)
        size = bits(encode(codes, levels, "tunstall_2bit"))
        assert size["code_bits_per_weight"] == pytest.approx(1.321 * 1.02, rel=0.01)


class TestExpansionStaysInBounds:
    """Any arrays give codes of the right shape; rows do not disturb others."""

    WIDTH, ROWS, NUM_WORDS = 75, 6, 40
    decode = staticmethod(jax.jit(decode_expert, static_argnums=0))

    @settings(max_examples=40, deadline=None)
    @given(st.integers(0, 2**32 - 1), st.sampled_from(sorted(NAMES)))
    def test_any_arrays(self, seed, coding):
        rng = np.random.default_rng(seed)
        arrays = {
            "words": rng.integers(0, 2**32, self.NUM_WORDS, np.uint32),
            "expert_offsets": rng.integers(-(2**31), 2**31, 3).astype(np.int32),
            "dictionaries": rng.integers(0, 256, 2).astype(np.uint8),
            "shortest_rows": rng.integers(-(2**31), 2**31, 2).astype(np.int32),
            "row_lengths": rng.integers(0, 256, (2, self.ROWS)).astype(np.uint8),
            "levels": rng.integers(0, 4, (2, self.ROWS, 2)).astype(BFLOAT16),
        }
        spec = TensorSpec(coding, 2, self.ROWS, self.WIDTH, max_row_codewords=32)
        codes = np.asarray(self.decode(spec, arrays, int(rng.integers(-5, 5))))
        assert codes.shape == (self.ROWS, self.WIDTH)
        assert codes.max() <= 3

    @pytest.mark.parametrize("coding", NAMES)
    def test_a_damaged_row_leaves_the_others(self, coding):
        num_symbols = 4 if NAMES[coding] else 3
        codes = random_symbols((1, self.ROWS, self.WIDTH), 0.7, num_symbols)
        levels = np.zeros((1, self.ROWS, 2), BFLOAT16)
        coded = encode(codes, levels, coding)
        ends = np.cumsum(coded.arrays["row_lengths"][0].astype(int) + coded.arrays["shortest_rows"])
        words = coded.arrays["words"].copy()
        words.view(np.uint8)[ends[1] : ends[2]] ^= 0xA5
        arrays = {k: jnp.asarray(v) for k, v in (coded.arrays | {"words": words}).items()}
        decoded = np.asarray(self.decode(coded.spec, arrays, 0))
        others = [0, 1, 3, 4, 5]
        np.testing.assert_array_equal(decoded[others], codes[0, others])
