"""Speed and size of the codec on the shapes of the QMoE paper, with iid ternary codes.

    python benchmarks/bench_codec.py [--json PATH]

Encoding is timed on the host (all cores), decoding with XLA on JAX's default device, codes and
bfloat16 weights, one expert a call, experts in turn. Best of several runs after one warm-up. The
ceilings stand beside the results: for size the entropy of the codes, for decoding the rate at
which the same device writes bfloat16 weights that need no decoding (an elementwise pass over as
many 2-byte values).
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from qmoe_jax.codec import codings
from qmoe_jax.codec.decode import decode_expert, decode_expert_weights, device_arrays
from qmoe_jax.codec.encode import encode
from qmoe_jax.codec.stats import bits

# out, in, zero share of the codes: base128 (both kernels), large128, c2048.
SHAPES = [(768, 3072, 0.857), (3072, 768, 0.857), (1024, 4096, 0.864), (2080, 6144, 0.886)]
NUM_EXPERTS = 3
COLUMNS = {
    "coding": "coding",
    "shape": "out x in",
    "zero_share": "zeros",
    "code_bits_per_weight": "code bit/w",
    "entropy": "entropy",
    "bits_per_weight": "total bit/w",
    "entropy_share": "of limit",
    "encode": "encode Mw/s",
    "decode_codes": "codes Mw/s",
    "decode_weights": "weights Mw/s",
    "ceiling": "ceiling Mw/s",
}


def best_seconds(run: Callable[[int], object], repeats: int = 6) -> float:
    run(0)
    seconds = []
    for index in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run(index % NUM_EXPERTS))
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def measure(coding: str, rows: int, width: int, zero_share: float) -> dict[str, str | float]:
    rng = np.random.default_rng(0)
    draws = rng.random((NUM_EXPERTS, rows, width), np.float32)
    codes = (draws > zero_share).astype(np.uint8) + (draws > (1 + zero_share) / 2)
    levels = rng.normal(size=(NUM_EXPERTS, rows, 2)).astype(ml_dtypes.bfloat16)
    coded = encode(codes, levels, coding)
    arrays = device_arrays(coded)
    decode = jax.jit(decode_expert, static_argnums=0)
    weights = jax.jit(decode_expert_weights, static_argnums=0)
    for expert in range(NUM_EXPERTS):
        decoded = np.asarray(decode(coded.spec, arrays, expert))
        if not np.array_equal(decoded, codes[expert]):
            raise SystemExit(f"{coding} {rows}x{width}: expert {expert} decodes to other codes.")
    plain = jnp.zeros((NUM_EXPERTS, rows, width), jnp.bfloat16)
    copy = jax.jit(lambda plain, expert: plain[expert] + 1)

    seconds = {
        "encode": best_seconds(lambda _: encode(codes, levels, coding), 3) / NUM_EXPERTS,
        "decode_codes": best_seconds(lambda e: decode(coded.spec, arrays, e)),
        "decode_weights": best_seconds(lambda e: weights(coded.spec, arrays, e)),
        "ceiling": best_seconds(lambda e: copy(plain, e)),
    }
    speeds = {name: rows * width / each / 1e6 for name, each in seconds.items()}
    return {"coding": coding, "shape": f"{rows} x {width}"} | bits(coded) | speeds


def as_cell(value: str | float) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.3f}" if value < 10 else f"{value:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed and size of the codec.")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    path = parser.parse_args().json

    device = jax.devices()[0]
    machine = {
        "device": f"{device.platform} {device.device_kind}",
        "num_cpus": os.cpu_count(),
        "machine": platform.machine(),
        "jax": jax.__version__,
        "numpy": np.__version__,
    }
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print("Mw/s: million weights a second\n")
    print(" | ".join(f"{title:>12}" for title in COLUMNS.values()))
    results = []
    for coding in codings.coding_names():
        for rows, width, zero_share in SHAPES:
            results.append(measure(coding, rows, width, zero_share))
            print(" | ".join(f"{as_cell(results[-1][name]):>12}" for name in COLUMNS), flush=True)
    if path is not None:
        path.write_text(json.dumps({"machine": machine, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
