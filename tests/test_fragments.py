"""Codes of the lattice as fragments: how they lie, and products by tensor cores, emulated."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from cuda_emulation import emulator, launches
from cuda_emulation.lattice_fragments import (
    assert_rounded_products,
    check_kernel,
    chunk_symbols,
    decoded,
    made,
    placed_tokens,
    read_back,
)
from cuda_emulation.tensors import lattice_codes
from golden_data import DEMO
from markers import needs_compiler, slow

from qmoe_jax.checkpoints.t5x import open_t5x_checkpoint
from qmoe_jax.codec import reference
from qmoe_jax.codec.codings import get_coding
from qmoe_jax.codec.decode import device_arrays
from qmoe_jax.codec.encode import encode
from qmoe_jax.codec.lattice_values import STEP_TABLE, multiples
from qmoe_jax.codec.tensor import CodedTensor, TensorSpec
from qmoe_jax.errors import CudaError
from qmoe_jax.ops.cuda import fragment_products, fragments, kernels
from qmoe_jax.ops.experts import CodedExperts
from qmoe_jax.ops.products import compressed_product
from qmoe_jax.quantization.expert_batch import quantize_experts
from qmoe_jax.quantization.lattice import Lattice

BF16 = ml_dtypes.bfloat16
SHAPES = [(2, 33, 31), (1, 1, 1), (3, 200, 90), (2, 70, 300), *slow((1, 64, 64), (2, 500, 130))]


def random_tensor(shape, zero_share=0.8, seed=0) -> CodedTensor:
    return encode(*lattice_codes(np.random.default_rng(seed), shape, zero_share), "lattice")


def tensor_of(values: np.ndarray, step: int = 1) -> CodedTensor:
    """Codes of given multiples [experts, out, in]."""
    codes = np.where(values > 0, 2 * values, np.where(values < 0, -2 * values - 1, 0))
    steps = np.full((values.shape[0], values.shape[2]), step, np.uint8)
    levels = {"step_index": steps, "origin": np.ones(len(values), np.float32)}
    return encode(codes.astype(np.uint8), levels, "lattice")


class TestLayout:
    @pytest.mark.parametrize("zero_share", [0.0, 0.9, 1.0])
    @pytest.mark.parametrize("shape", SHAPES)
    def test_all_multiples_come_back(self, shape, zero_share):
        coded = random_tensor(shape, zero_share, seed=shape[1])
        arrays = made(coded)
        values, _ = read_back(coded, arrays)
        np.testing.assert_array_equal(values, decoded(coded))
        assert not arrays["fragments"][-fragments.READ_BEHIND :].any()
        assert arrays["fragment_starts"][-1] == len(arrays["fragments"]) - fragments.READ_BEHIND

    def test_every_multiple(self):
        values = np.arange(-127, 128)[None, None].repeat(3, axis=1)
        coded = tensor_of(values)
        np.testing.assert_array_equal(read_back(coded, made(coded))[0], values)

    @pytest.mark.parametrize(("rows", "extras"), [(49, 0), (50, 1), (149, 1)])
    def test_a_large_multiple_is_left_over_where_its_column_has_many_rows(self, rows, extras):
        """One unit for each fifty rows."""
        values = np.ones((1, rows, 5), np.int64)
        values[0, rows - 1, 3] = -2
        coded = tensor_of(values)
        arrays = made(coded)
        np.testing.assert_array_equal(read_back(coded, arrays)[0], values)
        assert (arrays["fragment_places"] >> 27).astype(bool).sum() == 6 - extras
        assert arrays["extra_starts"][-1] == extras

    def test_rows_of_a_strip_share_extra_places(self):
        values = np.ones((1, 1000, 2), np.int64)
        values[0, [3, 7, 31, 32], 1] = [2, -3, 5, 2]
        coded = tensor_of(values)
        arrays = made(coded)
        np.testing.assert_array_equal(read_back(coded, arrays)[0], values)
        np.testing.assert_array_equal(arrays["extra_starts"], [0, 1, *[2] * 31])
        # Four units of the largest; the others are in the first ones.
        assert (arrays["extra_places"][0] == 1).sum() == 4

    def test_columns_of_zeros_have_no_place(self):
        values = np.zeros((2, 40, 300), np.int64)
        values[0, 5, 17] = 1
        coded = tensor_of(values)
        arrays = made(coded)
        assert len(arrays["fragments"]) == fragments.READ_BEHIND + 2
        assert (arrays["fragment_places"] >> 27).astype(bool).sum() == 1
        assert arrays["fragment_places"][0, 0] & 0x7FFFF == 17

    def test_steps_of_places(self):
        coded = random_tensor((2, 20, 80), seed=3)
        arrays = made(coded)
        columns, halves = fragments.places_of(jnp.asarray(arrays["fragment_places"]))
        steps = STEP_TABLE[fragments.step_indices(coded.arrays)]
        for expert in range(2):
            digits = (arrays["fragment_places"][expert] >> 27).astype(int)
            own = 0.5 * 3.0 ** (digits - 1) * steps[expert][columns[expert]]
            expected = np.where(digits, own, 0)
            np.testing.assert_allclose(halves[expert], expected, rtol=2**-23)

    def test_too_many_places_are_refused(self):
        coded = random_tensor((1, 2, 3))
        wide = dataclasses.replace(coded.spec, width=1 << 19)
        with pytest.raises(CudaError, match="less than 65536 places.*implementation='cuda'"):
            fragments.make_fragments(wide, coded.arrays, lambda _: jnp.zeros((1, 2, 3), jnp.int8))
        values = np.full((1, 1, 11_000), 127, np.int64)
        wide = dataclasses.replace(coded.spec, rows=1, width=11_000)
        with pytest.raises(CudaError, match="66000 columns or places"):
            fragments.make_fragments(wide, {}, lambda _: jnp.asarray(values, jnp.int8))


class TestPlacedTokens:
    @pytest.mark.parametrize("size", [1.0, 1e-30, 1e30])
    def test_are_features_times_half_steps(self, size):
        """To 11 bits, whatever their size."""
        coded = random_tensor((3, 60, 70), seed=1)
        arrays = made(coded)
        rng = np.random.default_rng(2)
        x = (size * rng.normal(size=(6, 70))).astype(BF16)
        experts = np.array([2, -1, 0, 2, 1, 1])
        rows, scales = placed_tokens(coded, arrays, x, experts)
        assert rows.dtype == np.float16
        assert rows.shape == (arrays["fragment_places"].shape[1] // 8, 6 + 64, 8)
        np.testing.assert_array_equal(rows[:, 6:], 0)
        np.testing.assert_array_equal(np.frexp(scales)[0], 0.5)
        sums = rows[:, :6].transpose(1, 0, 2).reshape(6, -1) * scales[:, None].astype(np.float64)
        order = np.argsort(np.where(experts < 0, 3, experts), kind="stable")
        columns, halves = fragments.places_of(jnp.asarray(arrays["fragment_places"]))
        for row, token in enumerate(order[:-1]):
            expert = experts[token]
            features = x[token].astype(np.float64)[columns[expert]]
            exact = np.asarray(halves[expert], np.float64) * features
            exact *= coded.arrays["origins"][expert]
            # The smallest float16 is a 2^38th of the largest value.
            least = 2.0**-38 * np.abs(exact).max()
            np.testing.assert_allclose(sums[row], exact, rtol=1.001 * 2.0**-11, atol=least)

    def test_what_is_not_finite_is_kept_in_its_place(self):
        coded = tensor_of(np.ones((1, 2, 3), np.int64))
        arrays = made(coded)
        for value in (np.inf, np.nan):
            x = np.array([[1, value, 2], [1, 1, 2], [0, 0, 0]], BF16)
            rows, scales = placed_tokens(coded, arrays, x, np.zeros(3, int))
            assert np.isfinite(scales).all()
            np.testing.assert_array_equal(np.isfinite(rows[0, 0]), np.arange(8) != 1)
            np.testing.assert_array_equal(rows[0, 1, :3] / rows[0, 1, 0], [1, 1, 2])
            assert 2**14 <= rows[0, 1, 2] < 2**15
            np.testing.assert_array_equal(rows[1:], 0)


@pytest.fixture(scope="module")
def get():
    """get_function of the kernels under the sanitizers."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    module = emulator.SanitizedModule(emulator.build(kind="sanitized"))
    yield module.get_function
    module.close()


class TestKernel:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_shapes(self, get, shape):
        coded = random_tensor(shape, seed=shape[2])
        check_kernel(get, coded, made(coded), tokens=5, tile=8)

    @pytest.mark.parametrize("tile", fragment_products.TILES)
    def test_tiles(self, get, tile):
        """Tiles that are full, and not; extra places."""
        coded = random_tensor((2, 70, 130), seed=tile)
        arrays = made(coded)
        assert arrays["extra_starts"][-1] > 0
        for tokens in (1, 3 * tile) if tile < 32 else (2 * tile,):
            check_kernel(get, coded, arrays, tokens, tile)
        check_kernel(get, coded, arrays, 3, tile, float32=False)

    @pytest.mark.parametrize("row_parts", [1, 2, 4, 8])
    def test_warps_that_share_rows(self, get, row_parts):
        """As many chunks as warps, fewer and more; loads ahead of the last."""
        for width, share in ((64, 0.0), (700, 0.2), (900, 0.5)):
            coded = random_tensor((1, 40, width), share, seed=width)
            check_kernel(get, coded, made(coded), tokens=2, tile=8, row_parts=row_parts)

    def test_an_infinity_stays_with_its_token(self, get):
        coded = random_tensor((1, 60, 50), 0.5, seed=2)
        arrays = made(coded)
        x = np.ones((3, 50), BF16)
        x[1] = np.inf
        experts = np.zeros(3, np.int32)
        placed = placed_tokens(coded, arrays, x, experts)
        y = launches.fragment_product(get, coded.spec, arrays, placed, experts, tile=8)
        assert not np.isfinite(y[1]).any()
        np.testing.assert_array_equal(y[0], y[2])
        assert np.isfinite(y[0]).all()

    @pytest.mark.parametrize(
        "name", ["fragments", "fragment_starts", "extra_fragments", "extra_places", "extra_starts"]
    )
    def test_damaged_arrays_stay_in_bounds(self, get, name):
        """The sanitizers watch, and every output is some number."""
        coded = random_tensor((2, 70, 90), seed=6)
        arrays = made(coded)
        assert arrays["extra_starts"][-1] > 0
        experts = np.array([0, 1, 1, -1], np.int32)
        placed = placed_tokens(coded, arrays, np.ones((4, 90), BF16), experts)
        rng = np.random.default_rng(7)
        for share in (0.05, 1.0):
            damaged = {**arrays, name: arrays[name].copy()}
            raw = damaged[name].reshape(-1).view(np.uint8)
            some = rng.random(raw.size) < share
            raw[some] = rng.integers(0, 256, int(some.sum()))
            if name in ("fragment_starts", "extra_starts"):
                damaged[name][rng.integers(0, len(damaged[name]))] = rng.choice([-1, 2**31 - 1])
            y = launches.fragment_product(get, coded.spec, damaged, placed, experts, tile=8)
            assert np.isfinite(y).all()


def experts_with_fragments(launcher, shape, seed=0) -> CodedExperts:
    coded = random_tensor(shape, seed=seed)
    arrays = device_arrays(coded)
    derived = kernels.derive(launcher, coded.spec, arrays)
    found = fragments.derive_fragments(launcher, coded.spec, arrays, derived)
    return CodedExperts(coded.spec, arrays, shape[2], {**derived, **found})


def product(experts, implementation):
    return lambda x, index: compressed_product(
        x,
        index,
        experts,
        num_experts=experts.spec.num_experts,
        out_features=experts.out_features,
        implementation=implementation,
    )


@needs_compiler
class TestProducts:
    def test_fragments_are_those_of_the_stored_codes(self, launcher):
        """The GPU's expansion, rounded to bfloat16, gives every multiple back."""
        values = np.random.default_rng(0).integers(-127, 128, (2, 40, 260))
        coded = tensor_of(values, step=255)
        coded.arrays["origins"] = np.array([0.0, np.nan], np.float32)
        arrays = device_arrays(coded)
        derived = kernels.derive(launcher, coded.spec, arrays)
        found = fragments.derive_fragments(launcher, coded.spec, arrays, derived)
        for name, array in made(coded).items():
            np.testing.assert_array_equal(found[name], array)

    @pytest.mark.parametrize("tokens", [1, 6, 40, 200])
    def test_in_and_out_of_jit(self, launcher, tokens):
        """Beside float64 products with the weights of the reference decoder."""
        experts = experts_with_fragments(launcher, (3, 70, 90))
        rng = np.random.default_rng(tokens)
        x = jnp.asarray(rng.normal(size=(tokens, 90)), jnp.bfloat16)
        index = jnp.asarray(rng.integers(-1, 3, tokens), jnp.int32)
        launcher.calls.clear()
        outside = product(experts, "cuda_fragments")(x, index)
        inside = jax.jit(product(experts, "cuda_fragments"))(x, index)
        assert [in_jit for _, in_jit in launcher.calls] == [False, True]
        assert all(name.startswith("matmul_fragments") for name, _ in launcher.calls)
        np.testing.assert_array_equal(outside, inside)
        coded = CodedTensor(experts.spec, {n: np.asarray(a) for n, a in experts.arrays.items()})
        codes = get_coding("lattice").decode_numpy_reference(coded)
        weights = reference.dequantize(coded, codes)
        assert_rounded_products(*map(np.asarray, (inside, weights, x, index)))

    @pytest.mark.parametrize("size", [1.0, 1e-20])
    def test_float32_tokens_are_two_parts(self, launcher, size):
        experts = experts_with_fragments(launcher, (2, 40, 70))
        rng = np.random.default_rng(3)
        x = jnp.asarray(size * rng.normal(size=(5, 70)), jnp.float32)
        index = jnp.array([0, 1, -1, 1, 0])
        launcher.calls.clear()
        y = jax.jit(product(experts, "cuda_fragments"))(x, index)
        assert launcher.calls == [("matmul_fragments_lattice_t16", True)]
        assert y.dtype == jnp.float32
        coded = CodedTensor(experts.spec, {n: np.asarray(a) for n, a in experts.arrays.items()})
        codes = get_coding("lattice").decode_numpy_reference(coded)
        weights = reference.dequantize(coded, codes).astype(np.float64)
        for token, expert in enumerate(np.asarray(index)):
            if expert < 0:
                assert not y[token].any()
                continue
            exact = np.asarray(x[token], np.float64)
            error = np.abs(np.asarray(y[token], np.float64) - weights[expert] @ exact)
            # 22 bits, three times for many digits; and float32 sums.
            bound = (3 * 2.0**-22 + 100 * 2.0**-24) * (np.abs(weights[expert]) @ np.abs(exact))
            assert (error <= bound).all()

    def test_more_tokens_expand(self, launcher):
        experts = experts_with_fragments(launcher, (1, 40, 30))
        launcher.calls.clear()
        x = jnp.ones((129, 30), jnp.bfloat16)
        product(experts, "cuda_fragments")(x, jnp.zeros(129, jnp.int32))
        assert [name for name, _ in launcher.calls] == ["expand_lattice"]

    def test_without_fragments_stored_codes_are_multiplied(self, launcher):
        experts = experts_with_fragments(launcher, (2, 40, 30))
        kept = {name: experts.derived[name] for name in ("row_block_starts", "visits", "cursors")}
        experts = dataclasses.replace(experts, derived=kept)
        launcher.calls.clear()
        x, index = jnp.ones((3, 30), jnp.bfloat16), jnp.array([0, 1, 1])
        product(experts, "cuda_fragments")(x, index)
        assert [name for name, _ in launcher.calls] == ["fused_lattice_t16"]


class TestSizes:
    @pytest.mark.parametrize(("step", "least", "most"), [(4.0, 0.9, 1.1), (2.0, 1.1, 1.5)])
    @pytest.mark.parametrize("kernel", ["wi", "wo"])
    def test_estimate_beside_codes_of_gptq(self, kernel, step, least, most):
        """Of the demo's weights, behind features that are of different sizes and correlated."""
        path = f"encoder/layers_1/mlp/expert/{kernel}/kernel"
        weights = open_t5x_checkpoint(DEMO / "checkpoint_4200").read(path)[:2]
        width = weights.shape[1]
        rng = np.random.default_rng(0)
        x = rng.normal(size=(2 * width, width)) * np.exp(rng.normal(size=width))
        x += 0.3 * rng.normal(size=(2 * width, 1))
        hessians = np.repeat((x.T @ x)[None], 2, axis=0).astype(np.float32)
        found = quantize_experts(
            jnp.asarray(weights), jnp.asarray(hessians), jnp.ones(2), grid=Lattice(), step=step
        )
        levels = {"step_index": found.levels.index, "origin": found.levels.origin}
        levels = {name: np.asarray(array) for name, array in levels.items()}
        coded = encode(np.asarray(found.codes), levels, "lattice")
        values = np.asarray(multiples(found.codes), np.int8)
        own = fragments.make_fragments(
            coded.spec, coded.arrays, lambda expert: jnp.asarray(values[expert][None])
        )
        # Without what is there once a kernel, and much beside two experts.
        fixed = 512 * fragments.READ_BEHIND
        estimate = fragments.fragment_bytes(coded.spec) - fixed
        assert least * estimate < sum(array.nbytes for array in own) - fixed < most * estimate

    @pytest.mark.parametrize("shape", SHAPES)
    def test_of_ternary_codes_they_are_exact(self, shape):
        spec = TensorSpec("tunstall", *shape)
        own = fragments.make_ternary_fragments(spec, lambda _: jnp.zeros(shape[1:], jnp.uint8))
        assert fragments.fragment_bytes(spec) == sum(array.nbytes for array in own)

    def test_of_ones_they_are_the_estimate_without_extra_chunks(self):
        coded = tensor_of(np.ones((3, 200, 500), np.int64))
        strips = 3 * 7
        own = sum(array.nbytes for array in made(coded).values())
        assert fragments.fragment_bytes(coded.spec) == own + strips * (512 + 128)

    def test_what_auto_takes(self):
        spec = TensorSpec("lattice", 2, 70, 90)
        needed = 2 * fragments.fragment_bytes(spec)
        assert fragments.are_default([spec, spec], 2 * needed)
        assert not fragments.are_default([spec, spec], 2 * needed - 1)
        assert not fragments.are_default([spec], None)
        assert not fragments.are_default([spec, TensorSpec("tunstall", 2, 70, 90)], 10**12)


class TestTernary:
    """Codes of the ternary grid: their columns lie as they are, their levels stay apart."""

    @pytest.mark.parametrize("shape", SHAPES)
    def test_all_codes_come_back(self, shape):
        codes = np.random.default_rng(1).choice(3, shape, p=[0.8, 0.1, 0.1]).astype(np.uint8)
        spec = TensorSpec("tunstall", *shape)
        arrays = fragments.make_ternary_fragments(spec, lambda expert: jnp.asarray(codes[expert]))
        strips, chunks = -(-shape[1] // 32), -(-shape[2] // 64)
        np.testing.assert_array_equal(
            arrays.fragment_starts, strips * chunks * np.arange(shape[0] + 1)
        )
        words = np.asarray(arrays.fragments)
        assert not words[-fragments.READ_BEHIND :].any()
        words = words[: -fragments.READ_BEHIND].reshape(shape[0], strips, chunks, -1)
        for place in np.ndindex(words.shape[:3]):
            expert, strip, chunk = place
            rows, columns = slice(32 * strip, 32 * strip + 32), slice(64 * chunk, 64 * chunk + 64)
            expected = np.array([0, -1, 1])[codes[expert, rows, columns]]
            found = chunk_symbols(words[place], is_ternary=True)
            height, width = expected.shape
            np.testing.assert_array_equal(found[:height, :width], expected)
            assert not found[height:].any()
            assert not found[:, width:].any()

    def test_too_many_columns_are_refused(self):
        spec = TensorSpec("tunstall", 1, 2, 1 << 17)
        with pytest.raises(CudaError, match="131072 columns.*implementation='cuda'"):
            fragments.make_ternary_fragments(spec, lambda _: jnp.zeros((2, 1 << 17), jnp.uint8))

    @pytest.mark.parametrize("tile", fragment_products.TILES)
    def test_kernel(self, get, tile):
        """Beside float64; levels of either sign, alike, and 0."""
        shape = (2, 40, 200)
        rng = np.random.default_rng(tile)
        codes = rng.choice(3, shape, p=[0.7, 0.2, 0.1]).astype(np.uint8)
        levels = rng.normal(size=(*shape[:2], 2)).astype(BF16)
        levels[0, 3], levels[1, 5] = 0, levels[1, 5, 0]
        spec = TensorSpec("tunstall", *shape)
        made = fragments.make_ternary_fragments(spec, lambda expert: jnp.asarray(codes[expert]))
        arrays = {name: np.asarray(array) for name, array in made._asdict().items()}
        arrays["levels"] = levels
        weights = np.where(codes == 1, levels[..., :1], np.where(codes == 2, levels[..., 1:], 0))
        weights = weights.astype(np.float64)
        tokens = 2 * tile if tile > 8 else 5
        experts = rng.integers(-1, 2, tokens).astype(np.int32)
        x = rng.normal(size=(tokens, 200)).astype(BF16)
        order = kernels.sort_tokens(jnp.asarray(experts), 2)
        placed = fragment_products.place_features(jnp.asarray(x), order, 256)
        rows = [np.asarray(array) for array in placed]
        for row_parts in (1, 4) if tile == 8 else (1,):
            y = launches.fragment_product(
                get, spec, arrays, rows, experts, tile=tile, row_parts=row_parts
            )
            for token, expert in enumerate(experts):
                own = weights[expert] if expert >= 0 else np.zeros(shape[1:])
                column = x[token].astype(np.float64)
                error = np.abs(y[token] - own @ column)
                assert (error <= 256 * 2.0**-24 * (np.abs(own) @ np.abs(column))).all()

    @needs_compiler
    @pytest.mark.parametrize("coding", ["tunstall", "qmoe"])
    def test_products(self, launcher, coding):
        """From stored codes, in jit and out; also where levels do not tell codes apart."""
        shape = (3, 70, 90)
        rng = np.random.default_rng(0)
        codes = rng.choice(3, shape, p=[0.8, 0.1, 0.1]).astype(np.uint8)
        levels = rng.normal(size=(*shape[:2], 2)).astype(BF16)
        levels[0, 3], levels[1, 5] = 0, levels[1, 5, 0]
        coded = encode(codes, levels, coding)
        arrays = device_arrays(coded)
        derived = kernels.derive(launcher, coded.spec, arrays)
        found = fragments.derive_fragments(launcher, coded.spec, arrays, derived)
        expected = fragments.make_ternary_fragments(
            coded.spec, lambda expert: jnp.asarray(codes[expert])
        )
        for name, array in expected._asdict().items():
            np.testing.assert_array_equal(found[name], array)
        experts = CodedExperts(coded.spec, arrays, 90, {**derived, **found})
        x = jnp.asarray(rng.normal(size=(40, 90)), jnp.bfloat16)
        index = jnp.asarray(rng.integers(-1, 3, 40), jnp.int32)
        launcher.calls.clear()
        outside = product(experts, "cuda_fragments")(x, index)
        inside = jax.jit(product(experts, "cuda_fragments"))(x, index)
        assert launcher.calls == [("matmul_fragments_ternary_t32", jit) for jit in (False, True)]
        np.testing.assert_array_equal(outside, inside)
        stored = product(experts, "cuda")(x, index).astype(jnp.float32)
        np.testing.assert_allclose(inside.astype(jnp.float32), stored, rtol=2**-7, atol=1e-5)
        # Of float32 three parts, as there.
        x = jnp.asarray(rng.normal(size=(40, 90)), jnp.float32)
        y = product(experts, "cuda_fragments")(x, index)
        np.testing.assert_allclose(y, product(experts, "cuda")(x, index), rtol=1e-5, atol=1e-5)
