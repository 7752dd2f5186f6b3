"""Runs CUDA kernels on JAX arrays, by CuPy on a GPU or by what a test puts in its place.

Inside jit a kernel runs on XLA's stream and no operand is copied: XLA hands the addresses of its
own buffers to the launcher. Outside, arrays are lent through DLPack. Nothing of CUDA is imported
before `current_launcher` is called.
"""

import contextlib
import contextvars
import dataclasses
import functools
import hashlib
import importlib.util
import inspect
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Shaped

from qmoe_jax import resources
from qmoe_jax.codec.cuda_interface import ArgumentStruct, is_pointer
from qmoe_jax.errors import CudaError

Operand = Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class StructArgument:
    """A struct among a kernel's arguments, all but its addresses.

    Attributes:
      struct: its layout.
      values: of its fields, in order: numbers as they are; a pointer is the place among the call's
        inputs, and behind them its output.
    """

    struct: ArgumentStruct
    values: tuple[int, ...]

    @classmethod
    def of(
        cls, struct: ArgumentStruct, numbers: Mapping[str, int], first: int = 0
    ) -> "StructArgument":
        """Return the struct whose pointers are inputs that follow one another.

        Args:
          struct: its layout.
          numbers: values of all other fields, by name.
          first: place of the first pointer.
        """
        places = iter(range(first, first + len(struct.fields)))
        values = (
            next(places) if is_pointer(kind) else numbers[name] for name, kind in struct.fields
        )
        return cls(struct, tuple(values))

    def pack(self, pointers: Sequence[int]) -> Shaped[np.ndarray, ""]:
        """Return the struct's bytes, given the addresses of all inputs and the output."""
        return self.struct.pack(
            [
                pointers[value] if is_pointer(kind) else value
                for value, (_, kind) in zip(self.values, self.struct.fields, strict=True)
            ]
        )


@dataclasses.dataclass(frozen=True)
class KernelCall:
    """A launch, all but its addresses. `kernels_cuda/README.md` states the sizes.

    Attributes:
      source: file in `kernels_cuda/`.
      name: kernel.
      grid: blocks.
      threads: threads of a block.
      shared_bytes: dynamic shared memory.
      arguments: in the kernel's order. Structs and NumPy scalars are passed by value; an `int` is a
        pointer, as in `StructArgument`.
    """

    source: str
    name: str
    grid: tuple[int, int]
    threads: int
    shared_bytes: int
    arguments: tuple[StructArgument | int | np.generic, ...]

    def pack(self, pointers: Sequence[int]) -> list[np.ndarray | np.generic]:
        """Return the arguments' bytes as CuPy takes them, given all addresses."""
        packed: list[np.ndarray | np.generic] = []
        for argument in self.arguments:
            if isinstance(argument, StructArgument):
                packed.append(argument.pack(pointers))
            else:
                packed.append(
                    np.uintp(pointers[argument]) if isinstance(argument, int) else argument
                )
        return packed


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

    def on_device(self, device: jax.Device) -> contextlib.AbstractContextManager[Any]:
        """Inside, arrays are made and kernels are launched on that device."""
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
        folder = resources.kernels_cuda()
        if not (folder / "common.cuh").exists():
            raise CudaError(
                f"There are no kernel sources at {folder}; install the package with its "
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
            folder = resources.kernels_cuda()
            self._modules[call.source] = self.array_module.RawModule(
                code=_source_text(folder, call.source), options=("-std=c++17", f"-I{folder}")
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
                    # All of it to blocks; the driver would leave room for one block less.
                    kernel.preferred_shared_memory_carveout = 100
                self._functions[key] = kernel.kernel

    def on_device(self, device: jax.Device) -> contextlib.AbstractContextManager[Any]:
        """CuPy's device of that number."""
        return self.array_module.cuda.Device(device.local_hardware_id or 0)

    def launch(self, call: KernelCall, pointers: Sequence[int], context: Any) -> None:
        """Launch on XLA's stream of `context`, or on CuPy's current one."""
        device = self.array_module.cuda.runtime.getDevice()
        self._functions[call.name, device](
            call.grid,
            (call.threads,),
            call.pack(pointers),
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


def _source_text(folder: Path, name: str) -> str:
    """Return a source with a digest of the headers, which CuPy's cache of kernels does not see."""
    headers = b"\0".join(path.read_bytes() for path in sorted(folder.glob("*.cuh")))
    digest = hashlib.sha256(headers).hexdigest()
    return f"// headers {digest}\n{(folder / name).read_text()}"


def run_kernel(
    launcher: Launcher, call: KernelCall, inputs: Sequence[Operand], result: jax.ShapeDtypeStruct
) -> Array:
    """Return the output of a kernel that writes every element of it.

    The kernel is loaded here, which inside jit is while tracing, so before any run.

    Args:
      launcher: of `current_launcher`.
      call: what to launch; its pointers count `inputs`, then the output.
      inputs: arrays, none of them with sub-byte elements. Traced ones: not under `vmap`, not
        differentiated, and on one device.
      result: shape and dtype of the output; of no element: nothing is launched.
    """
    if 0 in result.shape:
        return jnp.zeros(result.shape, result.dtype)
    launcher.prepare(call)
    if any(isinstance(x, jax.core.Tracer) for x in inputs):
        return _run_in_jit(launcher, call, inputs, result)
    return _run_eagerly(launcher, call, inputs, result)


def _run_in_jit(
    launcher: Launcher, call: KernelCall, inputs: Sequence[Operand], result: jax.ShapeDtypeStruct
) -> Array:
    from jax.experimental.buffer_callback import buffer_callback

    def launch(context: Any, output: Any, *buffers: Any) -> None:
        # No JAX call is allowed here.
        pointers = [launcher.buffer_pointer(buffer) for buffer in (*buffers, output)]
        launcher.launch(call, pointers, context)

    return buffer_callback(launch, result, **_callback_options())(*inputs)


@functools.cache
def _callback_options() -> dict[str, Any]:
    """XLA's CUDA graphs take the launch in, where this JAX can: then Python runs only once."""
    from jax.experimental.buffer_callback import buffer_callback

    if "command_buffer_compatible" in inspect.signature(buffer_callback).parameters:
        return {"command_buffer_compatible": True}
    return {}


def _run_eagerly(
    launcher: Launcher, call: KernelCall, inputs: Sequence[Operand], result: jax.ShapeDtypeStruct
) -> Array:
    module = launcher.array_module
    device = _device_of(inputs)
    borrowed = [_without_bfloat16(jax.device_put(x, device)) for x in inputs]
    is_bfloat16 = result.dtype == jnp.bfloat16
    with launcher.on_device(device):
        views = [module.from_dlpack(x) for x in borrowed]
        output = module.empty(result.shape, np.uint16 if is_bfloat16 else result.dtype)
        launcher.launch(call, [launcher.array_pointer(x) for x in (*views, output)], None)
        # JAX does not know of the launch: it must neither reuse inputs nor read the output before.
        launcher.synchronize()
        del borrowed, views
        y = jnp.from_dlpack(output)
    y = jax.device_put(y, device)
    return lax.bitcast_convert_type(y, jnp.bfloat16) if is_bfloat16 else y


def _device_of(inputs: Sequence[Operand]) -> jax.Device:
    """Return where the arrays lie; NumPy's, and those that JAX may move, follow the others.

    Raises:
      CudaError: they lie on several devices.
    """
    committed = {
        device for x in inputs if isinstance(x, jax.Array) and x.committed for device in x.devices()
    }
    if len(committed) > 1:
        raise CudaError(
            "The operands of a kernel lie on several devices ("
            f"{', '.join(sorted(map(str, committed)))}); it requires one. Move them with "
            "jax.device_put, or shard the experts with jax.shard_map (ops/expert_parallel.py)."
        )
    if committed:
        return committed.pop()
    own = [x for x in inputs if isinstance(x, jax.Array)]
    return next(iter(own[0].devices())) if own else jax.local_devices()[0]


def _without_bfloat16(x: Array) -> Array:
    """bfloat16 as uint16, which every array library knows through DLPack."""
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x
