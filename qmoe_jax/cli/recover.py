"""`qmoe-jax recover`: win back what compression took, by the uncompressed model's predictions."""

import functools
from collections.abc import Sequence
from typing import Any

from qmoe_jax.cli import finetune

_DESCRIPTION = """\
Train a compressed checkpoint to predict what the uncompressed model does; codes stay as they are.

example:
  qmoe-jax recover --gin.CHECKPOINT="'compressed'" --gin.REFERENCE="'/data/checkpoint_500100'" \\
    --gin.TOKENS="'calibration.npz'" --gin.VALIDATION_TOKENS="'validation.npz'" \\
    --gin.OUTPUT="'recovered'"

Required: CHECKPOINT, REFERENCE (both are in memory), OUTPUT and TOKENS (qmoe-jax prepare-tokens).

OUTPUT is a folder: the checkpoint in it, checkpoint_<TRAIN_STEPS>, is one that every command takes
(as OUTPUT itself is). A stopped run goes on with the same command; --overwrite (or
--gin.OVERWRITE=True) begins anew."""

IF_INTERRUPTED = "the same command goes on where it was saved last"


@functools.wraps(finetune.finetune)
def recover(*args: Any, **keywords: Any) -> dict[str, Any]:
    """Train with a reference.

    Raises:
      ValueError: there is none.
    """
    if keywords.get("reference") is None:
        raise ValueError(
            "REFERENCE is None; give the native checkpoint that CHECKPOINT was made from "
            "(qmoe-jax finetune trains on the text alone)"
        )
    return finetune.finetune(*args, **keywords)


def main(argv: Sequence[str]) -> int:
    """Run the command; return the exit status."""
    return finetune.run("recover", _DESCRIPTION, argv, recover)
