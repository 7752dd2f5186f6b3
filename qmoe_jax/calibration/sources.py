"""Tokens of a named task: `c4_v220_span_corruption` and its like, as T5X names them.

| task | documents | needs |
| --- | --- | --- |
| `c4_v<version>_span_corruption` | TFDS `c4/en`; `v220` is 2.2.0, `v310` is 3.1.0 | `data_dir` |
| `c4_span_corruption` | the newest version that is prepared | `data_dir` |
| `jsonl_span_corruption` | JSON lines, as C4's released files | `files` |
| `text_span_corruption` | UTF-8 text files, each one document | `files` |

With `_whole_documents` instead of `_span_corruption` it is the paper's protocol: documents are not
concatenated and cut to full length, but those that fit are taken whole, one an example. Any other
name is looked up among seqio's tasks and mixtures after `task_module` was imported. A mixture
begins its tasks again until it has as many examples as were asked for; where no number is, it ends
with the first of its tasks that does.
"""

import hashlib
import importlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from qmoe_jax.calibration import text_packages
from qmoe_jax.calibration.documents import local_stamps
from qmoe_jax.calibration.prepared_c4 import tfds_folder
from qmoe_jax.calibration.tokens import TokenFile, read_tokens, write_tokens
from qmoe_jax.errors import TokensError

_PROTOCOLS = {"span_corruption": "t5x", "whole_documents": "paper"}
_NAME = re.compile(r"(c4(?:_v(\d)(\d)(\d))?|jsonl|text)_(span_corruption|whole_documents)")


def task_tokens(
    task: str,
    *,
    split: str = "validation",
    num_examples: int | None = None,
    vocabulary: str | None = None,
    data_dir: str | None = None,
    files: str | Sequence[str] | None = None,
    task_module: str | None = None,
    inputs_length: int = 512,
    targets_length: int | None = None,
    seed: int = 0,
    cache: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> TokenFile:
    """Tokenise the first examples of a task, unshuffled; equal arguments give equal tokens.

    This is where TensorFlow is imported; a token file that `cache` finds is read without it.

    Args:
      task: a name of the table above, or of a seqio task or mixture.
      split: split of the dataset; for `files` only a name.
      num_examples: how many; all of the split where None.
      vocabulary: sentencepiece model of the checkpoint, local or gs://.
      data_dir: TFDS folder that has `c4/en/<version>`; None is TFDS's default.
      files: path, glob or folder, or several.
      task_module: module that registers `task` with seqio when it is imported.
      inputs_length: encoder tokens of an example; the public models have 512.
      targets_length: decoder tokens; None is what the corruption of `inputs_length` gives (114).
      seed: seed of the corruption.
      cache: local folder that keeps the token file, under a name that follows from all of the
        above and from names, sizes and times of the local files behind it; found there, it is read.
      overwrite: tokenise again what is found there.
      progress: show a progress bar.

    Raises:
      TokensError: an unknown task, an argument that it needs is missing, or unreadable documents.
    """
    request = {
        "task": task,
        "split": split,
        "num_examples": num_examples,
        "vocabulary": vocabulary,
        "data_dir": data_dir,
        "files": files,
        "inputs_length": inputs_length,
        "targets_length": targets_length,
        "seed": seed,
    }
    source = ", ".join(f"{key}={value!r}" for key, value in request.items() if value is not None)
    kept = None
    if cache is not None:
        stamps = local_stamps(_behind(request, task_module))
        key = hashlib.sha256(json.dumps([request, stamps], default=list).encode()).hexdigest()
        kept = os.path.join(cache, f"tokens_{key[:16]}.npz")
        if os.path.exists(kept) and not overwrite:
            return read_tokens(kept)
    named = _find_task(task, split, vocabulary, data_dir, files, task_module)
    from qmoe_jax.calibration import tasks

    made = tasks.tokenize_task(
        named,
        split=split,
        num_examples=num_examples,
        inputs_length=inputs_length,
        targets_length=targets_length,
        seed=seed,
        source=source,
        progress=progress,
    )
    if kept is not None:
        os.makedirs(os.path.dirname(kept), exist_ok=True)
        write_tokens(kept, made.tokens, made.metadata)
    return made


def _behind(request: Mapping[str, Any], task_module: str | None) -> list[str]:
    """Name the files that the tokens of a request are made from, as far as they can be told."""
    files = request["files"]
    behind: list[str] = [files] if isinstance(files, str) else list(files or ())
    if request["vocabulary"] is not None:
        behind.append(request["vocabulary"])
    if (match := _NAME.fullmatch(request["task"])) and match[1].startswith("c4"):
        # Without a version the choice is among all that are there.
        version = ".".join(match.group(2, 3, 4)) if match[2] else ""
        behind.append(os.path.join(tfds_folder(request["data_dir"]), "c4", "en", version))
    spec = None if task_module is None else importlib.util.find_spec(task_module)
    if spec is not None and spec.origin is not None:
        behind.append(spec.origin)
    return behind


def _find_task(
    name: str,
    split: str,
    vocabulary: str | None,
    data_dir: str | None,
    files: str | Sequence[str] | None,
    task_module: str | None,
) -> Any:
    """Find the task or mixture of a name; what needs no TensorFlow is refused before its import."""
    match = None if task_module else _NAME.fullmatch(name)
    if match is None:
        return _registered_task(name, task_module)
    kind, protocol = match[1], _PROTOCOLS[match[5]]
    if vocabulary is None:
        raise TokensError(
            f"Task {name} needs vocabulary (VOCABULARY): the checkpoint's sentencepiece.model."
        )
    if kind in ("jsonl", "text"):
        if not files:
            raise TokensError(f"Task {name} needs files (FILES): path, glob or folder, or a list.")
        if data_dir is not None:
            raise TokensError(f"Task {name} reads files; data_dir {data_dir!r} is for c4_v tasks.")
    elif files:
        raise TokensError(f"Task {name} reads TFDS; for files use jsonl_{match[5]}.")
    elif data_dir is not None and not _is_folder(data_dir):
        raise TokensError(
            f"There is no folder data_dir {data_dir!r}; give the TFDS folder that has c4/en."
        )
    _need_seqio(name)
    from qmoe_jax.calibration import tasks

    if kind == "jsonl":
        return tasks.c4_jsonl_task(vocabulary, {split: files or ()}, protocol=protocol)
    if kind == "text":
        return tasks.text_files_task(vocabulary, {split: files or ()}, protocol=protocol)
    version = ".".join(match.group(2, 3, 4)) if match[2] else None
    return tasks.c4_task(vocabulary, data_dir=data_dir, version=version, protocol=protocol)


def _is_folder(data_dir: str) -> bool:
    """Whether a TFDS folder is there, or on storage, which is not asked here."""
    folder = tfds_folder(data_dir)
    return "://" in folder or os.path.isdir(folder)


def _registered_task(name: str, task_module: str | None) -> Any:
    known = (
        "known are c4_ (the newest version that is prepared), c4_v220_, c4_v310_ (any TFDS "
        "version), jsonl_ and text_, each followed by "
        "span_corruption or whole_documents, and the seqio tasks and mixtures of TASK_MODULE"
    )
    if task_module is None and "seqio" not in sys.modules:
        raise TokensError(f"There is no task {name!r}; {known}.")
    _need_seqio(name)
    seqio = text_packages.seqio()
    if task_module is not None:
        try:
            importlib.import_module(task_module)
        except ImportError as error:
            raise TokensError(f"task_module {task_module!r} cannot be imported: {error}") from error
    if name not in {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}:
        raise TokensError(f"There is no task {name!r}; {known}.")
    return seqio.get_mixture_or_task(name)


def _need_seqio(name: str) -> None:
    try:
        text_packages.seqio()
    except ImportError as error:
        raise TokensError(
            f"Task {name} needs seqio ({error}): pip install 'qmoe-jax[data]'. Or make a token "
            "file elsewhere by `qmoe-jax prepare-tokens` and evaluate that."
        ) from error
