"""`python -m qmoe_jax.evaluate`: loss of a checkpoint, native or compressed, on a token file."""

_DESCRIPTION = """\
Loss per target token of a Switch Transformer, native or compressed, on a token file.

example:
  python -m qmoe_jax.evaluate --gin.CHECKPOINT="'compressed'" --gin.TOKENS="'validation.npz'"

Required: CHECKPOINT, TOKENS (python -m qmoe_jax.prepare_tokens)."""


def main() -> None:
    """Runs the command and prints the metrics as one JSON object."""
    import json

    from qmoe_jax import gin_flags
    from qmoe_jax.evaluation.evaluate import evaluate
    from qmoe_jax.models.load import load_switch

    metrics = gin_flags.run(
        "evaluate",
        evaluate,
        [load_switch],
        description=_DESCRIPTION,
        default_gin_file="gin/runs/eval.gin",
    )
    print(json.dumps(metrics, indent=1))


if __name__ == "__main__":
    main()
