"""Runs the CUDA kernels of `kernels_cuda/` on a CPU, with the call shape of `cupy.RawKernel`.

    module = EmulatedModule(build(KERNEL_FOLDER))
    module.get_function("expand_packed2")((blocks, slots), (256,), arguments, shared_mem=32768)

`SanitizedModule` runs them in a process of its own under AddressSanitizer and UBSan. Needs g++ and
NumPy. What is checked stands in emulation.h.
"""

import ctypes
import hashlib
import os
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
KERNEL_FOLDER = HERE.parents[1] / "kernels_cuda"
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

_FLAGS = ["-std=c++17", "-shared", "-fPIC", "-U_FORTIFY_SOURCE", "-Wall", "-Wextra"]
# Kernels have unused parameters and compare threadIdx.x, which is unsigned, to numbers.
_FLAGS += ["-Wno-unused-parameter", "-Wno-sign-compare", "-Wno-unknown-pragmas", "-Wno-parentheses"]
_BUILDS = {
    "fast": ["-O2", "-DQMOE_RECORD_SHARED=0"],
    "checked": ["-O1"],
    "sanitized": [
        "-O1",
        "-g1",
        "-fno-omit-frame-pointer",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
    ],
}


class EmulationError(Exception):
    """A launch that may go wrong on a GPU: a divergent barrier, a race, a stray access."""


def build(
    folder: Path = KERNEL_FOLDER, kind: str = "fast", sources: Sequence[str] = SOURCES
) -> Path:
    """Compiles kernels to a shared library; again only if a source has changed.

    Args:
      folder: where the sources lie.
      kind: "fast" (no record of shared memory: races go unnoticed), "checked", or "sanitized"
        (checked, and under AddressSanitizer and UBSan; for `SanitizedModule`).
      sources: names of the .cu files.

    Returns:
      Path of the library, in a cache below the temporary folder.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        raise FileNotFoundError("g++ was not found; running CUDA kernels on a CPU requires it.")
    inputs = sorted([*HERE.glob("*.cpp"), *HERE.glob("*.h"), *folder.glob("*.cu*")])
    parts = [repr((kind, sources, _BUILDS[kind], _FLAGS)).encode()]
    parts += [path.name.encode() + path.read_bytes() for path in inputs]
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]
    cache = Path(tempfile.gettempdir()) / f"qmoe_jax_cuda_emulation_{os.getuid()}"
    cache.mkdir(mode=0o700, exist_ok=True)
    library = cache / f"{kind}_{digest}.so"
    if library.exists():
        return library
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        common = [f"-I{scratch}", f"-I{HERE}", f"-I{folder}"]
        listing = Path(scratch) / "kernels.inc"
        listing.write_text("".join(f'#include "{name}"\n' for name in sources))
        header = ["-include", str(HERE / "emulation.h")]
        flat = _run([compiler, "-std=c++17", "-E", "-P", *header, *common, "-xc++", str(listing)])
        names = re.findall(r'extern\s+"C"\s+void\s+(\w+)\s*\(', flat)
        lines = [f'#include "{name}"\n' for name in sources]
        lines += [f'static const int registered_{n} = emulation::add_kernel("{n}", {n});\n'
                  for n in names]  # fmt: skip
        listing.write_text("".join(lines))
        result = Path(scratch) / "out.so"
        _run([compiler, *_FLAGS, *_BUILDS[kind], *common, str(HERE / "scheduler.cpp"),
              "-o", str(result)])  # fmt: skip
        os.replace(result, library)
    return library


class EmulatedModule:
    """A compiled library of kernels; the counterpart of `cupy.RawModule`."""

    def __init__(self, library: Path):
        self._library = ctypes.CDLL(str(library))
        self._library.emulation_kernels.restype = ctypes.c_char_p
        lines = self._library.emulation_kernels().decode().splitlines()
        self.signatures: dict[str, list[str]] = {
            name: parameters.split(",") for name, parameters in (line.split(" ") for line in lines)
        }
        """Parameters by kernel: c pointer to const, p pointer, sN struct of N bytes, N number."""

    def get_function(self, name: str) -> "EmulatedKernel":
        """The kernel of that name, to be called as a `cupy.RawKernel`."""
        if name not in self.signatures:
            raise KeyError(f"There is no kernel {name!r}; there are {sorted(self.signatures)}.")
        return EmulatedKernel(self._library, name, self.signatures[name])


class EmulatedKernel:
    """A kernel; calling it runs it to its end."""

    def __init__(self, library: ctypes.CDLL, name: str, signature: list[str]):
        self._library = library
        self.name = name
        self.signature = signature
        self.max_dynamic_shared_size_bytes = 0  # set by callers, as CuPy wants it; of no effect

    def __call__(
        self,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        args: Sequence[Any],
        *,
        shared_mem: int = 0,
        order: int = 0,
    ) -> None:
        """Runs the kernel.

        Args:
          grid: blocks, one to three numbers.
          block: threads of a block, likewise; a multiple of 32 together.
          args: for pointers an address (int), None or a C-contiguous NumPy array; for numbers a
            NumPy scalar of the parameter's very size, as CuPy wants it; for structs a NumPy array
            of no axes and the struct's very size, as CuPy wants it, or an object with `struct` and
            `values` of `ops.cuda.launcher.StructArgument`, where pointers may be arrays.
          shared_mem: bytes of dynamic shared memory.
          order: in which order threads take turns: 0 forwards, 1 backwards, above: that seed.

        Raises:
          EmulationError: the run was stopped; outputs are incomplete.
          TypeError: an argument does not fit the kernel's parameter.
        """
        if len(args) != len(self.signature):
            raise TypeError(f"{self.name} takes {len(self.signature)} arguments, not {len(args)}.")
        values = [self._value(i, kind, args[i]) for i, kind in enumerate(self.signature)]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        message = ctypes.create_string_buffer(1024)
        failed = self._library.emulation_launch(
            self.name.encode(),
            (ctypes.c_uint * 3)(*_three(grid)),
            (ctypes.c_uint * 3)(*_three(block)),
            ctypes.c_uint(shared_mem),
            pointers,
            ctypes.c_int(order),
            message,
            ctypes.c_size_t(len(message)),
        )
        if failed:
            raise EmulationError(f"{self.name}: {message.value.decode()}")

    def _value(self, index: int, kind: str, argument: Any) -> Any:
        where = f"{self.name}: argument {index}"
        if kind.startswith("s"):
            return self._struct(where, int(kind[1:]), argument)
        if kind in "cp":
            return self._pointer(where, kind, argument)
        if not isinstance(argument, np.generic) or argument.nbytes != int(kind):
            raise TypeError(f"{where} is {argument!r}; it must be a NumPy scalar of {kind} bytes.")
        return ctypes.create_string_buffer(argument.tobytes(), argument.nbytes)

    def _pointer(self, where: str, kind: str, argument: Any) -> ctypes.c_void_p:
        if isinstance(argument, np.ndarray):
            if not argument.flags.c_contiguous:
                raise TypeError(f"{where} is not C-contiguous.")
            if kind == "p" and not argument.flags.writeable:
                raise TypeError(f"{where} is written to, but the array is read-only.")
            return ctypes.c_void_p(argument.ctypes.data)
        if argument is None or isinstance(argument, (int, np.integer)):
            return ctypes.c_void_p(None if argument is None else int(argument))
        raise TypeError(f"{where} is a {type(argument).__name__}; it must be a pointer.")

    def _struct(self, where: str, size: int, argument: Any) -> Any:
        """The struct's bytes; arrays among its fields become their addresses."""
        if not isinstance(argument, np.ndarray):
            dtype, kinds, values = _plain(argument)
            numbers = [
                self._pointer(where, "c" if "const" in kind else "p", value).value or 0
                if "*" in kind
                else value
                for kind, value in zip(kinds, values, strict=True)
            ]
            argument = np.array(tuple(numbers), dtype)
        if argument.shape != () or argument.nbytes != size:
            raise TypeError(
                f"{where} has {argument.nbytes} bytes of shape {argument.shape}; it must be one "
                f"struct of {size} bytes."
            )
        return ctypes.create_string_buffer(argument.tobytes(), size)


class SanitizedModule:
    """The same in a process of its own, under AddressSanitizer and UBSan.

    Kernels take NumPy arrays and scalars only, or structs of them. Every array is copied into a
    block of memory of exactly its size, so that any access beside it is found, and copied back
    after the run.
    """

    def __init__(self, library: Path):
        runtime = _run(["g++", "-print-file-name=libasan.so"]).strip()
        environment = dict(os.environ)
        environment["LD_PRELOAD"] = runtime
        environment["ASAN_OPTIONS"] = "detect_leaks=0:handle_segv=1:abort_on_error=0"
        environment["UBSAN_OPTIONS"] = "print_stacktrace=1:halt_on_error=1"
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "emulator.py"), str(library)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
        )

    def get_function(self, name: str) -> Any:
        """The kernel of that name, with the call shape of `EmulatedKernel`."""

        def launch(
            grid: tuple[int, ...],
            block: tuple[int, ...],
            args: Sequence[Any],
            *,
            shared_mem: int = 0,
            order: int = 0,
        ) -> None:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            try:
                plain = [_plain(argument) for argument in args]
                pickle.dump((name, grid, block, plain, shared_mem, order), self._process.stdin)
                self._process.stdin.flush()
                error, arrays = pickle.load(self._process.stdout)
            except (EOFError, BrokenPipeError):
                self._process.wait()
                self._errors.seek(0)
                report = self._errors.read().decode(errors="replace")
                raise EmulationError(f"{name}: the sanitizers ended the run:\n{report}") from None
            if error:
                raise EmulationError(error)
            for (values, position), array in zip(_arrays(plain), arrays, strict=True):
                if values[position].flags.writeable:
                    values[position][...] = array

        return launch

    def close(self) -> None:
        """Ends the process."""
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        self._process.wait()
        self._errors.close()


def _plain(argument: Any) -> Any:
    """A struct as (dtype, C types of the fields, values), which any process can read."""
    if not hasattr(argument, "struct"):
        return argument
    struct = argument.struct
    return struct.dtype, [kind for _, kind in struct.fields], list(argument.values)


def _arrays(plain: list[Any]) -> Iterator[tuple[list[Any], int]]:
    """Where arrays are among plain arguments, in order: a list, and the place in it."""
    for position, argument in enumerate(plain):
        if isinstance(argument, tuple):
            yield from _arrays(argument[2])
        elif isinstance(argument, np.ndarray):
            yield plain, position


def _three(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return (*sizes, 1, 1)[:3]


def _run(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr[:8000]}")
    return result.stdout


def _serve(library: Path) -> None:
    """The loop of SanitizedModule's process: launches from stdin, results to stdout."""
    module = EmulatedModule(library)
    memory = ctypes.CDLL(None)
    memory.malloc.restype = ctypes.c_void_p
    memory.malloc.argtypes = [ctypes.c_size_t]
    memory.free.argtypes = [ctypes.c_void_p]
    while True:
        try:
            name, grid, block, args, shared_mem, order = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        blocks = []
        for values, position in _arrays(args):
            array = values[position]
            address = memory.malloc(array.nbytes)
            ctypes.memmove(address, array.tobytes(), array.nbytes)
            blocks.append((address, array))
            values[position] = address
        error, arrays = "", []
        try:
            module.get_function(name)(grid, block, args, shared_mem=shared_mem, order=order)
        except (EmulationError, TypeError) as problem:
            error = str(problem)
        for address, array in blocks:
            data = ctypes.string_at(address, array.nbytes)
            arrays.append(np.frombuffer(data, array.dtype).reshape(array.shape))
            memory.free(address)
        pickle.dump((error, arrays), sys.stdout.buffer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    _serve(Path(sys.argv[1]))
