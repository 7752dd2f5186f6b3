"""T5X's training loss, and the distance to another model, as sums that add up over batches."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qmoe_jax.evaluation.divergence import divergence_sums
from qmoe_jax.evaluation.metrics import batch_sums, log_z_squared, teacher_forced
from qmoe_jax.models.switch import SwitchTransformer


@dataclasses.dataclass(frozen=True)
class LossFactors:
    """Weights of the terms beside the first; the defaults are those of the public models.

    Attributes:
      z_loss: of the squared log-partition function of the logits (T5X's `Z_LOSS`).
      auxiliary_loss: of the load-balancing loss, 1 when balanced (`AUX_LOSS_FACTOR`).
      router_z_loss: of the squared log-partition function of the routers
        (`ROUTER_Z_LOSS_FACTOR`).
    """

    z_loss: float = 1e-4
    auxiliary_loss: float = 0.01
    router_z_loss: float = 0.0


def training_loss(
    module: SwitchTransformer,
    variables: Mapping[str, Any],
    batch: Mapping[str, Array],
    *,
    num_tokens: Float[Array, ""],
    share: float | Float[Array, ""] = 1.0,
    factors: LossFactors | None = None,
    dropout_key: Array | None = None,
    enable_dropout: bool = True,
    reference_logits: Float[Array, "batch length vocab"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Return a batch's part of the loss of T5X's `loss_fn`, and its terms.

    Cross entropy and z-loss are means over target tokens, the routers' losses means over sparse
    layers. Batches of one step add up: each gives `num_tokens` of all and its `share`.

    Args:
      module: the model.
      variables: `params`, and what else it takes.
      batch: `encoder_input_tokens`, `decoder_input_tokens`, `decoder_target_tokens` and
        `decoder_loss_weights`, int32 [batch, length].
      num_tokens: target tokens of all batches of the step.
      share: of the routers' losses: 1 over the number of batches of the step.
      factors: weights of the terms; those of the public models where None.
      dropout_key: for dropout, where the module's rates are not 0.
      enable_dropout: use the training capacity factor, and dropout.
      reference_logits: of another model; its KL takes the place of the cross entropy.

    Returns:
      The loss, and by name `cross_entropy` or `kl`, `z_loss`, `auxiliary_loss`, `router_z_loss`,
      each times its factor, and `accuracy`.
    """
    factors = factors or LossFactors()
    targets, weights = batch["decoder_target_tokens"], batch["decoder_loss_weights"]
    logits, sown = teacher_forced(
        module, variables, batch, enable_dropout=enable_dropout, dropout_key=dropout_key
    )
    losses, _, correct = batch_sums(logits, targets, weights)
    terms = {}
    if reference_logits is None:
        terms["cross_entropy"] = losses.sum() / num_tokens
    else:
        divergences = divergence_sums(logits, reference_logits, targets, weights)
        terms["kl"] = divergences.kl.sum() / num_tokens
    terms["z_loss"] = factors.z_loss * log_z_squared(logits, weights).sum() / num_tokens
    for name in ("auxiliary_loss", "router_z_loss"):
        mean = _mean_over_layers(sown, name)
        terms[name] = share * getattr(factors, name) * mean
    loss = jnp.sum(jnp.stack(list(terms.values())))
    return loss, {**terms, "accuracy": correct.sum() / num_tokens}


def _mean_over_layers(sown: Mapping[str, Any], name: str) -> Float[Array, ""]:
    """Return the mean over the sparse layers of what they sowed under a name; 0 without any."""
    found = [
        leaf.reshape(())
        for path, leaf in jax.tree_util.tree_leaves_with_path(sown)
        if any(getattr(key, "key", None) == name for key in path)
    ]
    return jnp.mean(jnp.stack(found)) if found else jnp.zeros(())
