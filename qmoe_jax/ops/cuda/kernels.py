"""The launches of `kernels_cuda/`: arguments as its structs have them, sizes as its README.md."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Float, Int, Int32

from qmoe_jax.codec.codings import coding_names, get_coding
from qmoe_jax.codec.cuda_interface import ArgumentStruct, CudaInterface, MatmulKernels
from qmoe_jax.codec.tensor import TensorSpec
from qmoe_jax.ops.cuda.launch_settings import Launch, LaunchSettings, launch_settings
from qmoe_jax.ops.cuda.launcher import (
    CudaError,
    KernelCall,
    Launcher,
    Operand,
    StructArgument,
    run_kernel,
)
from qmoe_jax.ops.experts import CodedExperts, find_row_block_starts

TILES = (1, 2, 4, 8, 16)
"""Numbers of tokens of an expert that can share a decode."""
PRODUCT = ArgumentStruct(
    "ProductArguments",
    (
        ("x", "const u16*"),
        ("token_order", "const int*"),
        ("token_experts", "const int*"),
        ("expert_starts", "const int*"),
        ("y", "void*"),
        ("num_experts", "int"),
        ("out_features", "int"),
        ("in_features", "int"),
        ("num_tokens", "int"),
        ("tile_tokens", "int"),
        ("rows_per_block", "int"),
        ("dictionary_copies", "int"),
        ("y_is_float32", "int"),
    ),
)
MATMUL = ArgumentStruct(
    "MatmulArguments",
    (
        ("x", "const u16*"),
        ("token_order", "const int*"),
        ("expert_starts", "const int*"),
        ("tile_experts", "const int*"),
        ("tile_starts", "const int*"),
        ("y", "void*"),
        ("num_experts", "int"),
        ("out_features", "int"),
        ("in_features", "int"),
        ("num_tokens", "int"),
        ("dictionary_copies", "int"),
        ("y_is_float32", "int"),
    ),
)
EXPANSION = ArgumentStruct(
    "ExpandArguments",
    (
        ("expert_ids", "const int*"),
        ("dense", "u16*"),
        ("num_slots", "int"),
        ("num_experts", "int"),
        ("out_features", "int"),
        ("in_features", "int"),
        ("rows_per_block", "int"),
        ("zero_skipped", "int"),
    ),
)
ENCODING = ArgumentStruct(
    "EncodeArguments",
    (
        ("codes", "const u8*"),
        ("levels", "const u32*"),
        ("dictionaries", "const u8*"),
        ("trie", "const short*"),
        ("num_experts", "int"),
        ("out_features", "int"),
        ("in_features", "int"),
        ("num_nodes", "int"),
        ("escapes", "int"),
    ),
)
"""Of encoding, which only benchmarks and tests launch."""
# Blocks that a multiprocessor should have room for; more lanes at work beat fewer that wait.
_FUSED_BLOCKS, _MATMUL_BLOCKS = 4, 2
_MAX_GRID_Y = 65535


class TokenTiles(NamedTuple):
    """Tokens of an expert that are multiplied together, as many tiles as there may be.

    Attributes:
      experts: int32 [tiles], the expert; `num_experts` for tokens without one, -1 for no tile.
      starts: int32 [tiles], the first token's place among the sorted.
    """

    experts: Array
    starts: Array


class TokenOrder(NamedTuple):
    """Tokens sorted by expert.

    Attributes:
      order: int32 [tokens], the token at each sorted place.
      experts: int32 [tokens], its expert; `num_experts` where it has none.
      starts: int32 [num_experts + 1], first sorted place of each expert.
    """

    order: Array
    experts: Array
    starts: Array


def sort_tokens(expert_index: Int[Array, "tokens"], num_experts: int) -> TokenOrder:
    """Sort tokens by expert, on the device; a negative index is no expert."""
    key = jnp.where(expert_index < 0, num_experts, expert_index).astype(jnp.int32)
    order = jnp.argsort(key, stable=True).astype(jnp.int32)
    experts = key[order]
    starts = jnp.searchsorted(experts, jnp.arange(num_experts + 1, dtype=jnp.int32))
    return TokenOrder(order, experts, starts.astype(jnp.int32))


def tile_tokens(order: TokenOrder, num_experts: int, size: int) -> TokenTiles:
    """Cut sorted tokens into tiles of at most `size` tokens of one expert, on the device."""
    num_tokens = order.order.shape[0]
    most = min(num_tokens, (num_tokens + (num_experts + 1) * (size - 1)) // size)
    stops = jnp.append(order.starts[1:], jnp.int32(num_tokens))
    tiles = (stops - order.starts + size - 1) // size
    through = jnp.cumsum(tiles)
    tile = jnp.arange(most, dtype=jnp.int32)
    found = jnp.searchsorted(through, tile, side="right")
    expert = jnp.minimum(found, num_experts).astype(jnp.int32)
    before = tile - (through - tiles)[expert]
    starts = (order.starts[expert] + size * before).astype(jnp.int32)
    return TokenTiles(jnp.where(found > num_experts, -1, expert), starts)


def has_matmul(launcher: Launcher, experts: CodedExperts) -> bool:
    """Whether products of many tokens go through tensor cores: by coding, device and width."""
    return bool(matmul_tiles(launcher, experts))


def matmul_tiles(launcher: Launcher, experts: CodedExperts) -> list[int]:
    """Numbers of tokens of an expert that can share a decode by tensor cores; none: no kernels."""
    spec = experts.spec
    matmul = cuda_interface(spec.coding).matmul
    major = int(launcher.device.compute_capability.split(".")[0])
    if matmul is None or major < 8 or spec.width % matmul.width_multiple:
        return []  # bfloat16 in tensor cores since 8.0
    most = launcher.device.max_shared_bytes
    return [t for t in matmul.tiles if matmul_shared_bytes(spec.coding, spec.rows, t, 1) <= most]


def matmul_kernels(coding: str) -> MatmulKernels:
    """Return a coding's products by tensor cores, which it must have."""
    matmul = cuda_interface(coding).matmul
    assert matmul is not None, coding
    return matmul


def matmul_shared_bytes(coding: str, rows: int, tile: int, copies: int) -> int:
    """Dynamic shared memory of a product by tensor cores."""
    matmul = matmul_kernels(coding)
    dictionary = copies * cuda_interface(coding).dictionary_bytes
    return dictionary + matmul.shared_bytes(matmul.threads(rows), tile)


def dictionary_copies(max_shared_bytes: int, others: int, coding: str, blocks: int) -> int:
    """Return how many copies of its dictionary a block keeps, so that lanes do not wait.

    As many as leave room for `blocks` blocks on a multiprocessor beside `others`, at least one.

    Args:
      max_shared_bytes: of a block on the device: about what a multiprocessor has.
      others: shared memory of a block without dictionaries.
      coding: whose dictionary.
      blocks: at a time.
    """
    size = cuda_interface(coding).dictionary_bytes
    fitting = [n for n in (16, 8, 4, 2) if (n * size + others + 1024) * blocks <= max_shared_bytes]
    return max(fitting, default=1) if size else 1


def check_coded(experts: CodedExperts) -> None:
    """Refuse codes that the CUDA kernels do not take.

    Raises:
      CudaError: a row of codes is only part of an output feature's weights, or a coding that has no
        kernels.
    """
    spec = experts.spec
    cuda_interface(spec.coding)
    if spec.width != experts.in_features:
        raise CudaError(
            f"A row of codes has {spec.width} of the {experts.in_features} weights of an output "
            "feature (the model was compressed with group_size); the CUDA kernels require whole "
            "rows. Use implementation='xla', or compress without group_size."
        )


def cuda_interface(coding: str) -> CudaInterface:
    """Return how the kernels take a coding's tensors.

    Raises:
      CudaError: it has no kernels.
    """
    found = get_coding(coding).cuda
    if found is None:
        with_kernels = sorted(name for name in coding_names() if get_coding(name).cuda)
        raise CudaError(
            f"The coding {coding!r} has no CUDA kernels; those that do are "
            f"{', '.join(with_kernels)}. Use implementation='xla'."
        )
    return found


def settings_for(launcher: Launcher, experts: CodedExperts) -> LaunchSettings:
    """Launch settings of the experts' coding on the launcher's device."""
    device = launcher.device
    return launch_settings(device.name, device.compute_capability, experts.spec.coding)


def fused_shared_bytes(
    coding: str, in_features: int, tile_tokens: int, threads: int, copies: int = 1
) -> int:
    """Dynamic shared memory of a product kernel."""
    interface = cuda_interface(coding)
    others = interface.product_bytes(in_features, tile_tokens, threads)
    return copies * interface.dictionary_bytes + others


def largest_tile(launcher: Launcher, experts: CodedExperts) -> int:
    """Return how many tokens can share a decode in the device's shared memory; 0: not even one."""
    settings = settings_for(launcher, experts)
    threads = max(settings.few.threads, settings.many.threads)
    fitting = [
        tile
        for tile in TILES
        if fused_shared_bytes(experts.spec.coding, experts.in_features, tile, threads)
        <= launcher.device.max_shared_bytes
    ]
    return max(fitting, default=0)


def fused_product(
    launcher: Launcher,
    experts: CodedExperts,
    x: BFloat16[Array, "tokens in"],
    tokens: TokenOrder,
    *,
    expected_tokens: float,
    dtype: jax.typing.DTypeLike,
) -> Float[Array, "tokens out"]:
    """y[t] = W_e(t) x[t] for all tokens and their experts in one launch, decoded on the way.

    Reference: `compressed_product(..., implementation="xla")`.

    Args:
      launcher: of `current_launcher`.
      experts: the codes.
      x: tokens.
      tokens: of `sort_tokens`.
      expected_tokens: tokens that an expert with tokens has, about; changes no result.
      dtype: bfloat16 or float32, of the result. Sums are float32.

    Returns:
      Outputs in the order of x; zeros for tokens without an expert.

    Raises:
      CudaError: the codes' rows are partial, or too wide for the device's shared memory.
    """
    check_coded(experts)
    spec, num_tokens = experts.spec, x.shape[0]
    settings = settings_for(launcher, experts)
    result = jax.ShapeDtypeStruct((num_tokens, spec.rows), dtype)
    tiles_fitting = matmul_tiles(launcher, experts)
    if tiles_fitting and expected_tokens >= settings.matmul_tokens_per_expert:
        wanted = min(2 * expected_tokens, num_tokens)
        size = min([size for size in tiles_fitting if size >= wanted], default=tiles_fitting[-1])
        tiles = tile_tokens(tokens, spec.num_experts, size)
        call = matmul_call(
            spec,
            num_tokens=num_tokens,
            num_tiles=tiles.experts.shape[0],
            tile_tokens=size,
            is_float32=result.dtype == jnp.float32,
            codes=coding_argument(spec, experts.arrays),
            max_shared_bytes=launcher.device.max_shared_bytes,
        )
        inputs = [*_coding_inputs(launcher, experts), x, tokens.order, tokens.starts, *tiles]
        return run_kernel(launcher, call, inputs, result)
    most = largest_tile(launcher, experts)
    if not most:
        raise CudaError(
            f"Tokens of {spec.width} features do not fit the {launcher.device.name}'s "
            f"{launcher.device.max_shared_bytes} bytes of shared memory; the fused kernel of "
            f"{spec.coding!r} requires "
            f"{fused_shared_bytes(spec.coding, spec.width, 1, settings.few.threads)}. "
            "Expand the experts instead (expand_experts), or use implementation='xla'."
        )
    # Room for twice the expected tokens: another tile would decode again, while a larger one
    # costs shared memory.
    wanted = min(2 * expected_tokens, num_tokens)
    tile = min([tile for tile in TILES if tile >= wanted], default=TILES[-1])
    launch = settings.few if num_tokens <= settings.few_tokens else settings.many
    inputs = _coding_inputs(launcher, experts)
    call = fused_call(
        spec,
        launch,
        num_tokens=num_tokens,
        tile_tokens=min(tile, most),
        is_float32=result.dtype == jnp.float32,
        codes=coding_argument(spec, experts.arrays),
        max_shared_bytes=launcher.device.max_shared_bytes,
    )
    return run_kernel(launcher, call, [*inputs, x, *tokens], result)


def fused_call(
    spec: TensorSpec,
    launch: Launch,
    *,
    num_tokens: int,
    tile_tokens: int,
    is_float32: bool,
    codes: StructArgument,
    max_shared_bytes: int,
) -> KernelCall:
    """Return a product's launch. Inputs: the coding's arrays, x, a `TokenOrder`; then y.

    Args:
      spec: of the codes.
      launch: how rows are spread.
      num_tokens: tokens in all.
      tile_tokens: one of TILES.
      is_float32: whether y is float32, not bfloat16.
      codes: of `coding_argument`.
      max_shared_bytes: of a block on the device.
    """
    interface = cuda_interface(spec.coding)
    others = fused_shared_bytes(spec.coding, spec.width, tile_tokens, launch.threads, 0)
    copies = dictionary_copies(max_shared_bytes, others, spec.coding, _FUSED_BLOCKS)
    rows_per_block = _rows_of_blocks(
        interface, max(launch.rows_per_block, -(-spec.rows // _MAX_GRID_Y))
    )
    numbers = {
        "num_experts": spec.num_experts,
        "out_features": spec.rows,
        "in_features": spec.width,
        "num_tokens": num_tokens,
        "tile_tokens": tile_tokens,
        "rows_per_block": rows_per_block,
        "dictionary_copies": copies,
        "y_is_float32": int(is_float32),
    }
    return KernelCall(
        source=interface.source,
        name=fused_name(spec.coding, tile_tokens, launch.rows_per_warp),
        grid=(num_tokens, -(-spec.rows // rows_per_block)),
        threads=launch.threads,
        shared_bytes=fused_shared_bytes(
            spec.coding, spec.width, tile_tokens, launch.threads, copies
        ),
        arguments=(codes, StructArgument.of(PRODUCT, numbers, len(interface.array_names))),
    )


def matmul_call(
    spec: TensorSpec,
    *,
    num_tokens: int,
    num_tiles: int,
    tile_tokens: int,
    is_float32: bool,
    codes: StructArgument,
    max_shared_bytes: int,
) -> KernelCall:
    """Return a launch of a product by tensor cores.

    Inputs: the coding's arrays, x, order and starts of a `TokenOrder`, `TokenTiles`; then y.

    Args:
      spec: of the codes, which have `MatmulKernels`.
      num_tokens: tokens in all.
      num_tiles: tiles in all.
      tile_tokens: one of their tiles.
      is_float32: whether y is float32, not bfloat16.
      codes: of `coding_argument`.
      max_shared_bytes: of a block on the device.
    """
    interface = cuda_interface(spec.coding)
    matmul = matmul_kernels(spec.coding)
    threads = matmul.threads(spec.rows)
    others = matmul.shared_bytes(threads, tile_tokens)
    copies = dictionary_copies(max_shared_bytes, others, spec.coding, _MATMUL_BLOCKS)
    numbers = {
        "num_experts": spec.num_experts,
        "out_features": spec.rows,
        "in_features": spec.width,
        "num_tokens": num_tokens,
        "dictionary_copies": copies,
        "y_is_float32": int(is_float32),
    }
    return KernelCall(
        source=matmul.source,
        name=f"matmul_{spec.coding}_t{tile_tokens}",
        grid=(-(-spec.rows // matmul.rows_per_block(threads)), num_tiles),
        threads=threads,
        shared_bytes=matmul_shared_bytes(spec.coding, spec.rows, tile_tokens, copies),
        arguments=(codes, StructArgument.of(MATMUL, numbers, len(interface.array_names))),
    )


def fused_name(coding: str, tile_tokens: int, rows_per_warp: int) -> str:
    """Name of a product kernel: for the largest tile, and where there is a choice rows a warp."""
    tile = "t2" if tile_tokens <= 2 else "t16"
    has_choice = len(cuda_interface(coding).rows_per_warp) > 1
    return f"fused_{coding}_{tile}" + (f"_rows{rows_per_warp}" if has_choice else "")


def expand_experts(
    launcher: Launcher, experts: CodedExperts, expert_ids: Int32[Array, "n"]
) -> BFloat16[Array, "n out in"]:
    """Dense kernels of some experts; zeros for an id that is no expert.

    Reference: `codec.decode.decode_expert_weights`.

    Raises:
      CudaError: the codes' rows are partial.
    """
    check_coded(experts)
    spec, count = experts.spec, expert_ids.shape[0]
    launch = settings_for(launcher, experts).expand
    call = expand_call(spec, launch, count=count, codes=coding_argument(spec, experts.arrays))
    result = jax.ShapeDtypeStruct((count, spec.rows, spec.width), jnp.bfloat16)
    return run_kernel(launcher, call, [*_coding_inputs(launcher, experts), expert_ids], result)


def expand_call(
    spec: TensorSpec, launch: Launch, *, count: int, codes: StructArgument
) -> KernelCall:
    """Return an expansion's launch. Inputs: the coding's arrays, `count` expert ids; then dense."""
    interface = cuda_interface(spec.coding)
    rows_per_block = _rows_of_blocks(interface, launch.rows_per_block)
    numbers = {
        "num_slots": count,
        "num_experts": spec.num_experts,
        "out_features": spec.rows,
        "in_features": spec.width,
        "rows_per_block": rows_per_block,
        "zero_skipped": 1,
    }
    return KernelCall(
        source="expand.cu",
        name=f"expand_{spec.coding}",
        grid=(-(-spec.rows // rows_per_block), count),
        threads=launch.threads,
        shared_bytes=expand_shared_bytes(spec.coding, launch.threads),
        arguments=(codes, StructArgument.of(EXPANSION, numbers, len(interface.array_names))),
    )


def _rows_of_blocks(interface: CudaInterface, rows_per_block: int) -> int:
    return -(-rows_per_block // interface.block_rows) * interface.block_rows


def expand_shared_bytes(coding: str, threads: int) -> int:
    """Dynamic shared memory of an expansion kernel."""
    interface = cuda_interface(coding)
    return interface.dictionary_bytes + interface.expansion_bytes(threads)


def coding_argument(spec: TensorSpec, arrays: Mapping[str, Any]) -> StructArgument:
    """Return what every kernel of a coding takes first: pointers to the first inputs, and sizes.

    Args:
      spec: of the codes.
      arrays: the stored ones; only shapes and dtypes count.
    """
    interface = cuda_interface(spec.coding)
    numbers = {field: interface.size(field, arrays) for field in interface.sizes}
    return StructArgument.of(interface.arguments, numbers)


def derive(
    launcher: Launcher, spec: TensorSpec, arrays: Mapping[str, Operand]
) -> dict[str, Operand]:
    """Find what the kernels of a coding need besides the stored arrays, by name.

    Worth keeping (`CodedExperts.derived`): it takes a pass over all lengths, or over all codes.
    """
    interface = cuda_interface(spec.coding)
    found = dict(arrays)
    ways: dict[str, Any] = dict(interface.derived)
    if "row_block_starts" in interface.derived_names:
        ways = {"row_block_starts": find_row_block_starts, **ways}
    for name, find in ways.items():
        found[name] = jax.jit(functools.partial(find, spec))(found)
    if interface.deriving_kernel:
        found[interface.deriving_kernel.array] = _run_deriving(launcher, spec, found)
    return {name: found[name] for name in interface.derived_names}


def _run_deriving(launcher: Launcher, spec: TensorSpec, arrays: Mapping[str, Operand]) -> Operand:
    interface = cuda_interface(spec.coding)
    kernel = interface.deriving_kernel
    assert kernel is not None
    sizes = (spec.num_experts, spec.rows, spec.width)
    names = [name for name in interface.array_names if name != kernel.array]
    numbers = {field: interface.size(field, arrays) for field in interface.sizes}
    # The array itself is there as the output, the last pointer.
    places = {name: at for at, name in enumerate([*names, kernel.array])}
    values = tuple(places.get(name, numbers.get(name, 0)) for name, _ in interface.arguments.fields)
    given = StructArgument(interface.arguments, values)
    call = KernelCall(
        source=kernel.source,
        name=kernel.name,
        grid=kernel.grid(*sizes),
        threads=32,
        shared_bytes=kernel.shared_bytes(*sizes),
        arguments=(given, len(names), *map(np.int32, sizes)),
    )
    result = jax.ShapeDtypeStruct(kernel.shape(*sizes), jnp.uint32)
    return run_kernel(launcher, call, [_input(interface, arrays, name) for name in names], result)


def _coding_inputs(launcher: Launcher, experts: CodedExperts) -> list[Operand]:
    interface = cuda_interface(experts.spec.coding)
    derived: Mapping[str, Operand] = experts.derived
    if set(interface.derived_names) - set(derived):
        derived = derive(launcher, experts.spec, experts.arrays)
    arrays = {**experts.arrays, **derived}
    return [_input(interface, arrays, name) for name in interface.array_names]


def _input(interface: CudaInterface, arrays: Mapping[str, Operand], name: str) -> Operand:
    if name == "table":
        assert interface.table is not None
        return interface.table()
    return arrays[name]
