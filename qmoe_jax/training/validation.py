"""What a model is measured on while it is trained, and after."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from qmoe_jax.calibration.tokens import TokenFile
from qmoe_jax.evaluation.divergence import measure_divergence
from qmoe_jax.evaluation.metrics import evaluate_loss
from qmoe_jax.evaluation.task_metrics import TaskMetrics
from qmoe_jax.models.switch import SwitchTransformer
from qmoe_jax.ops.expert_parallel import split_rows


@dataclasses.dataclass(frozen=True)
class Validation:
    """Examples and figures.

    Attributes:
      tokens: the examples.
      batch_size: how many at a time.
      reference: module and variables of the model that predictions are compared with, or None.
      task_metrics: a seqio task's own, or None.
    """

    tokens: TokenFile
    batch_size: int
    reference: tuple[SwitchTransformer, Mapping[str, Any]] | None = None
    task_metrics: TaskMetrics | None = None

    def figures(self, module: SwitchTransformer, variables: Mapping[str, Any]) -> dict[str, Any]:
        """Return `loss` and `accuracy` per target token, `exact_match`, and what else there is.

        That is `kl` with a reference, and `metrics` with a task's.
        """
        size = min(self.batch_size, len(self.tokens))
        batches: list[dict[str, Any]] = [b.arrays() for b in self.tokens.batches(size)]
        mesh = module.mesh
        if mesh is not None and size % mesh.size == 0:
            batches = [{n: split_rows(a, mesh) for n, a in batch.items()} for batch in batches]
        found: dict[str, Any] = {}
        if self.reference is None:
            losses = evaluate_loss(module, variables, batches)
        else:
            divergence = measure_divergence(module, variables, *self.reference, batches)
            losses = divergence.losses
            found["kl"] = divergence.divergence[0]
        figures = {name: getattr(losses, name) for name in ("loss", "accuracy", "exact_match")}
        if self.task_metrics is not None:
            found["metrics"] = self.task_metrics(module, variables)
        return figures | found
