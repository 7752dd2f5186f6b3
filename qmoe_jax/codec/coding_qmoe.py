"""The "qmoe" coding: ternary codes as 16-bit codewords of the dictionary. FORMAT.md, "qmoe"."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Int64, UInt8

from qmoe_jax.codec import expand, reference
from qmoe_jax.codec.dictionary import MAX_ENTRY_PAIRS, NUM_ENTRIES, dictionary
from qmoe_jax.codec.greedy import encode_rows
from qmoe_jax.codec.tensor import (
    CodedTensor,
    TensorSpec,
    check_array,
    check_levels,
    check_names,
    to_offsets,
)
from qmoe_jax.errors import CodecError

# A row bound is rounded up to a multiple of this, so that most layers of a model end up with the
# same bound and share compiled decoders.
_BOUND_STEP = 32


class QmoeCoding:
    """Dictionary codewords, rows one after another, experts one after another."""

    name = "qmoe"
    num_symbols = 3
    array_names: tuple[str, ...] = ("codewords", "expert_offsets", "row_offsets", "levels")

    def encode(self, codes: np.ndarray, levels: np.ndarray) -> CodedTensor:
        """Encode codes uint8 [experts, out, in], each row on its own."""
        experts, rows, width = codes.shape
        codewords, counts = encode_rows(codes.reshape(experts * rows, width))
        counts = counts.reshape(experts, rows)
        longest = int(counts.max(initial=0))
        bound = min(-(-longest // _BOUND_STEP) * _BOUND_STEP, _row_pairs(width))
        arrays = {
            "codewords": codewords,
            "expert_offsets": to_offsets(counts.sum(axis=1, dtype=np.int64), "expert_offsets"),
            "row_offsets": to_offsets(counts, "row_offsets"),
            "levels": np.ascontiguousarray(levels),
        }
        return CodedTensor(TensorSpec(self.name, experts, rows, width, bound), arrays)

    def validate(self, coded: CodedTensor) -> None:
        """Check names, dtypes, shapes, offsets, levels, and that every row has its width."""
        spec, arrays = coded.spec, coded.arrays
        check_names(arrays, self.array_names)
        experts, rows = spec.num_experts, spec.out_features
        codewords = check_array(arrays, "codewords", np.uint16, (None,))
        expert_offsets = check_array(arrays, "expert_offsets", np.int32, (experts + 1,))
        row_offsets = check_array(arrays, "row_offsets", np.int32, (experts, rows + 1))
        check_levels(check_array(arrays, "levels", ml_dtypes.bfloat16, (experts, rows, 2)))
        _check_rising("expert_offsets", expert_offsets)
        if expert_offsets[-1] != codewords.size:
            raise CodecError(
                f"expert_offsets end at {expert_offsets[-1]}, but there are {codewords.size} "
                "codewords; the two must agree. One of the arrays is truncated."
            )
        for expert in range(experts):
            start, stop = expert_offsets[expert : expert + 2]
            self._validate_expert(spec, expert, row_offsets[expert], codewords[start:stop])

    def _validate_expert(
        self, spec: TensorSpec, expert: int, row_offsets: np.ndarray, codewords: np.ndarray
    ) -> None:
        _check_rising(f"row_offsets[{expert}]", row_offsets)
        if row_offsets[-1] != codewords.size:
            raise CodecError(
                f"row_offsets[{expert}] end at {row_offsets[-1]}, but expert_offsets give expert "
                f"{expert} {codewords.size} codewords; the two must agree."
            )
        counts = np.diff(row_offsets)
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
        wanted = _row_pairs(spec.in_features)
        if (bad := np.flatnonzero(found != wanted)).size:
            raise CodecError(
                f"Row {bad[0]} of expert {expert} decodes to {found[bad[0]]} pairs; its "
                f"{spec.in_features} weights require {wanted}. The codewords or the row offsets "
                "are damaged, or belong to another dictionary."
            )
        if spec.in_features % 2:
            last = codewords[row_offsets[1:] - 1]
            last_pair = entries.pairs[last, entries.lengths[last] - 1]
            if (bad := np.flatnonzero(last_pair >= 3)).size:
                raise CodecError(
                    f"Row {bad[0]} of expert {expert} ends with the pair {last_pair[bad[0]]}; at "
                    "odd width the second code of the last pair must be 0."
                )

    def concatenate(self, batches: Sequence[CodedTensor]) -> CodedTensor:
        """Join the arrays; expert offsets are recounted."""
        spec = dataclasses.replace(
            batches[0].spec,
            num_experts=sum(b.spec.num_experts for b in batches),
            max_row_codewords=max(b.spec.max_row_codewords for b in batches),
        )
        sizes = np.concatenate([np.diff(b.arrays["expert_offsets"]) for b in batches])
        offsets = to_offsets(sizes, "expert_offsets")  # before the copying: it may refuse
        arrays = {
            name: np.concatenate([b.arrays[name] for b in batches])
            for name in ("codewords", "row_offsets", "levels")
        }
        return CodedTensor(spec, arrays | {"expert_offsets": offsets})

    def slice_experts(self, coded: CodedTensor, start: int, stop: int) -> CodedTensor:
        """Slice the arrays (views) and recount expert offsets; the row bound stays."""
        offsets = coded.arrays["expert_offsets"][start : stop + 1]
        arrays = {
            "codewords": coded.arrays["codewords"][offsets[0] : offsets[-1]],
            "expert_offsets": offsets - offsets[0],
            "row_offsets": coded.arrays["row_offsets"][start:stop],
            "levels": coded.arrays["levels"][start:stop],
        }
        return CodedTensor(dataclasses.replace(coded.spec, num_experts=stop - start), arrays)

    def decode_expert(
        self, spec: TensorSpec, arrays: Mapping[str, Any], expert: Any
    ) -> UInt8[jax.Array, "out in"]:
        """Expand one expert's codewords with XLA."""
        start = jnp.take(jnp.asarray(arrays["expert_offsets"]), expert, mode="clip")
        rows = jnp.take(jnp.asarray(arrays["row_offsets"]), expert, axis=0, mode="clip")
        bounds = start + rows
        return expand.expand_codewords(
            jnp.asarray(arrays["codewords"]),
            bounds[:-1],
            bounds[1:],
            spec.in_features,
            spec.max_row_codewords,
        )

    def decode_numpy_reference(self, coded: CodedTensor) -> UInt8[np.ndarray, "experts out in"]:
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
        counts[0] -= spec.num_experts * spec.out_features * (spec.in_features % 2)
        return counts

    def num_bits(self, coded: CodedTensor) -> dict[str, int]:
        """Bits stored. The dictionary belongs to the format and is stored with no tensor."""
        arrays = coded.arrays
        return {
            "codes": 8 * arrays["codewords"].nbytes,
            "levels": 8 * arrays["levels"].nbytes,
            "offsets": 8 * (arrays["expert_offsets"].nbytes + arrays["row_offsets"].nbytes),
        }


def _row_pairs(in_features: int) -> int:
    return (in_features + 1) // 2


def _check_rising(name: str, offsets: np.ndarray) -> None:
    if offsets[0] != 0:
        raise CodecError(f"{name} start at {offsets[0]}; offsets must start at 0.")
    if (bad := np.flatnonzero(offsets[1:] < offsets[:-1])).size:
        at = bad[0]
        raise CodecError(
            f"{name} fall from {offsets[at]} to {offsets[at + 1]} at index {at + 1}; offsets must "
            "not decrease."
        )
