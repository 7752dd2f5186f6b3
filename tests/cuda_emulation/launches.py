"""Calls of the kernels on NumPy arrays, as kernels_cuda/README.md states them."""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from qmoe_jax.codec.dictionary import dictionary
from qmoe_jax.codec.tensor import CodedTensor
from qmoe_jax.codec.tunstall import TunstallFamily, tunstall_family

GetFunction = Callable[[str], Any]
POISON = 0x7FB1  # a NaN in bfloat16


def family(coding: str) -> TunstallFamily:
    """The dictionaries of a "tunstall" coding."""
    return tunstall_family(8 if coding == "tunstall_2bit" else 0)


def row_block_starts(get: GetFunction, coded: CodedTensor, **options: Any) -> np.ndarray:
    """Runs find_row_block_starts."""
    arrays, spec = coded.arrays, coded.spec
    lengths = arrays["row_lengths"]
    starts = np.full((spec.num_experts, -(-spec.rows // 32)), -1, np.int32)
    if starts.size:
        arguments = [lengths, arrays.get("shortest_rows"), starts]
        arguments += [np.int32(spec.rows), np.int32(lengths.itemsize)]
        get("find_row_block_starts")((spec.num_experts,), (32,), arguments, **options)
    return starts


def coding_arguments(get: GetFunction, coded: CodedTensor) -> list[Any]:
    """What every decoder of the tensor's coding takes first."""
    arrays, coding = coded.arrays, coded.spec.coding
    if coding == "packed2":
        return [arrays["packed"], arrays["levels"]]
    starts = row_block_starts(get, coded)
    lengths = arrays["row_lengths"]
    tail = [np.int32(lengths.itemsize)]
    if coding == "qmoe":
        table = dictionary().table.astype(np.uint32)
        front = [arrays[name] for name in ("codewords", "expert_offsets", "row_lengths")]
        return [*front, starts, arrays["levels"], table, np.uint32(front[0].size), *tail]
    names = ("words", "expert_offsets", "dictionaries", "shortest_rows", "row_lengths")
    front = [arrays[name] for name in names]
    table = family(coding).table
    return [*front, starts, arrays["levels"], table, np.uint32(front[0].size), *tail]


def sort_tokens(experts: np.ndarray, num_experts: int) -> tuple[np.ndarray, ...]:
    """token_order, token_experts and expert_starts for the expert of each token (-1: none)."""
    keys = np.where(experts < 0, num_experts, experts)
    order = np.argsort(keys, kind="stable").astype(np.int32)
    starts = np.searchsorted(keys[order], np.arange(num_experts + 1)).astype(np.int32)
    return order, experts[order].astype(np.int32), starts


def fused_shared_bytes(coding: str, in_features: int, tile_tokens: int, threads: int) -> int:
    """Dynamic shared memory of the fused kernels."""
    dictionary_bytes = 2048 if coding.startswith("tunstall") else 0
    staged = (in_features + 64) * max(4, 2 * tile_tokens)
    return dictionary_bytes + staged + 64 * (2 + threads // 32)


def fused_name(coding: str, tile_tokens: int, rows_per_warp: int = 4) -> str:
    """Name of the fused kernel."""
    rows = f"_rows{rows_per_warp}" if coding.startswith("tunstall") else ""
    return f"fused_{coding}_t{2 if tile_tokens <= 2 else 16}{rows}"


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
    float32: bool = True,
    **options: Any,
) -> np.ndarray:
    """Runs a fused kernel: y [tokens, out] of x bfloat16 [tokens, in]."""
    spec = coded.spec
    order, token_experts, starts = sort_tokens(experts, spec.num_experts)
    shape = (len(x), spec.rows)
    y = np.full(shape, np.nan, np.float32) if float32 else np.full(shape, POISON, np.uint16)
    numbers = [spec.num_experts, spec.rows, spec.width, len(x)]
    numbers += [tile_tokens, rows_per_block, int(float32)]
    arguments = [*coding_arguments(get, coded), x, order, token_experts, starts, y]
    get(fused_name(spec.coding, tile_tokens, rows_per_warp))(
        (len(x), -(-spec.rows // rows_per_block)),
        (threads,),
        [*arguments, *(np.int32(n) for n in numbers)],
        shared_mem=fused_shared_bytes(spec.coding, spec.width, tile_tokens, threads),
        **options,
    )
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
    numbers = [len(expert_ids), spec.num_experts, spec.rows, spec.width]
    numbers += [rows_per_block, int(zero_skipped)]
    arguments = [*coding_arguments(get, coded), np.array(expert_ids, np.int32), dense]
    dictionary_bytes = 2048 if spec.coding.startswith("tunstall") else 0
    get(f"expand_{spec.coding}")(
        (-(-spec.rows // rows_per_block), len(expert_ids)),
        (threads,),
        [*arguments, *(np.int32(n) for n in numbers)],
        shared_mem=dictionary_bytes + 4096 * (threads // 32),
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
    numbers = [experts, rows, width, trie.shape[1], int(coding == "tunstall_2bit")]
    tail = [np.int32(n) for n in numbers]
    front = [codes, levels, dictionaries, trie]
    num_bytes = np.full((experts, rows), -1, np.int32)
    num_codewords = np.full((experts, rows), -1, np.int32)
    sizes = get("encode_tunstall_sizes")
    sizes(grid, (threads,), [*front, num_bytes, num_codewords, *tail], shared_mem=shared, **options)

    row_ends = np.cumsum(num_bytes, axis=1, dtype=np.int32)
    words = -(-row_ends[:, -1] // 4)
    offsets = np.concatenate([[0], np.cumsum(words)]).astype(np.int32)
    data = np.full(4 * offsets[-1], 0xEE, np.uint8)
    arguments = [*front, offsets, row_ends, data, *tail]
    get("encode_tunstall_rows")(grid, (threads,), arguments, shared_mem=shared, **options)
    return data.view("<u4"), offsets, num_bytes, num_codewords
