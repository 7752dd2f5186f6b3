"""Products of tokens with codes that lie as fragments (`fragments`), by tensor cores.

Of the lattice XLA multiplies a token's features by the steps of its expert's places and rounds to
float16, 11 bits, scaled by a power of two for each token. (A dense bfloat16 kernel's weights are
rounded to 8 bits.) Ternary weights and features are multiplied as they are, bfloat16. Products are
exact and sums are float32. Tokens of float32 are several *parts*, each a token to the kernel: two
of 11 bits, or exactly three bfloat16 ones.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, BFloat16, Float, Float16, Float32, Int32, UInt32

from qmoe_jax.codec.codings import get_coding
from qmoe_jax.codec.cuda_interface import ArgumentStruct
from qmoe_jax.codec.tensor import TensorSpec
from qmoe_jax.errors import CudaError
from qmoe_jax.ops.cuda.fragments import (
    CHUNK_PLACES,
    CHUNK_ROWS,
    FRAGMENT_GRIDS,
    READ_BEHIND,
    fragment_grids,
    has_fragments,
    places_of,
)
from qmoe_jax.ops.cuda.kernels import TokenOrder, settings_for, tile_tokens
from qmoe_jax.ops.cuda.launch_settings import LaunchSettings
from qmoe_jax.ops.cuda.launcher import KernelCall, Launcher, Operand, StructArgument, run_kernel
from qmoe_jax.ops.cuda.parts import split_float32
from qmoe_jax.ops.experts import CodedExperts

SOURCE = "matmul_fragments.cu"
TILES = (8, 16, 32, 64)
"""Numbers of tokens of an expert that can share a decode, a kernel each."""
MOST_PER_EXPERT = 128
"""With more tokens for each expert, on average, experts are expanded. An estimate."""
ROW_PLACES, PADDING_ROWS = 8, 64
FRAGMENTS = ArgumentStruct(
    "FragmentArrays",
    (
        ("fragments", "const u32*"),
        ("fragment_starts", "const int*"),
        ("extra_fragments", "const u32*"),
        ("extra_places", "const u16*"),
        ("extra_starts", "const int*"),
        ("levels", "const u32*"),
        ("num_chunks", "int"),
        ("num_extras", "int"),
    ),
)
FRAGMENT_PRODUCT = ArgumentStruct(
    "FragmentProductArguments",
    (
        ("x", "const u16*"),
        ("scales", "const float*"),
        ("token_order", "const int*"),
        ("expert_starts", "const int*"),
        ("tile_experts", "const int*"),
        ("tile_starts", "const int*"),
        ("y", "void*"),
        ("num_experts", "int"),
        ("out_features", "int"),
        ("places", "int"),
        ("num_tokens", "int"),
        ("row_parts", "int"),
        ("y_is_float32", "int"),
    ),
)
ARRAYS = ("fragments", "fragment_starts", "extra_fragments", "extra_places", "extra_starts")
"""Of `Fragments`, what a launch takes first."""
_MOST_WARPS = {8: 8, 16: 8, 32: 8, 64: 4}
# Of `fragment_blocks`: more blocks end more evenly, and read tokens more often.
_BLOCKS_SHARE = {8: 1, 16: 1, 32: 2, 64: 4}
_MAX_GRID_Y = 65_535
_FRACTION_BITS, _BIAS = 23, 127
_MAX_SHIFT = 240  # so that it and 10 more have a reciprocal


def takes_fragments(
    launcher: Launcher, experts: CodedExperts, num_tokens: int, num_experts: int
) -> bool:
    """Whether these products are multiplied by fragments: there are some, and few enough tokens."""
    if not has_fragments(experts.derived):
        return False
    most = settings_for(launcher, experts).fused_tokens
    return 0 < num_tokens <= min(MOST_PER_EXPERT * num_experts, most, _MAX_GRID_Y)


def check_fragments(launcher: Launcher, specs: Sequence[TensorSpec]) -> None:
    """Refuse what cannot be multiplied as fragments.

    Raises:
      CudaError: codes of another grid than the lattice and the ternary one, or ternary ones on a
        device before 8.0.
    """
    grids = {spec.coding: get_coding(spec.coding).grid for spec in specs}
    if others := sorted(name for name, grid in grids.items() if grid not in FRAGMENT_GRIDS):
        raise CudaError(
            f"The model has codes of {', '.join(map(repr, others))}; "
            "implementation='cuda_fragments' requires those of the lattice or the ternary grid. "
            "Use implementation='cuda'."
        )
    device = launcher.device
    if set(grids.values()) - set(fragment_grids(device.compute_capability)):
        raise CudaError(
            f"The {device.name} has compute capability {device.compute_capability}; "
            "implementation='cuda_fragments' requires 8.0 for ternary codes, tensor cores for "
            "bfloat16. Use implementation='cuda'."
        )


def num_parts(experts: CodedExperts, dtype: jax.typing.DTypeLike) -> int:
    """Return how many parts a token of that dtype is."""
    if jnp.dtype(dtype) != jnp.float32:
        return 1
    return 3 if get_coding(experts.spec.coding).grid == "ternary" else 2


def fragment_product(
    launcher: Launcher,
    experts: CodedExperts,
    x: Float[Array, "tokens in"],
    tokens: TokenOrder,
    *,
    expected_tokens: float,
    dtype: jax.typing.DTypeLike,
) -> Float[Array, "rows out"]:
    """y[t] = W_e(t) x[t] for all parts of tokens and their experts in one launch.

    Reference: `compressed_product(..., implementation="xla")`. A weight 0, but of the lattice's
    columns of zeros, is multiplied: an infinity or a NaN in a token reaches all its outputs.

    Args:
      launcher: of `current_launcher`.
      experts: codes, with the arrays of `Fragments` among `derived`.
      x: tokens, bfloat16 or float32.
      tokens: of `kernels.sort_tokens`, of `num_parts` rows for each token: first parts of all
        tokens, then second ones, ...
      expected_tokens: rows that an expert with tokens has, about; changes no result.
      dtype: bfloat16 or float32, of the result. Sums are float32.

    Returns:
      Outputs in the order that `tokens` sorts; zeros for tokens without an expert.
    """
    spec, num_tokens, derived = experts.spec, tokens.order.shape[0], experts.derived
    size = tile_size(expected_tokens, num_tokens)
    tiles = tile_tokens(tokens, spec.num_experts, size)
    result = jax.ShapeDtypeStruct((num_tokens, spec.rows), dtype)
    grid = get_coding(spec.coding).grid
    if grid == "ternary":
        features = x if x.dtype == jnp.bfloat16 else jnp.concatenate(split_float32(x))
        placed = place_features(features, tokens, derived["fragment_places"].shape[1])
    else:
        placed = place_tokens(x, tokens, derived["fragment_places"], experts.arrays["origins"])
    call = fragment_call(
        spec,
        num_chunks=derived["fragments"].shape[0],
        num_extras=derived["extra_fragments"].shape[0],
        places=derived["fragment_places"].shape[1],
        num_tokens=num_tokens,
        num_tiles=tiles.experts.shape[0],
        tile=size,
        is_float32=result.dtype == jnp.float32,
        settings=settings_for(launcher, experts),
    )
    arrays: list[Operand] = [derived[name] for name in ARRAYS]
    levels = experts.arrays["levels"] if grid == "ternary" else np.zeros(1, np.uint32)
    inputs = [*arrays, levels, *placed, tokens.order, tokens.starts, *tiles]
    return run_kernel(launcher, call, inputs, result)


def tile_size(expected_tokens: float, num_tokens: int) -> int:
    """Return how many tokens of an expert share a decode, one of `TILES`.

    Room for twice the expected ones, where that costs little beside another tile's decoding.
    """
    expected = min(expected_tokens, num_tokens)
    wanted = min(num_tokens, max(min(2 * expected, TILES[2]), expected))
    return min([size for size in TILES if size >= wanted], default=TILES[-1])


class PlacedTokens(NamedTuple):
    """What weights multiply.

    Attributes:
      rows: of the sorted tokens, and `PADDING_ROWS` of zeros.
      scales: what products with the rows are to be multiplied by: powers of two.
    """

    rows: Float16[Array, "eights rows 8"] | BFloat16[Array, "eights rows 8"]
    scales: Float32[Array, "tokens"]


def place_tokens(
    x: Float[Array, "tokens in"],
    tokens: TokenOrder,
    places: UInt32[Array, "experts places"],
    origins: Float32[Array, "experts"],
) -> PlacedTokens:
    """Multiply each token's features by half the steps at its expert's places.

    Args:
      x: tokens, bfloat16 or float32.
      tokens: the order by expert of their parts, which the rows have.
      places: of the experts.
      origins: of the experts.
    """
    expert = jnp.minimum(tokens.experts, places.shape[0] - 1)
    # Of the tokens' experts alone: there may be thousands.
    columns, halves = places_of(places[expert])
    token, part = tokens.order % x.shape[0], tokens.order // x.shape[0]
    features = jnp.take_along_axis(x[token], columns, axis=1).astype(jnp.float32)
    # A place that is none has a factor of 0, and no feature either, which may be infinite.
    values = jnp.where(halves == 0, 0.0, features * (origins[expert][:, None] * halves))
    sizes = jnp.where(jnp.isfinite(values), jnp.abs(values), 0.0).max(axis=1)
    # So that the largest lies between 2^14 and 2^15; float16 ends at 65,504.
    exponent = lax.bitcast_convert_type(sizes, jnp.uint32) >> _FRACTION_BITS
    shift = jnp.minimum(2 * _BIAS + 14 - exponent.astype(jnp.int32), _MAX_SHIFT)
    scaled = values * _power_of_two(shift)[:, None]
    if x.dtype == jnp.float32:
        # What a first part leaves is below 2^4, and as exact with 2^10 times the scale.
        rounded = lax.reduce_precision(scaled, exponent_bits=5, mantissa_bits=10)
        left = jnp.where(jnp.isfinite(rounded), scaled - rounded, 0.0) * 2.0**10
        is_second = part == 1
        scaled = jnp.where(is_second[:, None], left, scaled)
        shift = shift + jnp.where(is_second, 10, 0)
    scales = _power_of_two(2 * _BIAS - shift)
    return PlacedTokens(_eights(scaled.astype(jnp.float16)), scales)


def place_features(
    x: BFloat16[Array, "tokens in"], tokens: TokenOrder, num_places: int
) -> PlacedTokens:
    """Sort tokens for ternary codes, whose places are columns, and behind them nothing."""
    rows = jnp.pad(x[tokens.order], ((0, 0), (0, num_places - x.shape[1])))
    return PlacedTokens(_eights(rows), jnp.ones(x.shape[0], jnp.float32))


def _eights(rows: Float[Array, "tokens places"]) -> Float[Array, "eights rows 8"]:
    apart = rows.reshape(rows.shape[0], rows.shape[1] // ROW_PLACES, ROW_PLACES)
    return jnp.pad(apart, ((0, PADDING_ROWS), (0, 0), (0, 0))).transpose(1, 0, 2)


def _power_of_two(biased: Int32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    bits = biased.astype(jnp.uint32) << _FRACTION_BITS
    return lax.bitcast_convert_type(bits, jnp.float32)


def fragment_call(
    spec: TensorSpec,
    *,
    num_chunks: int,
    num_extras: int,
    places: int,
    num_tokens: int,
    num_tiles: int,
    tile: int,
    is_float32: bool,
    settings: LaunchSettings | None = None,
    row_parts: int | None = None,
) -> KernelCall:
    """Return a launch.

    Inputs: `Fragments` but for places, levels, `PlacedTokens`, order, starts, tiles; then y.

    Args:
      spec: of the codes.
      num_chunks: with those that are read for nothing.
      num_extras: extra chunks.
      places: of an expert, at most.
      num_tokens: tokens in all.
      num_tiles: tiles in all.
      tile: tokens of one at most, one of `TILES`.
      is_float32: whether y is float32, not bfloat16.
      settings: launch settings; None: the defaults.
      row_parts: warps that share 32 rows; None: as many as make enough blocks.
    """
    settings = settings or LaunchSettings()
    warps, strips = min(settings.fragment_warps, _MOST_WARPS[tile]), -(-spec.rows // CHUNK_ROWS)
    if row_parts is None:
        shared = [share for share in (1, 2, 4, 8) if share <= min(warps, places // CHUNK_PLACES)]
        blocks = {share: -(-strips * share // warps) * num_tiles for share in shared}
        wanted = settings.fragment_blocks / _BLOCKS_SHARE[tile]
        row_parts = min([share for share in shared if blocks[share] >= wanted], default=shared[-1])
    numbers = {
        "num_chunks": num_chunks - READ_BEHIND,
        "num_extras": num_extras,
        "num_experts": spec.num_experts,
        "out_features": spec.rows,
        "places": places,
        "num_tokens": num_tokens,
        "row_parts": row_parts,
        "y_is_float32": int(is_float32),
    }
    return KernelCall(
        source=SOURCE,
        name=f"matmul_fragments_{get_coding(spec.coding).grid}_t{tile}",
        grid=(-(-strips * row_parts // warps), num_tiles),
        threads=32 * warps,
        shared_bytes=128 * tile * warps if row_parts > 1 else 0,
        arguments=(
            StructArgument.of(FRAGMENTS, numbers),
            StructArgument.of(FRAGMENT_PRODUCT, numbers, len(ARRAYS) + 1),
        ),
    )
