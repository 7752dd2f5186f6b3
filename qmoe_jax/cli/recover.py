"""`qmoe-jax recover`: win back what compression took, by the uncompressed model's predictions."""

from collections.abc import Callable, Sequence
from typing import Any

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


def recover(
    checkpoint: str,
    reference: str,
    output: str,
    tokens: str,
    settings: Any,
    *,
    validation_tokens: str | None = None,
    num_examples: int | None = None,
    num_validation_examples: int | None = None,
    activation_dtype: str = "float32",
    expert_capacity_factor: float | None = None,
    num_devices: int = 1,
    overwrite: bool = False,
    tensorboard: bool | None = None,
    load: Callable[..., Any] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train; see `training.finetune.recover` for the arguments.

    Raises:
      ValueError: bad input; see `training.finetune.finetune`.
    """
    from qmoe_jax.cli.finetune import finetune

    return finetune(
        checkpoint,
        output,
        settings,
        tokens,
        reference=reference,
        validation_tokens=validation_tokens,
        num_examples=num_examples,
        num_validation_examples=num_validation_examples,
        activation_dtype=activation_dtype,
        expert_capacity_factor=expert_capacity_factor,
        num_devices=num_devices,
        overwrite=overwrite,
        tensorboard=tensorboard,
        load=load,
        progress=progress,
    )


def main(argv: Sequence[str]) -> int:
    """Run the command and print what it did; return the exit status."""
    from qmoe_jax.cli import flags
    from qmoe_jax.cli.finetune import summary
    from qmoe_jax.models.load import load_switch
    from qmoe_jax.training.settings import FinetuneSettings

    report = flags.run(
        "recover",
        recover,
        [FinetuneSettings, load_switch],
        description=_DESCRIPTION,
        default_gin_file="gin/runs/recover.gin",
        argv=["--gin.OVERWRITE=True" if flag == "--overwrite" else flag for flag in argv],
    )
    print(summary(report))
    return 0
