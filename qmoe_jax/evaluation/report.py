"""From the sums of an evaluation's batches to its figures, ours and under T5X's names."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from qmoe_jax.evaluation.divergence import DivergenceSums, divergence_report
from qmoe_jax.evaluation.metrics import LossReport, loss_report
from qmoe_jax.evaluation.router import T5X_METRICS, router_report
from qmoe_jax.evaluation.shards import Arrays, router_arrays

# Those of the public models' gin files; they decide T5X's `loss` and no other figure.
Z_LOSS = 1e-4
AUX_LOSS_FACTOR = 0.01


def example_losses(arrays: Arrays) -> LossReport:
    """Sum per example, filler rows left out; `arrays` are those of `shards.evaluate_shards`."""
    return loss_report(
        arrays["cross_entropy"].reshape(-1),
        arrays["num_target_tokens"].reshape(-1),
        arrays["num_correct"].reshape(-1),
    )


def reference_report(arrays: Arrays) -> dict[str, float]:
    """Return the figures of a comparison with a reference; `evaluate` says what each is."""
    names = ("cross_entropy", "num_target_tokens", "num_correct", *DivergenceSums._fields)
    return divergence_report(*(arrays[name].reshape(-1) for name in names)).to_json()


def model_report(arrays: Arrays, losses: LossReport, first: LossReport) -> dict[str, Any]:
    """Return the figures of one checkpoint; `evaluate` says what each is.

    Args:
      arrays: sums of its batches, see `shards.evaluate_shards`.
      losses: its `example_losses`.
      first: those of the checkpoint that `gap` compares with.
    """
    num_tokens = int(losses.num_target_tokens.sum())
    gap, gap_error = losses.gap_to(first)
    nothing = dataclasses.replace(losses, cross_entropy=np.zeros_like(losses.cross_entropy))
    _, loss_error = losses.gap_to(nothing)
    # T5X drops the last batch where it is not full; it is kept where there is no other.
    whole = np.flatnonzero(np.all(arrays["num_target_tokens"] > 0, axis=1))
    if not len(whole):
        whole = np.arange(len(arrays["num_target_tokens"]))
    router = router_report(router_arrays(arrays), whole)
    warm = arrays["warm"]
    warm_tokens = int(arrays["num_target_tokens"][warm].sum())
    warm_seconds = float(arrays["seconds"][warm].sum())
    return {
        "loss": losses.loss,
        "loss_standard_error": loss_error,
        "gap": gap,
        "gap_standard_error": gap_error,
        "accuracy": losses.accuracy,
        "z_loss": float(arrays["log_z_squared"].sum(dtype=np.float64) / num_tokens),
        "num_examples": len(losses.num_target_tokens),
        "num_target_tokens": num_tokens,
        "router": router,
        "t5x": _t5x_metrics(arrays, whole, router["total"]),
        "seconds": float(arrays["seconds"].sum()),
        "target_tokens_per_second": warm_tokens / warm_seconds if warm_tokens else None,
    }


def _t5x_metrics(
    arrays: Arrays, whole: Int[np.ndarray, "whole"], router: Mapping[str, Any]
) -> dict[str, float]:
    """T5X's names and normalisation: each batch by its own target tokens, then a plain mean."""
    tokens = arrays["num_target_tokens"][whole].sum(axis=1, dtype=np.float64)

    def per_batch(name: str) -> np.ndarray:
        return arrays[name][whole].sum(axis=1, dtype=np.float64) / tokens

    cross_entropy = float(per_batch("cross_entropy").mean())
    z_loss = Z_LOSS * float(per_batch("log_z_squared").mean())
    auxiliary_loss = AUX_LOSS_FACTOR * router["auxiliary_loss"]
    experts = {f"experts/{name}": router[name] for name in T5X_METRICS}
    return {
        "loss": cross_entropy + z_loss + auxiliary_loss,
        "cross_ent_loss": cross_entropy,
        "z_loss": z_loss,
        "accuracy": float(arrays["num_correct"][whole].sum() / tokens.sum()),
        **experts,
        "experts/auxiliary_loss": auxiliary_loss,
        # Its factor is 0 in the public models' gin files.
        "experts/router_z_loss": 0.0,
    }
