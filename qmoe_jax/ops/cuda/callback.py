"""Runs a CUDA kernel on JAX arrays: on XLA's stream inside jit, through DLPack outside.

Inside jit no operand is copied: XLA hands the addresses of its own buffers to the launcher.
"""

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from qmoe_jax.ops.cuda.launcher import KernelCall, Launcher

Operand = Array | np.ndarray


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
    borrowed = [_without_bfloat16(jnp.asarray(x)) for x in inputs]
    views = [module.from_dlpack(x) for x in borrowed]
    is_bfloat16 = result.dtype == jnp.bfloat16
    output = module.empty(result.shape, np.uint16 if is_bfloat16 else result.dtype)
    launcher.launch(call, [launcher.array_pointer(x) for x in (*views, output)], None)
    # JAX does not know of the launch: it must neither reuse inputs nor read the output before.
    launcher.synchronize()
    del borrowed, views
    y = jnp.from_dlpack(output)
    return lax.bitcast_convert_type(y, jnp.bfloat16) if is_bfloat16 else y


def _without_bfloat16(x: Array) -> Array:
    """bfloat16 as uint16, which every array library knows through DLPack."""
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x
