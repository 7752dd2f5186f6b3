"""Finds launch settings for this GPU and writes them into configs/kernel_launch.json.

    python benchmarks/tune_kernels.py [--codings tunstall ...] [--shapes 768x3072 ...]

Needs a CUDA device, CuPy and JAX; a bare checkout will do; some minutes. For each coding the sizes
of the launches are those with the least time, as a geometric mean over the shapes of the QMoE
paper: `few` for one token at one expert, `many` for one and for eight tokens at each of 64 experts,
`expand` for all 64. Then the numbers of tokens of an expert are sought from which tensor cores beat
the kernels without them, and up to which either beats expansion and cuBLAS. Of "lattice" and
ternary codes also how warps share rows in products with fragments: each number of warps a block and
of those that share is timed, for some numbers of tokens at one and at 64 experts.
"""

import argparse
import dataclasses
import itertools
from collections.abc import Callable, Sequence

import gpu_bench
import numpy as np
from bench_kernels import token_sets
from gpu_bench import NUM_EXPERTS, Codes, Cublas, Gpu

from qmoe_jax.codec.codings import get_coding
from qmoe_jax.ops.cuda import fragment_products, kernels, launch_settings
from qmoe_jax.ops.cuda.launch_settings import Launch, LaunchSettings
from qmoe_jax.ops.cuda.launcher import KernelCall, StructArgument

PROGRAM = "tune_kernels"
THREADS = (64, 128, 256)
ROWS = (4, 8, 16, 32, 64, 128)
CROSSOVER = (2, 4, 8, 16, 32, 64, 128, 256, 512)
MOST_FUSED = 64
FRAGMENT_TOKENS = (1, 8, 64)
FRAGMENT_WARPS = (2, 4, 8)
FRAGMENT_BLOCKS = (1, 128, 256, 512, 1024, 2048, 4096, 8192)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--codings", nargs="+", default=gpu_bench.CODINGS, choices=gpu_bench.CODINGS
    )
    parser.add_argument("--shapes", nargs="+", help="of the paper's; default: all")
    options = parser.parse_args()
    named = {f"{out}x{width}": (out, width) for out, width in gpu_bench.SHAPES}
    if unknown := set(options.shapes or ()) - set(named):
        parser.error(f"--shapes has {sorted(unknown)}; there are {', '.join(named)}")
    shapes = [named[shape] for shape in options.shapes or named]
    gpu = Gpu(gpu_bench.open_gpu(PROGRAM), replays=7)
    found = {}
    for coding in options.codings:
        found[coding] = tune(gpu, coding, shapes)
        if get_coding(coding).grid in gpu_bench.FRAGMENT_GRIDS:
            found[coding] = tune_fragments(gpu, coding, found[coding], shapes)
        print(f"{coding}: {found[coding]}", flush=True)
    launch_settings.write_settings(gpu.launcher.device.name, found)
    print(f"written to {launch_settings.settings_path()} as {gpu.launcher.device.name!r}")


def tune(gpu: Gpu, coding: str, shapes: Sequence[tuple[int, int]]) -> LaunchSettings:
    """The settings of a coding: a pass over the shapes, one shape's data at a time."""
    warps = kernels.cuda_interface(coding).rows_per_warp
    launches = [Launch(t, r, w) for t, r, w in itertools.product(THREADS, ROWS, warps)]
    expansions = [Launch(t, r) for t, r in itertools.product(THREADS, ROWS)]
    few, many = (dict.fromkeys(launches, 0.0) for _ in range(2))
    expand = dict.fromkeys(expansions, 0.0)
    seconds: dict[str, dict[int, list[float]]] = {"fused": {}, "matmul": {}, "expanded": {}}
    for shape in shapes:
        codes = gpu_bench.make_codes(gpu, coding, *shape)
        for launch in launches:
            few[launch] += np.log(product_seconds(gpu, codes, launch, 1, 1))
            for tokens in (1, 4):
                many[launch] += np.log(product_seconds(gpu, codes, launch, NUM_EXPERTS, tokens))
        dense = gpu.cupy.empty((NUM_EXPERTS, *shape), np.uint16)
        for launch in expansions:
            expand[launch] += np.log(expand_seconds(gpu, codes, dense, launch))
        cublas = Cublas(gpu, dense)
        best, best_expand = (min(d, key=d.__getitem__) for d in (many, expand))
        expanding = expand_seconds(gpu, codes, dense, best_expand)
        for tokens in CROSSOVER:
            own = token_sets(gpu, codes, NUM_EXPERTS, tokens)[0]
            run: list[Callable[[], None]] = [
                lambda own=own, cublas=cublas: cublas.all(own.x, own.y)
            ]
            found = {
                "expanded": expanding + gpu.time(run * 2).seconds,
                # From some number on it only decodes more often.
                "fused": product_seconds(gpu, codes, best, NUM_EXPERTS, tokens)
                if tokens <= MOST_FUSED
                else float("inf"),
                "matmul": float("inf"),
            }
            if tiles := gpu_bench.matmul_tiles(gpu, codes.spec):
                size = min([t for t in tiles if t >= tokens], default=tiles[-1])
                launched = gpu_bench.matmul_launches(gpu, codes, [own], size)
                found["matmul"] = gpu.time(launched).seconds
            for way, value in found.items():
                seconds[way].setdefault(tokens, []).append(value)
        cublas.close()
    for tokens in CROSSOVER:
        parts = [f"{way} {geometric_mean(seconds[way][tokens]) * 1e6:.0f}" for way in seconds]
        print(f"{coding}, {tokens} tokens each, microseconds: {', '.join(parts)}", flush=True)

    def wins(way: str, other: str) -> list[int]:
        mean = {w: {t: geometric_mean(s) for t, s in seconds[w].items()} for w in (way, other)}
        return [tokens for tokens in CROSSOVER if mean[way][tokens] < mean[other][tokens]]

    return LaunchSettings(
        few=min(few, key=few.__getitem__),
        many=min(many, key=many.__getitem__),
        expand=min(expand, key=expand.__getitem__),
        fused_tokens_per_expert=max(wins("fused", "expanded"), default=1),
        matmul_tokens_per_expert=min(wins("matmul", "fused"), default=CROSSOVER[-1]),
        matmul_most_per_expert=max(wins("matmul", "expanded"), default=1),
    )


def tune_fragments(
    gpu: Gpu, coding: str, settings: LaunchSettings, shapes: Sequence[tuple[int, int]]
) -> LaunchSettings:
    """The settings with the best of `fragment_warps` and `fragment_blocks`."""
    candidates = [
        dataclasses.replace(settings, fragment_warps=warps, fragment_blocks=blocks)
        for warps, blocks in itertools.product(FRAGMENT_WARPS, FRAGMENT_BLOCKS)
    ]
    # The default first: it stays where others are no better.
    candidates.sort(key=lambda c: (c.fragment_warps, c.fragment_blocks) != _DEFAULT_SHARING)
    logs = dict.fromkeys(candidates, 0.0)
    for shape in shapes:
        codes = gpu_bench.make_fragment_codes(gpu, coding, *shape)
        for experts, tokens in itertools.product((1, NUM_EXPERTS), FRAGMENT_TOKENS):
            of_experts = [[e] for e in range(NUM_EXPERTS)] if experts == 1 else [range(NUM_EXPERTS)]
            own = [gpu_bench.make_tokens(gpu, codes.spec, e, tokens) for e in of_experts]
            tile = fragment_products.tile_size(float(tokens), experts * tokens)
            placed = gpu_bench.place_tokens(gpu, codes, own)
            seconds: dict[KernelCall, float] = {}
            for candidate in candidates:
                given = (tile, candidate)
                call = gpu_bench.fragment_call(codes, own, *given)
                if call not in seconds:
                    launches = gpu_bench.fragment_launches(gpu, codes, own, placed, *given)
                    seconds[call] = gpu.time(launches).seconds
                logs[candidate] += np.log(seconds[call])
            sharing = {(call.threads // 32, _row_parts(call)): t for call, t in seconds.items()}
            times = ", ".join(f"{w}/{r} {t * 1e6:.1f}" for (w, r), t in sorted(sharing.items()))
            what = f"{shape[0]}x{shape[1]}, {experts} experts, {tokens} tokens each"
            print(
                f"{coding} as fragments, {what}, microseconds by warps/sharing rows: {times}",
                flush=True,
            )
    return min(logs, key=logs.__getitem__)


_DEFAULT_SHARING = (LaunchSettings().fragment_warps, LaunchSettings().fragment_blocks)


def _row_parts(call: KernelCall) -> int:
    given = call.arguments[1]
    assert isinstance(given, StructArgument)
    names = [name for name, _ in given.struct.fields]
    return given.values[names.index("row_parts")]


def geometric_mean(values: Sequence[float]) -> float:
    """Of positive numbers; infinity where one is."""
    return float(np.exp(np.mean(np.log(values))))


def product_seconds(gpu: Gpu, codes: Codes, launch: Launch, experts: int, tokens: int) -> float:
    """The fused product; infinite where its tokens do not fit shared memory."""
    own = token_sets(gpu, codes, experts, tokens)
    spec, limit = codes.spec, gpu.launcher.device.max_shared_bytes
    fitting = [
        tile
        for tile in kernels.TILES
        if kernels.fused_shared_bytes(spec.coding, spec.width, tile, launch.threads) <= limit
    ]
    if not fitting:
        return float("inf")
    tile = min([t for t in fitting if t >= tokens], default=fitting[-1])
    return gpu.time(gpu_bench.product_launches(gpu, codes, own, launch, tile)).seconds


def expand_seconds(gpu: Gpu, codes: Codes, dense: object, launch: Launch) -> float:
    """Expansion of all experts."""
    ids = gpu.upload(np.arange(NUM_EXPERTS, dtype=np.int32))
    call = kernels.expand_call(codes.spec, launch, count=NUM_EXPERTS, codes=codes.argument)
    arrays: list[Sequence[object]] = [(*copy, ids, dense) for copy in codes.copies]
    launches = [gpu.run(call, [a.data.ptr for a in some]) for some in arrays]  # type: ignore
    return gpu.time((launches * 3)[:3]).seconds


if __name__ == "__main__":
    main()
