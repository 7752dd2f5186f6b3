"""The CUDA kernels on a GPU: launched by CuPy, and through JAX, beside float64 references.

    python -m pytest --confcutdir tests/gpu tests/gpu

Inputs are random and new at every run unless QMOE_SEED is set; it is printed. Outputs are full of
NaNs before each launch. Needs neither the repository installed nor beartype.
"""

import functools
import os
import secrets
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
for folder in (ROOT, ROOT / "tests"):  # a bare checkout will do
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import ml_dtypes  # noqa: E402
from cuda_emulation import lattice_fragments, launches  # noqa: E402
from cuda_emulation.tensors import (  # noqa: E402
    assert_products,
    lattice_codes,
    product_weights,
)

from qmoe_jax.codec import reference  # noqa: E402
from qmoe_jax.codec.codings import coding_names, get_coding  # noqa: E402
from qmoe_jax.codec.decode import device_arrays  # noqa: E402
from qmoe_jax.codec.encode import encode  # noqa: E402
from qmoe_jax.codec.tensor import CodedTensor  # noqa: E402
from qmoe_jax.ops.cuda import (  # noqa: E402
    fragment_products,
    fragments,
    kernels,
    launch_settings,
)
from qmoe_jax.ops.cuda.launcher import (  # noqa: E402
    CudaError,
    CupyLauncher,
    KernelCall,
    StructArgument,
    cuda_is_available,
    current_launcher,
)
from qmoe_jax.ops.experts import CodedExperts  # noqa: E402
from qmoe_jax.ops.products import compressed_product, expert_mlp  # noqa: E402

SEED = int(os.environ.get("QMOE_SEED") or secrets.randbits(30))
BF16 = ml_dtypes.bfloat16
WITH_KERNELS = [name for name in coding_names() if get_coding(name).cuda]


def _open() -> tuple[CupyLauncher | None, str]:
    try:
        return CupyLauncher(), ""
    except (CudaError, RuntimeError) as error:
        return None, str(error)


LAUNCHER, WHY = _open()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(LAUNCHER is None, reason=f"needs a CUDA device: {WHY}"),
]


@pytest.fixture
def rng(request):
    """New numbers for each test and each run."""
    print(f"QMOE_SEED={SEED}")
    return np.random.default_rng([SEED, *request.node.name.encode()])


class GpuKernels:
    """`get(name)` with the call shape of the emulator: NumPy arrays in, written ones come back."""

    def __init__(self, launcher):
        self.launcher = launcher
        self.cupy = launcher.array_module

    def __call__(self, name):
        part, *rest = name.split("_")
        while (rest[-1][:1] == "t" and rest[-1][1:].isdigit()) or rest[-1].startswith("rows"):
            rest.pop()
        source = {"expand": "expand.cu", "encode": "encode.cu", "find": "encode.cu"}.get(
            part, "_".join([part, *rest]) + ".cu"
        )
        if name.startswith("matmul_fragments"):
            source = fragment_products.SOURCE

        def launch(grid, block, args, *, shared_mem=0):
            arrays = []

            def place(value):
                """An array's place among the call's pointers; numbers as they are."""
                if isinstance(value, np.ndarray):
                    arrays.append(value)
                    return len(arrays) - 1
                return np.uintp(0) if value is None else value

            arguments = tuple(
                StructArgument(a.struct, tuple(map(place, a.values)))
                if isinstance(a, launches.Struct)
                else place(a)
                for a in args
            )
            on_device = [self.cupy.asarray(_plain(a)) for a in arrays]
            call = KernelCall(source, name, (*grid, 1)[:2], block[0], shared_mem, arguments)
            self.launcher.prepare(call)
            self.launcher.launch(call, [a.data.ptr for a in on_device], None)
            for host, device in zip(arrays, on_device, strict=True):
                if host.flags.writeable:
                    _plain(host)[...] = self.cupy.asnumpy(device)

        return launch


def _plain(array):
    return array.view(np.uint16) if array.dtype == BF16 else array


@pytest.fixture(scope="module")
def get():
    return GpuKernels(LAUNCHER)


def random_tensor(rng, coding, shape, zero_share):
    if get_coding(coding).grid == "lattice":
        return encode(*lattice_codes(rng, shape, zero_share), coding)
    symbols = np.where(rng.random(shape) < zero_share, 0, rng.integers(1, 4, shape))
    levels = rng.normal(size=(*shape[:2], 2))
    if get_coding(coding).num_symbols == 3:
        return encode(np.minimum(symbols, 2).astype(np.uint8), levels.astype(BF16), coding)
    levels[..., 1] = rng.choice([0.0, 1.0, 2.0, 3.0, 1.5], size=shape[:2])
    base = np.where(levels[..., 1] == 1.5, 0, levels[..., 1]).astype(int)[..., None]
    return encode(((symbols + base) % 4).astype(np.uint8), levels.astype(BF16), coding)


@pytest.mark.parametrize("coding", WITH_KERNELS)
@pytest.mark.parametrize(
    ("experts", "out", "width"),
    [(1, 1, 1), (2, 33, 31), (3, 5, 769), (4, 100, 1500), (1, 3, 6144), (2, 2080, 96)],
)
def test_kernels(get, rng, coding, experts, out, width):
    """Expansion bit for bit; products of every kernel and tile; where rows begin."""
    coded = random_tensor(rng, coding, (experts, out, width), rng.choice([0.3, 0.8, 0.885, 0.97]))
    weights = product_weights(coded)
    ids = [*range(experts), -1]
    dense = launches.expand(get, coded, ids)
    expected = np.concatenate([weights.astype(BF16), np.zeros((1, out, width), BF16)])
    np.testing.assert_array_equal(dense.view(np.uint16), expected.view(np.uint16))
    # What is found once after loading, through JAX, and plainly or by the kernel alone.
    derived = kernels.derive(LAUNCHER, coded.spec, device_arrays(coded))
    argument = launches.coding_argument(get, coded)
    plain = {
        name: value
        for (name, _), value in zip(argument.struct.fields, argument.values, strict=True)
    }
    for name, array in derived.items():
        np.testing.assert_array_equal(plain[name], array)
    x = rng.normal(size=(19, width)).astype(BF16)
    index = rng.integers(-1, experts, 19).astype(np.int32)
    for tile in (1, 2, 4, 8, 16):
        for rows in (1, 4):
            for threads, rows_per_block in ((32, 3), (256, 64)):
                copies = int(rng.choice([1, 2, 4] if coding == "lattice" else [1, 2, 4, 8, 16]))
                options = {"threads": threads, "rows_per_block": rows_per_block, "copies": copies}
                needed = kernels.fused_shared_bytes(coding, width, tile, threads, copies)
                if needed > LAUNCHER.device.max_shared_bytes:
                    continue
                y = launches.multiply(
                    get, coded, x, index, tile_tokens=tile, rows_per_warp=rows, **options
                )
                assert_products(y, coded, weights, x, index)


def matmul_codings():
    return [name for name in coding_names() if (c := get_coding(name).cuda) and c.matmul]


@pytest.mark.parametrize("coding", matmul_codings())
@pytest.mark.parametrize(
    ("experts", "out", "width"),
    [(1, 1, 16), (3, 65, 1040), (2, 100, 768), (1, 70, 6144), (2, 2080, 96)],
)
def test_tensor_cores(get, rng, coding, experts, out, width):
    """Products of every size of tile; experts with more tokens than a tile, and with none."""
    coded = random_tensor(rng, coding, (experts, out, width), rng.choice([0.3, 0.8, 0.885, 0.97]))
    weights = product_weights(coded)
    x = rng.normal(size=(75, width)).astype(BF16)
    index = rng.integers(-1, experts, 75).astype(np.int32)
    for tile in kernels.matmul_kernels(coding).tiles:
        copies = int(rng.choice([1, 2] if coding == "lattice" else [1, 16]))
        needed = kernels.matmul_shared_bytes(coding, out, tile, copies)
        if needed > LAUNCHER.device.max_shared_bytes:
            continue
        y = launches.matmul(get, coded, x, index, tile=tile, copies=copies)
        assert_products(y, coded, weights, x, index)


@pytest.mark.parametrize("coding", WITH_KERNELS)
def test_damaged_codes_stay_in_bounds(get, rng, coding):
    """For the memory checker too: any bytes, and every output element is written."""
    coded = random_tensor(rng, coding, (3, 40, 130), 0.8)
    arrays = {name: array.copy() for name, array in coded.arrays.items()}
    for name in set(arrays) - {"levels", "origins"}:
        raw = arrays[name].reshape(-1).view(np.uint8)
        raw[rng.random(raw.size) < 0.1] = rng.integers(0, 256)
    damaged = type(coded)(coded.spec, arrays)
    dense = launches.expand(get, damaged, [0, 1, 2])
    assert (dense.view(np.uint16) != launches.POISON).all()
    x = np.ones((3, 130), BF16)
    y = launches.multiply(get, damaged, x, np.arange(3, dtype=np.int32), tile_tokens=1)
    assert np.isfinite(y).all()
    if coding in matmul_codings():
        coded = random_tensor(rng, coding, (3, 70, 1040), 0.8)
        arrays = {name: array.copy() for name, array in coded.arrays.items()}
        for name in set(arrays) - {"levels", "origins"}:
            raw = arrays[name].reshape(-1).view(np.uint8)
            raw[rng.random(raw.size) < 0.1] = rng.integers(0, 256)
        x = np.ones((9, 1040), BF16)
        index = np.arange(9, dtype=np.int32) % 3
        assert np.isfinite(launches.matmul(get, type(coded)(coded.spec, arrays), x, index)).all()


needs_bfloat16 = pytest.mark.skipif(
    LAUNCHER is None or float(LAUNCHER.device.compute_capability) < 8,
    reason="needs compute capability 8.0, as ternary fragments do",
)


def lattice_tensor(rng, shape, zero_share):
    return encode(*lattice_codes(rng, shape, zero_share), "lattice")


@pytest.mark.parametrize(
    ("experts", "out", "width"),
    [(1, 1, 1), (2, 33, 31), (3, 100, 1500), (2, 200, 768), (1, 768, 3072), (1, 3072, 768)],
)
def test_fragment_kernels(get, rng, experts, out, width):
    """Every tile, and all numbers of warps that share rows; extra places."""
    coded = lattice_tensor(rng, (experts, out, width), rng.choice([0.3, 0.8, 0.885, 0.97]))
    arrays = lattice_fragments.made(coded)
    values, places = lattice_fragments.read_back(coded, arrays)
    np.testing.assert_array_equal(values, lattice_fragments.decoded(coded))
    if out >= 100:
        assert arrays["extra_starts"][-1] > 0
    for tile in fragment_products.TILES:
        for row_parts in (1, 2, 4, 8) if tile < 64 else (1, 2, 4):
            for is_float32 in (True, False):
                lattice_fragments.check_kernel(
                    get, coded, arrays, tokens=5 if tile == 8 else 2 * tile, tile=tile,
                    places=places, seed=int(rng.integers(1 << 30)), row_parts=row_parts,
                    float32=is_float32,
                )  # fmt: skip


@needs_bfloat16
@pytest.mark.parametrize(("experts", "out", "width"), [(2, 33, 31), (3, 100, 1500)])
def test_ternary_fragment_kernels(get, rng, experts, out, width):
    """Every tile, and all numbers of warps that share rows."""
    coded = random_tensor(rng, "tunstall", (experts, out, width), 0.885)
    codes = get_coding("tunstall").decode_numpy_reference(coded)
    found = fragments.make_ternary_fragments(coded.spec, lambda e: jnp.asarray(codes[e]))
    arrays = {name: np.asarray(array) for name, array in found._asdict().items()}
    arrays["levels"] = coded.arrays["levels"]
    weights = product_weights(coded)
    for tile in fragment_products.TILES:
        count = 2 * tile
        x = rng.normal(size=(count, width)).astype(BF16)
        index = rng.integers(-1, experts, count).astype(np.int32)
        order = kernels.sort_tokens(jnp.asarray(index), experts)
        places = arrays["fragment_places"].shape[1]
        placed = fragment_products.place_features(jnp.asarray(x), order, places)
        placed = [np.asarray(array) for array in placed]
        for row_parts in (1, 2, 4, 8) if tile < 64 else (1, 2, 4):
            y = launches.fragment_product(
                get, coded.spec, arrays, placed, index, tile=tile, row_parts=row_parts
            )
            for token, expert in enumerate(index):
                own, exact = weights[expert].astype(np.float64), x[token].astype(np.float64)
                own = own * (expert >= 0)
                bound = 2 * (width + 64) * 2.0**-24 * (np.abs(own) @ np.abs(exact))
                assert (np.abs(y[token] - own @ exact) <= bound).all()


def test_damaged_fragments_stay_in_bounds(get, rng):
    """For the memory checker too: any bytes, and every output element is a number."""
    coded = lattice_tensor(rng, (3, 100, 200), 0.5)
    arrays = lattice_fragments.made(coded)
    experts = np.array([0, 1, 1, 2, -1], np.int32)
    placed = lattice_fragments.placed_tokens(coded, arrays, np.ones((5, 200), BF16), experts)
    for name in fragment_products.ARRAYS:
        for share in (0.1, 1.0):
            damaged = {**arrays, name: arrays[name].copy()}
            raw = damaged[name].reshape(-1).view(np.uint8)
            some = rng.random(raw.size) < share
            raw[some] = rng.integers(0, 256, int(some.sum()))
            for tile in fragment_products.TILES:
                y = launches.fragment_product(get, coded.spec, damaged, placed, experts, tile=tile)
                assert np.isfinite(y).all()


@pytest.mark.parametrize("coding", ["tunstall", "tunstall_2bit"])
@pytest.mark.parametrize("zero_share", [0.2, 0.885])
def test_encoder_writes_the_hosts_bytes(get, rng, coding, zero_share):
    coded = random_tensor(rng, coding, (2, 70, 700), zero_share)
    codes = get_coding(coding).decode_numpy_reference(coded)
    arrays = coded.arrays
    words, offsets, num_bytes, _ = launches.encode_tunstall(
        get, codes, arrays["levels"], arrays["dictionaries"], coding
    )
    np.testing.assert_array_equal(words, arrays["words"])
    np.testing.assert_array_equal(offsets, arrays["expert_offsets"])
    shortest = arrays["shortest_rows"][:, None]
    np.testing.assert_array_equal(num_bytes - shortest, arrays["row_lengths"])


def make_experts(rng, coding, experts, out, width):
    coded = random_tensor(rng, coding, (experts, out, width), 0.85)
    return CodedExperts(coded.spec, device_arrays(coded), width), product_weights(coded)


@pytest.mark.parametrize("coding", WITH_KERNELS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("tokens", [1, 7])
def test_products_through_jax(rng, coding, dtype, tokens):
    """In jit and out of it: the same bits, near float64; and again, as a replayed graph."""
    experts, weights = make_experts(rng, coding, 3, 96, 200)
    weights = np.concatenate([weights.astype(np.float64), np.zeros((1, 96, 200))])
    run = functools.partial(
        compressed_product,
        experts=experts,
        num_experts=3,
        out_features=96,
        implementation="cuda",
    )
    jitted = jax.jit(run)
    for _ in range(4):
        x = jnp.asarray(rng.normal(size=(tokens, 200)), dtype)
        index = jnp.asarray(rng.integers(-1, 3, tokens), jnp.int32)
        inside, outside = jitted(x, index), run(x, index)
        np.testing.assert_array_equal(inside, outside)
        exact = np.asarray(x, np.float64)
        expected = np.einsum("toi,ti->to", weights[np.asarray(index)], exact)
        scale = 2.0**-8 if dtype == jnp.bfloat16 else 2.0**-18
        bound = scale * (np.abs(expected) + np.abs(exact).sum(axis=1, keepdims=True))
        assert (np.abs(np.asarray(inside, np.float64) - expected) <= bound).all()


def experts_with_fragments(coded: CodedTensor) -> CodedExperts:
    """With fragments that the GPU's expansion gave."""
    arrays = device_arrays(coded)
    derived = kernels.derive(LAUNCHER, coded.spec, arrays)
    found = fragments.derive_fragments(LAUNCHER, coded.spec, arrays, derived)
    return CodedExperts(coded.spec, arrays, coded.spec.width, {**derived, **found})


@pytest.mark.parametrize(
    ("experts", "out", "width"), [(3, 96, 200), (2, 768, 3072), (2, 3072, 768), (1, 2080, 6144)]
)
def test_fragments_through_jax(rng, experts, out, width):
    """Laid out by the GPU as from the reference decoder's codes; products in jit and out of it."""
    coded = lattice_tensor(rng, (experts, out, width), rng.choice([0.8, 0.885, 0.97]))
    with_fragments = experts_with_fragments(coded)
    for name, array in lattice_fragments.made(coded).items():
        np.testing.assert_array_equal(with_fragments.derived[name], array)
    codes = get_coding("lattice").decode_numpy_reference(coded)
    weights = reference.dequantize(coded, codes)
    run = functools.partial(
        compressed_product,
        experts=with_fragments,
        num_experts=experts,
        out_features=out,
        implementation="cuda_fragments",
    )
    jitted = jax.jit(run)
    for tokens in (1, 7, 40 * experts):
        for _ in range(3):
            x = jnp.asarray(rng.normal(size=(tokens, width)), jnp.bfloat16)
            index = jnp.asarray(rng.integers(-1, experts, tokens), jnp.int32)
            inside, outside = jitted(x, index), run(x, index)
            np.testing.assert_array_equal(inside, outside)
        x, index, inside = (np.asarray(array) for array in (x, index, inside))
        lattice_fragments.assert_rounded_products(inside, weights, x, index)


@needs_bfloat16
@pytest.mark.parametrize("coding", ["tunstall", "qmoe"])
@pytest.mark.parametrize(
    ("experts", "out", "width"), [(3, 97, 200), (2, 768, 3072), (1, 2080, 6144)]
)
def test_ternary_fragments_through_jax(rng, coding, experts, out, width):
    """Weights and features as they are: float32 sums, rounded once; in jit and out of it."""
    coded = random_tensor(rng, coding, (experts, out, width), 0.885)
    codes = get_coding(coding).decode_numpy_reference(coded)
    expected_arrays = fragments.make_ternary_fragments(
        coded.spec, lambda expert: jnp.asarray(codes[expert])
    )
    with_fragments = experts_with_fragments(coded)
    for name, array in expected_arrays._asdict().items():
        np.testing.assert_array_equal(with_fragments.derived[name], array)
    weights = np.concatenate([product_weights(coded), np.zeros((1, out, width), BF16)])
    weights = weights.astype(np.float64)
    run = functools.partial(
        compressed_product,
        experts=with_fragments,
        num_experts=experts,
        out_features=out,
        implementation="cuda_fragments",
    )
    jitted = jax.jit(run)
    for tokens in (1, 7, 20 * experts, 60 * experts):  # tiles of all sizes
        x = jnp.asarray(rng.normal(size=(tokens, width)), jnp.bfloat16)
        index = jnp.asarray(rng.integers(-1, experts, tokens), jnp.int32)
        inside, outside = jitted(x, index), run(x, index)
        np.testing.assert_array_equal(inside, outside)
        exact = np.asarray(x, np.float64)
        for expert in range(-1, experts):
            chosen, own = np.asarray(index) == expert, weights[expert].T
            expected, sizes = exact[chosen] @ own, np.abs(exact[chosen]) @ np.abs(own)
            bound = 2.0**-8 * np.abs(expected) + 2 * (width + 64) * 2.0**-24 * sizes
            assert (np.abs(np.asarray(inside, np.float64)[chosen] - expected) <= bound).all()


@pytest.mark.skipif(
    "graph_min_graph_size=1" not in os.environ.get("XLA_FLAGS", ""),
    reason="needs XLA_FLAGS=--xla_gpu_graph_min_graph_size=1",
)
@pytest.mark.parametrize(
    ("coding", "implementation"),
    [
        ("tunstall", "cuda"),
        ("lattice", "cuda"),
        ("lattice", "cuda_fragments"),
        pytest.param("tunstall", "cuda_fragments", marks=needs_bfloat16),
    ],
)
def test_launches_are_replayed_in_a_graph(rng, monkeypatch, coding, implementation):
    """XLA's command buffers hold the launch: Python runs less often than the program."""
    coded = random_tensor(rng, coding, (2, 64, 72), 0.85)
    experts = CodedExperts(coded.spec, device_arrays(coded), 72)
    if implementation == "cuda_fragments":
        experts = experts_with_fragments(coded)
    weights = product_weights(coded)
    launcher, launched = current_launcher(), []
    launch = launcher.launch
    monkeypatch.setattr(
        launcher, "launch", lambda *given: (launched.append(given[0].name), launch(*given))[1]
    )
    run = jax.jit(
        functools.partial(
            compressed_product,
            experts=experts,
            num_experts=2,
            out_features=64,
            implementation=implementation,
        )
    )
    index = jnp.asarray([0, 1, 1], jnp.int32)
    for _ in range(12):
        x = jnp.asarray(rng.normal(size=(3, 72)), jnp.bfloat16)
        expected = np.einsum("toi,ti->to", weights[[0, 1, 1]].astype(float), np.asarray(x, float))
        actual = np.asarray(run(x, index), float)
        np.testing.assert_allclose(actual, expected, atol=0.01 * np.abs(expected).max())
    print(f"{len(launched)} launches by Python in 12 runs")
    assert 0 < len(launched) < 12
    if implementation == "cuda_fragments":
        assert all(name.startswith("matmul_fragments") for name in launched)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("tokens", "way"), [(3, "fused"), (300, "matmul"), (300, "expanded")])
def test_mlp_in_a_loop_equals_xla(rng, monkeypatch, dtype, tokens, way):
    """As in generation, and with many tokens: expansion inside XLA's loop over experts."""
    if way == "expanded":
        settings = launch_settings.LaunchSettings(
            fused_tokens_per_expert=1, matmul_most_per_expert=1
        )
        monkeypatch.setattr(kernels, "launch_settings", lambda *_: settings)
    wi, _ = make_experts(rng, "tunstall", 5, 96, 64)
    wo, _ = make_experts(rng, "tunstall", 5, 64, 96)
    index = jnp.asarray(rng.integers(0, 5, tokens), jnp.int32)
    x = jnp.asarray(rng.normal(size=(tokens, 64)), dtype)
    actual, expected = (mlp_in_a_loop(x, index, wi, wo, i) for i in ("cuda", "xla"))
    tolerance = 1e-4 if dtype == jnp.float32 else 0.05
    np.testing.assert_allclose(actual, expected, atol=tolerance * np.abs(expected).max())


def mlp_in_a_loop(x, index, wi, wo, implementation):
    """Five of them, as float32."""

    def step(i, x):
        y = expert_mlp(
            x,
            (index + i) % 5,
            num_experts=5,
            wi=[wi],
            wo=wo,
            activation=lambda hidden: jax.nn.relu(hidden[0]),
            implementation=implementation,
        )
        return (y / (1 + jnp.abs(y).max())).astype(x.dtype)

    run = jax.jit(lambda x: jax.lax.fori_loop(0, 5, step, x))
    return np.asarray(run(x), np.float32)


@pytest.mark.parametrize("tokens", [3, 300])
def test_fragments_mlp_in_a_loop_equals_xla(rng, tokens):
    wi, wo = (
        experts_with_fragments(lattice_tensor(rng, s, 0.85)) for s in ((5, 96, 64), (5, 64, 96))
    )
    index = jnp.asarray(rng.integers(0, 5, tokens), jnp.int32)
    x = jnp.asarray(rng.normal(size=(tokens, 64)), jnp.bfloat16)
    actual, expected = (mlp_in_a_loop(x, index, wi, wo, i) for i in ("cuda_fragments", "xla"))
    np.testing.assert_allclose(actual, expected, atol=0.05 * np.abs(expected).max())


def test_automatic_choice():
    assert cuda_is_available()
    assert isinstance(current_launcher(), CupyLauncher)


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    """The smallest golden model, rounded to nearest."""
    import golden_data

    import qmoe_jax

    folder = tmp_path_factory.mktemp("gpu")
    path = golden_data.checkpoint_folder("base", "t5x_bfloat16", folder)
    qmoe_jax.compress(path, folder / "compressed", method="rtn", progress=False)
    return folder / "compressed"


def test_model_logits_and_greedy_tokens(compressed):
    """The whole Flax module, in and out of jit, and generation; float32 as the bound is tight."""
    import golden_data

    import qmoe_jax
    from qmoe_jax.generation.sampling import greedy_generate

    golden = golden_data.load_golden("base")
    names = ("encoder_input", "decoder_input", "decoder_target")
    inputs = [jnp.asarray(golden[f"batch/{name}_tokens"]) for name in names]
    logits, tokens = {}, {}
    for implementation in ("xla", "cuda"):
        module, variables = qmoe_jax.load_switch(compressed, implementation=implementation)
        apply = functools.partial(module.apply, enable_dropout=False)
        logits[implementation] = np.asarray(jax.jit(apply)(variables, *inputs))
        if implementation == "cuda":
            outside = np.asarray(apply(variables, *inputs))
        generate = functools.partial(greedy_generate, module, max_decode_length=8, eos_id=-1)
        tokens[implementation] = np.asarray(jax.jit(generate)(variables, inputs[0]))
    np.testing.assert_allclose(logits["cuda"], logits["xla"], atol=2e-3)
    np.testing.assert_allclose(outside, logits["cuda"], atol=2e-3)
    np.testing.assert_array_equal(tokens["cuda"], tokens["xla"])


def test_fragments_give_the_models_logits(compressed, monkeypatch):
    """bfloat16, as near to float32 logits as XLA's; laid out at loading; greedy generation runs."""
    import golden_data

    import qmoe_jax
    from qmoe_jax.generation.sampling import greedy_generate

    golden = golden_data.load_golden("base")
    names = ("encoder_input", "decoder_input", "decoder_target")
    inputs = [jnp.asarray(golden[f"batch/{name}_tokens"]) for name in names]
    launcher, launched = current_launcher(), []
    prepare = launcher.prepare
    monkeypatch.setattr(
        launcher, "prepare", lambda call: (launched.append(call.name), prepare(call))[1]
    )
    found = []
    for implementation, dtype in (
        ("cuda_fragments", "bfloat16"),
        ("xla", "bfloat16"),
        ("xla", "float32"),
    ):
        module, variables = qmoe_jax.load_switch(compressed, dtype, implementation=implementation)
        launched.clear()
        apply = jax.jit(functools.partial(module.apply, enable_dropout=False))
        found.append(np.asarray(apply(variables, *inputs), np.float64))
        if implementation == "cuda_fragments":
            assert launched
            assert all(name.startswith("matmul_fragments") for name in launched)
            generate = functools.partial(greedy_generate, module, max_decode_length=8, eos_id=-1)
            assert jax.jit(generate)(variables, inputs[0]).shape == (len(inputs[0]), 8)
    logits, expected, exact = found
    assert np.abs(logits - exact).mean() <= 2 * np.abs(expected - exact).mean()
