"""GPTQ on the cores of a CPU: the algorithm of `gptq.py` by BLAS, LAPACK and one compiled loop.

XLA's CPU backend runs the column loop slowly, copies the slices that it multiplies, and takes a
third of the time for them. Here a thread owns an expert, works in its own memory and calls BLAS on
slices where they lie.

The letters are those of `gptq.py`, but columns are numbered from the last to the first. The
reversed Hessian then has LAPACK's own factor, H = U^T U with U upper triangular, in place of V, and
the errors are e = U d. The sweep begins at the last number, the first input feature.
"""

import ctypes
import functools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int, UInt8

from qmoe_jax.host_threads import compiled, num_threads
from qmoe_jax.quantization.gptq import GAIN_OUTPUTS
from qmoe_jax.quantization.lattice import MAX_CODE

# Columns between two matrix products. The compiled loop multiplies inside a panel, at half the
# speed of BLAS; with fewer columns BLAS itself is slower. A multiple of 4: codes come by fours.
_PANEL = 64

# Outputs that a sweep takes at once, so that the errors of all columns stay in the caches. Of 8
# experts of 768 x 3072 on 2 cores: 0.13 s with 768 or 1536, 0.15 s with 512 or 3072.
_STRIP = 1536

# Outputs of one pass of the compiled loop. The errors of a panel (32 KiB) fit the first cache.
_TILE = 128

# As in `gptq.py`.
_MIN_DAMP = 1e-6

# The steps of an expert's input features, from its number and its V_jj.
StepRule = Callable[[int, Float32[np.ndarray, " in"]], Float32[np.ndarray, " in"]]


class HostGptqResult(NamedTuple):
    """The quantized kernels of some experts; what was not swept is zero.

    Attributes:
      codes: uint8 `[experts, out, in]`.
      fell_back: the Hessian could not be factorised, or a number was not finite or its square
        overflowed: there are no codes.
      layer_error: trace(d^T H d) / 2 with the undamped H, float32.
      weight_error: the sum of d^2, float32.
      zero_share: share of weights whose value is 0, float32.
      weight_cross: with steps, the sum of W d, float32; else 0, as the next two.
      output_own: <W, W>_H, from the first outputs (`gptq.GAIN_OUTPUTS`).
      output_cross: <W, d>_H of these.
    """

    codes: UInt8[np.ndarray, "experts out in"]
    fell_back: Bool[np.ndarray, " experts"]
    layer_error: Float32[np.ndarray, " experts"]
    weight_error: Float32[np.ndarray, " experts"]
    zero_share: Float32[np.ndarray, " experts"]
    weight_cross: Float32[np.ndarray, " experts"]
    output_own: Float32[np.ndarray, " experts"]
    output_cross: Float32[np.ndarray, " experts"]


def host_gptq(
    W: Float32[np.ndarray, "experts in out"],
    H: Float32[np.ndarray, "experts in in"],
    values: Float32[np.ndarray, "experts groups codes out"] | StepRule,
    experts: Sequence[int] | Int[np.ndarray, " some"],
    *,
    damping: float = 0.1,
    act_order: bool = False,
    threads: int | None = None,
) -> HostGptqResult:
    """Quantize some experts of a batch, a thread for each; the result does not depend on how many.

    A weight takes the code of the nearest value, the lowest of those that are equally near; with
    steps, that of the nearest multiple, the even one of two, as `lattice.Lattice` has it.

    Args:
      W: kernels.
      H: symmetric.
      values: of each code in each output row, or in its groups of neighbouring input features; or
        how the steps of a lattice follow from the factor.
      experts: which to quantize.
      damping: share of the mean diagonal of H that is added to the diagonal.
      act_order: quantize columns by descending diagonal of H instead of from first to last.
      threads: None is one a core.
    """
    num_experts, num_in, num_out = W.shape
    result = HostGptqResult(
        codes=_empty_aligned(num_experts * num_out * num_in, np.uint8).reshape(
            num_experts, num_out, num_in
        ),
        fell_back=np.zeros(num_experts, np.bool_),
        layer_error=np.zeros(num_experts, np.float32),
        weight_error=np.zeros(num_experts, np.float32),
        zero_share=np.zeros(num_experts, np.float32),
        weight_cross=np.zeros(num_experts, np.float32),
        output_own=np.zeros(num_experts, np.float32),
        output_cross=np.zeros(num_experts, np.float32),
    )
    result.codes[np.setdiff1d(np.arange(num_experts), experts)] = 0
    scratch = threading.local()

    def quantize(expert):
        own = functools.partial(values, int(expert)) if callable(values) else values[expert]
        swept = _quantize_expert(
            W[expert], H[expert], own, result.codes[expert], damping, act_order, scratch
        )
        if swept is None:
            result.fell_back[expert] = True
            result.codes[expert] = 0
            return
        for array, value in zip(result[2:], swept, strict=True):
            array[expert] = value

    threads = num_threads() if threads is None else threads
    # BLAS stays on the thread that calls it: its own threads would wait for the same cores.
    with (
        _blas_controller().limit(limits=1, user_api="blas"),
        ThreadPoolExecutor(max(1, min(threads, len(experts)))) as pool,
    ):
        list(pool.map(quantize, experts))
    return result


def workspace_bytes(num_in: int, num_out: int, threads: int) -> int:
    """Memory beside inputs and codes: a thread has factor (twice with act-order), errors, codes."""
    floats = 2 * num_in**2 + num_in * (min(num_out, _STRIP) + 2 * min(num_out, GAIN_OUTPUTS))
    return threads * (4 * floats + num_in * num_out)


@np.errstate(over="ignore", invalid="ignore")
def _quantize_expert(W, H, values, codes, damping, act_order, scratch) -> tuple[float, ...] | None:
    """Fill the codes `[out, in]`; the other fields of `HostGptqResult`, or None on failure."""
    num_in, num_out = W.shape
    # Half of H is not read otherwise. The sum is the cheaper test, but may overflow.
    if not (np.isfinite(H.sum()) or np.isfinite(H).all()):
        return None
    diagonal = H.diagonal()
    damp = max(np.float32(damping) * diagonal.mean(), np.float32(_MIN_DAMP))
    U = _reserve(scratch, "factor", num_in * num_in).reshape(num_in, num_in)
    if act_order:
        # Stable on the descending diagonal, then reversed like the columns.
        features = np.argsort(-diagonal, kind="stable")[::-1]
        np.copyto(U, H[np.ix_(features, features)])
    else:
        features = np.arange(num_in)[::-1]
        np.copyto(U, H[::-1, ::-1])
    U.reshape(-1)[:: num_in + 1] += damp
    if not _factorise(U):
        return None

    features = np.ascontiguousarray(features, np.uintp)
    has_steps = callable(values)
    sample = None
    if has_steps:
        factor_diagonal = np.empty(num_in, np.float32)
        factor_diagonal[features] = U.diagonal()
        if not np.isfinite(factor_diagonal).all():
            return None
        values = values(factor_diagonal)
        groups = features  # not used: the step of a column is found by its feature
        sweep_panel = _panel_kernel(None)
        sample = (0.0, 0.0)
    else:
        groups = features // np.uintp(num_in // values.shape[0])
        sweep_panel = _panel_kernel(values.shape[1])
    totals = np.zeros(4)
    # The loop writes four codes as one word, in the order of the sweep.
    row_words = -(-num_in // 4)
    in_place = not act_order and num_in % 4 == 0
    words = codes if in_place else _reserve(scratch, "codes", num_out * row_words)
    words = words.view(np.uint32).reshape(num_out, row_words)
    for first in range(0, num_out, _STRIP):
        width = min(_STRIP, num_out - first)
        d = _reserve(scratch, "errors", num_in * width).reshape(num_in, width)
        for stop in range(num_in, 0, -_PANEL):
            start = max(stop - _PANEL, 0)
            # e without the terms of this panel; its rows become d in the sweep.
            if stop < num_in:
                np.matmul(U[start:stop, stop:], d[stop:], out=d[start:stop])
            else:
                d[start:stop] = 0
            sweep_panel(W, features, groups, U, d, start, stop, first, values, words, totals)
        if has_steps and first == 0:
            sample = _output_products(W, H, d, features)
    if not in_place:
        codes[:, features[::-1]] = words.view(np.uint8)[:, :num_in]
    damped_error, weight_error, zeros, weight_cross = totals
    # A weight that is not finite has such an error.
    if not np.isfinite(totals).all():
        return None
    layer_error = max(damped_error - float(damp) * weight_error, 0.0) / 2
    products = (0.0, 0.0) if sample is None else sample
    return layer_error, weight_error, zeros / (num_in * num_out), weight_cross, *products


def _output_products(W, H, d, features) -> tuple[float, float]:
    """<W, W>_H and <W, d>_H as the first outputs have them; rows of d are columns of the sweep."""
    some = np.ascontiguousarray(W[:, :GAIN_OUTPUTS])
    share = W.shape[1] / some.shape[1]
    products = H @ some
    own, cross = np.vdot(products, some), np.vdot(products[features], d[:, :GAIN_OUTPUTS])
    return share * float(own), share * float(cross)


@functools.cache
def _panel_kernel(num_codes: int | None) -> Callable[..., None]:
    """Return the compiled column loop of one panel, for grids of so many codes; None for steps.

    What makes LLVM use vector registers: the number of codes and the size of a tile are constants
    of the program, a tile is copied to memory of its own, whose rows are a constant apart, and
    indices are unsigned, since negative ones would have to be looked for.
    """
    unsigned: Any = np.uintp
    one, two, three, eight = unsigned(1), unsigned(2), unsigned(3), unsigned(8)
    has_steps = num_codes is None
    codes_of_grid, tile = unsigned(0 if num_codes is None else num_codes), unsigned(_TILE)
    # Rows of the scratch memory: sums of e^2, d^2, zeros and W d, then the values of the codes.
    squares, distances, zeros, crosses, levels = (unsigned(row * _TILE) for row in range(5))
    nothing = np.float32(0)
    most = np.float32(MAX_CODE)
    # Added and taken away again, it rounds what is below 2^22 to the nearest integer.
    rounder = np.float32(1.5 * 2**23)

    def sweep_panel(W, features, groups, U, d, start, stop, first, values, words, totals):
        """Columns stop - 1 down to start of the outputs from `first` on. Runs under numba.

        Rows of `d` hold e without the terms of the panel, and d afterwards. Four codes are a word
        of `words`, in the order of the sweep.
        """
        num_in, num_out, width = unsigned(W.shape[0]), unsigned(W.shape[1]), unsigned(d.shape[1])
        panel, end, first_out = unsigned(start), unsigned(stop), unsigned(first)
        size = end - panel
        flat_W, flat_U, flat_d = W.reshape(-1), U.reshape(-1), d.reshape(-1)
        flat_values, flat_words = values.reshape(-1), words.reshape(-1)
        row_words = unsigned(words.shape[1])
        first_word = (num_in - end) >> two
        num_words = ((num_in - panel + three) >> two) - first_word
        tile_words = np.empty(num_words * tile, np.uint32)
        scratch = np.zeros(levels + codes_of_grid * tile, np.float32)
        # Rows past the last are multiplied, by zero.
        tile_d = np.zeros((size + eight) * tile, np.float32)
        for left in range(unsigned(0), width, tile):
            lanes = min(tile, width - left)
            if lanes < tile:
                tile_d[:] = nothing
            for i in range(size):
                at = (panel + i) * width + left
                for t in range(lanes):
                    tile_d[i * tile + t] = flat_d[at + t]
            tile_words[:] = np.uint32(0)
            group = groups[end - one] + one
            for back in range(size):
                i = size - one - back
                j = panel + i
                row = j * num_in + panel
                step = inverse = nothing
                if has_steps:
                    step = flat_values[features[j]]
                    inverse = np.float32(1) / step
                elif groups[j] != group:
                    group = groups[j]
                    for k in range(codes_of_grid):
                        at = (group * codes_of_grid + k) * num_out + first_out + left
                        for t in range(lanes):
                            scratch[levels + k * tile + t] = flat_values[at + t]
                own = i * tile
                for later in range(i + one, size, eight):
                    u, there, missing = row + later, later * tile, size - later
                    u0 = flat_U[u]
                    u1 = flat_U[u + one] if missing > one else nothing
                    u2 = flat_U[u + two] if missing > two else nothing
                    u3 = flat_U[u + three] if missing > three else nothing
                    u4 = flat_U[u + unsigned(4)] if missing > unsigned(4) else nothing
                    u5 = flat_U[u + unsigned(5)] if missing > unsigned(5) else nothing
                    u6 = flat_U[u + unsigned(6)] if missing > unsigned(6) else nothing
                    u7 = flat_U[u + unsigned(7)] if missing > unsigned(7) else nothing
                    for t in range(tile):
                        tile_d[own + t] += (
                            u0 * tile_d[there + t]
                            + u1 * tile_d[there + tile + t]
                            + u2 * tile_d[there + two * tile + t]
                            + u3 * tile_d[there + three * tile + t]
                            + u4 * tile_d[there + unsigned(4) * tile + t]
                            + u5 * tile_d[there + unsigned(5) * tile + t]
                            + u6 * tile_d[there + unsigned(6) * tile + t]
                            + u7 * tile_d[there + unsigned(7) * tile + t]
                        )
                scale = flat_U[row + i]
                feedback = np.float32(1) / scale
                at = features[j] * num_out + first_out + left
                position = num_in - one - j
                word = ((position >> two) - first_word) * tile
                shift = np.uint32(eight * (position & three))
                for t in range(lanes):
                    w, e = flat_W[at + t], tile_d[own + t]
                    updated = w + e * feedback
                    if has_steps:
                        multiple = min(max(updated * inverse, -most), most)
                        multiple = (multiple + rounder) - rounder
                        value = multiple * step
                        twice = np.int32(multiple) << np.int32(1)
                        code = np.uint32(-twice - np.int32(1) if twice < 0 else twice)
                    else:
                        value = scratch[levels + t]
                        distance = abs(updated - value)
                        code = np.uint32(0)
                        for k in range(one, codes_of_grid):
                            other = scratch[levels + k * tile + t]
                            away = abs(updated - other)
                            is_nearer = away < distance
                            distance = away if is_nearer else distance
                            value = other if is_nearer else value
                            code = np.uint32(k) if is_nearer else code
                    error = w - value
                    tile_d[own + t] = error
                    e += scale * error
                    scratch[squares + t] += e * e
                    scratch[distances + t] += error * error
                    scratch[zeros + t] += np.float32(1) if value == 0 else nothing
                    if has_steps:
                        scratch[crosses + t] += w * error
                    tile_words[word + t] |= code << shift
            for i in range(size):
                at = (panel + i) * width + left
                for t in range(lanes):
                    flat_d[at + t] = tile_d[i * tile + t]
            # A row at a time: its words share a cache line.
            for t in range(lanes):
                at = (first_out + left + t) * row_words + first_word
                for word in range(num_words):
                    flat_words[at + word] = tile_words[word * tile + t]
        for t in range(tile):
            totals[0] += scratch[squares + t]
            totals[1] += scratch[distances + t]
            totals[2] += scratch[zeros + t]
            totals[3] += scratch[crosses + t]

    return compiled(sweep_panel)


def _factorise(H: Float32[np.ndarray, "in in"]) -> bool:
    """U in place of the upper triangle of H = U^T U; the rest is garbage. False if there is none.

    Not SciPy's wrapper, which holds the GIL. The pointer is that of its Cython interface.
    """
    size, info = ctypes.c_int(H.shape[0]), ctypes.c_int()
    address = ctypes.c_void_p(H.ctypes.data)
    # LAPACK takes rows for columns: its lower triangle is our upper one.
    _lapack_spotrf()(b"L", ctypes.byref(size), address, ctypes.byref(size), ctypes.byref(info))
    return info.value == 0


@functools.cache
def _lapack_spotrf() -> Callable[..., None]:
    from numba.extending import get_cython_function_address

    pointer = ctypes.c_void_p
    signature = ctypes.CFUNCTYPE(None, ctypes.c_char_p, pointer, pointer, pointer, pointer)
    return signature(get_cython_function_address("scipy.linalg.cython_lapack", "spotrf"))


@functools.cache
def _blas_controller() -> Any:
    """Of the BLAS libraries of NumPy and SciPy; looking for them takes some milliseconds."""
    import scipy.linalg.cython_lapack  # noqa: F401 (loads the library)
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


def _reserve(scratch: threading.local, name: str, size: int) -> Float32[np.ndarray, " size"]:
    """Memory of this thread, kept: page faults of new memory would cost a tenth of the time."""
    memory = getattr(scratch, name, None)
    if memory is None or memory.size < size:
        memory = _empty_aligned(size, np.float32)
        setattr(scratch, name, memory)
    return memory[:size]


def _empty_aligned(size: int, dtype) -> np.ndarray:
    """At a multiple of 64 bytes, where JAX takes an array over without a copy."""
    num_bytes = size * np.dtype(dtype).itemsize
    memory = np.empty(num_bytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + num_bytes].view(dtype)
