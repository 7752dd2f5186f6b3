"""What the CUDA kernels of a coding are given, as plain data: nothing here needs CUDA.

The structs are those of `kernels_cuda/`, where each field is explained; a test holds the two
declarations to each other.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Shaped, UInt32

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
class CudaInterface:
    """How the CUDA kernels take a coding's tensors.

    Attributes:
      source: file in `kernels_cuda/` with the products.
      arguments: what every kernel of the coding takes first. A pointer is the stored array of its
        name, or `row_block_starts` (of `ops.experts.find_row_block_starts`), or `table`.
      sizes: what the other fields hold: of which array, and whether its entries or the bytes of an
        element.
      table: builds the dictionaries, uint32; None where codes need none.
      dictionary_bytes: dynamic shared memory in which a block keeps a copy of its dictionary.
      rows_per_warp: how many rows of codes a warp may take at a time in a product; where there is a
        choice, kernels have it in their names.
      matmul_source: file in `kernels_cuda/` of the products with many tokens, by tensor cores; None
        where there are none.
    """

    source: str
    arguments: ArgumentStruct
    sizes: Mapping[str, tuple[str, Literal["entries", "item_bytes"]]]
    table: Callable[[], UInt32[np.ndarray, "..."]] | None
    dictionary_bytes: int
    rows_per_warp: tuple[int, ...]
    matmul_source: str | None = None

    @property
    def array_names(self) -> tuple[str, ...]:
        """Arrays that kernels are given, in order."""
        return tuple(name for name, kind in self.arguments.fields if is_pointer(kind))

    def size(self, field: str, arrays: Mapping[str, Any]) -> int:
        """Return what a field of `sizes` holds for a tensor with these arrays."""
        array, what = self.sizes[field]
        if what == "entries":
            return arrays[array].shape[0]
        return np.dtype(arrays[array].dtype).itemsize
