"""The CUDA kernels on cold weights, beside cuBLAS, the device's bandwidth and the paper's kernel.

    python benchmarks/bench_kernels.py --json benchmarks/results/kernels.json [--peer PATH]

Needs a CUDA device, CuPy and JAX; a bare checkout will do. For every shape of the QMoE paper, 1 to
64 tokens at one expert and at each of 64 experts. How times are taken stands in gpu_bench.py; the
outputs that are timed are compared with cuBLAS's. `roofline` is the time that the bytes of codes,
tokens and outputs take at the measured copy bandwidth, by the time measured. The paper's kernel
takes one token and one expert a launch, so its products are as many launches; it is compiled from
the source that --peer names (`sub1_cuda_kernel.cu` of IST-DASLab/qmoe).
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_bench
import numpy as np
from gpu_bench import NUM_EXPERTS, Codes, Cublas, Gpu, Tokens
from paper_kernel import PaperKernel

from qmoe_jax.atomic_file import write_json
from qmoe_jax.codec.coding_tunstall import TunstallCoding
from qmoe_jax.codec.codings import get_coding
from qmoe_jax.codec.encode import encode
from qmoe_jax.ops.cuda import kernels
from qmoe_jax.ops.cuda.launch_settings import LaunchSettings, launch_settings
from qmoe_jax.ops.cuda.launcher import KernelCall, StructArgument

TOKENS = (1, 2, 4, 8, 16, 64)
PROGRAM = "bench_kernels"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write figures there, and a table beside it")
    parser.add_argument("--peer", type=Path, help="sub1_cuda_kernel.cu of QMoE")
    parser.add_argument(
        "--codings", nargs="+", default=gpu_bench.CODINGS, choices=gpu_bench.CODINGS
    )
    parser.add_argument("--shapes", nargs="+", default=[f"{o}x{i}" for o, i in gpu_bench.SHAPES])
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    options = parser.parse_args()
    try:
        shapes = [(int(out), int(width)) for out, width in (s.split("x") for s in options.shapes)]
    except ValueError:
        parser.error(f"--shapes is {options.shapes}; write them as 768x3072")
    if any(tokens < 1 for tokens in options.tokens):
        parser.error(f"--tokens is {options.tokens}; each must be at least 1")
    if options.peer and not options.peer.is_file():
        parser.error(f"--peer {options.peer} is no file")
    gpu = Gpu(gpu_bench.open_gpu(PROGRAM))
    paper = paper_error = None
    if options.peer:
        try:
            paper = PaperKernel(gpu.cupy, options.peer)
        except ValueError as error:  # ours are measured all the same
            paper_error = str(error)
            print(f"{PROGRAM}: without the paper's kernel: {paper_error}", flush=True)
    results: dict[str, Any] = {
        **gpu.facts(),
        "paper_error": paper_error,
        "copy_bytes_per_second": gpu.copy_bandwidth(),
        "write_bytes_per_second": gpu.write_bandwidth(),
        "products": [],
        "expansions": [],
        "encoders": [],
    }
    print(
        f"{results['device']}, copy {results['copy_bytes_per_second'] / 1e9:.0f} GB/s, "
        f"write {results['write_bytes_per_second'] / 1e9:.0f} GB/s"
    )

    def save() -> None:
        """Whole or not at all, after each entry: a run may be ended at any moment."""
        if options.json:
            write_json(options.json, results)
            options.json.with_suffix(".md").write_text(render(results))

    for shape in shapes:
        bench_shape(gpu, shape, options, paper, results, save)
    save()
    print(render(results))


def bench_shape(
    gpu: Gpu,
    shape: tuple[int, int],
    options: argparse.Namespace,
    paper: PaperKernel | None,
    results: dict[str, Any],
    save: Callable[[], None],
) -> None:
    cublas_seconds: dict[tuple[int, int], gpu_bench.Timing] = {}
    paper_seconds = None
    if paper and shape in paper.shapes:
        paper_seconds = time_paper(gpu, paper, gpu_bench.make_codes(gpu, "qmoe", *shape))
        results.setdefault("paper", []).append({"shape": list(shape), **paper_seconds})
        save()
    for coding in options.codings:
        codes = gpu_bench.make_codes(gpu, coding, *shape)
        device = gpu.launcher.device
        settings = launch_settings(device.name, device.compute_capability, coding)
        dense = bench_expansion(gpu, codes, settings, results)
        cublas = Cublas(gpu, dense)
        for tokens in options.tokens:
            for experts in (1, NUM_EXPERTS):
                own = token_sets(gpu, codes, experts, tokens)
                if (experts, tokens) not in cublas_seconds:
                    cublas_seconds[experts, tokens] = time_cublas(gpu, cublas, own, experts)
                entry = time_product(gpu, codes, own, settings, results, experts, tokens)
                if entry is None:
                    continue
                entry["error"] = check(gpu, cublas, own, experts)
                dense_time = cublas_seconds[experts, tokens]
                entry["cublas_seconds"] = dense_time.seconds
                entry["cublas_spread"] = dense_time.spread
                if paper_seconds:
                    entry["paper_seconds"] = paper_seconds["seconds"] * experts * tokens
                results["products"].append(entry)
                save()
        cublas.close()
        implementation = get_coding(coding)
        if isinstance(implementation, TunstallCoding):
            bench_encoder(gpu, implementation, shape, results)
            save()


def token_sets(gpu: Gpu, codes: Codes, experts: int, tokens: int) -> list[Tokens]:
    """Tokens for each expert in turn, or one set for all."""
    if experts == 1:
        return [gpu_bench.make_tokens(gpu, codes.spec, [e], tokens) for e in range(NUM_EXPERTS)]
    return [gpu_bench.make_tokens(gpu, codes.spec, range(NUM_EXPERTS), tokens)]


def time_product(
    gpu: Gpu, codes: Codes, own: list[Tokens], settings: LaunchSettings,
    results: dict[str, Any], experts: int, tokens: int,
) -> dict[str, Any] | None:  # fmt: skip
    spec = codes.spec
    count = experts * tokens
    launch = settings.few if count <= settings.few_tokens else settings.many
    limit = gpu.launcher.device.max_shared_bytes
    fitting = [
        tile
        for tile in kernels.TILES
        if kernels.fused_shared_bytes(spec.coding, spec.width, tile, launch.threads) <= limit
    ]
    ways: dict[str, list[Callable[[], None]]] = {}
    if fitting:
        tile = min([t for t in fitting if t >= tokens], default=fitting[-1])
        ways["fused"] = gpu_bench.product_launches(gpu, codes, own, launch, tile)
    if tiles := gpu_bench.matmul_tiles(gpu, spec):
        size = min([t for t in tiles if t >= tokens], default=tiles[-1])
        ways["matmul"] = gpu_bench.matmul_launches(gpu, codes, own, size)
    if not ways:
        return None
    # What a product takes comes last, since its outputs are checked; the other way is only timed.
    through_matmul = "matmul" in ways and tokens >= settings.matmul_tokens_per_expert
    chosen = "matmul" if through_matmul or "fused" not in ways else "fused"
    timings = {}
    for way in sorted(ways, key=lambda way: way == chosen):
        for tokens_of_a_launch in own:  # what others have left there must not pass for a product
            tokens_of_a_launch.y.fill(0x7FFF)
        timings[way] = gpu.time(ways[way])
    timing = timings[chosen]
    moved = codes.stored_bytes * experts / NUM_EXPERTS
    moved += 2 * count * (spec.width + spec.rows)
    return {
        "shape": [spec.rows, spec.width],
        "coding": spec.coding,
        "experts": experts,
        "tokens": tokens,
        "way": chosen,
        "seconds": timing.seconds,
        "spread": timing.spread,
        "other_seconds": {way: t.seconds for way, t in timings.items() if way != chosen},
        "roofline": moved / results["copy_bytes_per_second"] / timing.seconds,
    }


def time_cublas(gpu: Gpu, cublas: Cublas, own: list[Tokens], experts: int) -> gpu_bench.Timing:
    """cuBLAS on the same tokens; of many experts the faster of a batched call and one call each."""
    if experts == 1:
        return gpu.time([lambda e=e, t=t: cublas.one(e, t.x, t.y) for e, t in enumerate(own)] * 2)
    x, y = own[0].x, own[0].y
    each = len(x) // NUM_EXPERTS
    batched = gpu.time([lambda: cublas.all(x, y)] * 3)

    def one_by_one() -> None:
        for e in range(NUM_EXPERTS):
            cublas.one(e, x[e * each : (e + 1) * each], y[e * each : (e + 1) * each])

    return min(batched, gpu.time([one_by_one] * 3))


def check(gpu: Gpu, cublas: Cublas, own: list[Tokens], experts: int) -> float:
    """Relative error of the outputs that were just timed against cuBLAS; ends a wrong benchmark."""
    expected = gpu.cupy.empty_like(own[0].y)
    with gpu.stream:
        if experts == 1:
            cublas.one(0, own[0].x, expected)
        else:
            cublas.all(own[0].x, expected)
        y, target = (gpu_bench.as_floats(gpu, bits) for bits in (own[0].y, expected))
        norm = gpu.cupy.linalg.norm
        error = float(norm(y - target) / norm(target))
    if not error < 1e-2:
        gpu_bench.fail(PROGRAM, f"a product is off by {error}; run tests/gpu first")
    return error


def expand_all(gpu: Gpu, codes: Codes, settings: LaunchSettings) -> tuple[Any, gpu_bench.Timing]:
    """All experts, dense, and how long their expansion takes."""
    spec = codes.spec
    dense = gpu.cupy.full((NUM_EXPERTS, spec.rows, spec.width), 0x7FFF, np.uint16)
    ids = gpu.upload(np.arange(NUM_EXPERTS, dtype=np.int32))
    call = kernels.expand_call(spec, settings.expand, count=NUM_EXPERTS, codes=codes.argument)
    launches = [
        gpu.run(call, [array.data.ptr for array in (*copy, ids, dense)]) for copy in codes.copies
    ]
    return dense, gpu.time((launches * 4)[:4])


def bench_expansion(
    gpu: Gpu, codes: Codes, settings: LaunchSettings, results: dict[str, Any]
) -> Any:
    """Times the expansion of all experts; returns them."""
    spec = codes.spec
    dense, timing = expand_all(gpu, codes, settings)
    written = dense.nbytes / timing.seconds
    results["expansions"].append(
        {
            "shape": [spec.rows, spec.width],
            "coding": spec.coding,
            "seconds": timing.seconds,
            "spread": timing.spread,
            "written_bytes_per_second": written,
            "of_write_bandwidth": written / results["write_bytes_per_second"],
        }
    )
    return dense


def bench_encoder(
    gpu: Gpu, tunstall: TunstallCoding, shape: tuple[int, int], results: dict[str, Any]
) -> None:
    """Both passes of the encoder, whose bytes are compared with the host's."""
    coding = tunstall.name
    experts, (out, width) = gpu_bench.UNIQUE_EXPERTS, shape
    codes, levels = gpu_bench.random_codes(coding, (experts, out, width))
    coded = encode(codes, levels, coding)
    family = tunstall.family
    front = [codes, levels, coded.arrays["dictionaries"], family.trie]
    inputs = [gpu.upload(array) for array in front]
    offsets = gpu.upload(coded.arrays["expert_offsets"])
    num_bytes = gpu.cupy.empty((experts, out), np.int32)
    num_codewords = gpu.cupy.empty_like(num_bytes)
    row_ends = gpu.cupy.empty_like(num_bytes)
    data = gpu.cupy.full(coded.arrays["words"].nbytes, 0xEE, np.uint8)
    threads = 128
    numbers = {
        "num_experts": experts,
        "out_features": out,
        "in_features": width,
        "num_nodes": family.trie.shape[1],
        "escapes": int(family.num_escapes > 0),
    }
    given = StructArgument.of(kernels.ENCODING, numbers)

    def call(name: str, pointers: int) -> KernelCall:
        grid = (-(-out // threads), experts)
        shared = 1024 + 68 * threads
        own = range(len(inputs), pointers)
        return KernelCall("encode.cu", name, grid, threads, shared, (given, *own))

    sizes = gpu.run(
        call("encode_tunstall_sizes", 6), [a.data.ptr for a in (*inputs, num_bytes, num_codewords)]
    )
    rows = gpu.run(
        call("encode_tunstall_rows", 7), [a.data.ptr for a in (*inputs, offsets, row_ends, data)]
    )
    seconds = gpu.time([sizes] * 4).seconds
    with gpu.stream:
        gpu.cupy.cumsum(num_bytes, axis=1, out=row_ends)
    seconds += gpu.time([rows] * 4).seconds
    if gpu.cupy.asnumpy(data).tobytes() != coded.arrays["words"].tobytes():
        gpu_bench.fail(PROGRAM, f"the encoder of {coding} writes other bytes than the host's")
    results["encoders"].append(
        {"shape": [out, width], "coding": coding, "weights_per_second": codes.size / seconds}
    )


def time_paper(gpu: Gpu, paper: PaperKernel, codes: Codes) -> dict[str, float]:
    """A launch of the paper's kernel on cold codes: one token, one expert."""
    spec = codes.spec
    shape = (spec.rows, spec.width)
    names = kernels.cuda_interface("qmoe").array_names
    tokens = gpu_bench.make_tokens(gpu, spec, [0], 1)
    y = gpu.cupy.zeros(spec.rows, np.uint16)
    launches = []
    for copy in codes.copies:
        arrays = dict(zip(names, copy, strict=True))
        lengths = arrays["row_lengths"].astype(np.int32).reshape(-1)
        ends = gpu.cupy.zeros(lengths.size + 1, np.int32)
        gpu.cupy.cumsum(lengths, out=ends[1:])
        for e in range(NUM_EXPERTS):
            row = e * spec.rows
            launch = paper.launch(
                shape,
                arrays["table"].data.ptr,
                arrays["codewords"].data.ptr,
                ends.data.ptr + 4 * row,
                arrays["levels"].data.ptr + 4 * row,
                tokens.x.data.ptr,
                y.data.ptr,
            )
            launches.append(lambda launch=launch, keep=ends: launch())
    timing = gpu.time(launches)
    return {"seconds": timing.seconds, "spread": timing.spread}


def summary(results: dict[str, Any]) -> list[str]:
    """A line for each coding and number of experts: how much faster than cuBLAS."""
    lines = ["times faster than cuBLAS's bfloat16: geometric mean over shapes (least to most)"]
    groups: dict[tuple[str, int], dict[int, list[float]]] = {}
    for p in results["products"]:
        by_tokens = groups.setdefault((p["coding"], p["experts"]), {})
        by_tokens.setdefault(p["tokens"], []).append(p["cublas_seconds"] / p["seconds"])
    for (coding, experts), by_tokens in groups.items():
        parts = [
            f"{tokens}: {np.exp(np.mean(np.log(r))):.2f} ({min(r):.2f}-{max(r):.2f})"
            for tokens, r in by_tokens.items()
        ]
        lines.append(f"{coding}, {experts} experts, by tokens each: {'  '.join(parts)}")
    return lines


def render(results: dict[str, Any]) -> str:
    """The tables, as Markdown."""
    lines = [
        f"# Kernels on {results['device']}",
        "",
        f"Commit {results['commit']}; copy {results['copy_bytes_per_second'] / 1e9:.0f} GB/s, "
        f"write {results['write_bytes_per_second'] / 1e9:.0f} GB/s; CuPy {results['cupy']}. "
        "Cold weights, medians of graph replays, bfloat16 in and out.",
        "",
        "| shape | coding | experts | tokens each | by | microseconds | +- | cuBLAS | faster | "
        "paper's | faster | roofline | error |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for p in results["products"]:
        paper = p.get("paper_seconds")
        lines.append(
            f"| {p['shape'][0]}x{p['shape'][1]} | {p['coding']} | {p['experts']} | {p['tokens']} | "
            f"{p['way']} | {p['seconds'] * 1e6:.1f} | {p['spread'] * 1e6:.1f} | "
            f"{p['cublas_seconds'] * 1e6:.1f} | {p['cublas_seconds'] / p['seconds']:.2f}x | "
            + (f"{paper * 1e6:.1f} | {paper / p['seconds']:.2f}x | " if paper else "- | - | ")
            + f"{p['roofline']:.0%} | {p['error']:.0e} |"
        )
    lines += [
        "",
        "| shape | coding | expansion, 64 experts: microseconds | GB/s written | of fill |",
    ]
    lines += ["| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {e['shape'][0]}x{e['shape'][1]} | {e['coding']} | {e['seconds'] * 1e6:.0f} | "
        f"{e['written_bytes_per_second'] / 1e9:.0f} | {e['of_write_bandwidth']:.0%} |"
        for e in results["expansions"]
    ]
    lines += ["", "| shape | coding | encoding, million weights a second |", "| --- | --- | --- |"]
    lines += [
        f"| {e['shape'][0]}x{e['shape'][1]} | {e['coding']} | {e['weights_per_second'] / 1e6:.0f} |"
        for e in results["encoders"]
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
