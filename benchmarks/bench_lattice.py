"""Size and speed of the "lattice" coding, beside what an adaptive mixing coder would need.

    python benchmarks/bench_lattice.py [--codes FILE.npz ...] [--json PATH]

A file of codes holds those of one kernel: `codes` uint8 [experts, rows, width], `step_index` uint8
[experts, width], `origin` float32 [experts]. Without files, layers of 768 x 3072 and 3072 x 768 are
made: random weights, quantized by the lattice's sweep for correlated inputs of uneven energies, two
experts each. Bits are over all weights, everything that is stored counted; the bound
(`adaptive_bound.py`) has no steps to store, and rows and columns as contexts. Encoding is timed on
the host, decoding with XLA on JAX's default device, one expert a call; the best of several runs.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from adaptive_bound import KINDS, bound_bits
from machine import machine_facts

from qmoe_jax.atomic_file import write_json
from qmoe_jax.codec.codings import validate
from qmoe_jax.codec.decode import decode_expert, decode_expert_weights, device_arrays
from qmoe_jax.codec.encode import encode
from qmoe_jax.codec.stats import bits_by_part
from qmoe_jax.formatting import format_row

SHAPES = ((3072, 768), (768, 3072))
STEPS = (3.0, 4.0, 5.0)
"""In units of the kernel's root mean square: `c` of the lattice grid."""
NUM_EXPERTS = 2
PARTS = ("plane 1", "planes 2-4", "signs", "remainders", "columns", "other")
COLUMNS = ("codes", "zeros", *PARTS, "stored", "bound", "ratio", "encode Mw/s", "decode Mw/s")
Arrays = dict[str, np.ndarray]
Result = dict[str, Any]


def quantized_layer(
    rows: int, width: int, c: float, seed: int
) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """Codes, step indices and origin of one expert, by GPTQ's sweep on a lattice in NumPy.

    Inputs have width / 4 strong directions and energies e^(2 * 0.7 n) by feature, n normal; weights
    differ in scale by row (20 %) and by column (25 %).
    """
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((width, width // 4)) / np.sqrt(width // 4)
    energies = np.exp(rng.normal(0, 0.7, width))
    hessian = energies[:, None] * (mixing @ mixing.T + 0.3 * np.eye(width)) * energies
    hessian += 0.1 * np.mean(np.diag(hessian)) * np.eye(width)
    factor = np.linalg.cholesky(hessian[::-1, ::-1])[::-1, ::-1]  # upper, hessian = V V^T
    weights = rng.standard_normal((rows, width)) * np.exp(rng.normal(0, 0.2, (rows, 1)))
    weights *= np.exp(rng.normal(0, 0.25, width))
    diagonal = np.diag(factor)
    smallest = -np.log2(diagonal.min())
    index = np.clip(np.round(16 * (smallest + np.log2(diagonal))), 0, 254)
    origin = c * np.sqrt(np.mean(weights**2)) * 2 ** (smallest + np.mean(np.log2(diagonal)))
    steps = origin * 2 ** (-index / 16)
    errors, multiples = np.zeros((rows, width)), np.zeros((rows, width), int)
    for start in range(0, width, 128):
        stop = min(start + 128, width)
        carried = errors[:, :start] @ factor[:start, start:stop]
        for j in range(start, stop):
            feedback = carried[:, j - start] + errors[:, start:j] @ factor[start:j, j]
            wanted = weights[:, j] + feedback / diagonal[j]
            multiples[:, j] = np.clip(np.rint(wanted / steps[j]), -127, 127)
            errors[:, j] = weights[:, j] - multiples[:, j] * steps[j]
    codes = np.where(multiples < 0, -2 * multiples - 1, 2 * multiples)
    return codes.astype(np.uint8), index.astype(np.uint8), np.float32(origin)


def made_layers() -> Iterator[tuple[str, Arrays]]:
    for rows, width in SHAPES:
        for c in STEPS:
            experts = [quantized_layer(rows, width, c, seed) for seed in range(NUM_EXPERTS)]
            parts = [np.stack(part) for part in zip(*experts, strict=True)]
            names = ("codes", "step_index", "origin")
            yield f"{rows}x{width} c={c:g}", dict(zip(names, parts, strict=True))


def best_seconds(run: Callable[[], object], repeats: int = 8) -> float:
    jax.block_until_ready(run())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def measure(name: str, arrays: Arrays) -> Result:
    codes = arrays["codes"]
    levels = {key: arrays[key] for key in ("step_index", "origin")}
    coded = encode(codes, levels, "lattice")
    validate(coded)
    decode = jax.jit(decode_expert, static_argnums=0)
    weights = jax.jit(decode_expert_weights, static_argnums=0)
    on_device = device_arrays(coded)
    for expert in range(len(codes)):
        if not np.array_equal(np.asarray(decode(coded.spec, on_device, expert)), codes[expert]):
            raise SystemExit(f"{name}: expert {expert} decodes to other codes.")
    parts = bits_by_part(coded)
    stored = sum(parts.values())
    bound = bound_bits(codes, arrays["step_index"])
    a_weight = {part: count / codes.size for part, count in parts.items()}
    shown = {
        "plane 1": sum(a_weight[name] for name in ("flags", "firsts", "rests", "plane 1")),
        "planes 2-4": sum(a_weight[f"plane {number}"] for number in (2, 3, 4)),
        "signs": a_weight["signs"],
        "remainders": a_weight["remainders"],
        "columns": a_weight["columns"] + a_weight["bases"],
    }
    shown["other"] = stored / codes.size - sum(shown.values())
    one = codes[0].size
    return {
        "codes": name,
        "zeros": float((codes == 0).mean()),
        **shown,
        "stored": stored / codes.size,
        "bound": float(bound.sum()) / codes.size,
        "ratio": stored / float(bound.sum()),
        "bound by kind": dict(zip(KINDS, (bound / codes.size).tolist(), strict=True)),
        "encode Mw/s": codes.size / best_seconds(lambda: encode(codes, levels, "lattice"), 3) / 1e6,
        "decode Mw/s": one / best_seconds(lambda: decode(coded.spec, on_device, 0)) / 1e6,
        "weights Mw/s": one / best_seconds(lambda: weights(coded.spec, on_device, 0)) / 1e6,
        "stored bits": stored,
        "bound bits": float(bound.sum()),
    }


def as_cell(value: str | float) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.4f}" if value < 10 else f"{value:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Size and speed of the lattice coding.")
    parser.add_argument("--codes", nargs="+", type=Path, help="codes of kernels, instead of ours")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()
    machine = machine_facts()
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print("bits a weight; Mw/s: million weights a second\n")
    files = ((path.stem, dict(np.load(path))) for path in arguments.codes or ())
    results = []
    widths = [44, *[max(10, len(column)) for column in COLUMNS[1:]]]
    print(format_row(COLUMNS, widths))
    for name, arrays in files if arguments.codes else made_layers():
        results.append(measure(name, arrays))
        print(format_row([as_cell(results[-1][column]) for column in COLUMNS], widths), flush=True)
    stored, bound = (sum(r[key] for r in results) for key in ("stored bits", "bound bits"))
    print(f"\nall: {stored / bound:.4f} of the bound")
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.json, {"machine": machine, "results": results}, indent=2)


if __name__ == "__main__":
    main()
