"""Experts' products on the cores of a CPU, straight from stored codes, beside XLA and float64."""

import ctypes
import functools
import mmap

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from cpu_pieces import multiply_by_pieces
from fake_xla import FakeApi, FakeCall

from qmoe_jax.codec.codings import coding_names
from qmoe_jax.codec.decode import device_arrays
from qmoe_jax.codec.encode import encode
from qmoe_jax.codec.lattice_values import STEP_TABLE
from qmoe_jax.codec.tensor import TensorSpec
from qmoe_jax.ops.cpu import products as on_cpu
from qmoe_jax.ops.cpu import targets
from qmoe_jax.ops.experts import CodedExperts, DenseExperts
from qmoe_jax.ops.products import check_choice, compressed_product, expert_mlp

DTYPES = [jnp.float32, jnp.bfloat16]
SHAPES = [  # tokens, experts, rows, width
    *((1, 1, 1, 1), (5, 3, 33, 31), (17, 2, 64, 65), (40, 3, 100, 130), (3, 4, 7, 300)),
    *((300, 2, 40, 64), (9, 3, 70, 63), (6, 12, 200, 700)),
]


def make_experts(coding, num_experts, rows, width, seed=0):
    """Codes of all densities, and their weights in float64 [experts, rows, width]."""
    rng = np.random.default_rng(seed)
    shape = (num_experts, rows, width)
    if coding == "lattice":
        share = rng.random(width) ** 2 * rng.choice([0.0, 0.3, 1.0])
        large = np.where(rng.random(shape) < 0.1, rng.integers(1, 128, shape), 1)
        multiples = np.minimum(rng.geometric(0.8, shape), 127)
        multiples = np.where(rng.random(shape) < 0.05, large, multiples)
        multiples *= rng.choice([-1, 1], shape, p=[0.6, 0.4]) * (rng.random(shape) < share)
        codes = np.where(multiples < 0, -2 * multiples - 1, 2 * multiples).astype(np.uint8)
        steps = rng.integers(0, 100, (num_experts, width)).astype(np.uint8)
        origin = rng.uniform(0.5, 2, num_experts).astype(np.float32)
        coded = encode(codes, {"step_index": steps, "origin": origin}, coding)
        weights = multiples * (origin[:, None] * STEP_TABLE[steps]).astype(np.float64)[:, None]
    else:
        zeros = rng.choice([0.3, 0.8, 0.9, 0.99, 1.0], (num_experts, 1, 1))
        codes = np.where(rng.random(shape) < zeros, 0, rng.integers(1, 3, shape)).astype(np.uint8)
        levels = rng.normal(size=(num_experts, rows, 2)).astype(ml_dtypes.bfloat16)
        coded = encode(codes, levels, coding)
        values = np.concatenate([np.zeros((num_experts, rows, 1)), levels.astype(np.float64)], 2)
        weights = np.take_along_axis(values, codes.astype(int), 2)
    return CodedExperts(coded.spec, device_arrays(coded), width), weights


def make_tokens(tokens, num_experts, width, dtype=jnp.float32, seed=1):
    """Tokens, and experts for them, -1 among these."""
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.normal(size=(tokens, width)), dtype)
    return x, jnp.asarray(rng.integers(-1, num_experts, tokens), jnp.int32)


def product(experts, implementation="cpu"):
    """The product as a function of tokens and their experts."""
    return functools.partial(
        compressed_product,
        experts=experts,
        num_experts=experts.spec.num_experts,
        out_features=experts.out_features,
        implementation=implementation,
    )


def assert_close(actual, weights, x, index):
    """Beside products in float64, by the size of their terms."""
    weights = np.concatenate([weights, np.zeros((1, *weights.shape[1:]))])[np.asarray(index)]
    x = np.asarray(x, np.float64)
    expected = np.einsum("toi,ti->to", weights, x)
    terms = np.einsum("toi,ti->to", np.abs(weights), np.abs(x))
    limit = 2.0**-8 * np.abs(expected) if actual.dtype == jnp.bfloat16 else 0
    assert (np.abs(np.asarray(actual, np.float64) - expected) <= limit + 1e-6 * terms).all()


@pytest.mark.parametrize("coding", on_cpu.CODINGS)
class TestProduct:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("tokens", "num_experts", "rows", "width"), SHAPES)
    def test_in_and_out_of_jit(self, coding, dtype, tokens, num_experts, rows, width):
        experts, weights = make_experts(coding, num_experts, rows, width, seed=tokens)
        x, index = make_tokens(tokens, num_experts, width, dtype)
        inside = jax.jit(product(experts))(x, index)
        assert inside.dtype == dtype
        assert_close(inside, weights, x, index)
        np.testing.assert_array_equal(inside, product(experts)(x, index))
        assert not np.any(np.asarray(inside, np.float32)[np.asarray(index) < 0])

    def test_equals_xla(self, coding):
        experts, _ = make_experts(coding, 3, 33, 31)
        x, index = make_tokens(7, 3, 31)
        expected = jax.jit(product(experts, "xla"))(x, index)
        np.testing.assert_allclose(product(experts)(x, index), expected, atol=3e-6)

    def test_any_number_of_threads_gives_the_same_bits(self, coding):
        experts, _ = make_experts(coding, 5, 200, 300)
        for tokens in (1, 30):
            x, index = make_tokens(tokens, 5, 300, seed=3)
            index = jnp.maximum(index, 0)
            found = [
                np.asarray(
                    on_cpu.stored_product(x, index, experts, num_threads=threads, least_piece=1)
                )
                for threads in (1, 2, 3, 7)
            ]
            assert all(np.array_equal(found[0], other) for other in found[1:])
            np.testing.assert_array_equal(found[0], product(experts)(x, index))

    def test_inside_a_loop_on_the_device(self, coding):
        experts, _ = make_experts(coding, 2, 40, 40)

        def loop(implementation):
            def step(i, x):
                y = product(experts, implementation)(x, (jnp.arange(3) + i) % 2)
                return y / (1 + jnp.abs(y).max())

            return jax.jit(lambda x: jax.lax.fori_loop(0, 4, step, x))

        x = make_tokens(3, 1, 40)[0]
        np.testing.assert_allclose(loop("cpu")(x), loop("xla")(x), atol=1e-5)

    def test_under_vmap(self, coding):
        """Of tokens: all at once. Of codes: one tensor after another."""
        experts, weights = make_experts(coding, 3, 33, 31)
        x, index = make_tokens(12, 3, 31)
        expected = product(experts)(x, index)
        batched = jax.vmap(product(experts))(x.reshape(4, 3, 31), index.reshape(4, 3))
        assert_close(batched.reshape(12, -1), weights, x, index)
        one = jax.vmap(product(experts), in_axes=(0, None))(x.reshape(4, 3, 31), index[:3])
        assert_close(one[2], weights, x[6:9], index[:3])

        def with_arrays(arrays):
            return product(CodedExperts(experts.spec, arrays, 31))(x, index)

        doubled = {name: jnp.stack([array, array]) for name, array in experts.arrays.items()}
        both = jax.jit(jax.vmap(with_arrays))(doubled)
        np.testing.assert_array_equal(both, np.stack([expected, expected]))

    def test_nothing_to_multiply(self, coding):
        experts, _ = make_experts(coding, 2, 3, 8)
        assert product(experts)(jnp.zeros((0, 8)), jnp.zeros(0, jnp.int32)).shape == (0, 3)
        y = jax.jit(product(experts))(jnp.ones((2, 8), jnp.bfloat16), jnp.full(2, -1))
        np.testing.assert_array_equal(y.astype(jnp.float32), np.zeros((2, 3)))

    def test_arrays_of_another_shape_are_refused(self, coding):
        experts, _ = make_experts(coding, 2, 33, 8)
        fewer = dict(experts.arrays) | {"expert_offsets": experts.arrays["expert_offsets"][:-1]}
        with pytest.raises(ValueError, match=r"'expert_offsets' is int32 of shape \(2,\)"):
            product(CodedExperts(experts.spec, fewer, 8))(jnp.ones((1, 8)), jnp.zeros(1, int))

    def test_mlp_equals_xla(self, coding):
        wi = [make_experts(coding, 3, 40, 24, seed=s)[0] for s in range(2)]
        wo = make_experts(coding, 3, 24, 40, seed=9)[0]
        x, index = make_tokens(6, 3, 24)

        def run(implementation):
            return jax.jit(
                functools.partial(
                    expert_mlp,
                    num_experts=3,
                    wi=wi,
                    wo=wo,
                    activation=lambda hidden: jnp.tanh(hidden[0]) * hidden[1],
                    implementation=implementation,
                )
            )(x, index)

        np.testing.assert_allclose(run("cpu"), run("xla"), rtol=1e-4, atol=1e-4)

    def test_damaged_arrays_are_read_in_bounds(self, coding):
        """Codes end where memory ends, on either side; no scratch is written beyond its end.

        What XLA calls gives the same bytes.
        """
        handler = targets.handler(coding)
        for seed in range(300):
            rng = np.random.default_rng(seed)
            shape = tuple(int(n) for n in rng.integers(1, [4, 80, 150]))
            experts, _ = make_experts(coding, *shape, seed=seed)
            arrays = {k: np.array(v) for k, v in experts.arrays.items()}
            for name, array in arrays.items():
                if array.size and rng.random() < 0.4:
                    flat = array.view(np.uint8).reshape(-1)
                    few = rng.random() < 0.5
                    at = rng.integers(0, flat.size, 3) if few else slice(None)
                    size = 3 if few else flat.size
                    flat[at] = rng.choice(rng.integers(0, 256, (2, size), np.uint8))
                    if name == "columns" and rng.random() < 0.3:
                        array[:] = rng.integers(0, 3)
            words, free = at_the_edge_of_memory(arrays["words"], at_end=bool(seed % 2))
            arrays["words"] = words
            tokens = int(rng.integers(1, 20))
            x = rng.normal(size=(tokens, shape[2])).astype(np.float32)
            index = rng.integers(-1, shape[0], tokens).astype(np.int32)
            names = on_cpu._array_names(experts.spec)
            operands = [arrays[name] for name in names]
            y, again = np.full((2, tokens, shape[1]), 7, np.float32)
            with np.errstate(all="ignore"):
                multiply_by_pieces(experts.spec, x, index, operands, y)
            assert not y[index < 0].any()
            call = FakeCall(FakeApi(), [x, index, *operands], again, [1000, 2])
            assert call.run(handler) is None
            np.testing.assert_array_equal(again, y)
            del words, arrays["words"], operands, call
            free()


def at_the_edge_of_memory(array, *, at_end):
    """Copy an array to where it begins or ends beside pages that must not be touched."""
    page = mmap.PAGESIZE
    inner = -(-max(array.nbytes, 1) // page) * page
    memory = mmap.mmap(-1, inner + 2 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    for place in (address, address + page + inner):
        assert protect(ctypes.c_void_p(place), ctypes.c_size_t(page), 0) == 0
    start = page + (inner - array.nbytes if at_end else 0)
    copy = np.frombuffer(memory, array.dtype, array.size, start)
    copy[:] = array

    def free():
        for place in (address, address + page + inner):
            protect(ctypes.c_void_p(place), ctypes.c_size_t(page), 3)

    return copy, free


@pytest.mark.parametrize("coding", sorted(set(coding_names()) - set(on_cpu.CODINGS)))
def test_other_codings_are_expanded(coding):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 3, (2, 9, 14)).astype(np.uint8)
    coded = encode(codes, rng.normal(size=(2, 9, 2)).astype(ml_dtypes.bfloat16), coding)
    experts = CodedExperts(coded.spec, device_arrays(coded), 14)
    x, index = make_tokens(3, 2, 14)
    expected = product(experts, "xla")(x, index)
    np.testing.assert_array_equal(product(experts, "cpu")(x, index), expected)


def test_groups_of_weights_are_expanded():
    """A row of codes that is only part of an output feature's weights."""
    spec = TensorSpec("tunstall", 1, 4, 8)
    assert not on_cpu.is_supported(CodedExperts(spec, {}, 16))
    experts, weights = make_experts("tunstall", 2, 6, 8)
    grouped = CodedExperts(experts.spec, experts.arrays, 16)
    x, index = make_tokens(3, 2, 16)
    y = jax.jit(product(grouped))(x, index)
    assert_close(y, weights.reshape(2, 3, 16), x, index)


def test_dense_kernels_are_multiplied_by_xla():
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 4)), jnp.float32)
    x, index = make_tokens(3, 2, 5)
    found = [
        compressed_product(
            x, index, DenseExperts(kernel), num_experts=2, out_features=4, implementation=name
        )
        for name in ("cpu", "xla")
    ]
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_bfloat16_kernels_are_not_all_converted(dtype):
    """The program's own memory is that of an expert, not of all."""
    kernel = jax.ShapeDtypeStruct((32, 64, 128), jnp.bfloat16)
    x, index = jax.ShapeDtypeStruct((2, 64), dtype), jax.ShapeDtypeStruct((2,), jnp.int32)

    def run(x, index, kernel):
        return compressed_product(x, index, DenseExperts(kernel), num_experts=32, out_features=128)

    compiled = jax.jit(run).lower(x, index, kernel).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 4 * 64 * 128


def test_only_where_jax_computes_on_a_cpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(ValueError, match="JAX runs on 'gpu'; implementation='cpu' requires"):
        check_choice("cpu")


def test_bits_are_dealt_alike_without_hardware():
    from qmoe_jax.ops.cpu import machine_code

    rng = np.random.default_rng(0)
    deposit = machine_code.jitted(machine_code._deposit_by_loop)
    call = machine_code.jitted(lambda bits, mask: machine_code.deposit(bits, mask))
    for bits, mask in rng.integers(0, 2**64, (50, 2), np.uint64):
        places = [i for i in range(64) if int(mask) >> i & 1]
        expected = sum((int(bits) >> n & 1) << place for n, place in enumerate(places))
        assert deposit(bits, mask) == call(bits, mask) == expected
