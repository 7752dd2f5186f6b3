"""Writes a native T5X checkpoint from a compressed one: the experts become dense kernels again.

    qmoe-jax dequantize compressed/checkpoint_550000 native

writes native/checkpoint_550000, for T5X and whatever reads its checkpoints. It takes as much
space as the uncompressed model. Weights are those that the codes stand for, to the bit in float32.
"""

import argparse
from collections.abc import Sequence

from qmoe_jax.cli.flags import CommandParser

IF_INTERRUPTED = "nothing is left behind, run it again"


def main(argv: Sequence[str]) -> int:
    """Run the command; return the exit status."""
    arguments = _parser().parse_args(argv)
    from qmoe_jax.checkpoints.dequantize import dequantize_checkpoint

    path = dequantize_checkpoint(
        arguments.compressed,
        arguments.folder,
        step=arguments.step,
        dtype=arguments.dtype,
        progress=not arguments.no_progress,
    )
    print(f"{path} written")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser("dequantize", description=__doc__)
    parser.add_argument(
        "compressed", metavar="COMPRESSED", help="compressed checkpoint, local or gs://"
    )
    parser.add_argument(
        "folder",
        metavar="OUTPUT_FOLDER",
        help="local folder; gets checkpoint_<step>, which must not exist",
    )
    parser.add_argument(
        "--step",
        type=int,
        help="training step that T5X shall see; by default that of COMPRESSED's name, else 0",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="float32 (default) keeps every value; bfloat16 is half the size, exact for ternary "
        "experts, rounds 2-bit ones, and leaves what is stored as float32 as it is",
    )
    parser.add_argument("--no-progress", action="store_true", help="show no progress bar")
    return parser
