"""What a coding provides, the codings that exist, and what can be done with any coded tensor."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Float32, Int64, UInt8

from qmoe_jax.codec.coding_lattice import LatticeCoding
from qmoe_jax.codec.coding_packed2 import Packed2Coding
from qmoe_jax.codec.coding_qmoe import QmoeCoding
from qmoe_jax.codec.coding_tunstall import TunstallCoding
from qmoe_jax.codec.cuda_interface import CudaInterface
from qmoe_jax.codec.tensor import ArrayKind, CodedTensor, TensorSpec
from qmoe_jax.errors import CodecError


@runtime_checkable
class Coding(Protocol):
    """One way to store codes. Instances hold no state; arguments are checked by the callers."""

    name: str
    """The name that specs carry."""
    grid: str
    """The grid of the codes: "ternary", "2bit" or "lattice"."""
    num_symbols: int
    """Codes are below this: `NUM_SYMBOLS` of the grid."""
    array_kinds: Mapping[str, ArrayKind]
    """Every array that a coded tensor stores."""
    array_names: tuple[str, ...]
    """Names of these arrays."""
    code_array: str | None
    """The array that `expert_offsets` index; None where every array has one entry an expert."""
    cuda: CudaInterface | None
    """How the CUDA kernels take a tensor; None without kernels: XLA decodes it."""

    def check_levels(self, shape: tuple[int, ...], levels: Any) -> Any:
        """Return levels as `encode` takes them, or refuse them: codes of that shape have others."""
        ...

    def encode(self, codes: np.ndarray, levels: Any) -> CodedTensor:
        """Encode uint8 [experts, rows, width] codes, already checked by `encode.encode`."""
        ...

    def levels_of(self, coded: CodedTensor) -> Any:
        """Return the levels of a tensor, as `encode` takes them."""
        ...

    def most_bytes(self, rows: int, width: int) -> int:
        """Bound the stored bytes of an expert, its levels and lengths too, whatever its codes."""
        ...

    def validate(self, coded: CodedTensor) -> None:
        """Raise CodecError unless the arrays are a valid tensor by FORMAT.md."""
        ...

    def concatenate(self, batches: Sequence[CodedTensor]) -> CodedTensor:
        """Join consecutive expert batches of one tensor."""
        ...

    def slice_experts(self, coded: CodedTensor, start: int, stop: int) -> CodedTensor:
        """Cut out the experts start to stop - 1."""
        ...

    def decode_expert(
        self, spec: TensorSpec, arrays: Mapping[str, Any], expert: Any
    ) -> UInt8[jax.Array, "rows width"]:
        """Decode one expert's codes with XLA, in bounds for any array contents."""
        ...

    def weights(
        self,
        spec: TensorSpec,
        arrays: Mapping[str, Any],
        expert: Any,
        codes: UInt8[jax.Array, "rows width"],
    ) -> Float32[jax.Array, "rows width"]:
        """Weights of one expert's codes, with XLA."""
        ...

    def decode_numpy_reference(self, coded: CodedTensor) -> UInt8[np.ndarray, "experts rows width"]:
        """Decode all codes by the reference decoder: plain Python, as FORMAT.md describes it."""
        ...

    def code_parts(self, coded: CodedTensor) -> Mapping[str, int]:
        """Return the bytes of the parts that the code array consists of; the tensor is valid."""
        ...

    def symbol_counts(self, coded: CodedTensor) -> Int64[np.ndarray, "symbols"]:
        """Count how often each value occurs in the tensor.

        Of ternary and lattice codes: each code. Of 2-bit codes: each code less that of its row's
        zero, modulo 4, so that the first count is that of the weight 0 here too.
        """
        ...


@functools.cache
def _codings() -> dict[str, Coding]:
    codings: tuple[Coding, ...] = (  # of a grid the smallest first
        TunstallCoding("tunstall", grid="ternary"),
        QmoeCoding(),
        TunstallCoding("tunstall_2bit", grid="2bit"),
        Packed2Coding(),
        LatticeCoding(),
    )
    return {coding.name: coding for coding in codings}


def coding_names() -> tuple[str, ...]:
    """Names of all codings."""
    return tuple(_codings())


def codings_of_grid(grid: str) -> tuple[str, ...]:
    """Names of the codings that store a grid's codes, the smallest first: that is the default.

    Args:
      grid: "ternary", "2bit" or "lattice".
    """
    return tuple(name for name, coding in _codings().items() if coding.grid == grid)


def get_coding(name: str) -> Coding:
    """Return the coding of that name."""
    if name not in _codings():
        raise CodecError(
            f"The coding '{name}' is unknown; this version reads and writes "
            f"{', '.join(coding_names())}. A newer version may have written this tensor."
        )
    return _codings()[name]


def validate(coded: CodedTensor) -> None:
    """Raise CodecError unless the arrays are a valid tensor by FORMAT.md. Reads every array."""
    get_coding(coded.spec.coding).validate(coded)


def concatenate(batches: Sequence[CodedTensor]) -> CodedTensor:
    """Join the coded batches of consecutive experts into the coded tensor of all of them."""
    if not batches:
        raise CodecError("No expert batches were given; concatenate requires at least one.")
    kinds = {(b.spec.coding, b.spec.rows, b.spec.width) for b in batches}
    if len(kinds) != 1:
        raise CodecError(
            f"The expert batches differ in (coding, out, in): {sorted(kinds)}; batches of one "
            "tensor have the same."
        )
    return get_coding(batches[0].spec.coding).concatenate(batches)


def slice_experts(coded: CodedTensor, start: int, stop: int) -> CodedTensor:
    """Cut out the experts start to stop - 1, as a coded tensor of their own."""
    if not 0 <= start <= stop <= coded.spec.num_experts:
        raise CodecError(
            f"Experts {start}:{stop} were asked for; the tensor has {coded.spec.num_experts}."
        )
    return get_coding(coded.spec.coding).slice_experts(coded, start, stop)
