"""The CUDA kernels, run on the CPU by `cuda_emulation`, against the reference decoder in float64.

Nearly all runs are under AddressSanitizer and UBSan, with races on shared memory, divergent
barriers and unwritten shared memory found by the emulation.
"""

import re
import shutil
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from cuda_emulation import emulator, launches
from cuda_emulation.lattice_fragments import made, placed_tokens
from cuda_emulation.tensors import (
    assert_products,
    lattice_codes,
    levels_like,
    product_weights,
)
from golden_lattice import readable, with_choices
from markers import slow

from qmoe_jax.codec.coding_lattice import LatticeCoding
from qmoe_jax.codec.codings import coding_names, get_coding
from qmoe_jax.codec.encode import encode
from qmoe_jax.codec.tensor import CodedTensor
from qmoe_jax.codec.tunstall import ZERO_WEIGHTS
from qmoe_jax.ops.cuda import kernels

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

BF16 = ml_dtypes.bfloat16
WITH_KERNELS = [name for name in coding_names() if get_coding(name).cuda]


@pytest.fixture(scope="session")
def get():
    """get_function of all kernels under the sanitizers."""
    module = emulator.SanitizedModule(emulator.build(kind="sanitized"))
    yield module.get_function
    module.close()


def random_codes(coding, shape, zero_share, seed, zeros=(0.0, 1.0, 2.0, 3.0)):
    """Codes and levels; of a 2-bit coding, that share of the codes is the row's zero."""
    rng = np.random.default_rng(seed)
    if get_coding(coding).grid == "lattice":
        return lattice_codes(rng, shape, zero_share)
    symbols = np.where(rng.random(shape) < zero_share, 0, rng.integers(1, 4, shape))
    levels = rng.normal(size=(*shape[:2], 2))
    if get_coding(coding).num_symbols == 3:
        return np.minimum(symbols, 2).astype(np.uint8), levels.astype(BF16)
    levels[..., 1] = rng.choice(zeros, size=shape[:2])
    is_code = np.isin(levels[..., 1], (1, 2, 3))
    codes = (symbols + np.where(is_code, levels[..., 1], 0)[..., None].astype(int)) % 4
    return codes.astype(np.uint8), levels.astype(BF16)


def random_tensor(coding, shape, zero_share=0.85, seed=0, **options):
    return encode(*random_codes(coding, shape, zero_share, seed, **options), coding)


def assert_same_weights(dense, weights):
    """Bit for bit, once they are rounded."""
    np.testing.assert_array_equal(dense.view(np.uint16), weights.astype(BF16).view(np.uint16))


def check_decoders(get, coded, seed=0, *, expert_ids=None, tile_tokens=(1, 16), tokens=5):
    """Expansion bit for bit, and products for both ways to spread a row over lanes."""
    spec = coded.spec
    weights = product_weights(coded)
    ids = list(range(spec.num_experts)) if expert_ids is None else expert_ids
    dense = launches.expand(get, coded, ids)
    assert_same_weights(dense, weights[ids])

    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, spec.width)).astype(BF16)
    experts = rng.integers(-1, spec.num_experts, tokens).astype(np.int32)
    for tile in tile_tokens:
        for rows in (1, 4) if "tunstall" in spec.coding else (4,):
            y = launches.multiply(get, coded, x, experts, tile_tokens=tile, rows_per_warp=rows)
            assert_products(y, coded, weights, x, experts)
    # The tile makes no difference.
    rounded = launches.multiply(get, coded, x, experts, tile_tokens=4, float32=False)
    np.testing.assert_array_equal(rounded.view(np.uint16), y.astype(BF16).view(np.uint16))


class TestDecoders:
    @pytest.mark.parametrize("coding", WITH_KERNELS)
    @pytest.mark.parametrize("width", [1, 31, 59, 769, *slow(2, 33, 58, 64)])
    def test_widths(self, get, coding, width):
        for out in (1, 3, 33) if width < 100 else (3,):
            check_decoders(get, random_tensor(coding, (2, out, width), seed=width), seed=out)

    @pytest.mark.parametrize("coding", WITH_KERNELS)
    @pytest.mark.parametrize("symbol", [0, 1, 2])
    def test_rows_of_one_symbol(self, get, coding, symbol):
        codes = np.full((1, 5, 200), symbol, np.uint8)
        levels = levels_like(coding, codes.shape, -0.5, 0.0)
        check_decoders(get, encode(codes, levels, coding))

    @pytest.mark.parametrize("coding", ["tunstall", "tunstall_2bit"])
    @pytest.mark.parametrize("dictionary", [0, 4, 9, *slow(1, 2, 3, 5, 6, 7, 8)])
    def test_each_dictionary(self, get, coding, dictionary):
        coded = random_tensor(coding, (1, 4, 1200), ZERO_WEIGHTS[dictionary] / 1024, dictionary)
        assert coded.arrays["dictionaries"][0] == dictionary
        check_decoders(get, coded, tile_tokens=(2,), tokens=2)

    @pytest.mark.parametrize("coding", ["tunstall", "tunstall_2bit", "lattice"])
    def test_copies_of_the_dictionary_make_no_difference(self, get, coding):
        coded = random_tensor(coding, (1, 5, 300), seed=3)
        x, experts = np.ones((1, 300), BF16), np.zeros(1, np.int32)
        one, *others = (
            launches.multiply(get, coded, x, experts, tile_tokens=1, copies=copies)
            for copies in ((1, 2, 4) if coding == "lattice" else (1, 2, 8, 16))
        )
        for y in others:
            np.testing.assert_array_equal(y, one)

    @pytest.mark.parametrize("zero", [0.0, 1.0, 2.0, 3.0, 1.5, -7.0])
    def test_2bit_zeros(self, get, zero):
        """Also zeros that are no code: then every weight counts."""
        for coding in ("tunstall_2bit", "packed2"):
            check_decoders(get, random_tensor(coding, (2, 9, 130), 0.7, zeros=[zero]))

    @pytest.mark.parametrize("share", [0.0, 0.6, 0.9])
    def test_many_escapes(self, get, share):
        """Only symbols 0 and 3: up to 8 escapes in a row, over lanes and rounds."""
        rng = np.random.default_rng(4)
        codes = np.where(rng.random((1, 6, 900)) < share, 0, 3).astype(np.uint8)
        levels = np.tile(np.array([0.5, 0.0], BF16), (1, 6, 1))
        check_decoders(get, encode(codes, levels, "tunstall_2bit"), tile_tokens=(1, 2))

    @pytest.mark.parametrize("coding", WITH_KERNELS)
    @pytest.mark.parametrize("width", [5003])
    def test_long_sparse_rows(self, get, coding, width):
        """Many rounds, each over many columns: the expansion's ring wraps."""
        coded = random_tensor(coding, (1, 3, width), 0.99, seed=width)
        check_decoders(get, coded, tile_tokens=(1,), tokens=2)

    @pytest.mark.parametrize("coding", WITH_KERNELS)
    def test_unlike_rows(self, get, coding):
        """Rows of a warp that end in different rounds; 16-bit row lengths."""
        codes, levels = random_codes(coding, (1, 7, 2400), 1.0, seed=2)
        dense, _ = random_codes(coding, (1, 7, 2400), 0.0, seed=3)
        codes[:, ::2] = dense[:, ::2]
        coded = encode(codes, levels, coding)
        if coding == "tunstall":
            assert coded.arrays["row_lengths"].dtype == np.uint16
        check_decoders(get, coded, tile_tokens=(2,))

    @pytest.mark.parametrize("coding", WITH_KERNELS)
    def test_skipped_slots(self, get, coding):
        coded = random_tensor(coding, (3, 5, 40))
        weights = product_weights(coded)
        dense = launches.expand(get, coded, [2, -1, 0, 3], zero_skipped=True)
        assert_same_weights(dense[[0, 2]], weights[[2, 0]])
        np.testing.assert_array_equal(dense[[1, 3]], 0)
        dense = launches.expand(get, coded, [2, -1], zero_skipped=False).view(np.uint16)
        assert (dense[1] == launches.POISON).all()


class TestLattice:
    """What only blocks of 32 rows have."""

    @pytest.mark.parametrize("grouped", [0, 21, 13])
    @pytest.mark.parametrize("dictionary", [0, 7, 15, *slow(*range(1, 7), *range(8, 15))])
    def test_each_dictionary(self, get, dictionary, grouped):
        """All strings by one dictionary, no column grouped, all, or some."""
        schedules = np.zeros((3, 15), np.int64)
        if dictionary < 15:
            schedules[:, dictionary] = 2**16 - 1
        coded, _ = with_choices(70, 21, (dictionary,) * 4, schedules, grouped % 2 == 1, grouped)
        coded.arrays["origins"] = np.ones(1, np.float32)
        check_decoders(get, coded, tile_tokens=(1,), tokens=2)

    @pytest.mark.parametrize(("name", "coded"), [(name, coded) for name, coded, _ in readable()])
    def test_choices_of_other_encoders(self, get, name, coded):
        check_decoders(get, coded, tile_tokens=(2,), tokens=2)

    @pytest.mark.parametrize("zero_share", [0.0, 0.5, 0.9, 0.999, 1.0])
    @pytest.mark.parametrize("shape", [(2, 70, 40), (1, 33, 700)])
    def test_shares_of_zeros(self, get, shape, zero_share):
        """Leans of rows and of columns; tasks that end at the grouped columns; empty experts."""
        check_decoders(get, random_tensor("lattice", shape, zero_share), tile_tokens=(1, 8))

    @pytest.mark.parametrize("tile_tokens", [1, 2, 16, *slow(4, 8)])
    def test_many_blocks_of_rows(self, get, tile_tokens):
        """More than a block of threads keeps sums of; warps with tasks of several, or none."""
        for shape, share, threads in (((1, 200, 600), 0.8, 96), ((1, 300, 20), 0.5, 256)):
            coded = random_tensor("lattice", shape, share, seed=1)
            x = np.random.default_rng(0).normal(size=(3, shape[2])).astype(BF16)
            experts = np.zeros(3, np.int32)
            options = {"tile_tokens": tile_tokens, "threads": threads, "rows_per_block": 999}
            weights = product_weights(coded)
            y = launches.multiply(get, coded, x, experts, **options)
            assert_products(y, coded, weights, x, experts)
            dense = launches.expand(get, coded, [0], threads=threads, rows_per_block=999)
            assert_same_weights(dense, weights)

    def test_an_infinity_stays_with_its_token(self, get):
        """Zeros are multiplied too, so that all outputs of the token are none; no others."""
        coded = random_tensor("lattice", (1, 40, 50), 0.8, seed=2)
        weights = product_weights(coded)
        x = np.ones((3, 50), BF16)
        x[1, int(np.argmax((weights[0] != 0).sum(axis=0)))] = np.inf
        experts = np.zeros(3, np.int32)
        y = launches.multiply(get, coded, x, experts, tile_tokens=4)
        assert not np.isfinite(y[1]).any()
        assert_products(y[[0, 2]], coded, weights, x[[0, 2]], experts[:2])

    def test_magnitudes(self, get):
        """All digits of all multiples, both signs."""
        codes = np.zeros((1, 33, 254), np.uint8)
        codes[0, np.arange(254) % 33, np.arange(254)] = 1 + np.arange(254)
        codes[0, 5] = codes[0, 5][::-1]
        levels = levels_like("lattice", codes.shape, 0, 0)
        check_decoders(get, encode(codes, levels, "lattice"), tile_tokens=(2,), tokens=2)

    @pytest.mark.parametrize("name", ["cursors", "visits", "row_block_starts"])
    def test_damaged_derived_arrays_stay_in_bounds(self, get, monkeypatch, name):
        """The sanitizers watch, and every output is some number."""
        coded = random_tensor("lattice", (1, 40, 300), 0.8, seed=5)
        argument = launches.coding_argument(get, coded)
        place = [field for field, _ in argument.struct.fields].index(name)
        monkeypatch.setattr(launches, "coding_argument", lambda *_: argument)
        rng, x = np.random.default_rng(6), np.ones((3, 300), BF16)
        for share in (0.05, 1.0):
            raw = argument.values[place].reshape(-1).view(np.uint8)
            some = rng.random(raw.size) < share
            raw[some] = rng.integers(0, 256, int(some.sum()))
            experts = np.zeros(3, np.int32)
            for tile in (1, 4):
                y = launches.multiply(get, coded, x[:tile], experts[:tile], tile_tokens=tile)
                assert np.isfinite(y).all()
            assert np.isfinite(launches.matmul(get, coded, x, experts, tile=8)).all()
            if name != "visits":  # a column that is visited twice is written twice: a race
                assert np.isfinite(launches.expand(get, coded, [0]).astype(np.float32)).all()

    @pytest.mark.parametrize("shape", [(2, 33, 31), (2, 40, 600), (1, 1, 1)])
    def test_starts_of_strings(self, get, shape):
        """`cursors` begin with what a walk over the blocks finds."""
        coded = random_tensor("lattice", shape, 0.8, seed=3)
        argument = launches.coding_argument(get, coded)
        names = [name for name, _ in argument.struct.fields]
        cursors, starts = (argument.values[names.index(n)] for n in ("cursors", "row_block_starts"))
        for expert in range(shape[0]):
            # Flags, rests, planes, signs, firsts, remainders; firsts follow the flags.
            sizes = LatticeCoding()._walk(coded, expert).part_bytes
            in_order = np.insert(sizes[:, :7], 1, sizes[:, 7], axis=1)
            expected = starts[expert][:, None] + np.cumsum(in_order, axis=1)
            np.testing.assert_array_equal(cursors[expert, :, 0], expected)


def check_matmul(get, coded, seed=0, *, tokens=21, tiles=None, **options):
    """Products by tensor cores, of the least and the largest tile, against float64."""
    spec = coded.spec
    all_tiles = kernels.matmul_kernels(spec.coding).tiles
    tiles = tiles or (all_tiles[0], all_tiles[-1])
    weights = product_weights(coded)
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(tokens, spec.width)).astype(BF16)
    experts = rng.integers(-1, spec.num_experts, tokens).astype(np.int32)
    for tile in tiles:
        y = launches.matmul(get, coded, x, experts, tile=tile, **options)
        assert_products(y, coded, weights, x, experts)
    rounded = launches.matmul(get, coded, x, experts, tile=tiles[0], float32=False)
    np.testing.assert_array_equal(rounded.view(np.uint16), y.astype(BF16).view(np.uint16))


def matmul_codings():
    return [name for name in coding_names() if (c := get_coding(name).cuda) and c.matmul]


@pytest.mark.parametrize("coding", matmul_codings())
class TestMatmul:
    """By tensor cores: rows are decoded chunk by chunk."""

    @pytest.mark.parametrize("width", [16, 1040, *slow(48, 80, 1024, 2080, 3072)])
    def test_widths(self, get, coding, width):
        """Chunks that end within a codeword, at its end, and at the row's; rows beyond the last."""
        for out in (1, 65) if width < 100 else (9,):
            coded = random_tensor(coding, (2, out, width), seed=width)
            many = 4 if coding == "lattice" else 16
            check_matmul(get, coded, seed=out, tokens=9, copies=1 if out == 1 else many)

    @pytest.mark.parametrize("dictionary", [9, *slow(0, 1, 2, 3, 4, 5, 6, 7, 8)])
    def test_each_dictionary(self, get, coding, dictionary):
        if coding == "lattice":
            pytest.skip("its dictionaries are those of strings: TestLattice has them")
        coded = random_tensor(coding, (1, 4, 1200), ZERO_WEIGHTS[dictionary] / 1024, dictionary)
        check_matmul(get, coded, tokens=5, tiles=(16, 32))

    @pytest.mark.parametrize("symbol", [1, *slow(0, 2)])
    def test_rows_of_one_symbol(self, get, coding, symbol):
        codes = np.full((1, 5, 1168), symbol, np.uint8)
        levels = levels_like(coding, codes.shape, -0.5, 0.25)
        check_matmul(get, encode(codes, levels, coding), tokens=3, tiles=(8,))

    def test_unlike_rows(self, get, coding):
        """Rows of a warp that need unlike many codewords for a chunk; 16-bit row lengths."""
        if coding == "lattice":
            pytest.skip("its rows are decoded together")
        codes, levels = random_codes(coding, (1, 7, 2400), 1.0, seed=2)
        dense, _ = random_codes(coding, (1, 7, 2400), 0.0, seed=3)
        codes[:, ::2] = dense[:, ::2]
        check_matmul(get, encode(codes, levels, coding), tiles=(8,))

    @pytest.mark.parametrize("tile", [8, 64, *slow(16, 32)])
    def test_counts_of_tokens(self, get, coding, tile):
        tile = min(tile, kernels.matmul_kernels(coding).tiles[-1])
        coded = random_tensor(coding, (3, 6, 96), seed=tile)
        weights = product_weights(coded)
        rng = np.random.default_rng(tile)
        for count in (1, 8, 9, tile, tile + 1):
            experts = rng.permutation([1] * count + [-1, 2, -1]).astype(np.int32)
            x = rng.normal(size=(len(experts), 96)).astype(BF16)
            y = launches.matmul(get, coded, x, experts, tile=tile)
            assert_products(y, coded, weights, x, experts)

    def test_tiles_of_tokens_equal_the_plain_ones(self, coding):
        rng = np.random.default_rng(0)
        for num_experts, num_tokens, size in ((1, 1, 8), (3, 40, 8), (5, 100, 16), (4, 7, 64)):
            experts = rng.integers(-1, num_experts, num_tokens).astype(np.int32)
            order = kernels.sort_tokens(jnp.asarray(experts), num_experts)
            found = kernels.tile_tokens(order, num_experts, size)
            expected = launches.tile_tokens(np.asarray(order.order), experts, num_experts, size)
            used = np.asarray(found.experts) >= 0
            for actual, plain in zip(found, expected, strict=True):
                np.testing.assert_array_equal(np.asarray(actual)[used], plain[:-2])
            assert not used[used.sum() :].any()

    @pytest.mark.parametrize("tile", [16, *slow(8, 32, 64)])
    def test_many_rows(self, get, coding, tile):
        """Several blocks of threads; warps whose rows the last one does not have."""
        tile = min(tile, kernels.matmul_kernels(coding).tiles[-1])
        coded = random_tensor(coding, (1, 33 * 17 + 5, 16), seed=tile)
        x = np.random.default_rng(tile).normal(size=(tile - 1, 16)).astype(BF16)
        experts = np.zeros(tile - 1, np.int32)
        y = launches.matmul(get, coded, x, experts, tile=tile)
        assert_products(y, coded, product_weights(coded), x, experts)

    def test_no_token_has_an_expert(self, get, coding):
        y = launches.matmul(get, random_tensor(coding, (2, 70, 16)), np.ones((3, 16), BF16),
                            np.full(3, -1))  # fmt: skip
        np.testing.assert_array_equal(y, 0)

    def test_damaged_codes_stay_in_bounds(self, get, coding):
        """Any bytes; the sanitizers watch, and every output is some number."""
        rng = np.random.default_rng(8)
        for trial in range(3):
            coded = random_tensor(coding, (2, 9, 1104), rng.choice([0.3, 0.85]), trial)
            arrays = {name: array.copy() for name, array in coded.arrays.items()}
            for name in set(arrays) - {"levels", "origins"}:
                raw = arrays[name].reshape(-1).view(np.uint8)
                raw[rng.random(raw.size) < 0.2] = rng.integers(0, 256)
            damaged = type(coded)(coded.spec, arrays)
            x = np.ones((3, 1104), BF16)
            y = launches.matmul(get, damaged, x, np.array([0, 1, 1], np.int32), tile=8)
            assert np.isfinite(y).all()

    def test_tiles_out_of_range_touch_nothing(self, get, coding):
        coded = random_tensor(coding, (2, 5, 32))
        x, y = np.ones((3, 32), BF16), np.full((3, 5), np.nan, np.float32)
        front = launches.coding_argument(get, coded)
        order, starts = np.array([7, -3, 1], np.int32), np.array([0, 0, 99], np.int32)
        tiles = (np.array([3, -1, 1, 1], np.int32), np.array([0, 0, -2, 7], np.int32))
        values = (x, order, starts, *tiles, y, 2, 5, 32, 3, 1, 1)
        get(f"matmul_{coding}_t8")(
            (1, 4),
            (kernels.matmul_kernels(coding).threads(5),),
            [front, launches.Struct(kernels.MATMUL, values)],
            shared_mem=kernels.matmul_shared_bytes(coding, 5, 8, 1),
        )
        assert np.isnan(y).all()


class TestTokens:
    @pytest.mark.parametrize("coding", WITH_KERNELS)
    @pytest.mark.parametrize("tile_tokens", [1, 2, 16, *slow(4, 8)])
    def test_counts_of_tokens(self, get, coding, tile_tokens):
        """An expert with n tokens for many n, one without any, tokens without an expert."""
        coded = random_tensor(coding, (3, 6, 90), seed=tile_tokens)
        weights = product_weights(coded)
        rng = np.random.default_rng(tile_tokens)
        for count in (1, 2, 3, 5, 8, 9, 16, 17):
            experts = rng.permutation([1] * count + [-1, 2, -1]).astype(np.int32)
            x = rng.normal(size=(len(experts), 90)).astype(BF16)
            y = launches.multiply(get, coded, x, experts, tile_tokens=tile_tokens)
            assert_products(y, coded, weights, x, experts)

    @pytest.mark.parametrize("coding", WITH_KERNELS)
    def test_no_token_has_an_expert(self, get, coding):
        coded = random_tensor(coding, (2, 37, 8))
        x = np.ones((3, 8), BF16)
        for float32 in (True, False):
            y = launches.multiply(get, coded, x, np.full(3, -1), float32=float32)
            np.testing.assert_array_equal(y.astype(np.float32), 0)

    @pytest.mark.parametrize("coding", WITH_KERNELS)
    def test_indices_out_of_range_touch_nothing(self, get, coding):
        """Token orders and starts from outside are not followed out of bounds."""
        coded = random_tensor(coding, (2, 5, 20))
        x, y = np.ones((3, 20), BF16), np.full((3, 5), np.nan, np.float32)
        front = launches.coding_argument(get, coded)
        order, experts = np.array([7, -3, 1], np.int32), np.array([1, 1, 1], np.int32)
        for starts in ([0, 0, 99], [0, -5, 3], [0, 2, 1]):
            values = (x, order, experts, np.array(starts, np.int32), y, 2, 5, 20, 3, 2, 16, 1, 1)
            get(kernels.fused_name(coding, 2, 4))(
                (3, 1),
                (64,),
                [front, launches.Struct(kernels.PRODUCT, values)],
                shared_mem=kernels.fused_shared_bytes(coding, 20, 2, 64),
            )
        assert np.isnan(y[[0, 2]]).all()

    @pytest.mark.parametrize("coding", WITH_KERNELS)
    @pytest.mark.parametrize(
        ("threads", "rows_per_block"), [(32, 1), (32, 64), (256, 7), (128, 40)]
    )
    def test_launch_sizes(self, get, coding, threads, rows_per_block):
        coded = random_tensor(coding, (2, 70, 45), seed=threads)
        weights = product_weights(coded)
        x = np.random.default_rng(1).normal(size=(3, 45)).astype(BF16)
        experts = np.array([1, 0, 1], np.int32)
        sizes = {"threads": threads, "rows_per_block": rows_per_block}
        for rows_per_warp in (4, 1):
            y = launches.multiply(get, coded, x, experts, rows_per_warp=rows_per_warp, **sizes)
            assert_products(y, coded, weights, x, experts)
        dense = launches.expand(get, coded, [1, 0], **sizes)
        assert_same_weights(dense, weights[[1, 0]])

    @pytest.mark.parametrize("coding", WITH_KERNELS)
    def test_order_of_threads_does_not_matter(self, get, coding):
        coded = random_tensor(coding, (2, 20, 300), 0.8, zeros=[1.0, 1.5])
        x = np.random.default_rng(3).normal(size=(6, 300)).astype(BF16)
        experts = np.array([0, 1, 0, 0, -1, 1], np.int32)
        runs = [
            (
                launches.multiply(get, coded, x, experts, order=order).tobytes(),
                launches.expand(get, coded, [1, 0], order=order).tobytes(),
            )
            for order in (0, 1, 2, 3)
        ]
        assert len(set(runs)) == 1


class TestDamage:
    """Whatever the bytes hold, kernels stay in bounds and write every output element."""

    def run_all(self, get, coded):
        spec = coded.spec
        dense = launches.expand(get, coded, list(range(spec.num_experts)))
        assert (dense.view(np.uint16) != launches.POISON).all()
        experts = np.arange(spec.num_experts, dtype=np.int32)
        x = np.ones((spec.num_experts, spec.width), BF16)
        results = [dense]
        for tile in (1, 8):
            for rows_per_warp in (4, 1):
                y = launches.multiply(
                    get, coded, x, experts, tile_tokens=tile, rows_per_warp=rows_per_warp
                )
                results.append(y)
                assert np.isfinite(y).all()
        return results

    @pytest.mark.parametrize("coding", WITH_KERNELS)
    @pytest.mark.parametrize("seed", [0, 1, 2, *slow(3, 4, 5)])
    def test_any_arrays(self, get, coding, seed):
        rng = np.random.default_rng(seed)
        coded = random_tensor(coding, (3, 40, int(rng.integers(1, 150))), rng.random(), seed)
        arrays = {name: array.copy() for name, array in coded.arrays.items()}
        for name in rng.choice(sorted(set(arrays) - {"levels", "origins"}), 2):
            raw = arrays[name].reshape(-1).view(np.uint8)
            some = rng.random(raw.size) < rng.choice([0.02, 1.0])
            raw[some] = rng.integers(0, 256, int(some.sum()))
        self.run_all(get, CodedTensor(coded.spec, arrays))

    @pytest.mark.parametrize("coding", ["tunstall", "tunstall_2bit", "qmoe", "lattice"])
    def test_empty_codes(self, get, coding):
        coded = random_tensor(coding, (2, 3, 20))
        name = "codewords" if coding == "qmoe" else "words"
        offsets = np.zeros(3, np.int32)
        arrays = coded.arrays | {name: coded.arrays[name][:0], "expert_offsets": offsets}
        for result in self.run_all(get, CodedTensor(coded.spec, arrays)):
            if coding != "tunstall_2bit":
                np.testing.assert_array_equal(result.astype(np.float32), 0)

    @pytest.mark.parametrize("coding", ["tunstall", "tunstall_2bit", "qmoe", "lattice"])
    def test_a_damaged_expert_leaves_the_others(self, get, coding):
        coded = random_tensor(coding, (3, 9, 80))
        name = "codewords" if coding == "qmoe" else "words"
        arrays = coded.arrays | {name: coded.arrays[name].copy()}
        start, stop = arrays["expert_offsets"][1:3]
        arrays[name][start:stop] = np.iinfo(arrays[name].dtype).max
        for good, bad in zip(
            self.run_all(get, coded),
            self.run_all(get, CodedTensor(coded.spec, arrays)),
            strict=True,
        ):
            np.testing.assert_array_equal(good[[0, 2]], bad[[0, 2]])


class TestEncoders:
    @pytest.mark.parametrize("coding", ["tunstall", "tunstall_2bit"])
    @pytest.mark.parametrize(
        ("shape", "zero_share"),
        [((1, 1, 1), 0.5), ((2, 3, 59), 0.9), ((2, 70, 64), 0.5), ((3, 33, 131), 0.85)]
        + [((1, 2, 700), share) for share in (0.0, 0.3, 0.75, 0.97, 1.0)],
    )
    def test_tunstall(self, get, coding, shape, zero_share):
        codes, levels = random_codes(coding, shape, zero_share, seed=7)
        coded = encode(codes, levels, coding)
        arrays = coded.arrays
        words, offsets, num_bytes, num_codewords = launches.encode_tunstall(
            get, codes, levels, arrays["dictionaries"], coding, threads=32 * (1 + shape[1] % 3)
        )
        np.testing.assert_array_equal(words, arrays["words"])
        np.testing.assert_array_equal(offsets, arrays["expert_offsets"])
        shortest = arrays["shortest_rows"][:, None]
        np.testing.assert_array_equal(num_bytes - shortest, arrays["row_lengths"])
        bound = coded.spec.max_row_codewords
        assert bound - 32 < num_codewords.max() <= bound

    @pytest.mark.parametrize("width", [1, 3, 4, 5, 130])
    def test_packed2(self, get, width):
        codes, levels = random_codes("packed2", (2, 3, width), 0.5, seed=width)
        packed = np.full((2, 3, -(-width // 4)), 0xEE, np.uint8)
        arguments = [codes, packed, np.uint64(6), np.int32(width)]
        get("encode_packed2")((-(-packed.size // 64),), (64,), arguments)
        np.testing.assert_array_equal(packed, encode(codes, levels, "packed2").arrays["packed"])


class TestRowBlockStarts:
    @pytest.mark.parametrize("coding", ["tunstall", "tunstall_2bit", "qmoe"])
    @pytest.mark.parametrize("out", [1, 31, 32, 33, 100])
    def test_are_running_sums(self, get, coding, out):
        coded = random_tensor(coding, (3, out, 25), seed=out)
        lengths = coded.arrays["row_lengths"].astype(np.int64)
        if coding != "qmoe":
            lengths = lengths + coded.arrays["shortest_rows"][:, None]
        starts = np.cumsum(lengths, axis=1) - lengths
        np.testing.assert_array_equal(launches.row_block_starts(get, coded), starts[:, ::32])


def without(text: str, barrier: str, occurrence: int) -> str:
    """The text with one call of the barrier taken out."""
    places = [match.span() for match in re.finditer(re.escape(barrier), text)]
    start, stop = places[occurrence]
    return text[:start] + "/* taken out */;" + text[stop:]


def barriers():
    """Every barrier of the kernels: file, call, which one."""
    for path in sorted(emulator.KERNEL_FOLDER.glob("*.cu*")):
        for barrier in ("__syncwarp();", "__syncthreads();"):
            for occurrence in range(path.read_text().count(barrier)):
                yield path.name, barrier, occurrence


class TestEveryBarrierIsNeeded:
    """A kernel that lacks one of its barriers is caught by the emulation."""

    def run_file(self, get, name):
        if name == "encode.cu":
            codes, levels = random_codes("tunstall", (1, 40, 150), 0.8, seed=0)
            numbers = np.zeros(1, np.uint8)
            launches.encode_tunstall(get, codes, levels, numbers, "tunstall")
            launches.coding_argument(get, random_tensor("lattice", (1, 20, 40), 0.9))
            return
        if name in ("coding_lattice.cuh", "lattice_products.cuh", "fused_lattice.cu", "common.cuh"):
            coded = random_tensor("lattice", (1, 170, 400), 0.85)
            assert 100 < coded.arrays["grouped_columns"][0] < 300
            x, experts = np.ones((2, 400), BF16), np.zeros(2, np.int32)
            launches.multiply(get, coded, x, experts, rows_per_block=999, threads=96)
            # So many weights that half of a task is decoded at a time.
            dense = random_tensor("lattice", (1, 32, 300), 0)
            launches.multiply(get, dense, np.ones((2, 300), BF16), experts)
            return
        if name == "matmul_lattice.cu":
            x, experts = np.ones((9, 300), BF16), np.array([0] * 8 + [-1], np.int32)
            launches.matmul(get, random_tensor("lattice", (1, 70, 300)), x, experts, tile=8)
            launches.matmul(get, random_tensor("lattice", (1, 9, 300), 1.0), x, experts, tile=8)
            return
        if name == "matmul_fragments.cu":
            coded, experts = random_tensor("lattice", (1, 40, 300)), np.zeros(1, np.int32)
            arrays = made(coded)
            placed = placed_tokens(coded, arrays, np.ones((1, 300), BF16), experts)
            options = {"tile": 8, "row_parts": 4}
            launches.fragment_product(get, coded.spec, arrays, placed, experts, **options)
            return
        if name == "matmul.cuh":
            x, experts = np.ones((3, 1104), BF16), np.array([0, 0, -1], np.int32)
            launches.matmul(get, random_tensor("tunstall", (1, 5, 1104)), x, experts, tile=8)
            return
        coded = random_tensor("tunstall_2bit", (1, 12, 400), 0.8, zeros=[1.0, 1.5, -2.0])
        if name == "multiply.cuh":
            x = np.ones((2, 400), BF16)
            launches.multiply(get, coded, x, np.zeros(2, np.int32), tile_tokens=2)
            return
        launches.expand(get, coded, [0])
        # Rows that end early: what they leave out is written after their last round.
        lengths = coded.arrays["row_lengths"] // 4
        shortest = coded.arrays["shortest_rows"] // 4
        arrays = coded.arrays | {"row_lengths": lengths, "shortest_rows": shortest}
        launches.expand(get, CodedTensor(coded.spec, arrays), [0])
        # Rounds of so many columns that the next one's reach round the ring to those just cleared.
        launches.expand(get, random_tensor("tunstall", (1, 2, 9000), 0.995), [0])
        launches.expand(get, random_tensor("lattice", (1, 40, 50), 0.8), [0], rows_per_block=64)

    def module(self, folder, name):
        users = {
            "multiply.cuh": "fused_tunstall_2bit.cu",
            "matmul.cuh": "matmul_tunstall.cu",
            "coding_lattice.cuh": "fused_lattice.cu",
            "lattice_products.cuh": "fused_lattice.cu",
            "common.cuh": "fused_lattice.cu",
        }
        needed = users.get(name, name)
        sources = [needed] if needed == "encode.cu" else [needed, "encode.cu"]
        return emulator.EmulatedModule(emulator.build(folder, "checked", sources)).get_function

    @pytest.mark.parametrize("name", sorted({name for name, _, _ in barriers()}))
    def test_intact_sources_pass(self, name):
        self.run_file(self.module(emulator.KERNEL_FOLDER, name), name)

    @pytest.mark.parametrize(("name", "barrier", "occurrence"), list(barriers()))
    def test_one_barrier_less(self, tmp_path, name, barrier, occurrence):
        folder = Path(shutil.copytree(emulator.KERNEL_FOLDER, tmp_path / "kernels"))
        text = (folder / name).read_text()
        (folder / name).write_text(without(text, barrier, occurrence))
        get = self.module(folder, name)
        with pytest.raises(emulator.EmulationError, match="race|nobody has written"):
            self.run_file(get, name)


FAULTS = r"""
#include "common.cuh"
using namespace qmoe;
extern "C" __global__ void ended_lane(int* out) {
  if (threadIdx.x == 5) return;
  __syncwarp();
}
extern "C" __global__ void ended_warp(int* out) {
  if (threadIdx.x >= 32) return;
  __syncthreads();
}
extern "C" __global__ void different_calls(int* out) {
  if (threadIdx.x % 2) __shfl_sync(ALL_LANES, 1, 0);
  else __syncwarp();
}
extern "C" __global__ void half_mask(int* out) {
  if (threadIdx.x < 16) __syncwarp(0xffff);
}
extern "C" __global__ void race_in_warp(int* out) {
  shared_store<int>(4 * threadIdx.x, 1);
  __shfl_sync(ALL_LANES, 1, 0);  // orders nothing
  out[threadIdx.x] = shared_load<int>(4 * (threadIdx.x ^ 1));
}
extern "C" __global__ void race_of_warps(int* out) {
  shared_store<int>(4 * threadIdx.x, 1);
  __syncwarp();
  out[threadIdx.x] = shared_load<int>(4 * (threadIdx.x ^ 32));
}
extern "C" __global__ void write_after_read(int* out) {
  shared_store<int>(4 * threadIdx.x, 1);
  __syncthreads();
  out[threadIdx.x] = shared_load<int>(0);
  if (threadIdx.x == 40) shared_store<int>(0, 2);
}
extern "C" __global__ void or_and_read(int* out) {
  if (threadIdx.x == 0) shared_store<int>(0, 0);
  __syncthreads();
  shared_or(0, 1u << threadIdx.x % 32);
  out[threadIdx.x] = shared_load<int>(0);
}
extern "C" __global__ void or_after_write(int* out) {
  if (threadIdx.x == 0) shared_store<int>(0, 0);
  else shared_or(0, 1);
}
extern "C" __global__ void or_by_others(int* out) {
  if (threadIdx.x == 0) shared_store<int>(0, 0);
  __syncthreads();
  shared_or(0, 1u << threadIdx.x % 32);
  if (threadIdx.x == 63) out[0] = shared_load<int>(0);  // what the others of its warp have set
}
extern "C" __global__ void or_unwritten(int* out) { shared_or(0, 1); }
extern "C" __global__ void unwritten(int* out) { out[threadIdx.x] = shared_load<int>(0); }
extern "C" __global__ void outside_shared(int* out) { shared_store<int>(256 + 4 * threadIdx.x, 1); }
extern "C" __global__ void misaligned(int* out) { shared_store<int>(2, 1); }
extern "C" __global__ void outside_array(int* out) { out[threadIdx.x + 1] = 1; }
extern "C" __global__ void overflow(int* out) { out[threadIdx.x] += 0x7fffffff; }
extern "C" __global__ void fine(int* out) {
  shared_store<int>(4 * threadIdx.x, threadIdx.x);
  __syncwarp();
  const int other = shared_load<int>(4 * (threadIdx.x ^ 1));
  __syncwarp();
  shared_store<int>(4 * threadIdx.x, other);
  __syncthreads();
  shared_or(0, 1u << threadIdx.x % 32);  // atomic: needs no barrier beside its like
  shared_or(4, 1u << threadIdx.x % 32);
  __syncthreads();
  if (threadIdx.x < 2) {
    const int all = shared_load<int>(4 * threadIdx.x);
    shared_store<int>(4 * threadIdx.x, all == -1 ? threadIdx.x ^ 1 : 99);
  }
  __syncthreads();
  out[threadIdx.x] = shared_load<int>(4 * (63 - threadIdx.x)) + __shfl_up_sync(ALL_LANES, 1, 1, 8);
}
"""


@pytest.fixture(scope="session")
def fault_library(tmp_path_factory):
    """Builds the kernels above."""
    folder = tmp_path_factory.mktemp("faults")
    shutil.copy(emulator.KERNEL_FOLDER / "common.cuh", folder)
    (folder / "faults.cu").write_text(FAULTS)
    return lambda kind: emulator.build(folder, kind, ("faults.cu",))


class TestEmulation:
    """The emulation finds what it says it finds."""

    def launch(self, get, name):
        out = np.ones(64, np.int32)
        get(name)((1,), (64,), [out], shared_mem=256)
        return out

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("ended_lane", r"divergent warp: .* but thread 5 has ended"),
            ("ended_warp", r"divergent block: .* but thread 32 has ended"),
            ("different_calls", r"divergent warp: .*__syncwarp.* but .*__shfl_sync"),
            ("half_mask", r"mask 0xffff; only full masks"),
            ("race_in_warp", r"race on shared offset \d+: read by thread \d+ after a write"),
            ("race_of_warps", r"race on shared offset \d+: read by thread \d+ after a write"),
            ("write_after_read", r"race on shared offset 0: write by thread 40 after reads"),
            ("or_and_read", r"race on shared offset 0: write by thread 1 after reads by others"),
            ("or_by_others", r"race on shared offset 0: read by thread 63 after a write"),
            ("or_after_write", r"race on shared offset 0: write by thread 1 after a write"),
            ("or_unwritten", r"shared offset 0, which nobody has written"),
            ("unwritten", r"shared offset 0, which nobody has written \(faults.cu:\d+\)"),
            ("outside_shared", r"offset 256, but the launch has 256 bytes"),
            ("misaligned", r"offset 2 is not aligned to 4"),
        ],
    )
    def test_faults(self, fault_library, name, message):
        module = emulator.EmulatedModule(fault_library("checked"))
        with pytest.raises(emulator.EmulationError, match=message):
            self.launch(module.get_function, name)
        # It goes on after a fault.
        fine = self.launch(module.get_function, "fine")
        np.testing.assert_array_equal(fine, (63 - np.arange(64) ^ 1) + 1)

    @pytest.mark.parametrize(
        ("name", "message"),
        [("outside_array", "heap-buffer-overflow"), ("overflow", "signed integer overflow")],
    )
    def test_faults_for_the_sanitizers(self, fault_library, name, message):
        module = emulator.SanitizedModule(fault_library("sanitized"))
        try:
            with pytest.raises(emulator.EmulationError, match=message):
                self.launch(module.get_function, name)
        finally:
            module.close()

    def test_arguments_are_checked(self, fault_library):
        kernel = emulator.EmulatedModule(fault_library("checked")).get_function("fine")
        out = np.ones((64, 2), np.int32)
        with pytest.raises(TypeError, match="takes 1 arguments, not 2"):
            kernel((1,), (64,), [out, out])
        with pytest.raises(TypeError, match="not C-contiguous"):
            kernel((1,), (64,), [out[:, 0]])
        with pytest.raises(TypeError, match="must be a pointer"):
            kernel((1,), (64,), [np.float32(1)])
        with pytest.raises(emulator.EmulationError, match="multiple of 32 threads"):
            kernel((1,), (33,), [out])
        with pytest.raises(KeyError, match="no kernel 'other'"):
            emulator.EmulatedModule(fault_library("checked")).get_function("other")
