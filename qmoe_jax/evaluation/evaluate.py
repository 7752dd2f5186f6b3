"""Evaluation of a checkpoint on a token file, as the command and the demo run it."""

import json
import os
import time
from collections.abc import Callable
from typing import Any

from qmoe_jax.calibration.tokens import TokenFile, read_tokens
from qmoe_jax.evaluation.metrics import evaluate_loss
from qmoe_jax.models.load import load_switch


def evaluate(
    checkpoint: str | os.PathLike[str],
    tokens: str | os.PathLike[str] | TokenFile,
    *,
    num_examples: int | None = None,
    batch_size: int = 32,
    activation_dtype: str = "float32",
    expert_capacity_factor: float | None = None,
    output: str | os.PathLike[str] | None = None,
    load: Callable[..., Any] = load_switch,
    progress: bool = True,
) -> dict[str, Any]:
    """Loss per target token of a checkpoint.

    Args:
      checkpoint: native T5X or compressed, local or gs://.
      tokens: examples, a token file of `qmoe_jax.prepare_tokens`.
      num_examples: use the first so many; all where None.
      batch_size: examples at a time. With a capacity factor the result depends on it, as in T5X.
      activation_dtype: "float32" or "bfloat16".
      expert_capacity_factor: None is dropless; a number is T5X's capacity factor.
      output: JSON file for the metrics, written atomically; none where None.
      load: `load_switch`, or one with routing fields bound.
      progress: show a progress bar.

    Returns:
      `loss` in nats per target token, `accuracy`, `num_target_tokens`, `num_examples`, `seconds`.
    """
    module, variables = load(checkpoint, activation_dtype, expert_capacity_factor)
    if not isinstance(tokens, TokenFile):
        tokens = read_tokens(tokens, num_embeddings=module.config.num_embeddings)
    tokens = tokens[:num_examples]
    started = time.monotonic()
    report = evaluate_loss(
        module,
        variables,
        [batch.arrays() for batch in tokens.batches(batch_size)],
        progress="evaluate" if progress else None,
    )
    metrics = {
        "checkpoint": os.fspath(checkpoint),
        "loss": report.loss,
        "accuracy": report.accuracy,
        "num_target_tokens": int(report.num_target_tokens.sum()),
        "num_examples": len(report.num_target_tokens),
        "expert_capacity_factor": expert_capacity_factor,
        "activation_dtype": activation_dtype,
        "seconds": time.monotonic() - started,
    }
    if output is not None:
        partial = f"{os.fspath(output)}.partial"
        with open(partial, "w") as file:
            json.dump(metrics, file, indent=1)
        os.replace(partial, output)
    return metrics
