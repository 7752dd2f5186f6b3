"""Products of a layer's tokens with stored codes, on the cores of the CPU that XLA computes on.

XLA calls numba's machine code with its own buffers; nothing is copied, and no Python runs.
Tokens are grouped by expert; what is to be decoded is cut into pieces of like numbers of bytes,
which XLA's threads take one after another. Which of them takes what changes no result.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float, Int

from qmoe_jax.codec.tensor import TensorSpec
from qmoe_jax.ops.experts import CodedExperts

CODINGS = ("lattice", "tunstall")
"""Codings that are multiplied as they are stored."""
LEAST_PIECE = 300_000
"""Least work of a piece, as `work_sharing.cut_work` counts it; about 0.1 ms of a core."""
_BLOCK_ROWS = 32


def is_supported(experts: CodedExperts) -> bool:
    """Whether codes are multiplied as stored: by coding, and rows are whole."""
    spec = experts.spec
    return spec.coding in CODINGS and spec.width == experts.in_features


def stored_product(
    x: Float[Array, "tokens in"],
    expert_index: Int[Array, "tokens"],
    experts: CodedExperts,
    *,
    num_threads: int = 0,
    least_piece: int = LEAST_PIECE,
) -> Float[Array, "tokens out"]:
    """y[t] = W_e(t) x[t] from stored codes. Reference: `compressed_product` with "xla".

    Sums are float32, of float32 weights, and the same for any number of threads. Any contents of
    the arrays are read in bounds. `ops.gradients` differentiates it. Under `jax.vmap` of tokens
    alone, all are multiplied at once. `jax.export` wants to be told of the call
    (`DisabledSafetyCheck.custom_call`), and where the program runs `targets.registered` comes
    first.

    Args:
      x: float32 or bfloat16.
      expert_index: an index outside [0, num_experts) yields zeros.
      experts: codes of which `is_supported`.
      num_threads: at most so many; 0: as XLA computes with, on no more than the cores that this
        process may run on.
      least_piece: work that a thread takes at a time, at least.

    Returns:
      Products in the order and dtype of `x`.

    Raises:
      ValueError: an array is not of the shape or dtype that the spec requires.
      RuntimeError: XLA's interface is not one that this version was made for.
    """
    spec = experts.spec
    names = _array_names(spec)
    arrays = [jnp.asarray(experts.arrays[name]) for name in names]
    _check_arrays(spec, dict(zip(names, arrays, strict=True)))
    if x.shape[0] == 0 or spec.rows == 0 or spec.num_experts == 0:
        return jnp.zeros((x.shape[0], spec.rows), x.dtype)
    y = _product(spec, num_threads, least_piece)(
        x.astype(jnp.float32), expert_index.astype(jnp.int32), *arrays
    )
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
def _product(spec: TensorSpec, num_threads: int, least_piece: int) -> Callable[..., Array]:
    """Return the product as a function of arrays, the same for a spec: JAX compiles it once."""
    from qmoe_jax.ops.cpu.targets import registered

    name = registered(spec.coding)

    @custom_vmap
    def product(x: Array, expert_index: Array, *arrays: Array) -> Array:
        result = jax.ShapeDtypeStruct((x.shape[0], spec.rows), jnp.float32)
        call = jax.ffi.ffi_call(name, result)
        return call(
            x,
            expert_index,
            *arrays,
            least_piece=np.int64(least_piece),
            num_threads=np.int64(num_threads),
        )

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
