"""Shows what a checkpoint holds, native or compressed, and where its bits go.

    python -m qmoe_jax.inspect compressed
    python -m qmoe_jax.inspect gs://t5-data/pretrained_models/t5x/moe/switch_classic/base/e128

Of a compressed checkpoint, every expert kernel is read and checked, one at a time: its coding,
share of zeros, entropy, bits a weight for codes, levels and lengths (offsets included), and how
close that is to the entropy, which no code of independent weights can go below. Of a native one
only metadata is read.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from qmoe_jax.checkpoints import names
from qmoe_jax.checkpoints.compressed import is_compressed_checkpoint, open_compressed_checkpoint
from qmoe_jax.checkpoints.geometry import parameter_shapes
from qmoe_jax.checkpoints.read_config import read_config
from qmoe_jax.checkpoints.t5x import open_t5x_checkpoint
from qmoe_jax.codec import stats
from qmoe_jax.errors import CheckpointError, CodecError
from qmoe_jax.formatting import format_bytes, format_table

_BFLOAT16_BYTES = 2


def inspect_checkpoint(path: str | os.PathLike[str], progress: bool = False) -> dict[str, Any]:
    """Return what `path` holds, as a JSON object.

    Both kinds have `kind` ("compressed" or "native"), `path`, `config`, and `parameters` and
    `num_bytes`, each with `experts`, `dense` and `total`. A compressed one has also

      compression: how it was made, as recorded.
      kernels: for each expert kernel `name`, `coding`, `num_experts`, `out_features`,
        `in_features`, and `bits`, which is that of `codec.stats.bits`.
      experts: `bits` over all kernels (codes, levels, offsets, total, bits_per_weight, zero_share,
        entropy_share) and `compression` against bfloat16.
      model: `compression` of the whole model against bfloat16.

    and a native one `layout`, `step` and `dtypes`, the number of parameters of each dtype.

    Args:
      path: folder of the checkpoint, local or gs://.
      progress: show a progress bar on stderr.

    Raises:
      CheckpointError: nothing readable at `path`, or it is damaged.
      CodecError: damaged codes.
    """
    return _compressed(path, progress) if is_compressed_checkpoint(path) else _native(path)


def _compressed(path: str | os.PathLike[str], progress: bool) -> dict[str, Any]:
    checkpoint = open_compressed_checkpoint(path)
    kernels = []
    bar = tqdm(sorted(checkpoint.specs), "reading", unit="kernel", disable=not progress)
    for name in bar:
        coded = checkpoint.read_coded(name)
        kernels.append(
            {
                "name": name,
                "coding": coded.spec.coding,
                "num_experts": coded.spec.num_experts,
                "out_features": coded.spec.rows,
                "in_features": coded.spec.width,
                "bits": stats.bits(coded),
            }
        )
    parameters = _split(parameter_shapes(checkpoint.config))
    num_bytes = checkpoint.num_bytes()
    stored = {"experts": num_bytes["coded"], "dense": num_bytes["dense"]}
    stored["total"] = stored["experts"] + stored["dense"]
    return {
        "kind": "compressed",
        "path": checkpoint.url,
        "config": checkpoint.config.to_json(),
        "compression": dict(checkpoint.compression),
        "parameters": parameters,
        "num_bytes": stored,
        "kernels": kernels,
        "experts": {
            "bits": _sum_of_bits(kernels),
            "compression": _ratio(_BFLOAT16_BYTES * parameters["experts"], stored["experts"]),
        },
        "model": {"compression": _ratio(_BFLOAT16_BYTES * parameters["total"], stored["total"])},
    }


def _sum_of_bits(kernels: Iterable[Mapping[str, Any]]) -> dict[str, int | float]:
    """Totals of the kernels' `bits`, and the quotients of the totals."""
    sums: dict[str, int | float] = {"codes": 0, "levels": 0, "offsets": 0, "total": 0}
    weights, zeros, needed = 0, 0.0, 0.0
    for kernel in kernels:
        bits = kernel["bits"]
        for part in sums:
            sums[part] += bits[part]
        count = kernel["num_experts"] * kernel["out_features"] * kernel["in_features"]
        weights += count
        zeros += bits["zero_share"] * count
        needed += bits["entropy"] * count
    return sums | {
        "bits_per_weight": _ratio(sums["total"], weights),
        "code_bits_per_weight": _ratio(sums["codes"], weights),
        "zero_share": _ratio(zeros, weights),
        "entropy": _ratio(needed, weights),
        "entropy_share": _ratio(needed, sums["total"]),
    }


def _native(path: str | os.PathLike[str]) -> dict[str, Any]:
    checkpoint = open_t5x_checkpoint(path)
    config = read_config(checkpoint)
    num_bytes = {"experts": 0, "dense": 0, "total": 0}
    dtypes: dict[str, int] = {}
    for name, shape in checkpoint.shapes.items():
        dtype = checkpoint.dtypes[name]
        size = math.prod(shape)
        dtypes[dtype.name] = dtypes.get(dtype.name, 0) + size
        num_bytes["experts" if names.is_expert_kernel(name) else "dense"] += size * dtype.itemsize
        num_bytes["total"] += size * dtype.itemsize
    return {
        "kind": "native",
        "path": checkpoint.url,
        "config": config.to_json(),
        "layout": checkpoint.layout,
        "step": checkpoint.step,
        "dtypes": dtypes,
        "parameters": _split(checkpoint.shapes),
        "num_bytes": num_bytes,
    }


def _split(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Return the number of parameters."""
    counts = {"experts": 0, "dense": 0}
    for name, shape in shapes.items():
        counts["experts" if names.is_expert_kernel(name) else "dense"] += math.prod(shape)
    return counts | {"total": sum(counts.values())}


def _ratio(a: int | float, b: int | float) -> float:
    return a / b if b else 0.0


# --- Text ---


def format_report(report: Mapping[str, Any]) -> str:
    """Return the result of `inspect_checkpoint` as text of several lines."""
    lines = [f"{report['path']}: {report['kind']} checkpoint", "", *_geometry_lines(report)]
    if report["kind"] == "native":
        shares = ", ".join(f"{count:,} {dtype}" for dtype, count in report["dtypes"].items())
        lines += [f"layout      {report['layout']}, step {report['step']}", f"dtypes      {shares}"]
        for part, title in (("experts", "experts"), ("dense", "dense"), ("total", "whole model")):
            lines.append(
                f"{title:<12}{report['parameters'][part]:>19,} parameters "
                f"{format_bytes(report['num_bytes'][part]):>12}"
            )
        return "\n".join(lines)
    lines += ["", *_kernel_lines(report), ""]
    for part, title in (("experts", "experts"), ("dense", "dense"), ("total", "whole model")):
        parameters, num_bytes = report["parameters"][part], report["num_bytes"][part]
        in_bfloat16 = _BFLOAT16_BYTES * parameters
        lines.append(
            f"{title:<12}{parameters:>19,} parameters {format_bytes(num_bytes):>12}, in bfloat16 "
            f"{format_bytes(in_bfloat16):>12}: {_ratio(in_bfloat16, num_bytes):.2f}x smaller"
        )
    return "\n".join(lines)


def _geometry_lines(report: Mapping[str, Any]) -> list[str]:
    config = report["config"]
    tied = "tied" if config["tied_logits"] else "not tied"
    return [
        f"embedding   {config['num_embeddings']} x {config['embed_dim']}, logits {tied}",
        *(
            f"{stack}     {config[f'num_{stack}_layers']} layers, "
            f"{len(config[f'{stack}_sparse_layers'])} of them sparse"
            for stack in ("encoder", "decoder")
        ),
        f"attention   {config['num_heads']} heads of {config['head_dim']}",
        f"experts     {config['num_experts']} a sparse layer, {config['expert_mlp_dim']} wide, "
        f"{', '.join(config['mlp_activations'])}",
    ]


def _kernel_lines(report: Mapping[str, Any]) -> list[str]:
    heads = ("kernel", "coding", "zeros", "entropy", "codes", "levels", "lengths", "bits/weight")
    rows: list[tuple[str, ...]] = [(*heads, "of limit")]
    for kernel in report["kernels"]:
        rows.append(_bits_row(kernel["name"], kernel["coding"], kernel["bits"]))
    rows.append(_bits_row("all experts", "", report["experts"]["bits"]))
    widths = (0, 13, 7, 8, 7, 7, 8, 12, 9)
    table = format_table(rows, min_widths=widths, separator=" ", num_left=2, rule="line")
    return table.splitlines()


def _bits_row(name: str, coding: str, bits: Mapping[str, Any]) -> tuple[str, ...]:
    weights = _ratio(bits["total"], bits["bits_per_weight"])
    codes, levels, lengths = (_ratio(bits[p], weights) for p in ("codes", "levels", "offsets"))
    return (
        *(name, coding, f"{bits['zero_share']:.2%}", f"{bits['entropy']:.4f}", f"{codes:.4f}"),
        *(f"{levels:.4f}", f"{lengths:.4f}", f"{bits['bits_per_weight']:.4f}"),
        f"{bits['entropy_share']:.1%}",
    )


# --- Command line ---


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m qmoe_jax.inspect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", metavar="PATH", help="folder of the checkpoint, local or gs://")
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    arguments = parser.parse_args(argv)
    try:
        report = inspect_checkpoint(arguments.path, progress=sys.stderr.isatty())
    except (CheckpointError, CodecError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report, indent=1) if arguments.json else format_report(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
