"""One training step as a compiled program: gradients of microbatches, summed, and an update."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int32

from qmoe_jax.evaluation.metrics import teacher_forced
from qmoe_jax.models.switch import SwitchTransformer
from qmoe_jax.training.loss import LossFactors, training_loss
from qmoe_jax.training.trainable import CodeArray, Trained, join_variables

Step = Callable[..., tuple[Trained, Any, dict[str, Float[Array, ""]]]]


def make_step(
    module: SwitchTransformer,
    optimizer: Any,
    factors: LossFactors,
    *,
    coded: Mapping[str, CodeArray],
    masks: Mapping[str, Array],
    seed: int,
    reference: SwitchTransformer | None = None,
) -> Step:
    """Return step(trained, optimizer state, frozen, reference variables, batch, number of step).

    Args:
      module: the model, its dropout rates set.
      optimizer: of optax.
      factors: weights of the loss's terms.
      coded: see `trainable.join_variables`.
      masks: factors of gradients, see `trainable.gradient_masks`.
      seed: of dropout.
      reference: model whose predictions take the place of the targets, without dropout.

    Returns:
      A function to the new values, the optimizer's new state, and the terms of the loss. The batch
      has int32 [microbatches, batch, length]; trained values and state are given up to it. Where
      the module's experts are split over devices, values and state are whole on each, and a batch
      may be split by its rows (`Loop`): sums are over all of them, so the step is the same.
    """

    def loss_of(
        trained: Trained,
        frozen: Mapping[str, Array],
        batch: Mapping[str, Int32[Array, "batch length"]],
        reference_logits: Array | None,
        num_tokens: Array,
        share: float,
        key: Array,
    ) -> tuple[Array, dict[str, Array]]:
        variables = join_variables(trained, frozen, coded)
        return training_loss(
            module,
            variables,
            batch,
            num_tokens=num_tokens,
            share=share,
            factors=factors,
            dropout_key=key,
            reference_logits=reference_logits,
        )

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(
        trained: Trained,
        state: Any,
        frozen: Mapping[str, Array],
        reference_variables: Any,
        batch: Mapping[str, Array],
        number: Int32[Array, ""],
    ) -> tuple[Trained, Any, dict[str, Array]]:
        weights = batch["decoder_loss_weights"]
        count = weights.shape[0]
        # A step of padding alone has no tokens to be a mean of.
        num_tokens = jnp.maximum(weights.sum(), 1).astype(jnp.float32)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), number), count)

        def run(own: dict[str, Array], key: Array) -> tuple[Trained, dict[str, Array]]:
            logits = None
            if reference is not None:
                logits, _ = teacher_forced(reference, reference_variables, own)
            compute = jax.value_and_grad(loss_of, has_aux=True)
            (loss, terms), gradients = compute(
                trained, frozen, own, logits, num_tokens, 1 / count, key
            )
            return gradients, {"loss": loss, **terms}

        def add(sums: Any, part: tuple[dict[str, Array], Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, run(*part)), None

        if count == 1:
            sums = run({name: array[0] for name, array in batch.items()}, keys[0])
        else:
            one = jax.eval_shape(
                lambda b, k: run({n: x[0] for n, x in b.items()}, k[0]), batch, keys
            )
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), one)
            sums, _ = jax.lax.scan(add, zeros, (dict(batch), keys))
        gradients, terms = sums
        gradients = {n: g * masks[n] if n in masks else g for n, g in gradients.items()}
        terms["gradient_norm"] = jnp.sqrt(
            sum((jnp.sum(g**2) for g in gradients.values()), start=jnp.zeros(()))
        )
        updates, state = optimizer.update(gradients, state, trained)
        trained = {name: value + updates[name] for name, value in trained.items()}
        if module.mesh is not None:
            # As they came, so that the next step is this program.
            whole = NamedSharding(module.mesh, PartitionSpec())
            trained, state = jax.lax.with_sharding_constraint((trained, state), whole)
        return trained, state, terms

    return step
