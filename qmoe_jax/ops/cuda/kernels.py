"""The launches of `kernels_cuda/`: arguments and sizes, as its README.md states them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Float, Int, Int32

from qmoe_jax.codec.dictionary import dictionary
from qmoe_jax.codec.tensor import TensorSpec
from qmoe_jax.codec.tunstall import tunstall_family
from qmoe_jax.ops.cuda.callback import Operand, run_kernel
from qmoe_jax.ops.cuda.launch_settings import Launch, LaunchSettings, launch_settings
from qmoe_jax.ops.cuda.launcher import CudaError, KernelCall, Launcher
from qmoe_jax.ops.experts import CodedExperts, find_row_block_starts

TILES = (1, 2, 4, 8, 16)
"""Numbers of tokens of an expert that can share a decode."""
_COLUMN_PADDING = 64
_DICTIONARY_BYTES = {"tunstall": 2048, "tunstall_2bit": 2048, "qmoe": 0, "packed2": 0}
_MAX_GRID_Y = 65535


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


def check_coded(experts: CodedExperts) -> None:
    """Refuse codes that the CUDA kernels do not take.

    Raises:
      CudaError: a row of codes is only part of an output feature's weights, or a coding that has no
        kernels.
    """
    spec = experts.spec
    if spec.coding not in _DICTIONARY_BYTES:
        raise CudaError(
            f"The coding {spec.coding!r} has no CUDA kernels; those that do are "
            f"{', '.join(sorted(_DICTIONARY_BYTES))}. Use implementation='xla'."
        )
    if spec.width != experts.in_features:
        raise CudaError(
            f"A row of codes has {spec.width} of the {experts.in_features} weights of an output "
            "feature (the model was compressed with group_size); the CUDA kernels require whole "
            "rows. Use implementation='xla', or compress without group_size."
        )


def settings_for(launcher: Launcher, experts: CodedExperts) -> LaunchSettings:
    """Launch settings of the experts' coding on the launcher's device."""
    device = launcher.device
    return launch_settings(device.name, device.compute_capability, experts.spec.coding)


def fused_shared_bytes(coding: str, in_features: int, tile_tokens: int, threads: int) -> int:
    """Dynamic shared memory of a product kernel."""
    staged = (in_features + _COLUMN_PADDING) * max(4, 2 * tile_tokens)
    return _DICTIONARY_BYTES[coding] + staged + 64 * (2 + threads // 32)


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
    inputs = _coding_inputs(experts)
    result = jax.ShapeDtypeStruct((num_tokens, spec.rows), dtype)
    call = fused_call(
        spec,
        launch,
        num_tokens=num_tokens,
        tile_tokens=min(tile, most),
        is_float32=result.dtype == jnp.float32,
        front=front_arguments(spec, experts.arrays),
    )
    return run_kernel(launcher, call, [*inputs, x, *tokens], result)


def fused_call(
    spec: TensorSpec,
    launch: Launch,
    *,
    num_tokens: int,
    tile_tokens: int,
    is_float32: bool,
    front: tuple[int | np.generic, ...],
) -> KernelCall:
    """Return a product's launch. Pointers: the coding's, x, order, experts, starts of tokens, y.

    Args:
      spec: of the codes.
      launch: how rows are spread.
      num_tokens: tokens in all.
      tile_tokens: one of TILES.
      is_float32: whether y is float32, not bfloat16.
      front: of `front_arguments`.
    """
    kind = "t2" if tile_tokens <= 2 else "t16"
    rows = f"_rows{launch.rows_per_warp}" if _DICTIONARY_BYTES[spec.coding] else ""
    first = sum(isinstance(argument, int) for argument in front)
    rows_per_block = max(launch.rows_per_block, -(-spec.rows // _MAX_GRID_Y))
    numbers = (spec.num_experts, spec.rows, spec.width, num_tokens)
    numbers = (*numbers, tile_tokens, rows_per_block, int(is_float32))
    return KernelCall(
        source=f"fused_{spec.coding}.cu",
        name=f"fused_{spec.coding}_{kind}{rows}",
        grid=(num_tokens, -(-spec.rows // rows_per_block)),
        threads=launch.threads,
        shared_bytes=fused_shared_bytes(spec.coding, spec.width, tile_tokens, launch.threads),
        arguments=(*front, *range(first, first + 5), *(np.int32(n) for n in numbers)),
    )


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
    call = expand_call(spec, launch, count=count, front=front_arguments(spec, experts.arrays))
    result = jax.ShapeDtypeStruct((count, spec.rows, spec.width), jnp.bfloat16)
    return run_kernel(launcher, call, [*_coding_inputs(experts), expert_ids], result)


def expand_call(
    spec: TensorSpec, launch: Launch, *, count: int, front: tuple[int | np.generic, ...]
) -> KernelCall:
    """Return the launch of an expansion of `count` experts. Pointers: the coding's, ids, dense."""
    first = sum(isinstance(argument, int) for argument in front)
    numbers = (count, spec.num_experts, spec.rows, spec.width)
    return KernelCall(
        source="expand.cu",
        name=f"expand_{spec.coding}",
        grid=(-(-spec.rows // launch.rows_per_block), count),
        threads=launch.threads,
        shared_bytes=_DICTIONARY_BYTES[spec.coding] + 4096 * (launch.threads // 32),
        arguments=(
            *front,
            *(first, first + 1),
            *(np.int32(n) for n in (*numbers, launch.rows_per_block, 1)),
        ),
    )


def array_names(coding: str) -> tuple[str, ...]:
    """Return what every decoder of a coding is given first, in order.

    Stored arrays by name; `row_block_starts` of `find_row_block_starts`; `table` of `table`.
    """
    if coding == "packed2":
        return ("packed", "levels")
    if coding == "qmoe":
        names = ("codewords", "expert_offsets", "row_lengths")
    else:
        names = ("words", "expert_offsets", "dictionaries", "shortest_rows", "row_lengths")
    return (*names, "row_block_starts", "levels", "table")


def table(coding: str) -> np.ndarray:
    """Return the dictionaries of a coding, uint32: `[10, 256, 2]`, or `[131072]` of `qmoe`."""
    if coding == "qmoe":
        return dictionary().table.view(np.uint32)
    return tunstall_family(8 if coding == "tunstall_2bit" else 0).table


def front_arguments(spec: TensorSpec, arrays: Mapping[str, Any]) -> tuple[int | np.generic, ...]:
    """Return the arguments that every decoder takes first: `array_names`, then two sizes."""
    names = array_names(spec.coding)
    if spec.coding == "packed2":
        return tuple(range(len(names)))
    num_words = np.uint32(arrays[names[0]].shape[0])
    length_bytes = np.int32(np.dtype(arrays["row_lengths"].dtype).itemsize)
    return (*range(len(names)), num_words, length_bytes)


def _coding_inputs(experts: CodedExperts) -> list[Operand]:
    spec, arrays = experts.spec, experts.arrays
    inputs: list[Operand] = []
    for name in array_names(spec.coding):
        if name == "table":
            inputs.append(table(spec.coding))
        elif name == "row_block_starts":
            starts = experts.row_block_starts
            if starts is None:
                starts = find_row_block_starts(spec, arrays)
            assert starts is not None
            inputs.append(starts)
        else:
            inputs.append(arrays[name])
    return inputs
