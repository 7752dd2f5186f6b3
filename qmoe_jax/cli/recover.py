"""`qmoe-jax recover`: win back what compression took, by the uncompressed model's predictions."""

from collections.abc import Sequence

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


def main(argv: Sequence[str]) -> int:
    """Run the command; return the exit status."""
    from qmoe_jax.cli import finetune

    return finetune.run("recover", _DESCRIPTION, argv)
