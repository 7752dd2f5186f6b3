"""The launcher of `qmoe_jax.ops.cuda.launcher` that runs kernels on the CPU's own buffers.

    with use_launcher(EmulatedLauncher()):
        ...

Everything but CuPy's compiling and launching is then the code that runs on a GPU: JAX's callback
with the buffers of a jitted program, or DLPack outside of jit.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from cuda_emulation import emulator

from qmoe_jax.ops.cuda.launcher import DeviceFacts, KernelCall


class PoisonedArrays:
    """NumPy, but new arrays are full of NaNs: a kernel must write every element."""

    from_dlpack = staticmethod(np.from_dlpack)

    @staticmethod
    def empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        return np.frombuffer(b"\xff" * _size(shape, dtype), dtype).reshape(shape).copy()


class EmulatedLauncher:
    """Launches with `cuda_emulation`; outputs are full of NaNs before.

    Attributes:
      calls: what was launched: (kernel, whether inside jit).
      devices: where: one entry a launch outside of jit.
    """

    array_module = PoisonedArrays

    def __init__(self, max_shared_bytes: int = 232448, kind: str = "fast"):
        self.device = DeviceFacts("emulated", "9.0", max_shared_bytes)
        self.calls: list[tuple[str, bool]] = []
        self.devices: list[jax.Device] = []
        self._module = emulator.EmulatedModule(emulator.build(kind=kind))
        self._prepared: dict[str, int] = {}

    def prepare(self, call: KernelCall) -> None:
        assert (emulator.KERNEL_FOLDER / call.source).exists()
        self._module.get_function(call.name)
        assert call.shared_bytes <= self.device.max_shared_bytes
        self._prepared[call.name] = max(call.shared_bytes, self._prepared.get(call.name, 48 << 10))

    @contextlib.contextmanager
    def on_device(self, device: jax.Device) -> Iterator[None]:
        self.devices.append(device)
        yield

    def launch(self, call: KernelCall, pointers: Sequence[int], context: Any) -> None:
        assert call.shared_bytes <= self._prepared[call.name], "not prepared"
        self.calls.append((call.name, context is not None))
        self._module.get_function(call.name)(
            call.grid, (call.threads,), call.pack(pointers), shared_mem=call.shared_bytes
        )

    def buffer_pointer(self, buffer: Any) -> int:
        array = np.asarray(buffer)
        if buffer.writeable:  # the output
            array.reshape(-1).view(np.uint8)[:] = 0xFF
        return array.ctypes.data

    def array_pointer(self, array: Any) -> int:
        return array.ctypes.data

    def synchronize(self) -> None:
        pass


def _size(shape: tuple[int, ...], dtype: Any) -> int:
    return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
