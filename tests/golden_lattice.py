"""Writes the golden files of the "lattice" coding into a folder.

    python tests/golden_lattice.py tests/golden/codec

Not a test module; test_codec_golden.py tests the files, and that this writes them. `valid_*` are
what the encoder writes; `readable_*` are valid, but no encoder of ours writes them; each `broken_*`
breaks one rule of FORMAT.md.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from qmoe_jax.codec import codings, encode, lattice_blocks, lattice_choices
from qmoe_jax.codec.lattice_dictionaries import NUM_DICTIONARIES, RAW_DICTIONARY
from qmoe_jax.codec.tensor import CodedTensor, TensorSpec

Arrays = dict[str, np.ndarray]


def sample_codes(experts: int, rows: int, width: int, seed: int) -> np.ndarray:
    """Codes with sparse, dense and zero columns, and some of every magnitude that has a rule."""
    rng = np.random.default_rng(seed)
    scales = np.exp(rng.normal(-1.0, 1.2, (experts, 1, width)))
    multiples = np.rint(rng.standard_normal((experts, rows, width)) * scales)
    multiples[:, :, 1] = 0
    multiples[0, 0, :6] = 127, 0, -127, 4, -4, 3
    multiples = multiples.astype(int)
    return np.where(multiples < 0, -2 * multiples - 1, 2 * multiples).astype(np.uint8)


def sample_levels(codes: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Steps that no eight classes of 32 neighbours have, in expert 0."""
    rng = np.random.default_rng(seed)
    steps = rng.integers(60, 90, (codes.shape[0], codes.shape[2]))
    steps[0] = np.linspace(0, 254, codes.shape[2])
    origins = rng.uniform(0.01, 0.02, codes.shape[0])
    return {"step_index": steps.astype(np.uint8), "origin": origins.astype(np.float32)}


def encoded(rows: int, width: int) -> tuple[CodedTensor, np.ndarray]:
    """A tensor as the encoder writes it."""
    codes = sample_codes(2, rows, width, 0)
    return encode.encode(codes, sample_levels(codes, 1), "lattice"), codes


def with_choices(
    rows: int,
    width: int,
    dictionaries: tuple[int, ...],
    schedules: np.ndarray,
    wide: bool,
    grouped: int,
) -> tuple[CodedTensor, np.ndarray]:
    """A tensor of one expert with choices that an encoder would not make.

    All columns are visited, from the last to the first, zero or not; leans are 1, 0, 1, 0, ...
    """
    codes = sample_codes(1, rows, width, 2)
    order = np.arange(width, dtype=np.int32)[::-1]
    lean = (np.arange(min(rows, width)) % 2 == 0).astype(np.uint8)
    none = np.zeros(max(rows, width), np.uint8)
    ends = np.zeros((lattice_blocks.NUM_STRINGS, NUM_DICTIONARIES), np.int64)
    ends[[0, 2, 3], :-1] = np.cumsum(schedules, axis=1)
    ends[[0, 2, 3], -1] = 2**30
    for string, dictionary in zip((1, 4, 5, 6), dictionaries, strict=True):
        ends[string, dictionary:] = 2**30
    strings = lattice_blocks.Strings(
        order,
        grouped,
        lean if rows < width else none[:rows],
        none[:width] if rows < width else lean,
        ends,
    )
    data, lengths = lattice_blocks.encode_blocks(codes[0], strings)
    padded = np.concatenate([data, np.zeros(-len(data) % 4, np.uint8)])
    arrays = {
        "words": padded.view("<u4").astype(np.uint32),
        "expert_offsets": np.array([0, len(padded) // 4], np.int32),
        "block_lengths": lengths[None].astype(np.uint32 if wide else np.uint16),
        "grouped_columns": np.array([grouped], np.int32),
        "schedules": schedules[None].astype(np.uint16),
        "dictionaries": np.array([dictionaries], np.uint8),
        "leans": np.packbits(lean, bitorder="little")[None],
        "columns": np.arange(width, dtype=np.uint8)[::-1][None],
        "bases": np.array([[7, 200, 1, 2, 3, 4, 5, 225]], np.uint8),
        "origins": np.array([0.0], np.float32),
    }
    return CodedTensor(TensorSpec("lattice", 1, rows, width), arrays), codes


def ended(rows: int, width: int) -> tuple[CodedTensor, np.ndarray]:
    """Schedules that end before the codewords of some blocks do, as our encoder wrote them once."""
    with _ending():
        return encoded(rows, width)


def _ending() -> Any:
    return mock.patch.object(lattice_choices, "_without_end", lambda schedules: schedules)


def raw(grouped: int = 0) -> tuple[CodedTensor, np.ndarray]:
    """All strings as plain bits."""
    schedules = np.zeros((3, 15), np.int64)
    schedules[:, RAW_DICTIONARY] = 2**16 - 1
    return with_choices(9, 37, (RAW_DICTIONARY,) * 4, schedules, wide=False, grouped=grouped)


def readable() -> Iterator[tuple[str, CodedTensor, np.ndarray]]:
    """Valid files that no encoder of ours writes."""
    yield "raw", *raw()
    yield "ended_schedules", *ended(9, 37)
    schedules = np.arange(45).reshape(3, 15) % 4
    odd = (9, 0, 15, 3)
    yield "odd_choices", *with_choices(70, 21, odd, schedules, wide=True, grouped=13)
    yield "all_grouped", *with_choices(33, 7, odd, schedules, wide=False, grouped=7)
    codes = np.zeros((2, 33, 5), np.uint8)
    levels = {"step_index": np.zeros((2, 5), np.uint8), "origin": np.zeros(2, np.float32)}
    with _ending():
        yield "zeros", encode.encode(codes, levels, "lattice"), codes


def _bytes(arrays: Arrays) -> np.ndarray:
    """The stored bytes, to be changed in place."""
    return arrays["words"].view(np.uint8)


def broken() -> Iterator[tuple[str, CodedTensor]]:
    """Files that break one rule each."""

    def change(
        name: str, base: CodedTensor, damage: Callable[[Arrays], Any], **spec: int
    ) -> tuple[str, CodedTensor]:
        arrays = {key: array.copy() for key, array in base.arrays.items()}
        damage(arrays)
        fields = base.spec.to_json() | spec
        return name, CodedTensor(TensorSpec.from_json(fields), arrays)

    valid, plain = encoded(40, 23)[0], raw()[0]
    first = int(valid.arrays["block_lengths"][0, 0])
    plane = 37 * 4  # bytes of plane 1 of the raw tensor

    def put(key: str, index: Any, value: Any) -> Callable[[Arrays], Any]:
        return lambda arrays: arrays[key].__setitem__(index, value)

    yield change("row_bound", valid, lambda arrays: None, max_row_codewords=32)
    yield change("negative_origin", valid, put("origins", 1, -1))
    yield change("nan_origin", valid, put("origins", 0, np.nan))
    yield change("large_origin", valid, put("origins", 0, 1e36))
    yield change("dictionary", valid, put("dictionaries", (1, 2), 16))
    yield change("grouped_columns", valid, put("grouped_columns", 1, 24))
    yield change("negative_grouped_columns", valid, put("grouped_columns", 0, -1))
    yield change("step", plain, put("bases", (0, 1), 252))
    yield change("lean_filler", valid, put("leans", (1, 2), 0x80))
    yield change("first_offset", valid, put("expert_offsets", 0, 1))
    yield change("falling_offsets", valid, put("expert_offsets", 1, 2**30))
    yield change("truncated", valid, lambda arrays: arrays.update(words=arrays["words"][:-1]))
    yield change("block_sizes", valid, put("block_lengths", (0, 0), first + 8))
    yield change("word_filler", plain, lambda arrays: _bytes(arrays).__setitem__(-1, 1))

    def move(arrays: Arrays) -> None:
        arrays["block_lengths"][0] += np.array([1, -1]).astype(np.uint16)

    yield change("block_boundary", valid, move)

    def cut(arrays: Arrays) -> None:
        arrays["words"] = arrays["words"][: plane // 8]
        arrays["expert_offsets"][-1] = plane // 8
        arrays["block_lengths"][0, -1] = plane // 8 * 4

    yield change("block_too_short", plain, cut)

    def lengthen(arrays: Arrays) -> None:
        arrays["words"] = np.append(arrays["words"], np.uint32(0))
        arrays["expert_offsets"][-1] += 1
        arrays["block_lengths"][0, -1] += 4

    yield change("block_too_long", plain, lengthen)
    remainders = int((raw()[1] > 6).sum())
    end = int(plain.arrays["block_lengths"][0, 0]) - remainders

    def overrun(arrays: Arrays) -> None:
        _bytes(arrays)[end - 1] |= 1  # the last codeword of the signs; their number is no multiple

    yield change("one_after_the_end", plain, overrun)

    def exceed(arrays: Arrays) -> None:
        _bytes(arrays)[end] = 124

    yield change("remainder", plain, exceed)

    grouped = raw(35)[0]

    def fill(arrays: Arrays) -> None:
        data = _bytes(arrays)
        num_flags = int(np.bitwise_count(data[:18]).sum())  # 4 * 35 bits
        assert num_flags % 8
        data[18 + (3 * num_flags - 1) // 8] |= 0x80

    yield change("firsts_filler", grouped, fill)

    # Where the strings of the block end, from behind; the number of their bits is no multiple of 8.
    codes = raw(35)[1]
    magnitudes = (codes.astype(int) + 1) // 2
    several = [int((magnitudes >= least).sum()) for least in (1, 2, 3)]
    ends, place = {}, int(grouped.arrays["block_lengths"][0, 0]) - int((magnitudes > 3).sum())
    place -= -(-several[0] // 8)
    for name, count in (("plane_4", several[2]), ("plane_3", several[1]), ("plane_2", several[0])):
        assert count % 8
        ends[name], place = place, place - -(-count // 8)
    ends["rests"], ends["flags"] = place - 4 * 2, 18  # 37 columns, 35 of them grouped

    def mark(end: int) -> Callable[[Arrays], Any]:
        return lambda arrays: _bytes(arrays).__setitem__(end - 1, _bytes(arrays)[end - 1] | 1)

    for name, end in ends.items():
        yield change(f"one_after_the_end_of_{name}", grouped, mark(end))

    def beyond_in_group(arrays: Arrays) -> None:
        """A weight in row 9 of nine: of the second group, whose first weight is in row 8."""
        data = _bytes(arrays)
        flags = np.unpackbits(data[:18])[:140].nonzero()[0]
        number = int.from_bytes(data[18 : 18 + -(-3 * flags.size // 8)].tobytes(), "little")
        firsts = [number >> 3 * i & 7 for i in range(flags.size)]
        chosen = int((flags % 4 == 1).argmax())
        assert firsts[chosen] == 0
        bit = 8 * (18 + -(-3 * flags.size // 8)) + sum(7 - first for first in firsts[:chosen])
        data[bit // 8] |= 0x80 >> bit % 8

    yield change("row_beyond_in_a_group", grouped, beyond_in_group)

    def beyond(arrays: Arrays) -> None:
        data = _bytes(arrays)
        for place in range(0, plane, 4):  # of a column the first eight rows, then the ninth, ...
            if data[place]:
                data[place] &= data[place] - 1
                data[place + 3] = 1
                return

    yield change("row_beyond", plain, beyond)
    yield change(
        "block_lengths_dtype",
        valid,
        lambda arrays: arrays.update(block_lengths=arrays["block_lengths"].astype(np.uint8)),
    )


def to_json(coded: CodedTensor, codes: np.ndarray | None = None) -> str:
    """The file's contents."""
    arrays = {
        name: {"dtype": array.dtype.name, "shape": array.shape, "bytes": array.tobytes().hex()}
        for name, array in coded.arrays.items()
    }
    document: dict[str, Any] = {"spec": coded.spec.to_json(), "arrays": arrays}
    if codes is not None:
        document["codes"] = codes.reshape(-1, codes.shape[2]).tolist()
    return json.dumps(document) + "\n"


def files() -> Iterator[tuple[str, str]]:
    """Name and contents of every file."""
    yield "valid_lattice", to_json(*encoded(40, 23))
    yield "valid_lattice_row_leans", to_json(*encoded(9, 37))
    for name, coded, codes in readable():
        yield f"readable_lattice_{name}", to_json(coded, codes)
    for name, coded in broken():
        yield f"broken_lattice_{name}", to_json(coded)


def main(folder: str) -> None:
    """Writes all files; prints the rows of the README's table."""
    for name, content in files():
        Path(folder, f"{name}.json").write_text(content, "utf-8")
    for name, coded in broken():
        try:
            codings.validate(coded)
        except Exception as error:
            print(f"| `broken_lattice_{name}.json` | {error} |")
        else:
            raise SystemExit(f"broken_lattice_{name} is accepted")


if __name__ == "__main__":
    main(sys.argv[1])
