"""How far a model's predictions are from another's: the measure that quantization is judged by.

The Kullback-Leibler divergence sees every change of a distribution, where the loss sees one token
of it, so it is far less noisy than a loss gap. A batch goes through both models, and only sums per
example leave it.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from qmoe_jax.evaluation.metrics import BatchSums, LossReport, batch_sums, model_sums, per_token
from qmoe_jax.models.switch import SwitchTransformer
from qmoe_jax.progress import progress as show_progress


class DivergenceSums(NamedTuple):
    """What one batch adds to a comparison with a reference model.

    Attributes:
      kl: float32 [batch], KL(reference || model) summed over each row's target tokens, in nats.
      num_agreeing: int32 [batch], target tokens at which both find the same token most probable.
      reference_cross_entropy: float32 [batch], the reference's, as `BatchSums.cross_entropy`.
    """

    kl: Float[Array, "batch"]
    num_agreeing: Int[Array, "batch"]
    reference_cross_entropy: Float[Array, "batch"]


@dataclasses.dataclass(frozen=True)
class DivergenceReport:
    """A model beside a reference on a set of examples, as sums per example.

    Attributes:
      kl: float64 [examples], as `DivergenceSums`.
      num_agreeing: int64 [examples].
      losses: of the model.
      reference: losses of the reference; its `num_correct` are not counted, all 0.
    """

    kl: Float[np.ndarray, "examples"]
    num_agreeing: Int[np.ndarray, "examples"]
    losses: LossReport
    reference: LossReport

    @property
    def divergence(self) -> tuple[float, float]:
        """KL(reference || model) in nats per target token, and its standard error over examples."""
        return per_token(self.kl, self.losses.num_target_tokens)

    @property
    def agreement(self) -> float:
        """Share of target tokens at which both find the same token most probable."""
        return float(self.num_agreeing.sum() / self.losses.num_target_tokens.sum())

    @property
    def gap(self) -> tuple[float, float]:
        """Loss above the reference's in nats per target token, and its paired standard error."""
        return self.losses.gap_to(self.reference)

    def to_json(self) -> dict[str, float]:
        """Return the figures."""
        (kl, kl_error), (gap, gap_error) = self.divergence, self.gap
        return {
            "kl": kl,
            "kl_standard_error": kl_error,
            "agreement": self.agreement,
            "gap": gap,
            "gap_standard_error": gap_error,
        }


def divergence_sums(
    logits: Float[Array, "batch length vocab"],
    reference_logits: Float[Array, "batch length vocab"],
    targets: Int[Array, "batch length"],
    weights: Shaped[Array, "batch length"],
) -> DivergenceSums:
    """Compare two models' logits at the target tokens."""
    real = weights > 0
    log_q, log_p = (jax.nn.log_softmax(a, axis=-1) for a in (logits, reference_logits))
    kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    agrees = real & (jnp.argmax(logits, axis=-1) == jnp.argmax(reference_logits, axis=-1))
    cross_entropy, _, _ = batch_sums(reference_logits, targets, weights)
    return DivergenceSums(jnp.where(real, kl, 0.0).sum(axis=1), agrees.sum(axis=1), cross_entropy)


@functools.partial(jax.jit, static_argnames=("module", "reference_module"))
def compare_batch(
    module: SwitchTransformer,
    variables: Mapping[str, Any],
    reference_module: SwitchTransformer,
    reference_variables: Mapping[str, Any],
    batch: Mapping[str, Array],
) -> tuple[BatchSums, DivergenceSums]:
    """Run a model and a reference on a batch, teacher-forced.

    Args:
      module: the model.
      variables: its parameters, dense or codes.
      reference_module: what it is compared with.
      reference_variables: its parameters.
      batch: as `metrics.evaluate_batch` takes it.

    Returns:
      The model's sums, and those of the comparison.
    """
    sums, logits = model_sums(module, variables, batch)
    _, reference_logits = model_sums(reference_module, reference_variables, batch)
    targets, weights = batch["decoder_target_tokens"], batch["decoder_loss_weights"]
    return sums, divergence_sums(logits, reference_logits, targets, weights)


def measure_divergence(
    module: SwitchTransformer,
    variables: Mapping[str, Any],
    reference_module: SwitchTransformer,
    reference_variables: Mapping[str, Any],
    batches: Iterable[Mapping[str, Array | np.ndarray]],
    *,
    progress: str | None = None,
) -> DivergenceReport:
    """Compare a model with a reference over batches of tokens, teacher-forced.

    Args:
      module: the model.
      variables: its parameters, dense or codes.
      reference_module: what it is compared with.
      reference_variables: its parameters.
      batches: as `metrics.evaluate_loss` takes them; rows without weights are left out.
      progress: label of a progress bar; None shows none.

    Raises:
      ValueError: no batches.
    """
    shown = show_progress(batches, title=progress or "", unit="batches", shown=progress is not None)
    parts = [
        jax.device_get(
            compare_batch(module, variables, reference_module, reference_variables, dict(batch))
        )
        for batch in shown
    ]
    if not parts:
        raise ValueError("no batches to compare on; pass at least one")
    sums, divergences = (list(column) for column in zip(*parts, strict=True))
    return divergence_report(
        *(np.concatenate([getattr(s, name) for s in sums]) for name in _SUMS),
        *(
            np.concatenate([getattr(d, name) for d in divergences])
            for name in DivergenceSums._fields
        ),
    )


_SUMS = ("cross_entropy", "num_target_tokens", "num_correct")


def divergence_report(
    cross_entropy: Float[np.ndarray, "rows"],
    num_target_tokens: Int[np.ndarray, "rows"],
    num_correct: Int[np.ndarray, "rows"],
    kl: Float[np.ndarray, "rows"],
    num_agreeing: Int[np.ndarray, "rows"],
    reference_cross_entropy: Float[np.ndarray, "rows"],
) -> DivergenceReport:
    """Return the report of the rows that have target tokens."""
    real = num_target_tokens > 0
    tokens = num_target_tokens[real].astype(np.int64)
    return DivergenceReport(
        kl[real].astype(np.float64),
        num_agreeing[real].astype(np.int64),
        LossReport(
            cross_entropy[real].astype(np.float64), tokens, num_correct[real].astype(np.int64)
        ),
        LossReport(reference_cross_entropy[real].astype(np.float64), tokens, np.zeros_like(tokens)),
    )
