"""What the CUDA kernels of a coding are given, as plain data: nothing here needs CUDA.

The structs are those of `kernels_cuda/`, where each field is explained; a test holds the two
declarations to each other.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Shaped, UInt32

from qmoe_jax.codec.tensor import TensorSpec

_NUMBERS = {"int": np.int32, "u32": np.uint32}


@dataclasses.dataclass(frozen=True)
class ArgumentStruct:
    """A struct that a kernel takes by value.

    Attributes:
      name: as the header has it.
      fields: (name, C type) in the header's order; a type is "int", "u32" or some pointer.
    """

    name: str
    fields: tuple[tuple[str, str], ...]

    @functools.cached_property
    def dtype(self) -> np.dtype:
        """C's layout: every field at a multiple of its size, pointers as uint64."""
        formats = [
            (name, np.uint64 if is_pointer(kind) else _NUMBERS[kind]) for name, kind in self.fields
        ]
        return np.dtype(formats, align=True)

    def pack(self, values: Sequence[int]) -> Shaped[np.ndarray, ""]:
        """Return the struct's bytes, which CuPy passes by value.

        Args:
          values: of the fields, in order; addresses for pointers.
        """
        packed = np.zeros((), self.dtype)  # so that padding is zero
        packed[()] = tuple(values)
        return packed


def is_pointer(kind: str) -> bool:
    """Whether a C type is a pointer."""
    return kind.endswith("*")


@dataclasses.dataclass(frozen=True)
class DerivingKernel:
    """A kernel that finds an array which is not stored, once after loading.

    It takes the coding's struct, then the array, experts, rows and width.

    Attributes:
      array: its name; int32 or uint32.
      source: file in `kernels_cuda/`.
      name: of the kernel.
      shape: of the array, by experts, rows and width.
      grid: blocks of 32 threads, likewise.
      shared_bytes: dynamic shared memory, likewise.
    """

    array: str
    source: str
    name: str
    shape: Callable[[int, int, int], tuple[int, ...]]
    grid: Callable[[int, int, int], tuple[int, int]]
    shared_bytes: Callable[[int, int, int], int]


@dataclasses.dataclass(frozen=True)
class MatmulKernels:
    """Products with many tokens, by tensor cores: kernels `matmul_{coding}_t{tile}`.

    Attributes:
      source: file in `kernels_cuda/`.
      tiles: tokens of an expert that may share a decode, in rising order; a kernel each.
      width_multiple: the width must be a multiple of that.
      threads: of a block, by rows.
      rows_per_block: by threads.
      shared_bytes: dynamic shared memory without dictionaries, by threads and tile.
      tokens_per_expert: with at least that many tokens for each expert, on average, they are used;
        an estimate, for devices that have no launch settings.
    """

    source: str
    tiles: tuple[int, ...]
    width_multiple: int
    threads: Callable[[int], int]
    rows_per_block: Callable[[int], int]
    shared_bytes: Callable[[int, int], int]
    tokens_per_expert: int


def row_product_bytes(width: int, tile_tokens: int, threads: int) -> int:
    """Dynamic shared memory of the products in `multiply.cuh`, without dictionaries."""
    return (width + COLUMN_PADDING) * max(4, 2 * tile_tokens) + 64 * (2 + threads // 32)


def row_expansion_bytes(threads: int) -> int:
    """Dynamic shared memory of the expansions that take a warp a row, without dictionaries."""
    return 4096 * (threads // 32)


COLUMN_PADDING = 64


@dataclasses.dataclass(frozen=True)
class CudaInterface:
    """How the CUDA kernels take a coding's tensors.

    Attributes:
      source: file in `kernels_cuda/` with the products.
      arguments: what every kernel of the coding takes first. A pointer is the stored array of its
        name, or derived, or `table`.
      sizes: what the other fields hold: of which array, and whether its entries or the bytes of an
        element.
      table: builds the dictionaries, uint32; None where codes need none.
      dictionary_bytes: dynamic shared memory in which a block keeps a copy of its dictionary.
      rows_per_warp: how many rows of codes a warp may take at a time in a product; where there is a
        choice, kernels have it in their names.
      matmul: products with many tokens, by tensor cores; None where there are none.
      derived: arrays that follow from the stored ones, how XLA finds them from their spec and these
        (arrays found before are among them). `row_block_starts`, which several codings have, is
        that of `ops.experts.find_row_block_starts`, and not here.
      derived_shapes: their shapes, by experts, rows and width; entries have 4 bytes.
      deriving_kernel: finds one more, after those.
      block_rows: a block of threads takes a multiple of so many rows.
      product_bytes: dynamic shared memory of a product without dictionaries, by width, tokens of a
        tile and threads.
      expansion_bytes: the same of an expansion, by threads.
    """

    source: str
    arguments: ArgumentStruct
    sizes: Mapping[str, tuple[str, Literal["entries", "item_bytes"]]]
    table: Callable[[], UInt32[np.ndarray, "..."]] | None
    dictionary_bytes: int
    rows_per_warp: tuple[int, ...]
    matmul: MatmulKernels | None = None
    derived: Mapping[str, Callable[[TensorSpec, Mapping[str, Any]], Any]] = dataclasses.field(
        default_factory=dict
    )
    derived_shapes: Mapping[str, Callable[[int, int, int], tuple[int, ...]]] = dataclasses.field(
        default_factory=dict
    )
    deriving_kernel: DerivingKernel | None = None
    block_rows: int = 1
    product_bytes: Callable[[int, int, int], int] = row_product_bytes
    expansion_bytes: Callable[[int], int] = row_expansion_bytes

    @property
    def array_names(self) -> tuple[str, ...]:
        """Arrays that kernels are given, in order."""
        return tuple(name for name, kind in self.arguments.fields if is_pointer(kind))

    @property
    def derived_names(self) -> tuple[str, ...]:
        """Arrays that are not stored but follow, in the order in which they are found."""
        starts = ("row_block_starts",) if "row_block_starts" in self.array_names else ()
        last = (self.deriving_kernel.array,) if self.deriving_kernel else ()
        return (*starts, *self.derived, *last)

    def derived_bytes(self, spec: TensorSpec) -> int:
        """Bytes of the arrays of `derived_names`."""
        shapes = dict(self.derived_shapes)
        if "row_block_starts" in self.array_names:
            shapes["row_block_starts"] = lambda experts, rows, width: (experts, -(-rows // 32))
        if self.deriving_kernel:
            shapes[self.deriving_kernel.array] = self.deriving_kernel.shape
        sizes = (spec.num_experts, spec.rows, spec.width)
        return sum(4 * math.prod(shapes[name](*sizes)) for name in self.derived_names)

    def size(self, field: str, arrays: Mapping[str, Any]) -> int:
        """Return what a field of `sizes` holds for a tensor with these arrays."""
        array, what = self.sizes[field]
        if what == "entries":
            return arrays[array].shape[0]
        return np.dtype(arrays[array].dtype).itemsize
