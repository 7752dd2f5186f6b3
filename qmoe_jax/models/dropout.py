"""Dropout as T5 has it: a mask is shared along the length, and in an expert by all its tokens."""

import dataclasses

import flax.linen as nn


@dataclasses.dataclass(frozen=True)
class DropoutRates:
    """Shares of activations that are dropped with `enable_dropout=True`; flaxformer's places.

    Attributes:
      dense: of embedded tokens, attention weights, hidden layers of dense MLPs, the output of
        every sublayer and the output of every stack (T5X's `DROPOUT_RATE`).
      expert: of the hidden layers of experts (`EXPERT_DROPOUT_RATE`).
    """

    dense: float = 0.0
    expert: float = 0.0

    def __post_init__(self) -> None:
        for name, rate in (("dropout_rate", self.dense), ("expert_dropout_rate", self.expert)):
            if not 0 <= rate < 1:
                raise ValueError(f"{name} is {rate}; a rate is at least 0 and below 1")


def shared_dropout(rate: float) -> nn.Dropout:
    """Return dropout with one mask for all positions of an example: `[..., length, features]`."""
    return nn.Dropout(rate, broadcast_dims=(-2,))
