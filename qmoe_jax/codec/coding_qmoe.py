"""The "qmoe" coding: ternary codes as 16-bit codewords of the dictionary. FORMAT.md, "qmoe"."""

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
from qmoe_jax.codec.dictionary import MAX_ENTRY_PAIRS, NUM_ENTRIES, dictionary
from qmoe_jax.codec.greedy import encode_rows
from qmoe_jax.codec.row_levels import RowLevels
from qmoe_jax.codec.tensor import (
    NUM_SYMBOLS,
    ArrayKind,
    CodedTensor,
    TensorSpec,
    check_array,
    check_levels,
    check_names,
    check_offsets,
    join_batches,
    row_length_dtype,
    to_offsets,
)
from qmoe_jax.errors import CodecError

# A row bound is rounded up to a multiple of this, so that most layers of a model end up with the
# same bound and share compiled decoders.
_BOUND_STEP = 32


class QmoeCoding(RowLevels):
    """Dictionary codewords, rows one after another, experts one after another."""

    name = "qmoe"
    grid = "ternary"
    num_symbols = NUM_SYMBOLS[grid]
    array_kinds: Mapping[str, ArrayKind] = {
        "codewords": "codes",
        "expert_offsets": "lengths",
        "row_lengths": "lengths",
        "levels": "levels",
    }
    array_names: tuple[str, ...] = tuple(array_kinds)
    code_array: str | None = "codewords"
    cuda: CudaInterface | None = CudaInterface(
        source="fused_qmoe.cu",
        arguments=ArgumentStruct(
            "QmoeArrays",
            (
                ("codewords", "const u16*"),
                ("expert_offsets", "const int*"),
                ("row_lengths", "const void*"),
                ("row_block_starts", "const int*"),
                ("levels", "const u32*"),
                ("table", "const Pair32*"),
                ("num_codewords", "u32"),
                ("row_length_bytes", "int"),
            ),
        ),
        sizes={
            "num_codewords": ("codewords", "entries"),
            "row_length_bytes": ("row_lengths", "item_bytes"),
        },
        table=lambda: dictionary().table,
        dictionary_bytes=0,
        rows_per_warp=(1,),
    )

    def encode(self, codes: np.ndarray, levels: np.ndarray) -> CodedTensor:
        """Encode codes uint8 [experts, rows, width], each row on its own."""
        experts, rows, width = codes.shape
        codewords, counts = encode_rows(codes.reshape(experts * rows, width))
        counts = counts.reshape(experts, rows)
        longest = int(counts.max(initial=0))
        bound = row_bound(longest, width)
        arrays = {
            "codewords": codewords,
            "expert_offsets": to_offsets(counts.sum(axis=1, dtype=np.int64), "expert_offsets"),
            "row_lengths": counts.astype(row_length_dtype(bound)),
            "levels": np.ascontiguousarray(levels),
        }
        return CodedTensor(TensorSpec(self.name, experts, rows, width, bound), arrays)

    def most_bytes(self, rows: int, width: int) -> int:
        """Bound the stored bytes of an expert."""
        return worst_case.qmoe_bytes(rows, width)

    def validate(self, coded: CodedTensor) -> None:
        """Check names, dtypes, shapes, offsets, levels, and that every row has its width."""
        spec, arrays = coded.spec, coded.arrays
        check_names(arrays, self.array_names)
        experts, rows = spec.num_experts, spec.rows
        codewords = check_array(arrays, "codewords", np.uint16, (None,))
        expert_offsets = check_array(arrays, "expert_offsets", np.int32, (experts + 1,))
        lengths = row_length_dtype(spec.max_row_codewords)
        row_lengths = check_array(arrays, "row_lengths", lengths, (experts, rows))
        check_levels(check_array(arrays, "levels", ml_dtypes.bfloat16, (experts, rows, 2)))
        check_offsets("expert_offsets", expert_offsets, codewords.size, "codewords")
        for expert in range(experts):
            start, stop = expert_offsets[expert : expert + 2]
            self._validate_expert(spec, expert, row_lengths[expert], codewords[start:stop])

    def _validate_expert(
        self, spec: TensorSpec, expert: int, counts: np.ndarray, codewords: np.ndarray
    ) -> None:
        row_offsets = to_offsets(counts, f"row_lengths[{expert}]")
        if row_offsets[-1] != codewords.size:
            raise CodecError(
                f"row_lengths[{expert}] sum to {row_offsets[-1]}, but expert_offsets give expert "
                f"{expert} {codewords.size} codewords; the two must agree."
            )
        if counts.max(initial=0) > spec.max_row_codewords:
            row = int(counts.argmax())
            raise CodecError(
                f"Row {row} of expert {expert} has {counts[row]} codewords; the tensor's spec "
                f"allows max_row_codewords = {spec.max_row_codewords}."
            )
        entries = dictionary()
        ends = np.zeros(codewords.size + 1, np.int64)
        np.cumsum(entries.lengths[codewords], out=ends[1:])
        found = np.diff(ends[row_offsets])
        wanted = _row_pairs(spec.width)
        if (bad := np.flatnonzero(found != wanted)).size:
            raise CodecError(
                f"Row {bad[0]} of expert {expert} decodes to {found[bad[0]]} pairs; its "
                f"{spec.width} weights require {wanted}. The codewords or the row lengths "
                "are damaged, or belong to another dictionary."
            )
        if spec.width % 2:
            last = codewords[row_offsets[1:] - 1]
            last_pair = entries.pairs[last, entries.lengths[last] - 1]
            if (bad := np.flatnonzero(last_pair >= 3)).size:
                raise CodecError(
                    f"Row {bad[0]} of expert {expert} ends with the pair {last_pair[bad[0]]}; at "
                    "odd width the second code of the last pair must be 0."
                )

    def concatenate(self, batches: Sequence[CodedTensor]) -> CodedTensor:
        """Join the arrays; expert offsets are recounted."""
        joined = join_batches(batches)
        dtype = row_length_dtype(joined.spec.max_row_codewords)
        joined.arrays["row_lengths"] = joined.arrays["row_lengths"].astype(dtype)
        return joined

    def slice_experts(self, coded: CodedTensor, start: int, stop: int) -> CodedTensor:
        """Slice the arrays (views) and recount expert offsets; the row bound stays."""
        offsets = coded.arrays["expert_offsets"][start : stop + 1]
        arrays = {
            "codewords": coded.arrays["codewords"][offsets[0] : offsets[-1]],
            "expert_offsets": offsets - offsets[0],
            "row_lengths": coded.arrays["row_lengths"][start:stop],
            "levels": coded.arrays["levels"][start:stop],
        }
        return CodedTensor(dataclasses.replace(coded.spec, num_experts=stop - start), arrays)

    def decode_expert(
        self, spec: TensorSpec, arrays: Mapping[str, Any], expert: Any
    ) -> UInt8[jax.Array, "rows width"]:
        """Expand one expert's codewords with XLA."""
        start = jnp.take(jnp.asarray(arrays["expert_offsets"]), expert, mode="clip")
        lengths = jnp.take(jnp.asarray(arrays["row_lengths"]), expert, axis=0, mode="clip")
        ends = start + jnp.cumsum(lengths, dtype=jnp.int32)
        return expand.expand_codewords(
            jnp.asarray(arrays["codewords"]),
            ends - lengths,
            ends,
            spec.width,
            spec.max_row_codewords,
        )

    def decode_numpy_reference(self, coded: CodedTensor) -> UInt8[np.ndarray, "experts rows width"]:
        """Decode all codes in plain Python."""
        return reference.decode_qmoe(coded)

    def symbol_counts(self, coded: CodedTensor) -> Int64[np.ndarray, "symbols"]:
        """Count codes by counting codewords; the zeros that fill odd rows are taken off again."""
        spec, entries = coded.spec, dictionary()
        uses = np.bincount(coded.arrays["codewords"], minlength=NUM_ENTRIES)
        within = np.arange(MAX_ENTRY_PAIRS) < entries.lengths[:, None]
        counts = np.zeros(3, np.int64)
        for symbol in range(3):
            hits = (entries.pairs % 3 == symbol).astype(np.int64) + (entries.pairs // 3 == symbol)
            counts[symbol] = uses @ (hits * within).sum(axis=1)
        counts[0] -= spec.num_experts * spec.rows * (spec.width % 2)
        return counts


def _row_pairs(width: int) -> int:
    return (width + 1) // 2


def row_bound(longest: int, width: int) -> int:
    """max_row_codewords of a tensor whose longest row has `longest` codewords.

    Few bounds, few compilations. A row that is longer than any valid one keeps its length.
    """
    bound = min(-(-longest // _BOUND_STEP) * _BOUND_STEP, _row_pairs(width))
    bound = max(bound, longest)
    return min(bound, 255) if longest <= 255 else bound
