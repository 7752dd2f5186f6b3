"""Codes as fragments: products beside stored codes and cuBLAS, alone and in JAX.

    python benchmarks/bench_fragments.py --json benchmarks/results/fragments.json

Needs a CUDA device, CuPy and JAX; a bare checkout will do. `products` are kernels alone, timed and
checked as bench_kernels.py does, in its format: the stored codes' kernel and, `way` "fragments",
the fragments', whose tokens have been placed before. `in_jax` are `compressed_product`s as a
compiled program has them: tokens sorted, tiles found and tokens placed too. There a loop on the
device runs 64 products or more, each waiting for the one before; what is timed is the whole
program, by the host's clock, divided by their number. Copies of the weights go round over more
memory than the L2 cache.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import bench_kernels
import gpu_bench
import jax
import jax.numpy as jnp
import numpy as np
from gpu_bench import NUM_EXPERTS, Cublas, FragmentCodes, Gpu, Timing, Tokens

from qmoe_jax.atomic_file import write_json
from qmoe_jax.codec.codings import get_coding
from qmoe_jax.codec.encode import encode
from qmoe_jax.codec.tensor import TensorSpec
from qmoe_jax.formatting import format_table
from qmoe_jax.ops.cuda import kernels
from qmoe_jax.ops.cuda.fragment_products import tile_size
from qmoe_jax.ops.cuda.launch_settings import LaunchSettings, launch_settings
from qmoe_jax.ops.cuda.launcher import use_launcher
from qmoe_jax.ops.experts import CodedExperts
from qmoe_jax.ops.products import compressed_product

PROGRAM = "bench_fragments"
CODINGS = tuple(
    name for name in gpu_bench.CODINGS if get_coding(name).grid in gpu_bench.FRAGMENT_GRIDS
)
TOKENS = (1, 4, 16, 64)
IN_JAX = ("768x3072", "6144x2080")
IMPLEMENTATIONS = ("cuda", "cuda_fragments")
MOST_COPIES = 8
"""Products in the loop's body: each is compiled."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write figures there")
    parser.add_argument("--coding", default="lattice", choices=CODINGS)
    parser.add_argument("--shapes", nargs="+", default=[f"{o}x{i}" for o, i in gpu_bench.SHAPES])
    parser.add_argument("--in_jax", nargs="*", default=IN_JAX, help="default %(default)s")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--repeats", type=int, default=9, help="runs of a compiled program")
    options = parser.parse_args()
    try:
        shapes, in_jax = (
            [(int(out), int(width)) for out, width in (shape.split("x") for shape in given)]
            for given in (options.shapes, options.in_jax)
        )
    except ValueError:
        parser.error(f"--shapes is {options.shapes}, --in_jax {options.in_jax}; as in 768x3072")
    if any(tokens < 1 for tokens in options.tokens):
        parser.error(f"--tokens is {options.tokens}; each must be at least 1")
    gpu = Gpu(gpu_bench.open_gpu(PROGRAM))
    results: dict[str, Any] = {
        **gpu.facts(),
        "coding": options.coding,
        "copy_bytes_per_second": gpu.copy_bandwidth(),
        "products": [],
        "in_jax": [],
    }

    def save() -> None:
        """Whole or not at all, after each entry: a run may be ended at any moment."""
        if options.json:
            write_json(options.json, results)

    # What a user has comes first for each shape: it is what matters.
    for shape in shapes:
        codes = gpu_bench.make_fragment_codes(gpu, options.coding, *shape)
        results.setdefault("bits", []).append(
            {
                "shape": list(shape),
                "of_a_weight": 8 * codes.read_bytes / (NUM_EXPERTS * shape[0] * shape[1]),
            }
        )
        if shape in in_jax:
            bench_in_jax(gpu, codes, options, results, save)
        bench_kernels_alone(gpu, codes, options.tokens, results, save)
    save()
    print("\n".join(summary(results)))


def bench_kernels_alone(
    gpu: Gpu,
    fragments: FragmentCodes,
    numbers: list[int],
    results: dict[str, Any],
    save: Callable[[], None],
) -> None:
    """Kernels of stored codes and of fragments, and cuBLAS, on the same tokens."""
    shape = (fragments.spec.rows, fragments.spec.width)
    codes = gpu_bench.make_codes(gpu, fragments.spec.coding, *shape)
    device = gpu.launcher.device
    settings = launch_settings(device.name, device.compute_capability, fragments.spec.coding)
    dense, _ = bench_kernels.expand_all(gpu, codes, settings)
    cublas = Cublas(gpu, dense)
    for tokens in numbers:
        for experts in (1, NUM_EXPERTS):
            own = bench_kernels.token_sets(gpu, codes, experts, tokens)
            dense_time = bench_kernels.time_cublas(gpu, cublas, own, experts)
            ways = (
                lambda *given: bench_kernels.time_product(gpu, codes, *given),
                lambda *given: time_fragments(gpu, fragments, *given),
            )
            for way in ways:
                entry = way(own, settings, results, experts, tokens)
                if entry is None:
                    continue
                entry["error"] = bench_kernels.check(gpu, cublas, own, experts)
                entry["cublas_seconds"] = dense_time.seconds
                entry["cublas_spread"] = dense_time.spread
                results["products"].append(entry)
                save()
    cublas.close()


def time_fragments(
    gpu: Gpu, codes: FragmentCodes, own: list[Tokens], settings: LaunchSettings,
    results: dict[str, Any], experts: int, tokens: int,
) -> dict[str, Any]:  # fmt: skip
    """The kernel alone; its outputs stay in `own`."""
    spec, count = codes.spec, experts * tokens
    placed = gpu_bench.place_tokens(gpu, codes, own)
    tile = tile_size(float(tokens), count)
    launches = gpu_bench.fragment_launches(gpu, codes, own, placed, tile, settings)
    for tokens_of_a_launch in own:  # what others have left there must not pass for a product
        tokens_of_a_launch.y.fill(0x7FFF)
    timing = gpu.time(launches)
    places = codes.arrays["fragment_places"].shape[1]
    moved = codes.read_bytes * experts / NUM_EXPERTS
    moved += 2 * count * (places + spec.rows)
    return {
        "shape": [spec.rows, spec.width],
        "coding": spec.coding,
        "experts": experts,
        "tokens": tokens,
        "way": "fragments",
        "seconds": timing.seconds,
        "spread": timing.spread,
        "other_seconds": {},
        "roofline": moved / results["copy_bytes_per_second"] / timing.seconds,
    }


def bench_in_jax(
    gpu: Gpu,
    codes: FragmentCodes,
    options: argparse.Namespace,
    results: dict[str, Any],
    save: Callable[[], None],
) -> None:
    """Compiled products of stored codes and of fragments, whose outputs are compared."""
    spec, stored, derived = stored_codes(gpu, codes)
    stored_bytes = sum(array.nbytes for array in stored.values())
    num_copies = min(MOST_COPIES, -(-gpu.cold_bytes // stored_bytes))
    laid_out = {
        name: array for name, array in codes.arrays.items() if name not in ("origins", "levels")
    }
    copied = {"cuda": {**stored, **derived}, "cuda_fragments": {**stored, **laid_out}}
    outputs: dict[tuple[int, int], np.ndarray] = {}
    for implementation in IMPLEMENTATIONS:
        arrays = copied[implementation]
        copies = [
            {name: jnp.array(array, copy=True) for name, array in arrays.items()}
            for _ in range(num_copies)
        ]
        for tokens in options.tokens:
            for experts in (1, NUM_EXPERTS):
                with use_launcher(gpu.launcher):
                    timing, y = time_in_jax(
                        spec, stored, implementation, experts, tokens, copies, options.repeats
                    )
                first = outputs.setdefault((experts, tokens), y)
                error = float(np.linalg.norm(y - first) / np.linalg.norm(first))
                if not error < 1e-2:
                    what = f"{tokens} tokens at {experts} experts"
                    gpu_bench.fail(PROGRAM, f"{implementation} is off by {error} with {what}")
                results["in_jax"].append(
                    {
                        "shape": [spec.rows, spec.width],
                        "experts": experts,
                        "tokens": tokens,
                        "implementation": implementation,
                        "seconds": timing.seconds,
                        "spread": timing.spread,
                    }
                )
                save()
        del copies


def stored_codes(
    gpu: Gpu, codes: FragmentCodes
) -> tuple[TensorSpec, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The stored arrays of the same codes, and what kernels derive of them."""
    shape = (gpu_bench.UNIQUE_EXPERTS, codes.spec.rows, codes.spec.width)
    coded = encode(*gpu_bench.random_codes(codes.spec.coding, shape), codes.spec.coding)
    spec, arrays = gpu_bench.repeat_experts(coded, NUM_EXPERTS)
    derived = kernels.derive(gpu.launcher, spec, arrays)
    return spec, arrays, {name: np.asarray(array) for name, array in derived.items()}


def time_in_jax(
    spec: TensorSpec,
    stored: Mapping[str, Any],
    implementation: str,
    experts: int,
    tokens: int,
    copies: list[dict[str, jax.Array]],
    repeats: int,
) -> tuple[Timing, np.ndarray]:
    """Seconds of a product in a program of many, one after another; the last one's outputs.

    Of one expert each product has another. Each also waits for the outputs of the one before, by a
    zero that XLA does not know to be one, added to indices of experts.
    """
    rng = np.random.default_rng(experts + tokens)
    x = jnp.asarray(rng.normal(size=(experts * tokens, spec.width)), jnp.bfloat16)
    index = np.repeat(rng.permutation(NUM_EXPERTS)[:experts], tokens)
    first = jnp.asarray(rng.permutation(index), jnp.int32)
    turns = -(-NUM_EXPERTS // len(copies))

    @jax.jit
    def run(x: jax.Array, first: jax.Array, copies: list[dict[str, jax.Array]]) -> jax.Array:
        def turn(i: jax.Array, y: jax.Array) -> jax.Array:
            for number, copy in enumerate(copies):
                codes = CodedExperts(
                    spec,
                    {name: array for name, array in copy.items() if name in stored},
                    spec.width,
                    {name: array for name, array in copy.items() if name not in stored},
                )
                zero = (y[0, 0] * 0).astype(jnp.int32)
                shift = i * len(copies) + number if experts == 1 else 0
                y = compressed_product(
                    x,
                    (first + zero + shift) % NUM_EXPERTS,
                    codes,
                    num_experts=NUM_EXPERTS,
                    out_features=spec.rows,
                    implementation=implementation,
                )
            return y

        return jax.lax.fori_loop(0, turns, turn, jnp.zeros((len(x), spec.rows), x.dtype))

    y = np.asarray(run(x, first, copies), np.float32)
    jax.block_until_ready(run(x, first, copies))
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(run(x, first, copies))
        times.append((time.perf_counter() - begin) / (turns * len(copies)))
    low, middle, high = np.quantile(times, (0.25, 0.5, 0.75))
    return Timing(float(middle), float(high - low) / 2), y


def summary(results: dict[str, Any]) -> list[str]:
    """Tables: products in compiled programs, then kernels alone."""
    cublas = {product_key(p): p["cublas_seconds"] for p in results["products"]}
    rows = [["in a program: shape", "experts", "tokens", *IMPLEMENTATIONS, "cuBLAS alone"]]
    for key, found in by_key(results["in_jax"], "implementation").items():
        rows.append(
            [*words(key), *(us(found.get(i)) for i in IMPLEMENTATIONS), us(cublas.get(key))]
        )
    lines = [
        f"microseconds of products with codes of {results['coding']!r}",
        *format_table(rows).split("\n"),
    ]
    ratios: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for key, found in by_key(results["products"], "way").items():
        if "fragments" not in found or len(found) < 2:
            continue
        stored = min(seconds for way, seconds in found.items() if way != "fragments")
        own = found["fragments"]
        ratios.setdefault(key[1:], []).append((stored / own, cublas[key] / own))
    rows = [["kernel alone: experts", "tokens", "faster than stored codes", "than cuBLAS"]]
    for key, pairs in sorted(ratios.items()):
        cells = [
            f"{np.exp(np.mean(np.log(r))):.2f} ({min(r):.2f}-{max(r):.2f})"
            for r in zip(*pairs, strict=True)
        ]
        rows.append([*map(str, key), *cells])
    return [*lines, *format_table(rows).split("\n")]


Key = tuple[str, int, int]


def product_key(entry: Mapping[str, Any]) -> Key:
    """Shape, experts and tokens of an entry."""
    return "x".join(map(str, entry["shape"])), entry["experts"], entry["tokens"]


def by_key(entries: list[dict[str, Any]], name: str) -> dict[Key, dict[str, float]]:
    """Seconds of entries with the same key, by another of their fields."""
    found: dict[Key, dict[str, float]] = {}
    for entry in entries:
        found.setdefault(product_key(entry), {})[entry[name]] = entry["seconds"]
    return found


def words(key: Key) -> list[str]:
    return [str(part) for part in key]


def us(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e6:.1f}"


if __name__ == "__main__":
    main()
