"""Compress a small trained Switch Transformer and compare the results.

Needs no network: the model is in a checkout of the project (tests/golden/switch_demo), and the text
is the docstrings of the installed packages.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from qmoe_jax import resources
from qmoe_jax.cli.flags import CommandParser
from qmoe_jax.paths import local_path

IF_INTERRUPTED = "the same command goes on where it was"


def main(argv: Sequence[str]) -> int:
    """Run the demo; return the exit status."""
    arguments = make_parser().parse_args(argv)
    checkpoint, vocabulary = arguments.checkpoint, arguments.vocabulary
    if checkpoint is None:
        checkpoint = _file(arguments.model, "checkpoint_4200")
    if vocabulary is None:
        vocabulary = _file(arguments.model, "sentencepiece.model")
    # After parsing, so that --help and mistakes answer at once.
    from qmoe_jax.demo import report
    from qmoe_jax.demo.run import run_demo

    document = run_demo(
        checkpoint,
        vocabulary,
        arguments.output,
        num_examples=arguments.num_examples,
        num_validation_examples=arguments.num_validation_examples,
        seed=arguments.seed,
        implementation=arguments.implementation,
    )
    folder = local_path(arguments.output, "--output")
    print("\n" + report.table(document))
    print(f"\n{folder / 'report.json'}: these figures; {folder / 'report.html'}: with plots.")
    return 0


def _file(model: str | os.PathLike[str], name: str) -> Path:
    path = local_path(model, "--model") / name
    if not path.exists():
        raise ValueError(
            f"{path} does not exist; run from a checkout of the project, or pass --model, or "
            "--checkpoint and --vocabulary"
        )
    return path


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = CommandParser("demo", description=__doc__)
    parser.add_argument("--output", default="demo_out", help="folder for results (%(default)s)")
    parser.add_argument(
        "--model",
        default=resources.demo_model(),
        help="folder with checkpoint_4200 and sentencepiece.model (the repository's)",
    )
    parser.add_argument("--checkpoint", help="another native T5X checkpoint of that vocabulary")
    parser.add_argument("--vocabulary", help="another sentencepiece.model")
    parser.add_argument(
        "--num_examples", type=int, default=1280, help="calibration examples (%(default)s)"
    )
    parser.add_argument(
        "--num_validation_examples",
        type=int,
        default=1600,
        help="validation examples (%(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the examples (%(default)s)")
    parser.add_argument(
        "--implementation",
        default="auto",
        help="of products with codes: xla, cpu (straight from stored codes), cuda (the CUDA "
        "kernels; needs an NVIDIA GPU and CuPy), cuda_fragments (the same, with codes laid out "
        "once more for tensor cores, in about two bits a weight; not run on a GPU yet), or auto, "
        "the fastest there is by what is known (%(default)s)",
    )
    return parser
