"""What every coding must do: one class, run over all of them."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmoe_jax.codec import codings, reference
from qmoe_jax.codec.decode import decode_expert, decode_expert_weights, dequantize, device_arrays
from qmoe_jax.codec.encode import encode
from qmoe_jax.codec.outline import CodedOutline
from qmoe_jax.codec.stats import bits, bits_by_part
from qmoe_jax.codec.tensor import NUM_SYMBOLS, CodedTensor, TensorSpec
from qmoe_jax.errors import CodecError

BFLOAT16 = ml_dtypes.bfloat16
WORKED_ROW = [0, 0, 0, 0, 2, 0, 0, 0, 0, 1, 0, 0, 1, 2, 2, 1, 0, 0, 0, 0, 0, 1, 0]


def random_codes(shape, zero_share, num_symbols=3, seed=0):
    rng = np.random.default_rng(seed)
    shares = [zero_share] + [(1 - zero_share) / (num_symbols - 1)] * (num_symbols - 1)
    return rng.choice(num_symbols, size=shape, p=shares).astype(np.uint8)


def random_levels(codes, coding="packed2", seed=0):
    """What gives codes their values, as `encode` takes it."""
    rng = np.random.default_rng(seed)
    if codings.get_coding(coding).grid == "lattice":
        steps = rng.integers(30, 120, (codes.shape[0], codes.shape[2])).astype(np.uint8)
        return {"step_index": steps, "origin": rng.uniform(0.5, 2, codes.shape[0]).astype("f4")}
    levels = rng.normal(size=(*codes.shape[:2], 2))
    levels[..., 1] = rng.choice([0, 1, 1.5, 2, 3], size=codes.shape[:2])  # also zeros of 2-bit rows
    return levels.astype(BFLOAT16)


@functools.partial(jax.jit, static_argnums=0)
def _decode_experts(spec, arrays, experts):
    return jax.vmap(lambda expert: decode_expert(spec, arrays, expert))(experts)


def xla_decode(coded):
    return np.asarray(
        _decode_experts(coded.spec, device_arrays(coded), jnp.arange(coded.spec.num_experts))
    )


def assert_same(one, other):
    assert one.spec == other.spec
    assert one.arrays.keys() == other.arrays.keys()
    for name, array in one.arrays.items():
        assert array.dtype == other.arrays[name].dtype, name
        np.testing.assert_array_equal(array, other.arrays[name], err_msg=name)


@pytest.mark.parametrize("coding", codings.coding_names())
class TestEveryCoding:
    def codes(self, coding, shape, zero_share=0.885, seed=0):
        return random_codes(shape, zero_share, codings.get_coding(coding).num_symbols, seed)

    def encode(self, coding, shape, zero_share=0.885):
        codes = self.codes(coding, shape, zero_share)
        return codes, encode(codes, random_levels(codes, coding), coding)

    @pytest.mark.parametrize(
        ("shape", "zero_share"),
        [
            ((2, 5, 64), 0.0),
            ((2, 5, 65), 0.5),
            ((3, 7, 300), 0.885),
            ((1, 4, 513), 0.99),
            ((2, 3, 200), 1.0),
            ((2, 3, 1), 0.3),
            ((1, 1, 2), 0.0),
            ((2, 0, 7), 0.5),
        ],
    )
    def test_both_decoders_return_the_codes(self, coding, shape, zero_share):
        codes, coded = self.encode(coding, shape, zero_share)
        codings.validate(coded)
        decoded = codings.get_coding(coding).decode_numpy_reference(coded)
        np.testing.assert_array_equal(decoded, codes)
        np.testing.assert_array_equal(xla_decode(coded), codes)

    def test_no_experts(self, coding):
        codes, coded = self.encode(coding, (0, 3, 5))
        codings.validate(coded)
        decoded = codings.get_coding(coding).decode_numpy_reference(coded)
        np.testing.assert_array_equal(decoded, codes)

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
    def test_weights_are_the_reference_weights(self, coding, dtype):
        codes, coded = self.encode(coding, (3, 6, 31), 0.5)
        expected = reference.dequantize(coded, codes).astype(dtype)
        decode = jax.jit(decode_expert_weights, static_argnums=(0, 3))
        arrays = device_arrays(coded)
        for expert in range(3):
            weights = decode(coded.spec, arrays, jnp.int32(expert), dtype)
            assert weights.dtype == dtype
            np.testing.assert_array_equal(np.asarray(weights), expected[expert])

    def test_concatenated_batches_are_the_whole(self, coding):
        codes = self.codes(coding, (5, 4, 33))
        codes[3:] = 0  # batches with different row bounds
        levels = random_levels(codes, coding)
        whole = encode(codes, levels, coding)
        batches = [
            encode(codes[a:b], jax.tree.map(lambda its, a=a, b=b: its[a:b], levels), coding)
            for a, b in ((0, 2), (2, 3), (3, 5))
        ]
        joined = codings.concatenate(batches)
        codings.validate(joined)
        assert_same(joined, whole)

    def test_slices_concatenate_to_the_whole(self, coding):
        codes, whole = self.encode(coding, (4, 3, 20))
        slices = [codings.slice_experts(whole, a, b) for a, b in ((0, 1), (1, 1), (1, 4))]
        for part in slices:
            codings.validate(part)
        np.testing.assert_array_equal(xla_decode(slices[2]), codes[1:])
        assert_same(codings.concatenate(slices), whole)
        with pytest.raises(CodecError, match=r"Experts 2:5 .* has 4"):
            codings.slice_experts(whole, 2, 5)

    def test_spec_survives_json_and_is_a_jit_key(self, coding):
        spec = self.encode(coding, (2, 3, 20))[1].spec
        again = TensorSpec.from_json(json.loads(json.dumps(spec.to_json())))
        assert again == spec
        assert hash(again) == hash(spec)

    def test_non_contiguous_and_device_input(self, coding):
        codes = self.codes(coding, (2, 40, 6)).transpose(0, 2, 1)
        levels = random_levels(codes, coding)
        expected = encode(codes.copy(), levels, coding)
        assert_same(encode(codes, levels, coding), expected)
        on_device = jax.tree.map(jnp.asarray, levels)
        assert_same(encode(jnp.asarray(codes), on_device, coding), expected)

    def test_symbol_counts(self, coding):
        implementation = codings.get_coding(coding)
        codes, coded = self.encode(coding, (3, 5, 39), 0.4)
        values = codes.astype(int)
        if implementation.num_symbols == 4:
            # Values are codes relative to their row's zero.
            zero = coded.arrays["levels"][..., 1].astype(np.float32)
            values = (
                values - np.where(np.isin(zero, (1, 2, 3)), zero, 0).astype(int)[..., None]
            ) % 4
        expected = np.bincount(values.reshape(-1), minlength=implementation.num_symbols)
        np.testing.assert_array_equal(implementation.symbol_counts(coded), expected)

    def test_refuses_bad_codes(self, coding):
        codes = self.codes(coding, (2, 3, 8))
        levels = random_levels(codes, coding)
        bad = codes.copy()
        bad[1, 2, 3] = codings.get_coding(coding).num_symbols
        with pytest.raises(CodecError, match=f"symbol {bad.max()}; coding '{coding}' takes"):
            encode(bad, levels, coding)
        with pytest.raises(CodecError, match=r"codes are int32 of shape \(2, 3, 8\)"):
            encode(codes.astype(np.int32), levels, coding)
        with pytest.raises(CodecError, match=r"codes are uint8 of shape \(3, 8\)"):
            encode(codes[0], levels, coding)
        with pytest.raises(CodecError, match="at least one weight in a row"):
            encode(codes[..., :0], levels, coding)

    def test_refuses_bad_levels(self, coding):
        codes = self.codes(coding, (2, 3, 8))
        levels = random_levels(codes, coding)
        if codings.get_coding(coding).grid == "lattice":
            with pytest.raises(
                CodecError, match="a mapping with exactly 'step_index' and 'origin'"
            ):
                encode(codes, levels["step_index"], coding)
            steps = levels | {"step_index": levels["step_index"].astype(np.int32)}
            with pytest.raises(CodecError, match=r"levels\['step_index'\] are int32"):
                encode(codes, steps, coding)
            with pytest.raises(CodecError, match=r"require float32 \(2,\)"):
                encode(codes, levels | {"origin": levels["origin"][:1]}, coding)
            levels["origin"][1] = np.inf
            with pytest.raises(CodecError, match=r"origin of expert 1 is inf"):
                encode(codes, levels, coding)
            return
        with pytest.raises(CodecError, match="levels are float32"):
            encode(codes, levels.astype(np.float32), coding)
        with pytest.raises(CodecError, match=r"require bfloat16 \(2, 3, 2\)"):
            encode(codes, levels[:1], coding)
        levels[1, 0, 1] = np.inf
        with pytest.raises(CodecError, match=r"levels\[1, 0, 1\] is inf"):
            encode(codes, levels, coding)

    def test_validate_refuses_wrong_names_dtypes_shapes(self, coding):
        coded = self.encode(coding, (2, 3, 9))[1]
        for name, array in coded.arrays.items():
            missing = {k: v for k, v in coded.arrays.items() if k != name}
            with pytest.raises(CodecError, match="requires exactly"):
                codings.validate(CodedTensor(coded.spec, missing))
            wrong_dtype = coded.arrays | {name: array.astype(np.int64)}
            with pytest.raises(CodecError, match=f"Array '{name}' is int64; .* requires"):
                codings.validate(CodedTensor(coded.spec, wrong_dtype))
            wrong_shape = coded.arrays | {name: array[None]}
            with pytest.raises(CodecError, match=f"Array '{name}' has shape"):
                codings.validate(CodedTensor(coded.spec, wrong_shape))
        with pytest.raises(CodecError, match="requires exactly"):
            codings.validate(CodedTensor(coded.spec, coded.arrays | {"extra": np.zeros(1)}))
        wider = dataclasses.replace(coded.spec, width=100)
        with pytest.raises(CodecError, match="require"):
            codings.validate(CodedTensor(wider, coded.arrays))

    def test_validate_refuses_nan_levels(self, coding):
        coded = self.encode(coding, (2, 3, 9))[1]
        if codings.get_coding(coding).grid == "lattice":
            coded.arrays["origins"][1] = np.nan
            refusal = "origin of expert 1 is nan"
        else:
            coded.arrays["levels"][0, 2, 1] = np.nan
            refusal = r"levels\[0, 2, 1\] is nan"
        with pytest.raises(CodecError, match=refusal):
            codings.validate(coded)

    def test_levels_are_those_that_were_encoded(self, coding):
        codes, coded = self.encode(coding, (2, 40, 50), 0.5)
        levels = codings.get_coding(coding).levels_of(coded)
        jax.tree.map(np.testing.assert_array_equal, levels, random_levels(codes, coding))
        assert_same(encode(codes, levels, coding), coded)


class TestSpec:
    def test_refuses_bad_fields(self):
        with pytest.raises(CodecError, match=r"width .* is 0; .* at least 1"):
            TensorSpec("qmoe", 1, 1, 0)
        with pytest.raises(CodecError, match="num_experts is -1"):
            TensorSpec("qmoe", -1, 1, 1)

    @pytest.mark.parametrize("coding", codings.coding_names())
    def test_refuses_what_nothing_could_decode(self, coding):
        """Before anything is allocated: a manifest may say so, and have empty arrays."""
        for rows, width in ((0, 10**12), (1, 2**23), (2**16, 2**15), (2**31, 1), (2**70, 2**22)):
            fields = TensorSpec(coding, 1, 1, 1).to_json()
            fields |= {"out_features": rows, "in_features": width}
            with pytest.raises(CodecError, match=r"fewer than 2\^23 weights, and an expert fewer"):
                TensorSpec.from_json(fields)
        with pytest.raises(CodecError, match=r"says 2147483648 experts; .* fewer than 2\^31"):
            TensorSpec(coding, 2**31, 1, 1)
        TensorSpec(coding, 2**31 - 1, 2**8 - 1, 2**23 - 1)

    def test_refuses_json_of_another_version(self):
        fields = TensorSpec("qmoe", 1, 1, 1).to_json()
        with pytest.raises(CodecError, match="requires exactly"):
            TensorSpec.from_json(fields | {"group_size": 128})
        del fields["coding"]
        with pytest.raises(CodecError, match="requires exactly"):
            TensorSpec.from_json(fields)

    def test_unknown_coding_is_named(self):
        with pytest.raises(
            CodecError, match=r"coding 'huffman' is unknown; .* qmoe, tunstall_2bit, packed2"
        ):
            codings.get_coding("huffman")

    def test_manifests_keep_their_keys(self):
        """Rows and width are Python's names; stored bytes have the kernel's."""
        spec = TensorSpec("qmoe", 1, 2, 3, 4)
        stored = (
            '{"coding": "qmoe", "num_experts": 1, "out_features": 2, "in_features": 3, '
            '"max_row_codewords": 4}'
        )
        assert json.dumps(spec.to_json()) == stored
        outline = CodedOutline(spec, (5,), {"codewords": "uint16"}, {"codewords": ()})
        assert json.dumps(outline.to_json()["spec"]) == stored
        assert CodedOutline.from_json(json.loads(json.dumps(outline.to_json()))) == outline
        fields = spec.to_json() | {"in_features": 0}
        with pytest.raises(CodecError, match=r"in_features\) is 0; .* at least 1"):
            TensorSpec.from_json(fields)


class TestWhatCodingsState:
    def test_grids_share_out_all_codings(self):
        by_grid = [codings.codings_of_grid(grid) for grid in NUM_SYMBOLS]
        assert sorted(sum(by_grid, ())) == sorted(codings.coding_names())
        assert all(by_grid)
        for grid, names in zip(NUM_SYMBOLS, by_grid, strict=True):
            for name in names:
                assert codings.get_coding(name).num_symbols == NUM_SYMBOLS[grid]

    @pytest.mark.parametrize("grid", NUM_SYMBOLS)
    def test_the_smallest_coding_comes_first(self, grid):
        codes = random_codes((1, 64, 768), 0.885, NUM_SYMBOLS[grid])
        sizes = []
        for name in codings.codings_of_grid(grid):
            levels = random_levels(codes, name)
            if grid == "2bit":
                levels[..., 1] = 0
            sizes.append(bits(encode(codes, levels, name))["total"])
        assert sizes == sorted(sizes)

    @pytest.mark.parametrize("coding", codings.coding_names())
    def test_kinds_of_arrays(self, coding):
        found = codings.get_coding(coding)
        assert found.array_names == tuple(found.array_kinds)
        names = {
            kind: [name for name, its in found.array_kinds.items() if its == kind]
            for kind in ("codes", "levels", "lengths")
        }
        assert (names["levels"] == ["levels"]) == (found.grid != "lattice")
        assert len(names["codes"]) == 1
        assert found.code_array in (*names["codes"], None)
        assert (found.code_array is None) == ("expert_offsets" not in found.array_names)
        codes = random_codes((2, 3, 40), 0.8, found.num_symbols)
        coded = encode(codes, random_levels(codes, coding), coding)
        counted = bits(coded)
        assert sum(bits_by_part(coded).values()) == counted["total"]
        for kind, counted_as in (("codes", "codes"), ("levels", "levels"), ("lengths", "offsets")):
            stored = sum(coded.arrays[name].nbytes for name in names[kind])
            assert counted[counted_as] == 8 * stored


class TestConcatenate:
    def test_refuses_nothing_and_mixtures(self):
        codes = random_codes((1, 2, 8), 0.5)
        one = encode(codes, random_levels(codes), "qmoe")
        with pytest.raises(CodecError, match="No expert batches"):
            codings.concatenate([])
        with pytest.raises(CodecError, match="differ"):
            codings.concatenate([one, encode(codes, random_levels(codes), "packed2")])


class TestPacked2:
    def test_worked_row(self):
        codes = np.array(WORKED_ROW, np.uint8)[None, None]
        coded = encode(codes, random_levels(codes), "packed2")
        expected = "00 02 04 69 00 04"
        assert coded.arrays["packed"].tobytes().hex(" ") == expected
        assert expected in Path(codings.__file__).with_name("FORMAT.md").read_text("utf-8")

    def test_validate_refuses_tail_bits(self):
        codes = random_codes((2, 3, 9), 0.5, 4)
        coded = encode(codes, random_levels(codes), "packed2")
        coded.arrays["packed"][1, 2, -1] |= 0x40
        with pytest.raises(CodecError, match=r"packed\[1, 2, -1\] is 0x4.; .* \(from bit 2\)"):
            codings.validate(coded)

    def test_affine_weights_by_hand(self):
        codes = jnp.array([[0, 1, 2, 3]], jnp.uint8)
        levels = jnp.array([[0.5, 2.0]], jnp.bfloat16)
        weights = dequantize(TensorSpec("packed2", 1, 1, 4), codes, levels, jnp.float32)
        np.testing.assert_array_equal(np.asarray(weights), [[-1.0, -0.5, 0.0, 0.5]])


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_any_codes_round_trip(data):
    coding = data.draw(st.sampled_from(codings.coding_names()))
    shape = data.draw(st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(1, 70)))
    zero_share = data.draw(st.sampled_from([0.0, 0.5, 0.885, 0.98, 1.0]))
    implementation = codings.get_coding(coding)
    codes = random_codes(
        shape, zero_share, implementation.num_symbols, data.draw(st.integers(0, 2**32 - 1))
    )
    coded = encode(codes, random_levels(codes, coding), coding)
    codings.validate(coded)
    np.testing.assert_array_equal(implementation.decode_numpy_reference(coded), codes)
