"""The "packed2" coding: plain 2-bit codes, four a byte. FORMAT.md, "packed2"."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Int64, UInt8

from qmoe_jax.codec import expand, reference, worst_case
from qmoe_jax.codec.cuda_interface import ArgumentStruct, CudaInterface
from qmoe_jax.codec.row_levels import RowLevels
from qmoe_jax.codec.tensor import (
    NUM_SYMBOLS,
    ArrayKind,
    CodedTensor,
    TensorSpec,
    check_array,
    check_levels,
    check_names,
    zero_codes,
)
from qmoe_jax.errors import CodecError


class Packed2Coding(RowLevels):
    """Four 2-bit codes a byte, rows padded to whole bytes; levels are (scale, zero)."""

    name = "packed2"
    grid = "2bit"
    num_symbols = NUM_SYMBOLS[grid]
    array_kinds: Mapping[str, ArrayKind] = {"packed": "codes", "levels": "levels"}
    array_names: tuple[str, ...] = tuple(array_kinds)
    code_array: str | None = None
    cuda: CudaInterface | None = CudaInterface(
        source="fused_packed2.cu",
        arguments=ArgumentStruct(
            "Packed2Arrays", (("packed", "const u8*"), ("levels", "const u32*"))
        ),
        sizes={},
        table=None,
        dictionary_bytes=0,
        rows_per_warp=(1,),
    )

    def encode(self, codes: np.ndarray, levels: np.ndarray) -> CodedTensor:
        """Pack codes uint8 [experts, rows, width]."""
        experts, rows, width = codes.shape
        padded = np.zeros((experts, rows, 4 * _row_bytes(width)), np.uint8)
        padded[..., :width] = codes
        packed = padded[..., 0::4].copy()
        for place in (1, 2, 3):
            packed |= padded[..., place::4] << np.uint8(2 * place)
        spec = TensorSpec(self.name, experts, rows, width)
        return CodedTensor(spec, {"packed": packed, "levels": np.ascontiguousarray(levels)})

    def most_bytes(self, rows: int, width: int) -> int:
        """Bound the stored bytes of an expert."""
        return worst_case.packed_bytes(rows, width)

    def validate(self, coded: CodedTensor) -> None:
        """Check names, dtypes, shapes, finite levels and zero tail bits."""
        spec = coded.spec
        check_names(coded.arrays, self.array_names)
        rows = (spec.num_experts, spec.rows)
        packed = check_array(coded.arrays, "packed", np.uint8, (*rows, _row_bytes(spec.width)))
        check_levels(check_array(coded.arrays, "levels", ml_dtypes.bfloat16, (*rows, 2)))
        if spec.max_row_codewords:
            raise CodecError(
                f"max_row_codewords is {spec.max_row_codewords}; 'packed2' has no codewords and "
                "requires 0."
            )
        tail = spec.width % 4
        if tail and (bad := np.argwhere(packed[..., -1] >> np.uint8(2 * tail))).size:
            expert, row = bad[0]
            raise CodecError(
                f"packed[{expert}, {row}, -1] is {packed[expert, row, -1]:#04x}; the bits after "
                f"the row's last code (from bit {2 * tail}) must be zero."
            )

    def concatenate(self, batches: Sequence[CodedTensor]) -> CodedTensor:
        """Join the arrays along the expert axis."""
        spec = dataclasses.replace(
            batches[0].spec, num_experts=sum(b.spec.num_experts for b in batches)
        )
        arrays = {n: np.concatenate([b.arrays[n] for b in batches]) for n in self.array_names}
        return CodedTensor(spec, arrays)

    def slice_experts(self, coded: CodedTensor, start: int, stop: int) -> CodedTensor:
        """Slice the arrays along the expert axis (views)."""
        spec = dataclasses.replace(coded.spec, num_experts=stop - start)
        return CodedTensor(spec, {n: coded.arrays[n][start:stop] for n in self.array_names})

    def decode_expert(
        self, spec: TensorSpec, arrays: Mapping[str, Any], expert: Any
    ) -> UInt8[jax.Array, "rows width"]:
        """Unpack one expert's codes with XLA."""
        packed = jnp.take(jnp.asarray(arrays["packed"]), expert, axis=0, mode="clip")
        return expand.unpack_2bit(packed, spec.width)

    def decode_numpy_reference(self, coded: CodedTensor) -> UInt8[np.ndarray, "experts rows width"]:
        """Unpack all codes in plain Python."""
        return reference.decode_packed2(coded)

    def symbol_counts(self, coded: CodedTensor) -> Int64[np.ndarray, "symbols"]:
        """Count row by row; the padding's zeros are left out."""
        spec, packed = coded.spec, coded.arrays["packed"]
        zero = zero_codes(coded.arrays["levels"])
        counts = np.zeros(4, np.int64)
        for expert in range(
            spec.num_experts
        ):  # one at a time: unpacked codes are four times larger
            codes = packed[expert, :, :, None] >> np.arange(0, 8, 2, dtype=np.uint8)
            codes = codes.reshape(spec.rows, -1)[:, : spec.width]
            relative = codes - zero[expert, :, None] & 3
            counts += np.bincount(relative.reshape(-1), minlength=4)
        return counts


def _row_bytes(width: int) -> int:
    return -(-width // 4)
