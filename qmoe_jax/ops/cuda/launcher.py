"""The launcher of CUDA kernels: CuPy on a GPU, or what a test puts in its place.

Nothing of CUDA is imported before `current_launcher` is called.
"""

import contextlib
import contextvars
import dataclasses
import functools
import hashlib
import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from qmoe_jax import resources

KERNEL_FOLDER = resources.kernels_cuda()


class CudaError(ValueError):
    """The CUDA kernels cannot do what is asked: no GPU, no CuPy, or a case they do not have."""


@dataclasses.dataclass(frozen=True)
class KernelCall:
    """A launch, all but its addresses. `kernels_cuda/README.md` states the sizes.

    Attributes:
      source: file in `kernels_cuda/`.
      name: kernel.
      grid: blocks.
      threads: threads of a block.
      shared_bytes: dynamic shared memory.
      arguments: in the kernel's order. A NumPy scalar is passed by value; an `int` is a pointer:
        the place among the call's inputs, and behind them its output.
    """

    source: str
    name: str
    grid: tuple[int, int]
    threads: int
    shared_bytes: int
    arguments: tuple[int | np.generic, ...]


@dataclasses.dataclass(frozen=True)
class DeviceFacts:
    """What launches depend on.

    Attributes:
      name: as the driver names it.
      compute_capability: "9.0".
      max_shared_bytes: dynamic shared memory that a block can have at most.
    """

    name: str
    compute_capability: str
    max_shared_bytes: int


@runtime_checkable
class Launcher(Protocol):
    """Loads kernels and launches them."""

    device: DeviceFacts
    array_module: Any
    """`from_dlpack` and `empty` of the launcher's own arrays: cupy, or numpy."""

    def prepare(self, call: KernelCall) -> None:
        """Load the kernel and allow it its shared memory, so that `launch` need not."""
        ...

    def launch(self, call: KernelCall, pointers: Sequence[int], context: Any) -> None:
        """Launch a prepared kernel: no allocation, no synchronisation.

        Args:
          call: what to launch.
          pointers: addresses of the inputs, then of the output.
          context: the `ExecutionContext` of a buffer callback, whose stream is used; None: the
            launcher's own stream.
        """
        ...

    def buffer_pointer(self, buffer: Any) -> int:
        """Address of a buffer of `jax.experimental.buffer_callback`."""
        ...

    def array_pointer(self, array: Any) -> int:
        """Address of an array of `array_module`."""
        ...

    def synchronize(self) -> None:
        """Wait for the launcher's own stream."""
        ...


_injected: contextvars.ContextVar[Launcher | None] = contextvars.ContextVar(
    "qmoe_jax_launcher", default=None
)


@contextlib.contextmanager
def use_launcher(launcher: Launcher) -> Iterator[None]:
    """Inside, kernels are traced and run with that launcher.

    What `jax.jit` has traced keeps the launcher that it was traced with.
    """
    token = _injected.set(launcher)
    try:
        yield
    finally:
        _injected.reset(token)


def current_launcher() -> Launcher:
    """Return the launcher of `use_launcher`, else CuPy's.

    Raises:
      CudaError: there is none, and why.
    """
    return _injected.get() or _cupy_launcher()


def cuda_is_available() -> bool:
    """Whether `current_launcher` has one to give."""
    try:
        current_launcher()
    except CudaError:
        return False
    return True


@functools.cache
def _cupy_launcher() -> "CupyLauncher":
    return CupyLauncher()


class _Stream(NamedTuple):
    """A stream of XLA's, as far as CuPy's launch looks at it: no event, no ownership."""

    ptr: int


class CupyLauncher:
    """Kernels compiled by CuPy (NVRTC) from `kernels_cuda/`, on the GPU that JAX uses.

    Raises:
      CudaError: JAX or CuPy has no CUDA device, CuPy is not installed, or there are no sources.
    """

    def __init__(self) -> None:
        import jax

        if jax.default_backend() != "gpu":
            raise CudaError(
                f"JAX runs on {jax.default_backend()!r}; implementation='cuda' requires a CUDA "
                "device. Use implementation='xla' here, or install jax[cuda13] on a GPU machine."
            )
        if importlib.util.find_spec("cupy") is None:
            raise CudaError(
                "CuPy is not installed; implementation='cuda' requires it: "
                "pip install cupy-cuda13x (or cupy-cuda12x), or use implementation='xla'."
            )
        if not (KERNEL_FOLDER / "common.cuh").exists():
            raise CudaError(
                f"There are no kernel sources at {KERNEL_FOLDER}; install the package with its "
                "kernels (pip install -e . in a checkout), or use implementation='xla'."
            )
        import cupy

        if not cupy.cuda.is_available():
            raise CudaError(
                "CuPy finds no CUDA device, although JAX has one; its build must fit the driver "
                "(cupy-cuda12x or cupy-cuda13x). Or use implementation='xla'."
            )
        self.array_module = cupy
        # Where JAX computes; it has made contexts there already.
        self._devices = sorted({d.local_hardware_id or 0 for d in jax.local_devices()})
        attributes = cupy.cuda.Device(self._devices[0]).attributes
        properties = cupy.cuda.runtime.getDeviceProperties(self._devices[0])
        name = properties["name"]
        self.device = DeviceFacts(
            name=name.decode() if isinstance(name, bytes) else str(name),
            compute_capability=f"{properties['major']}.{properties['minor']}",
            max_shared_bytes=int(attributes["MaxSharedMemoryPerBlockOptin"]),
        )
        self._modules: dict[str, Any] = {}
        self._functions: dict[tuple[str, int], Any] = {}
        self._allowed: dict[tuple[str, int], int] = {}

    def prepare(self, call: KernelCall) -> None:
        """Compile (or read CuPy's cache), load, and raise the limit of shared memory."""
        if call.source not in self._modules:
            self._modules[call.source] = self.array_module.RawModule(
                code=_source_text(call.source), options=("-std=c++17", f"-I{KERNEL_FOLDER}")
            )
        for device in self._devices:
            key = (call.name, device)
            if key in self._functions and self._allowed[key] >= call.shared_bytes:
                continue
            with self.array_module.cuda.Device(device):
                kernel = self._modules[call.source].get_function(call.name)
                # Up to 48 KiB need no leave.
                self._allowed[key] = max(call.shared_bytes, 48 << 10)
                if call.shared_bytes > 48 << 10:
                    kernel.max_dynamic_shared_size_bytes = call.shared_bytes
                self._functions[key] = kernel.kernel

    def launch(self, call: KernelCall, pointers: Sequence[int], context: Any) -> None:
        """Launch on XLA's stream of `context`, or on CuPy's current one."""
        device = self.array_module.cuda.runtime.getDevice()
        arguments = [np.uintp(pointers[a]) if isinstance(a, int) else a for a in call.arguments]
        self._functions[call.name, device](
            call.grid,
            (call.threads,),
            arguments,
            shared_mem=call.shared_bytes,
            stream=None if context is None else _Stream(context.stream),
        )

    def buffer_pointer(self, buffer: Any) -> int:
        """Address of a JAX buffer on the GPU; of bfloat16 too, which CuPy need not know."""
        return buffer.__cuda_array_interface__["data"][0]

    def array_pointer(self, array: Any) -> int:
        """Address of a CuPy array."""
        return array.data.ptr

    def synchronize(self) -> None:
        """Wait for CuPy's current stream."""
        self.array_module.cuda.get_current_stream().synchronize()


def _source_text(name: str) -> str:
    """Return a source with a digest of the headers, which CuPy's cache of kernels does not see."""
    headers = b"\0".join(path.read_bytes() for path in sorted(KERNEL_FOLDER.glob("*.cuh")))
    digest = hashlib.sha256(headers).hexdigest()
    return f"// headers {digest}\n{(KERNEL_FOLDER / name).read_text()}"
