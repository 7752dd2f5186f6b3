"""`qmoe-jax evaluate`: losses of checkpoints, native, compressed and rounded, on text."""

import contextlib
import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

_DESCRIPTION = """\
Loss per target token, accuracy, z-loss and router statistics of Switch Transformers.

examples:
  a token file (qmoe-jax prepare-tokens); needs no TensorFlow:
    qmoe-jax evaluate --gin.CHECKPOINT="'compressed'" --gin.TOKENS="'validation.npz'"

  C4 as T5X evaluates, from TensorFlow Datasets, against the uncompressed model and rounding:
    qmoe-jax evaluate --gin_file=gin/models/switch_base.gin \\
      --gin_file=gin/runs/eval.gin --gin.TASK="'c4_v220_span_corruption'" \\
      --gin.DATA_DIR="'/data/tfds'" --gin.NUM_EXAMPLES=1024 --gin.OUTPUT="'eval_out'" \\
      --gin.CHECKPOINT="[('uncompressed', '/data/checkpoint_550000'), ('GPTQ', 'compressed'),
                         ('RTN', 'rtn:ternary:/data/checkpoint_550000')]"

  how far predictions are from the uncompressed model's (KL, agreement), beside the losses:
    qmoe-jax evaluate --gin.CHECKPOINT="'compressed'" --gin.TOKENS="'validation.npz'" \\
      --gin.REFERENCE="'/data/checkpoint_550000'"

  the QMoE paper's protocol, from the released files:
    ... --gin.TASK="'jsonl_whole_documents'" --gin.NUM_EXAMPLES=128 \\
      --gin.FILES="'c4-validation.00000-of-00008.json.gz'"

Required: CHECKPOINT, and either TOKENS or TASK with VOCABULARY and DATA_DIR or FILES.

CHECKPOINT is a path, a list of paths or (name, path) pairs, or a dict from name to path; gaps are
to the first. "rtn:ternary:PATH" and "rtn:2bit:PATH" round a native checkpoint's experts to nearest
first.

TASK is c4_v220, c4_v310, ... (TFDS c4/en of that version in DATA_DIR; c4 is the newest that is
prepared there), jsonl (FILES of JSON lines) or text (FILES or a folder of .txt), then
_span_corruption (T5X's: documents concatenated, cut to full length) or _whole_documents (the
paper's). With TASK_MODULE, a seqio task that it registers.

--routers shows a table of each checkpoint's routers too.

With OUTPUT, metrics.json, report.html (the tables, routers too, and losses against sizes) and
TensorBoard events are written there, and a stopped run goes on. What a finished one left is
replaced by the next."""

_ROUTERS = "--routers"

IF_INTERRUPTED = "with OUTPUT, the same command goes on where it was"


def evaluate(
    checkpoint: Any,
    tokens: str | None = None,
    task: str | None = None,
    tokenize: Callable[..., Any] | None = None,
    *,
    reference: str | None = None,
    num_examples: int | None = None,
    batch_size: int = 32,
    activation_dtype: str = "float32",
    expert_capacity_factor: float | None = None,
    output: str | None = None,
    overwrite: bool = False,
    tensorboard: bool | None = None,
    batches_per_shard: int = 16,
    load: Callable[..., Any] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Find the tokens, round what is to be rounded, and evaluate.

    Args:
      checkpoint: see `evaluation.evaluate.evaluate`; a path may be `rtn:<grid>:<native path>`.
      tokens: a token file; or
      task: name of a task, see `calibration.sources.task_tokens`.
      tokenize: `task_tokens`, with its other arguments bound.
      reference: checkpoint that every other is compared with; None compares losses only.
      num_examples: use the first so many; all where None.
      batch_size: see `evaluation.evaluate.evaluate`, as for the following.
      activation_dtype: "float32" or "bfloat16".
      expert_capacity_factor: None is dropless; a number is T5X's capacity factor.
      output: folder for results; tokens and rounded checkpoints are kept there too.
      overwrite: throw away what `output` holds of a run with other settings.
      tensorboard: write events; None does so where tensorboardX is installed.
      batches_per_shard: batches that are stored together.
      load: `load_switch`, or one with routing fields bound.
      progress: show progress bars.

    Raises:
      ValueError: bad input; see `evaluation.evaluate.evaluate`.
    """
    from qmoe_jax.calibration.sources import task_tokens
    from qmoe_jax.evaluation import evaluate as evaluation
    from qmoe_jax.models.load import load_switch

    if (tokens is None) == (task is None):
        raise ValueError(
            "give either TOKENS, a token file, or TASK, such as c4_v220_span_corruption "
            f"(TOKENS is {tokens!r}, TASK is {task!r})"
        )
    named = evaluation.name_checkpoints(checkpoint)
    if output is not None:
        paths = {name: _path_of(path) for name, path in named.items()}
        evaluation.check_output(output, paths, reference)
    examples: Any = tokens
    if task is not None:
        examples = (tokenize or task_tokens)(
            task=task,
            num_examples=num_examples,
            cache=output,
            overwrite=overwrite,
            progress=progress,
        )
    with _rounded(named, output, overwrite, progress) as checkpoints:
        return evaluation.evaluate(
            checkpoints,
            examples,
            reference=reference,
            num_examples=num_examples,
            batch_size=batch_size,
            activation_dtype=activation_dtype,
            expert_capacity_factor=expert_capacity_factor,
            output=output,
            overwrite=overwrite,
            tensorboard=tensorboard,
            batches_per_shard=batches_per_shard,
            load=load or load_switch,
            progress=progress,
        )


def _path_of(spelled: Any) -> str:
    """Return the path of a checkpoint that is to be rounded first, or not."""
    path = os.fspath(spelled)
    return path.split(":", 2)[-1] if path.startswith("rtn:") else path


@contextlib.contextmanager
def _rounded(
    checkpoints: Mapping[str, Any], output: str | None, overwrite: bool, progress: bool
) -> Iterator[dict[str, Any]]:
    """Return the checkpoints with each `rtn:<grid>:<path>` rounded into a folder.

    In `output` the rounded checkpoints stay, so that a stopped run finds them; without an output
    they are removed afterwards.
    """
    if not any(os.fspath(path).startswith("rtn:") for path in checkpoints.values()):
        yield dict(checkpoints)
        return
    with contextlib.ExitStack() as stack:
        if output is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="qmoe_jax_rtn_"))
        else:
            folder = os.path.join(output, "rounded")
        yield {
            name: _round(path, folder, overwrite, progress)
            if os.fspath(path).startswith("rtn:")
            else path
            for name, path in checkpoints.items()
        }


def _round(spelled: str, folder: str, overwrite: bool, progress: bool) -> str:
    from qmoe_jax.checkpoints.compressed import is_compressed_checkpoint
    from qmoe_jax.checkpoints.t5x import open_t5x_checkpoint
    from qmoe_jax.pipeline.compress import compress

    _, grid, path = (*spelled.split(":", 2), "", "")[:3]
    if grid not in ("ternary", "2bit") or not path:
        raise ValueError(
            f"{spelled!r}: write rtn:ternary:PATH or rtn:2bit:PATH, PATH a native checkpoint"
        )
    # Another checkpoint put at the same path is another name here.
    source = f"{path} {open_t5x_checkpoint(path, cache_bytes=0).fingerprint()}"
    rounded = os.path.join(folder, f"{grid}_{hashlib.sha256(source.encode()).hexdigest()[:12]}")
    if overwrite or not is_compressed_checkpoint(rounded):
        if progress:
            print(f"rounding {path} to nearest, {grid}", file=sys.stderr)
        compress(path, rounded, method="rtn", grid=grid, overwrite=overwrite, progress=progress)
    return rounded


def main(argv: Sequence[str]) -> int:
    """Run the command and print its figures as tables; return the exit status."""
    from qmoe_jax.calibration.sources import task_tokens
    from qmoe_jax.cli import flags
    from qmoe_jax.evaluation.tables import summary
    from qmoe_jax.models.load import load_switch

    document = flags.run(
        "evaluate",
        evaluate,
        [load_switch, task_tokens],
        description=_DESCRIPTION,
        default_gin_file="gin/runs/eval.gin",
        optional_macros=("VOCABULARY",),
        argv=[flag for flag in argv if flag != _ROUTERS],
    )
    print(summary(document, routers=_ROUTERS in argv))
    return 0
