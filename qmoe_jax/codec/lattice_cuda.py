"""What CUDA kernels take of the "lattice" coding, and what is derived for them at loading."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt32

from qmoe_jax.codec.cuda_interface import (
    COLUMN_PADDING,
    ArgumentStruct,
    CudaInterface,
    DerivingKernel,
    MatmulKernels,
)
from qmoe_jax.codec.lattice_blocks import BLOCK_ROWS, NUM_STRINGS
from qmoe_jax.codec.lattice_choices import ZERO_COLUMN
from qmoe_jax.codec.lattice_dictionaries import NUM_DICTIONARIES, lattice_dictionaries
from qmoe_jax.codec.lattice_values import STEP_TABLE
from qmoe_jax.codec.tensor import TensorSpec

_CUDA_ARGUMENTS = ArgumentStruct(
    "LatticeArrays",
    (
        ("words", "const u32*"),
        ("expert_offsets", "const int*"),
        ("block_lengths", "const void*"),
        ("grouped_columns", "const int*"),
        ("schedules", "const u16*"),
        ("dictionaries", "const u8*"),
        ("leans", "const u8*"),
        ("columns", "const u8*"),
        ("bases", "const u8*"),
        ("origins", "const float*"),
        ("row_block_starts", "const int*"),
        ("visits", "const u32*"),
        ("cursors", "const u32*"),
        ("table", "const u32*"),
        ("num_words", "u32"),
        ("block_length_bytes", "int"),
    ),
)
# As kernels_cuda/coding_lattice.cuh has them.
_TASK_COLUMNS = 256
_WARP_BYTES = 4 * (36 + 256 + 36) + 4 * 4 * (128 + 36) + 1024
_MATMUL_WARPS = 16
_ENDS_BYTES = 4 * NUM_DICTIONARIES * NUM_STRINGS


def find_visits(
    spec: TensorSpec, arrays: Mapping[str, Any]
) -> UInt32[jax.Array, "experts one_more"]:
    """Return the number of visited columns of each expert, then these in order, for CUDA kernels.

    A column is its byte << 24 | its number << 1 | its lean, so that sorting these sorts them.
    """
    columns = jnp.asarray(arrays["columns"])
    numbers = jnp.arange(spec.width, dtype=jnp.uint32)
    keys = columns.astype(jnp.uint32) << 24 | numbers << 1
    if spec.rows >= spec.width and spec.width:
        leans = jnp.take(jnp.asarray(arrays["leans"]), numbers >> 3, axis=1, mode="clip")
        keys |= (leans >> (numbers & 7).astype(jnp.uint8) & jnp.uint8(1)).astype(jnp.uint32)
    visited = (columns != ZERO_COLUMN).sum(axis=1, dtype=jnp.uint32)
    return jnp.concatenate([visited[:, None], jnp.sort(keys, axis=1)], axis=1)


def _cuda_table() -> UInt32[np.ndarray, "words"]:
    dictionaries = lattice_dictionaries().table.reshape(-1)
    return np.concatenate([dictionaries, STEP_TABLE.view(np.uint32)])


def _most_tasks(width: int) -> int:
    return -(-width // _TASK_COLUMNS) + 1


def _cursors_shape(experts: int, rows: int, width: int) -> tuple[int, ...]:
    return experts, -(-rows // BLOCK_ROWS), 1 + _most_tasks(width), 8


def _product_bytes(width: int, tile_tokens: int, threads: int) -> int:
    warps = threads // 32
    tokens = min(tile_tokens, 8) * (128 * (warps + 4) + 6 * (width + COLUMN_PADDING))
    return _ENDS_BYTES + 64 + _WARP_BYTES * warps + tokens


def _matmul_threads(rows: int) -> int:
    """As few blocks as there can be, of as few warps as these take: a warp has 32 rows."""
    blocks = -(-rows // BLOCK_ROWS)
    return 32 * -(-blocks // -(-blocks // _MATMUL_WARPS))


LATTICE_CUDA = CudaInterface(
    source="fused_lattice.cu",
    arguments=_CUDA_ARGUMENTS,
    sizes={
        "num_words": ("words", "entries"),
        "block_length_bytes": ("block_lengths", "item_bytes"),
    },
    table=_cuda_table,
    dictionary_bytes=8 * 256 * NUM_DICTIONARIES,
    rows_per_warp=(1,),
    matmul=MatmulKernels(
        source="matmul_lattice.cu",
        tiles=(8, 16, 32),
        width_multiple=1,
        threads=_matmul_threads,
        rows_per_block=lambda threads: BLOCK_ROWS * (threads // 32),
        shared_bytes=lambda threads, tile: (
            _ENDS_BYTES + 4 * 32 + _WARP_BYTES * (threads // 32) + 6 * _TASK_COLUMNS * tile
        ),
        tokens_per_expert=4,
    ),
    derived={"visits": find_visits},
    derived_shapes={"visits": lambda experts, rows, width: (experts, 1 + width)},
    deriving_kernel=DerivingKernel(
        array="cursors",
        source="encode.cu",
        name="find_lattice_cursors",
        shape=_cursors_shape,
        grid=lambda experts, rows, width: (-(-rows // BLOCK_ROWS), experts),
        shared_bytes=lambda experts, rows, width: _ENDS_BYTES + 16 * _most_tasks(width),
    ),
    block_rows=BLOCK_ROWS,
    product_bytes=_product_bytes,
    expansion_bytes=lambda threads: _ENDS_BYTES + 36_864 + _WARP_BYTES * (threads // 32),
)
