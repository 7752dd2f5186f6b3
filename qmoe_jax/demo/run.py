"""The whole road on a small trained model, with a table at its end.

Reads a native T5X checkpoint, harvests calibration text from the installed packages, compresses
with round-to-nearest and GPTQ to the paper's ternary and 2 bit and to the lattice at three sizes,
stores the codes, loads them again and compares all on the same validation text.
"""

import dataclasses
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from qmoe_jax.calibration.tokens import TokenFile, read_tokens, write_tokens
from qmoe_jax.checkpoints.read_config import read_config
from qmoe_jax.demo import report as demo_report
from qmoe_jax.demo.docstrings import corpus_versions, demo_tokens
from qmoe_jax.errors import CheckpointError
from qmoe_jax.evaluation.divergence import measure_divergence
from qmoe_jax.evaluation.metrics import evaluate_loss
from qmoe_jax.generation.text import Vocabulary, check_vocabulary, fill_prompts
from qmoe_jax.models.load import load_switch
from qmoe_jax.ops.products import check_choice
from qmoe_jax.outputs import check_writable, output_file
from qmoe_jax.paths import local_path
from qmoe_jax.pipeline.compress import compress

PathLike = str | os.PathLike[str]
_JSON, _HTML = "report.json", "report.html"

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
    *(
        Variant(
            f"lattice, {bits:g} bit",
            f"lattice_{bits:g}".replace(".", "_"),
            {"grid": "lattice", "allocation": "measured", "target_bits_per_weight": bits},
        )
        for bits in (1.0, 0.6, 0.4)
    ),
)


def run_demo(
    checkpoint: PathLike,
    vocabulary: PathLike,
    output: PathLike,
    *,
    num_examples: int = 1280,
    num_validation_examples: int = 1600,
    seed: int = 0,
    implementation: str = "auto",
) -> dict[str, Any]:
    """Compress a checkpoint in every way of `VARIANTS`, and compare.

    Args:
      checkpoint: native T5X checkpoint.
      vocabulary: its sentencepiece model, local.
      output: local folder for token files, compressed checkpoints and the report.
      num_examples: calibration examples.
      num_validation_examples: validation examples.
      seed: of the examples.
      implementation: of products with codes, as in `load_switch`.

    Returns:
      `demo.report.document`, which is also written to `report.json` and `report.html`.

    Raises:
      CheckpointError: the checkpoint or the output cannot be used.
      TokensError: the vocabulary cannot be used, or there is too little text.
    """
    started = time.monotonic()
    check_choice(implementation)
    folder = _claim(output)
    words = Vocabulary(vocabulary)
    check_vocabulary(words, read_config(checkpoint).num_embeddings)
    folder.mkdir(parents=True, exist_ok=True)
    calibration = _tokens(vocabulary, folder, "train", num_examples, seed)
    validation = _tokens(vocabulary, folder, "validation", num_validation_examples, seed)

    batches = [batch.arrays() for batch in validation.batches(32)]
    measuring = time.monotonic()
    reference = load_switch(checkpoint, implementation="xla")
    baseline = evaluate_loss(*reference, batches, progress="evaluate uncompressed")
    filled = fill_prompts(*reference, words, PROMPTS, max_decode_length=24)
    rows = [demo_report.baseline_row(baseline, filled, time.monotonic() - measuring)]
    for number, variant in enumerate(VARIANTS, start=1):
        print(f"{number} of {len(VARIANTS)}: {variant.name}", file=sys.stderr)
        path = folder / variant.folder
        report = compress(checkpoint, path, calibration, overwrite=True, **variant.settings)
        for warning in report.warnings():
            print(f"warning: {warning}", file=sys.stderr)
        # From disk, through the codes: what a user of the compressed checkpoint gets.
        module, variables = load_switch(path, implementation=implementation)
        divergence = measure_divergence(
            *(module, variables, *reference, batches), progress=f"evaluate {variant.name}"
        )
        filled = fill_prompts(module, variables, words, PROMPTS, max_decode_length=24)
        rows.append(demo_report.variant_row(variant.name, report, divergence, filled))
    document = demo_report.document(
        rows,
        checkpoint=os.path.relpath(checkpoint),
        num_calibration_examples=len(calibration),
        seconds=time.monotonic() - started,
    )
    demo_report.write_json(document, folder / _JSON)
    demo_report.write_html(document, folder / _HTML)
    return document


def _claim(output: PathLike) -> Path:
    """Return the folder of the results, before it is made.

    Raises:
      CheckpointError: it cannot be written, or holds other files under the names of the reports.
    """
    folder = local_path(output, "output")
    check_writable(folder, "output")
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"output is {folder}, a file; give a folder")
    output_file(folder / _JSON, "a report of the demo", demo_report.is_json_report)
    output_file(folder / _HTML, "a report of the demo", demo_report.is_html_report)
    return folder


def _tokens(
    vocabulary: PathLike, folder: Path, split: str, num_examples: int, seed: int
) -> TokenFile:
    """Tokenise the corpus into a file of the folder, once for each vocabulary and corpus."""
    file = Path(os.path.expanduser(vocabulary))
    behind = [hashlib.sha256(file.read_bytes()).hexdigest(), *corpus_versions()]
    key = hashlib.sha256(json.dumps(behind).encode()).hexdigest()[:12]
    path = folder / f"tokens_{split}_{num_examples}_seed{seed}_{key}.npz"
    if not path.exists():
        made = demo_tokens(os.fspath(vocabulary), split, num_examples, seed=seed, progress=True)
        write_tokens(path, made.tokens, made.metadata)
    return read_tokens(path)
