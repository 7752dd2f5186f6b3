"""What a fine-tuning run is told, checked before anything is read."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from qmoe_jax.models.dropout import DropoutRates
from qmoe_jax.training.loss import LossFactors

KINDS = ("lora", "dense", "norms", "gains", "experts")
OPTIMIZERS = ("adafactor", "adam")
DENSE_KERNELS = ("*attention/*", "*/mlp/wi", "*/mlp/wi_[01]", "*/mlp/wo")
"""Kernels of attention and of dense MLPs."""


@dataclasses.dataclass(frozen=True)
class FinetuneSettings:
    """Settings of fine-tuning; the defaults are T5X's for Switch models where it has one.

    Attributes:
      trainable: what is trained, one of these or several:
        "lora": low-rank corrections of the kernels that `lora_kernels` names;
        "dense": every parameter but experts: embeddings, attention, dense MLPs, routers, norms;
        "norms": the scales of norms alone;
        "gains": what codes are multiplied by: levels of rows (ternary; of 2-bit codes the scale),
        one gain an expert (lattice);
        "experts": the kernels of experts, of a native checkpoint.
      train_steps: steps.
      batch_size: examples of a step.
      microbatches: parts that a step's examples are run in, one after another, to save memory.
      learning_rate: constant, after the warmup.
      warmup_steps: steps in which the rate rises from 0.
      optimizer: "adafactor", with T5X's settings (updates of parameters are relative to their
        size, those of adapters are not), or "adam".
      dropout_rate: see `models.dropout.DropoutRates`.
      expert_dropout_rate: of experts' hidden layers; 0.4 is the Switch paper's.
      z_loss: factor, see `loss.LossFactors`, as for the next two.
      auxiliary_loss: factor of the load-balancing loss.
      router_z_loss: factor.
      lora_rank: rank of a correction.
      lora_kernels: patterns of module paths, as `*attention/query` or `*/expert/wo`.
      lora_shared: the experts of a layer share one correction; else each has its own.
      eval_steps: steps between two evaluations on the validation tokens.
      save_steps: steps between two saves, which a stopped run goes on from.
      log_steps: steps between two lines of the log.
      seed: of the examples' order, dropout and adapters.
    """

    trainable: str | Sequence[str] = "lora"
    train_steps: int = 1000
    batch_size: int = 128
    microbatches: int = 1
    learning_rate: float = 1e-3
    warmup_steps: int = 0
    optimizer: str = "adafactor"
    dropout_rate: float = 0.1
    expert_dropout_rate: float = 0.4
    z_loss: float = 1e-4
    auxiliary_loss: float = 0.01
    router_z_loss: float = 0.0
    lora_rank: int = 8
    lora_kernels: Sequence[str] = DENSE_KERNELS
    lora_shared: bool = False
    eval_steps: int = 100
    save_steps: int = 100
    log_steps: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in KINDS:
                raise ValueError(f"trainable is {kind!r}; it must be of {', '.join(KINDS)}")
        if not self.kinds:
            raise ValueError(f"trainable is empty; give one of {', '.join(KINDS)}, or several")
        if self.optimizer not in OPTIMIZERS:
            known = " or ".join(map(repr, OPTIMIZERS))
            raise ValueError(f"optimizer is {self.optimizer!r}; it must be {known}")
        counts = ("train_steps", "batch_size", "microbatches", "lora_rank")
        for name in (*counts, "eval_steps", "save_steps", "log_steps"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} is {value}; give 1 or more")
        if self.batch_size % self.microbatches:
            raise ValueError(
                f"batch_size is {self.batch_size}, which {self.microbatches} microbatches do not "
                "divide; choose a number that does"
            )
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate is {self.learning_rate}; give a positive number")
        for name in ("warmup_steps", "z_loss", "auxiliary_loss", "router_z_loss", "seed"):
            if (value := getattr(self, name)) < 0:
                raise ValueError(f"{name} is {value}; give 0 or more")
        _ = self.dropout  # which checks its rates

    @property
    def kinds(self) -> tuple[str, ...]:
        """What is trained, as names."""
        return (self.trainable,) if isinstance(self.trainable, str) else tuple(self.trainable)

    @property
    def dropout(self) -> DropoutRates:
        """Rates of dropout."""
        return DropoutRates(self.dropout_rate, self.expert_dropout_rate)

    @property
    def factors(self) -> LossFactors:
        """Weights of the loss's terms."""
        return LossFactors(self.z_loss, self.auxiliary_loss, self.router_z_loss)

    def to_json(self) -> dict[str, Any]:
        """All settings as a JSON object."""
        fields = dataclasses.asdict(self)
        return fields | {"trainable": list(self.kinds), "lora_kernels": list(self.lora_kernels)}
