"""`python -m qmoe_jax.demo`: the whole road on a small trained model, with a table at its end.

Reads a native T5X checkpoint, harvests calibration text from the installed packages, compresses
with round-to-nearest and GPTQ to ternary and 2 bit, stores the codes, loads them again and compares
all on the same validation text.
"""

import argparse
import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from qmoe_jax import resources

_DEFAULT_MODEL = resources.demo_model()

_DESCRIPTION = """\
Compress a small trained Switch Transformer and compare the results.

Needs no network: the model is in the repository (tests/golden/switch_demo), and the text is the
docstrings of the installed packages."""

PROMPTS = (
    "Returns the <extra_id_0> of the array elements over a given <extra_id_1>.",
    "This function raises a <extra_id_0> if the file does not <extra_id_1>.",
    "Compute the <extra_id_0> product of two <extra_id_1>.",
)


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to compress: its name in the table, its folder, and its settings."""

    name: str
    folder: str
    settings: dict[str, Any]


VARIANTS = (
    Variant("RTN ternary", "rtn_ternary", {"grid": "ternary", "method": "rtn"}),
    Variant("GPTQ ternary", "gptq_ternary", {"grid": "ternary", "method": "gptq"}),
    Variant("RTN 2 bit", "rtn_2bit", {"grid": "2bit", "method": "rtn"}),
    Variant("GPTQ 2 bit", "gptq_2bit", {"grid": "2bit", "method": "gptq"}),
)


def main(argv: list[str] | None = None) -> None:
    """Run the demo."""
    arguments = _parser().parse_args(argv)
    checkpoint = arguments.checkpoint or _demo_file(arguments.model, "checkpoint_4200")
    vocabulary_file = arguments.vocabulary or _demo_file(arguments.model, "sentencepiece.model")
    # After parsing, so that --help and mistakes answer at once.
    from qmoe_jax.calibration.tokens import TokenFile
    from qmoe_jax.demo import report as demo_report
    from qmoe_jax.errors import CheckpointError, CodecError, TokensError
    from qmoe_jax.evaluation.metrics import evaluate_loss
    from qmoe_jax.generation.text import Filled, Vocabulary, fill_prompts
    from qmoe_jax.models.load import load_switch
    from qmoe_jax.pipeline.compress import compress

    def measure(label: str, path: Any, validation: TokenFile) -> tuple[Any, list[Filled], float]:
        """Load a checkpoint, evaluate it and let it fill the prompts."""
        started = time.monotonic()
        module, variables = load_switch(path)
        batches = [batch.arrays() for batch in validation.batches(32)]
        loss = evaluate_loss(module, variables, batches, progress=f"evaluate {label}")
        filled = fill_prompts(module, variables, vocabulary, PROMPTS, max_decode_length=24)
        return loss, filled, time.monotonic() - started

    started = time.monotonic()
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    try:
        vocabulary = Vocabulary(vocabulary_file)
        calibration, validation = _demo_tokens(vocabulary_file, output, arguments)
        baseline, filled, seconds = measure("uncompressed", checkpoint, validation)
        rows = [demo_report.baseline_row(baseline, filled, seconds)]
        for variant in VARIANTS:
            path = output / variant.folder
            report = compress(checkpoint, path, calibration, overwrite=True, **variant.settings)
            for warning in report.warnings():
                print(f"warning: {warning}", file=sys.stderr)
            # From disk, through the codes: what a user of the compressed checkpoint gets.
            loss, filled, _ = measure(variant.name, path, validation)
            rows.append(demo_report.variant_row(variant.name, report, loss, baseline, filled))
    except (CheckpointError, CodecError, TokensError) as error:
        _fail(str(error))
    document = demo_report.document(
        rows,
        checkpoint=os.path.relpath(checkpoint),
        num_calibration_examples=len(calibration),
        seconds=time.monotonic() - started,
    )
    print("\n" + demo_report.table(document))
    demo_report.write_json(document, output / "report.json")
    demo_report.write_html(document, output / "report.html")
    print(f"\n{output / 'report.json'}: these figures; {output / 'report.html'}: with plots.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m qmoe_jax.demo",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", default="demo_out", help="folder for results (%(default)s)")
    parser.add_argument(
        "--model",
        default=_DEFAULT_MODEL,
        type=Path,
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
    return parser


def _fail(message: str) -> NoReturn:
    print(f"demo: {message}", file=sys.stderr)
    raise SystemExit(2)


def _demo_file(model: Path, name: str) -> Path:
    path = model / name
    if not path.exists():
        _fail(f"{path} does not exist; run from a checkout of the repository, or pass --model")
    return path


def _demo_tokens(vocabulary: Any, output: Path, arguments: argparse.Namespace) -> tuple[Any, Any]:
    """Calibration and validation examples, tokenised once into files under `output`."""
    from qmoe_jax.calibration.tokens import read_tokens, write_tokens
    from qmoe_jax.demo.docstrings import demo_tokens

    files = []
    for split, count in (
        ("train", arguments.num_examples),
        ("validation", arguments.num_validation_examples),
    ):
        path = output / f"tokens_{split}_{count}_seed{arguments.seed}.npz"
        if not path.exists():
            made = demo_tokens(
                os.fspath(vocabulary), split, count, seed=arguments.seed, progress=True
            )
            write_tokens(path, made.tokens, made.metadata)
        files.append(read_tokens(path))
    return files[0], files[1]


if __name__ == "__main__":
    main()
