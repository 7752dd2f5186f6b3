"""KL and loss against bits on the demo model: rounding, the paper's grids, the lattice.

    python benchmarks/bench_quality.py --seeds 0 1 2

Every variant compresses the demo's checkpoint on calibration text of a seed; KL, agreement and the
paired loss gap to the uncompressed model are measured on validation text. Bits are what is stored,
everything counted. What is done already in the output is not done again.
"""

import argparse
import dataclasses
import itertools
import json
import math
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
from machine import machine_facts

from qmoe_jax.atomic_file import write_json
from qmoe_jax.calibration.tokens import TokenFile, read_tokens, write_tokens
from qmoe_jax.demo.docstrings import demo_tokens
from qmoe_jax.evaluation.divergence import measure_divergence
from qmoe_jax.formatting import format_table
from qmoe_jax.models.load import dequantized, load_switch
from qmoe_jax.pipeline.allocation import Probe, allocate, measure_probes
from qmoe_jax.pipeline.compress import compress
from qmoe_jax.quantization.settings import CompressionSettings

DEMO = pathlib.Path(__file__).parent.parent / "tests/golden/switch_demo"
LATTICE = CompressionSettings(grid="lattice")
CHECKPOINT = DEMO / "checkpoint_4200"
PAPER = {
    f"{method} {grid}": {"method": method.lower(), "grid": grid}
    for method in ("RTN", "GPTQ")
    for grid in ("ternary", "2bit")
}
# Those that the comparison with ternary needs, for all seeds; the rest of the curve for the first.
STEPS = ((4.0, 3.0, 5.0, 2.25), (1.0, 1.5, 3.5, 8.0))
TARGETS = ((0.3, 0.4, 0.5, 0.6, 1.075, 1.1), (0.8, 1.5, 2.0))


def tokens(folder: pathlib.Path, split: str, count: int, seed: int) -> TokenFile:
    """Tokenise the demo's corpus once, into a file of the folder."""
    path = folder / f"tokens_{split}_{count}_seed{seed}.npz"
    if not path.exists():
        made = demo_tokens(str(DEMO / "sentencepiece.model"), split, count, seed=seed)
        write_tokens(path, made.tokens, made.metadata)
    return read_tokens(path)


def measure(
    calibration: TokenFile, batches: list, reference: tuple[Any, Any], **settings: Any
) -> dict:
    """Compress, load, and compare with the uncompressed model."""
    with tempfile.TemporaryDirectory() as folder:
        report = compress(CHECKPOINT, f"{folder}/out", calibration, progress=False, **settings)
        module, variables = dequantized(*load_switch(f"{folder}/out"))
        divergence = measure_divergence(module, variables, *reference, batches)
    return {
        "bits": report.bits_per_weight,
        "seconds": report.seconds,
        **divergence.to_json(),
    }


def variants(probes: list[Probe], rest: bool) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield family, name and settings of the needed variants, or of the rest."""
    for name, settings in PAPER.items():
        if (name == "GPTQ ternary") != rest:
            yield name, name, settings
    for step in STEPS[rest]:
        yield "lattice uniform", f"step {step:g}", {"grid": "lattice", "step": step}
    for target in TARGETS[rest]:
        settings = {
            "grid": "lattice",
            "kernel_steps": allocate(probes, target),
            "target_bits_per_weight": target,
        }
        yield "lattice allocated", f"target {target:g}", settings


def interpolated(points: list[dict], x: str, y: str, at: float) -> float:
    """Return y where x is `at`, by straight lines over log x and log y; NaN outside."""
    points = sorted((p for p in points if p[x] > 0 and p[y] > 0), key=lambda p: p[x])
    xs, ys = (np.log([p[key] for p in points]) for key in (x, y))
    if len(points) < 2 or not xs[0] <= math.log(at) <= xs[-1]:
        return float("nan")
    return float(np.exp(np.interp(math.log(at), xs, ys)))


def comparison(results: list[dict]) -> dict[str, Any]:
    """Each lattice family against GPTQ ternary, seed by seed."""
    found: dict[str, Any] = {}
    for family in ("lattice uniform", "lattice allocated"):
        rows = []
        for seed in sorted({r["seed"] for r in results}):
            own = [r for r in results if r["seed"] == seed]
            ternary = next((r for r in own if r["family"] == "GPTQ ternary"), None)
            points = [r for r in own if r["family"] == family]
            if ternary is None or not points:
                continue
            rows.append(
                {
                    "bits_at_equal_kl": interpolated(points, "kl", "bits", ternary["kl"]),
                    "bits_at_equal_gap": interpolated(points, "gap", "bits", ternary["gap"]),
                    "kl_share_at_equal_bits": interpolated(points, "bits", "kl", ternary["bits"])
                    / ternary["kl"],
                    "ternary_bits": ternary["bits"],
                }
            )
        found[family] = {
            key: {
                "mean": float(np.mean([row[key] for row in rows])),
                "spread": float(np.ptp([row[key] for row in rows])),
            }
            for key in (rows[0] if rows else ())
        }
    return found


def plot(results: list[dict], path: pathlib.Path) -> None:
    """Draw KL and gap against bits, all seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5))
    families = list(dict.fromkeys(r["family"] for r in results))
    for axis, key, label in zip(
        axes, ("kl", "gap"), ("KL, nats a target token", "loss gap, nats"), strict=True
    ):
        for family in families:
            points = sorted((r for r in results if r["family"] == family), key=lambda r: r["bits"])
            style = "o-" if family.startswith("lattice") else "s"
            names = list(dict.fromkeys(r["name"] for r in points))
            means = [
                [np.mean([r[k] for r in points if r["name"] == name]) for k in ("bits", key)]
                for name in names
            ]
            axis.plot(*np.transpose(means), style, label=family, markersize=4)
        axis.set(xlabel="stored bits a weight", ylabel=label, yscale="log")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure what is missing in the output, and print it all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num_examples", type=int, default=1280)
    parser.add_argument("--num_validation_examples", type=int, default=512)
    parser.add_argument("--tokens", type=pathlib.Path, default=None, help="folder of token files")
    results_folder = pathlib.Path(__file__).parent / "results"
    parser.add_argument("--output", type=pathlib.Path, default=results_folder / "quality.json")
    args = parser.parse_args()
    facts = {
        "num_examples": args.num_examples,
        "num_validation_examples": args.num_validation_examples,
    }
    document: dict[str, Any] = {
        "settings": facts,
        "machine": machine_facts(),
        "comparison": {},
        "probes": {},
        "results": [],
    }
    if args.output.exists() and json.loads(args.output.read_text())["settings"] == facts:
        document = json.loads(args.output.read_text())
    results = document["results"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.tokens or pathlib.Path(temporary)
        validation = tokens(folder, "validation", args.num_validation_examples, 0)
        batches = [batch.arrays() for batch in validation.batches(32)]
        reference = load_switch(CHECKPOINT)
        texts = {seed: tokens(folder, "train", args.num_examples, seed) for seed in args.seeds}
        for rest, seed in itertools.product((False, True), args.seeds):
            if rest and seed != args.seeds[0]:
                continue
            key, calibration = str(seed), texts[seed]
            if key not in document["probes"]:
                measured = measure_probes(*reference, calibration, LATTICE)
                document["probes"][key] = [dataclasses.asdict(probe) for probe in measured]
                write_json(args.output, document)
            probes = [Probe(**fields) for fields in document["probes"][key]]
            for family, name, settings in variants(probes, rest):
                at = {"family": family, "name": name, "seed": seed}
                if any(at.items() <= result.items() for result in results):
                    continue
                results.append(at | measure(calibration, batches, reference, **settings))
                print(results[-1], flush=True)
                document["comparison"] = comparison(results)
                write_json(args.output, document)
    plot(results, args.output.with_suffix(".png"))
    rows = [["family", "variant", "seed", "bits", "KL", "gap", "agreement"]]
    for r in results:
        figures = f"{r['bits']:.3f}", f"{r['kl']:.5f}", f"{r['gap']:+.4f}", f"{r['agreement']:.2%}"
        rows.append([r["family"], r["name"], str(r["seed"]), *figures])
    print(format_table(rows))
    print(document["comparison"])


if __name__ == "__main__":
    main()
