"""Show what a checkpoint holds, native or compressed, and where its bits go.

    qmoe-jax inspect compressed
    qmoe-jax inspect gs://t5-data/pretrained_models/t5x/moe/switch_classic/base/e128

Of a compressed checkpoint, every expert kernel is read and checked, one at a time: its coding,
share of zeros, entropy, bits a weight for codes, levels and lengths (offsets included), and how
close that is to the entropy, which no code of independent weights can go below. Then all experts'
bits by part, such as signs and steps, and beside these what files take apart from arrays. Of a
native one only metadata is read.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

from qmoe_jax.checkpoints.inspection import BFLOAT16_BYTES, inspect_checkpoint, ratio
from qmoe_jax.cli.flags import CommandParser
from qmoe_jax.formatting import format_bytes, format_table

IF_INTERRUPTED = "nothing was written, run it again"


def main(argv: Sequence[str]) -> int:
    """Run the command; return the exit status."""
    arguments = make_parser().parse_args(argv)
    report = inspect_checkpoint(arguments.path, progress=True)
    print(json.dumps(report, indent=1) if arguments.json else format_report(report))
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = CommandParser("inspect", description=__doc__)
    parser.add_argument("path", metavar="PATH", help="folder of the checkpoint, local or gs://")
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    return parser


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
    lines += ["", *_kernel_lines(report), "", *_part_lines(report), ""]
    for part, title in (("experts", "experts"), ("dense", "dense"), ("total", "whole model")):
        parameters, num_bytes = report["parameters"][part], report["num_bytes"][part]
        in_bfloat16 = BFLOAT16_BYTES * parameters
        lines.append(
            f"{title:<12}{parameters:>19,} parameters {format_bytes(num_bytes):>12}, in bfloat16 "
            f"{format_bytes(in_bfloat16):>12}: {ratio(in_bfloat16, num_bytes):.2f}x smaller"
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


def _part_lines(report: Mapping[str, Any]) -> list[str]:
    """Where the bits of all experts go, and beside these the container of the whole model."""
    bits = report["experts"]["bits"]
    weights = ratio(bits["total"], bits["bits_per_weight"])
    parts = [(part["kind"], part["name"], part["bits"]) for part in report["experts"]["parts"]]
    parts.append(("container", "manifest, metadata, filler", 8 * report["container"]))
    rows = [("of experts", "part", "bytes", "bits/weight", "share")]
    rows += [
        (
            kind,
            name,
            format_bytes(n // 8),
            f"{ratio(n, weights):.4f}",
            f"{ratio(n, bits['total']):.1%}",
        )
        for kind, name, n in parts
        if n
    ]
    widths = (0, 0, 10, 12, 7)
    return format_table(
        rows, min_widths=widths, separator=" ", num_left=2, rule="line"
    ).splitlines()


def _bits_row(name: str, coding: str, bits: Mapping[str, Any]) -> tuple[str, ...]:
    weights = ratio(bits["total"], bits["bits_per_weight"])
    codes, levels, lengths = (ratio(bits[p], weights) for p in ("codes", "levels", "offsets"))
    return (
        *(name, coding, f"{bits['zero_share']:.2%}", f"{bits['entropy']:.4f}", f"{codes:.4f}"),
        *(f"{levels:.4f}", f"{lengths:.4f}", f"{bits['bits_per_weight']:.4f}"),
        f"{bits['entropy_share']:.1%}",
    )
