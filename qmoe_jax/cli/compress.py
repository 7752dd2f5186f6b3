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

A run that was stopped goes on with the same command. --overwrite (or --gin.OVERWRITE=True) replaces
a finished output, and begins an unfinished one anew. qmoe-jax plan says beforehand what a
run will need."""


IF_INTERRUPTED = "the same command goes on where it was"


def main(argv: Sequence[str]) -> int:
    """Run the command and print what it did; return the exit status."""
    from qmoe_jax.cli import flags
    from qmoe_jax.models.load import load_switch
    from qmoe_jax.pipeline.compress import compress
    from qmoe_jax.quantization.settings import CompressionSettings

    report = flags.run(
        "compress",
        compress,
        # The model files in gin/ also say how T5X routes a model.
        [CompressionSettings, load_switch],
        description=_DESCRIPTION,
        default_gin_file="gin/runs/compress.gin",
        distributed=True,
        argv=["--gin.OVERWRITE=True" if flag == "--overwrite" else flag for flag in argv],
    )
    for warning in report.warnings():
        print(f"warning: {warning}", file=sys.stderr)
    print(report.summary())
    return 0
