"""Evaluation of one or several checkpoints on the same tokens, as the command runs it."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import qmoe_jax
from qmoe_jax.atomic_file import write_atomically
from qmoe_jax.calibration.tokens import TokenBatch, TokenFile, read_tokens
from qmoe_jax.checkpoints import names
from qmoe_jax.checkpoints.compressed import is_compressed_checkpoint, open_compressed_checkpoint
from qmoe_jax.checkpoints.read_config import read_config
from qmoe_jax.checkpoints.t5x import open_t5x_checkpoint
from qmoe_jax.config import SwitchConfig
from qmoe_jax.errors import CheckpointError, TokensError
from qmoe_jax.evaluation.divergence import DivergenceSums, compare_batch
from qmoe_jax.evaluation.evaluation_page import PAGE, html_page, is_evaluation_page
from qmoe_jax.evaluation.metrics import BatchSums, LossReport, evaluate_batch, worse_than_guessing
from qmoe_jax.evaluation.report import example_losses, model_report, reference_report
from qmoe_jax.evaluation.shards import Arrays, evaluate_shards
from qmoe_jax.evaluation.writers import check_tensorboard, write_tensorboard
from qmoe_jax.models.layers import ADAPTERS
from qmoe_jax.models.load import load_switch
from qmoe_jax.models.switch import SwitchTransformer
from qmoe_jax.outputs import (
    check_is_no_input,
    check_no_input,
    check_writable,
    is_json_object,
    output_file,
)
from qmoe_jax.paths import local_path
from qmoe_jax.progress import progress as show_progress
from qmoe_jax.run_folder import RunFolder

PathLike = str | os.PathLike[str]
# One; or several: paths, (name, path) pairs, or a mapping from name to path.
Checkpoints = PathLike | Sequence[PathLike | tuple[str, PathLike]] | Mapping[str, PathLike]
_METRICS = "metrics.json"
_CHECKPOINT_KINDS = "give a path, a list of paths or (name, path) pairs, or a dict of name to path"


def evaluate(
    checkpoint: Checkpoints,
    tokens: PathLike | TokenFile,
    *,
    reference: PathLike | None = None,
    num_examples: int | None = None,
    batch_size: int = 32,
    activation_dtype: str = "float32",
    expert_capacity_factor: float | None = None,
    output: PathLike | None = None,
    overwrite: bool = False,
    tensorboard: bool | None = None,
    batches_per_shard: int = 16,
    load: Callable[..., Any] = load_switch,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure loss per target token, accuracy, z-loss and router statistics of checkpoints.

    With an `output` folder, what is finished is kept there every `batches_per_shard` batches, and
    the same call goes on from it after a kill, with the same figures: to the bit where the device
    repeats a sum to the bit, as CPUs do (GPUs with XLA_FLAGS=--xla_gpu_deterministic_ops=true).

    Args:
      checkpoint: native T5X or compressed, local or gs://; or several: paths, (name, path) pairs,
        or a mapping from name to path. Tables and folders have the names.
      tokens: path of a token file, as `qmoe-jax prepare-tokens` writes it, or what `read_tokens`
        returns: int32 [examples, inputs_length] and [examples, targets_length], padded with 0.
      reference: checkpoint that every other is compared with, token by token, native or
        compressed; it is in memory beside each. None compares losses only.
      num_examples: use the first so many; all where None.
      batch_size: examples at a time. With a capacity factor the result depends on it, as in T5X.
      activation_dtype: "float32" or "bfloat16".
      expert_capacity_factor: None is dropless; a number is T5X's capacity factor.
      output: local folder for `metrics.json`, `report.html` and, in a folder for each checkpoint,
        its shards and TensorBoard events; none where None.
      overwrite: throw away what `output` holds of a run with other settings.
      tensorboard: write TensorBoard events; None does so where tensorboardX is installed.
      batches_per_shard: batches that are stored together.
      load: called with a path, `activation_dtype` and `expert_capacity_factor`; returns (module,
        variables): `load_switch`, or that with further arguments bound.
      progress: show progress bars.

    Returns:
      A JSON object: `tokens` (examples, their sha256, metadata) and `settings` describe the
      evaluation, `models` has for each checkpoint, in their order,

      - name, checkpoint: its name and path.
      - num_examples, num_target_tokens: what was evaluated.
      - loss: nats per target token; `loss_standard_error` over examples.
      - gap, gap_standard_error: nats per target token above the first checkpoint on the same
        tokens, and the error of the paired differences.
      - reference: against the reference, None without one: `kl`, KL(reference || model) in nats per
        target token, with `kl_standard_error`; `agreement`, share of target tokens at which both
        find the same token most probable; `gap` and `gap_standard_error` of the losses.
      - accuracy: share of target tokens that are the most probable one.
      - z_loss: mean over target tokens of the squared log-partition function.
      - warnings: sentences about figures that cannot be what was wanted.
      - bits_per_weight: stored bits per expert weight; None of a native checkpoint.
      - num_bytes: stored bytes of all parameters, before any compression of files.
      - router: see `router.router_report`.
      - t5x: what T5X's `loss_fn` would log, means over whole batches: `loss` (with z-loss and
        auxiliary loss), `cross_ent_loss`, `z_loss`, `accuracy`, `experts/...`.
      - seconds: of the model's runs, without loading; `target_tokens_per_second` without the
        batch that compiles, None where that is the only one.

      Standard errors are NaN where there is one example.

    Raises:
      CheckpointError: a checkpoint is unreadable, or of another vocabulary than `reference`; or
        `output` cannot be written, is in use, or holds a run with other settings (`overwrite`
        throws that away).
      CodecError: damaged codes.
      TokensError: unreadable tokens, fewer than `num_examples`, of a larger vocabulary than the
        model's, or a batch size below 1.
      ValueError: a number below 1, no checkpoint or two of a name, an `output` that is not local,
        or `tensorboard=True` without tensorboardX.
    """
    checkpoints = name_checkpoints(checkpoint)
    if batches_per_shard < 1:
        raise ValueError(f"batches_per_shard is {batches_per_shard}; give 1 or more")
    if output is not None:
        output = check_output(output, checkpoints, reference)
    if output is None:
        tensorboard = False
    elif tensorboard is None:
        tensorboard = check_tensorboard(None)
        if progress and not tensorboard:
            print("No TensorBoard events: pip install 'qmoe-jax[tensorboard]'.", file=sys.stderr)
    else:
        tensorboard = check_tensorboard(tensorboard)
    token_file = tokens if isinstance(tokens, TokenFile) else read_tokens(tokens)
    token_file = token_file.first(num_examples)
    batches = list(token_file.batches(batch_size))
    description = {
        "num_examples": len(token_file),
        "sha256": token_file.sha256(),
        **dataclasses.asdict(token_file.metadata),
    }
    settings = {
        "batch_size": batch_size,
        "activation_dtype": activation_dtype,
        "expert_capacity_factor": expert_capacity_factor,
    }
    # All are looked at before the first is evaluated.
    found = {name: _identify(path, token_file) for name, path in checkpoints.items()}
    identities = {name: identity for name, (identity, _) in found.items()}
    if reference is not None:
        settings["reference"], config = _identify(reference, token_file)
        for name, (_, own) in found.items():
            if own.num_embeddings != config.num_embeddings:
                raise CheckpointError(
                    f"{name} has {own.num_embeddings} embeddings, and reference {reference} has "
                    f"{config.num_embeddings}; predictions over one vocabulary can be compared"
                )
    models: list[dict[str, Any]] = []
    first: LossReport | None = None
    compared = None
    if reference is not None:
        compared = load(reference, activation_dtype, expert_capacity_factor)
    for name, path in checkpoints.items():
        module, variables = load(path, activation_dtype, expert_capacity_factor)
        with contextlib.ExitStack() as stack:
            folder = None
            if output is not None:
                determining = {
                    "checkpoint": identities[name],
                    "config": module.config.to_json(),
                    "implementation": module.implementation,
                    "tokens": description,
                    "settings": settings | {"batches_per_shard": batches_per_shard},
                    "versions": {"qmoe_jax": qmoe_jax.__version__, "jax": jax.__version__},
                    "device": jax.devices()[0].device_kind,
                }
                if ADAPTERS in variables:
                    determining["adapters"] = _digest(variables[ADAPTERS])
                folder = RunFolder(Path(output, name), determining, discard=overwrite)
                stack.enter_context(folder)
            compute = functools.partial(_compute, module, variables, compared)
            arrays = _run(compute, batches, folder, batches_per_shard, name, progress)
            del compute
        del variables  # before the next checkpoint is loaded
        losses = example_losses(arrays)
        first = losses if first is None else first
        model = {"name": name, "checkpoint": os.fspath(path)} | model_report(arrays, losses, first)
        model["reference"] = None if reference is None else reference_report(arrays)
        model["bits_per_weight"], model["num_bytes"] = _sizes(path)
        warning = worse_than_guessing(
            losses.loss, module.config.num_embeddings, *token_file.tokens.lengths
        )
        model["warnings"] = [] if warning is None else [warning]
        models.append(model)
        if output is not None and tensorboard:
            step = identities[name].get("step") or 0
            write_tensorboard(Path(output, name), model, step=step)
    document = {"tokens": description, "settings": settings, "models": models}
    if output is not None:
        content = json.dumps(document, indent=1) + "\n"
        write_atomically(Path(output, _METRICS), content.encode())
        write_atomically(Path(output, PAGE), html_page(document).encode())
    return document


def _compute(
    module: SwitchTransformer,
    variables: Mapping[str, Any],
    reference: tuple[SwitchTransformer, Mapping[str, Any]] | None,
    batch: TokenBatch,
) -> BatchSums | tuple[BatchSums, DivergenceSums]:
    if reference is None:
        return evaluate_batch(module, variables, batch.arrays())
    return compare_batch(module, variables, *reference, batch.arrays())


def check_output(
    output: PathLike, checkpoints: Mapping[str, PathLike], reference: PathLike | None = None
) -> Path:
    """Return the folder of an evaluation, before anything is written there.

    Args:
      output: a local folder, to be made or there.
      checkpoints: by name; each has a folder of its name in it.
      reference: what they are compared with.

    Raises:
      CheckpointError: it cannot be written, results would stand in a checkpoint or above it, or
        there is a `metrics.json` or a `report.html` of something else.
    """
    folder = local_path(output, "output")
    check_writable(folder, "output")
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"output is {folder}, a file; give a folder")
    inputs = [*checkpoints.values(), *([] if reference is None else [reference])]
    check_is_no_input(folder, "output", inputs)
    for name in checkpoints:
        check_no_input(folder / name, inputs)
    output_file(folder / _METRICS, "metrics", _is_metrics)
    output_file(folder / PAGE, "the report", is_evaluation_page)
    return folder


def _is_metrics(file: Path) -> bool:
    return is_json_object(file, ("tokens", "settings", "models"))


def name_checkpoints(checkpoint: Any) -> dict[str, PathLike]:
    """Return the checkpoints by name: the one given, else the last component of the path.

    Raises:
      ValueError: none is given, something else than a path is, two get the same name, or a name is
        no folder name.
    """
    if isinstance(checkpoint, str | os.PathLike):
        checkpoint = [checkpoint]
    items = checkpoint.items() if isinstance(checkpoint, Mapping) else checkpoint
    if not isinstance(checkpoint, Mapping | Sequence):
        raise ValueError(f"checkpoint is {checkpoint!r}; {_CHECKPOINT_KINDS}")
    named: dict[str, PathLike] = {}
    for item in items:
        name, path = None, item
        if isinstance(item, tuple) and len(item) == 2:
            name, path = item
        if not isinstance(path, str | os.PathLike) or not isinstance(name, str | None):
            raise ValueError(f"a checkpoint is {item!r}; {_CHECKPOINT_KINDS}")
        if name is None:
            name = os.fspath(path).rstrip("/").rpartition("/")[2]
        if name in named:
            raise ValueError(
                f"two checkpoints would be called {name!r}: {os.fspath(named[name])} and "
                f"{os.fspath(path)}; give (name, path) pairs"
            )
        if not re.fullmatch(r"\w[\w .+:=-]*", name):
            raise ValueError(
                f"a checkpoint is called {name!r}; use letters, digits, spaces and _ . + : = -, as "
                "the name is a folder's too"
            )
        named[name] = path
    if not named:
        raise ValueError("no checkpoint is given; pass a path, or several")
    return named


def _run(
    compute: Callable[..., Any],
    batches: Sequence[TokenBatch],
    folder: RunFolder | None,
    batches_per_shard: int,
    name: str,
    progress: bool,
) -> Arrays:
    total = sum(batch.num_target_tokens for batch in batches)
    shown = show_progress(
        title=name, unit="target tokens", total=total, scaled=True, shown=progress
    )
    with shown as bar:

        def on_batch(batch: TokenBatch, computed: bool) -> None:
            (bar.update if computed else bar.skip)(batch.num_target_tokens)

        return evaluate_shards(
            batches,
            compute,
            folder,
            batches_per_shard,
            on_batch,
        )


def _identify(path: PathLike, tokens: TokenFile) -> tuple[dict[str, Any], SwitchConfig]:
    """Return which checkpoint it is, and its geometry; of a compressed one its manifest tells all.

    Raises:
      CheckpointError: it cannot be opened.
      TokensError: the tokens are of a larger vocabulary than the model's.
    """
    identity: dict[str, Any] = {"path": os.fspath(path)}
    if is_compressed_checkpoint(path):
        compressed = open_compressed_checkpoint(path)
        config = compressed.config
        identity["fingerprint"] = compressed.fingerprint()
    else:
        native = open_t5x_checkpoint(path)
        config = read_config(native)
        identity["step"] = native.step
        identity["fingerprint"] = native.fingerprint()
    size = tokens.metadata.vocabulary_size
    if size > config.num_embeddings:
        raise TokensError(
            f"the tokens were made with a vocabulary of {size} ids, but the model has "
            f"{config.num_embeddings} embeddings; tokenise with the model's own vocabulary"
        )
    return identity, config


def _digest(adapters: Mapping[str, Any]) -> str:
    """Tell adapters of a model from others."""
    digest = hashlib.sha256()
    for name, array in sorted(names.flatten(adapters).items()):
        digest.update(name.encode())
        digest.update(np.asarray(array).tobytes())
    return digest.hexdigest()


def _sizes(path: PathLike) -> tuple[float | None, int]:
    """Return stored bits per expert weight (None of a native checkpoint) and bytes in all."""
    if not is_compressed_checkpoint(path):
        native = open_t5x_checkpoint(path, cache_bytes=0)
        sizes = (native.dtypes[n].itemsize * math.prod(s) for n, s in native.shapes.items())
        return None, sum(sizes)
    checkpoint = open_compressed_checkpoint(path)
    weights = sum(spec.num_weights for spec in checkpoint.specs.values())
    stored = checkpoint.num_bytes()
    return 8 * stored["coded"] / weights, sum(stored.values())
