"""Calls of the kernels on NumPy arrays: the structs of `kernels_cuda/`, sizes by its README.md."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from qmoe_jax.codec.coding_tunstall import TunstallCoding
from qmoe_jax.codec.codings import get_coding
from qmoe_jax.codec.cuda_interface import ArgumentStruct, is_pointer
from qmoe_jax.codec.tensor import CodedTensor, TensorSpec
from qmoe_jax.codec.tunstall import TunstallFamily
from qmoe_jax.ops.cuda import fragment_products, kernels
from qmoe_jax.ops.cuda.launcher import StructArgument

GetFunction = Callable[[str], Any]
POISON = 0x7FB1  # a NaN in bfloat16


class Struct(NamedTuple):
    """A struct by value, whose pointers may be NumPy arrays."""

    struct: ArgumentStruct
    values: tuple[Any, ...]


def struct_of(struct: ArgumentStruct, values: Mapping[str, Any]) -> Struct:
    """A struct from its fields by name."""
    return Struct(struct, tuple(values[name] for name, _ in struct.fields))


def family(coding: str) -> TunstallFamily:
    """The dictionaries of a "tunstall" coding."""
    found = get_coding(coding)
    assert isinstance(found, TunstallCoding)
    return found.family


def row_block_starts(get: GetFunction, coded: CodedTensor, **options: Any) -> np.ndarray:
    """Runs find_row_block_starts; lengths of blocks are added up here."""
    arrays, spec = coded.arrays, coded.spec
    if "block_lengths" in arrays:
        sums = arrays["block_lengths"].astype(np.uint32)
        return (np.cumsum(sums, axis=1, dtype=np.uint32) - sums).view(np.int32)
    lengths = arrays["row_lengths"]
    starts = np.full((spec.num_experts, -(-spec.rows // 32)), -1, np.int32)
    if starts.size:
        arguments = [lengths, arrays.get("shortest_rows"), starts]
        arguments += [np.int32(spec.rows), np.int32(lengths.itemsize)]
        get("find_row_block_starts")((spec.num_experts,), (32,), arguments, **options)
    return starts


def visits(coded: CodedTensor) -> np.ndarray:
    """Visited columns of "lattice" in order, plainly: their number, then byte, column and lean."""
    spec, arrays = coded.spec, coded.arrays
    found = np.zeros((spec.num_experts, 1 + spec.width), np.uint32)
    for expert, columns in enumerate(arrays["columns"]):
        lean = np.unpackbits(arrays["leans"][expert], bitorder="little")[: spec.width]
        if spec.rows < spec.width:
            lean = np.zeros(spec.width, np.uint8)
        order = np.argsort(columns, kind="stable").astype(np.uint32)
        found[expert, 0] = (columns != 255).sum()
        found[expert, 1:] = columns[order].astype(np.uint32) << 24 | order << 1 | lean[order]
    return found


def coding_argument(get: GetFunction, coded: CodedTensor) -> Struct:
    """What every decoder of the tensor's coding takes first."""
    interface, spec = kernels.cuda_interface(coded.spec.coding), coded.spec
    values: dict[str, Any] = dict(coded.arrays)
    values |= {field: interface.size(field, coded.arrays) for field in interface.sizes}
    if "row_block_starts" in interface.array_names:
        values["row_block_starts"] = row_block_starts(get, coded)
    if "visits" in interface.array_names:
        values["visits"] = visits(coded)
    if interface.table is not None:
        values["table"] = interface.table()
    if kernel := interface.deriving_kernel:
        sizes = (spec.num_experts, spec.rows, spec.width)
        found = np.full(kernel.shape(*sizes), 0xEEEEEEEE, np.uint32)
        values[kernel.array] = None
        arguments = [struct_of(interface.arguments, values), found, *map(np.int32, sizes)]
        shared = kernel.shared_bytes(*sizes)
        get(kernel.name)(kernel.grid(*sizes), (32,), arguments, shared_mem=shared)
        values[kernel.array] = found
    return struct_of(interface.arguments, values)


def sort_tokens(experts: np.ndarray, num_experts: int) -> tuple[np.ndarray, ...]:
    """token_order, token_experts and expert_starts for the expert of each token (-1: none)."""
    keys = np.where(experts < 0, num_experts, experts)
    order = np.argsort(keys, kind="stable").astype(np.int32)
    starts = np.searchsorted(keys[order], np.arange(num_experts + 1)).astype(np.int32)
    return order, experts[order].astype(np.int32), starts


def multiply(
    get: GetFunction,
    coded: CodedTensor,
    x: np.ndarray,
    experts: np.ndarray,
    *,
    tile_tokens: int = 16,
    rows_per_warp: int = 4,
    rows_per_block: int = 16,
    threads: int = 64,
    copies: int = 2,
    float32: bool = True,
    **options: Any,
) -> np.ndarray:
    """Runs a fused kernel: y [tokens, out] of x bfloat16 [tokens, in]."""
    spec = coded.spec
    order, token_experts, starts = sort_tokens(experts, spec.num_experts)
    shape = (len(x), spec.rows)
    y = np.full(shape, np.nan, np.float32) if float32 else np.full(shape, POISON, np.uint16)
    values = (x, order, token_experts, starts, y, spec.num_experts, spec.rows, spec.width)
    values = (*values, len(x), tile_tokens, rows_per_block, copies, int(float32))
    get(kernels.fused_name(spec.coding, tile_tokens, rows_per_warp))(
        (len(x), -(-spec.rows // rows_per_block)),
        (threads,),
        [coding_argument(get, coded), Struct(kernels.PRODUCT, values)],
        shared_mem=kernels.fused_shared_bytes(
            spec.coding, spec.width, tile_tokens, threads, copies
        ),
        **options,
    )
    return y if float32 else y.view(ml_dtypes.bfloat16)


def tile_tokens(order: Any, experts: np.ndarray, num_experts: int, size: int) -> tuple[Any, Any]:
    """tile_experts and tile_starts of sorted tokens, plainly; two places without a tile behind."""
    tiles = []
    for expert in range(num_experts + 1):
        own = np.flatnonzero(np.where(experts < 0, num_experts, experts)[order] == expert)
        tiles += [(expert, own[first]) for first in range(0, len(own), size)]
    tiles += [(-1, 0), (-1, 5)]
    return tuple(np.array(part, np.int32) for part in zip(*tiles, strict=True))


def matmul(
    get: GetFunction,
    coded: CodedTensor,
    x: np.ndarray,
    experts: np.ndarray,
    *,
    tile: int = 16,
    copies: int = 4,
    float32: bool = True,
    **options: Any,
) -> np.ndarray:
    """Runs a product by tensor cores: y [tokens, out] of x bfloat16 [tokens, in]."""
    spec = coded.spec
    order, _, starts = sort_tokens(experts, spec.num_experts)
    tiles = tile_tokens(order, experts, spec.num_experts, tile)
    shape = (len(x), spec.rows)
    y = np.full(shape, np.nan, np.float32) if float32 else np.full(shape, POISON, np.uint16)
    values = (x, order, starts, *tiles, y, spec.num_experts, spec.rows, spec.width)
    kind = kernels.matmul_kernels(spec.coding)
    threads = kind.threads(spec.rows)
    get(f"matmul_{spec.coding}_t{tile}")(
        (-(-spec.rows // kind.rows_per_block(threads)), len(tiles[0])),
        (threads,),
        [
            coding_argument(get, coded),
            Struct(kernels.MATMUL, (*values, len(x), copies, int(float32))),
        ],
        shared_mem=kernels.matmul_shared_bytes(spec.coding, spec.rows, tile, copies),
        **options,
    )
    return y if float32 else y.view(ml_dtypes.bfloat16)


def fragment_product(
    get: GetFunction,
    spec: TensorSpec,
    arrays: Mapping[str, np.ndarray],
    placed: Sequence[np.ndarray],
    experts: np.ndarray,
    *,
    tile: int,
    row_parts: int | None = None,
    float32: bool = True,
    **options: Any,
) -> np.ndarray:
    """Runs a product with fragments: y [tokens, out] of `PlacedTokens`."""
    order, _, starts = sort_tokens(experts, spec.num_experts)
    tiles = tile_tokens(order, experts, spec.num_experts, tile)
    shape = (len(experts), spec.rows)
    y = np.full(shape, np.nan, np.float32) if float32 else np.full(shape, POISON, np.uint16)
    call = fragment_products.fragment_call(
        spec,
        num_chunks=len(arrays["fragments"]),
        num_extras=len(arrays["extra_fragments"]),
        places=arrays["fragment_places"].shape[1],
        num_tokens=len(experts),
        num_tiles=len(tiles[0]),
        tile=tile,
        is_float32=float32,
        row_parts=row_parts,
    )
    names = ("fragments", "fragment_starts", "extra_fragments", "extra_places", "extra_starts")
    levels = arrays.get("levels", np.zeros(1, np.uint32))
    inputs = [*(arrays[name] for name in names), levels, *placed, order, starts, *tiles, y]
    arguments = []
    for argument in call.arguments:
        assert isinstance(argument, StructArgument)
        values = [
            inputs[value] if is_pointer(kind) else value
            for value, (_, kind) in zip(argument.values, argument.struct.fields, strict=True)
        ]
        arguments.append(Struct(argument.struct, tuple(values)))
    get(call.name)(call.grid, (call.threads,), arguments, shared_mem=call.shared_bytes, **options)
    return y if float32 else y.view(ml_dtypes.bfloat16)


def expand(
    get: GetFunction,
    coded: CodedTensor,
    expert_ids: list[int],
    *,
    rows_per_block: int = 8,
    threads: int = 64,
    zero_skipped: bool = True,
    **options: Any,
) -> np.ndarray:
    """Runs an expansion kernel: bfloat16 [ids, out, in]."""
    spec = coded.spec
    dense = np.full((len(expert_ids), spec.rows, spec.width), POISON, np.uint16)
    values = (np.array(expert_ids, np.int32), dense, len(expert_ids), spec.num_experts)
    values = (*values, spec.rows, spec.width, rows_per_block, int(zero_skipped))
    get(f"expand_{spec.coding}")(
        (-(-spec.rows // rows_per_block), len(expert_ids)),
        (threads,),
        [coding_argument(get, coded), Struct(kernels.EXPANSION, values)],
        shared_mem=kernels.expand_shared_bytes(spec.coding, threads),
        **options,
    )
    return dense.view(ml_dtypes.bfloat16)


def encode_tunstall(
    get: GetFunction,
    codes: np.ndarray,
    levels: np.ndarray,
    dictionaries: np.ndarray,
    coding: str,
    *,
    threads: int = 64,
    **options: Any,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Runs both passes: words, expert_offsets, bytes and codewords of each row."""
    experts, rows, width = codes.shape
    trie = family(coding).trie
    grid = (-(-rows // threads), experts)
    shared = 1024 + 68 * threads
    numbers = (experts, rows, width, trie.shape[1], int(coding == "tunstall_2bit"))
    front = Struct(kernels.ENCODING, (codes, levels, dictionaries, trie, *numbers))
    num_bytes = np.full((experts, rows), -1, np.int32)
    num_codewords = np.full((experts, rows), -1, np.int32)
    sizes = get("encode_tunstall_sizes")
    sizes(grid, (threads,), [front, num_bytes, num_codewords], shared_mem=shared, **options)

    row_ends = np.cumsum(num_bytes, axis=1, dtype=np.int32)
    words = -(-row_ends[:, -1] // 4)
    offsets = np.concatenate([[0], np.cumsum(words)]).astype(np.int32)
    data = np.full(4 * offsets[-1], 0xEE, np.uint8)
    arguments = [front, offsets, row_ends, data]
    get("encode_tunstall_rows")(grid, (threads,), arguments, shared_mem=shared, **options)
    return data.view("<u4"), offsets, num_bytes, num_codewords
