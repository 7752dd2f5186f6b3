"""The "tunstall" codings: one byte for a run of zero and non-zero weights, one bit a sign.

FORMAT.md, "Coding `tunstall`" and "Coding `tunstall_2bit`".
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Int64, UInt8

from qmoe_jax.codec import reference, tunstall_rows, worst_case
from qmoe_jax.codec.cuda_interface import ArgumentStruct, CudaInterface, MatmulKernels
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
    in_words,
    join_batches,
    too_many_words,
    words_as_bytes,
    zero_codes,
)
from qmoe_jax.codec.tunstall import (
    MAX_ENTRY_NONZEROS,
    NUM_CODEWORDS,
    NUM_DICTIONARIES,
    TunstallFamily,
    choose_dictionary,
    tunstall_family,
)
from qmoe_jax.codec.tunstall_expand import expand_rows
from qmoe_jax.errors import CodecError

# As for "qmoe": most layers of a model end up with the same bound and share compiled decoders.
_BOUND_STEP = 32
_MAX_EXPERT_WORDS = 2**26

# Which code a symbol stands for, by the code of the weight 0: nearest values first.
_CODES_OF_SYMBOLS = np.array([[0, 1, 2, 3], [1, 2, 0, 3], [2, 1, 3, 0], [3, 2, 1, 0]], np.uint8)


_CUDA_ARGUMENTS = ArgumentStruct(
    "TunstallArrays",
    (
        ("words", "const u32*"),
        ("expert_offsets", "const int*"),
        ("dictionaries", "const u8*"),
        ("shortest_rows", "const int*"),
        ("row_lengths", "const void*"),
        ("row_block_starts", "const int*"),
        ("levels", "const u32*"),
        ("table", "const u32*"),
        ("num_words", "u32"),
        ("row_length_bytes", "int"),
    ),
)


_MATMUL = MatmulKernels(
    source="matmul_tunstall.cu",
    tiles=(8, 16, 32, 64),
    width_multiple=16,
    threads=lambda rows: 512,
    rows_per_block=lambda threads: 64,
    shared_bytes=lambda threads, tile: 64 * (1024 + 64) + 2 * 4 * 64,
    tokens_per_expert=16,
)


class TunstallCoding(RowLevels):
    """Rows of codewords and sign bits in whole bytes, experts in whole 32-bit words."""

    array_kinds: Mapping[str, ArrayKind] = {
        "words": "codes",
        "expert_offsets": "lengths",
        "dictionaries": "lengths",
        "shortest_rows": "lengths",
        "row_lengths": "lengths",
        "levels": "levels",
    }
    array_names: tuple[str, ...] = tuple(array_kinds)
    code_array: str | None = "words"

    def __init__(self, name: str, grid: str):
        self.name = name
        self.grid = grid
        self.num_symbols = NUM_SYMBOLS[grid]
        self._has_escapes = grid == "2bit"
        self.cuda: CudaInterface | None = CudaInterface(
            source=f"fused_{name}.cu",
            arguments=_CUDA_ARGUMENTS,
            sizes={
                "num_words": ("words", "entries"),
                "row_length_bytes": ("row_lengths", "item_bytes"),
            },
            table=lambda: self.family.table,
            dictionary_bytes=8 * NUM_CODEWORDS,
            rows_per_warp=(1, 4),
            matmul=None if self._has_escapes else _MATMUL,
        )

    @property
    def family(self) -> TunstallFamily:
        """The dictionaries."""
        return tunstall_family(MAX_ENTRY_NONZEROS if self._has_escapes else 0)

    def encode(self, codes: np.ndarray, levels: np.ndarray) -> CodedTensor:
        """Encode codes uint8 [experts, rows, width]: rows on their own, a zero share an expert."""
        experts, rows, width = codes.shape
        family = self.family
        order = self._codes_of_symbols(levels)
        dictionaries = np.array(
            [
                choose_dictionary(int((codes[e] == order[e, :, :1]).sum()), rows * width)
                for e in range(experts)
            ],
            np.uint8,
        )
        encoded = tunstall_rows.encode_rows(
            codes.reshape(experts * rows, width),
            np.argsort(order, axis=-1).astype(np.uint8).reshape(-1, 4),
            np.repeat(dictionaries, rows),
            family,
        )
        num_bytes = encoded.num_bytes.reshape(experts, rows)
        shortest = num_bytes.min(axis=1, initial=2**31 - 1) if rows else np.zeros(experts, np.int32)
        longest = int(encoded.num_codewords.max(initial=0))
        bound = -(-longest // _BOUND_STEP) * _BOUND_STEP
        sizes = num_bytes.sum(axis=1, dtype=np.int64)
        words, offsets = in_words(encoded.data, sizes, _MAX_EXPERT_WORDS)
        arrays = {
            "words": words,
            "expert_offsets": offsets,
            "dictionaries": dictionaries,
            "shortest_rows": shortest,
            "row_lengths": _narrow(num_bytes - shortest[:, None]),
            "levels": np.ascontiguousarray(levels),
        }
        return CodedTensor(TensorSpec(self.name, experts, rows, width, bound), arrays)

    def most_bytes(self, rows: int, width: int) -> int:
        """Bound the stored bytes of an expert."""
        return worst_case.tunstall_bytes(self.family.num_escapes, rows, width)

    def validate(self, coded: CodedTensor) -> None:
        """Check names, dtypes, shapes, offsets, levels, and every row bit by bit."""
        spec, arrays = coded.spec, coded.arrays
        experts, rows = spec.num_experts, spec.rows
        check_names(arrays, self.array_names)
        words = check_array(arrays, "words", np.uint32, (None,))
        expert_offsets = check_array(arrays, "expert_offsets", np.int32, (experts + 1,))
        dictionaries = check_array(arrays, "dictionaries", np.uint8, (experts,))
        shortest = check_array(arrays, "shortest_rows", np.int32, (experts,))
        dtype = arrays["row_lengths"].dtype
        wanted = dtype if dtype in (np.uint8, np.uint16) else np.dtype(np.uint8)
        check_array(arrays, "row_lengths", wanted, (experts, rows))
        check_levels(check_array(arrays, "levels", ml_dtypes.bfloat16, (experts, rows, 2)))
        check_offsets("expert_offsets", expert_offsets, words.size, "words")
        if (bad := np.flatnonzero(dictionaries >= NUM_DICTIONARIES)).size:
            raise CodecError(
                f"dictionaries[{bad[0]}] is {dictionaries[bad[0]]}; there are {NUM_DICTIONARIES} "
                f"dictionaries, 0 to {NUM_DICTIONARIES - 1}."
            )
        if (bad := np.flatnonzero(shortest < 0)).size:
            raise CodecError(
                f"shortest_rows[{bad[0]}] is {shortest[bad[0]]}; it must be at least 0."
            )
        num_bytes = _row_bytes(arrays)
        sums = num_bytes.sum(axis=1)
        found = np.diff(expert_offsets)
        if (bad := np.flatnonzero((sums + 3) // 4 != found)).size:
            raise CodecError(
                f"The rows of expert {bad[0]} have {sums[bad[0]]} bytes, but expert_offsets give "
                f"it {found[bad[0]]} words of 4; the two must agree."
            )
        if found.max(initial=0) >= _MAX_EXPERT_WORDS:
            raise CodecError(too_many_words(int(found.max()), _MAX_EXPERT_WORDS))
        data = words_as_bytes(words)
        for expert in range(experts):
            end = 4 * int(expert_offsets[expert + 1])
            used = 4 * int(expert_offsets[expert]) + int(sums[expert])
            if data[used:end].any():
                raise CodecError(
                    f"The bytes after the last row of expert {expert} are not zero; they fill its "
                    "last word and must be."
                )
        walk = self._walk(coded)
        if (bad := np.flatnonzero(walk.faults)).size:
            expert, row = divmod(int(bad[0]), rows)
            raise CodecError(
                f"Row {row} of expert {expert} {tunstall_rows.FAULTS[int(walk.faults[bad[0]])]}; "
                f"its spec requires {spec.width} weights. The words, the row lengths or the "
                "dictionaries are damaged, or belong to another tensor."
            )
        if walk.num_codewords.max(initial=0) > spec.max_row_codewords:
            expert, row = divmod(int(walk.num_codewords.argmax()), rows)
            raise CodecError(
                f"Row {row} of expert {expert} has {walk.num_codewords.max()} codewords; the "
                f"tensor's spec allows max_row_codewords = {spec.max_row_codewords}."
            )

    def concatenate(self, batches: Sequence[CodedTensor]) -> CodedTensor:
        """Join the arrays; expert offsets are recounted."""
        joined = join_batches(batches)
        joined.arrays["row_lengths"] = _narrow(joined.arrays["row_lengths"])
        return joined

    def slice_experts(self, coded: CodedTensor, start: int, stop: int) -> CodedTensor:
        """Slice the arrays (views) and recount expert offsets; the row bound stays."""
        offsets = coded.arrays["expert_offsets"][start : stop + 1]
        arrays = {name: coded.arrays[name][start:stop] for name in self.array_names}
        arrays["words"] = coded.arrays["words"][offsets[0] : offsets[-1]]
        arrays["expert_offsets"] = offsets - offsets[0]
        return CodedTensor(dataclasses.replace(coded.spec, num_experts=stop - start), arrays)

    def decode_expert(
        self, spec: TensorSpec, arrays: Mapping[str, Any], expert: Any
    ) -> UInt8[jax.Array, "rows width"]:
        """Expand one expert's rows with XLA."""

        def own(name: str) -> jax.Array:
            return jnp.take(jnp.asarray(arrays[name]), expert, axis=0, mode="clip")

        family = self.family
        num_bytes = own("row_lengths").astype(jnp.int32) + own("shortest_rows")
        row_ends = jnp.cumsum(num_bytes)
        row_codes = None
        if family.num_escapes:
            zero = own("levels")[:, 1]
            is_code = (zero[:, None] == jnp.arange(4, dtype=zero.dtype)[None]).at[:, 0].set(False)
            row_codes = jnp.take(jnp.asarray(_CODES_OF_SYMBOLS), is_code.argmax(axis=1), axis=0)
        return expand_rows(
            jnp.asarray(arrays["words"]),
            own("expert_offsets"),
            row_ends,
            row_ends - num_bytes,
            jnp.take(jnp.asarray(family.table), own("dictionaries"), axis=0, mode="clip"),
            row_codes,
            spec.width,
            spec.max_row_codewords,
        )

    def decode_numpy_reference(self, coded: CodedTensor) -> UInt8[np.ndarray, "experts rows width"]:
        """Decode all codes in plain Python."""
        return reference.decode_tunstall(coded)

    def symbol_counts(self, coded: CodedTensor) -> Int64[np.ndarray, "symbols"]:
        """Count by walking over the rows; the tensor must be valid."""
        by_symbol = self._walk(coded).symbol_counts
        levels = coded.arrays["levels"]
        codes = self._codes_of_symbols(levels).astype(np.int64)
        if self._has_escapes:
            codes = codes - zero_codes(levels)[..., None] & 3
        counts = np.zeros(4, np.int64)
        np.add.at(counts, codes.reshape(-1, 4), by_symbol)
        return counts[: self.num_symbols]

    def code_parts(self, coded: CodedTensor) -> dict[str, int]:
        """Return the bytes of codewords, escapes among them, and of sign bits."""
        codewords = int(self._walk(coded).num_codewords.sum(dtype=np.int64))
        num_bytes = int(_row_bytes(coded.arrays).sum())
        return {"codewords": codewords, "signs": num_bytes - codewords}

    def _codes_of_symbols(self, levels: np.ndarray) -> UInt8[np.ndarray, "experts rows 4"]:
        zero = zero_codes(levels) if self._has_escapes else np.zeros(levels.shape[:2], int)
        return _CODES_OF_SYMBOLS[zero]

    def _walk(self, coded: CodedTensor) -> tunstall_rows.RowWalk:
        spec, arrays = coded.spec, coded.arrays
        num_bytes = _row_bytes(arrays)
        first = 4 * arrays["expert_offsets"][:-1].astype(np.int64)
        ends = first[:, None] + np.cumsum(num_bytes, axis=1)
        return tunstall_rows.walk_rows(
            words_as_bytes(arrays["words"]),
            (ends - num_bytes).reshape(-1),
            ends.reshape(-1),
            np.repeat(arrays["dictionaries"], spec.rows),
            spec.width,
            self.family,
        )


def _row_bytes(arrays: Mapping[str, np.ndarray]) -> Int64[np.ndarray, "experts rows"]:
    return arrays["row_lengths"].astype(np.int64) + arrays["shortest_rows"][:, None]


def _narrow(row_lengths: np.ndarray) -> np.ndarray:
    """Row lengths as uint8 if all fit, else uint16."""
    longest = int(row_lengths.max(initial=0))
    if longest >= 2**16:
        raise CodecError(
            f"A row has {longest} bytes more than its expert's shortest; row lengths are uint16, "
            "so the difference is less than 65536. Split the rows over several coded tensors."
        )
    return row_lengths.astype(np.uint8 if longest < 2**8 else np.uint16)
