"""KL on the demo model with other settings of GPTQ, at equal bits: which are worth changing.

    python benchmarks/bench_settings.py --json benchmarks/results/settings.json

The lattice at its default step, one setting changed at a time, some seeds of calibration text; KL
to the uncompressed model on validation text. Settings move bits a little too, so each KL is moved
to the bits of the default along the curve of the default (its step made smaller and larger).
Sizes are stored bits, everything counted.
"""

import argparse
import math
import pathlib
import tempfile
from typing import Any

import numpy as np
from bench_quality import CHECKPOINT, measure, tokens
from machine import machine_facts

from qmoe_jax.atomic_file import write_json
from qmoe_jax.formatting import format_table
from qmoe_jax.models.load import load_switch
from qmoe_jax.quantization.settings import CompressionSettings

STEP = CompressionSettings().step
CURVE = (0.85 * STEP, STEP, STEP / 0.85)
CHANGES: tuple[dict[str, Any], ...] = (
    *({"damping": damping} for damping in (0.01, 0.03, 0.3, 1.0)),
    {"act_order": True},
    {"move_wo": False},
    {"move_wo": False, "true_sequential": True},
    {"max_tokens_factor": 16.0},
    {"premask_sentinels": True},
)


def at_equal_bits(found: dict[str, float], curve: list[dict[str, float]]) -> float:
    """Return the KL that the default has at the bits of `found`; NaN outside of its curve."""
    points = sorted(curve, key=lambda point: point["bits"])
    bits, kl = (np.log([point[key] for point in points]) for key in ("bits", "kl"))
    outside = float("nan")
    return math.exp(np.interp(math.log(found["bits"]), bits, kl, left=outside, right=outside))


def main() -> None:
    """Measure all changes, and print them beside the default."""
    parser = argparse.ArgumentParser(description="KL with other settings, at equal bits.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num_examples", type=int, default=1280)
    parser.add_argument("--num_validation_examples", type=int, default=512)
    parser.add_argument("--tokens", type=pathlib.Path, default=None, help="folder of token files")
    parser.add_argument("--json", type=pathlib.Path, help="write the results as JSON")
    args = parser.parse_args()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.tokens or pathlib.Path(temporary)
        validation = tokens(folder, "validation", args.num_validation_examples, 0)
        batches = [batch.arrays() for batch in validation.batches(32)]
        reference = load_switch(CHECKPOINT)
        for seed in args.seeds:
            calibration = tokens(folder, "train", args.num_examples, seed)
            curve = [measure(calibration, batches, reference, step=step) for step in CURVE]
            for change in ({}, *CHANGES):
                found = measure(calibration, batches, reference, **change) if change else curve[1]
                share = found["kl"] / at_equal_bits(found, curve)
                kept = None if math.isnan(share) else share
                results.append({"change": change, "seed": seed, "kl_share": kept, **found})
                figures = f"{found['bits']:.4f} {found['kl']:.5f} {share:.3f}"
                print(change, seed, figures, flush=True)
                if args.json is not None:
                    settings = CompressionSettings().to_json()
                    facts = {"machine": machine_facts(), "settings": settings}
                    write_json(args.json, facts | {"results": results})
    rows = [["change", "bits", "KL", "KL over the default's at these bits", "by seed"]]
    for change in ({}, *CHANGES):
        own = [result for result in results if result["change"] == change]
        shares = [math.nan if r["kl_share"] is None else r["kl_share"] for r in own]
        bits, kl = (np.mean([r[key] for r in own]) for key in ("bits", "kl"))
        name = ", ".join(f"{key} {value}" for key, value in change.items()) or "none"
        by_seed = " ".join(f"{share:.3f}" for share in shares)
        rows.append([name, f"{bits:.4f}", f"{kl:.5f}", f"{np.mean(shares):.3f}", by_seed])
    print(format_table(rows))


if __name__ == "__main__":
    main()
