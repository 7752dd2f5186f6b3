"""Predicts the CUDA kernels' instruction counts from their machine code. Needs no GPU.

Every coding's walk over a row is compiled with NVRTC for one number of tokens at a time and
disassembled, and its loop over rounds is found. Printed are the warp instructions of a round that
are always executed, those that hang on a branch (rare entries, escapes), and the former divided by
the weights that a round decodes, at a zero share and row widths. Of "lattice", whose walk has many
loops, the instructions of each part are printed; `wavefronts.py` says how often it runs. Registers
and spills are those of the shipped kernels.

    python benchmarks/kernel_sass.py --json benchmarks/results/kernel_sass.json

Needs NVRTC and a disassembler: pip install nvidia-cuda-nvrtc nvidia-cuda-nvdisasm
"""

import argparse
import importlib.util
import itertools
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from qmoe_jax.atomic_file import write_json
from qmoe_jax.codec.dictionary import dictionary
from qmoe_jax.codec.encode import encode
from qmoe_jax.codec.tunstall import ZERO_WEIGHTS, choose_dictionary, tunstall_family
from qmoe_jax.formatting import format_row

KERNEL_FOLDER = Path(__file__).resolve().parents[1] / "kernels_cuda"
_SPEC = importlib.util.spec_from_file_location("nvrtc", KERNEL_FOLDER / "nvrtc.py")
assert _SPEC is not None
assert _SPEC.loader is not None
nvrtc = sys.modules.setdefault("nvrtc", importlib.util.module_from_spec(_SPEC))
_SPEC.loader.exec_module(nvrtc)

WIDTHS = (768, 3072, 6144)
# Characters of the columns of the two tables.
WALK_COLUMNS = (20, 4, 6, 6, 6, 12)
KERNEL_COLUMNS = (32, 4, 9, 13)

# A kernel of one number of tokens, so that its cubin has one loop over rounds.
_PROBE = """
#include "coding_{header}.cuh"
#include "multiply.cuh"
using namespace qmoe;
extern "C" __global__ void __launch_bounds__(256)
    probe(const {arrays} arrays, const ProductArguments product) {{
  {type} coding(arrays);
  const Shape shape = {{product.num_experts, product.out_features, product.in_features}};
  const int expert = product.token_experts[blockIdx.x], row = blockIdx.y * product.rows_per_block;
  coding.open(shape, expert, shared_begin(), product.dictionary_copies);
  const Tile tile = {{expert, static_cast<int>(blockIdx.x), product.num_tokens, row,
                      min_of(row + product.rows_per_block, shape.out_features)}};
  multiply_tile<{type}, {tokens}>(coding, shape, product, tile);
}}
"""


_LATTICE_PROBE = """
#include "lattice_products.cuh"
using namespace qmoe;
extern "C" __global__ void __launch_bounds__(256, 2)
    probe(const LatticeArrays arrays, const Shape shape, u32 stride, u32 tasks, float* out) {{
  const LatticeExpert expert(arrays, shape, blockIdx.x);
  const u32 ends = shared_begin() + LATTICE_DICTIONARY_BYTES, scratch = ends + LATTICE_ENDS_BYTES;
  const LatticeDictionary dictionary = {{shared_begin() + 8 * threadIdx.x, stride}};
  LatticeProducts<{tokens}, {added}> products(expert, scratch + VISITOR_AT);
  products.columns = scratch + LATTICE_WARP_BYTES;
  for (u32 task = 0; task < tasks; ++task)
    decode_task(arrays, expert, shape, dictionary, ends, scratch, blockIdx.y, task, products);
  float total = 0;
  for (const auto& half : products.sums)
    for (const auto& tile : half)
      for (const float sum : tile) total += sum;
  out[threadIdx.x] = total;
}}
"""


class Walk(NamedTuple):
    """A way to walk over rows."""

    name: str
    header: str
    type: str
    marker: str
    """An instruction that only the loop over rounds has."""
    lanes: int
    per_lane: int


WALKS = (
    Walk("tunstall rows4", "tunstall", "TunstallCoding<8, 4, false>", "IDP", 8, 4),
    Walk("tunstall rows1", "tunstall", "TunstallCoding<32, 4, false>", "IDP", 32, 4),
    Walk("tunstall_2bit rows4", "tunstall", "TunstallCoding<8, 4, true>", "IDP", 8, 4),
    Walk("tunstall_2bit rows1", "tunstall", "TunstallCoding<32, 4, true>", "IDP", 32, 4),
    Walk("qmoe", "qmoe", "QmoeCoding", "SHFL.IDX", 32, 1),
    Walk("packed2", "packed2", "Packed2Coding", "LDG.E.U8", 32, 4),
)


class Loop(NamedTuple):
    """Instructions of a loop's body."""

    always: int
    branched: int
    """Those that a branch may skip, without those of loops inside."""
    inner: tuple[int, ...]
    """Sizes of the loops inside."""


class LatticeParts(NamedTuple):
    """Warp instructions of each part of the lattice's walk that are nearly always executed."""

    round_of_128: int
    """Four codewords a lane, of a bit string."""
    round_of_32: int
    """One codeword a lane."""
    raw_words: int
    """32 words of signs that are stored as they are."""
    grouped_columns: int
    """32 columns that are stored by groups."""
    dealt_words: int
    """32 words to which bits of another string are dealt."""
    dealt_turn: int
    """One of their ones, in all lanes."""
    columns: int
    """32 columns: their windows, and the product."""
    turn: int
    """A weight of each of 32 columns."""
    turn_of_third: int
    """The same where some are 3 and more."""
    more_digits: int
    """The second digit of weights of 4 and more, where 32 columns have any."""
    task: int
    """What is left: once for up to 256 columns."""


def main() -> int:
    """Prints the tables; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--architectures", type=int, nargs="+", default=[75, 80, 90])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--zero-share", type=float, default=0.885, help="default 0.885")
    parser.add_argument("--disassembler", help="path of nvdisasm; default: wheel, then PATH")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    if any(tokens not in (1, 2, 4, 8, 16) for tokens in options.tokens):
        parser.error(f"--tokens is {options.tokens}; kernels exist for 1, 2, 4, 8 and 16.")
    if not 0 < options.zero_share < 1:
        parser.error(f"--zero-share is {options.zero_share}; it must be between 0 and 1.")
    if nvrtc.find_library() is None:
        parser.error("NVRTC is not installed: pip install nvidia-cuda-nvrtc")
    if missing := set(options.architectures) - set(nvrtc.architectures()):
        parser.error(f"this NVRTC does not know the architectures {sorted(missing)}.")
    disassembler = options.disassembler or find_disassembler()
    if disassembler is None:
        parser.error("there is no nvdisasm: pip install nvidia-cuda-nvdisasm, or --disassembler")

    results: dict[str, Any] = {"zero_share": options.zero_share, "walks": [], "kernels": []}
    print(f"Warp instructions by machine code, zero share {options.zero_share}; not run on a GPU.")
    columns = format_row(("walk", "sm", "tokens", "round", "branch", "inner"), WALK_COLUMNS)
    print(f"\n{columns}  a weight at width {' '.join(map(str, WIDTHS))}")
    trips = _qmoe_trips(options.zero_share)
    for walk in WALKS:
        for architecture in options.architectures:
            for tokens in options.tokens:
                loop = measure(walk, tokens, architecture, disassembler)
                rates = [
                    _a_weight(walk, loop, width, options.zero_share, trips) for width in WIDTHS
                ]
                inner = "+".join(map(str, loop.inner)) if loop.inner else "-"
                counts = (architecture, tokens, loop.always, loop.branched, inner)
                columns = format_row((walk.name, *map(str, counts)), WALK_COLUMNS)
                print(f"{columns}  {' '.join(f'{rate:.3f}' for rate in rates)}")
                results["walks"].append(
                    {
                        "walk": walk.name,
                        "architecture": architecture,
                        "tokens": tokens,
                        **loop._asdict(),
                        "instructions_a_weight": dict(zip(map(str, WIDTHS), rates, strict=True)),
                    }
                )
    columns = format_row(("lattice", "sm", "tokens"), (40, 4, 6))
    print(f"\n{columns}  instructions")
    results["lattice"] = []
    for architecture in options.architectures:
        for tokens in [tokens for tokens in options.tokens if tokens <= 8]:
            parts = lattice_parts(tokens, architecture, disassembler)
            counts = {"architecture": architecture, "tokens": tokens, **parts._asdict()}
            results["lattice"].append(counts)
            for part, count in parts._asdict().items():
                name = part.replace("_", " ")
                print(f"{format_row((name, str(architecture), str(tokens)), (40, 4, 6))}  {count}")
    columns = format_row(("kernel", "sm", "registers", "spilled bytes"), KERNEL_COLUMNS)
    print(f"\n{columns}")
    for source in nvrtc.SOURCES:
        for architecture in options.architectures:
            for name, needs in nvrtc.compile_file(source, architecture).resources.items():
                counts = (architecture, needs.registers, needs.spilled_bytes)
                print(format_row((name, *map(str, counts)), KERNEL_COLUMNS))
                results["kernels"].append(
                    {"kernel": name, "architecture": architecture, **needs._asdict()}
                )
    if options.json:
        write_json(options.json, results)
    return 0


def find_disassembler() -> str | None:
    """nvdisasm of the installed wheel, or on the PATH."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("*/bin/nvdisasm")):
            return str(path)
    return shutil.which("nvdisasm")


def measure(walk: Walk, tokens: int, architecture: int, disassembler: str) -> Loop:
    """Compiles a walk for one number of tokens and finds its loop over rounds."""
    source = _PROBE.format(
        header=walk.header,
        arrays=f"{walk.header.capitalize()}Arrays",
        type=walk.type,
        tokens=tokens,
    )
    return find_loop(disassemble(source, architecture, disassembler), walk.marker)


def disassemble(source: str, architecture: int, disassembler: str) -> str:
    """Compile a source and return its machine code as text."""
    cubin = nvrtc.compile_source(source, architecture, "probe.cu")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin.data)
        file.flush()
        done = subprocess.run([disassembler, "-c", file.name], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{disassembler} failed: {done.stderr.strip()}")
    return done.stdout


class MachineCode(NamedTuple):
    """Instructions in order, and the branches among them."""

    code: list[str]
    jumps: list[tuple[int, int, bool]]
    """Of each its place, its target, and whether it is conditional."""

    @property
    def loops(self) -> list[tuple[int, int]]:
        """The spans of branches backwards, in order; an outer one before those inside."""
        spans = {(target, at + 1) for at, target, _ in self.jumps if target < at}
        return sorted(spans, key=lambda span: (span[0], -span[1]))

    def inside(self, span: tuple[int, int]) -> list[tuple[int, int]]:
        """Loops inside a span, itself left out."""
        return [s for s in self.loops if span[0] <= s[0] and s[1] <= span[1] and s != span]

    def count(self, span: tuple[int, int], *markers: str, own: bool = True) -> int:
        """Instructions of a span with any of the markers; `own`: not those of loops inside."""
        return sum(
            any(marker in self.code[at] for marker in markers)
            for at in range(*span)
            if not (own and any(first <= at < last for first, last in self.inside(span)))
        )

    def executed(self, span: tuple[int, int], *, kept: str = "", at_least: int = 1) -> int:
        """Instructions of a span that no branch may skip, without those of loops inside.

        A branch around `at_least` instructions with the marker `kept` does not count: it is seldom
        taken.
        """
        run = np.zeros(len(self.code), bool)
        run[slice(*span)] = True
        for at, target, conditional in self.jumps:
            if conditional and span[0] <= at < target < span[1]:
                marked = sum(kept in i for i in self.code[at + 1 : target]) if kept else 0
                if not kept or marked < at_least:
                    run[at + 1 : target] = False
        for first, last in self.inside(span):
            run[first:last] = False
        return int(run.sum())


def parse(text: str) -> MachineCode:
    """Read what the disassembler writes."""
    labels: dict[str, int] = {}
    code: list[str] = []
    for line in text.splitlines():
        if match := re.match(r"(\.L\S+):", line):
            labels[match[1]] = len(code)
        elif match := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*?)\s*;", line):
            code.append(match[1])
    jumps = []
    for at, instruction in enumerate(code):
        match = re.search(r"\bBRA\b.*`\((\.L\S+)\)", instruction)
        if match and "BRA.DIV" not in instruction:
            jumps.append((at, labels[match[1]], instruction.startswith("@")))
    return MachineCode(code, jumps)


def lattice_parts(tokens: int, architecture: int, disassembler: str) -> LatticeParts:
    """Compile the lattice's walk for one number of tokens and find its parts by what they do.

    Up to 8 tokens it is the fused kernel's, beyond that of many tokens.
    """
    source = _LATTICE_PROBE.format(tokens=tokens, added="true" if tokens > 8 else "false")
    sass = parse(disassemble(source, architecture, disassembler))
    loops = sass.loops
    task = max(loops, key=lambda span: span[1] - span[0])
    # The product's instructions are there twice: for the first digit, and for others.
    products = sass.count(task, "HMMA", own=False)
    columns = min(
        (s for s in loops if sass.count(s, "HMMA", own=False) == products),
        key=lambda span: span[1] - span[0],
    )
    chunk = min(
        (s for s in loops if s != columns and s[0] <= columns[0] and columns[1] <= s[1]),
        key=lambda span: span[1] - span[0],
    )
    scans = [s for s in loops if sass.count(s, "SHFL.UP") >= 5 and not sass.count(s, "HMMA")]
    rounds = [s for s in scans if sass.count(s, "ATOMS.OR") >= 2]
    of_128 = [s for s in rounds if sass.count(s, "ATOMS.OR") >= 8]
    of_32 = [s for s in rounds if s not in of_128]
    others = [s for s in scans if s not in rounds and s not in (task, chunk, columns)]
    dealt = [s for s in others if chunk[0] <= s[0] < chunk[1]]
    grouped = [s for s in others if s not in dealt]
    # Two loads, each reversed; perhaps unrolled.
    raw = [s for s in sass.inside(chunk) if sass.count(s, "BREV") >= 2 and sass.count(s, "STS")]
    raw = [s for s in raw if s[1] <= columns[0]]
    turns = sorted(
        s[1] - s[0] for s in sass.inside(columns) if sass.count(s, "STS.U8") and s[1] - s[0] < 25
    )
    digits = next(s for s in sass.inside(columns) if sass.count(s, "HMMA"))
    named = [task, chunk, columns, *rounds, *others, *raw]
    # Counts of ones, and zeros to begin with.
    small = [
        s
        for s in loops
        if s not in named and not any(n[0] <= s[0] and s[1] <= n[1] for n in named[2:])
    ]
    return LatticeParts(
        round_of_128=max(sass.executed(s, kept="ATOMS.OR", at_least=8) for s in of_128),
        round_of_32=max(sass.executed(s, kept="ATOMS.OR", at_least=2) for s in of_32),
        raw_words=min(2 * (s[1] - s[0]) // sass.count(s, "BREV") for s in raw),
        # A scan each, where the loop is not unrolled.
        grouped_columns=max(
            sum(5 * sass.executed(s) // sass.count(s, "SHFL.UP") for s in pair)
            for pair in itertools.pairwise(grouped)
        ),
        dealt_words=sass.executed(dealt[0]),
        dealt_turn=max(s[1] - s[0] for s in sass.inside(dealt[0])),
        columns=sass.executed(columns),
        turn=turns[0],
        turn_of_third=turns[-1],
        more_digits=digits[1] - digits[0],
        task=sass.executed(task) + sum(sass.count(span, "") for span in (chunk, *small)),
    )


def staging_instructions(architecture: int, disassembler: str) -> int:
    """Warp instructions with which many tokens' kernel of the lattice stages 8 of 32 columns."""
    source = (KERNEL_FOLDER / "matmul_lattice.cu").read_text()
    sass = parse(disassemble(source, architecture, disassembler))
    # Three parts of each.
    return max(sass.executed(s) for s in sass.loops if sass.count(s, "STS.U16") == 24)


def find_loop(text: str, marker: str) -> Loop:
    """The outermost of the loops that have the marker and lie in no loop without a reduction.

    A loop is the span of a branch backwards. The row loop has the loop over rounds inside and the
    shuffles of the final reduction (SHFL.BFLY) besides.
    """
    code, jumps = parse(text)
    spans = [(target, at + 1) for at, target, _ in jumps if target <= at]
    fitting = [
        (start, stop)
        for start, stop in spans
        if any(marker in i for i in code[start:stop])
        and not any("SHFL.BFLY" in i for i in code[start:stop])
    ]
    if not fitting:
        raise SystemExit(f"no loop with {marker} was found in the machine code.")
    start, stop = max(fitting, key=lambda span: span[1] - span[0])
    inner = [s for s in set(spans) if start <= s[0] and s[1] <= stop and s != (start, stop)]
    outermost = [
        span
        for span in inner
        if not any(o != span and o[0] <= span[0] and span[1] <= o[1] for o in inner)
    ]
    skipped = np.zeros(len(code), bool)
    for at, target, conditional in jumps:
        if conditional and start <= at < target < stop:  # not an exit
            skipped[at + 1 : target] = True
    nested = np.zeros(len(code), bool)
    for first, last in outermost:
        nested[first:last] = True
    inside = np.zeros(len(code), bool)
    inside[start:stop] = True
    return Loop(
        int((inside & ~skipped & ~nested).sum()),
        int((inside & skipped & ~nested).sum()),
        tuple(last - first for first, last in sorted(outermost)),
    )


def _a_weight(walk: Walk, loop: Loop, width: int, zero_share: float, trips: float) -> float:
    """Instructions of the rounds of a row, divided by its weights."""
    rows = 32 // walk.lanes
    if walk.header == "packed2":
        return loop.always * -(-width // 128) / width
    if walk.header == "qmoe":
        codewords = width / _QMOE_WEIGHTS[zero_share]
        cost = loop.always + loop.branched + trips * sum(loop.inner)
        return cost * -(-codewords // 32) / width
    two_bit = "2bit" in walk.name
    number = choose_dictionary(round(zero_share * 10**6), 10**6)
    family = tunstall_family(8 if two_bit else 0)
    lengths = family.lengths[number].astype(int)
    ones = family.nonzeros[number].astype(int)
    shares = np.where(lengths, zero_share ** (lengths - ones) * (1 - zero_share) ** ones, 0)
    assert ZERO_WEIGHTS[number] > 800, "a dictionary with long entries only"
    codewords = width / float(shares @ lengths)
    rounds = -(-codewords // (walk.lanes * walk.per_lane))
    return loop.always * rounds / (rows * width)


_QMOE_WEIGHTS: dict[float, float] = {}


def _qmoe_trips(zero_share: float) -> float:
    """Turns of the loop over a table word's non-zero weights: the most of any lane, on average.

    Also notes how many weights a codeword has, on random codes.
    """
    rng = np.random.default_rng(0)
    codes = np.where(rng.random((1, 64, 6144)) < zero_share, 0, rng.integers(1, 3, (1, 64, 6144)))
    levels = np.ones((1, 64, 2), np.float32)
    coded = encode(codes.astype(np.uint8), levels.astype(ml_dtypes.bfloat16), "qmoe")
    codewords = coded.arrays["codewords"]
    _QMOE_WEIGHTS[zero_share] = codes.size / codewords.size
    words = dictionary().table.reshape(-1, 2)[codewords] >> 4
    ones = np.bitwise_count((words | words >> 1) & 0x5555555)
    rounds = ones[: len(ones) // 32 * 32].reshape(-1, 32, 2)
    return float(rounds.max(axis=1).mean())


if __name__ == "__main__":
    sys.exit(main())
