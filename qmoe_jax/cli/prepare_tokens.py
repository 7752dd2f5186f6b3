"""Writes a token file: documents, tokenised and corrupted, for calibration or evaluation.

This is the only step that needs TensorFlow; the file is then read without it.

Docstrings of what is installed, for the demo model:

    qmoe-jax prepare-tokens --source demo --vocabulary sentencepiece.model \\
        --num_examples 1280 --output demo_train.npz

C4 for a public Switch Transformer, from the released files or from TensorFlow Datasets:

    qmoe-jax prepare-tokens --source c4_jsonl --files 'c4-train.0000?-of-01024.json.gz' \\
        --num_examples 10000 --output c4_train.npz
    qmoe-jax prepare-tokens --source c4_tfds --data_dir gs://my-bucket/tfds \\
        --split validation --num_examples 128 --output c4_validation.npz

Any text: a folder of .txt files, each one document (JSON lines: --source c4_jsonl):

    qmoe-jax prepare-tokens --source text --files books/ --split validation \\
        --protocol paper --output books.npz

Inputs and targets, to fine-tune on or to calibrate a fine-tuned model with its own text: JSON lines
with "inputs" and "targets", or a seqio task that a module of yours registers:

    qmoe-jax prepare-tokens --source pairs --files train.jsonl --targets_length 64 \\
        --output train.npz
    qmoe-jax prepare-tokens --source task --task my_task --task_module my_tasks \\
        --split validation --targets_length 64 --output validation.npz
"""

import argparse
import sys
from collections.abc import Sequence

from qmoe_jax.calibration import tokens
from qmoe_jax.cli.flags import CommandParser
from qmoe_jax.errors import TokensError
from qmoe_jax.outputs import check_no_input, check_writable
from qmoe_jax.paths import local_path

PUBLIC_VOCABULARY = "gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model"


IF_INTERRUPTED = "nothing was written, run it again"


def main(argv: Sequence[str]) -> int:
    """Run the command; return the exit status."""
    arguments = make_parser().parse_args(argv)
    _check_output(arguments)
    note = _set_lengths(arguments)
    token_file = _tokenize(arguments)
    tokens.write_tokens(arguments.output, token_file.tokens, token_file.metadata)
    batch = token_file.tokens
    print(
        f"{arguments.output}: {len(batch)} examples of {batch.encoder_input_tokens.shape[1]} input "
        f"and {batch.decoder_target_tokens.shape[1]} target positions, "
        f"{int((batch.encoder_input_tokens != tokens.PAD_ID).sum())} input and "
        f"{batch.num_target_tokens} target tokens, task {token_file.metadata.task}"
    )
    if note:
        print(f"note: {note}", file=sys.stderr)
    return 0


def _set_lengths(arguments: argparse.Namespace) -> str:
    """Take the lengths that are not given from the checkpoint's gin file; say where they are from.

    Raises:
      CheckpointError: --checkpoint is none.
    """
    advice = (
        "these lengths must be those that the model was trained with (TASK_FEATURE_LENGTHS in its "
        "gin file); --inputs_length and --targets_length set others"
    )
    if arguments.checkpoint is None:
        if arguments.source == "pairs" and arguments.inputs_length and arguments.targets_length:
            return ""  # chosen for the task: any length can be fine-tuned on
        return advice + ", --checkpoint finds them"
    # Reading checkpoints imports JAX, which the rest of the command does without.
    from qmoe_jax.checkpoints.read_config import read_config
    from qmoe_jax.checkpoints.training_lengths import training_lengths

    read_config(arguments.checkpoint)  # refuses what is none, before the work
    trained = training_lengths(arguments.checkpoint)
    if trained is None:
        return f"no gin file beside {arguments.checkpoint} tells its lengths; " + advice
    said = f"{trained.inputs} and {trained.targets} (TASK_FEATURE_LENGTHS in {trained.source})"
    asked = (arguments.inputs_length, arguments.targets_length)
    arguments.inputs_length = asked[0] or trained.inputs
    if asked[0] in (None, trained.inputs):
        arguments.targets_length = asked[1] or trained.targets
    if (arguments.inputs_length, arguments.targets_length) != (trained.inputs, trained.targets):
        return f"the model was trained with other lengths, {said}"
    return f"these are the lengths that the model was trained with, {said}"


def _check_output(arguments: argparse.Namespace) -> None:
    """Refuse an output that could not be written at the end, or must not be replaced."""
    path = local_path(arguments.output, "--output", TokensError)
    check_writable(path, "--output", TokensError)
    check_no_input(path, [arguments.vocabulary, *(arguments.files or ())])
    if path.exists():
        if not arguments.overwrite:
            raise TokensError(f"{path} exists already; choose another output, or pass --overwrite")
        try:
            tokens.read_tokens(path)
        except TokensError as error:
            raise TokensError(
                f"{path} is not a token file, or is damaged; it stays as it is. Choose another "
                "output, or remove it yourself"
            ) from error


def _tokenize(arguments: argparse.Namespace) -> tokens.TokenFile:
    from qmoe_jax.calibration import tasks
    from qmoe_jax.calibration.prepared_c4 import choose_version
    from qmoe_jax.demo import docstrings

    inputs_length = arguments.inputs_length or (128 if arguments.source == "demo" else 512)
    common = {
        "seed": arguments.seed,
        "inputs_length": inputs_length,
        "targets_length": arguments.targets_length,
        "progress": True,
    }
    if arguments.source == "demo":
        if arguments.num_examples is None:
            raise TokensError("--source demo needs --num_examples.")
        if arguments.protocol != "t5x":
            raise TokensError("--source demo has only --protocol t5x: its documents are short.")
        print("collecting docstrings (about 15 s) ...", file=sys.stderr)
        if arguments.targets_length is None and inputs_length == 128:
            common["targets_length"] = 32
        return docstrings.demo_tokens(
            arguments.vocabulary, arguments.split, arguments.num_examples, **common
        )
    if arguments.source == "task":
        if not arguments.task or not arguments.task_module:
            raise TokensError(
                "--source task needs --task, and --task_module, the module that registers it."
            )
        from qmoe_jax.calibration.sources import task_tokens

        return task_tokens(
            arguments.task,
            split=arguments.split,
            num_examples=arguments.num_examples,
            task_module=arguments.task_module,
            **common,
        )
    if arguments.source == "c4_tfds":
        version = choose_version(arguments.version, arguments.data_dir)
        print(f"C4 is c4/en:{version}", file=sys.stderr)
        task = tasks.c4_task(
            arguments.vocabulary,
            data_dir=arguments.data_dir,
            version=version,
            protocol=arguments.protocol,
        )
        source = f"TFDS c4/en:{version} in {arguments.data_dir or 'the default folder'}"
    else:
        kind, make_task = {
            "c4_jsonl": ("JSON lines", tasks.c4_jsonl_task),
            "text": ("text files", tasks.text_files_task),
            "pairs": ("JSON lines", tasks.pairs_task),
        }[arguments.source]
        if not arguments.files:
            raise TokensError(
                f"--source {arguments.source} needs --files: paths, globs or folders of {kind}."
            )
        as_they_are = arguments.source == "pairs"
        protocol = {} if as_they_are else {"protocol": arguments.protocol}
        task = make_task(arguments.vocabulary, {arguments.split: arguments.files}, **protocol)
        source = f"{kind} {' '.join(arguments.files)}"
    return tasks.tokenize_task(
        task, split=arguments.split, num_examples=arguments.num_examples, source=source, **common
    )


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = CommandParser("prepare-tokens", description=__doc__)
    parser.add_argument(
        "--source",
        required=True,
        choices=("demo", "c4_tfds", "c4_jsonl", "text", "pairs", "task"),
        help="demo: docstrings of installed packages; c4_tfds: C4 prepared by TensorFlow Datasets; "
        "c4_jsonl: C4 as released, or any JSON lines with a text each; text: text files, each one "
        "document; pairs: JSON lines with inputs and targets, as they are; task: a seqio task",
    )
    parser.add_argument("--output", required=True, help="token file to write, .npz")
    parser.add_argument("--overwrite", action="store_true", help="replace a token file there")
    parser.add_argument(
        "--num_examples",
        type=int,
        help="how many; fewer is an error (default: all of the split)",
    )
    parser.add_argument("--split", default="train", help="train or validation (default: train)")
    parser.add_argument(
        "--vocabulary",
        default=PUBLIC_VOCABULARY,
        help="sentencepiece model of the checkpoint, local or gs:// (default: %(default)s)",
    )
    parser.add_argument(
        "--data_dir", help="c4_tfds: folder that has c4/en/<version> (default: that of TFDS)"
    )
    parser.add_argument(
        "--version", help="c4_tfds: version, as 3.1.0 (default: the newest that is prepared)"
    )
    parser.add_argument(
        "--files", nargs="+", help="c4_jsonl, text, pairs: paths, globs or folders, .gz too"
    )
    parser.add_argument("--task", help="task: its name among seqio's")
    parser.add_argument("--task_module", help="task: the module that registers it")
    parser.add_argument(
        "--protocol",
        default="t5x",
        choices=("t5x", "paper"),
        help="t5x: documents concatenated and cut to full length, as in pretraining; paper: whole "
        "documents that fit, one an example, as in QMoE (default: t5x)",
    )
    parser.add_argument(
        "--checkpoint",
        help="the model's, local or gs://: the lengths that it was trained with are the default, "
        "where T5X's config.gin beside it tells them",
    )
    parser.add_argument(
        "--inputs_length", type=int, help="encoder tokens an example (default: 512; demo: 128)"
    )
    parser.add_argument(
        "--targets_length",
        type=int,
        help="decoder tokens an example (default: what --inputs_length gives; demo: 32)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the corruption, and of the demo's order (0)"
    )
    return parser
