"""The "lattice" coding: blocks of 32 rows, column by column, as bit strings in byte codewords.

FORMAT.md, "Coding `lattice`".
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int32, Int64, UInt8

from qmoe_jax.codec import lattice_blocks, reference_lattice
from qmoe_jax.codec.cuda_interface import (
    CudaInterface,
)
from qmoe_jax.codec.lattice_blocks import (
    BLOCK_ROWS,
    FLAGS,
    NUM_STRINGS,
    PLANE_1,
    PLANE_2,
    PLANE_3,
    PLANE_4,
    RESTS,
    SIGNS,
    Strings,
)
from qmoe_jax.codec.lattice_choices import (
    CLASS_STEPS,
    NUM_CLASSES,
    ZERO_COLUMN,
    choose_columns,
    choose_dictionaries,
    choose_leans,
    order_of,
    raw_dictionaries,
)
from qmoe_jax.codec.lattice_cuda import LATTICE_CUDA
from qmoe_jax.codec.lattice_dictionaries import NUM_DICTIONARIES, lattice_dictionaries
from qmoe_jax.codec.lattice_expand import LatticeStrings, expand_blocks
from qmoe_jax.codec.lattice_values import MAX_ORIGIN, STEP_TABLE, multiples
from qmoe_jax.codec.tensor import (
    NUM_SYMBOLS,
    ArrayKind,
    CodedTensor,
    Levels,
    TensorSpec,
    check_array,
    check_names,
    check_offsets,
    in_words,
    join_batches,
    too_many_words,
    words_as_bytes,
)
from qmoe_jax.codec.worst_case import lattice_bytes, raw_lattice_bytes
from qmoe_jax.errors import CodecError

MAX_WIDTH = 2**19
"""Widths are below: decoders count the 32 weights of every column of a block in float32."""
_PARTS = (
    *("flags", "rests", "plane 1", "plane 2", "plane 3", "plane 4", "signs"),
    *("firsts", "remainders"),
)
# Strings with a schedule, and strings with one dictionary, in the order of these arrays.
_SCHEDULED = (FLAGS, PLANE_1, PLANE_2)
_PLAIN = (RESTS, PLANE_3, PLANE_4, SIGNS)
_MAX_EXPERT_WORDS = 2**26
_OUT_OF_REACH = 2**30


class LatticeLevels(NamedTuple):
    """Steps, checked."""

    step_index: UInt8[np.ndarray, "experts width"]
    origin: Float32[np.ndarray, "experts"]


class LatticeCoding:
    """Blocks of whole bytes, experts in whole 32-bit words; a step for each column."""

    name = "lattice"
    grid = "lattice"
    num_symbols = NUM_SYMBOLS[grid]
    array_kinds: Mapping[str, ArrayKind] = {
        "words": "codes",
        "expert_offsets": "lengths",
        "block_lengths": "lengths",
        "grouped_columns": "lengths",
        "schedules": "lengths",
        "dictionaries": "lengths",
        "leans": "lengths",
        "columns": "levels",
        "bases": "levels",
        "origins": "levels",
    }
    array_names: tuple[str, ...] = tuple(array_kinds)
    code_array: str | None = "words"
    cuda: CudaInterface | None = LATTICE_CUDA

    def check_levels(self, shape: tuple[int, ...], levels: Levels) -> LatticeLevels:
        """Refuse anything but step_index uint8 [experts, width] and origin float32 [experts]."""
        experts, _, width = shape
        if not isinstance(levels, Mapping) or set(levels) != {"step_index", "origin"}:
            raise CodecError(
                "levels of lattice codes must be a mapping with exactly 'step_index' and 'origin'."
            )
        wanted = {"step_index": (np.uint8, (experts, width)), "origin": (np.float32, (experts,))}
        found = {name: np.asarray(levels[name]) for name in wanted}
        for name, (dtype, its_shape) in wanted.items():
            if found[name].dtype != dtype or found[name].shape != its_shape:
                raise CodecError(
                    f"levels['{name}'] are {found[name].dtype} of shape {found[name].shape}; codes "
                    f"of shape {shape} require {np.dtype(dtype)} {its_shape}."
                )
        _check_origins(found["origin"])
        if width >= MAX_WIDTH:
            raise CodecError(_too_wide(width))
        return LatticeLevels(**found)

    def encode(self, codes: np.ndarray, levels: LatticeLevels) -> CodedTensor:
        """Encode codes uint8 [experts, rows, width], every expert by its own choices."""
        experts, rows, width = codes.shape
        blocks = -(-rows // BLOCK_ROWS)
        parts: list[UInt8[np.ndarray, bytes]] = []
        block_lengths = np.zeros((experts, blocks), np.int64)
        arrays = {
            "grouped_columns": np.zeros(experts, np.int32),
            "schedules": np.zeros((experts, 3, NUM_DICTIONARIES - 1), np.uint16),
            "dictionaries": np.zeros((experts, 4), np.uint8),
            "leans": np.zeros((experts, _lean_bytes(rows, width)), np.uint8),
            "columns": np.zeros((experts, width), np.uint8),
            "bases": np.zeros((experts, NUM_CLASSES), np.uint8),
            "origins": np.ascontiguousarray(levels.origin),
        }
        most = raw_lattice_bytes(rows, width)
        for expert in range(experts):
            own = codes[expert]
            counts = lattice_blocks.count_codes(own)
            nonzero = counts.columns[0]
            chosen = choose_columns(nonzero, levels.step_index[expert], rows)
            if (nonzero[chosen.columns == ZERO_COLUMN] > 0).any():
                raise CodecError(
                    f"Columns of expert {expert} that are not zero have the steps 0 and 255, and "
                    "many between; 'lattice' takes one of the two. Clip the steps to 254."
                )
            order = order_of(chosen.columns)
            lean = choose_leans(counts)
            row_lean, column_lean = _leans_of(lean, rows, width)
            for choice in (choose_dictionaries(own, counts, order), raw_dictionaries()):
                ends = _ends(choice.schedules, choice.plain)
                strings = Strings(order, choice.num_grouped, row_lean, column_lean, ends)
                data, block_lengths[expert] = lattice_blocks.encode_blocks(own, strings)
                if data.size <= most:
                    break
            parts.append(data)
            arrays["grouped_columns"][expert] = choice.num_grouped
            arrays["schedules"][expert] = choice.schedules
            arrays["dictionaries"][expert] = choice.plain
            arrays["leans"][expert] = np.packbits(lean, bitorder="little")
            arrays["columns"][expert] = chosen.columns
            arrays["bases"][expert] = chosen.bases
        data = np.concatenate(parts) if parts else np.zeros(0, np.uint8)
        words, offsets = in_words(data, block_lengths.sum(axis=1), _MAX_EXPERT_WORDS)
        arrays |= {
            "words": words,
            "expert_offsets": offsets,
            "block_lengths": _narrow(block_lengths),
        }
        spec = TensorSpec(self.name, experts, rows, width)
        return CodedTensor(spec, {name: arrays[name] for name in self.array_names})

    def most_bytes(self, rows: int, width: int) -> int:
        """Bound the bytes of an expert: none is stored in more than its bits as they are."""
        return lattice_bytes(rows, width)

    def levels_of(self, coded: CodedTensor) -> dict[str, np.ndarray]:
        """Return step_index, 0 for columns without one, and origin."""
        bytes_, bases = coded.arrays["columns"].astype(np.int64), coded.arrays["bases"]
        steps = np.take_along_axis(bases.astype(np.int64), bytes_ // CLASS_STEPS, axis=1)
        steps = np.where(bytes_ == ZERO_COLUMN, 0, steps + bytes_ % CLASS_STEPS)
        return {"step_index": steps.astype(np.uint8), "origin": coded.arrays["origins"]}

    def validate(self, coded: CodedTensor) -> None:
        """Check names, dtypes, shapes, offsets, choices, and every block bit by bit."""
        spec, arrays = coded.spec, coded.arrays
        experts, rows, width = spec.num_experts, spec.rows, spec.width
        check_names(arrays, self.array_names)
        words = check_array(arrays, "words", np.uint32, (None,))
        expert_offsets = check_array(arrays, "expert_offsets", np.int32, (experts + 1,))
        dtype = arrays["block_lengths"].dtype
        wanted = dtype if dtype in (np.uint16, np.uint32) else np.dtype(np.uint16)
        blocks = -(-rows // BLOCK_ROWS)
        lengths = check_array(arrays, "block_lengths", wanted, (experts, blocks)).astype(np.int64)
        grouped = check_array(arrays, "grouped_columns", np.int32, (experts,))
        check_array(arrays, "schedules", np.uint16, (experts, 3, NUM_DICTIONARIES - 1))
        dictionaries = check_array(arrays, "dictionaries", np.uint8, (experts, 4))
        leans = check_array(arrays, "leans", np.uint8, (experts, _lean_bytes(rows, width)))
        columns = check_array(arrays, "columns", np.uint8, (experts, width)).astype(np.int64)
        bases = check_array(arrays, "bases", np.uint8, (experts, NUM_CLASSES)).astype(np.int64)
        _check_origins(check_array(arrays, "origins", np.float32, (experts,)))
        if spec.max_row_codewords:
            raise CodecError(
                f"max_row_codewords is {spec.max_row_codewords}; 'lattice' requires 0."
            )
        if width >= MAX_WIDTH:
            raise CodecError(_too_wide(width))
        visited = (columns != ZERO_COLUMN).sum(axis=1)
        if (bad := np.flatnonzero((grouped < 0) | (grouped > visited))).size:
            raise CodecError(
                f"grouped_columns[{bad[0]}] is {grouped[bad[0]]}; the expert visits "
                f"{visited[bad[0]]} columns, and some of these are grouped."
            )
        if (bad := np.argwhere(dictionaries >= NUM_DICTIONARIES)).size:
            expert, string = bad[0]
            raise CodecError(
                f"dictionaries[{expert}, {string}] is {dictionaries[expert, string]}; there are "
                f"{NUM_DICTIONARIES} dictionaries, 0 to {NUM_DICTIONARIES - 1}."
            )
        used = min(rows, width) % 8
        if used and (bad := np.flatnonzero(leans[:, -1] >> np.uint8(used))).size:
            raise CodecError(
                f"leans[{bad[0]}, -1] is {leans[bad[0], -1]:#04x}; the bits after the last lean "
                f"(from bit {used}) must be zero."
            )
        steps = np.take_along_axis(bases, columns // CLASS_STEPS, axis=1) + columns % CLASS_STEPS
        if (bad := np.argwhere((steps > 255) & (columns != ZERO_COLUMN))).size:
            expert, column = bad[0]
            raise CodecError(
                f"Column {column} of expert {expert} has the step {steps[expert, column]}; steps "
                "end at 255."
            )
        check_offsets("expert_offsets", expert_offsets, words.size, "words")
        sums = lengths.sum(axis=1)
        found = np.diff(expert_offsets)
        if (bad := np.flatnonzero((sums + 3) // 4 != found)).size:
            raise CodecError(
                f"The blocks of expert {bad[0]} have {sums[bad[0]]} bytes, but expert_offsets give "
                f"it {found[bad[0]]} words of 4; the two must agree."
            )
        if found.max(initial=0) >= _MAX_EXPERT_WORDS:
            raise CodecError(too_many_words(int(found.max()), _MAX_EXPERT_WORDS))
        data = words_as_bytes(words)
        for expert in range(experts):
            end = 4 * int(expert_offsets[expert + 1])
            if data[4 * int(expert_offsets[expert]) + int(sums[expert]) : end].any():
                raise CodecError(
                    f"The bytes after the last block of expert {expert} are not zero; they fill "
                    "its last word and must be."
                )
        for expert in range(experts):
            walk = self._walk(coded, expert)
            if (bad := np.flatnonzero(walk.faults)).size:
                raise CodecError(
                    f"Block {bad[0]} of expert {expert} "
                    f"{lattice_blocks.FAULTS[int(walk.faults[bad[0]])]}; its spec requires {rows} "
                    f"rows of {width} weights. The words, the lengths, the columns or the "
                    "dictionaries are damaged, or belong to another tensor."
                )

    def concatenate(self, batches: Sequence[CodedTensor]) -> CodedTensor:
        """Join the arrays; expert offsets are recounted."""
        joined = join_batches(batches)
        joined.arrays["block_lengths"] = _narrow(joined.arrays["block_lengths"])
        return CodedTensor(joined.spec, {name: joined.arrays[name] for name in self.array_names})

    def slice_experts(self, coded: CodedTensor, start: int, stop: int) -> CodedTensor:
        """Slice the arrays (views) and recount expert offsets."""
        offsets = coded.arrays["expert_offsets"][start : stop + 1]
        arrays = {name: coded.arrays[name][start:stop] for name in self.array_names}
        arrays["words"] = coded.arrays["words"][offsets[0] : offsets[-1]]
        arrays["expert_offsets"] = offsets - offsets[0]
        return CodedTensor(dataclasses.replace(coded.spec, num_experts=stop - start), arrays)

    def decode_expert(
        self, spec: TensorSpec, arrays: Mapping[str, Any], expert: Any
    ) -> UInt8[jax.Array, "rows width"]:
        """Expand one expert's blocks with XLA."""

        def own(name: str) -> jax.Array:
            return jnp.take(jnp.asarray(arrays[name]), expert, axis=0, mode="clip")

        stops = jnp.cumsum(own("block_lengths").astype(jnp.int32))
        return self._expand(spec, arrays, expert, stops - own("block_lengths"), stops, 0)[
            : spec.rows
        ]

    def decode_rows(
        self, spec: TensorSpec, arrays: Mapping[str, Any], expert: Any, block: Any
    ) -> UInt8[jax.Array, "32 width"]:
        """Expand one block of an expert's rows alone; rows behind the last are 0.

        Args:
          spec: static.
          arrays: all arrays of the coded tensor.
          expert: its index; may be traced.
          block: index of the block: its rows are 32 block to 32 block + 31; may be traced.
        """
        lengths = jnp.take(jnp.asarray(arrays["block_lengths"]), expert, axis=0, mode="clip")
        stops = jnp.cumsum(lengths.astype(jnp.int32))
        stop = jnp.take(stops, jnp.atleast_1d(block), mode="clip")
        start = stop - jnp.take(lengths, jnp.atleast_1d(block), mode="clip").astype(jnp.int32)
        return self._expand(spec, arrays, expert, start, stop, block)

    def weights(
        self,
        spec: TensorSpec,
        arrays: Mapping[str, Any],
        expert: Any,
        codes: UInt8[jax.Array, "rows width"],
    ) -> Float32[jax.Array, "rows width"]:
        """Weights of one expert's codes: the multiple times the column's step."""
        columns, bases, origin = (
            jnp.take(jnp.asarray(arrays[name]), expert, axis=0, mode="clip")
            for name in ("columns", "bases", "origins")
        )
        index = jnp.take(bases.astype(jnp.int32), columns // CLASS_STEPS, mode="clip")
        index = index + columns % CLASS_STEPS
        steps = origin * jnp.take(jnp.asarray(STEP_TABLE), index, mode="clip")
        return multiples(codes).astype(jnp.float32) * steps

    def decode_numpy_reference(self, coded: CodedTensor) -> UInt8[np.ndarray, "experts rows width"]:
        """Decode all codes in plain Python."""
        return reference_lattice.decode_lattice(coded)

    def symbol_counts(self, coded: CodedTensor) -> Int64[np.ndarray, "symbols"]:
        """Count by walking over the blocks; the tensor must be valid."""
        counts = np.zeros(lattice_blocks.NUM_COUNTED, np.int64)
        for expert in range(coded.spec.num_experts):
            counts += self._walk(coded, expert).counts.sum(axis=0)
        counts[0] += coded.spec.num_weights - counts.sum()
        return counts[: self.num_symbols]

    def code_parts(self, coded: CodedTensor) -> dict[str, int]:
        """Return the bytes of each bit string, of the firsts and of the remainders."""
        sums = np.zeros(len(_PARTS), np.int64)
        for expert in range(coded.spec.num_experts):
            sums += self._walk(coded, expert).part_bytes.sum(axis=0)
        return dict(zip(_PARTS, sums.tolist(), strict=True))

    def _expand(
        self,
        spec: TensorSpec,
        arrays: Mapping[str, Any],
        expert: Any,
        starts: Int32[jax.Array, "blocks"],
        stops: Int32[jax.Array, "blocks"],
        first_block: Any,
    ) -> UInt8[jax.Array, "rows width"]:
        """Expand consecutive blocks of an expert."""
        rows, width = spec.rows, spec.width

        def own(name: str) -> jax.Array:
            return jnp.take(jnp.asarray(arrays[name]), expert, axis=0, mode="clip")

        columns = own("columns")
        order = jnp.argsort(columns, stable=True).astype(jnp.int32)
        numbers = jnp.arange(width, dtype=jnp.int32)
        places = jnp.zeros_like(order).at[order].set(numbers)
        num_visited = (columns != ZERO_COLUMN).sum(dtype=jnp.int32)

        counts = own("schedules").astype(jnp.int32)
        scheduled = jnp.pad(
            jnp.cumsum(counts, axis=1), ((0, 0), (0, 1)), constant_values=_OUT_OF_REACH
        )
        at = jnp.arange(NUM_DICTIONARIES, dtype=jnp.int32)
        plain = jnp.where(at >= own("dictionaries").astype(jnp.int32)[:, None], _OUT_OF_REACH, 0)

        leans = own("leans")
        by_row = jnp.zeros(starts.shape, jnp.uint32)
        by_column = jnp.zeros(width, jnp.uint32)
        if 0 < rows < width:
            index = 4 * (first_block + jnp.arange(starts.shape[0], dtype=jnp.int32))
            four = index[:, None] + jnp.arange(4, dtype=jnp.int32)
            bytes_ = jnp.take(leans, four, mode="fill", fill_value=0).astype(jnp.uint32)
            by_row = (bytes_ << jnp.arange(0, 32, 8, dtype=jnp.uint32)).sum(
                axis=1, dtype=jnp.uint32
            )
        elif rows:
            bits = jnp.take(leans, numbers >> 3, mode="clip") >> (numbers & 7).astype(jnp.uint8)
            by_column = -(bits & jnp.uint8(1)).astype(jnp.uint32)
        strings = LatticeStrings(
            words=jnp.asarray(arrays["words"]),
            starts=starts.astype(jnp.int32),
            stops=stops,
            first_word=own("expert_offsets"),
            ends=jnp.zeros((NUM_STRINGS, NUM_DICTIONARIES), jnp.int32)
            .at[jnp.array(_SCHEDULED)]
            .set(scheduled)
            .at[jnp.array(_PLAIN)]
            .set(plain),
            table=jnp.asarray(lattice_dictionaries().table),
        )
        num_grouped = jnp.clip(own("grouped_columns"), 0, num_visited)
        return expand_blocks(strings, places, num_visited, num_grouped, by_row, by_column)

    def _walk(self, coded: CodedTensor, expert: int) -> lattice_blocks.BlockWalk:
        spec, arrays = coded.spec, coded.arrays
        lengths = arrays["block_lengths"][expert].astype(np.int64)
        stops = 4 * int(arrays["expert_offsets"][expert]) + np.cumsum(lengths)
        shorter = min(spec.rows, spec.width)
        lean = np.unpackbits(arrays["leans"][expert], count=shorter, bitorder="little")
        strings = Strings(
            order_of(arrays["columns"][expert]),
            int(arrays["grouped_columns"][expert]),
            *_leans_of(lean, spec.rows, spec.width),
            _ends(arrays["schedules"][expert], arrays["dictionaries"][expert]),
        )
        data = words_as_bytes(arrays["words"])
        return lattice_blocks.walk_blocks(data, stops - lengths, stops, spec.rows, strings)


def _lean_bytes(rows: int, width: int) -> int:
    return -(-min(rows, width) // 8)


def _leans_of(
    lean: UInt8[np.ndarray, "shorter"], rows: int, width: int
) -> tuple[UInt8[np.ndarray, "rows"], UInt8[np.ndarray, "width"]]:
    """Leans of rows and of columns: one of the two has none."""
    if rows < width:
        return lean, np.zeros(width, np.uint8)
    return np.zeros(rows, np.uint8), lean


def _ends(
    schedules: np.ndarray, dictionaries: np.ndarray
) -> Int64[np.ndarray, "strings dictionaries"]:
    """`Strings.ends` of the stored schedules and dictionaries."""
    ends = np.zeros((NUM_STRINGS, NUM_DICTIONARIES), np.int64)
    ends[_SCHEDULED, :-1] = np.cumsum(schedules, axis=1, dtype=np.int64)
    ends[_SCHEDULED, -1] = _OUT_OF_REACH
    for string, dictionary in zip(_PLAIN, dictionaries.tolist(), strict=True):
        ends[string, dictionary:] = _OUT_OF_REACH
    return ends


def _narrow(block_lengths: np.ndarray) -> np.ndarray:
    """Block lengths as uint16 if all fit, else uint32."""
    longest = int(block_lengths.max(initial=0))
    return block_lengths.astype(np.uint16 if longest < 2**16 else np.uint32)


def _check_origins(origins: Float32[np.ndarray, "experts"]) -> None:
    bad = np.flatnonzero(~((origins >= 0) & (origins <= MAX_ORIGIN)))
    if bad.size:
        raise CodecError(
            f"The origin of expert {bad[0]} is {origins[bad[0]]}; an origin is at least 0 and at "
            f"most 2^119. Quantize the tensor again, from finite weights."
        )


def _too_wide(width: int) -> str:
    return (
        f"A row has {width} weights; 'lattice' requires fewer than {MAX_WIDTH}. Split the rows "
        "over several coded tensors by columns."
    )
