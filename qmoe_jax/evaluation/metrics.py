"""Loss and accuracy over token batches, per example, so that models compare on the same text."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from qmoe_jax.models.switch import SwitchTransformer


@dataclasses.dataclass(frozen=True)
class LossReport:
    """Sums over a set of examples.

    Attributes:
      cross_entropy: float64 [examples], the sum over each example's target tokens, in nats.
      num_target_tokens: int64 [examples].
      num_correct: int64 [examples], target tokens that are the most probable one.
    """

    cross_entropy: Float[np.ndarray, "examples"]
    num_target_tokens: Int[np.ndarray, "examples"]
    num_correct: Int[np.ndarray, "examples"]

    @property
    def loss(self) -> float:
        """Nats per target token."""
        return float(self.cross_entropy.sum() / self.num_target_tokens.sum())

    @property
    def accuracy(self) -> float:
        """Share of the target tokens that are the most probable one."""
        return float(self.num_correct.sum() / self.num_target_tokens.sum())

    def gap_to(self, other: "LossReport") -> tuple[float, float]:
        """Loss above `other` on the same examples, and its paired standard error.

        Raises:
          ValueError: the two reports are not over the same examples.
        """
        if not np.array_equal(self.num_target_tokens, other.num_target_tokens):
            raise ValueError(
                "a gap needs two reports over the same examples, but their target tokens differ; "
                "evaluate both on the same token file"
            )
        difference = self.cross_entropy - other.cross_entropy
        tokens = self.num_target_tokens
        gap = difference.sum() / tokens.sum()
        if len(tokens) < 2:
            return float(gap), float("nan")
        residual = difference - gap * tokens
        spread = np.sqrt(np.sum(residual**2) * len(tokens) / (len(tokens) - 1)) / tokens.sum()
        return float(gap), float(spread)


def cross_entropy(
    logits: Float[Array, "... vocab"], targets: Int[Array, "..."]
) -> Float[Array, "..."]:
    """-log p(target) in nats, without z-loss or label smoothing; 0 weight is the caller's."""
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return log_z - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]


def batch_sums(
    logits: Float[Array, "batch length vocab"],
    targets: Int[Array, "batch length"],
    weights: Array,
) -> tuple[Float[Array, "batch"], Int[Array, "batch"], Int[Array, "batch"]]:
    """Per example: cross entropy, number of target tokens, number of correct ones."""
    real = weights > 0
    losses = jnp.where(real, cross_entropy(logits, targets), 0.0)
    correct = real & (jnp.argmax(logits, axis=-1) == targets)
    return losses.sum(axis=1), real.sum(axis=1), correct.sum(axis=1)


@functools.partial(jax.jit, static_argnames="module")
def _evaluate_batch(
    module: SwitchTransformer, variables: Mapping[str, Any], batch: Mapping[str, Array]
) -> tuple[Array, Array, Array]:
    logits: Any = module.apply(
        variables,
        batch["encoder_input_tokens"],
        batch["decoder_input_tokens"],
        batch["decoder_target_tokens"],
        enable_dropout=False,
    )
    return batch_sums(logits, batch["decoder_target_tokens"], batch["decoder_loss_weights"])


def evaluate_loss(
    module: SwitchTransformer,
    variables: Mapping[str, Any],
    batches: Iterable[Mapping[str, Array | np.ndarray]],
    *,
    progress: str | None = None,
) -> LossReport:
    """Loss of a model over batches of tokens.

    Args:
      module: the model.
      variables: its parameters, dense or codes.
      batches: mappings with `encoder_input_tokens`, `decoder_input_tokens`,
        `decoder_target_tokens` and `decoder_loss_weights`, each [batch, length]. Rows whose
        weights are all zero (padding of the last batch) are left out of the report.
      progress: label of a progress bar; None shows none.
    """
    sums = []
    for batch in tqdm(batches, desc=progress, unit="batch", disable=progress is None):
        sums.append(jax.device_get(_evaluate_batch(module, variables, dict(batch))))
    if not sums:
        raise ValueError("no batches to evaluate; pass at least one")
    losses, tokens, correct = (np.concatenate(column) for column in zip(*sums, strict=True))
    real = tokens > 0
    return LossReport(
        losses[real].astype(np.float64),
        tokens[real].astype(np.int64),
        correct[real].astype(np.int64),
    )
