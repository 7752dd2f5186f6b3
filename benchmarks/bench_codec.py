"""Size and speed of the codec on the shapes of the QMoE paper, with iid codes, or on real codes.

    python benchmarks/bench_codec.py [--json PATH] [--checkpoint COMPRESSED ...]

A model's figure takes both of its expert kernels together. Encoding is timed on the host (all
cores), decoding with XLA on JAX's default device, codes and bfloat16 weights, one expert a call,
experts in turn; the best of several runs after one warm-up. Ceilings: for size the entropy of the
codes, for decoding the rate at which the same device writes bfloat16 weights that need no decoding
(an elementwise pass over as many 2-byte values). With --checkpoint the codes of compressed
checkpoints are stored anew in every coding that takes them.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from machine import machine_facts

from qmoe_jax.atomic_file import write_json
from qmoe_jax.checkpoints.compressed import open_compressed_checkpoint
from qmoe_jax.codec import codings
from qmoe_jax.codec.decode import decode_expert, decode_expert_weights, device_arrays
from qmoe_jax.codec.encode import encode
from qmoe_jax.codec.stats import bits
from qmoe_jax.codec.tensor import CodedTensor
from qmoe_jax.formatting import format_row

# (out, in) of the expert kernels, the codes' zero share, and the compression of the experts that
# the QMoE paper reports (arXiv 2310.16795, table 5).
MODELS = {
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


def time_kernel(coding: str, codes: np.ndarray, levels: np.ndarray) -> tuple[CodedTensor, Result]:
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
    plain = jnp.zeros((experts, rows, width), jnp.bfloat16)
    copy = jax.jit(lambda plain, expert: plain[expert] + 1)
    return coded, {
        "encode": best_seconds(lambda _: encode(codes, levels, coding), 3),
        "decode_codes": experts * best_seconds(lambda e: decode(coded.spec, arrays, e)),
        "decode_weights": experts * best_seconds(lambda e: weights(coded.spec, arrays, e)),
        "ceiling": experts * best_seconds(lambda e: copy(plain, e)),
    }


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
    shapes, zero_share, paper = MODELS[model]
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


def measure_checkpoint(path: str) -> Iterator[Result]:
    """All kernels of a compressed checkpoint, in every coding that takes their codes: size."""
    checkpoint = open_compressed_checkpoint(path)
    stored = [checkpoint.read_coded(name) for name in checkpoint.specs]
    decode = jax.jit(decode_expert, static_argnums=0)
    decoded = []
    for tensor in stored:
        arrays, experts = device_arrays(tensor), range(tensor.spec.num_experts)
        decoded.append(np.stack([np.asarray(decode(tensor.spec, arrays, e)) for e in experts]))
    num_symbols = {codings.get_coding(tensor.spec.coding).num_symbols for tensor in stored}
    for coding in codings.coding_names():
        if num_symbols == {codings.get_coding(coding).num_symbols}:
            again = [
                encode(codes, tensor.arrays["levels"], coding)
                for codes, tensor in zip(decoded, stored, strict=True)
            ]
            yield {"model": Path(path).name, "coding": coding, **summary(again)}


def as_cell(value: str | float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    return f"{value:.4f}" if value < 10 else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Size and speed of the codec.")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument(
        "--checkpoint", nargs="+", default=[], help="compressed checkpoints to measure as well"
    )
    arguments = parser.parse_args()

    machine = machine_facts()
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print("b/w: bits a weight; Mw/s: million weights a second\n")
    widths = [max(WIDTH, len(title)) for title in COLUMNS.values()]
    print(format_row(list(COLUMNS.values()), widths))
    results: dict[str, list[Result]] = {"iid": [], "checkpoints": []}

    def add(kind: str, result: Result) -> None:
        results[kind].append(result)
        print(format_row([as_cell(result.get(name)) for name in COLUMNS], widths), flush=True)

    for coding in codings.coding_names():
        for model in MODELS:
            add("iid", measure_model(model, coding))
    for path in arguments.checkpoint:
        for result in measure_checkpoint(path):
            add("checkpoints", result)
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.json, {"machine": machine, **results}, indent=2)


if __name__ == "__main__":
    main()
