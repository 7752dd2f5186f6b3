"""Convert between native or compressed checkpoints and the layouts of others.

A Hugging Face folder (google/switch-base-8 and its like: config.json, and safetensors or PyTorch
files, whole or in shards) to a native T5X checkpoint OUT/checkpoint_0, which `compress` takes, with
its spiece.model beside it:

    qmoe-jax convert huggingface switch-base-8 native

and a native or compressed checkpoint to a Hugging Face folder, its experts dense again:

    qmoe-jax convert huggingface compressed switch-base-8-qmoe --vocabulary native/spiece.model

Safetensors need pip install 'qmoe-jax[huggingface]', PyTorch files 'qmoe-jax[torch]'.

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
import os
from collections.abc import Sequence

from qmoe_jax.cli.flags import CommandParser

IF_INTERRUPTED = "what was written is not taken for whole, run it again"


def main(argv: Sequence[str]) -> int:
    """Run the command; return the exit status."""
    # Intermixed: HOW may be left out, and options may stand anywhere.
    arguments = make_parser().parse_intermixed_args(argv)
    source, destination = arguments.source, arguments.destination
    progress = not arguments.no_progress
    _check_options(arguments)
    if arguments.layout == "huggingface":
        destination = _huggingface(arguments)
    elif arguments.layout == "coding":
        from qmoe_jax.checkpoints.recode import recode_checkpoint

        recode_checkpoint(
            source, destination, arguments.to, overwrite=arguments.overwrite, progress=progress
        )
    else:
        from qmoe_jax.checkpoints.published import export_published, import_published

        convert = import_published if arguments.to == "import" else export_published
        convert(source, destination, overwrite=arguments.overwrite, progress=progress)
    print(f"{destination} written")
    return 0


def _check_options(arguments: argparse.Namespace) -> None:
    layout, to = arguments.layout, arguments.to
    if layout == "huggingface" and to is not None:
        raise ValueError(
            f"huggingface {to}: write convert huggingface SRC DST; what SRC is decides which way"
        )
    if layout == "published" and to not in ("import", "export"):
        raise ValueError(f"published {to or ''}: write published import or published export")
    if layout == "coding" and to is None:
        raise ValueError("coding: write convert coding CODING SRC DST")
    for name in ("step", "dtype", "vocabulary"):
        if layout != "huggingface" and getattr(arguments, name) is not None:
            raise ValueError(f"--{name} is for convert huggingface; leave it out")


def _huggingface(arguments: argparse.Namespace) -> str | os.PathLike[str]:
    from qmoe_jax.checkpoints.huggingface import export_huggingface, import_huggingface
    from qmoe_jax.checkpoints.huggingface_config import is_huggingface_folder

    progress = not arguments.no_progress
    if is_huggingface_folder(arguments.source):
        for name in ("dtype", "vocabulary", "overwrite"):
            if getattr(arguments, name):
                raise ValueError(
                    f"--{name} is for a Hugging Face folder that is written, but "
                    f"{arguments.source} is one to be read; leave it out"
                )
        return import_huggingface(
            arguments.source, arguments.destination, step=arguments.step or 0, progress=progress
        )
    if arguments.step is not None:
        raise ValueError(
            f"--step is for a T5X checkpoint that is written, but {arguments.source} is no Hugging "
            "Face folder to be read; leave it out"
        )
    extra_ids = 100
    if arguments.vocabulary is not None:
        from qmoe_jax.checkpoints.read_config import read_config
        from qmoe_jax.generation.text import Vocabulary, check_vocabulary

        words = Vocabulary(arguments.vocabulary)
        _check_source(arguments.source)
        check_vocabulary(words, read_config(arguments.source).num_embeddings)
        extra_ids = words.num_extra_ids
    else:
        _check_source(arguments.source)
    return export_huggingface(
        arguments.source,
        arguments.destination,
        dtype=arguments.dtype or "float32",
        vocabulary=arguments.vocabulary,
        extra_ids=extra_ids,
        overwrite=arguments.overwrite,
        progress=progress,
    )


def _check_source(source: str) -> None:
    """Refuse a path where nothing is: the library would ask for a checkpoint alone."""
    folder = os.path.expanduser(source)
    if folder and "://" not in folder and not os.path.isdir(folder):
        raise ValueError(
            f"{os.path.abspath(folder)} is not a folder; give a Hugging Face folder to read, or a "
            "checkpoint, native or compressed, to write one of"
        )


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = CommandParser("convert", description=__doc__)
    parser.add_argument(
        "layout",
        choices=("huggingface", "published", "coding"),
        help="huggingface: Hugging Face's Switch Transformers, read or written; published: that of "
        "the published QMoE models; coding: ours, codes stored otherwise",
    )
    parser.add_argument(
        "to",
        nargs="?",
        metavar="HOW",
        help="huggingface: none; published import: the layout to a compressed checkpoint; "
        "published export: the other way; coding: the name of the coding",
    )
    parser.add_argument("source", metavar="SRC", help="folder to read")
    parser.add_argument("destination", metavar="DST", help="folder to write; must not exist")
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it exists")
    parser.add_argument(
        "--step", type=int, help="of the T5X checkpoint from huggingface; default 0"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the Hugging Face folder that is written; float32 (default) keeps every value",
    )
    parser.add_argument(
        "--vocabulary",
        metavar="FILE",
        help="sentencepiece model, stored in the Hugging Face folder that is written",
    )
    parser.add_argument("--no-progress", action="store_true", help="show no progress bar")
    return parser
