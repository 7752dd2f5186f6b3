"""Products of a layer's tokens with stored codes, on the cores of the CPU that XLA computes on.

Inside `jax.jit` XLA hands its own buffers to numba's kernels through a callback; nothing is copied.
Tokens are grouped by expert; what is to be decoded is cut into pieces of like numbers of bytes,
which the cores take one after another. Which of them takes what changes no result.
"""

import functools
import math
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float, Float32, Int, Int64

from qmoe_jax.codec.lattice_dictionaries import lattice_dictionaries
from qmoe_jax.codec.lattice_values import STEP_TABLE
from qmoe_jax.codec.tensor import TensorSpec
from qmoe_jax.codec.tunstall import tunstall_family
from qmoe_jax.host_threads import num_threads, share
from qmoe_jax.ops.experts import CodedExperts

CODINGS = ("lattice", "tunstall")
"""Codings that are multiplied as they are stored."""
MOST_TOKENS = 128
"""Tokens of an expert that share a decode; their x, by column, should stay in a core's cache."""
_BLOCK_ROWS = 32
# Least work of a piece, as `cut_work` counts it; about 0.1 ms of a core.
_PIECE = 300_000
_PIECES_A_THREAD = 4


class _Work(NamedTuple):
    """A layer's tokens by expert, and where the work is cut."""

    order: Int64[np.ndarray, "tokens"]
    starts: Int64[np.ndarray, "experts+1"]
    busy: Int64[np.ndarray, "busy"]
    cuts: Int64[np.ndarray, "cuts"]
    pieces: int
    most: int


def is_supported(experts: CodedExperts) -> bool:
    """Whether codes are multiplied as stored: by coding, and rows are whole."""
    spec = experts.spec
    return spec.coding in CODINGS and spec.width == experts.in_features


def stored_product(
    x: Float[Array, "tokens in"],
    expert_index: Int[Array, "tokens"],
    experts: CodedExperts,
) -> Float[Array, "tokens out"]:
    """y[t] = W_e(t) x[t] from stored codes. Reference: `compressed_product` with "xla".

    Sums are float32, of float32 weights, and the same for any number of threads. Any contents of
    the arrays are read in bounds. A program with it cannot be exported or kept in JAX's compilation
    cache; `ops.gradients` differentiates it. Under `jax.vmap` of tokens alone, all are
    multiplied at once.

    Args:
      x: float32 or bfloat16.
      expert_index: an index outside [0, num_experts) yields zeros.
      experts: codes of which `is_supported`.

    Returns:
      Products in the order and dtype of `x`.

    Raises:
      ValueError: an array is not of the shape or dtype that the spec requires.
    """
    spec = experts.spec
    names = _array_names(spec)
    arrays = [jnp.asarray(experts.arrays[name]) for name in names]
    _check_arrays(spec, dict(zip(names, arrays, strict=True)))
    if x.shape[0] == 0 or spec.rows == 0 or spec.num_experts == 0:
        return jnp.zeros((x.shape[0], spec.rows), x.dtype)
    y = _product(spec)(x.astype(jnp.float32), expert_index.astype(jnp.int32), *arrays)
    return y.astype(x.dtype)


def _array_names(spec: TensorSpec) -> tuple[str, ...]:
    return tuple(_expected(spec))


def _expected(spec: TensorSpec) -> dict[str, tuple[tuple[str, ...], tuple[int | None, ...]]]:
    """Dtypes and shape of the arrays, in the kernels' order; None: any length."""
    experts, rows, width = spec.num_experts, spec.rows, spec.width
    head: dict[str, tuple[tuple[str, ...], tuple[int | None, ...]]] = {
        "words": (("uint32",), (None,)),
        "expert_offsets": (("int32",), (experts + 1,)),
    }
    if spec.coding == "tunstall":
        return head | {
            "dictionaries": (("uint8",), (experts,)),
            "shortest_rows": (("int32",), (experts,)),
            "row_lengths": (("uint8", "uint16"), (experts, rows)),
            "levels": (("bfloat16",), (experts, rows, 2)),
        }
    return head | {
        "block_lengths": (("uint16", "uint32"), (experts, -(-rows // _BLOCK_ROWS))),
        "grouped_columns": (("int32",), (experts,)),
        "schedules": (("uint16",), (experts, 3, 15)),
        "dictionaries": (("uint8",), (experts, 4)),
        "leans": (("uint8",), (experts, -(-min(rows, width) // 8))),
        "columns": (("uint8",), (experts, width)),
        "bases": (("uint8",), (experts, 8)),
        "origins": (("float32",), (experts,)),
    }


def _check_arrays(spec: TensorSpec, arrays: Mapping[str, Array]) -> None:
    """Check all that the kernels trust: dtypes and shapes."""
    for name, (dtypes, shape) in _expected(spec).items():
        array = arrays[name]
        fits = array.ndim == len(shape) and all(
            want is None or have == want for have, want in zip(array.shape, shape, strict=True)
        )
        if not fits or str(array.dtype) not in dtypes:
            wanted = ", ".join("any" if n is None else str(n) for n in shape)
            raise ValueError(
                f"Array '{name}' is {array.dtype} of shape {array.shape}; a tensor of "
                f"{spec.num_experts} experts of {spec.rows} x {spec.width} requires "
                f"{' or '.join(dtypes)} of shape ({wanted}). Load it with qmoe_jax.load_switch."
            )


@functools.cache
def _product(spec: TensorSpec) -> Callable[..., Array]:
    """Return the product as a function of arrays, the same for a spec: JAX compiles it once."""
    from jax.experimental.buffer_callback import buffer_callback

    multiply = {"lattice": _multiply_lattice, "tunstall": _multiply_tunstall}[spec.coding]

    def on_buffers(context: Any, output: Any, *buffers: Any) -> None:
        # No JAX call is allowed here.
        del context
        x, expert_index, *arrays = (np.asarray(buffer) for buffer in buffers)
        multiply(spec, x, expert_index, arrays, np.asarray(output))

    @custom_vmap
    def product(x: Array, expert_index: Array, *arrays: Array) -> Array:
        result = jax.ShapeDtypeStruct((x.shape[0], spec.rows), jnp.float32)
        return buffer_callback(on_buffers, result)(x, expert_index, *arrays)

    @product.def_vmap
    def batched(axis_size: int, in_batched: Any, x: Array, expert_index: Array, *arrays: Array):
        x_batched, index_batched, *others = in_batched
        if any(others):
            # Each its own codes: one after another.
            operands = [
                array if is_batched else jnp.broadcast_to(array, (axis_size, *array.shape))
                for array, is_batched in zip((x, expert_index, *arrays), in_batched, strict=True)
            ]
            return jax.lax.map(lambda own: product(*own), tuple(operands)), True
        if not x_batched:
            x = jnp.broadcast_to(x, (axis_size, *x.shape))
        if not index_batched:
            expert_index = jnp.broadcast_to(expert_index, (axis_size, *expert_index.shape))
        flat = product(x.reshape(-1, x.shape[-1]), expert_index.reshape(-1), *arrays)
        return flat.reshape(axis_size, -1, spec.rows), True

    return product


def _cut(
    spec: TensorSpec,
    expert_index: np.ndarray,
    expert_offsets: np.ndarray,
    block_lengths: np.ndarray,
) -> _Work:
    """Sort tokens by expert and cut the blocks of those that have some into pieces."""
    from qmoe_jax.ops.cpu.work_sharing import cut_work

    most_pieces = _PIECES_A_THREAD * num_threads()
    order = np.empty(expert_index.size, np.int64)
    starts = np.empty(spec.num_experts + 1, np.int64)
    busy = np.empty(spec.num_experts, np.int64)
    cuts = np.empty(most_pieces + 1, np.int64)
    num_busy, pieces, busiest = cut_work(
        expert_index,
        expert_offsets,
        block_lengths,
        -(-spec.rows // _BLOCK_ROWS),
        MOST_TOKENS,
        _PIECE,
        most_pieces,
        order,
        starts,
        busy,
        cuts,
    )
    pieces = pieces if num_busy else 0
    return _Work(order, starts, busy[:num_busy], cuts, pieces, min(MOST_TOKENS, busiest))


_local = threading.local()


def _scratch(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return an array of this thread's own, of any contents; kept, since new memory is slow."""
    held: dict[tuple[str, Any], np.ndarray] = _local.__dict__.setdefault("held", {})
    size = math.prod(shape)
    if (name, dtype) not in held or held[name, dtype].size < size:
        held[name, dtype] = np.zeros(size, dtype)
    return held[name, dtype][:size].reshape(shape)


@functools.cache
def _lattice_entries() -> tuple[np.ndarray, np.ndarray]:
    from qmoe_jax.ops.cpu import lattice_kernel

    return lattice_kernel.dictionary_entries(lattice_dictionaries().table)


@functools.cache
def _tunstall_entries() -> tuple[np.ndarray, np.ndarray]:
    from qmoe_jax.ops.cpu import tunstall_kernel

    return tunstall_kernel.dictionary_entries(tunstall_family(0).table)


def _multiply_lattice(
    spec: TensorSpec,
    x: Float32[np.ndarray, "tokens in"],
    expert_index: np.ndarray,
    arrays: list[np.ndarray],
    y: Float32[np.ndarray, "tokens out"],
) -> None:
    from qmoe_jax.ops.cpu import lattice_kernel as kernel

    words, expert_offsets, block_lengths, *others = arrays
    work = _cut(spec, expert_index, expert_offsets, block_lengths)
    if work.starts[-1] < len(x):
        y[work.order[work.starts[-1] :]] = 0
    pairs = (spec.width + 1) // 2
    data = words.view(np.uint8)

    def run(piece: int) -> None:
        kernel.multiply_piece(
            data,
            expert_offsets,
            block_lengths,
            *others,
            STEP_TABLE,
            *_lattice_entries(),
            spec.rows,
            x,
            work.order,
            work.starts,
            work.busy,
            work.cuts[piece],
            work.cuts[piece + 1],
            work.most,
            y,
            _scratch("strings", (kernel.NUM_REGIONS, kernel.region_bytes(spec.width)), np.uint8),
            _scratch("entries", (2, pairs + 1, 4), np.uint64),
            _scratch("order", (spec.width,), np.int32),
            _scratch("steps", (spec.width,), np.float32),
            _scratch("placed", (2 * pairs * work.most,), np.float32),
            _scratch("sums", (work.most, _BLOCK_ROWS), np.float32),
        )

    share(run, work.pieces)


def _multiply_tunstall(
    spec: TensorSpec,
    x: Float32[np.ndarray, "tokens in"],
    expert_index: np.ndarray,
    arrays: list[np.ndarray],
    y: Float32[np.ndarray, "tokens out"],
) -> None:
    from qmoe_jax.ops.cpu import tunstall_kernel as kernel

    words, expert_offsets, dictionaries, shortest_rows, row_lengths, levels = arrays
    no_lengths = row_lengths[:, :0]
    work = _cut(spec, expert_index, expert_offsets, np.ascontiguousarray(no_lengths))
    if work.starts[-1] < len(x):
        y[work.order[work.starts[-1] :]] = 0
    data = words.view(np.uint8)
    bits_of_levels = levels.view(np.uint16)

    def run(piece: int) -> None:
        kernel.multiply_piece(
            data,
            expert_offsets,
            dictionaries,
            shortest_rows,
            row_lengths,
            bits_of_levels,
            *_tunstall_entries(),
            x,
            work.order,
            work.starts,
            work.busy,
            work.cuts[piece],
            work.cuts[piece + 1],
            work.most,
            y,
            _scratch("bits", (kernel.scratch_bytes(spec.width),), np.uint8),
            _scratch("signs", (kernel.scratch_bytes(spec.width),), np.uint8),
            _scratch("placed", (work.most, kernel.padded_width(spec.width)), np.float32),
            _scratch("sums", (work.most,), np.float32),
        )

    share(run, work.pieces)
