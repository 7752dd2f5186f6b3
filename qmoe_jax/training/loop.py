"""The loop of a run: steps, evaluations, saves, and a log that a resumed run ends alike."""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from qmoe_jax.atomic_file import write_atomically
from qmoe_jax.calibration.tokens import TokenFile
from qmoe_jax.ops.expert_parallel import replicate, split_rows
from qmoe_jax.progress import progress as show_progress
from qmoe_jax.training.examples import ExampleOrder
from qmoe_jax.training.settings import FinetuneSettings
from qmoe_jax.training.state import TrainState, restore_state, save_state
from qmoe_jax.training.step import Step
from qmoe_jax.training.trainable import Parts, Trained

LOG = "metrics.jsonl"


@dataclasses.dataclass(frozen=True)
class Loop:
    """What the loop of a run has.

    Attributes:
      step: compiled, of `step.make_step`.
      optimizer: of optax.
      parts: the variables at the beginning.
      reference_variables: of the reference, None without one.
      tokens: what is trained on.
      settings: of the run.
      evaluate: trained values to figures, a JSON object; None evaluates nothing.
      folder: for the state and the log.
      mesh: devices that share each batch; None: one has it all.
      title: of the progress bar.
      progress: show it.
    """

    step: Step
    optimizer: Any
    parts: Parts
    reference_variables: Any
    tokens: TokenFile
    settings: FinetuneSettings
    evaluate: Callable[[Trained], Mapping[str, Any]] | None
    folder: Path
    mesh: Mesh | None
    title: str
    progress: bool

    def run(self) -> TrainState:
        """Train to the last step, from where an earlier run was.

        Raises:
          CheckpointError: the folder cannot be written, or what it holds is damaged.
          ValueError: the loss is no number any more.
        """
        settings = self.settings
        # Copies: a step gives its arguments up, and the beginning is needed to restore.
        trained = {name: jnp.array(value) for name, value in self.parts.trained.items()}
        begun = TrainState(0, trained, self.optimizer.init(trained), [])
        state = restore_state(self.folder, begun)
        if self.mesh is not None:
            on_all = functools.partial(replicate, mesh=self.mesh)
            state.trained, state.optimizer = jax.tree.map(on_all, (state.trained, state.optimizer))
        order = ExampleOrder(len(self.tokens), settings.batch_size, settings.seed)
        shown = show_progress(
            total=settings.train_steps, title=self.title, unit="steps", shown=self.progress
        )
        with shown as bar:
            bar.skip(state.step)
            if state.step == 0 and not state.history:
                self._evaluate(state)
            while state.step < settings.train_steps:
                terms = self._one(state, order)
                bar.note(f"loss {terms['loss']:.4f}")
                bar.update()
                last = state.step == settings.train_steps
                if state.step % settings.log_steps == 0 or last:
                    state.history.append({"step": state.step, "train": terms})
                if state.step % settings.eval_steps == 0 or last:
                    self._evaluate(state)
                if state.step % settings.save_steps == 0 or last:
                    self._save(state)
        return state

    def _one(self, state: TrainState, order: ExampleOrder) -> dict[str, float]:
        """Do a step; return the terms of its loss."""
        batch: Mapping[str, Any] = order.batch(self.tokens, state.step, self.settings.microbatches)
        if self.mesh is not None:
            batch = {name: split_rows(array, self.mesh, axis=1) for name, array in batch.items()}
        state.trained, state.optimizer, found = self.step(
            state.trained,
            state.optimizer,
            self.parts.frozen,
            self.reference_variables,
            batch,
            jnp.int32(state.step),
        )
        state.step += 1
        terms = {name: float(value) for name, value in _fetch(found).items()}
        if not math.isfinite(terms["loss"]):
            raise ValueError(
                f"the loss is {terms['loss']} at step {state.step}; begin anew with a smaller "
                f"learning_rate than {self.settings.learning_rate} (overwrite=True)"
            )
        return terms

    def _evaluate(self, state: TrainState) -> None:
        if self.evaluate is not None:
            found = dict(self.evaluate(state.trained))
            state.history.append({"step": state.step, "validation": found})

    def _save(self, state: TrainState) -> None:
        save_state(self.folder, state)
        lines = "".join(json.dumps(line) + "\n" for line in state.history)
        write_atomically(self.folder / LOG, lines.encode())


def _fetch(terms: Mapping[str, Array]) -> Mapping[str, Any]:
    return jax.device_get(terms)
