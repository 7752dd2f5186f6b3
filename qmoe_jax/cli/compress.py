"""`python -m qmoe_jax.compress`: compress the experts of a native T5X Switch checkpoint."""

import sys
import types
from typing import Any

_DESCRIPTION = """\
Compress the experts of a native T5X Switch Transformer checkpoint with GPTQ.

example:
  python -m qmoe_jax.compress --gin_file=gin/runs/compress.gin \\
    --gin.CHECKPOINT="'/data/checkpoint_500100'" --gin.TOKENS="'calibration.npz'" \\
    --gin.OUTPUT="'compressed'" --gin.CompressionSettings.grid="'ternary'"

Required: CHECKPOINT, OUTPUT, and for GPTQ also TOKENS (python -m qmoe_jax.prepare_tokens).

A run that was stopped goes on with the same command. --overwrite (or --gin.OVERWRITE=True) replaces
a finished output, and begins an unfinished one anew. python -m qmoe_jax.plan says beforehand what a
run will need."""


def main() -> None:
    """Run the command and print what it did."""
    from qmoe_jax.cli import flags as gin_flags
    from qmoe_jax.pipeline.compress import compress
    from qmoe_jax.quantization.settings import CompressionSettings

    flags = ["--gin.OVERWRITE=True" if flag == "--overwrite" else flag for flag in sys.argv[1:]]
    report = gin_flags.run(
        "compress",
        compress,
        [CompressionSettings],
        description=_DESCRIPTION,
        default_gin_file="gin/runs/compress.gin",
        distributed=True,
        argv=flags,
    )
    for warning in report.warnings():
        print(f"warning: {warning}", file=sys.stderr)
    print(report.summary())


class _CallableModule(types.ModuleType):
    """Keeps `qmoe_jax.compress(...)` working after somebody imported this submodule."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from qmoe_jax.pipeline.compress import compress

        return compress(*args, **kwargs)


if __name__ == "__main__":
    main()
else:
    sys.modules[__name__].__class__ = _CallableModule
