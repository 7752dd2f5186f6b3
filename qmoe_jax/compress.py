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

Required: CHECKPOINT, OUTPUT, and for GPTQ also TOKENS (python -m qmoe_jax.prepare_tokens)."""


def main() -> None:
    """Runs the command and prints what it did."""
    from qmoe_jax import gin_flags
    from qmoe_jax.pipeline.compress import compress
    from qmoe_jax.pipeline.settings import CompressionSettings

    report = gin_flags.run(
        "compress",
        compress,
        [CompressionSettings],
        description=_DESCRIPTION,
        default_gin_file="gin/runs/compress.gin",
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
