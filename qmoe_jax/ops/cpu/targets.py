"""The functions that XLA calls for products with stored codes: compiled, and registered by name."""

import ctypes
import functools
import threading
from importlib.metadata import version
from typing import Any

import jax
import numpy as np

from qmoe_jax.codec.lattice_dictionaries import lattice_dictionaries
from qmoe_jax.codec.lattice_values import STEP_TABLE
from qmoe_jax.codec.tunstall import tunstall_family
from qmoe_jax.ops.cpu import lattice_kernel, lattice_target, tunstall_kernel, tunstall_target
from qmoe_jax.ops.cpu.machine_code import c_callback

_lock = threading.Lock()
_names: dict[str, str] = {}


def registered(coding: str) -> str:
    """Register a coding's target with XLA, once a process; return its name.

    A program that JAX has exported runs only in a process that did this.

    Raises:
      RuntimeError: XLA's interface is not one that this version was made for.
    """
    with _lock:
        if coding not in _names:
            _names[coding] = _register(coding)
        return _names[coding]


def _register(coding: str) -> str:
    name = f"qmoe_jax_{coding}_product"
    try:
        jax.ffi.register_ffi_target(name, _capsule(handler(coding).address), platform="cpu")
    except Exception as error:
        raise RuntimeError(
            f"XLA of jaxlib {version('jaxlib')} does not take the product with {coding} codes: "
            f"{error}. Use implementation='xla', or a jaxlib from 0.6.1 to 0.12."
        ) from error
    return name


@functools.cache
def handler(coding: str) -> Any:
    """Return a coding's handler, compiled: takes the address of a call frame."""
    if coding == "lattice":
        entries, longest = lattice_kernel.dictionary_entries(lattice_dictionaries().table)
        return _lattice(entries, longest, STEP_TABLE)
    entries, longest = tunstall_kernel.dictionary_entries(tunstall_family(0).table)
    return _tunstall(entries, longest)


def _lattice(entries: np.ndarray, longest: np.ndarray, steps: np.ndarray) -> Any:
    handle = lattice_target.handle

    def lattice(frame):
        return handle(frame, entries, longest, steps)

    return c_callback(lattice, entries, longest, steps)


def _tunstall(entries: np.ndarray, longest: np.ndarray) -> Any:
    handle = tunstall_target.handle

    def tunstall(frame):
        return handle(frame, entries, longest)

    return c_callback(tunstall, entries, longest)


def _capsule(address: int) -> Any:
    """Return a capsule without a name that holds an address, as XLA takes it."""
    new = ctypes.pythonapi.PyCapsule_New
    new.restype = ctypes.py_object
    new.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return new(address, None, None)
