"""Converts between the layout of the published QMoE models and compressed checkpoints.

A published model (base-128, large-128, c-2048 of ISTA-DASLab) to a compressed checkpoint, which
qmoe_jax.infer, qmoe_jax.evaluate and load_switch read:

    python -m qmoe_jax.convert_published import switch-base-128_qmoe compressed

A compressed checkpoint with the coding "qmoe" to the published layout, for the original code:

    python -m qmoe_jax.convert_published export compressed switch-base-128_qmoe

Weights stay bit for bit the same. Needs PyTorch: pip install 'qmoe-jax[torch]'.
"""

import argparse
import sys
from collections.abc import Sequence

from qmoe_jax.checkpoints.published import export_published, import_published
from qmoe_jax.errors import CheckpointError, CodecError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    arguments = _parser().parse_args(argv)
    convert = import_published if arguments.direction == "import" else export_published
    try:
        convert(
            arguments.source,
            arguments.destination,
            overwrite=arguments.overwrite,
            progress=not arguments.no_progress,
        )
    except (CheckpointError, CodecError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.destination} written")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m qmoe_jax.convert_published",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "direction",
        choices=("import", "export"),
        help="import: published layout to compressed checkpoint; export: the other way",
    )
    parser.add_argument("source", metavar="SRC", help="folder to read")
    parser.add_argument("destination", metavar="DST", help="folder to write; must not exist")
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it exists")
    parser.add_argument("--no-progress", action="store_true", help="show no progress bar")
    return parser


if __name__ == "__main__":
    sys.exit(main())
