"""Compiles the kernels with NVRTC, straight from NVIDIA's wheel: no GPU, no CuPy, no CUDA toolkit.

The wheel `nvidia-cuda-nvrtc` (or the one that a CUDA build of JAX brings) is enough, since the
sources include nothing of CUDA's. Where kernels are launched, CuPy compiles them with the same
options.
"""

import ctypes
import functools
import importlib.util
import re
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parent
SOURCES = (
    "fused_tunstall.cu",
    "fused_tunstall_2bit.cu",
    "fused_qmoe.cu",
    "fused_packed2.cu",
    "fused_lattice.cu",
    "matmul_tunstall.cu",
    "matmul_lattice.cu",
    "matmul_fragments.cu",
    "expand.cu",
    "encode.cu",
)
OPTIONS = ("-std=c++17", f"-I{FOLDER}")
"""What every compiler of the sources must be given besides the architecture."""


class Resources(NamedTuple):
    """What a kernel needs, as ptxas says."""

    registers: int
    spilled_bytes: int
    """Stored; loads may be more."""


class Cubin(NamedTuple):
    """A compiled source."""

    data: bytes
    resources: dict[str, Resources]
    """By kernel."""


class CompileError(Exception):
    """NVRTC has refused a source; the text is its log."""


@functools.cache
def find_library() -> Path | None:
    """Return the newest libnvrtc of the installed wheels, or None."""
    spec = importlib.util.find_spec("nvidia")
    found: list[tuple[int, Path]] = []
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in Path(folder).glob("*/lib/libnvrtc.so.*"):
            if match := re.fullmatch(r"libnvrtc\.so\.(\d+)", path.name):
                found.append((int(match[1]), path))
    return max(found)[1] if found else None


@functools.cache
def _library() -> ctypes.CDLL:
    path = find_library()
    if path is None:
        raise FileNotFoundError(
            "NVRTC is not installed; install its wheel: pip install nvidia-cuda-nvrtc"
        )
    # NVRTC opens its built-ins by name alone, and up to 13.0 does not look beside itself.
    for builtins in path.parent.glob("libnvrtc-builtins.so.*"):
        ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(path))


def architectures() -> tuple[int, ...]:
    """Return what this NVRTC compiles for, as in sm_90: 90."""
    count = ctypes.c_int()
    _library().nvrtcGetNumSupportedArchs(ctypes.byref(count))
    numbers = (ctypes.c_int * count.value)()
    _library().nvrtcGetSupportedArchs(numbers)
    return tuple(numbers)


def compile_source(source: str, architecture: int, name: str = "kernel.cu") -> Cubin:
    """Compile CUDA C++ to a cubin.

    Args:
      source: text of a .cu file; may include the headers of this folder.
      architecture: 90 for sm_90, and so on.
      name: for messages.

    Raises:
      CompileError: the source does not compile.
      FileNotFoundError: NVRTC is not installed.
    """
    library = _library()
    program = ctypes.c_void_p()
    created = library.nvrtcCreateProgram(
        ctypes.byref(program), source.encode(), name.encode(), 0, None, None
    )
    if created:
        raise CompileError(f"NVRTC could not begin: error {created}")
    try:
        options = [f"-arch=sm_{architecture}", *OPTIONS, "--ptxas-options=-v"]
        encoded = [option.encode() for option in options]
        failed = library.nvrtcCompileProgram(
            program, len(encoded), (ctypes.c_char_p * len(encoded))(*encoded)
        )
        log = _text(program, "ProgramLog").decode(errors="replace").rstrip("\0")
        if failed:
            raise CompileError(f"{name} for sm_{architecture}:\n{log}")
        return Cubin(_text(program, "CUBIN"), _resources(log))
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def compile_file(name: str, architecture: int) -> Cubin:
    """Compile one of SOURCES; see `compile_source`."""
    return compile_source((FOLDER / name).read_text(), architecture, name)


def _text(program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(_library(), f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    getattr(_library(), f"nvrtcGet{what}")(program, text)
    return text.raw


def _resources(log: str) -> dict[str, Resources]:
    found = {}
    for part in log.split("Compiling entry function '")[1:]:
        registers = re.search(r"Used (\d+) registers", part)
        spilled = re.search(r"(\d+) bytes spill stores", part)
        if registers and spilled:
            found[part.split("'")[0]] = Resources(int(registers[1]), int(spilled[1]))
    return found
