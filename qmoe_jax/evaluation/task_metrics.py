"""The metrics of a seqio task, or of a mixture's tasks, on what a model predicts and how it scores.

seqio's `Evaluator` has the examples, the postprocessing and the metrics, as in T5X's `infer_eval`;
here are the two functions that it asks a model with.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int

from qmoe_jax.calibration import text_packages
from qmoe_jax.evaluation.metrics import evaluate_batch
from qmoe_jax.generation.sampling import sample_generate
from qmoe_jax.generation.step import Generated
from qmoe_jax.models.switch import SwitchTransformer

# An example's number, and what seqio wants of it.
Numbered = list[tuple[int, Any]]


class TaskMetrics:
    """A task's metrics on one of its splits, for one model after another.

    Predictions are greedy, as T5X's are unless it is told otherwise; scores are log likelihoods of
    the targets.
    """

    def __init__(
        self,
        task: str,
        *,
        split: str,
        lengths: Mapping[str, int],
        num_examples: int | None,
        batch_size: int,
        seed: int,
    ):
        """Read the examples.

        Args:
          task: name of a registered seqio task that has metrics, or of a mixture with such tasks.
          split: of the task.
          lengths: of `inputs` and `targets`; predictions are at most as long as the latter.
          num_examples: the first so many, of each task; all where None.
          batch_size: examples that the model is given at a time.
          seed: of the task's preprocessing.
        """
        seqio = text_packages.seqio()
        # Its warning, that lengths may be longer than the examples, is no concern of a user's.
        self._evaluator = seqio.Evaluator(
            task,
            seqio.EncDecFeatureConverter(pack=False),
            eval_split=split,
            seed=seed,
            sequence_length=dict(lengths),
            num_examples=num_examples,
            async_compute_metrics=False,
        )
        vocabulary = seqio.get_mixture_or_task(task).output_features["targets"].vocabulary
        self._eos_id = vocabulary.eos_id
        self._length = lengths["targets"]
        self._batch_size = batch_size
        self._task = task
        self._request = {
            "task": task,
            "split": split,
            "lengths": dict(lengths),
            "num_examples": num_examples,
            "seed": seed,
        }

    def to_json(self) -> dict[str, Any]:
        """Return what the examples are determined by."""
        return dict(self._request)

    def __call__(
        self, module: SwitchTransformer, variables: Mapping[str, Any]
    ) -> dict[str, float | str]:
        """Return the metrics of a model by name: numbers, and texts as they are.

        Of a mixture a name begins with the task's: `task/metric`.

        Raises:
          ValueError: a metric wants what a model is not asked for here, or it failed.
        """
        seqio = text_packages.seqio()
        kinds = seqio.metrics.ModelOutputType
        model_fns: dict[Any, Callable[[Any], Any]] = {
            kinds.PREDICTION: lambda examples: self._predict(module, variables, examples)[0],
            kinds.PREDICTION_WITH_AUX: lambda examples: self._predict(module, variables, examples),
            kinds.SCORE: lambda examples: self._score(module, variables, examples),
        }
        for task in self._evaluator.eval_tasks:
            for metric in task.metric_objs:
                if metric.model_output_type not in model_fns:
                    raise ValueError(
                        f"a metric of task {task.name} wants {metric.model_output_type.name}, but "
                        f"models are asked for {', '.join(kind.name for kind in model_fns)}; "
                        "set metrics=False (TASK_METRICS = False) to leave a task's metrics out"
                    )
        found, _ = self._evaluator.evaluate(compute_metrics=True, model_fns=model_fns)
        return {
            name if task == self._task else f"{task}/{name}": plain
            for task, metrics in found.result().items()
            for name, value in metrics.items()
            if (plain := _plain(value)) is not None
        }

    def _predict(
        self, module: SwitchTransformer, variables: Mapping[str, Any], examples: Any
    ) -> tuple[Numbered, dict[str, list[float]]]:
        """Return greedy predictions, and as T5X's auxiliary values their log likelihoods."""
        numbered: Numbered = []
        scores: list[float] = []
        for numbers, batch in self._batches(examples):
            inputs = batch["encoder_input_tokens"]
            found = jax.device_get(_greedy(module, variables, inputs, self._eos_id, self._length))
            numbered += zip(numbers, found.tokens[: len(numbers), 0], strict=True)
            scores += found.scores[: len(numbers), 0].tolist()
        return numbered, {"scores": scores}

    def _score(
        self, module: SwitchTransformer, variables: Mapping[str, Any], examples: Any
    ) -> Numbered:
        scored: Numbered = []
        for numbers, batch in self._batches(examples):
            sums = jax.device_get(evaluate_batch(module, variables, batch))
            scores = -sums.cross_entropy[: len(numbers)].astype(np.float64)
            scored += zip(numbers, scores.tolist(), strict=True)
        return scored

    def _batches(self, examples: Any) -> Iterator[tuple[list[int], dict[str, np.ndarray]]]:
        """Yield numbers of examples and their arrays, [batch_size, length], filled up with 0."""
        everything = list(examples.as_numpy_iterator())
        size = min(self._batch_size, len(everything))
        for start in range(0, len(everything), size):
            part = everything[start : start + size]
            missing = [(0, size - len(part)), (0, 0)]
            batch = {
                name: np.pad(np.stack([own[name] for _, own in part]).astype(np.int32), missing)
                for name in part[0][1]
            }
            yield [int(number) for number, _ in part], batch


def has_metrics(task: str) -> bool:
    """Whether a registered seqio task, or one of a mixture's, has metrics of its own."""
    seqio = text_packages.seqio()
    tasks = seqio.get_subtasks(seqio.get_mixture_or_task(task))
    return any(own.metric_fns or own.metric_objs for own in tasks)


@functools.partial(jax.jit, static_argnames=("module", "length"))
def _greedy(
    module: SwitchTransformer,
    variables: Mapping[str, Any],
    inputs: Int[Array, "batch inputs_length"],
    eos_id: Int[Array, ""] | int,
    length: int,
) -> Generated:
    return sample_generate(
        module,
        variables,
        inputs,
        jax.random.key(0),
        max_decode_length=length,
        temperature=0.0,
        eos_id=eos_id,
        rescale_log_probs=False,
    )


def _plain(value: Any) -> float | str | None:
    """Return a metric as JSON has it; None where it is no number and no text."""
    value = getattr(value, "value", getattr(value, "textdata", value))
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, str):
        return value
    array = np.asarray(value)
    return float(array) if array.shape == () and array.dtype.kind in "biuf" else None
