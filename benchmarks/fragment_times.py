"""Predicts times of products with fragments on a GPU. Needs no GPU; not measured on one.

Codes are laid out as they are at loading, so that chunks, extra chunks and bytes are counted; the
instructions of a chunk come from the machine code of `matmul_fragments.cu`. Of five times the
greatest counts: of issuing, of tensor cores, of loads (wavefronts of the first-level cache), of
memory and of the second-level cache. To it comes what does not overlap: the launches, placing the
tokens, and a warp's first and last loads.

    python benchmarks/fragment_times.py [--tokens 1 4] [--made] [--json FILE]

Assumed of the GPU, an H200: 132 multiprocessors at 1.755 GHz with four schedulers, which issue in
62 % of the cycles (measured of `tunstall`); 8 cycles of a scheduler for a product of 16x8x16; loads
of 512 bytes take four cycles, those of tokens, whose lines begin anywhere, six; memory at the rate
of a copy in results/kernels.json; 5.5 TB/s from the second-level cache; 3 us for a launch and the
end of a kernel, 1.5 us for each of the kernels before it that place tokens, two of the lattice (one
finds the largest values) and one of ternary codes, whose bytes are written and read once; 0.8 us
for a load from memory. Codes are random ones of `gpu_bench.random_codes`, or
those of made layers that GPTQ quantizes (--made).

Needs NVRTC and a disassembler: pip install nvidia-cuda-nvrtc nvidia-cuda-nvdisasm
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import gpu_bench
import jax.numpy as jnp
import kernel_sass
import numpy as np

from qmoe_jax.atomic_file import write_json
from qmoe_jax.codec.encode import encode
from qmoe_jax.codec.lattice_values import multiples
from qmoe_jax.codec.tensor import CodedTensor, TensorSpec
from qmoe_jax.formatting import format_row
from qmoe_jax.ops.cuda import fragment_products, fragments
from qmoe_jax.ops.cuda.launcher import StructArgument

RESULTS = Path(__file__).parent / "results" / "kernels.json"
PROCESSORS, CLOCK, SCHEDULERS = 132, 1.755e9, 4
ISSUE_SHARE, PRODUCT_CYCLES = 0.62, 8
CACHE_BYTES_PER_SECOND = 5.5e12
LAUNCH, LATENCY = 3e-6, 0.8e-6
PLACING = {"lattice": 3e-6, "ternary": 1.5e-6}
# Of a kernel the grid's letter and its tile.
_HEADER = ("shape", "experts", "tokens", "kernel", "bits", "issue", "tensor", "loads", "memory")
_SIZES = (10, 7, 6, 6, 5, 6, 6, 6, 6, 6, 6, 7)


class Chunk(NamedTuple):
    """Instructions of a warp, by kernel."""

    main: float
    """For a chunk."""
    extra: float
    """For an extra chunk."""
    once: float
    """Before and after: half of what is there, since stores are there in several ways."""


class Layout(NamedTuple):
    """What an expert has."""

    chunks: float
    extras: float
    places: int
    bits: float
    """Of all arrays, a weight."""


def chunk_instructions(grid: str, tile: int, architecture: int, disassembler: str) -> Chunk:
    """Find the loops of a kernel that multiply, the one with extra chunks by its loads."""
    source = (kernel_sass.KERNEL_FOLDER / fragment_products.SOURCE).read_text()
    # Alone, so that its cubin has one kernel.
    kept = [
        line
        for line in source.splitlines()
        if not line.startswith("FRAGMENT_KERNEL(") or f"_{grid}_t{tile}," in line
    ]
    sass = kernel_sass.parse(kernel_sass.disassemble("\n".join(kept), architecture, disassembler))
    loops = [span for span in sass.loops if sass.count(span, "HMMA")]
    extras = [span for span in loops if sass.count(span, "LDG.E.U16")]
    (main,) = (span for span in loops if span not in extras)
    # A product for each of four steps, two halves and eight tokens.
    times = sass.count(main, "HMMA") / tile
    each = (main[1] - main[0]) / times
    # Behind the main loop the last chunks, one fewer than it has.
    extra = sum(span[1] - span[0] for span in extras)
    rest = len(sass.code) - (main[1] - main[0]) - extra - (times - 1) * each
    return Chunk(each, extra, rest / 2)


def ternary_layout(rows: int, width: int) -> Layout:
    """Count the fragments of ternary codes, which are those of any."""
    chunks = -(-rows // fragments.CHUNK_ROWS) * -(-width // fragments.CHUNK_PLACES)
    places = -(-width // fragments.CHUNK_PLACES) * fragments.CHUNK_PLACES
    return Layout(chunks, 0, places, 8 * 512 * chunks / (rows * width))


def lay_out(coded: CodedTensor, codes: np.ndarray) -> Layout:
    """Make an expert's fragments and count."""
    values = multiples(jnp.asarray(codes)).astype(jnp.int8)
    made = fragments.make_fragments(coded.spec, coded.arrays, lambda expert: values[expert][None])
    behind = fragments.READ_BEHIND * fragments.CHUNK_WORDS * 4
    num_bytes = sum(array.nbytes for array in made) - behind
    experts = coded.spec.num_experts
    return Layout(
        int(made.fragment_starts[-1]) / experts,
        int(made.extra_starts[-1]) / experts,
        made.fragment_places.shape[1],
        8 * num_bytes / coded.spec.num_weights,
    )


def seconds(
    layout: Layout,
    code_of_tiles: dict[tuple[str, int], Chunk],
    grid: str,
    rows: int,
    experts: int,
    tokens: int,
    copy_bytes_per_second: float,
) -> tuple[dict[str, float], float, int]:
    """Times of what overlaps, all together, and tokens of a tile."""
    tile = fragment_products.tile_size(tokens, tokens * experts)
    code = code_of_tiles[grid, tile]
    tiles = -(-tokens // tile)
    spec = TensorSpec("lattice", experts, rows, 1)  # of its launch only rows count
    call = fragment_products.fragment_call(
        spec,
        num_chunks=0,
        num_extras=0,
        places=layout.places,
        num_tokens=tokens * experts,
        num_tiles=experts * tiles,
        tile=tile,
        is_float32=False,
    )
    product = call.arguments[1]
    assert isinstance(product, StructArgument)
    names = [name for name, _ in product.struct.fields]
    row_parts = product.values[names.index("row_parts")]
    strips = -(-rows // fragments.CHUNK_ROWS)
    warps = experts * tiles * strips * row_parts
    chunks, extras = (experts * tiles * n for n in (layout.chunks, layout.extras))
    own_rows = min(tile, tokens) if tile == 8 else tile
    lines = 4 if own_rows < 8 else 6 * tile / 8
    issue = chunks * code.main + extras * code.extra + warps * code.once
    loads = chunks * (4 + 2 * lines) + extras * (4 + 16 * lines)
    blocks = call.grid[0] * experts * tiles
    token_bytes = experts * tokens * layout.places * 2
    memory = 512 * (layout.chunks + layout.extras) * experts + 128 * layout.extras * experts
    cache = 512 * (chunks + extras) + blocks * own_rows * layout.places * 2
    shared = PROCESSORS * CLOCK
    times = {
        "issue": issue / (SCHEDULERS * ISSUE_SHARE) / shared,
        "tensor": (chunks + extras) * tile * PRODUCT_CYCLES / SCHEDULERS / shared,
        "loads": loads / shared,
        "memory": memory / copy_bytes_per_second,
        "cache": cache / CACHE_BYTES_PER_SECOND,
    }
    placing = PLACING[grid] + 2 * token_bytes / copy_bytes_per_second
    total = max(times.values()) + LAUNCH + placing + 2 * LATENCY
    return times, total, tile


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--architecture", type=int, default=90)
    parser.add_argument("--made", action="store_true", help="codes of made layers, by GPTQ")
    parser.add_argument("--disassembler", help="path of nvdisasm; default: wheel, then PATH")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    disassembler = options.disassembler or kernel_sass.find_disassembler()
    if kernel_sass.nvrtc.find_library() is None or disassembler is None:
        parser.error("pip install nvidia-cuda-nvrtc nvidia-cuda-nvdisasm")
    measured = json.loads(RESULTS.read_text())
    code = {
        (grid, tile): chunk_instructions(grid, tile, options.architecture, disassembler)
        for grid in ("lattice", "ternary")
        for tile in fragment_products.TILES
    }
    print("Products with fragments, predicted; not run on a GPU. Warp instructions:")
    for (grid, tile), own in code.items():
        print(
            f"  {grid}, {tile} tokens: a chunk of 2,048 weights {own.main:.1f}, an extra one "
            f"{own.extra:.0f}, others {own.once:.0f} a warp"
        )
    print("\nMicroseconds:")
    print(format_row((*_HEADER, "cache", "all", "cuBLAS"), _SIZES))
    results = []
    for grid, layout, shape in _layouts(options.made):
        rows = shape[0]
        for experts, tokens in ((1, 1), *((64, tokens) for tokens in options.tokens)):
            rate = measured["copy_bytes_per_second"]
            times, total, tile = seconds(layout, code, grid, rows, experts, tokens, rate)
            dense = [
                p["cublas_seconds"]
                for p in measured["products"]
                if (p["shape"], p["experts"], p["tokens"]) == (shape, experts, tokens)
            ]
            row = (f"{shape[0]}x{shape[1]}", str(experts), str(tokens), f"{grid[0]}{tile}")
            row = (*row, f"{layout.bits:.2f}", *(f"{1e6 * t:.1f}" for t in times.values()))
            row = (*row, f"{1e6 * total:.1f}", f"{dense[0] / total:.2f}x" if dense else "-")
            print(format_row(row, _SIZES))
            results.append(
                {"grid": grid, "shape": shape, "experts": experts, "tokens": tokens, "tile": tile}
                | {"bits": layout.bits, "seconds": total, **times}
                | ({"cublas_seconds": dense[0]} if dense else {})
            )
    if options.json:
        write_json(options.json, results)


def _layouts(made: bool) -> Iterator[tuple[str, Layout, list[int]]]:
    """Grid, layout, and rows and width, of each shape."""
    if made:
        from real_codes import made_kernels

        for kernel in made_kernels(["lattice"], 1):
            coded = encode(kernel.codes, kernel.levels, "lattice")
            yield "lattice", lay_out(coded, kernel.codes), list(kernel.codes.shape[1:])
        return
    for shape in gpu_bench.SHAPES:
        codes, levels = gpu_bench.random_codes("lattice", (1, *shape))
        yield "lattice", lay_out(encode(codes, levels, "lattice"), codes), list(shape)
    for shape in gpu_bench.SHAPES:
        yield "ternary", ternary_layout(*shape), list(shape)


if __name__ == "__main__":
    sys.exit(main())
