"""`qmoe-jax infer`: fill the blanks of texts with a checkpoint, native or compressed."""

import dataclasses
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from qmoe_jax.checkpoints.read_config import read_config
from qmoe_jax.cli import flags
from qmoe_jax.formatting import format_memory
from qmoe_jax.generation import text
from qmoe_jax.generation.compile_time import CompileTime
from qmoe_jax.generation.prompt_files import AnswerFile, read_prompts, run_identity
from qmoe_jax.generation.prompts import (
    Answer,
    check_prompt_lengths,
    generate_batches,
    stream_prompt,
)
from qmoe_jax.generation.settings import GenerationSettings
from qmoe_jax.generation.text import Filled, Vocabulary, fill_blanks, filled
from qmoe_jax.models.load import dequantized, load_switch
from qmoe_jax.pipeline.run_log import peak_host_bytes
from qmoe_jax.progress import progress

_DESCRIPTION = """\
Fill the blanks of texts with a Switch Transformer, native or compressed.

A blank is written <extra_id_0>, the next <extra_id_1>, and so on. Prompts are arguments, or the
list PROMPTS, or the lines of PROMPTS_FILE ('-' is stdin; JSON lines with a text 'inputs' or 'text'
are welcome). Each is printed with what was generated (->) and with its blanks filled (=>).

examples:
  qmoe-jax infer --gin.CHECKPOINT="'compressed'" \\
    --gin.VOCABULARY="'sentencepiece.model'" 'Return the <extra_id_0> of the array.'
  ... --gin.PROMPTS_FILE="'prompts.txt'" --gin.OUTPUT="'answers.jsonl'" --gin.METHOD="'beam'"
  ... --gin.METHOD="'sample'" --gin.TOP_P=0.9 --gin.SEED=1 --gin.STREAM=True 'A <extra_id_0>.'

Required: CHECKPOINT, VOCABULARY, and prompts.
How to generate: METHOD 'greedy', 'beam' (BEAM_SIZE, ALPHA) or 'sample' (TEMPERATURE, TOP_K, TOP_P,
  SEED), NUM_DECODES, MAX_DECODE_LENGTH, MAX_INPUT_LENGTH, BATCH_SIZE.
An answer ends when its blanks are filled; with GenerationSettings.stop_when_filled=False, with
  'beam' and where several are ranked, at the end of the sequence.
OUTPUT: a file of JSON lines, one a prompt; a stopped run goes on where it was.
STREAM=True prints tokens as they come, one prompt at a time (not 'beam').
DEQUANTIZE=True expands the codes of a compressed checkpoint once, where memory allows it."""

IF_INTERRUPTED = "with OUTPUT, the same command goes on where it was"

# Flags whose value may be the next argument, which then is no prompt.
_FLAGS_WITH_VALUE = ("--gin_file", "--gin_bindings", "--gin_search_paths")


def main(argv: Sequence[str]) -> int:
    """Run the command; return the exit status."""
    options, prompts = split_prompts(argv)
    prompts = [_as_utf8(prompt) for prompt in prompts]
    if prompts:
        options = [*options, f"--gin.PROMPTS={prompts!r}"]
    flags.run(
        "infer",
        infer,
        [load_switch, GenerationSettings],
        description=_DESCRIPTION,
        default_gin_file="gin/runs/infer.gin",
        argv=options,
    )
    return 0


def split_prompts(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return flags and prompts among command-line arguments; everything after `--` is a prompt."""
    flags: list[str] = []
    prompts: list[str] = []
    for i, argument in enumerate(argv):
        if argument == "--":
            return flags, [*prompts, *argv[i + 1 :]]
        is_value = bool(flags) and i > 0 and argv[i - 1] in _FLAGS_WITH_VALUE
        (flags if is_value or argument.startswith("-") else prompts).append(argument)
    return flags, prompts


def _as_utf8(argument: str) -> str:
    """Return an argument as it was typed, where the locale is not that of the terminal.

    Raises:
      ValueError: its bytes are no UTF-8.
    """
    try:
        typed = os.fsencode(argument)
    except UnicodeEncodeError:
        return argument  # of a program, which has no locale to mistake
    try:
        return typed.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"the prompt {argument!a} is not UTF-8; write it to a UTF-8 file and pass PROMPTS_FILE"
        ) from error


def infer(
    checkpoint: str | os.PathLike[str],
    vocabulary: str | os.PathLike[str],
    prompts: Sequence[str] | None = None,
    *,
    prompts_file: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    stream: bool = False,
    dequantize: bool = False,
    activation_dtype: str = "float32",
    expert_capacity_factor: float | None = None,
    settings: GenerationSettings | None = None,
    load: Callable[..., Any] = load_switch,
) -> list[list[Filled]]:
    """Fill the blanks (`<extra_id_0>`, `<extra_id_1>`, ...) of prompts, and print the answers.

    Progress, speed and memory go to stderr.

    Args:
      checkpoint: native T5X or compressed, local or gs://.
      vocabulary: sentencepiece model file of the checkpoint, local.
      prompts: texts with blanks.
      prompts_file: instead, a file of them; see `prompt_files.read_prompts`.
      output: also write the answers here, as JSON lines.
      stream: print tokens as they come, one prompt at a time.
      dequantize: expand codes once instead of at each step: faster, and as large as the
        uncompressed model.
      activation_dtype: "float32" or "bfloat16".
      expert_capacity_factor: None is dropless; a number is T5X's capacity factor.
      settings: how to generate; `GenerationSettings()` where None.
      load: `load_switch`, or one with routing fields bound.

    Returns:
      The answers to each prompt, the best first.

    Raises:
      CheckpointError: no readable checkpoint.
      TokensError: prompts or vocabulary that cannot be used.
      ValueError: settings that exclude each other.
    """
    settings = settings or GenerationSettings()
    if stream:
        settings.check_streamable()
    if (prompts is None) == (prompts_file is None):
        raise ValueError(
            "give prompts in one way: as arguments, as the list PROMPTS, or by PROMPTS_FILE"
        )
    if prompts is None:
        assert prompts_file is not None
        prompts = read_prompts(prompts_file)
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"PROMPTS is {prompts!r}; give a list of texts")
    words = text.Vocabulary(vocabulary)
    ids = text.encode_prompts(words, prompts)
    check_prompt_lengths(ids, settings.max_input_length)
    text.check_vocabulary(words, read_config(checkpoint).num_embeddings)
    if stream:
        settings = dataclasses.replace(settings, batch_size=1)
    answer_file = None
    if output is not None:
        given = (checkpoint, vocabulary, prompts_file)
        answer_file = AnswerFile(output, [path for path in given if path not in (None, "-")])
    module, variables = load(checkpoint, activation_dtype, expert_capacity_factor)
    if dequantize:
        module, variables = dequantized(module, variables, activation_dtype)
    try:
        if answer_file is not None:
            answer_file.begin(run_identity(checkpoint, module, settings, ids))
        fill = _stream if stream else _fill
        answers = fill(module, variables, words, prompts, ids, settings, answer_file)
        if answer_file is not None:
            answer_file.finish()
    finally:
        if answer_file is not None:
            answer_file.close()
    return answers


def _fill(
    module: Any,
    variables: Any,
    vocabulary: Vocabulary,
    prompts: Sequence[str],
    ids: Sequence[Sequence[int]],
    settings: GenerationSettings,
    answer_file: Any,
) -> list[list[Filled]]:
    """Batch by batch with a progress bar; the answers are printed at the end, in order."""

    answers: list[list[Filled]] = [[] for _ in prompts]
    finished = {} if answer_file is None else dict(answer_file.finished)
    for lines in finished.values():
        for i, line in lines.items():
            answers[i] = from_line(line)
    speed = Speed()
    left = len(prompts) - sum(len(lines) for lines in finished.values())
    with progress(title="generate", unit="prompts", total=left) as bar:
        for batch in generate_batches(
            module,
            variables,
            ids,
            settings,
            eos_id=vocabulary.eos_id,
            sentinels=vocabulary.sentinel_ids,
            skip=frozenset(finished),
        ):
            for i, best_first in zip(batch.indices, batch.answers, strict=True):
                answers[i] = [filled(prompts[i], answer, vocabulary) for answer in best_first]
            if answer_file is not None:
                answer_file.add(batch.number, {i: to_line(answers[i]) for i in batch.indices})
            count = sum(len(answer.tokens) for best in batch.answers for answer in best)
            speed.add(count, batch.seconds, batch.compile_seconds)
            bar.update(len(batch.indices))
    for best_first in answers:
        print_answers(best_first, scores=settings.num_decodes > 1)
    print(speed.summary(), file=sys.stderr)
    return answers


def _stream(
    module: Any,
    variables: Any,
    vocabulary: Vocabulary,
    prompts: Sequence[str],
    ids: Sequence[Sequence[int]],
    settings: GenerationSettings,
    answer_file: Any,
) -> list[list[Filled]]:
    """Prompt by prompt, printing as tokens come. No scores: only tokens are streamed."""

    answers = []
    finished = {} if answer_file is None else dict(answer_file.finished)
    speed = Speed()
    for number, (prompt, prompt_ids) in enumerate(zip(prompts, ids, strict=True)):
        if number in finished:
            answers.append(from_line(finished[number][number]))
            print_answers(answers[-1])
            continue
        print(f"{prompt}\n  -> ", end="", flush=True)
        start = time.perf_counter()
        tokens: list[int] = []
        printed = ""
        with CompileTime() as compiling:
            for token in stream_prompt(
                module,
                variables,
                prompt_ids,
                settings,
                number=number,
                eos_id=vocabulary.eos_id,
                sentinels=vocabulary.sentinel_ids,
            ):
                tokens.append(token)
                text = vocabulary.decode(tokens)
                # A later piece may change what the earlier ones read like; then print no further.
                if text.startswith(printed):
                    print(text[len(printed) :], end="", flush=True)
                    printed = text
        seconds = time.perf_counter() - start
        answer = filled(prompt, Answer(tuple(tokens), float("nan")), vocabulary)
        if printed != answer.generated:
            print(f"\n  -> {answer.generated}", end="")
        print(f"\n  => {marked(answer)}", flush=True)
        answers.append([answer])
        if answer_file is not None:
            answer_file.add(number, {number: to_line([answer])})
        speed.add(len(tokens), seconds - compiling.seconds, compiling.seconds)
    print(speed.summary(), file=sys.stderr)
    return answers


# --- What is printed and written ---

_BRIGHT, _PLAIN = "\x1b[1;32m", "\x1b[0m"


def to_line(answers: Sequence[Filled]) -> dict[str, Any]:
    """Return a prompt's line of the output."""
    return {
        "inputs": answers[0].prompt,
        "decodes": [
            {
                "prediction": answer.generated,
                "text": answer.text,
                "score": None if answer.score != answer.score else answer.score,
                "tokens": list(answer.tokens),
            }
            for answer in answers
        ],
    }


def from_line(line: dict[str, Any]) -> list[Filled]:
    """Return the answers of a line of the output."""
    return [
        Filled(
            line["inputs"],
            decode["prediction"],
            decode["text"],
            tuple(decode["tokens"]),
            float("nan") if decode["score"] is None else decode["score"],
        )
        for decode in line["decodes"]
    ]


def print_answers(answers: Sequence[Filled], *, scores: bool = False) -> None:
    """Print a prompt and its answers, the best first, with or without their scores."""
    print(answers[0].prompt)
    for answer in answers:
        score = f"[{answer.score:.3f}] " if scores else ""
        print(f"  -> {score}{answer.generated}\n  => {marked(answer)}")


def marked(answer: Filled) -> str:
    """Fill the prompt; on a terminal its spans stand out, by colour or (NO_COLOR) by brackets."""
    if not sys.stdout.isatty():
        return answer.text
    before, after = ("[", "]") if os.environ.get("NO_COLOR") else (_BRIGHT, _PLAIN)
    return fill_blanks(answer.prompt, answer.generated, before=before, after=after)


class Speed:
    """Tokens and seconds; those of compilation apart."""

    def __init__(self) -> None:
        self._tokens, self._seconds, self._compile_seconds = 0, 0.0, 0.0

    def add(self, tokens: int, seconds: float, compile_seconds: float) -> None:
        """Count a batch; `seconds` are without compilation."""
        self._tokens += tokens
        self._seconds += seconds
        self._compile_seconds += compile_seconds

    def summary(self) -> str:
        """Speed and memory in one line."""
        if not self._tokens:
            return f"nothing was left to generate; {memory()}"
        line = f"{self._tokens} tokens in {self._seconds:.1f} s, "
        line += f"{self._tokens / max(self._seconds, 1e-9):.1f} tokens/s"
        if self._compile_seconds >= 0.05:
            line += f", besides {self._compile_seconds:.1f} s of compilation"
        return f"{line}; {memory()}"


def memory() -> str:
    """Peak memory of the process, and of devices that count theirs."""
    parts = [f"peak memory {format_memory(peak_host_bytes())} on the host"]
    for device in jax.local_devices():
        peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
        if peak is not None:
            parts.append(f"{format_memory(peak)} on {device.device_kind} {device.id}")
    return ", ".join(parts)
