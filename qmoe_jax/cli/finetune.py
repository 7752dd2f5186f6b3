"""`qmoe-jax finetune`: train parts of a checkpoint on token files or a seqio task."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

_DESCRIPTION = """\
Fine-tune a Switch Transformer, native or compressed; the codes of its experts stay as they are.

examples:
  token files (qmoe-jax prepare-tokens); needs no TensorFlow:
    qmoe-jax finetune --gin_file=gin/runs/finetune.gin \\
      --gin.INITIAL_CHECKPOINT="'compressed'" --gin.TOKENS="'train.npz'" \\
      --gin.VALIDATION_TOKENS="'validation.npz'" --gin.OUTPUT="'tuned'" --gin.TRAIN_STEPS=1000

  a seqio task that a module of yours registers, as T5X fine-tunes:
    qmoe-jax finetune --gin_file=gin/models/switch_base.gin --gin_file=gin/runs/finetune.gin \\
      --gin.INITIAL_CHECKPOINT="'compressed'" --gin.MIXTURE_OR_TASK="'my_task'" \\
      --gin.TASK_MODULE="'my_tasks'" --gin.OUTPUT="'tuned'" --gin.TRAIN_STEPS=1000 \\
      --gin.TASK_FEATURE_LENGTHS="{'inputs': 512, 'targets': 64}"

Required: INITIAL_CHECKPOINT, OUTPUT, TRAIN_STEPS, and either TOKENS or MIXTURE_OR_TASK.

TRAINABLE is "lora", "dense", "norms", "gains" or "experts" (native checkpoints), or a list of them.
OUTPUT is a folder: the checkpoint in it, checkpoint_<TRAIN_STEPS>, is one that every command takes
(as OUTPUT itself is). A stopped run goes on with the same command; --overwrite (or
--gin.OVERWRITE=True) begins anew."""

IF_INTERRUPTED = "the same command goes on where it was saved last"


def finetune(
    checkpoint: str,
    output: str,
    settings: Any,
    tokens: str | None = None,
    task: str | None = None,
    tokenize: Callable[..., Any] | None = None,
    *,
    validation_tokens: str | None = None,
    reference: str | None = None,
    feature_lengths: Mapping[str, int] | None = None,
    num_examples: int | None = None,
    num_validation_examples: int | None = None,
    metrics: bool = True,
    activation_dtype: str = "float32",
    expert_capacity_factor: float | None = None,
    num_devices: int = 1,
    adapters: str | None = None,
    overwrite: bool = False,
    tensorboard: bool | None = None,
    load: Callable[..., Any] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Find the tokens, and train.

    Args:
      checkpoint: native T5X or compressed.
      output: local folder.
      settings: `FinetuneSettings`.
      tokens: a token file; or
      task: name of a task, see `calibration.sources.task_tokens`; its train split is trained on,
        and its validation split evaluated.
      tokenize: `task_tokens`, with its other arguments bound.
      validation_tokens: a token file to evaluate on.
      reference: see `training.finetune.finetune`, as for what is not named here.
      feature_lengths: of a task: lengths of `inputs` and `targets`.
      num_examples: use the first so many; all where None.
      num_validation_examples: the same of what is evaluated.
      metrics: evaluate with the task's own metrics too, where it has some; its
        examples are answered then, which takes longer than their loss.
      activation_dtype: "float32" or "bfloat16".
      expert_capacity_factor: None is dropless.
      num_devices: devices that share each batch, and each layer's experts.
      adapters: an adapter file to begin with.
      overwrite: throw away what `output` holds of a run.
      tensorboard: write events; None does so where tensorboardX is installed.
      load: `load_switch`, or one with routing fields bound.
      progress: show progress bars.

    Raises:
      ValueError: bad input; see `training.finetune.finetune`.
    """
    from qmoe_jax.calibration.sources import task_tokens
    from qmoe_jax.calibration.tokens import read_tokens
    from qmoe_jax.models.load import load_switch
    from qmoe_jax.training import finetune as training

    if (tokens is None) == (task is None):
        raise ValueError(
            "give either TOKENS, a token file, or MIXTURE_OR_TASK, such as c4_v220_span_corruption "
            f"(TOKENS is {tokens!r}, MIXTURE_OR_TASK is {task!r})"
        )
    task_metrics = None
    if task is None:
        train = read_tokens(str(tokens)).first(num_examples)
        held_out = None if validation_tokens is None else read_tokens(validation_tokens)
    else:
        lengths = dict(feature_lengths or {})
        if unknown := lengths.keys() - {"inputs", "targets"}:
            raise ValueError(
                f"feature_lengths has {sorted(unknown)[0]!r}; it takes 'inputs' and 'targets'"
            )
        named = {f"{name}_length": length for name, length in lengths.items()}
        make = tokenize or task_tokens
        common = {"task": task, "cache": None, "progress": progress, **named}
        train = make(split="train", num_examples=num_examples, **common)
        held_out = None if validation_tokens is None else read_tokens(validation_tokens)
        if held_out is None and num_validation_examples != 0:
            held_out = make(split="validation", num_examples=num_validation_examples, **common)
            if metrics:
                task_metrics = _task_metrics(held_out, settings.batch_size)
    if held_out is not None and task is None:
        held_out = held_out.first(num_validation_examples)
    return training.finetune(
        checkpoint,
        output,
        train,
        settings,
        validation_tokens=held_out,
        reference=reference,
        activation_dtype=activation_dtype,
        expert_capacity_factor=expert_capacity_factor,
        num_devices=num_devices,
        adapters=adapters,
        overwrite=overwrite,
        tensorboard=tensorboard,
        load=load or load_switch,
        task_metrics=task_metrics,
        progress=progress,
    )


def _task_metrics(held_out: Any, batch_size: int) -> Any:
    """Return the metrics of the task that examples are of; None where it has none."""
    from qmoe_jax.evaluation.task_metrics import TaskMetrics, has_metrics

    metadata = held_out.metadata
    if not has_metrics(metadata.task):
        return None
    inputs_length, targets_length = held_out.tokens.lengths
    return TaskMetrics(
        metadata.task,
        split=metadata.split,
        lengths={"inputs": inputs_length, "targets": targets_length},
        num_examples=len(held_out),
        batch_size=batch_size,
        seed=metadata.seed,
    )


def summary(report: Mapping[str, Any]) -> str:
    """Say in a few lines what a run did."""
    from qmoe_jax.evaluation.writers import scalars
    from qmoe_jax.formatting import format_bytes

    kinds = ", ".join(report["settings"]["trainable"])
    lines = [
        f"{report['checkpoint']}: {report['num_trained']:,} parameters trained ({kinds}, "
        f"{format_bytes(report['trained_bytes'])} as float32), "
        f"{report['settings']['train_steps']} steps"
    ]
    if report["adapters"]:
        lines.append(f"{report['adapters']}: the corrections alone, for the initial checkpoint")
    if report["expert_adapters"]:
        lines.append(
            f"{report['expert_adapters']}: corrections of codes, which the checkpoint needs too "
            "(load_switch.adapters)"
        )
    if found := report.get("validation"):
        figures = {when: dict(scalars(found[when])) for when in ("before", "after", "written")}
        for name in figures["before"]:
            before, after, written = (f"{figures[when][name]:.5f}" for when in figures)
            lines.append(f"validation {name}: {before} -> {after}, as written {written}")
    return "\n".join(lines)


def run(
    name: str, description: str, argv: Sequence[str], train: Callable[..., Any] = finetune
) -> int:
    """Run a command that trains, print what it did, and return the exit status.

    Args:
      name: of the command and its gin file; `train` is bound under it.
      description: for --help.
      argv: arguments.
      train: `finetune`, or what checks more before.
    """
    from qmoe_jax.calibration.sources import task_tokens
    from qmoe_jax.cli import flags
    from qmoe_jax.models.load import load_switch
    from qmoe_jax.training.settings import FinetuneSettings

    report = flags.run(
        name,
        train,
        [FinetuneSettings, load_switch, task_tokens],
        description=description,
        default_gin_file=f"gin/runs/{name}.gin",
        optional_macros=("VOCABULARY",),
        argv=["--gin.OVERWRITE=True" if flag == "--overwrite" else flag for flag in argv],
    )
    print(summary(report))
    return 0


def main(argv: Sequence[str]) -> int:
    """Run the command; return the exit status."""
    return run("finetune", _DESCRIPTION, argv)
