"""The "qmoe" coding: dictionary, greedy encoder, expansion, what validate refuses."""

import dataclasses
import re
from concurrent.futures import ThreadPoolExecutor
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
from qmoe_jax.codec.decode import decode_expert
from qmoe_jax.codec.dictionary import (
    ROOT,
    TABLE_SHA256,
    TRIE_SHA256,
    dictionary,
    sha256_little_endian,
)
from qmoe_jax.codec.encode import encode
from qmoe_jax.codec.greedy import encode_rows
from qmoe_jax.codec.stats import bits, code_entropy
from qmoe_jax.codec.tensor import CodedTensor, TensorSpec, to_offsets
from qmoe_jax.errors import CodecError

BFLOAT16 = ml_dtypes.bfloat16
FORMAT = Path(qmoe_jax.codec.__file__).with_name("FORMAT.md")
WORKED_ROW = [0, 0, 0, 0, 2, 0, 0, 0, 0, 1, 0, 0, 1, 2, 2, 1, 0, 0, 0, 0, 0, 1, 0]


def random_codes(shape, zero_share=0.885, seed=0):
    rng = np.random.default_rng(seed)
    nonzero = (1 - zero_share) / 2
    return rng.choice(3, size=shape, p=[zero_share, nonzero, nonzero]).astype(np.uint8)


def random_coded(shape, zero_share=0.885, seed=0):
    codes = random_codes(shape, zero_share, seed)
    rng = np.random.default_rng(seed)
    return encode(codes, rng.normal(size=(*shape[:2], 2)).astype(BFLOAT16), "qmoe")


class TestDictionary:
    def test_hashes_are_the_published_ones(self):
        # Literals on purpose: the module's constants are part of what is tested.
        table = "c09862c453fe122634070a475357ff81a679aff65829d84a56f806c02a54ed45"
        trie = "fc77a88c6c9c32a0a884b2736ac78c25239a162817d133dc8457c8f0770a8b0b"
        assert sha256_little_endian(dictionary().table) == table == TABLE_SHA256
        assert sha256_little_endian(dictionary().trie) == trie == TRIE_SHA256
        text = FORMAT.read_text(encoding="utf-8")
        assert table in text
        assert trie in text

    def test_forms_agree(self):
        entries = dictionary()
        for codeword in [0, 1, 25, 1056, 65535]:
            length = entries.lengths[codeword]
            node = ROOT
            for pair in entries.pairs[codeword, :length]:
                node = entries.trie[node, pair]
            assert node == codeword
            codes = [c for p in entries.pairs[codeword, :length].tolist() for c in (p % 3, p // 3)]
            assert reference.entry_codes(codeword) == codes

    def test_shared_arrays_are_read_only(self):
        with pytest.raises(ValueError, match="read-only"):
            dictionary().table[0] = 0


class TestGreedy:
    def assert_equals_slow(self, codes):
        codewords, counts = encode_rows(codes)
        slow = [reference.encode_row(row) for row in codes.tolist()]
        assert counts.tolist() == [len(row) for row in slow]
        assert codewords.tolist() == [codeword for row in slow for codeword in row]

    @pytest.mark.parametrize("zero_share", [0.0, 0.3, 0.8, 0.885, 0.97, 1.0])
    @pytest.mark.parametrize("width", [1, 2, 3, 27, 28, 29, 200, 501])
    def test_equals_slow_encoder(self, zero_share, width):
        self.assert_equals_slow(random_codes((6, width), zero_share, seed=width))

    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.integers(0, 2), min_size=1, max_size=90))
    def test_any_row_equals_slow_encoder(self, row):
        self.assert_equals_slow(np.array([row], np.uint8))

    def test_nothing_to_encode(self):
        codewords, counts = encode_rows(np.zeros((0, 5), np.uint8))
        assert codewords.shape == counts.shape == (0,)

    def test_several_chunks_from_several_threads(self):
        # Rows of 300,000 weights go three to a chunk.
        codes = random_codes((8, 300_000))
        with ThreadPoolExecutor(2) as pool:
            results = list(pool.map(encode_rows, [codes] * 2))
        alone = np.concatenate([encode_rows(row[None])[0] for row in codes])
        for codewords, counts in results:
            np.testing.assert_array_equal(codewords, alone)
            assert counts.sum() == alone.size

    def test_rate_at_the_papers_zero_share(self):
        codes = random_codes((768, 3072))
        codewords, _ = encode_rows(codes)
        assert 16 * codewords.size / codes.size == pytest.approx(0.740, abs=0.003)


class TestFormat:
    def test_worked_row(self):
        codes = np.array(WORKED_ROW, np.uint8)[None, None]
        coded = encode(codes, np.array([[[-0.5, 0.75]]], BFLOAT16), "qmoe")
        text = FORMAT.read_text(encoding="utf-8")
        for name, expected in {
            "codewords": "20 04 48 01 2c 25",
            "row_lengths": "03",
            "levels": "00 bf 40 3f",
        }.items():
            assert coded.arrays[name].tobytes().hex(" ") == expected
            assert re.search(rf"    {name} +{expected}$", text, re.MULTILINE)
        for codeword, words in {
            1056: "00402006 00000006",
            328: "00000091 00000001",
            9516: "00040065 00000005",
        }.items():
            table = dictionary().table[2 * codeword : 2 * codeword + 2]
            assert " ".join(f"{word:08x}" for word in table) == words
            assert words in text

    def test_bits_by_hand(self):
        codes = np.array(WORKED_ROW, np.uint8)[None, None]
        size = bits(encode(codes, np.array([[[-0.5, 0.75]]], BFLOAT16), "qmoe"))
        # 3 codewords; 2 bf16 levels; 2 expert offsets of 32 bits and a row length of 8.
        assert (size["codes"], size["levels"], size["offsets"]) == (48, 32, 72)
        assert size["total"] == 152
        assert size["bits_per_weight"] == 152 / 23
        assert size["code_bits_per_weight"] == 48 / 23
        assert size["zero_share"] == 16 / 23
        entropy = -sum(n / 23 * np.log2(n / 23) for n in (16, 4, 3))
        assert size["entropy"] == pytest.approx(entropy)
        assert size["entropy_share"] == pytest.approx(23 * entropy / 152)

    def test_bits_of_nothing(self):
        size = bits(random_coded((0, 3, 5)))
        assert (size["bits_per_weight"], size["entropy"], size["zero_share"]) == (0, 0, 0)
        assert code_entropy(np.array([5, 0, 0])) == 0


class TestValidate:
    """One broken thing each; the message must name it."""

    @pytest.fixture
    def coded(self):
        return random_coded((2, 4, 61))

    def refused(self, coded, message):
        with pytest.raises(CodecError, match=message):
            codings.validate(coded)

    def test_valid(self, coded):
        codings.validate(coded)

    def test_row_lengths_sum_wrong(self, coded):
        coded.arrays["row_lengths"][0, -1] += 1
        total = coded.arrays["expert_offsets"][1]
        self.refused(coded, rf"row_lengths\[0\] sum to {total + 1}, .* expert 0 {total} codewords")

    def test_row_lengths_dtype_follows_the_bound(self):
        # Rows of 300 weights may be bounded by 256 codewords, which uint8 does not hold.
        coded = encode(
            np.zeros((1, 3, 300), np.uint8), np.ones((1, 3, 2), ml_dtypes.bfloat16), "qmoe"
        )
        spec = dataclasses.replace(coded.spec, max_row_codewords=256)
        self.refused(CodedTensor(spec, coded.arrays), "'row_lengths' is uint8; .* uint16")
        wide = coded.arrays["row_lengths"].astype(np.uint16)
        codings.validate(CodedTensor(spec, coded.arrays | {"row_lengths": wide}))
        spec = TensorSpec("qmoe", 1, 3, 2**16, max_row_codewords=2**16)
        self.refused(CodedTensor(spec, coded.arrays), "up to 65536 codewords; .* uint16")

    def test_a_bound_that_no_row_can_have(self, coded):
        with pytest.raises(CodecError, match="may have a bound of at most"):
            dataclasses.replace(coded.spec, max_row_codewords=2**40)

    def test_expert_offsets(self, coded):
        offsets = coded.arrays["expert_offsets"]
        offsets[1] = offsets[2] + 1
        self.refused(coded, "expert_offsets fall from")
        offsets[:] = [1, 2, 3]
        self.refused(coded, "expert_offsets start at 1")

    def test_truncated_codewords(self, coded):
        coded.arrays["codewords"] = coded.arrays["codewords"][:-1]
        self.refused(coded, "expert_offsets end at .* codewords")

    def test_row_of_wrong_width(self, coded):
        first = int(dictionary().lengths[coded.arrays["codewords"][0]])
        assert first != 1
        coded.arrays["codewords"][0] = 0  # a single pair
        pairs = 31 - first + 1
        self.refused(
            coded, f"Row 0 of expert 0 decodes to {pairs} pairs; its 61 weights require 31"
        )

    def test_row_boundary_moved(self, coded):
        coded.arrays["row_lengths"][1, 1] += 1
        coded.arrays["row_lengths"][1, 2] -= 1
        self.refused(coded, "Row 1 of expert 1 decodes to")

    def test_row_bound(self, coded):
        longest = int(coded.arrays["row_lengths"].max())
        spec = dataclasses.replace(coded.spec, max_row_codewords=longest - 1)
        self.refused(CodedTensor(spec, coded.arrays), "max_row_codewords = ")

    def test_filler_of_odd_width(self):
        codes = np.array([[[0, 0, 0, 2]]], np.uint8)  # ends with the pair (0, 2)
        even = encode(codes, np.ones((1, 1, 2), BFLOAT16), "qmoe")
        codings.validate(even)
        odd = dataclasses.replace(even.spec, width=3)
        self.refused(CodedTensor(odd, even.arrays), "Row 0 of expert 0 ends with the pair 6")

    def test_other_splits_are_accepted(self):
        whole = encode(np.zeros((1, 1, 6), np.uint8), np.ones((1, 1, 2), BFLOAT16), "qmoe")
        assert whole.arrays["codewords"].tolist() == [2]
        arrays = whole.arrays | {
            "codewords": np.array([0, 1], np.uint16),
            "expert_offsets": np.array([0, 2], np.int32),
            "row_lengths": np.array([[2]], np.uint8),
        }
        codings.validate(CodedTensor(whole.spec, arrays))

    def test_too_many_codewords_for_int32(self):
        with pytest.raises(CodecError, match="expert_offsets would reach 2147483648 codewords"):
            to_offsets(np.array([2**31 - 1, 1], np.int64), "expert_offsets")

    def test_rows_of_more_than_255_codewords(self):
        # Alternating signs take the longest rows; batches of short and long rows mix dtypes.
        codes = np.ones((3, 2, 6000), np.uint8)
        codes[..., ::2] = 2
        codes[0] = 0
        levels = np.ones((3, 2, 2), BFLOAT16)
        whole = encode(codes, levels, "qmoe")
        assert whole.arrays["row_lengths"].dtype == np.uint16
        assert whole.arrays["row_lengths"].max() > 255
        codings.validate(whole)
        short, long = encode(codes[:1], levels[:1], "qmoe"), encode(codes[1:], levels[1:], "qmoe")
        assert short.arrays["row_lengths"].dtype == np.uint8
        joined = codings.concatenate([short, long])
        codings.validate(joined)
        assert joined.spec == whole.spec
        np.testing.assert_array_equal(
            joined.arrays["row_lengths"], whole.arrays["row_lengths"], strict=True
        )
        for expert in range(3):
            decoded = decode_expert(joined.spec, joined.arrays, expert)
            np.testing.assert_array_equal(np.asarray(decoded), codes[expert])


class TestExpansionStaysInBounds:
    """Any arrays: short rows are filled with 0, long ones cut, and rows do not disturb others."""

    SPEC = TensorSpec("qmoe", 1, 6, 75, max_row_codewords=20)
    NUM_CODEWORDS = 120  # fixed, so that one compiled decoder serves all examples

    decode = staticmethod(jax.jit(decode_expert, static_argnums=0))

    def run(self, codewords, row_lengths, expert=0, end=NUM_CODEWORDS):
        arrays = {
            "codewords": jnp.asarray(codewords),
            "expert_offsets": jnp.array([0, end], jnp.int32),
            "row_lengths": jnp.asarray(row_lengths.astype(np.uint8))[None],
            "levels": jnp.zeros((1, 6, 2), jnp.bfloat16),
        }
        return np.asarray(self.decode(self.SPEC, arrays, expert))

    @settings(max_examples=50, deadline=None)
    @given(st.integers(0, 2**32 - 1))
    def test_any_codewords(self, seed):
        rng = np.random.default_rng(seed)
        # Low codewords are long runs of zeros, high ones short: rows come out long and short.
        codewords = rng.integers(0, rng.choice([30, 2**16]), self.NUM_CODEWORDS).astype(np.uint16)
        counts = rng.integers(0, 21, 6)
        row_offsets = to_offsets(counts, "row_offsets")
        expected = np.zeros((6, 75), np.uint8)
        for row in range(6):
            own = codewords[row_offsets[row] : row_offsets[row + 1]].tolist()
            codes = reference.decode_row(own, 75)
            expected[row, : len(codes)] = codes
        np.testing.assert_array_equal(self.run(codewords, counts), expected)

    @settings(max_examples=30, deadline=None)
    @given(st.integers(0, 2**32 - 1))
    def test_any_lengths(self, seed):
        rng = np.random.default_rng(seed)
        codewords = rng.integers(0, 2**16, self.NUM_CODEWORDS).astype(np.uint16)
        lengths = rng.integers(0, 256, 6)
        end = int(rng.integers(-(2**31), 2**31))
        codes = self.run(codewords, lengths, expert=int(rng.integers(-5, 5)), end=end)
        assert codes.shape == (6, 75)
        assert codes.max() <= 2
