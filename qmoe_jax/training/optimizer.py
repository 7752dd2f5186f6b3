"""The optimizers, of optax: Adafactor as T5X fine-tunes with it, or Adam."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Array

from qmoe_jax.models.layers import ADAPTERS
from qmoe_jax.training.settings import FinetuneSettings


def make_optimizer(settings: FinetuneSettings) -> Any:
    """Return the `optax.GradientTransformation` of `trainable.Trained`."""
    import optax

    rate: Any = settings.learning_rate
    if settings.warmup_steps:
        rate = optax.linear_schedule(0.0, rate, settings.warmup_steps)
    if settings.optimizer == "adam":
        return optax.adam(rate)

    def adafactor(*, relative: bool) -> Any:
        return optax.adafactor(
            rate,
            min_dim_size_to_factor=128,
            decay_rate=0.8,
            multiply_by_parameter_scale=relative,
            clipping_threshold=1.0,
            momentum=None,
            weight_decay_rate=None,
        )

    # Relative to its size, a correction that begins at 0 would hardly move.
    kinds: Any = {"parameters": adafactor(relative=True), "adapters": adafactor(relative=False)}
    return optax.multi_transform(kinds, _label)


def _label(trained: Mapping[str, Array]) -> dict[str, str]:
    return {
        name: "adapters" if name.startswith(f"{ADAPTERS}/") else "parameters" for name in trained
    }
