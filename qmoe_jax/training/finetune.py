"""Fine-tune a checkpoint over its codes, or win back what compression took from it."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

import qmoe_jax
from qmoe_jax.atomic_file import write_json
from qmoe_jax.calibration.tokens import TokenFile, read_tokens
from qmoe_jax.checkpoints import names
from qmoe_jax.checkpoints.adapters import read_adapters, write_adapters
from qmoe_jax.checkpoints.compressed import is_compressed_checkpoint, open_compressed_checkpoint
from qmoe_jax.checkpoints.read_config import read_config
from qmoe_jax.checkpoints.t5x import open_t5x_checkpoint
from qmoe_jax.config import SwitchConfig
from qmoe_jax.errors import CheckpointError, TokensError
from qmoe_jax.evaluation.task_metrics import TaskMetrics
from qmoe_jax.evaluation.writers import check_tensorboard, write_tensorboard_steps
from qmoe_jax.models.adapters import merge_adapters
from qmoe_jax.models.layers import ADAPTERS
from qmoe_jax.models.load import load_switch
from qmoe_jax.models.switch import SwitchTransformer
from qmoe_jax.ops.local_devices import local_devices
from qmoe_jax.outputs import check_is_no_input, check_no_input, check_writable
from qmoe_jax.paths import local_path
from qmoe_jax.run_folder import RunFolder, check_run_folder
from qmoe_jax.training.loop import Loop
from qmoe_jax.training.optimizer import make_optimizer
from qmoe_jax.training.settings import FinetuneSettings
from qmoe_jax.training.state import FILE, TrainState
from qmoe_jax.training.step import make_step
from qmoe_jax.training.trainable import (
    Parts,
    Trained,
    check_trainable,
    code_arrays,
    gradient_masks,
    join_variables,
    split_variables,
)
from qmoe_jax.training.validation import Validation
from qmoe_jax.training.written import stored_parameters, write_trained

PathLike = str | os.PathLike[str]
ADAPTER_FILE = "adapters.npz"
EXPERT_ADAPTER_FILE = "expert_adapters.npz"
REPORT = "report.json"


def finetune(
    checkpoint: PathLike,
    output: PathLike,
    tokens: PathLike | TokenFile,
    settings: FinetuneSettings | None = None,
    *,
    validation_tokens: PathLike | TokenFile | None = None,
    reference: PathLike | None = None,
    activation_dtype: str = "float32",
    expert_capacity_factor: float | None = None,
    num_devices: int = 1,
    adapters: PathLike | None = None,
    overwrite: bool = False,
    tensorboard: bool | None = None,
    load: Callable[..., Any] = load_switch,
    task_metrics: TaskMetrics | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train parts of a checkpoint, native or compressed; the codes of experts stay as they are.

    The same call goes on after a kill and ends with the same bytes, where the device repeats a sum
    to the bit, as CPUs do (GPUs with XLA_FLAGS=--xla_gpu_deterministic_ops=true).

    Args:
      checkpoint: what is trained: native T5X or compressed, local or gs://.
      output: local folder. At the end it holds `checkpoint_<steps>`, of the source's kind, that
        every command takes (with adapters of kernels that are no codes merged into them),
        `adapters.npz` where there are any, `expert_adapters.npz` for `checkpoint_<steps>` where
        some are of codes, `metrics.jsonl`, `report.json` and TensorBoard events; until then also
        the state that a stopped run goes on from.
      tokens: token file to train on, or what `read_tokens` returns.
      settings: what is trained and how; the defaults where None.
      validation_tokens: token file to evaluate on while training; None evaluates nothing.
      reference: checkpoint whose predictions are learned instead of the tokens (KL), as the
        uncompressed model's after compression; in memory beside the other.
      activation_dtype: "float32" or "bfloat16"; what is trained is float32 in both.
      expert_capacity_factor: None trains and evaluates dropless; a number is T5X's evaluation
        factor, and training has the training factor.
      num_devices: devices of this process that share each step: the rows of a batch, and the
        experts of a layer, are split over them, and all else is on every one. The result is that of
        one device but for rounding; a run goes on with as many devices as it began with.
      adapters: an adapter file to begin with.
      overwrite: throw away what `output` holds of a run.
      tensorboard: write TensorBoard events; None does so where tensorboardX is installed.
      load: called with a path, `activation_dtype` and `expert_capacity_factor`; returns (module,
        variables): `load_switch`, or that with further arguments bound.
      task_metrics: of a seqio task, to evaluate with beside `validation_tokens`.
      progress: show progress bars.

    Returns:
      A JSON object: `settings`; `num_trained`, parameters that were trained, and `trained_bytes`;
      `checkpoint`, where the result is; `adapters`, those that were trained, for the source, and
      `expert_adapters`, those of them that codes cannot take in, for the result, None without; and
      with validation tokens
      `validation`: figures `before`, `after` (as trained) and `written` (as stored), each with
      `loss` and `accuracy` per target token, `exact_match`, the share of examples that greedy
      generation answers as the target has it (see `LossReport.exact_match`), with a reference
      `kl`, and with `task_metrics` theirs, as `metrics`.

    Raises:
      CheckpointError: a checkpoint is unreadable, or `output` cannot be written, is in use, or
        holds a run with other settings.
      TokensError: unreadable tokens, or of a larger vocabulary than the model's.
      ValueError: settings that do not fit the model or each other, or a loss that is no number any
        more.
    """
    settings = settings or FinetuneSettings()
    folder = _check_output(output, checkpoint, reference)
    _check_devices(settings, num_devices)
    train = tokens if isinstance(tokens, TokenFile) else read_tokens(tokens)
    held_out = validation_tokens
    if held_out is not None and not isinstance(held_out, TokenFile):
        held_out = read_tokens(held_out)
    config = _check_vocabulary(checkpoint, [train, held_out])
    if reference is not None:
        other = _check_vocabulary(reference, [])
        if other.num_embeddings != config.num_embeddings:
            raise CheckpointError(
                f"reference {reference} has {other.num_embeddings} embeddings, and {checkpoint} "
                f"has {config.num_embeddings}; predictions over one vocabulary can be compared"
            )
    begin = None if adapters is None else read_adapters(adapters)
    check_trainable(config, _coded_kernels(checkpoint), settings)
    write_events = check_tensorboard(tensorboard)
    if task_metrics is not None and held_out is None:
        raise ValueError("task_metrics without validation_tokens; give both, of the same examples")
    determining = {
        "checkpoint": _fingerprint(checkpoint),
        "reference": None if reference is None else _fingerprint(reference),
        "adapters": None if begin is None else begin.sha256(),
        "tokens": train.sha256(),
        "validation_tokens": None if held_out is None else held_out.sha256(),
        "task_metrics": None if task_metrics is None else task_metrics.to_json(),
        "settings": settings.to_json(),
        "activation_dtype": activation_dtype,
        "expert_capacity_factor": expert_capacity_factor,
        "versions": {"qmoe_jax": qmoe_jax.__version__, "jax": jax.__version__},
        "device": jax.devices()[0].device_kind,
        "num_devices": num_devices,
    }
    arguments: dict[str, Any] = {} if num_devices == 1 else {"num_devices": num_devices}
    begin_with = {} if adapters is None else {"adapters": adapters}
    with RunFolder(folder, determining, discard=overwrite, results=FILE) as run:
        if overwrite:
            (folder / REPORT).unlink(missing_ok=True)
        if (folder / REPORT).exists():
            return json.loads((folder / REPORT).read_bytes())
        chosen = (activation_dtype, expert_capacity_factor)
        module, variables = load(checkpoint, *chosen, **arguments, **begin_with)
        compared = None if reference is None else load(reference, *chosen, **arguments)
        parts = split_variables(module, variables, settings)
        del variables
        validation = None
        if held_out is not None:
            validation = Validation(held_out, settings.batch_size, compared, task_metrics)
        state = _train(module, parts, compared, train, validation, settings, run.path, progress)
        record = {"settings": settings.to_json(), "reference": compared is not None}
        report = _finish(module, parts, state, validation, settings, record, checkpoint, run.path)
        if write_events:
            write_tensorboard_steps(run.path, state.history)
        write_json(run.path / REPORT, report)
        with contextlib.suppress(OSError):
            (run.path / FILE).unlink()
    return report


def recover(
    checkpoint: PathLike,
    reference: PathLike,
    output: PathLike,
    tokens: PathLike | TokenFile,
    settings: FinetuneSettings | None = None,
    **keywords: Any,
) -> dict[str, Any]:
    """Win back what compression took: train to predict what the uncompressed model does.

    Args:
      checkpoint: the compressed checkpoint.
      reference: the native checkpoint that it was made from.
      output: see `finetune`, as for the following.
      tokens: the text on which predictions are compared; its targets do not matter.
      settings: where None, norms and gains are trained, without dropout.
      **keywords: as `finetune` takes them.

    Returns:
      What `finetune` does.

    Raises:
      ValueError: as `finetune` does.
    """
    settings = settings or RECOVER
    return finetune(checkpoint, output, tokens, settings, reference=reference, **keywords)


RECOVER = FinetuneSettings(
    trainable=("norms", "gains"),
    batch_size=32,
    learning_rate=3e-4,
    dropout_rate=0.0,
    expert_dropout_rate=0.0,
    z_loss=0.0,
    auxiliary_loss=0.0,
)
"""Settings of `recover` where none are given."""


def _train(
    module: SwitchTransformer,
    parts: Parts,
    compared: tuple[SwitchTransformer, Mapping[str, Any]] | None,
    train: TokenFile,
    validation: Validation | None,
    settings: FinetuneSettings,
    folder: Path,
    progress: bool,
) -> TrainState:
    """Run the loop to its end."""
    coded = code_arrays(module, parts)
    optimizer = make_optimizer(settings)

    def evaluate(trained: Trained) -> Mapping[str, Any]:
        assert validation is not None
        return validation.figures(module, join_variables(trained, parts.frozen, coded))

    loop = Loop(
        step=make_step(
            dataclasses.replace(module, dropout=settings.dropout),
            optimizer,
            settings.factors,
            coded=coded,
            masks=gradient_masks(module, parts),
            seed=settings.seed,
            reference=None if compared is None else compared[0],
        ),
        optimizer=optimizer,
        parts=parts,
        reference_variables=None if compared is None else compared[1],
        tokens=train,
        settings=settings,
        evaluate=None if validation is None else evaluate,
        folder=folder,
        mesh=module.mesh,
        title="finetune" if compared is None else "recover",
        progress=progress,
    )
    return loop.run()


def _finish(
    module: SwitchTransformer,
    parts: Parts,
    state: TrainState,
    validation: Validation | None,
    settings: FinetuneSettings,
    record: Mapping[str, Any],
    checkpoint: PathLike,
    folder: Path,
) -> dict[str, Any]:
    """Write the checkpoint and the adapters, and measure what was written."""
    values = {name: np.asarray(value) for name, value in state.trained.items()}
    everything = {**parts.frozen, **state.trained}
    prefix = f"{ADAPTERS}/"
    corrections = {
        name.removeprefix(prefix): np.asarray(array)
        for name, array in everything.items()
        if name.startswith(prefix)
    }
    flat = names.flatten(merge_adapters(names.unflatten(everything)))
    changed = {
        name.removeprefix("params/"): np.asarray(array, np.float32)
        for name, array in flat.items()
        if name.startswith("params/") and (name in values or _is_corrected(name, corrections))
    }
    if corrections:
        write_adapters(folder / ADAPTER_FILE, corrections, record)
    # Codes are no sums: corrections of theirs go with the written checkpoint, the others are in it.
    left = {n.removeprefix(prefix): np.asarray(a) for n, a in flat.items() if n.startswith(prefix)}
    if left:
        write_adapters(folder / EXPERT_ADAPTER_FILE, left, record)
    path = write_trained(checkpoint, folder, settings.train_steps, changed, record)
    report: dict[str, Any] = {
        "settings": settings.to_json(),
        "num_trained": int(sum(value.size for value in values.values())),
        "trained_bytes": int(sum(value.nbytes for value in values.values())),
        "checkpoint": os.fspath(path),
        "adapters": os.fspath(folder / ADAPTER_FILE) if corrections else None,
        "expert_adapters": os.fspath(folder / EXPERT_ADAPTER_FILE) if left else None,
    }
    if validation is not None:
        found = [line["validation"] for line in state.history if "validation" in line]
        stored = stored_parameters(checkpoint, changed)
        held = {f"params/{name}": value for name, value in stored.items()}
        coded = code_arrays(module, parts)
        written = validation.figures(module, join_variables(held, flat, coded))
        report["validation"] = {"before": found[0], "after": found[-1], "written": written}
    return report


def _is_corrected(name: str, corrections: Mapping[str, Any]) -> bool:
    return f"{name.removeprefix('params/').removesuffix('/kernel')}/a" in corrections


def _check_output(output: PathLike, checkpoint: PathLike, reference: PathLike | None) -> Path:
    folder = local_path(output, "output")
    check_writable(folder, "output")
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"output is {folder}, a file; give a folder")
    inputs = [checkpoint, *([] if reference is None else [reference])]
    check_is_no_input(folder, "output", inputs)
    check_no_input(folder, inputs)
    check_run_folder(folder)
    return folder


def _check_devices(settings: FinetuneSettings, num_devices: int) -> None:
    local_devices(num_devices)
    at_once = settings.batch_size // settings.microbatches
    if at_once % num_devices:
        among = "" if settings.microbatches == 1 else f" in {settings.microbatches} microbatches"
        raise ValueError(
            f"batch_size is {settings.batch_size}{among}: {at_once} examples at a time, which "
            f"{num_devices} devices do not divide; give a batch_size that is a multiple of "
            f"{settings.microbatches * num_devices}"
        )


def _check_vocabulary(checkpoint: PathLike, files: list[TokenFile | None]) -> SwitchConfig:
    config = read_config(checkpoint)
    for tokens in files:
        if tokens is not None and tokens.metadata.vocabulary_size > config.num_embeddings:
            raise TokensError(
                f"the tokens were made with a vocabulary of {tokens.metadata.vocabulary_size} ids, "
                f"but the model has {config.num_embeddings} embeddings; tokenise with the model's "
                "own vocabulary"
            )
    return config


def _coded_kernels(checkpoint: PathLike) -> list[str]:
    if is_compressed_checkpoint(checkpoint):
        return list(open_compressed_checkpoint(checkpoint).specs)
    return []


def _fingerprint(checkpoint: PathLike) -> str:
    if is_compressed_checkpoint(checkpoint):
        return open_compressed_checkpoint(checkpoint).fingerprint()
    return open_t5x_checkpoint(checkpoint, cache_bytes=0).fingerprint()
