"""Experts' products: "cuda" beside "xla", with the kernels run on the CPU by `cuda_emulation`.

Only CuPy's compiling and launching is replaced: arguments, sizes, JAX's callback and DLPack are
those that run on a GPU.
"""

import dataclasses
import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from cuda_emulation.tensors import lattice_codes
from markers import needs_compiler

from qmoe_jax.codec import reference
from qmoe_jax.codec.codings import coding_names, get_coding
from qmoe_jax.codec.decode import decode_expert_weights, device_arrays
from qmoe_jax.codec.encode import encode
from qmoe_jax.codec.lattice_cuda import find_visits
from qmoe_jax.codec.tensor import CodedTensor
from qmoe_jax.errors import CudaError
from qmoe_jax.ops.cuda import kernels, launch_settings
from qmoe_jax.ops.cuda.launcher import CupyLauncher, cuda_is_available, use_launcher
from qmoe_jax.ops.cuda.parts import split_float32
from qmoe_jax.ops.experts import CodedExperts, DenseExperts, find_row_block_starts
from qmoe_jax.ops.products import compressed_product, expert_mlp, kernel_fetch

DTYPES = [jnp.float32, jnp.bfloat16]
WITH_KERNELS = [name for name in coding_names() if get_coding(name).cuda]


def make_experts(coding, num_experts, out, width, seed=0) -> CodedExperts:
    """Codes whose levels make products of order 1; the zero of 2-bit rows is any code."""
    rng = np.random.default_rng(seed)
    shape = (num_experts, out, width)
    if coding == "lattice":
        coded = encode(*lattice_codes(rng, shape, 0.8), coding)
        return CodedExperts(coded.spec, device_arrays(coded), width)
    codes = np.where(rng.random(shape) < 0.8, 0, rng.integers(1, 3, shape)).astype(np.uint8)
    levels = rng.normal(size=(num_experts, out, 2)).astype(ml_dtypes.bfloat16)
    if coding in ("packed2", "tunstall_2bit"):
        levels[..., 1] = rng.choice([0.0, 1.0, 2.0, 3.0], size=(num_experts, out))
    coded = encode(codes, levels, coding)
    return CodedExperts(coded.spec, device_arrays(coded), width)


def launches_of_products(launcher) -> list[bool]:
    """Whether in jit, of each launch but those that find derived arrays."""
    return [in_jit for name, in_jit in launcher.calls if not name.startswith("find_")]


def reference_weights(experts) -> np.ndarray:
    """float64 [experts, out, in] by the reference decoder."""
    arrays = {name: np.asarray(array) for name, array in experts.arrays.items()}
    coded = CodedTensor(experts.spec, arrays)
    codes = get_coding(experts.spec.coding).decode_numpy_reference(coded)
    return reference.dequantize(coded, codes).astype(np.float64)


def product(experts, implementation):
    """The product as a function of tokens and their experts."""
    return functools.partial(
        compressed_product,
        experts=experts,
        num_experts=experts.spec.num_experts,
        out_features=experts.out_features,
        implementation=implementation,
    )


def assert_close(actual, expected, experts, x):
    """Within the rounding of float32 sums, bfloat16 results, and 2-bit weights to bfloat16."""
    scale = 2.0**-8 if x.dtype == jnp.bfloat16 else 2.0**-20
    if experts.spec.coding in ("packed2", "tunstall_2bit"):
        scale = 2.0**-8
    size = np.abs(np.asarray(x, np.float32)).sum(axis=1, keepdims=True) if x.size else 0
    difference = np.abs(np.asarray(actual, np.float32) - np.asarray(expected, np.float32))
    assert (difference <= scale * (np.abs(np.asarray(expected, np.float32)) + size)).all()


@needs_compiler
class TestProduct:
    @pytest.mark.parametrize("coding", WITH_KERNELS)
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        ("tokens", "num_experts", "out", "width"),
        [
            *((5, 3, 33, 31), (3, 40, 7, 70)),
            *(pytest.param(*s, marks=pytest.mark.slow) for s in ((1, 1, 1, 1), (17, 2, 5, 65))),
        ],
    )
    def test_in_and_out_of_jit(self, launcher, coding, dtype, tokens, num_experts, out, width):
        """Beside float64 products with the weights of the reference decoder."""
        experts = make_experts(coding, num_experts, out, width, seed=tokens)
        rng = np.random.default_rng(width)
        x = jnp.asarray(rng.normal(size=(tokens, width)), dtype)
        index = jnp.asarray(rng.integers(-1, num_experts, tokens), jnp.int32)
        weights = np.concatenate([reference_weights(experts), np.zeros((1, out, width))])
        expected = np.einsum("toi,ti->to", weights[index], np.asarray(x, np.float64))
        outside = product(experts, "cuda")(x, index)
        assert launches_of_products(launcher) == [False]
        inside = jax.jit(product(experts, "cuda"))(x, index)
        assert launches_of_products(launcher) == [False, True]
        np.testing.assert_array_equal(inside, outside)
        assert inside.dtype == dtype
        assert_close(inside, expected, experts, x)
        assert not np.any(np.asarray(inside, np.float32)[np.asarray(index) < 0])

    @pytest.mark.parametrize("coding", WITH_KERNELS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_equals_xla(self, launcher, coding, dtype):
        experts = make_experts(coding, 3, 33, 31)
        x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 31)), dtype)
        index = jnp.asarray([2, -1, 0, 2, 2], jnp.int32)
        expected = jax.jit(product(experts, "xla"))(x, index)
        actual = jax.jit(product(experts, "cuda"))(x, index)
        assert actual.dtype == expected.dtype
        assert_close(actual, expected, experts, x)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_many_tokens_expand(self, launcher, monkeypatch, dtype):
        """Over the limit, each expert with tokens is expanded once, in a loop on the device."""
        settings = launch_settings.LaunchSettings(
            fused_tokens_per_expert=1, matmul_most_per_expert=1
        )
        monkeypatch.setattr(kernels, "launch_settings", lambda *_: settings)
        experts = make_experts("tunstall", 4, 9, 50)
        rng = np.random.default_rng(0)
        x = jnp.asarray(rng.normal(size=(7, 50)), dtype)
        index = jnp.asarray([3, 3, 0, -1, 3, 0, 3], jnp.int32)
        inside = jax.jit(product(experts, "cuda"))(x, index)
        assert launcher.calls == [("expand_tunstall", True)] * 2
        np.testing.assert_array_equal(inside, jax.jit(product(experts, "xla"))(x, index))

    @pytest.mark.parametrize("coding", WITH_KERNELS)
    def test_expansion_equals_xla(self, launcher, coding):
        experts = make_experts(coding, 3, 37, 45)
        ids = jnp.asarray([2, 0], jnp.int32)
        weights = decode_expert_weights(experts.spec, experts.arrays, 2)
        expected = [weights, reference_weights(experts)[0].astype(ml_dtypes.bfloat16)]
        expand = functools.partial(kernels.expand_experts, launcher, experts)
        for dense in (expand(ids), jax.jit(expand)(ids)):
            np.testing.assert_array_equal(dense, np.stack(expected))
        fetched = kernel_fetch(experts, jnp.float32, "cuda")(jnp.int32(2))
        np.testing.assert_array_equal(fetched, weights.astype(jnp.float32).T)

    def test_inside_a_loop_on_the_device(self, launcher):
        """As in generation: the loop's carry goes through the kernel at every turn."""
        experts = make_experts("tunstall", 2, 40, 40)

        def loop(implementation):
            def step(i, x):
                y = product(experts, implementation)(x, (jnp.arange(3) + i) % 2)
                return y / (1 + jnp.abs(y).max())

            return jax.jit(lambda x: jax.lax.fori_loop(0, 4, step, x))

        x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 40)), jnp.float32)
        np.testing.assert_allclose(loop("cuda")(x), loop("xla")(x), atol=1e-6)
        assert launcher.calls == [("fused_tunstall_t16_rows1", True)] * 4

    def test_no_tokens_and_no_experts_for_any(self, launcher):
        experts = make_experts("tunstall", 2, 3, 8)
        y = product(experts, "cuda")(jnp.zeros((0, 8)), jnp.zeros(0, jnp.int32))
        assert y.shape == (0, 3)
        assert not launcher.calls
        y = product(experts, "cuda")(jnp.ones((2, 8), jnp.bfloat16), jnp.full(2, -1))
        np.testing.assert_array_equal(y.astype(jnp.float32), np.zeros((2, 3)))

    @pytest.mark.parametrize("coding", WITH_KERNELS)
    def test_kept_derived_arrays_make_no_difference(self, launcher, coding):
        """They are the same in jit and out of it, and where they are kept no kernel finds them."""
        experts = make_experts(coding, 2, 70, 20)
        derived = kernels.derive(launcher, experts.spec, experts.arrays)
        inside = jax.jit(functools.partial(kernels.derive, launcher, experts.spec))(experts.arrays)
        jax.tree.map(np.testing.assert_array_equal, derived, inside)
        given = dataclasses.replace(experts, derived=derived)
        x, index = jnp.ones((2, 20), jnp.bfloat16), jnp.arange(2)
        expected = product(experts, "cuda")(x, index)
        launcher.calls.clear()
        np.testing.assert_array_equal(product(given, "cuda")(x, index), expected)
        assert len(launcher.calls) == 1

    @pytest.mark.parametrize("out", [1, 70])
    @pytest.mark.parametrize("coding", WITH_KERNELS)
    def test_bytes_of_derived_arrays(self, launcher, coding, out):
        """Known from the spec, which is what a plan counts with."""
        experts = make_experts(coding, 2, out, 20)
        derived = kernels.derive(launcher, experts.spec, experts.arrays)
        interface = kernels.cuda_interface(coding)
        expected = sum(array.nbytes for array in derived.values())
        assert interface.derived_bytes(experts.spec) == expected

    @pytest.mark.parametrize("tokens", [1, 2, 5, 64])
    def test_tiles_fit_the_tokens(self, launcher, tokens):
        """Sizes follow from shapes; results do not depend on them."""
        experts = make_experts("tunstall", 2, 4, 16)
        x = jnp.asarray(np.random.default_rng(1).normal(size=(tokens, 16)), jnp.bfloat16)
        index = jnp.arange(tokens) % 2
        weights = reference_weights(experts)[index]
        expected = np.einsum("toi,ti->to", weights, np.asarray(x, np.float64))
        assert_close(product(experts, "cuda")(x, index), expected, experts, x)
        name = {1: "fused_tunstall_t2_rows1", 2: "fused_tunstall_t2_rows1"}.get(tokens)
        name = name or {5: "fused_tunstall_t16_rows1", 64: "matmul_tunstall_t64"}[tokens]
        assert launcher.calls == [(name, False)]

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("coding", WITH_KERNELS)
    def test_many_tokens_go_through_tensor_cores(self, launcher, monkeypatch, coding, dtype):
        """In jit and out of it; what has no such kernels is multiplied all the same."""
        rng = np.random.default_rng(5)
        matmul = kernels.cuda_interface(coding).matmul
        for width in (32, 33):
            has_kernels = matmul is not None and width % matmul.width_multiple == 0
            experts = make_experts(coding, 3, 70, width, seed=5)
            x = jnp.asarray(rng.normal(size=(48, width)), dtype)
            index = jnp.asarray(rng.integers(-1, 3, 48), jnp.int32)
            weights = np.concatenate([reference_weights(experts), np.zeros((1, 70, width))])
            expected = np.einsum("toi,ti->to", weights[index], np.asarray(x, np.float64))
            launcher.calls.clear()
            inside = jax.jit(product(experts, "cuda"))(x, index)
            np.testing.assert_array_equal(inside, product(experts, "cuda")(x, index))
            assert_close(inside, expected, experts, x)
            products = [name for name, _ in launcher.calls if not name.startswith("find_")]
            assert products
            assert all(name.startswith("matmul") == has_kernels for name in products)
        tunstall = make_experts("tunstall", 3, 70, 32)
        assert kernels.has_matmul(launcher, tunstall)
        older = dataclasses.replace(launcher.device, compute_capability="7.5")
        monkeypatch.setattr(launcher, "device", older)
        assert not kernels.has_matmul(launcher, tunstall)


class TestRowBlockStarts:
    @needs_compiler
    @pytest.mark.parametrize("coding", ["tunstall", "qmoe", "lattice"])
    @pytest.mark.parametrize("out", [1, 32, 33, 100])
    def test_equal_the_kernels(self, emulated, coding, out):
        from cuda_emulation import launches

        experts = make_experts(coding, 2, out, 20)
        arrays = {name: np.asarray(array) for name, array in experts.arrays.items()}
        coded = CodedTensor(experts.spec, arrays)
        expected = launches.row_block_starts(emulated._module.get_function, coded)
        np.testing.assert_array_equal(find_row_block_starts(experts.spec, experts.arrays), expected)

    @pytest.mark.parametrize("out", [7, 20, 33])
    def test_visits_equal_the_plain_ones(self, out):
        """Of "lattice": leans of rows, or of columns."""
        from cuda_emulation import launches

        experts = make_experts("lattice", 2, out, 20)
        arrays = {name: np.asarray(array) for name, array in experts.arrays.items()}
        expected = launches.visits(CodedTensor(experts.spec, arrays))
        np.testing.assert_array_equal(find_visits(experts.spec, experts.arrays), expected)

    def test_packed_codes_have_none(self):
        experts = make_experts("packed2", 2, 3, 4)
        assert find_row_block_starts(experts.spec, experts.arrays) is None


@pytest.mark.parametrize("under_jit", [False, True])
def test_a_float32_token_is_three_bfloat16_ones(under_jit):
    rng = np.random.default_rng(0)
    x = rng.normal(size=1000) * 10.0 ** rng.integers(-20, 20, 1000)
    x = np.concatenate([x, [0.0, -0.0, 1.0, 2.0**-100]]).astype(np.float32)
    parts = (jax.jit(split_float32) if under_jit else split_float32)(jnp.asarray(x))
    assert {part.dtype for part in parts} == {jnp.dtype(jnp.bfloat16)}
    total = sum(np.asarray(part, np.float64) for part in parts)
    np.testing.assert_array_equal(total, x)


@needs_compiler
class TestMlp:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("gated", [False, True])
    def test_equals_xla(self, launcher, dtype, gated):
        num_experts, embed, mlp = 3, 24, 40
        coding = "tunstall"
        wi = [make_experts(coding, num_experts, mlp, embed, seed=s) for s in range(1 + gated)]
        wo = make_experts(coding, num_experts, embed, mlp, seed=9)
        rng = np.random.default_rng(3)
        x = jnp.asarray(rng.normal(size=(6, embed)) / 5, dtype)
        index = jnp.asarray(rng.integers(-1, num_experts, 6), jnp.int32)

        def activation(hidden):
            return (
                jax.nn.relu(hidden[0]) if len(hidden) == 1 else jax.nn.relu(hidden[0]) * hidden[1]
            )

        def run(implementation):
            return jax.jit(
                lambda x, index: expert_mlp(
                    x,
                    index,
                    num_experts=num_experts,
                    wi=wi,
                    wo=wo,
                    activation=activation,
                    implementation=implementation,
                )
            )(x, index)

        expected, actual = run("xla"), run("cuda")
        assert len(launcher.calls) == len(wi) + 1
        assert actual.dtype == expected.dtype == dtype
        scale = float(jnp.abs(expected).max())
        tolerance = (0.02 if dtype == jnp.bfloat16 else 1e-5) * scale
        np.testing.assert_allclose(
            actual.astype(jnp.float32), expected.astype(jnp.float32), atol=tolerance
        )

    def test_dense_kernels_beside_codes(self, launcher):
        """Such a layer runs in the loop over experts; only the codes are expanded by a kernel."""
        wi = make_experts("tunstall", 2, 6, 8)
        rng = np.random.default_rng(0)
        wo = DenseExperts(jnp.asarray(rng.normal(size=(2, 6, 8)), jnp.float32))
        x, index = jnp.asarray(rng.normal(size=(3, 8)), jnp.float32), jnp.asarray([1, 1, 1])
        # The loop over experts is a program of its own for each, also outside of jit.
        results = [
            expert_mlp(
                x,
                index,
                num_experts=2,
                wi=[wi],
                wo=wo,
                activation=lambda h: jax.nn.relu(h[0]),
                implementation=implementation,
            )
            for implementation in ("xla", "cuda")
        ]
        assert launcher.calls == [("expand_tunstall", True)]
        np.testing.assert_array_equal(*results)


_ON_TWO_DEVICES = """
import sys
sys.path.insert(0, sys.argv[1])
import jax, jax.numpy as jnp, numpy as np
from cuda_emulation.launcher import EmulatedLauncher
from test_compressed_product import make_experts
from qmoe_jax.errors import CudaError
from qmoe_jax.ops.cuda.launcher import use_launcher
from qmoe_jax.ops.products import compressed_product
first, second = jax.devices()
experts = make_experts("tunstall", 2, 6, 8)
index = jnp.asarray([1, 0, 1], jnp.int32)
launcher = EmulatedLauncher()
with use_launcher(launcher):
    for device in (second, first):
        x = jax.device_put(jnp.ones((3, 8), jnp.bfloat16), device)
        y = compressed_product(
            x, jax.device_put(index, device), experts, num_experts=2, out_features=6,
            implementation="cuda")
        assert y.devices() == {device}, y.devices()
        assert launcher.devices == [device], launcher.devices
        launcher.devices.clear()
    from qmoe_jax.ops.cuda.launcher import KernelCall, run_kernel
    call = KernelCall("expand.cu", "expand_tunstall", (1, 1), 32, 0, ())
    here, there = (jax.device_put(jnp.ones(3), device) for device in (first, second))
    try:
        run_kernel(launcher, call, [here, there], jax.ShapeDtypeStruct((3,), jnp.float32))
    except CudaError as error:
        print(error)
"""


@needs_compiler
def test_eager_launches_are_where_the_operands_are():
    """On the second of two devices too; operands on both are refused."""
    folder = str(Path(__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", _ON_TWO_DEVICES, folder],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "lie on several devices" in done.stdout
    assert "jax.device_put" in done.stdout


class TestUnsupported:
    def test_unknown_implementation(self):
        experts = make_experts("tunstall", 1, 2, 3)
        with pytest.raises(
            ValueError, match="implementation is 'gpu'; it must be one of xla, cpu, cuda"
        ):
            product(experts, "gpu")(jnp.ones((1, 3)), jnp.zeros(1, jnp.int32))

    def test_a_coding_without_kernels(self, monkeypatch):
        """XLA runs it; "cuda" names the codings that have kernels."""
        experts = make_experts("tunstall", 1, 2, 3)
        monkeypatch.setattr(get_coding("tunstall"), "cuda", None)
        match = "'tunstall' has no CUDA kernels; .* are lattice, packed2, qmoe, tunstall_2bit"
        with pytest.raises(CudaError, match=match):
            kernels.check_coded(experts)
        with pytest.raises(ValueError, match="settings for .'tunstall'."):
            launch_settings.write_settings("a", {"tunstall": launch_settings.LaunchSettings()})

    def test_no_gpu_or_no_cupy(self):
        if jax.default_backend() == "gpu":
            pytest.skip("there is a GPU")
        experts = make_experts("tunstall", 1, 2, 3)
        with pytest.raises(CudaError, match="JAX runs on 'cpu'; implementation='cuda' requires"):
            product(experts, "cuda")(jnp.ones((1, 3)), jnp.zeros(1, jnp.int32))
        assert not cuda_is_available()

    def test_no_cupy(self, monkeypatch):
        if importlib.util.find_spec("cupy") is not None:
            pytest.skip("CuPy is installed")
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        with pytest.raises(CudaError, match="CuPy is not installed.*pip install cupy-cuda13x"):
            CupyLauncher()

    @needs_compiler
    def test_groups_of_columns(self, launcher):
        experts = make_experts("tunstall", 2, 6, 8)
        grouped = CodedExperts(experts.spec, experts.arrays, in_features=16)
        for implementation in ("xla", "cuda"):
            run = product(grouped, implementation)
            x, index = jnp.ones((1, 16), jnp.float32), jnp.zeros(1, jnp.int32)
            if implementation == "xla":
                assert run(x, index).shape == (1, 3)
            else:
                with pytest.raises(CudaError, match="has 8 of the 16 weights.*group_size"):
                    run(x, index)

    @needs_compiler
    def test_rows_beyond_shared_memory(self):
        """The fused product refuses them; the dispatch expands instead."""
        from cuda_emulation.launcher import EmulatedLauncher

        small = EmulatedLauncher(max_shared_bytes=36 << 10)
        experts = make_experts("tunstall", 1, 3, 9000)
        x = jnp.ones((1, 9000), jnp.bfloat16)
        index = jnp.zeros(1, jnp.int32)
        order = kernels.sort_tokens(index, 1)
        with pytest.raises(CudaError, match="9000 features do not fit.*36864 bytes"):
            kernels.fused_product(small, experts, x, order, expected_tokens=1.0, dtype=jnp.bfloat16)
        with use_launcher(small):
            y = product(experts, "cuda")(x, index)
        assert [name for name, _ in small.calls] == ["expand_tunstall"]
        np.testing.assert_array_equal(y, product(experts, "xla")(x, index))
