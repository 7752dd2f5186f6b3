"""Convert between compressed checkpoints and other layouts.

One of the published QMoE models (base-128, large-128, c-2048 of ISTA-DASLab) to a compressed
checkpoint, which `infer`, `evaluate` and load_switch read:

    qmoe-jax convert published import switch-base-128_qmoe compressed

A compressed checkpoint with the coding "qmoe" to the published layout, for the original code:

    qmoe-jax convert published export compressed switch-base-128_qmoe

These need PyTorch: pip install 'qmoe-jax[torch]'.

A compressed checkpoint to one in another coding of its grid ("tunstall" or "qmoe" of ternary
experts, "tunstall_2bit" or "packed2" of 2-bit ones), without a new run:

    qmoe-jax convert coding qmoe compressed compressed_qmoe

Weights stay bit for bit the same.
"""

import argparse
from collections.abc import Sequence

from qmoe_jax.cli.flags import CommandParser

IF_INTERRUPTED = "what was written is not taken for whole, run it again"


def main(argv: Sequence[str]) -> int:
    """Run the command; return the exit status."""
    arguments = make_parser().parse_args(argv)
    source, destination = arguments.source, arguments.destination
    options = {"overwrite": arguments.overwrite, "progress": not arguments.no_progress}
    if arguments.layout == "coding":
        from qmoe_jax.checkpoints.recode import recode_checkpoint

        recode_checkpoint(source, destination, arguments.to, **options)
    elif arguments.to not in ("import", "export"):
        raise ValueError(f"published {arguments.to}: write published import or published export")
    else:
        from qmoe_jax.checkpoints.published import export_published, import_published

        convert = import_published if arguments.to == "import" else export_published
        convert(source, destination, **options)
    print(f"{arguments.destination} written")
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = CommandParser("convert", description=__doc__)
    parser.add_argument(
        "layout",
        choices=("published", "coding"),
        help="published: that of the published QMoE models; coding: ours, codes stored otherwise",
    )
    parser.add_argument(
        "to",
        metavar="HOW",
        help="published import: the layout to a compressed checkpoint; published export: the other "
        "way; coding: the name of the coding",
    )
    parser.add_argument("source", metavar="SRC", help="folder to read")
    parser.add_argument("destination", metavar="DST", help="folder to write; must not exist")
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it exists")
    parser.add_argument("--no-progress", action="store_true", help="show no progress bar")
    return parser
