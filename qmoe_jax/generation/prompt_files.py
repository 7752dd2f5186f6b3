"""Prompts from files, and answers to a file that a stopped run goes on with."""

import dataclasses
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from qmoe_jax.atomic_file import open_atomically
from qmoe_jax.checkpoints.compressed import is_compressed_checkpoint, open_compressed_checkpoint
from qmoe_jax.checkpoints.t5x import open_t5x_checkpoint
from qmoe_jax.errors import TokensError
from qmoe_jax.generation.settings import GenerationSettings
from qmoe_jax.models.switch import SwitchTransformer
from qmoe_jax.outputs import output_file
from qmoe_jax.paths import local_path

# Fields of a JSON line that may hold its prompt, the first one found.
_FIELDS = ("inputs", "text")
# How a line of `AnswerFile`'s partial file begins.
_BATCH = '{"batch": '


def read_prompts(path: str | os.PathLike[str]) -> list[str]:
    """Prompts of a file, one a line; "-" is stdin. Empty lines are left out.

    A line that is a JSON object with a text `inputs` or `text` stands for that text; in a file
    named .jsonl or .json every line must be one.

    Raises:
      TokensError: the file cannot be read, holds no prompt, or a line that is no prompt.
    """
    name = os.fspath(path)
    try:
        if name == "-":
            content = _read_stdin()
        else:
            content = local_path(name, "the file of prompts", TokensError).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise TokensError(
            f"cannot read prompts from {name!r} ({reason}); give a UTF-8 text file with a prompt a "
            "line, or '-' for stdin"
        ) from error
    only_json = name.endswith((".jsonl", ".json"))
    prompts = []
    # Not splitlines: a prompt may hold a form feed or U+2028.
    for number, line in enumerate(content.split("\n"), 1):
        line = line.strip()
        if not line:
            continue
        prompt = _json_prompt(line)
        if prompt is None and only_json:
            raise TokensError(
                f"line {number} of {name!r} is no JSON object with a text 'inputs' or 'text': "
                f"{line[:60]!r}"
            )
        prompts.append(line if prompt is None else prompt)
    if not prompts:
        raise TokensError(f"{name!r} holds no prompt; write one a line")
    return prompts


def stdin_prompts() -> Iterator[str]:
    """Yield the prompts of stdin as they come, as `read_prompts` reads lines. Ends with stdin.

    On a terminal each is asked for with a `> ` on stderr.

    Raises:
      TokensError: a line that is no UTF-8.
    """
    binary = getattr(sys.stdin, "buffer", None)  # a text stream in its place may have none
    asks = sys.stdin.isatty()
    for number in itertools.count(1):
        encoding = "utf-8-sig" if number == 1 else "utf-8"
        if asks:
            print("> ", end="", file=sys.stderr, flush=True)
        raw = sys.stdin.readline() if binary is None else binary.readline()
        if not raw:
            if asks:
                print(file=sys.stderr)
            return
        try:
            line = raw if isinstance(raw, str) else raw.decode(encoding)
        except UnicodeDecodeError as error:
            raise TokensError(f"line {number} of stdin is no UTF-8 ({error})") from error
        if line := line.strip():
            prompt = _json_prompt(line)
            yield line if prompt is None else prompt


def _read_stdin() -> str:
    """Read all of stdin as UTF-8, whatever the locale is."""
    binary = getattr(sys.stdin, "buffer", None)  # a text stream in its place may have none
    return sys.stdin.read() if binary is None else binary.read().decode("utf-8-sig")


def _json_prompt(line: str) -> str | None:
    if not line.startswith("{"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    texts = (record.get(field) for field in _FIELDS)
    return next((text for text in texts if isinstance(text, str)), None)


class AnswerFile:
    """Answers as JSON lines, in the order of the prompts, written as a whole at the end.

    Until then finished batches are kept in `<path>.partial`. A run with the same `run` goes on from
    there; any other begins anew. Nothing is replaced but answers, and batches of answers.

    Attributes:
      finished: the lines of finished batches, by batch number and then by prompt.
    """

    def __init__(self, path: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str]] = ()):
        """Claim a path; nothing is written yet.

        Args:
          path: a local file; older answers are replaced at the end.
          inputs: what the run reads; never replaced.

        Raises:
          TokensError: the file cannot be written, or holds something else than answers.
        """
        what = "a file of answers"
        self._path = output_file(path, what, _all(_is_answer), inputs=inputs, error=TokensError)
        self._partial = output_file(
            self._path.with_name(self._path.name + ".partial"),
            "unfinished answers",
            _all(_is_kept),
            inputs=inputs,
            error=TokensError,
        )
        self.finished: dict[int, dict[int, Any]] = {}
        if not self._path.parent.is_dir():
            raise TokensError(
                f"cannot write answers to {os.fspath(path)!r}; give a file in a local folder that "
                "exists"
            )

    def begin(self, run: Any) -> None:
        """Begin a run, or go on with it.

        Args:
          run: whatever decides the answers, as JSON.

        Raises:
          TokensError: the file cannot be written.
        """
        text = json.dumps(run, sort_keys=True)
        header = {"run": hashlib.sha256(text.encode()).hexdigest()}
        self.finished = _read_partial(self._partial, header)
        try:
            # Written anew: a killed run may have left half a line.
            self._write(self._partial, [header, *map(_batch_line, self.finished.items())])
        except OSError as error:
            raise TokensError(
                f"cannot write answers to {os.fspath(self._path)!r}: {error.strerror}"
            ) from error

    def add(self, number: int, lines: dict[int, Any]) -> None:
        """Keep the lines of a finished batch, by prompt."""
        self.finished[number] = lines
        with open(self._partial, "a", encoding="utf-8") as file:
            file.write(json.dumps(_batch_line((number, lines))) + "\n")

    def finish(self) -> None:
        """Write the answers of all batches, by temporary name and rename."""
        by_prompt = {i: line for batch in self.finished.values() for i, line in batch.items()}
        self._write(self._path, [by_prompt[i] for i in sorted(by_prompt)])
        self._partial.unlink(missing_ok=True)

    def close(self) -> None:
        """Remove the partial file of a run that finished no batch; any other stays."""
        if not self.finished:
            self._partial.unlink(missing_ok=True)

    @staticmethod
    def _write(path: Path, lines: Sequence[Any]) -> None:
        with open_atomically(path) as file:
            for line in lines:
                file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())


def _is_answer(line: str) -> bool:
    record = json.loads(line)
    return isinstance(record, dict) and {"inputs", "decodes"} <= record.keys()


def _is_kept(line: str) -> bool:
    if not line.endswith("\n"):
        return line[: len(_BATCH)] == _BATCH[: len(line)]  # the run was killed while it wrote
    record = json.loads(line)
    return isinstance(record, dict) and record.keys() in ({"run"}, {"batch", "lines"})


def _all(is_own: Callable[[str], bool]) -> Callable[[Path], bool]:
    """Return whether all lines of a file are ours, as a question about files."""

    def asked(file: Path) -> bool:
        try:
            with open(file, encoding="utf-8") as lines:
                return all(map(is_own, lines))
        except (OSError, ValueError):
            return False

    return asked


def _batch_line(item: tuple[int, dict[int, Any]]) -> dict[str, Any]:
    number, lines = item
    return {"batch": number, "lines": list(lines.items())}


def _read_partial(path: Path, header: dict[str, str]) -> dict[int, dict[int, Any]]:
    """Finished batches of an earlier run with this header; none where there is no such run."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        if json.loads(lines[0]) != header:
            return {}
    except (OSError, ValueError):
        return {}
    finished = {}
    for line in lines[1:]:
        try:
            batch = json.loads(line)
            finished[int(batch["batch"])] = {int(i): record for i, record in batch["lines"]}
        except (ValueError, KeyError, TypeError):
            break  # half a line: the run was killed while it wrote
    return finished


def run_identity(
    checkpoint: str | os.PathLike[str],
    module: SwitchTransformer,
    settings: GenerationSettings,
    ids: Sequence[Sequence[int]],
) -> dict[str, Any]:
    """Return what decides a run's answers, as JSON: the checkpoint's content, the rest as it is.

    Raises:
      CheckpointError: no readable checkpoint.
    """
    if is_compressed_checkpoint(checkpoint):
        content = open_compressed_checkpoint(checkpoint).fingerprint()
    else:
        content = open_t5x_checkpoint(checkpoint, cache_bytes=0).fingerprint()
    return {
        "checkpoint": [os.fspath(checkpoint), content],
        "config": module.config.to_json(),
        "dtype": jnp.dtype(module.dtype).name,
        "coded": len(module.coded),  # 0 where the codes were expanded
        "implementation": module.implementation,
        "settings": dataclasses.asdict(settings),
        "ids": ids,
    }
