"""`qmoe-jax infer`: fill the blanks of texts with a checkpoint, native or compressed."""

import dataclasses
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from qmoe_jax.checkpoints.read_config import read_config
from qmoe_jax.cli import flags
from qmoe_jax.cli.printed_answers import Speed, from_line, marked, print_answers, to_line
from qmoe_jax.errors import TokensError
from qmoe_jax.generation import text
from qmoe_jax.generation.compile_time import CompileTime
from qmoe_jax.generation.prompt_files import (
    AnswerFile,
    read_prompts,
    run_identity,
    stdin_prompts,
)
from qmoe_jax.generation.prompts import (
    Answer,
    check_prompt_lengths,
    generate_batches,
    stream_prompt,
)
from qmoe_jax.generation.settings import GenerationSettings
from qmoe_jax.generation.text import Filled, Vocabulary, filled, prompt_remarks
from qmoe_jax.models.load import dequantized, load_switch
from qmoe_jax.progress import progress

_DESCRIPTION = """\
Fill the blanks of texts with a Switch Transformer, native or compressed.

A blank is written <extra_id_0>, the next <extra_id_1>, and so on. Prompts are arguments, or the
list PROMPTS, or the lines of PROMPTS_FILE (JSON lines with a text 'inputs' or 'text' are welcome).
Each is printed with what was generated (->) and with its blanks filled (=>).

Without any of these, prompts are read line by line from the terminal or a pipe, and each is
answered as it comes: the model is loaded once, and compiled once for each length (32, 64, ...
tokens) that prompts are padded to. PROMPTS_FILE '-' does the same; with OUTPUT all lines are read
first.

examples:
  qmoe-jax infer --gin.CHECKPOINT="'compressed'" \\
    --gin.VOCABULARY="'sentencepiece.model'" 'Return the <extra_id_0> of the array.'
  producer | qmoe-jax infer --gin.CHECKPOINT=... --gin.VOCABULARY=...   # answers as lines come
  ... --gin.PROMPTS_FILE="'prompts.txt'" --gin.OUTPUT="'answers.jsonl'" --gin.METHOD="'beam'"
  ... --gin.METHOD="'sample'" --gin.TOP_P=0.9 --gin.SEED=1 --gin.STREAM=True 'A <extra_id_0>.'

Required: CHECKPOINT, VOCABULARY.
How to generate: METHOD 'greedy', 'beam' (BEAM_SIZE, ALPHA) or 'sample' (TEMPERATURE, TOP_K, TOP_P,
  SEED), NUM_DECODES, MAX_DECODE_LENGTH, MAX_INPUT_LENGTH, BATCH_SIZE.
An answer ends when its blanks are filled; with GenerationSettings.stop_when_filled=False, with
  'beam' and where several are ranked, at the end of the sequence.
OUTPUT: a file of JSON lines, one a prompt; a stopped run goes on where it was, and what a finished
  one left is replaced by the next.
STREAM=True prints tokens as they come, one prompt at a time (not 'beam').
DEQUANTIZE=True expands the codes of a compressed checkpoint once, where memory allows it."""

IF_INTERRUPTED = "with OUTPUT, the same command goes on where it was"

_MOST_REMARKS = 5

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

    Progress, speed, memory, and remarks on prompts without blanks go to stderr. Without prompts,
    and with `prompts_file` "-" but no `output`, lines of stdin are answered as they come.

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
    if prompts is not None and prompts_file is not None:
        raise ValueError(
            "give prompts in one way: as arguments, as the list PROMPTS, or by PROMPTS_FILE"
        )
    if prompts is None and prompts_file in (None, "-") and output is None:
        words = text.Vocabulary(vocabulary)
        text.check_vocabulary(words, read_config(checkpoint).num_embeddings)
        lines = _first_read(stdin_prompts())

        def loaded() -> tuple[Any, Any]:
            module, variables = load(checkpoint, activation_dtype, expert_capacity_factor)
            if dequantize:
                return dequantized(module, variables, activation_dtype)
            return module, variables

        return _answer_lines(lines, loaded, words, settings, stream)
    if prompts is None:
        prompts = read_prompts("-" if prompts_file is None else prompts_file)
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
    _remark(prompts)
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
        print(prompt)
        answer = _stream_one(
            module, variables, vocabulary, prompt, prompt_ids, settings, number, speed
        )
        answers.append([answer])
        if answer_file is not None:
            answer_file.add(number, {number: to_line([answer])})
    print(speed.summary(), file=sys.stderr)
    return answers


def _stream_one(
    module: Any,
    variables: Any,
    vocabulary: Vocabulary,
    prompt: str,
    prompt_ids: Sequence[int],
    settings: GenerationSettings,
    number: int,
    speed: Speed,
) -> Filled:
    """Print the answer to a prompt, below it, as its tokens come; `number` decides its key."""
    print("  -> ", end="", flush=True)
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
    speed.add(len(tokens), seconds - compiling.seconds, compiling.seconds)
    return answer


# --- Lines that are answered as they come ---


def _first_read(lines: Iterator[str]) -> Iterator[str]:
    """Wait for a pipe's first prompt before the model is loaded: there may be none."""
    if sys.stdin.isatty():
        return lines
    for first in lines:
        return itertools.chain([first], lines)
    raise TokensError(
        "there is no prompt: give some as arguments, as the list PROMPTS, by PROMPTS_FILE, or as "
        "lines of stdin"
    )


def _answer_lines(
    lines: Iterable[str],
    load: Callable[[], tuple[Any, Any]],
    vocabulary: Vocabulary,
    settings: GenerationSettings,
    stream: bool,
) -> list[list[Filled]]:
    """Answer each line as it comes; one that cannot be answered is told, and the next is read.

    Raises:
      TokensError: at the end, if lines of a pipe could not be answered.
    """
    started = time.perf_counter()
    module, variables = load()
    is_terminal = sys.stdin.isatty()
    settings = dataclasses.replace(settings, batch_size=1)
    if is_terminal:
        seconds = time.perf_counter() - started
        print(
            f"Loaded in {seconds:.1f} s. Write a text with blanks, <extra_id_0>, <extra_id_1> and "
            "so on; Ctrl-D ends.",
            file=sys.stderr,
        )
        lines = _until_interrupted(lines)
    speed = Speed()
    answers, refused = [], 0
    for number, prompt in enumerate(lines):
        try:
            (ids,) = text.encode_prompts(vocabulary, [prompt])
            check_prompt_lengths([ids], settings.max_input_length)
        except TokensError as error:
            reason = str(error).replace("prompt 1", f"line {number + 1}", 1)
            print(f"not answered: {reason}", file=sys.stderr)
            refused += 1
            continue
        _remark([prompt], first=number + 1)
        if stream:
            if not is_terminal:
                print(prompt)
            answer = _stream_one(
                module, variables, vocabulary, prompt, ids, settings, number, speed
            )
            answers.append([answer])
            continue
        (batch,) = generate_batches(
            module,
            variables,
            [ids],
            settings,
            eos_id=vocabulary.eos_id,
            sentinels=vocabulary.sentinel_ids,
            first_number=number,
        )
        answers.append([filled(prompt, answer, vocabulary) for answer in batch.answers[0]])
        print_answers(answers[-1], scores=settings.num_decodes > 1, with_prompt=not is_terminal)
        sys.stdout.flush()
        count = sum(len(answer.tokens) for answer in batch.answers[0])
        speed.add(count, batch.seconds, batch.compile_seconds)
    print(speed.summary(), file=sys.stderr)
    if refused and not is_terminal:
        raise TokensError(f"{refused} of {refused + len(answers)} lines could not be answered")
    return answers


def _until_interrupted(lines: Iterable[str]) -> Iterator[str]:
    """End as at Ctrl-D where Ctrl-C comes instead of a line: there is nothing to go on with."""
    try:
        yield from lines
    except KeyboardInterrupt:
        print(file=sys.stderr)


def _remark(prompts: Sequence[str], first: int = 1) -> None:
    """Say on stderr which prompts are not what the model was trained on."""
    remarks = [
        f"remark: prompt {number} {remark}"
        for number, prompt in enumerate(prompts, first)
        for remark in prompt_remarks(prompt)
    ]
    if len(remarks) > _MOST_REMARKS:
        more = len(remarks) - _MOST_REMARKS
        remarks[_MOST_REMARKS:] = [f"remark: and {more} more like these"]
    for remark in remarks:
        print(remark, file=sys.stderr)
