"""Products of tokens with codes that lie as fragments (`fragments`), by tensor cores.

XLA multiplies a token's features by the steps of its expert's places and rounds: to the sum of two
bfloat16 numbers, 17 bits, where experts have few tokens, and to one, as a dense bfloat16 kernel's
weights are rounded, where they have many. Products of these with weights are exact and sums are
float32.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, Float32, UInt32

from qmoe_jax.codec.cuda_interface import ArgumentStruct
from qmoe_jax.codec.tensor import TensorSpec
from qmoe_jax.errors import CudaError
from qmoe_jax.ops.cuda.fragments import (
    CHUNK_PLACES,
    CHUNK_ROWS,
    READ_BEHIND,
    has_fragments,
    places_of,
)
from qmoe_jax.ops.cuda.kernels import TokenOrder, settings_for, tile_tokens
from qmoe_jax.ops.cuda.launch_settings import LaunchSettings
from qmoe_jax.ops.cuda.launcher import KernelCall, Launcher, Operand, StructArgument, run_kernel
from qmoe_jax.ops.experts import CodedExperts

SOURCE = "matmul_fragments.cu"
COLUMNS = (8, 16, 32, 64)
"""Columns of a tile, a kernel each: one for each part of a token."""
ONE_PART_FROM = 32
"""With that many tokens for each expert, on average, features are rounded to bfloat16."""
MOST_PER_EXPERT = 128
"""With more tokens for each expert, on average, experts are expanded. An estimate."""
ROW_PLACES, PADDING_ROWS = 32, 64
FRAGMENTS = ArgumentStruct(
    "FragmentArrays",
    (
        ("fragments", "const u32*"),
        ("fragment_starts", "const int*"),
        ("extra_fragments", "const u32*"),
        ("extra_places", "const u16*"),
        ("extra_starts", "const int*"),
        ("num_chunks", "int"),
        ("num_extras", "int"),
    ),
)
FRAGMENT_PRODUCT = ArgumentStruct(
    "FragmentProductArguments",
    (
        ("x", "const u16*"),
        ("token_order", "const int*"),
        ("expert_starts", "const int*"),
        ("tile_experts", "const int*"),
        ("tile_starts", "const int*"),
        ("y", "void*"),
        ("num_experts", "int"),
        ("out_features", "int"),
        ("places", "int"),
        ("num_tokens", "int"),
        ("num_rows", "int"),
        ("parts", "int"),
        ("row_parts", "int"),
        ("y_is_float32", "int"),
    ),
)
ARRAYS = ("fragments", "fragment_starts", "extra_fragments", "extra_places", "extra_starts")
"""Of `Fragments`, what a launch takes first."""
_MOST_WARPS = {8: 8, 16: 8, 32: 8, 64: 4}
_MAX_ELEMENTS = 1 << 31
_MAX_GRID_Y = 65_535


def takes_fragments(
    launcher: Launcher, experts: CodedExperts, num_tokens: int, num_experts: int
) -> bool:
    """Whether these products are multiplied by fragments: there are some, and few enough tokens."""
    if not has_fragments(experts.derived) or not multiplies_fragments(launcher):
        return False
    rows = 2 * num_tokens + PADDING_ROWS
    fits = rows * experts.derived["fragment_places"].shape[1] < _MAX_ELEMENTS
    most = min(MOST_PER_EXPERT * num_experts, _MAX_GRID_Y)
    return fits and 0 < num_tokens <= most


def multiplies_fragments(launcher: Launcher) -> bool:
    """Whether the device has tensor cores for bfloat16, since 8.0."""
    return int(launcher.device.compute_capability.split(".")[0]) >= 8


def can_have_fragments(launcher: Launcher, specs: Sequence[TensorSpec]) -> bool:
    """Whether all codes can be laid out and multiplied as fragments."""
    are_lattice = all(spec.coding == "lattice" for spec in specs)
    return are_lattice and multiplies_fragments(launcher)


def check_fragments(launcher: Launcher, specs: Sequence[TensorSpec]) -> None:
    """Refuse what cannot be multiplied as fragments.

    Raises:
      CudaError: codes of another grid than the lattice, or a device before 8.0.
    """
    if others := sorted({spec.coding for spec in specs} - {"lattice"}):
        raise CudaError(
            f"The model has codes of {', '.join(map(repr, others))}; "
            "implementation='cuda_fragments' requires 'lattice'. Use implementation='cuda'."
        )
    if not multiplies_fragments(launcher):
        raise CudaError(
            f"The {launcher.device.name} has compute capability "
            f"{launcher.device.compute_capability}; implementation='cuda_fragments' requires 8.0, "
            "tensor cores for bfloat16. Use implementation='cuda'."
        )


def fragment_product(
    launcher: Launcher,
    experts: CodedExperts,
    x: BFloat16[Array, "tokens in"],
    tokens: TokenOrder,
    *,
    expected_tokens: float,
    dtype: jax.typing.DTypeLike,
) -> Float[Array, "tokens out"]:
    """y[t] = W_e(t) x[t] for all tokens and their experts in one launch.

    Reference: `compressed_product(..., implementation="xla")`. A weight 0 of a column that has
    others is multiplied: an infinity or a NaN in a token reaches all its outputs.

    Args:
      launcher: of `current_launcher`.
      experts: codes, with the arrays of `Fragments` among `derived`.
      x: tokens.
      tokens: of `kernels.sort_tokens`.
      expected_tokens: tokens that an expert with tokens has, about; from `ONE_PART_FROM` on it
        changes how features are rounded.
      dtype: bfloat16 or float32, of the result. Sums are float32.

    Returns:
      Outputs in the order of x; zeros for tokens without an expert.
    """
    spec, num_tokens, derived = experts.spec, x.shape[0], experts.derived
    parts = parts_of_tokens(expected_tokens)
    columns = tile_columns(parts * min(2 * expected_tokens, num_tokens))
    tiles = tile_tokens(tokens, spec.num_experts, columns // parts)
    result = jax.ShapeDtypeStruct((num_tokens, spec.rows), dtype)
    placed = place_tokens(
        x, tokens, derived["fragment_places"], experts.arrays["origins"], parts=parts
    )
    call = fragment_call(
        spec,
        num_chunks=derived["fragments"].shape[0],
        num_extras=derived["extra_fragments"].shape[0],
        places=derived["fragment_places"].shape[1],
        num_tokens=num_tokens,
        num_tiles=tiles.experts.shape[0],
        columns=columns,
        parts=parts,
        is_float32=result.dtype == jnp.float32,
        settings=settings_for(launcher, experts),
    )
    arrays: list[Operand] = [derived[name] for name in ARRAYS]
    inputs = [*arrays, placed, tokens.order, tokens.starts, *tiles]
    return run_kernel(launcher, call, inputs, result)


def parts_of_tokens(expected_tokens: int | float) -> int:
    """Return into how many numbers a feature times a step is rounded, by tokens of an expert."""
    return 1 if expected_tokens >= ONE_PART_FROM else 2


def tile_columns(wanted: int | float) -> int:
    """Return the columns of a tile that has room for so many, if there are such."""
    return min([size for size in COLUMNS if size >= wanted], default=COLUMNS[-1])


def shared_row_parts(columns: int, places: int, warps: int) -> list[int]:
    """Numbers of warps that can share 32 rows, least first.

    Args:
      columns: of a tile.
      places: of an expert, at most.
      warps: of a block, at most.
    """
    most = min(warps, _MOST_WARPS[columns], places // CHUNK_PLACES)
    return [share for share in (1, 2, 4, 8) if share <= most]


def place_tokens(
    x: BFloat16[Array, "tokens in"],
    tokens: TokenOrder,
    places: UInt32[Array, "experts places"],
    origins: Float32[Array, "experts"],
    *,
    parts: int,
) -> BFloat16[Array, "blocks rows 32"]:
    """Return what weights multiply, token by token: features times steps at the expert's places.

    Args:
      x: tokens.
      tokens: their order by expert, which the rows have.
      places: of the experts.
      origins: of the experts.
      parts: bfloat16 numbers, a row each, whose sum a feature times its step is rounded to.
    """
    expert = jnp.minimum(tokens.experts, places.shape[0] - 1)
    columns, halves = places_of(places)
    factors = (origins[:, None] * halves)[expert]
    features = jnp.take_along_axis(x[tokens.order], columns[expert], axis=1).astype(jnp.float32)
    # A place that is none has a factor of 0, and no feature either, which may be infinite.
    values = jnp.where(halves[expert] == 0, 0.0, features * factors)
    rows = []
    for _ in range(parts):
        # reduce_precision, since XLA may leave out a conversion to bfloat16 and back.
        part = jax.lax.reduce_precision(values, exponent_bits=8, mantissa_bits=7)
        rows.append(part.astype(jnp.bfloat16))
        values = jnp.where(jnp.isfinite(part), values - part, 0.0)
    together = jnp.stack(rows, axis=1).reshape(-1, places.shape[1] // ROW_PLACES, ROW_PLACES)
    return jnp.pad(together, ((0, PADDING_ROWS), (0, 0), (0, 0))).transpose(1, 0, 2)


def fragment_call(
    spec: TensorSpec,
    *,
    num_chunks: int,
    num_extras: int,
    places: int,
    num_tokens: int,
    num_tiles: int,
    columns: int,
    parts: int,
    is_float32: bool,
    settings: LaunchSettings | None = None,
    row_parts: int | None = None,
) -> KernelCall:
    """Return a launch. Inputs: `Fragments` but for places, placed tokens, order, starts, tiles; y.

    Args:
      spec: of the codes.
      num_chunks: with those that are read for nothing.
      num_extras: extra chunks.
      places: of an expert, at most.
      num_tokens: tokens in all.
      num_tiles: tiles in all.
      columns: of a tile, one of `COLUMNS`.
      parts: of a token, 1 or 2.
      is_float32: whether y is float32, not bfloat16.
      settings: launch settings; None: the defaults.
      row_parts: one of `shared_row_parts`; None: as many as make enough blocks.
    """
    settings = settings or LaunchSettings()
    warps = min(settings.fragment_warps, _MOST_WARPS[columns])
    strips = -(-spec.rows // CHUNK_ROWS)
    if row_parts is None:
        shared = shared_row_parts(columns, places, warps)
        blocks = {share: -(-strips * share // warps) * num_tiles for share in shared}
        enough = [share for share in shared if blocks[share] >= settings.fragment_blocks]
        row_parts = min(enough, default=shared[-1])
    numbers = {
        "num_chunks": num_chunks - READ_BEHIND,
        "num_extras": num_extras,
        "num_experts": spec.num_experts,
        "out_features": spec.rows,
        "places": places,
        "num_tokens": num_tokens,
        "num_rows": num_tokens * parts + PADDING_ROWS,
        "parts": parts,
        "row_parts": row_parts,
        "y_is_float32": int(is_float32),
    }
    return KernelCall(
        source=SOURCE,
        name=f"matmul_fragments_c{columns}",
        grid=(-(-strips * row_parts // warps), num_tiles),
        threads=32 * warps,
        shared_bytes=128 * columns * warps if row_parts > 1 else 0,
        arguments=(
            StructArgument.of(FRAGMENTS, numbers),
            StructArgument.of(FRAGMENT_PRODUCT, numbers, len(ARRAYS)),
        ),
    )
