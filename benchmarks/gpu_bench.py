"""What the GPU scripts share: data, timing with cold weights, the device's ceilings, cuBLAS.

Times are of CUDA graphs: one graph holds many launches that go round over more memory than the L2
cache holds several times over, so each launch finds its weights in device memory. The figure is the
median over replays of a replay's time by its number of launches; the spread is that of the middle
half of the replays.
"""

import ctypes
import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a bare checkout will do
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import ml_dtypes  # noqa: E402

from qmoe_jax.codec.codings import coding_names, get_coding  # noqa: E402
from qmoe_jax.codec.decode import device_arrays  # noqa: E402
from qmoe_jax.codec.encode import encode  # noqa: E402
from qmoe_jax.codec.tensor import CodedTensor, TensorSpec  # noqa: E402
from qmoe_jax.ops.cuda import fragment_products, kernels  # noqa: E402
from qmoe_jax.ops.cuda.fragments import READ_BEHIND, derive_fragments  # noqa: E402
from qmoe_jax.ops.cuda.launch_settings import Launch, LaunchSettings  # noqa: E402
from qmoe_jax.ops.cuda.launcher import (  # noqa: E402
    CudaError,
    CupyLauncher,
    KernelCall,
    StructArgument,
)
from qmoe_jax.ops.experts import CodedExperts  # noqa: E402

SHAPES = ((768, 3072), (3072, 768), (1024, 4096), (4096, 1024), (2080, 6144), (6144, 2080))
"""(out, in) of the QMoE paper's kernels."""
NUM_EXPERTS = 64
UNIQUE_EXPERTS = 4
"""Experts that are encoded; the others are copies of them elsewhere in memory."""
MIN_COLD_BYTES = 64 << 20
FRAGMENT_GRIDS = ("lattice", "ternary")
CODINGS = tuple(name for name in coding_names() if get_coding(name).cuda)


class Timing(NamedTuple):
    """Seconds of a launch: median over replays, and half the range of the middle half."""

    seconds: float
    spread: float


def open_gpu(program: str) -> CupyLauncher:
    """The GPU, or a clear line and the end of the program."""
    try:
        return CupyLauncher()
    except (CudaError, RuntimeError) as error:
        fail(program, f"needs a CUDA device. {error}")


def fail(program: str, message: str) -> NoReturn:
    """One line, exit code 2."""
    print(f"{program}: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


class Gpu:
    """CuPy, a stream of its own, and the device's measured ceilings."""

    def __init__(self, launcher: CupyLauncher, replays: int = 15):
        self.launcher = launcher
        self.cupy = launcher.array_module
        self.stream = self.cupy.cuda.Stream(non_blocking=True)
        self.replays = replays
        attributes = self.cupy.cuda.Device().attributes
        self.l2_bytes = int(attributes["L2CacheSize"])
        self.cold_bytes = max(4 * self.l2_bytes, MIN_COLD_BYTES)

    def upload(self, array: np.ndarray) -> Any:
        """An array on the device; bfloat16 as uint16."""
        plain = array.view(np.uint16) if array.dtype == ml_dtypes.bfloat16 else array
        return self.cupy.asarray(np.ascontiguousarray(plain))

    def time(self, launches: Sequence[Callable[[], None]]) -> Timing:
        """Seconds of one of the launches, which are captured in this order into a graph."""
        self.cupy.cuda.Device().synchronize()  # uploads went over another stream
        with self.stream:
            for launch in launches[:2]:  # loads modules, makes handles and workspaces
                launch()
            self.stream.synchronize()
            self.stream.begin_capture()
            for launch in launches:
                launch()
            graph = self.stream.end_capture()
            for _ in range(2):
                graph.launch(self.stream)
            times = []
            for _ in range(self.replays):
                start, stop = self.cupy.cuda.Event(), self.cupy.cuda.Event()
                start.record(self.stream)
                graph.launch(self.stream)
                stop.record(self.stream)
                stop.synchronize()
                milliseconds = self.cupy.cuda.get_elapsed_time(start, stop)
                times.append(milliseconds / 1e3 / len(launches))
        low, middle, high = np.quantile(times, (0.25, 0.5, 0.75))
        return Timing(float(middle), float(high - low) / 2)

    def run(self, call: KernelCall, pointers: Sequence[int]) -> Callable[[], None]:
        """A launch, prepared."""
        self.launcher.prepare(call)
        return lambda: self.launcher.launch(call, pointers, None)

    def copy_bandwidth(self) -> float:
        """Bytes read and written a second by a copy on the device."""
        source = self.cupy.ones(1 << 28, np.uint8)
        target = self.cupy.empty_like(source)
        copy = self.cupy.cuda.runtime.memcpyAsync
        kind = self.cupy.cuda.runtime.memcpyDeviceToDevice

        def launch() -> None:
            copy(target.data.ptr, source.data.ptr, source.nbytes, kind, self.stream.ptr)

        return 2 * source.nbytes / self.time([launch] * 4).seconds

    def write_bandwidth(self) -> float:
        """Bytes written a second by a fill."""
        target = self.cupy.empty(1 << 29, np.uint8)
        fill = self.cupy.cuda.runtime.memsetAsync

        def launch() -> None:
            fill(target.data.ptr, 7, target.nbytes, self.stream.ptr)

        return target.nbytes / self.time([launch] * 4).seconds

    def facts(self) -> dict[str, Any]:
        """The device, the software, and the commit."""
        runtime = self.cupy.cuda.runtime
        commit = os.environ.get("QMOE_COMMIT", "")  # where the tree has come without its history
        if not commit and shutil.which("git"):
            git = subprocess.run(
                ["git", "-C", str(ROOT), "describe", "--always", "--dirty"],
                capture_output=True,
                text=True,
                check=False,
            )
            commit = git.stdout.strip()
        return {
            "device": self.launcher.device.name,
            "compute_capability": self.launcher.device.compute_capability,
            "l2_bytes": self.l2_bytes,
            "driver": runtime.driverGetVersion(),
            "cuda": runtime.runtimeGetVersion(),
            "cupy": self.cupy.__version__,
            "commit": commit or "unknown",
        }


class Codes(NamedTuple):
    """A tensor of NUM_EXPERTS experts on the device, in several copies."""

    spec: TensorSpec
    argument: StructArgument
    copies: list[list[Any]]
    """Arrays of `CudaInterface.array_names`, once a copy."""
    stored_bytes: int
    """Of all experts: what a product of all of them must read."""


def random_codes(coding: str, shape: tuple[int, int, int], seed: int = 0) -> tuple[Any, Any]:
    """Codes [experts, out, in] with the paper's zero share, 0.885 of ternary codes, and levels.

    Of the lattice: columns of unlike density, about 0.87 zeros and 0.7 bit a weight when stored.
    """
    rng = np.random.default_rng(seed)
    if get_coding(coding).grid == "lattice":
        scales = np.exp(rng.normal(-1.25, 0.5, (shape[0], 1, shape[2]))).astype(np.float32)
        multiples = np.rint(rng.standard_normal(shape, np.float32) * scales).astype(np.int16)
        codes = np.where(multiples < 0, -2 * multiples - 1, 2 * multiples).astype(np.uint8)
        steps = rng.integers(0, 16, (shape[0], shape[2])).astype(np.uint8)
        return codes, {"step_index": steps, "origin": np.full(shape[0], 0.05, np.float32)}
    noise = rng.integers(0, 256, shape, np.uint8)
    levels = (rng.random((*shape[:2], 2), np.float32) + 0.5) / np.sqrt(shape[2])
    if get_coding(coding).grid == "ternary":
        levels[..., 0] *= -1
        codes = np.where(noise < 227, 0, 1 + (noise & 1)).astype(np.uint8)
    else:  # as GPTQ leaves 2-bit codes: 0.65 at the row's zero, its neighbours, then the fourth
        levels[..., 1] = 1 + rng.integers(0, 2, shape[:2])
        offsets = np.array([0, 1, 3, 2], np.uint8)[np.digitize(noise, (166, 214, 254))]
        codes = (offsets + levels[..., 1:].astype(np.uint8)) % 4
    return codes, levels.astype(ml_dtypes.bfloat16)


def repeat_experts(
    coded: CodedTensor, num_experts: int
) -> tuple[TensorSpec, dict[str, np.ndarray]]:
    """A tensor whose experts are those of `coded`, again and again."""
    times = num_experts // coded.spec.num_experts
    arrays = {
        name: np.concatenate([array] * times)
        for name, array in coded.arrays.items()
        if name != "expert_offsets"
    }
    if "expert_offsets" in coded.arrays:
        sizes = np.tile(np.diff(coded.arrays["expert_offsets"]), times)
        arrays["expert_offsets"] = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    return dataclasses.replace(coded.spec, num_experts=num_experts), arrays


def make_codes(gpu: Gpu, coding: str, out: int, width: int) -> Codes:
    """Random codes of NUM_EXPERTS experts; copies until they are several times the L2 cache."""
    coded = encode(*random_codes(coding, (UNIQUE_EXPERTS, out, width)), coding)
    spec, arrays = repeat_experts(coded, NUM_EXPERTS)
    stored_bytes = sum(array.nbytes for array in arrays.values())
    derived = kernels.derive(gpu.launcher, spec, arrays)
    arrays |= {name: np.asarray(array) for name, array in derived.items()}
    interface = kernels.cuda_interface(coding)
    if interface.table is not None:
        arrays["table"] = interface.table()
    count = -(-gpu.cold_bytes // stored_bytes)
    copies = [[gpu.upload(arrays[name]) for name in interface.array_names] for _ in range(count)]
    return Codes(spec, kernels.coding_argument(spec, arrays), copies, stored_bytes)


def repeat_fragments(found: Mapping[str, Any], times: int) -> dict[str, np.ndarray]:
    """Fragments of a tensor whose experts are those of `found`, again and again."""
    arrays = {name: np.asarray(array) for name, array in found.items()}
    for name, kept in (("fragments", READ_BEHIND), ("extra_fragments", 1), ("extra_places", 1)):
        own, behind = arrays[name][:-kept], arrays[name][-kept:]
        arrays[name] = np.concatenate([own] * times + [behind])
    num_experts = len(arrays["fragment_starts"]) - 1
    for name in ("fragment_starts", "extra_starts"):
        sizes = np.tile(np.diff(arrays[name]), times)
        arrays[name] = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    if len(arrays["fragment_places"]) == num_experts:  # places of ternary codes are columns
        arrays["fragment_places"] = np.concatenate([arrays["fragment_places"]] * times)
    return arrays


class FragmentCodes(NamedTuple):
    """The tensor of `make_codes` as fragments."""

    spec: TensorSpec
    arrays: dict[str, np.ndarray]
    """Of `fragments.Fragments`, and origins or levels."""
    copies: list[list[Any]]
    """What a launch takes of them, on the device, once a copy."""
    read_bytes: int
    """Of all experts: what a product of all of them must read."""


def make_fragment_codes(gpu: Gpu, coding: str, out: int, width: int) -> FragmentCodes:
    """The codes of `make_codes`, laid out by the GPU as at loading."""
    coded = encode(*random_codes(coding, (UNIQUE_EXPERTS, out, width)), coding)
    stored = device_arrays(coded)
    derived = kernels.derive(gpu.launcher, coded.spec, stored)
    times = NUM_EXPERTS // UNIQUE_EXPERTS
    arrays = repeat_fragments(derive_fragments(gpu.launcher, coded.spec, stored, derived), times)
    kept = "levels" if "levels" in coded.arrays else "origins"
    arrays[kept] = np.concatenate([coded.arrays[kept]] * times)
    taken = [arrays[name] for name in fragment_products.ARRAYS]
    taken.append(arrays.get("levels", np.zeros(1, np.uint32)))
    read_bytes = sum(array.nbytes for array in taken)
    copies = [
        [gpu.upload(array) for array in taken] for _ in range(-(-gpu.cold_bytes // read_bytes))
    ]
    spec = dataclasses.replace(coded.spec, num_experts=NUM_EXPERTS)
    return FragmentCodes(spec, arrays, copies, read_bytes)


class Tokens(NamedTuple):
    """Tokens on the device, sorted by expert, with room for outputs."""

    x: Any
    order: Any
    experts: Any
    starts: Any
    y: Any
    tiles: dict[int, tuple[Any, Any]]
    """Experts and starts of tiles of tokens, by their size: `kernels.TokenTiles`."""


def make_tokens(gpu: Gpu, spec: TensorSpec, experts: Sequence[int], each: int) -> Tokens:
    """`each` tokens for each of the experts, bfloat16; y is bfloat16 and full of NaNs."""
    rng = np.random.default_rng(len(experts) + each)
    count = len(experts) * each
    x = rng.normal(size=(count, spec.width)).astype(ml_dtypes.bfloat16)
    ids = np.repeat(np.sort(experts), each).astype(np.int32)
    starts = np.searchsorted(ids, np.arange(spec.num_experts + 1)).astype(np.int32)
    y = np.full((count, spec.rows), 0x7FFF, np.uint16)
    order = np.arange(count, dtype=np.int32)
    tiles = {}
    matmul = kernels.cuda_interface(spec.coding).matmul
    sizes = set(matmul.tiles if matmul else ())
    if get_coding(spec.coding).grid in FRAGMENT_GRIDS:
        sizes |= set(fragment_products.TILES)
    for size in sorted(sizes):
        firsts = np.arange(0, each, size, dtype=np.int32)
        found = np.repeat(np.sort(experts), len(firsts)).astype(np.int32)
        tiles[size] = (gpu.upload(found), gpu.upload(starts[found] + np.tile(firsts, len(experts))))
    x, order, ids, starts, y = (gpu.upload(array) for array in (x, order, ids, starts, y))
    return Tokens(x, order, ids, starts, y, tiles)


def product_launches(
    gpu: Gpu, codes: Codes, tokens: Sequence[Tokens], launch: Launch, tile_tokens: int
) -> list[Callable[[], None]]:
    """The fused product of each of `tokens` with each copy of the codes, in turn over memory."""
    call = kernels.fused_call(
        codes.spec,
        launch,
        num_tokens=len(tokens[0].x),
        tile_tokens=tile_tokens,
        is_float32=False,
        codes=codes.argument,
        max_shared_bytes=gpu.launcher.device.max_shared_bytes,
    )
    return [
        gpu.run(call, [array.data.ptr for array in (*copy, *own[:5])])
        for copy in codes.copies
        for own in tokens
    ]


def matmul_launches(
    gpu: Gpu, codes: Codes, tokens: Sequence[Tokens], size: int
) -> list[Callable[[], None]]:
    """The same by tensor cores, in tiles of `size` tokens."""
    call = kernels.matmul_call(
        codes.spec,
        num_tokens=len(tokens[0].x),
        num_tiles=len(tokens[0].tiles[size][0]),
        tile_tokens=size,
        is_float32=False,
        codes=codes.argument,
        max_shared_bytes=gpu.launcher.device.max_shared_bytes,
    )
    launches = []
    for copy in codes.copies:
        for own in tokens:
            arrays = (*copy, own.x, own.order, own.starts, *own.tiles[size], own.y)
            launches.append(gpu.run(call, [array.data.ptr for array in arrays]))
    return launches


def place_tokens(gpu: Gpu, codes: FragmentCodes, tokens: Sequence[Tokens]) -> list[list[Any]]:
    """Rows and scales for each of `tokens`, on the device: XLA makes them."""
    places = jnp.asarray(codes.arrays["fragment_places"])
    origins = codes.arrays.get("origins")
    placed = []
    for own in tokens:
        order = kernels.TokenOrder(
            *(jnp.asarray(gpu.cupy.asnumpy(a)) for a in (own.order, own.experts, own.starts))
        )
        x = jnp.asarray(gpu.cupy.asnumpy(own.x).view(ml_dtypes.bfloat16))
        if origins is None:
            found = _place_features(x, order, places.shape[1])
        else:
            found = _place(x, order, places, jnp.asarray(origins))
        placed.append([gpu.upload(np.asarray(array)) for array in found])
    return placed


_place = jax.jit(fragment_products.place_tokens)
_place_features = jax.jit(fragment_products.place_features, static_argnums=2)


def fragment_call(
    codes: FragmentCodes,
    tokens: Sequence[Tokens],
    tile: int,
    settings: LaunchSettings,
) -> KernelCall:
    """The launch of each of `tokens`."""
    return fragment_products.fragment_call(
        codes.spec,
        num_chunks=len(codes.arrays["fragments"]),
        num_extras=len(codes.arrays["extra_fragments"]),
        places=codes.arrays["fragment_places"].shape[1],
        num_tokens=len(tokens[0].x),
        num_tiles=len(tokens[0].tiles[tile][0]),
        tile=tile,
        is_float32=False,
        settings=settings,
    )


def fragment_launches(
    gpu: Gpu,
    codes: FragmentCodes,
    tokens: Sequence[Tokens],
    placed: Sequence[Sequence[Any]],
    tile: int,
    settings: LaunchSettings,
) -> list[Callable[[], None]]:
    """The product of each of `tokens`, `placed`, with each copy of the fragments, in turn."""
    call = fragment_call(codes, tokens, tile, settings)
    launches = []
    for copy in codes.copies:
        for own, rows in zip(tokens, placed, strict=True):
            arrays = (*copy, *rows, own.order, own.starts, *own.tiles[tile], own.y)
            launches.append(gpu.run(call, [array.data.ptr for array in arrays]))
    return launches


def matmul_tiles(gpu: Gpu, spec: TensorSpec) -> list[int]:
    """`kernels.matmul_tiles`, of a tensor whose rows are whole."""
    return kernels.matmul_tiles(gpu.launcher, CodedExperts(spec, {}, spec.width))


class Cublas:
    """Dense bfloat16 kernels of NUM_EXPERTS experts, [out, in], multiplied by cuBLAS.

    Called by its C interface: CuPy's own refuses a stream that is being captured.
    """

    def __init__(self, gpu: Gpu, dense: Any, library: Any = None):
        self.dense = dense
        self._library = library or _load_cublas()
        self._handle = ctypes.c_void_p()
        self._one, self._zero = ctypes.c_float(1), ctypes.c_float(0)
        self._check("cublasCreate_v2", ctypes.byref(self._handle))
        self._check("cublasSetStream_v2", self._handle, ctypes.c_void_p(gpu.stream.ptr))
        # Its own would be allocated when it is first wanted, which may be inside a capture.
        self._workspace = gpu.cupy.empty(_CUBLAS_WORKSPACE, np.uint8)
        self._check(
            "cublasSetWorkspace_v2",
            self._handle,
            ctypes.c_void_p(self._workspace.data.ptr),
            ctypes.c_size_t(_CUBLAS_WORKSPACE),
        )

    def close(self) -> None:
        """Give the handle back; the stream must be idle."""
        self._check("cublasDestroy_v2", self._handle)

    def one(self, expert: int, x: Any, y: Any) -> None:
        """y [n, out] of one expert: cublasGemmEx, bfloat16 with float32 sums."""
        _, out, width = self.dense.shape
        at = self.dense.data.ptr + 2 * out * width * expert
        self._check(
            "cublasGemmEx", self._handle, 1, 0, out, len(x), width, ctypes.byref(self._one),
            ctypes.c_void_p(at), _BFLOAT16, width,
            ctypes.c_void_p(x.data.ptr), _BFLOAT16, width, ctypes.byref(self._zero),
            ctypes.c_void_p(y.data.ptr), _BFLOAT16, out, _COMPUTE_32F, -1,
        )  # fmt: skip

    def all(self, x: Any, y: Any) -> None:
        """y of all experts, as many tokens each: cublasGemmStridedBatchedEx."""
        experts, out, width = self.dense.shape
        each = len(x) // experts
        stride = ctypes.c_longlong
        self._check(
            "cublasGemmStridedBatchedEx", self._handle, 1, 0, out, each, width,
            ctypes.byref(self._one),
            ctypes.c_void_p(self.dense.data.ptr), _BFLOAT16, width, stride(out * width),
            ctypes.c_void_p(x.data.ptr), _BFLOAT16, width, stride(each * width),
            ctypes.byref(self._zero),
            ctypes.c_void_p(y.data.ptr), _BFLOAT16, out, stride(each * out),
            experts, _COMPUTE_32F, -1,
        )  # fmt: skip

    def _check(self, name: str, *arguments: Any) -> None:
        if status := getattr(self._library, name)(*arguments):
            raise RuntimeError(f"{name} returned {status}")


_CUBLAS_WORKSPACE = 32 << 20
_BFLOAT16, _COMPUTE_32F = 14, 68
"""CUDA_R_16BF and CUBLAS_COMPUTE_32F."""


def _load_cublas() -> ctypes.CDLL:
    """The library that CuPy or JAX has loaded; where it lies depends on how they were installed."""
    from cupy.cuda import device

    device.get_cublas_handle()
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.split(maxsplit=5)[-1]
        if Path(path).name.startswith("libcublas.so"):
            return ctypes.CDLL(path)
    raise RuntimeError("libcublas.so is not loaded, although CuPy has made a handle of it")


def as_floats(gpu: Gpu, bits: Any) -> Any:
    """bfloat16, held as uint16 on the device, as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
