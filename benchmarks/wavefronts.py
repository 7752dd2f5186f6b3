"""Predicts times of the lattice's product kernel on a GPU. Needs no GPU; not measured on one.

Codes are read as the kernel reads them: how often each part of its walk runs, how many turns the
loops of a warp take (as many as its busiest lane), and on which banks of shared memory the lanes'
accesses lie, by the addresses that the kernel's formulas give. With the instructions of each part
from the machine code (`kernel_sass.py`) that makes instructions and wavefronts of shared memory a
column of 32 rows, and a time.

    python benchmarks/wavefronts.py [--tokens 1 4] [--json FILE]

Assumed of the GPU, an H200: 132 multiprocessors at 1.755 GHz with four schedulers, which issue in
62 % of the cycles, and a shared-memory pipe that is busy in 85 %: what `tunstall` was measured at.
A wavefront is a cycle of that pipe; so is a shuffle. Atomic ORs of lanes to one word follow one
another. Tensor cores take 8 cycles of a scheduler for a product of 16x8x16. The greatest of the
three times counts. Codes are random ones of `gpu_bench.random_codes`, or those of made layers that
GPTQ quantizes (--made).

Needs NVRTC and a disassembler: pip install nvidia-cuda-nvrtc nvidia-cuda-nvdisasm
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpu_bench
import kernel_sass
import numpy as np
from jaxtyping import Bool, Int64, UInt8

from qmoe_jax.atomic_file import write_json
from qmoe_jax.codec.coding_lattice import LatticeCoding
from qmoe_jax.codec.encode import encode
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
)
from qmoe_jax.codec.lattice_choices import ZERO_COLUMN
from qmoe_jax.codec.lattice_dictionaries import RAW_DICTIONARY, lattice_dictionaries
from qmoe_jax.codec.tensor import CodedTensor
from qmoe_jax.formatting import format_row
from qmoe_jax.ops.cuda import kernels

RESULTS = Path(__file__).parent / "results" / "kernels.json"
TASK = 256
PROCESSORS, CLOCK, SCHEDULERS = 132, 1.755e9, 4
ISSUE_SHARE, PIPE_SHARE, PRODUCT_CYCLES = 0.62, 0.85, 8
_MOST = 32
"""Tokens that share a decode."""
BLOCKS = 4
"""Blocks of 32 rows that are read, spread over the expert."""
# Wavefronts of accesses whose addresses do not depend on codes: 32 columns' digits zeroed (8) and
# loaded (8), and tokens of one (4); shuffles of a scan, and of what it ends with.
_COLUMN_WAVEFRONTS, _SCAN_SHUFFLES = 20, 6


@dataclasses.dataclass
class Work:
    """What warps do, summed over the blocks that were read."""

    columns: int = 0
    """Visited columns."""
    rounds_of_128: int = 0
    rounds_of_32: int = 0
    raw_words: int = 0
    grouped_columns: int = 0
    dealt_words: int = 0
    dealt_turns: int = 0
    columns_of_32: int = 0
    turns: int = 0
    turns_of_third: int = 0
    more_digits: int = 0
    tasks: int = 0
    wavefronts: float = 0.0
    """Of shared memory, shuffles among them."""

    def instructions(self, parts: kernel_sass.LatticeParts) -> dict[str, float]:
        """Warp instructions a visited column, by part."""
        times = {
            "strings to bits": self.rounds_of_128 * parts.round_of_128
            + self.rounds_of_32 * parts.round_of_32
            + self.raw_words * parts.raw_words,
            "grouped columns": self.grouped_columns * parts.grouped_columns,
            "planes 3 and 4": self.dealt_words * parts.dealt_words
            + self.dealt_turns * parts.dealt_turn,
            "bits to digits": self.turns * parts.turn + self.turns_of_third * parts.turn_of_third,
            "windows and product": self.columns_of_32 * parts.columns,
            "second digits": self.more_digits * parts.more_digits,
            "once a task": self.tasks * parts.task,
        }
        return {name: count / self.columns for name, count in times.items()}


@dataclasses.dataclass(frozen=True)
class Expert:
    """One expert's codes, and how they are stored."""

    coded: CodedTensor
    magnitudes: UInt8[np.ndarray, "rows visited"]
    """In the order of visits."""
    grouped: int

    @classmethod
    def of(cls, codes: UInt8[np.ndarray, "1 rows width"], levels: Any) -> "Expert":
        """Encode an expert."""
        coded = encode(codes, levels, "lattice")
        columns = coded.arrays["columns"][0]
        order = np.argsort(columns, kind="stable")[: (columns != ZERO_COLUMN).sum()]
        magnitudes = ((codes[0].astype(np.int16) + 1) // 2)[:, order].astype(np.uint8)
        return cls(coded, magnitudes, int(coded.arrays["grouped_columns"][0]))

    def tasks(self) -> Iterator[slice]:
        """Visited columns of each task."""
        visited = self.magnitudes.shape[1]
        for first, last in ((0, self.grouped), (self.grouped, visited)):
            for begin in range(first, last, TASK):
                yield slice(begin, min(begin + TASK, last))

    def strings(self, block: int) -> list[UInt8[np.ndarray, "codewords"]]:
        """The codewords of each string of a block."""
        arrays = self.coded.arrays
        parts = LatticeCoding()._walk(self.coded, 0).part_bytes
        at = int(arrays["block_lengths"][0, :block].sum(dtype=np.int64))
        data = arrays["words"].view(np.uint8)
        found = []
        for string in range(NUM_STRINGS):
            if string == RESTS:  # the firsts lie before
                at += int(parts[block, NUM_STRINGS])
            size = int(parts[block, string])
            found.append(data[at : at + size])
            at += size
        return found

    def dictionaries(self, string: int, count: int) -> Int64[np.ndarray, "codewords"]:
        """The dictionary of each codeword of a string."""
        arrays, scheduled = self.coded.arrays, {FLAGS: 0, PLANE_1: 1, PLANE_2: 2}
        if string in scheduled:
            ends = np.cumsum(arrays["schedules"][0, scheduled[string]], dtype=np.int64)
            return np.searchsorted(ends, np.arange(count), side="right")
        plain = {RESTS: 0, PLANE_3: 1, PLANE_4: 2, SIGNS: 3}[string]
        return np.full(count, arrays["dictionaries"][0, plain], np.int64)


def bank_conflicts(
    words: Int64[np.ndarray, "accesses lanes"],
    active: Bool[np.ndarray, "accesses lanes"],
    banks: int = 32,
    *,
    atomic: bool = False,
) -> Int64[np.ndarray, "accesses"]:
    """Wavefronts of accesses: the most words that lie in one bank.

    Args:
      words: what each lane accesses, by number; a word lies in bank number mod `banks`.
      active: lanes that take part.
      banks: 16 for words of 64 bits.
      atomic: lanes with the same word follow one another too.
    """
    most = np.zeros(len(words), np.int64)
    for place, (own, present) in enumerate(zip(words, active, strict=True)):
        found = own[present] if atomic else np.unique(own[present])
        if found.size:
            most[place] = np.bincount(found % banks).max()
    return most


def read(expert: Expert) -> Work:
    """Follow the kernel over some blocks of an expert."""
    work = Work()
    blocks = -(-expert.magnitudes.shape[0] // BLOCK_ROWS)
    for block in np.unique(np.linspace(0, blocks - 1, BLOCKS).astype(int)):
        _read_block(expert, int(block), work)
    return work


def _read_block(expert: Expert, block: int, work: Work) -> None:
    own = expert.magnitudes[BLOCK_ROWS * block : BLOCK_ROWS * (block + 1)]
    own = np.pad(own, ((0, BLOCK_ROWS - len(own)), (0, 0)))
    strings = [_String(expert, number, data) for number, data in enumerate(expert.strings(block))]
    for task in expert.tasks():
        weights = own[:, task]
        grouped = task.start < expert.grouped
        columns = weights.shape[1]
        work.tasks += 1
        work.columns += columns
        ones = weights.T[weights.T != 0]  # magnitudes, in the order of their bits
        large = ones >= 2
        thirds = int((ones >= 3).sum())
        if grouped:
            groups = weights.reshape(4, 8, columns) != 0
            flags = groups.any(axis=1)
            rests = int((7 - groups.argmax(axis=1))[flags].sum())
            strings[FLAGS].take(4 * columns, 4, work)
            strings[RESTS].take(rests, 4, work)
            work.grouped_columns += -(-columns // 32)
            work.wavefronts += -(-columns // 32) * (2 * _SCAN_SHUFFLES + 8)
        else:
            strings[PLANE_1].take(32 * columns, 4, work)
        strings[SIGNS].take(len(ones), 4, work)
        strings[PLANE_2].take(len(ones), 4, work)
        strings[PLANE_3].take(int(large.sum()), 1, work)
        strings[PLANE_4].take(thirds, 1, work)
        if thirds:
            _deal(large, ones >= 3, work)
            if (ones >= 4).any():
                _deal(ones >= 3, ones >= 4, work)
        _read_columns(weights, work)


def _deal(mask: np.ndarray, bits: np.ndarray, work: Work) -> None:
    """`deal_string`: a lane a word of 32 bits; a turn for each one up to the last with a bit."""
    words = 32 * (-(-(len(mask) // 32 + 2) // 32))
    mask, bits = (np.pad(a, (0, 32 * words - len(a))).reshape(-1, 32, 32) for a in (mask, bits))
    ranks = np.cumsum(mask, axis=-1) * bits
    work.dealt_words += len(mask)
    work.dealt_turns += int(ranks.max(axis=(1, 2)).sum())
    work.wavefronts += len(mask) * (_SCAN_SHUFFLES + 5)


def _read_columns(weights: np.ndarray, work: Work) -> None:
    before = 0
    for first in range(0, weights.shape[1], 32):
        own = weights[:, first : first + 32] != 0
        counts = own.sum(axis=0)
        turns = int(counts.max(initial=0))
        work.columns_of_32 += 1
        if (weights[:, first : first + 32] >= 3).any():
            work.turns_of_third += turns
        else:
            work.turns += turns
        work.more_digits += bool((weights[:, first : first + 32] >= 4).any())
        # Windows of two strings, two words each.
        words = (before + np.cumsum(counts) - counts)[None] // 32
        windows = bank_conflicts(np.concatenate([words, words + 1]), np.ones((2, words.size), bool))
        before += int(counts.sum())
        # Digits: bytes of a row of 32, a column a lane.
        rows = np.argsort(~own, axis=0, kind="stable")[:turns]
        active = np.arange(turns)[:, None] < counts
        places = (32 * rows + np.arange(own.shape[1])) // 4
        stores = bank_conflicts(places, active)
        work.wavefronts += (
            2 * windows.sum() + stores.sum() + _COLUMN_WAVEFRONTS + _SCAN_SHUFFLES + 1
        )


class _String:
    """A block's string, read task by task."""

    def __init__(self, expert: Expert, number: int, codewords: UInt8[np.ndarray, "codewords"]):
        self._dictionaries = expert.dictionaries(number, len(codewords))
        table = lattice_dictionaries().table[self._dictionaries, codewords]
        self._lengths = (table[:, 0] & 255).astype(np.int64)
        self._zeros = (table[:, 0] >> 8 & 255).astype(np.int64)
        self._ends = np.cumsum(self._lengths)
        self._entries = 256 * self._dictionaries + codewords
        self._is_raw = number == SIGNS and bool((self._dictionaries == RAW_DICTIONARY).all())
        self._at = 0  # bits

    def take(self, bits: int, per_lane: int, work: Work) -> None:
        """Read so many bits."""
        if bits == 0:
            return
        first = int(np.searchsorted(self._ends, self._at, side="right"))
        self._at += bits
        last = int(np.searchsorted(self._ends, self._at, side="left"))
        if self._is_raw:
            turns = -(-bits // 1024)
            work.raw_words += turns
            work.wavefronts += turns
            return
        count = last + 1 - first
        rounds = -(-count // (32 * per_lane))
        if per_lane == 4:
            work.rounds_of_128 += rounds
        else:
            work.rounds_of_32 += rounds
        work.wavefronts += rounds * (_SCAN_SHUFFLES + 1)
        # What lies beyond the codewords is looked up as well: the string's last, in its place.
        places = first + np.arange(rounds * 32 * per_lane)
        exists = places <= last
        places = np.minimum(places, len(self._entries) - 1)
        shape = (rounds, 32, per_lane)
        entries = self._entries[places].reshape(shape).transpose(0, 2, 1).reshape(-1, 16)
        work.wavefronts += bank_conflicts(entries, np.ones(entries.shape, bool), 16).sum()
        begins = self._ends[places] - self._lengths[places] + self._zeros[places]
        words = begins.reshape(shape).transpose(0, 2, 1).reshape(-1, 32) // 32
        active = exists.reshape(shape).transpose(0, 2, 1).reshape(-1, 32)
        work.wavefronts += 2 * bank_conflicts(words, active, atomic=True).sum()


def seconds(instructions: float, wavefronts: float, products: float = 0) -> float:
    """Time of so many warp instructions, wavefronts and products 16x8x16 on all processors."""
    issue = instructions / (SCHEDULERS * ISSUE_SHARE)
    tensor = products * PRODUCT_CYCLES / SCHEDULERS
    return max(issue, wavefronts / PIPE_SHARE, tensor) / (PROCESSORS * CLOCK)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[1, 4, 16, 64], choices=(1, 2, 4, 8, 16, 32, 64)
    )
    parser.add_argument("--architecture", type=int, default=90)
    parser.add_argument("--made", action="store_true", help="codes of made layers, by GPTQ")
    parser.add_argument("--disassembler", help="path of nvdisasm; default: wheel, then PATH")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    disassembler = options.disassembler or kernel_sass.find_disassembler()
    if kernel_sass.nvrtc.find_library() is None or disassembler is None:
        parser.error("pip install nvidia-cuda-nvrtc nvidia-cuda-nvdisasm")
    measured = json.loads(RESULTS.read_text())["products"]
    gpu = (options.architecture, disassembler)
    parts = {t: kernel_sass.lattice_parts(min(t, _MOST), *gpu) for t in options.tokens}
    staging = kernel_sass.staging_instructions(*gpu)
    results = []
    print("One product, 64 experts; not run on a GPU. Instructions and wavefronts are a column's.")
    header = ("shape", "tokens", "instructions", "wavefronts", "microseconds", "cuBLAS")
    sizes = (10, 6, 12, 10, 12, 6)
    for shape, expert in _experts(options.made):
        work = read(expert)
        blocks = 64 * -(-shape[0] // BLOCK_ROWS)
        columns = blocks * expert.magnitudes.shape[1]
        print("\n" + format_row(header, sizes))
        for tokens in options.tokens:
            each = work.instructions(parts[tokens])
            tile = min(tokens, _MOST)
            if tokens > 8:  # all warps of a block share what they stage
                warps = kernels.matmul_kernels("lattice").threads(shape[0]) // 32
                each["tokens"] = staging * tile / 8 / 32 / warps
            decoded = columns * tokens // tile
            # Of halves of rows and columns, for three parts: side by side if there is room.
            products = 4 * max(1, -(-3 * tile // 8)) / 32
            time = seconds(
                decoded * sum(each.values()),
                decoded * (work.wavefronts / work.columns + (tile > 8) * 4 * 3 * tile / 8 / 32),
                decoded * products,
            )
            name = f"{shape[0]}x{shape[1]}"
            dense = [
                p["cublas_seconds"]
                for p in measured
                if (p["shape"], p["experts"], p["tokens"]) == (list(shape), 64, tokens)
            ]
            row = (name, str(tokens), f"{sum(each.values()):.1f}")
            row = (*row, f"{work.wavefronts / work.columns:.1f}", f"{time * 1e6:.0f}")
            print(format_row((*row, f"{dense[0] * 1e6:.0f}" if dense else "-"), sizes))
            print("  " + ", ".join(f"{part} {count:.1f}" for part, count in each.items()))
            results.append({"shape": shape, "tokens": tokens, "seconds": time, **each})
    if options.json:
        write_json(options.json, results)


def _experts(made: bool) -> Iterator[tuple[tuple[int, int], Expert]]:
    """An expert of each shape, rows x width."""
    if made:
        from real_codes import made_kernels

        for kernel in made_kernels(["lattice"], 1):
            yield kernel.codes.shape[1:], Expert.of(kernel.codes, kernel.levels)
        return
    for shape in gpu_bench.SHAPES:
        yield shape, Expert.of(*gpu_bench.random_codes("lattice", (1, *shape)))


if __name__ == "__main__":
    sys.exit(main())
