"""Size and speed of the codec: on codes of real quantization, and iid on the QMoE paper's shapes.

    python benchmarks/bench_codec.py [--json PATH] [--checkpoint COMPRESSED ...]

Real codes (`real_codes.py`): all expert kernels of models, which are compressed for it into a
temporary folder, and made layers of 768 x 3072 and larger. Every coding that takes them is
measured: stored bits, everything counted, over what an adaptive mixing coder would need for the
same codes (`adaptive_bound.py`), and of models in the coding that `compress` takes also the blocks
of files and folders on disk over the bytes stored, dense parameters too. With --checkpoint the
kernels of other compressed checkpoints as well.

Codes without memory (iid) have the zero shares that the paper reports; a model's figure takes both
of its expert kernels together. There the ceiling for size is the entropy of the codes.

Encoding is timed on the host (all cores), decoding with XLA on JAX's default device, codes and
bfloat16 weights, one expert a call, experts in turn; the best of several runs after one warm-up.
The ceiling for decoding is the rate at which the same device writes bfloat16 weights that need no
decoding (an elementwise pass over as many 2-byte values).
"""

import argparse
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from adaptive_bound import KINDS, bound_bits
from machine import machine_facts
from real_codes import GRIDS, MODELS, Kernel, kernels_of, made_kernels, signed_codes

from qmoe_jax.atomic_file import write_json
from qmoe_jax.checkpoints.compressed import open_compressed_checkpoint
from qmoe_jax.codec import codings
from qmoe_jax.codec.decode import decode_expert, decode_expert_weights, device_arrays
from qmoe_jax.codec.encode import encode
from qmoe_jax.codec.stats import bits, bits_by_part
from qmoe_jax.codec.tensor import CodedTensor
from qmoe_jax.formatting import format_row

MODEL_GRIDS = ("lattice", "ternary")
"""Grids to which models are quantized; layers are to all."""

# (out, in) of the expert kernels, the codes' zero share, and the compression of the experts that
# the QMoE paper reports (arXiv 2310.16795, table 5).
PAPER_MODELS = {
    "base128": (((768, 3072), (3072, 768)), 0.857, 17.06),
    "large128": (((1024, 4096), (4096, 1024)), 0.864, 18.34),
    "c2048": (((2080, 6144), (6144, 2080)), 0.886, 20.07),
}
NUM_EXPERTS = 3
# 2-bit codes seen from the row's zero: shares of zero, its two neighbours and the fourth value, as
# GPTQ left them in a small trained model.
TWO_BIT_SHARES = (0.65, 0.188, 0.1555, 0.0065)
TWO_BIT_CODES = np.array([[1, 2, 0, 3], [2, 1, 3, 0]], np.uint8)
COLUMNS = {
    "model": "model",
    "coding": "coding",
    "entropy": "entropy",
    "codes": "codes b/w",
    "levels": "levels b/w",
    "offsets": "lengths b/w",
    "total": "total b/w",
    "compression": "16 / total",
    "paper": "paper",
    "entropy_share": "of limit",
    "encode": "encode Mw/s",
    "decode_codes": "codes Mw/s",
    "decode_weights": "weights Mw/s",
    "ceiling": "ceiling Mw/s",
}
REAL_COLUMNS = {
    "model": "codes of",
    "coding": "coding",
    "zero_share": "zeros",
    "codes": "codes b/w",
    "levels": "levels b/w",
    "offsets": "lengths b/w",
    "total": "total b/w",
    "bound": "bound b/w",
    "of_bound": "over bound",
    "disk": "disk over",
    "encode": "encode Mw/s",
    "decode_codes": "codes Mw/s",
    "decode_weights": "weights Mw/s",
}
WIDTH = 13  # of a column
Result = dict[str, Any]


def best_seconds(run: Callable[[int], object], repeats: int = 6) -> float:
    run(0)
    seconds = []
    for index in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run(index % NUM_EXPERTS))
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def iid_codes(
    num_symbols: int, rows: int, width: int, zero_share: float
) -> tuple[np.ndarray, np.ndarray]:
    """Codes and levels of NUM_EXPERTS experts."""
    rng = np.random.default_rng(0)
    draws = rng.random((NUM_EXPERTS, rows, width), np.float32)
    levels = rng.normal(size=(NUM_EXPERTS, rows, 2))
    if num_symbols == 3:
        codes = (draws > zero_share).astype(np.uint8) + (draws > (1 + zero_share) / 2)
    else:
        symbols = np.searchsorted(np.cumsum(TWO_BIT_SHARES)[:3].astype(np.float32), draws)
        levels[..., 1] = rng.integers(1, 3, levels.shape[:2])
        codes = TWO_BIT_CODES[levels[..., 1, None].astype(np.int64) - 1, symbols]
    return codes, levels.astype(ml_dtypes.bfloat16)


def time_kernel(
    coding: str, codes: np.ndarray, levels: Any, *, has_ceiling: bool = True
) -> tuple[CodedTensor, Result]:
    """The coded tensor, and seconds for all of its experts."""
    experts, rows, width = codes.shape
    coded = encode(codes, levels, coding)
    arrays = device_arrays(coded)
    decode = jax.jit(decode_expert, static_argnums=0)
    weights = jax.jit(decode_expert_weights, static_argnums=0)
    for expert in range(experts):
        decoded = np.asarray(decode(coded.spec, arrays, expert))
        if not np.array_equal(decoded, codes[expert]):
            raise SystemExit(f"{coding} {rows}x{width}: expert {expert} decodes to other codes.")
    times = {
        "encode": best_seconds(lambda _: encode(codes, levels, coding), 3),
        "decode_codes": experts * best_seconds(lambda e: decode(coded.spec, arrays, e)),
        "decode_weights": experts * best_seconds(lambda e: weights(coded.spec, arrays, e)),
    }
    if has_ceiling:
        plain = jnp.zeros((experts, rows, width), jnp.bfloat16)
        copy = jax.jit(lambda plain, expert: plain[expert] + 1)
        times["ceiling"] = experts * best_seconds(lambda e: copy(plain, e))
    return coded, times


def summary(coded: list[CodedTensor]) -> Result:
    """Bits a weight over all tensors, and the entropy each tensor's own symbol shares leave."""
    sizes = [bits(tensor) for tensor in coded]
    weights = sum(tensor.spec.num_weights for tensor in coded)
    pairs = list(zip(sizes, coded, strict=True))
    entropy = sum(size["entropy"] * tensor.spec.num_weights for size, tensor in pairs) / weights
    parts = {n: sum(s[n] for s in sizes) / weights for n in ("codes", "levels", "offsets", "total")}
    return {
        "entropy": entropy,
        **parts,
        "compression": 16 / parts["total"],
        "entropy_share": entropy / parts["total"],
    }


def measure_model(model: str, coding: str) -> Result:
    """Both kernels of a model with iid codes: size and speed."""
    shapes, zero_share, paper = PAPER_MODELS[model]
    num_symbols = codings.get_coding(coding).num_symbols
    tensors: list[CodedTensor] = []
    seconds: dict[str, float] = {}
    for rows, width in shapes:
        coded, times = time_kernel(coding, *iid_codes(num_symbols, rows, width, zero_share))
        tensors.append(coded)
        seconds = {name: seconds.get(name, 0.0) + each for name, each in times.items()}
    weights = sum(tensor.spec.num_weights for tensor in tensors)
    return {
        "model": model,
        "coding": coding,
        "zero_share": zero_share if num_symbols == 3 else TWO_BIT_SHARES[0],
        **summary(tensors),
        "paper": paper if num_symbols == 3 else None,
        **{name: weights / each / 1e6 for name, each in seconds.items()},
    }


def measure_real(name: str, coding: str, kernels: list[Kernel]) -> Result:
    """Size and speed of kernels of one model or shape, beside the bound."""
    weights = sum(kernel.codes.size for kernel in kernels)
    parts: dict[str, int] = {}
    bound = np.zeros(len(KINDS))
    coded: list[CodedTensor] = []
    seconds: dict[str, float] = {}
    for kernel in kernels:
        tensor, times = time_kernel(coding, kernel.codes, kernel.levels, has_ceiling=False)
        coded.append(tensor)
        seconds = {key: seconds.get(key, 0.0) + each for key, each in times.items()}
        for part, count in bits_by_part(tensor).items():
            parts[part] = parts.get(part, 0) + count
        bound += bound_bits(*signed_codes(kernel))
    sizes = summary(coded)
    return {
        "model": name,
        "coding": coding,
        "zero_share": sum(bits(c)["zero_share"] * c.spec.num_weights for c in coded) / weights,
        **sizes,
        "bound": float(bound.sum()) / weights,
        "of_bound": sizes["total"] * weights / float(bound.sum()),
        "parts": {part: count / weights for part, count in parts.items()},
        "bound_by_kind": dict(zip(KINDS, (bound / weights).tolist(), strict=True)),
        **{key: weights / each / 1e6 for key, each in seconds.items()},
    }


def measure_checkpoint(name: str, path: Path) -> Iterator[Result]:
    """All kernels of a compressed checkpoint, in every coding that takes their codes."""
    checkpoint = open_compressed_checkpoint(path)
    kernels = list(kernels_of(checkpoint))
    grids = {codings.get_coding(kernel.coding).grid for kernel in kernels}
    for grid in grids:
        own = [k for k in kernels if codings.get_coding(k.coding).grid == grid]
        for coding in codings.codings_of_grid(grid):
            result = measure_real(name, coding, own)
            if {coding} == {kernel.coding for kernel in kernels}:
                result |= on_disk(path, checkpoint.container_bytes())
            yield result


def on_disk(path: Path, container: int) -> Result:
    """Bytes of blocks that a folder takes, over those of the arrays in it as they are stored."""
    entries = [path, *path.rglob("*")]
    contents = sum(entry.stat().st_size for entry in entries if entry.is_file()) - container
    blocks = sum(512 * entry.stat().st_blocks for entry in entries)
    return {
        "files": sum(entry.is_file() for entry in entries),
        "stored_bytes": contents,
        "container_bytes": container,
        "disk_bytes": blocks,
        "disk": blocks / contents,
    }


def measure_models(grids: Sequence[str]) -> Iterator[Result]:
    """Compress every model to the grids, and measure its kernels."""
    for model, compress_model in MODELS.items():
        for grid in grids:
            if grid not in MODEL_GRIDS:
                continue
            with tempfile.TemporaryDirectory() as folder:
                compress_model(Path(folder) / "out", grid)
                os.sync()  # blocks are known when files are written
                yield from measure_checkpoint(model, Path(folder) / "out")


def measure_layers(grids: Sequence[str]) -> Iterator[Result]:
    for kernel in made_kernels(grids, NUM_EXPERTS):
        for coding in codings.codings_of_grid(codings.get_coding(kernel.coding).grid):
            yield measure_real(kernel.name, coding, [kernel])


def merged(path: Path, results: dict[str, list[Result]]) -> dict[str, list[Result]]:
    """Results with those of a file that were not measured again."""
    before = json.loads(path.read_text()) if path.exists() else {}
    found = {kind: before.get(kind, []) for kind in ("models", "checkpoints", "layers", "iid")}
    for kind, rows in results.items():
        fresh = {(row["model"], row["coding"]): row for row in rows}
        kept = [fresh.pop((row["model"], row["coding"]), row) for row in found[kind]]
        found[kind] = kept + list(fresh.values())
    return {kind: rows for kind, rows in found.items() if rows}


def as_cell(value: str | float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    return f"{value:.4f}" if value < 10 else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Size and speed of the codec.")
    parser.add_argument("--json", type=Path, help="write the results to this file; others stay")
    parser.add_argument(
        "--grids", nargs="+", choices=GRIDS, default=list(GRIDS), help="of real codes"
    )
    parser.add_argument("--no-iid", action="store_true", help="leave independent codes out")
    parser.add_argument(
        "--checkpoint",
        nargs="+",
        type=Path,
        default=[],
        help="compressed checkpoints, too",
    )
    arguments = parser.parse_args()

    machine = machine_facts()
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print("b/w: bits a weight; Mw/s: million weights a second")
    results: dict[str, list[Result]] = {}

    def table(kind: str, columns: dict[str, str], found: Iterable[Result]) -> None:
        widths = [max(WIDTH, len(title)) for title in columns.values()]
        print(f"\n{kind}\n{format_row(list(columns.values()), widths)}")
        results[kind] = []
        for result in found:
            results[kind].append(result)
            print(format_row([as_cell(result.get(name)) for name in columns], widths), flush=True)

    table("models", REAL_COLUMNS, measure_models(arguments.grids))
    if arguments.checkpoint:
        others = (measure_checkpoint(path.name, path) for path in arguments.checkpoint)
        table("checkpoints", REAL_COLUMNS, itertools.chain.from_iterable(others))
    table("layers", REAL_COLUMNS, measure_layers(arguments.grids))
    pairs = itertools.product(codings.coding_names(), PAPER_MODELS)
    # Independent codes say nothing of a coding by columns.
    iid = (c for c in pairs if codings.get_coding(c[0]).grid != "lattice")
    if not arguments.no_iid:
        table("iid", COLUMNS, (measure_model(model, coding) for coding, model in iid))
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.json, {"machine": machine} | merged(arguments.json, results), indent=2)


if __name__ == "__main__":
    main()
