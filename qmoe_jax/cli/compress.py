"""`qmoe-jax compress`: compress the experts of a native T5X Switch checkpoint."""

import sys
from collections.abc import Sequence

_DESCRIPTION = """\
Compress the experts of a native T5X Switch Transformer checkpoint with GPTQ.

example:
  qmoe-jax compress --gin_file=gin/runs/compress.gin \\
    --gin.CHECKPOINT="'/data/checkpoint_500100'" --gin.TOKENS="'calibration.npz'" \\
    --gin.OUTPUT="'compressed'" --gin.CompressionSettings.target_bits_per_weight=0.6

Required: CHECKPOINT, OUTPUT, and for GPTQ also TOKENS (qmoe-jax prepare-tokens).

Beside the output stand OUTPUT.report.html, what happened to each layer, and OUTPUT.model_card.md.
Where the uncompressed model is small, they say how far predictions are from its own (KL), on
REPORT_EXAMPLES validation or calibration examples.

A run that was stopped goes on with the same command. --overwrite (or --gin.OVERWRITE=True) replaces
a finished output, and begins an unfinished one anew. qmoe-jax plan says beforehand what a
run will need."""


IF_INTERRUPTED = "the same command goes on where it was"


def main(argv: Sequence[str]) -> int:
    """Run the command and print what it did; return the exit status."""
    from qmoe_jax.cli import flags
    from qmoe_jax.cli.wording import spell_command
    from qmoe_jax.models.load import load_switch
    from qmoe_jax.pipeline.compress import compress
    from qmoe_jax.pipeline.run_pages import page_paths
    from qmoe_jax.quantization.settings import CompressionSettings

    command = spell_command("compress", argv)
    options = ["--gin.OVERWRITE=True" if flag == "--overwrite" else flag for flag in argv]
    report = flags.run(
        "compress",
        compress,
        # The model files in gin/ also say how T5X routes a model.
        [CompressionSettings, load_switch],
        description=_DESCRIPTION,
        default_gin_file="gin/runs/compress.gin",
        distributed=True,
        # Before what the user binds, who may say False.
        argv=[f"--gin.compress.report={command!r}", *options],
    )
    for warning in report.warnings():
        print(f"warning: {warning}", file=sys.stderr)
    print(report.summary())
    if report.has_pages:
        print(f"report: {page_paths(report.output)[0]}")
    return 0
