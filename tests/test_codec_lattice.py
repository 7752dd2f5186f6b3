"""The "lattice" coding: dictionaries, blocks alone, sizes, and what an encoder may choose."""

import functools
import hashlib
from pathlib import Path

import golden_lattice
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmoe_jax.codec import codings, lattice_blocks, reference_lattice
from qmoe_jax.codec.coding_lattice import LatticeCoding, _ends
from qmoe_jax.codec.decode import decode_expert_weights
from qmoe_jax.codec.encode import encode
from qmoe_jax.codec.lattice_choices import (
    CLASS_STEPS,
    NUM_CLASSES,
    ZERO_COLUMN,
    choose_columns,
    choose_leans,
    order_of,
)
from qmoe_jax.codec.lattice_dictionaries import (
    NUM_DICTIONARIES,
    RAW_DICTIONARY,
    lattice_dictionaries,
)
from qmoe_jax.codec.lattice_values import STEP_TABLE
from qmoe_jax.codec.outline import CodedOutline
from qmoe_jax.codec.stats import bits
from qmoe_jax.codec.tensor import CodedTensor, TensorSpec
from qmoe_jax.errors import CodecError

CODING = LatticeCoding()
FORMAT = Path(codings.__file__).with_name("FORMAT.md").read_text("utf-8")


def lattice_codes(experts, rows, width, seed=0, density=-1.0):
    """Columns of very different scales, whose steps tell most of the scale, and some of zeros."""
    rng = np.random.default_rng(seed)
    scales = np.exp(rng.normal(density, 1, (experts, width)))
    scales[:, rng.random(width) < 0.1] = 0
    multiples = np.rint(rng.standard_normal((experts, rows, width)) * scales[:, None])
    multiples = np.clip(multiples, -127, 127).astype(int)
    noise = rng.normal(0, 2, scales.shape)
    steps = np.clip(np.rint(60 + 16 * np.log2(scales + 0.02) + noise), 0, 255).astype(np.uint8)
    codes = np.where(multiples < 0, -2 * multiples - 1, 2 * multiples).astype(np.uint8)
    return codes, {"step_index": steps, "origin": rng.uniform(0.5, 2, experts).astype(np.float32)}


class TestDictionaries:
    def test_hash_is_in_the_format(self):
        table = lattice_dictionaries().table
        assert hashlib.sha256(table.astype("<u4").tobytes()).hexdigest() in FORMAT

    @pytest.mark.parametrize("number", range(NUM_DICTIONARIES))
    def test_table_holds_the_reference_s_entries(self, number):
        entries = reference_lattice.entries(number)
        for codeword, entry in enumerate(entries):
            low, high = (int(word) for word in lattice_dictionaries().table[number, codeword])
            stored = low | high << 32
            length, lead, mask = stored & 255, stored >> 8 & 255, stored >> 16
            written = f"{mask:0{length - lead}b}"[::-1] if mask else "0" * (length - lead)
            assert "0" * lead + written == entry

    def test_raw_entries_are_bytes(self):
        entries = reference_lattice.entries(RAW_DICTIONARY)
        assert entries == [f"{byte:08b}" for byte in range(256)]


def test_worked_block():
    """FORMAT.md's, by the encoder; the reference reads it."""
    multiples = np.zeros((10, 4), int)
    multiples[4, 0] = 1
    multiples[:6, 2] = 3, -1, 1, 0, -1, -5
    codes = np.where(multiples < 0, -2 * multiples - 1, 2 * multiples).astype(np.uint8)
    schedules = np.zeros((1, 3, 15), np.uint16)
    schedules[0, [0, 1, 2], [8, 11, 14]] = 9, 2, 9
    dictionaries = np.array([[2, 14, 14, 14]], np.uint8)
    strings = lattice_blocks.Strings(
        np.array([0, 2], np.int32),
        1,
        np.zeros(10, np.uint8),
        np.array([0, 0, 1, 0], np.uint8),
        _ends(schedules[0], dictionaries[0]),
    )
    data, _ = lattice_blocks.encode_blocks(codes, strings)
    assert f"block        {data.tobytes().hex(' ')}\n" in FORMAT
    arrays = {
        "words": np.append(data, np.zeros(3, np.uint8)).view("<u4").astype(np.uint32),
        "expert_offsets": np.array([0, 4], np.int32),
        "block_lengths": np.array([[len(data)]], np.uint16),
        "grouped_columns": np.array([1], np.int32),
        "schedules": schedules,
        "dictionaries": dictionaries,
        "leans": np.array([[4]], np.uint8),
        "columns": np.array([[0, 255, 1, 255]], np.uint8),
        "bases": np.zeros((1, 8), np.uint8),
        "origins": np.ones(1, np.float32),
    }
    coded = CodedTensor(TensorSpec("lattice", 1, 10, 4), arrays)
    codings.validate(coded)
    np.testing.assert_array_equal(CODING.decode_numpy_reference(coded)[0], codes)


class TestBlocksAlone:
    @pytest.mark.parametrize(("rows", "width"), [(150, 70), (70, 150)])
    def test_random_blocks_of_random_experts(self, rows, width):
        """By XLA, and by the reference from the block's own bytes."""
        codes, levels = lattice_codes(5, rows, width, seed=rows)
        coded = encode(codes, levels, "lattice")
        padded = np.pad(codes, ((0, 0), (0, -rows % 32), (0, 0)))
        decode = jax.jit(CODING.decode_rows, static_argnums=0)
        rng = np.random.default_rng(1)
        data = coded.arrays["words"].view(np.uint8)
        lengths = coded.arrays["block_lengths"].astype(int)
        for _ in range(30):
            expert, block = int(rng.integers(5)), int(rng.integers(lengths.shape[1]))
            expected = padded[expert, 32 * block : 32 * block + 32]
            alone = decode(coded.spec, coded.arrays, expert, block)
            np.testing.assert_array_equal(np.asarray(alone), expected)
            start = 4 * int(coded.arrays["expert_offsets"][expert]) + lengths[expert, :block].sum()
            own = data[start : start + lengths[expert, block]].tobytes()
            found = np.zeros_like(expected)
            for row, column, multiple in reference_lattice.decode_block(coded, expert, block, own):
                found[row % 32, column] = 2 * multiple - (multiple < 0) * (4 * multiple + 1)
            np.testing.assert_array_equal(found, expected)

    def test_experts_do_not_depend_on_their_batch(self):
        codes, levels = lattice_codes(4, 64, 90)
        whole = encode(codes, levels, "lattice")
        for expert in range(4):
            own = {name: its[expert : expert + 1] for name, its in levels.items()}
            alone = encode(codes[expert : expert + 1], own, "lattice")
            cut = codings.slice_experts(whole, expert, expert + 1)
            for name, array in alone.arrays.items():
                np.testing.assert_array_equal(array, cut.arrays[name], err_msg=name)


class TestChoices:
    @settings(max_examples=60, deadline=None)
    @given(st.data())
    def test_columns_keep_their_steps(self, data):
        """Whatever the steps: only a step at either end may go without a class."""
        width = data.draw(st.integers(1, 300))
        rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
        low, high = sorted(data.draw(st.tuples(st.integers(0, 254), st.integers(0, 254))))
        steps = rng.integers(low, high + 1, width).astype(np.uint8)
        counts = rng.integers(0, 4, width)
        chosen = choose_columns(counts, steps, 4)
        live = chosen.columns != ZERO_COLUMN
        np.testing.assert_array_equal(live, counts > 0)
        columns = chosen.columns.astype(int)
        kept = chosen.bases.astype(int)[columns // CLASS_STEPS] + columns % CLASS_STEPS
        np.testing.assert_array_equal(kept[live], steps[live])
        assert order_of(chosen.columns).size == live.sum()
        assert chosen.bases.size == NUM_CLASSES

    @pytest.mark.parametrize("ends", [(0, 254), (1, 255)])
    def test_steps_from_end_to_end(self, ends):
        steps = np.arange(ends[0], ends[1] + 1).astype(np.uint8)[None]
        codes = np.ones((1, 3, 255), np.uint8)
        levels = {"step_index": steps, "origin": np.ones(1, np.float32)}
        coded = encode(codes, levels, "lattice")
        codings.validate(coded)
        np.testing.assert_array_equal(CODING.levels_of(coded)["step_index"], steps)

    def test_steps_at_both_ends_are_refused(self):
        steps = np.arange(256).astype(np.uint8)[None]
        levels = {"step_index": steps, "origin": np.ones(1, np.float32)}
        with pytest.raises(CodecError, match="steps 0 and 255.* Clip the steps to 254"):
            encode(np.ones((1, 3, 256), np.uint8), levels, "lattice")

    def test_leans_are_of_the_shorter_side(self):
        codes = np.zeros((3, 5), np.uint8)
        codes[1] = 1
        np.testing.assert_array_equal(choose_leans(lattice_blocks.count_codes(codes)), [0, 1, 0])
        np.testing.assert_array_equal(choose_leans(lattice_blocks.count_codes(codes.T)), [0, 1, 0])

    @settings(max_examples=25, deadline=None)
    @given(st.integers(0, 2**32 - 1))
    def test_readers_accept_any_choice(self, seed):
        rng = np.random.default_rng(seed)
        coded, codes = golden_lattice.with_choices(
            int(rng.integers(1, 70)),
            int(rng.integers(6, 60)),
            tuple(rng.integers(0, 16, 4).tolist()),
            rng.integers(0, rng.choice([1, 3, 40]) + 1, (3, 15)),
            wide=bool(rng.integers(2)),
            grouped=int(rng.integers(7)),
        )
        codings.validate(coded)
        np.testing.assert_array_equal(CODING.decode_numpy_reference(coded), codes)
        counts = np.bincount(codes.reshape(-1), minlength=255)
        np.testing.assert_array_equal(CODING.symbol_counts(coded), counts)


class TestCounts:
    @pytest.mark.parametrize("shape", [(1, 1), (254, 7), (255, 7), (600, 33)])
    def test_counts(self, shape):
        codes = np.random.default_rng(0).integers(0, 12, shape).astype(np.uint8)
        codes[:, 0] = 254
        counts = lattice_blocks.count_codes(codes)
        magnitudes = (codes.astype(int) + 1) // 2
        for kind in range(4):
            np.testing.assert_array_equal(counts.columns[kind], (magnitudes > kind).sum(axis=0))
        np.testing.assert_array_equal(counts.columns[4], (codes % 2).sum(axis=0))
        np.testing.assert_array_equal(
            counts.rows, [(codes > 0).sum(axis=1), (codes % 2).sum(axis=1)]
        )


class TestSizes:
    def test_near_the_entropy_of_columns(self):
        """Columns independent, their shares known: what a coder could reach by them alone."""
        rng = np.random.default_rng(0)
        zeros = np.linspace(0.4, 1, 512)
        codes = (rng.random((1, 512, 512)) > zeros).astype(np.uint8)
        codes *= rng.integers(1, 3, codes.shape).astype(np.uint8)
        levels = {
            "step_index": np.rint(120 * (1 - zeros))[None].astype(np.uint8),
            "origin": np.ones(1, np.float32),
        }
        coded = encode(codes, levels, "lattice")
        with np.errstate(divide="ignore", invalid="ignore"):
            entropy = -(zeros * np.log2(zeros) + (1 - zeros) * np.log2((1 - zeros) / 2))
        stored = bits(coded)
        assert stored["code_bits_per_weight"] < 1.05 * np.nanmean(entropy)
        assert stored["bits_per_weight"] < 1.08 * np.nanmean(entropy)

    def test_strings_add_up(self):
        codes, levels = lattice_codes(3, 100, 200, density=0.5)
        coded = encode(codes, levels, "lattice")
        parts = CODING.code_parts(coded)
        assert sum(parts.values()) == coded.arrays["block_lengths"].sum()
        assert parts["remainders"] == (codes > 6).sum()

    def test_long_blocks_have_wide_lengths(self):
        codes = np.random.default_rng(0).integers(200, 255, (1, 32, 2000)).astype(np.uint8)
        levels = {"step_index": np.zeros((1, 2000), np.uint8), "origin": np.ones(1, np.float32)}
        long = encode(codes, levels, "lattice")
        short = encode(0 * codes, levels, "lattice")
        assert long.arrays["block_lengths"].dtype == np.uint32
        assert short.arrays["block_lengths"].dtype == np.uint16
        joined = codings.concatenate([short, long])
        codings.validate(joined)
        outline = CodedOutline.join([CodedOutline.of(short), CodedOutline.of(long)])
        for name, array in joined.arrays.items():
            assert outline.dtypes[name] == array.dtype.name
            assert outline.shape(name) == array.shape


class TestLimits:
    def test_widths(self):
        width = 2**19
        codes = np.zeros((1, 1, width), np.uint8)
        levels = {"step_index": np.zeros((1, width), np.uint8), "origin": np.ones(1, np.float32)}
        with pytest.raises(CodecError, match="has 524288 weights; .* fewer than 524288"):
            encode(codes, levels, "lattice")
        few = encode(
            codes[..., :-1], {**levels, "step_index": levels["step_index"][:, :-1]}, "lattice"
        )
        arrays = few.arrays | {"columns": np.full((1, width), ZERO_COLUMN, np.uint8)}
        with pytest.raises(CodecError, match="has 524288 weights"):
            codings.validate(CodedTensor(TensorSpec("lattice", 1, 1, width), arrays))


def test_weights_by_hand():
    codes = np.array([[[0, 1, 2, 253]], [[0, 4, 0, 5]]], np.uint8)
    steps = np.array([[9, 16, 32, 0], [9, 8, 9, 255]], np.uint8)
    origins = np.array([2.0, 0.25], np.float32)
    coded = encode(codes, {"step_index": steps, "origin": origins}, "lattice")
    weights = functools.partial(decode_expert_weights, coded.spec, coded.arrays, dtype=np.float32)
    np.testing.assert_array_equal(weights(0), [[0, -1, 0.5, -254]])
    small = np.float32(2 ** (-255 / 16)) * np.float32(0.25)
    half = np.float32(2**-0.5)
    np.testing.assert_array_equal(weights(1), [[0, 2 * half * np.float32(0.25), 0, -3 * small]])
    assert STEP_TABLE.dtype == np.float32
