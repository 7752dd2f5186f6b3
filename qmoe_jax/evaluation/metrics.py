"""Loss and accuracy over token batches, per example, so that models compare on the same text."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from qmoe_jax.evaluation.router import router_sums
from qmoe_jax.models.switch import SwitchTransformer
from qmoe_jax.progress import progress as show_progress


@dataclasses.dataclass(frozen=True)
class LossReport:
    """Losses of a model on a set of examples, as sums per example; two compare by `gap_to`.

    Attributes:
      cross_entropy: float64 [examples], -log p summed over each example's target tokens, in nats.
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

    @property
    def exact_match(self) -> float:
        """Share of the examples whose every target token is the most probable one.

        So many does greedy generation answer as the target has it, to the token: it sees the
        target's own tokens for as long as it agrees with them. (Under a capacity factor, where
        tokens compete, the two may differ.)
        """
        return float(np.mean(self.num_correct == self.num_target_tokens))

    def gap_to(self, other: "LossReport") -> tuple[float, float]:
        """Return the loss above `other` on the same examples, and its standard error.

        Both in nats per target token. The error is that of paired differences between examples;
        NaN where there is one example.

        Args:
          other: of another model on the same examples.

        Raises:
          ValueError: the two reports are not over the same examples.
        """
        if not np.array_equal(self.num_target_tokens, other.num_target_tokens):
            raise ValueError(
                "a gap needs two reports over the same examples, but their target tokens differ; "
                "evaluate both on the same token file"
            )
        return per_token(self.cross_entropy - other.cross_entropy, self.num_target_tokens)


def per_token(
    sums: Float[np.ndarray, "examples"], tokens: Int[np.ndarray, "examples"]
) -> tuple[float, float]:
    """Return a mean per token, and its standard error over examples; NaN where there is one.

    Args:
      sums: of each example, over its tokens.
      tokens: how many those are.
    """
    mean = sums.sum() / tokens.sum()
    if len(tokens) < 2:
        return float(mean), float("nan")
    residual = sums - mean * tokens
    spread = np.sqrt(np.sum(residual**2) * len(tokens) / (len(tokens) - 1)) / tokens.sum()
    return float(mean), float(spread)


def worse_than_guessing(
    loss: float, num_embeddings: int, inputs_length: int, targets_length: int
) -> str | None:
    """Say so where a loss is above what giving every token the same probability would have.

    Args:
      loss: nats per target token.
      num_embeddings: tokens that the model tells apart.
      inputs_length: length of the encoder's arrays.
      targets_length: length of the decoder's arrays.

    Returns:
      A sentence with the likely causes; None for a loss that a model may have.
    """
    guessing = math.log(num_embeddings)
    if loss <= guessing:
        return None
    return (
        f"the loss of {loss:.2f} is worse than guessing, ln({num_embeddings}) = {guessing:.2f}: "
        "the examples are hardly those that the model was trained for. Their vocabulary must be "
        f"the checkpoint's, and their lengths ({inputs_length} input, {targets_length} target "
        "positions) those of its training (TASK_FEATURE_LENGTHS in its gin file)"
    )


def cross_entropy(
    logits: Float[Array, "... vocab"], targets: Int[Array, "..."]
) -> Float[Array, "..."]:
    """Return -log p(target) in nats, without z-loss or label smoothing; padding counts too."""
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return log_z - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]


def batch_sums(
    logits: Float[Array, "batch length vocab"],
    targets: Int[Array, "batch length"],
    weights: Shaped[Array, "batch length"],
) -> tuple[Float[Array, "batch"], Int[Array, "batch"], Int[Array, "batch"]]:
    """Sum per example: cross entropy in nats, number of target tokens, number of correct ones."""
    real = weights > 0
    losses = jnp.where(real, cross_entropy(logits, targets), 0.0)
    correct = real & (jnp.argmax(logits, axis=-1) == targets)
    return losses.sum(axis=1), real.sum(axis=1), correct.sum(axis=1)


def log_z_squared(
    logits: Float[Array, "batch length vocab"], weights: Shaped[Array, "batch length"]
) -> Float[Array, "batch"]:
    """Sum per example the squared log-partition function over target tokens."""
    log_z = jax.nn.logsumexp(logits, axis=-1)
    return jnp.where(weights > 0, log_z**2, 0.0).sum(axis=1)


def teacher_forced(
    module: SwitchTransformer,
    variables: Mapping[str, Any],
    batch: Mapping[str, Array],
    *,
    enable_dropout: bool = False,
    dropout_key: Array | None = None,
) -> tuple[Float[Array, "batch length vocab"], Mapping[str, Any]]:
    """Run a model on a batch whose targets it is told.

    Args:
      module: the model.
      variables: its parameters, dense or codes, and what else it takes.
      batch: as `evaluate_batch` takes it.
      enable_dropout: use the training capacity factor, and dropout.
      dropout_key: for dropout, where the module's rates are not 0.

    Returns:
      Logits, and what layers sowed (`models.moe.MoeLayer`).
    """
    # Untyped: flax says that `apply` may return nearly anything.
    result: Any = module.apply(
        variables,
        batch["encoder_input_tokens"],
        batch["decoder_input_tokens"],
        batch["decoder_target_tokens"],
        enable_dropout=enable_dropout,
        mutable=["intermediates"],
        rngs=None if dropout_key is None else {"dropout": dropout_key},
    )
    logits, state = result
    return logits, state.get("intermediates", {})


class BatchSums(NamedTuple):
    """What one batch adds to an evaluation.

    Attributes:
      cross_entropy: float32 [batch], the sum over each row's target tokens, in nats.
      log_z_squared: float32 [batch], sums of the squared log-partition function.
      num_target_tokens: int32 [batch]; 0 in rows of padding.
      num_correct: int32 [batch].
      router: sums per sparse layer, see `router.router_sums`.
    """

    cross_entropy: Float[Array, "batch"]
    log_z_squared: Float[Array, "batch"]
    num_target_tokens: Int[Array, "batch"]
    num_correct: Int[Array, "batch"]
    router: dict[str, dict[str, Array]]


@functools.partial(jax.jit, static_argnames="module")
def evaluate_batch(
    module: SwitchTransformer, variables: Mapping[str, Any], batch: Mapping[str, Array]
) -> BatchSums:
    """Run a model on a batch, teacher-forced.

    Args:
      module: the model.
      variables: its parameters, dense or codes.
      batch: `encoder_input_tokens`, `decoder_input_tokens`, `decoder_target_tokens` and
        `decoder_loss_weights`, int32 [batch, length].
    """
    return model_sums(module, variables, batch)[0]


def model_sums(
    module: SwitchTransformer, variables: Mapping[str, Any], batch: Mapping[str, Array]
) -> tuple[BatchSums, Float[Array, "batch length vocab"]]:
    """Return what `evaluate_batch` returns, and the logits."""
    logits, sown = teacher_forced(module, variables, batch)
    targets, weights = batch["decoder_target_tokens"], batch["decoder_loss_weights"]
    losses, num_tokens, num_correct = batch_sums(logits, targets, weights)
    sums = BatchSums(
        cross_entropy=losses,
        log_z_squared=log_z_squared(logits, weights),
        num_target_tokens=num_tokens,
        num_correct=num_correct,
        router=router_sums(sown, batch["encoder_input_tokens"] > 0, targets > 0),
    )
    return sums, logits


def evaluate_loss(
    module: SwitchTransformer,
    variables: Mapping[str, Any],
    batches: Iterable[Mapping[str, Array | np.ndarray]],
    *,
    progress: str | None = None,
) -> LossReport:
    """Measure the loss of a model over batches of tokens, teacher-forced.

    Args:
      module: the model.
      variables: its parameters, dense or codes.
      batches: mappings with `encoder_input_tokens`, `decoder_input_tokens`,
        `decoder_target_tokens` and `decoder_loss_weights`, each int32 [batch, length]. Rows whose
        weights are all zero (padding of the last batch) are left out of the report.
      progress: label of a progress bar; None shows none.

    Raises:
      ValueError: no batches.
    """
    parts: list[BatchSums] = []
    shown = show_progress(batches, title=progress or "", unit="batches", shown=progress is not None)
    for batch in shown:
        parts.append(jax.device_get(evaluate_batch(module, variables, dict(batch))))
    if not parts:
        raise ValueError("no batches to evaluate; pass at least one")
    return loss_report(
        np.concatenate([part.cross_entropy for part in parts]),
        np.concatenate([part.num_target_tokens for part in parts]),
        np.concatenate([part.num_correct for part in parts]),
    )


def loss_report(
    cross_entropy: Float[np.ndarray, "rows"],
    num_target_tokens: Int[np.ndarray, "rows"],
    num_correct: Int[np.ndarray, "rows"],
) -> LossReport:
    """Return the report of the rows that have target tokens."""
    real = num_target_tokens > 0
    return LossReport(
        cross_entropy[real].astype(np.float64),
        num_target_tokens[real].astype(np.int64),
        num_correct[real].astype(np.int64),
    )
