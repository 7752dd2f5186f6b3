"""What `benchmarks/` use of CuPy, on NumPy arrays: streams that capture, events, copies.

It refuses what the real one refuses: calls of its cuBLAS in a capture, a capture on the default
stream, a wait for the stream or new memory inside a capture.
"""

import ctypes
import time
import types
from typing import Any

import numpy as np


class Array(np.ndarray):
    """An array "on the device"."""

    @property
    def data(self) -> Any:  # type: ignore[override]
        return types.SimpleNamespace(ptr=self.ctypes.data)


def _array(value: np.ndarray) -> Array:
    _refuse_in_capture("an allocation")
    return np.ascontiguousarray(value).view(Array)


def _refuse_in_capture(what: str) -> None:
    if Stream.capturing is not None:
        raise RuntimeError(f"cudaErrorStreamCaptureUnsupported: {what} inside a capture")


class Stream:
    capturing: "Stream | None" = None

    def __init__(self, non_blocking: bool = False):
        self.ptr = 17
        self.launched: list[Any] = []

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def synchronize(self) -> None:
        _refuse_in_capture("synchronize")

    def begin_capture(self) -> None:
        _refuse_in_capture("begin_capture")
        Stream.capturing = self

    def end_capture(self) -> Any:
        assert Stream.capturing is self
        Stream.capturing = None
        return types.SimpleNamespace(launch=lambda stream: None)


class Event:
    def record(self, stream: Stream) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        _refuse_in_capture("synchronize")


def _elapsed(start: Event, stop: Event) -> float:
    return max((stop.time - start.time) * 1e3, 1e-6)


def _refused_handle() -> int:
    if Stream.capturing is not None:
        raise NotImplementedError(
            "calling cuBLAS API during stream capture is currently unsupported"
        )
    return 1


class Cublas:
    """The C functions that are called through ctypes; multiplies float32 copies on the host."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, bool]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append((name, Stream.capturing is not None))
            if name == "cublasGemmEx":
                self._multiply(*arguments[3:6], arguments[7], 0, arguments[10], 0, arguments[14], 0)
            if name == "cublasGemmStridedBatchedEx":
                (m, n, k), a, sa = arguments[3:6], arguments[7], arguments[10].value
                b, sb, c, sc = (
                    arguments[11],
                    arguments[14].value,
                    arguments[16],
                    arguments[19].value,
                )
                for i in range(arguments[20]):
                    self._multiply(m, n, k, a, i * sa, b, i * sb, c, i * sc)
            return 0

        return call

    def _multiply(self, m, n, k, a, at_a, b, at_b, c, at_c) -> None:
        def floats(pointer, first, count):
            raw = (ctypes.c_uint16 * count).from_address(pointer.value + 2 * first)
            return (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)

        weights, x = floats(a, at_a, m * k).reshape(m, k), floats(b, at_b, n * k).reshape(n, k)
        y = np.frombuffer((ctypes.c_uint16 * (n * m)).from_address(c.value + 2 * at_c), np.uint16)
        bits = (x @ weights.T).astype(np.float32).reshape(-1).view(np.uint32)
        y[:] = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


class _Device:
    def __init__(self, number: int = 0):
        self.attributes = {"L2CacheSize": 1 << 10, "MaxSharedMemoryPerBlockOptin": 232448}

    def synchronize(self) -> None:
        _refuse_in_capture("synchronize")


def _copy(target: int, source: int, size: int, kind: int, stream: int) -> None:
    ctypes.memmove(target, source, size)


def _fill(target: int, value: int, size: int, stream: int) -> None:
    ctypes.memset(target, value, size)


cuda = types.SimpleNamespace(
    Stream=Stream,
    Event=Event,
    Device=_Device,
    get_elapsed_time=_elapsed,
    device=types.SimpleNamespace(get_cublas_handle=_refused_handle),
    runtime=types.SimpleNamespace(
        memcpyAsync=_copy,
        memsetAsync=_fill,
        memcpyDeviceToDevice=3,
        driverGetVersion=lambda: 13000,
        runtimeGetVersion=lambda: 13000,
    ),
)
__version__ = "fake"
linalg = np.linalg
from_dlpack = np.from_dlpack


def asarray(value: np.ndarray) -> Array:
    return _array(np.array(value))


def asnumpy(value: Array) -> np.ndarray:
    return np.asarray(value)


def empty(shape: Any, dtype: Any) -> Array:
    return _array(np.full(_small(shape), 0x7F, np.dtype(dtype)))


def _small(shape: Any) -> Any:
    """Less than what measures a device's bandwidth."""
    return min(shape, 1 << 20) if isinstance(shape, int) else shape


def empty_like(value: Array) -> Array:
    return empty(value.shape, value.dtype)


def full(shape: Any, value: int, dtype: Any) -> Array:
    return _array(np.full(shape, value, dtype))


def zeros(shape: Any, dtype: Any) -> Array:
    return _array(np.zeros(shape, dtype))


def ones(shape: Any, dtype: Any) -> Array:
    return _array(np.ones(_small(shape), dtype))


def cumsum(value: Array, axis: int | None = None, out: Array | None = None) -> Array:
    return np.cumsum(value, axis=axis, out=out).view(Array)
