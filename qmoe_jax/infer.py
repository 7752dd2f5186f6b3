"""`python -m qmoe_jax.infer`: fill the blanks of texts with a checkpoint, native or compressed."""

_DESCRIPTION = """\
Fill the blanks of texts with a Switch Transformer, native or compressed, greedily.

A blank is written <extra_id_0>, the next <extra_id_1>, and so on.

example:
  python -m qmoe_jax.infer --gin.CHECKPOINT="'compressed'" \\
    --gin.VOCABULARY="'sentencepiece.model'" \\
    --gin.PROMPTS="['Return the <extra_id_0> of the array.']"

Required: CHECKPOINT, VOCABULARY, PROMPTS."""


def main() -> None:
    """Runs the command and prints each prompt with its answer."""
    from qmoe_jax import gin_flags
    from qmoe_jax.models.load import load_switch
    from qmoe_jax.models.text import infer

    for filled in gin_flags.run(
        "infer",
        infer,
        [load_switch],
        description=_DESCRIPTION,
        default_gin_file="gin/runs/infer.gin",
    ):
        print(f"{filled.prompt}\n  -> {filled.generated}\n  => {filled.text}")


if __name__ == "__main__":
    main()
