"""Prompts of any length to generated tokens: batches of few shapes, and the method that is set.

What is compiled depends on the shape of a batch alone. So lengths are rounded up to a few
(`padded_length`) and each batch is filled up, by repeating a prompt as T5X does. Dropless routing
makes both harmless; under a capacity factor padding and repeated prompts take capacity in the
encoder, as in T5X, and answers depend on what shares a batch.
"""

import dataclasses
import time
from collections.abc import Collection, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from qmoe_jax.errors import CheckpointError, TokensError
from qmoe_jax.generation.beam_search import beam_generate
from qmoe_jax.generation.blanks import Blanks, blanks_of, until_filled
from qmoe_jax.generation.compile_time import CompileTime
from qmoe_jax.generation.sampling import NEG_INF, sample_generate
from qmoe_jax.generation.settings import GenerationSettings
from qmoe_jax.generation.step import Generated, Variables
from qmoe_jax.generation.streaming import stream_tokens
from qmoe_jax.models.switch import SwitchTransformer

_SHORTEST = 32


@dataclasses.dataclass(frozen=True)
class Answer:
    """What was generated for a prompt.

    Attributes:
      tokens: ids, up to eos and with it, or up to the sentinel that completes the answer.
      score: log probability under the model; under "beam" it is divided by the brevity penalty
        where the answer has an eos.
    """

    tokens: tuple[int, ...]
    score: float


@dataclasses.dataclass(frozen=True)
class AnsweredBatch:
    """The answers to some prompts.

    Attributes:
      number: of the batch.
      indices: which prompts.
      answers: of each of them, the best first.
      seconds: from tokens on the host to tokens on the host, without compilation.
      compile_seconds: of compilation, for the first batch of its shape.
    """

    number: int
    indices: tuple[int, ...]
    answers: tuple[tuple[Answer, ...], ...]
    seconds: float
    compile_seconds: float


def check_prompt_lengths(prompts: Sequence[Sequence[int]], max_input_length: int) -> None:
    """Refuse prompts that are too long.

    Raises:
      TokensError: which prompt, its length and the limit.
    """
    for number, prompt in enumerate(prompts, 1):
        if len(prompt) > max_input_length:
            raise TokensError(
                f"prompt {number} has {len(prompt)} tokens with its eos, but max_input_length is "
                f"{max_input_length}; shorten it or raise max_input_length"
            )


def padded_length(length: int, max_input_length: int) -> int:
    """Return the length that a prompt is padded to: 32, 64, 128, ... up to `max_input_length`."""
    padded = _SHORTEST
    while padded < length:
        padded *= 2
    return max(length, min(padded, max_input_length))


def plan_batches(
    prompts: Sequence[Sequence[int]], settings: GenerationSettings
) -> list[tuple[int, ...]]:
    """Return indices of the prompts of each batch: prompts of one padded length, in their order."""
    lengths = [padded_length(len(prompt), settings.max_input_length) for prompt in prompts]
    batches = []
    for length in sorted(set(lengths)):
        indices = [i for i, own in enumerate(lengths) if own == length]
        for start in range(0, len(indices), settings.batch_size):
            batches.append(tuple(indices[start : start + settings.batch_size]))
    return batches


def pad_prompts(
    prompts: Sequence[Sequence[int]], rows: int, max_input_length: int
) -> Int[np.ndarray, "rows length"]:
    """Prompts as the rows of one array, padded with 0; the first fills the rows that are left."""
    length = padded_length(max(map(len, prompts)), max_input_length)
    tokens = np.zeros((rows, length), np.int32)
    for row in range(rows):
        prompt = prompts[row] if row < len(prompts) else prompts[0]
        tokens[row, : len(prompt)] = prompt
    return tokens


def generate_batches(
    module: SwitchTransformer,
    variables: Variables,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    *,
    eos_id: int = 1,
    sentinels: Sequence[int] = (),
    skip: Collection[int] = (),
    first_number: int = 0,
) -> Iterator[AnsweredBatch]:
    """Answers to prompts, batch by batch in the order of `plan_batches`.

    Args:
      module: the model.
      variables: its parameters, dense or codes.
      prompts: ids of each prompt, with its eos.
      settings: how to generate.
      eos_id: ends an answer.
      sentinels: ids of the vocabulary's sentinels, for `settings.stop_when_filled`; without any,
        eos alone ends an answer.
      skip: numbers of batches that need not be answered.
      first_number: of the first batch; samples depend on the seed and the batch's number.

    Raises:
      TokensError: a prompt is too long.
    """
    check_prompt_lengths(prompts, settings.max_input_length)
    rows = min(settings.batch_size, len(prompts))
    for number, indices in enumerate(plan_batches(prompts, settings), first_number):
        if number in skip:
            continue
        start = time.perf_counter()
        tokens = pad_prompts([prompts[i] for i in indices], rows, settings.max_input_length)
        blanks = _blanks(module, settings, tokens, sentinels)
        with CompileTime() as compiling:
            generated = _generate(module, variables, tokens, settings, number, eos_id, blanks)
            answers = answers_of(generated, len(indices), settings.num_decodes, eos_id)
        if blanks is not None:  # behind the last sentinel are zeros
            answers = tuple(
                tuple(
                    Answer(until_filled(answer.tokens, prompts[i], sentinels), answer.score)
                    for answer in best_first
                )
                for i, best_first in zip(indices, answers, strict=True)
            )
        seconds = time.perf_counter() - start - compiling.seconds
        yield AnsweredBatch(number, indices, answers, seconds, compiling.seconds)


def _generate(
    module: SwitchTransformer,
    variables: Variables,
    tokens: Int[np.ndarray, "rows length"],
    settings: GenerationSettings,
    number: int,
    eos_id: int,
    blanks: Blanks | None,
) -> Generated:
    if settings.method == "beam":
        return beam_generate(
            module,
            variables,
            jnp.asarray(tokens),
            max_decode_length=settings.max_decode_length,
            beam_size=settings.beam_size,
            alpha=settings.alpha,
            eos_id=eos_id,
        )
    return sample_generate(
        module,
        variables,
        jnp.asarray(tokens),
        batch_key(settings.seed, number),
        max_decode_length=settings.max_decode_length,
        num_decodes=settings.num_decodes,
        eos_id=eos_id,
        blanks=blanks,
        rescale_log_probs=False,  # scores that can be compared between settings
        **settings.sampling(),
    )


def _blanks(
    module: SwitchTransformer,
    settings: GenerationSettings,
    tokens: Int[np.ndarray, "rows length"],
    sentinels: Sequence[int],
) -> Blanks | None:
    """Return the blanks of prompts where an answer may end with them."""
    ranked = settings.method == "beam" or settings.num_decodes > 1
    if not settings.stop_when_filled or ranked or not sentinels:
        return None
    if module.config.eval_capacity_factor is not None:
        return None
    return blanks_of(tokens, sentinels)


def stream_prompt(
    module: SwitchTransformer,
    variables: Variables,
    prompt: Sequence[int],
    settings: GenerationSettings,
    *,
    number: int = 0,
    eos_id: int = 1,
    sentinels: Sequence[int] = (),
) -> Iterator[int]:
    """Yield the ids of the answer to one prompt as they come, the last is what ends it.

    The answer is that of `generate_batches` with a batch size of 1, where the prompt is batch
    `number`.

    Raises:
      ValueError: the method, or several decodes, cannot be streamed.
      TokensError: the prompt is too long.
    """
    settings.check_streamable()
    check_prompt_lengths([prompt], settings.max_input_length)
    padded = pad_prompts([prompt], 1, settings.max_input_length)
    for tokens in stream_tokens(
        module,
        variables,
        padded,
        batch_key(settings.seed, number),
        max_decode_length=settings.max_decode_length,
        eos_id=eos_id,
        blanks=_blanks(module, settings, padded, sentinels),
        **settings.sampling(),
    ):
        yield int(tokens[0])


def batch_key(seed: int, number: int) -> jax.Array:
    """Return the PRNG key of a batch."""
    return jax.random.fold_in(jax.random.key(seed), number)


def answers_of(
    generated: Generated, num_prompts: int, num_decodes: int, eos_id: int
) -> tuple[tuple[Answer, ...], ...]:
    """Return the answers to the first `num_prompts` rows, best first, without fillers of beams.

    Raises:
      CheckpointError: scores that are not finite.
    """
    all_tokens, all_scores = np.asarray(generated.tokens), np.asarray(generated.scores)
    if not np.all(np.isfinite(all_scores)):
        raise CheckpointError(
            "the model's scores are not finite; its parameters hold NaN or infinity, or bfloat16 "
            "overflows: look at the checkpoint with `qmoe-jax inspect`, or use activation_dtype "
            "float32"
        )
    answers = []
    for tokens, scores in zip(all_tokens[:num_prompts], all_scores[:num_prompts], strict=True):
        best_first = [
            Answer(_until_eos(row.tolist(), eos_id), float(score))
            for row, score in zip(tokens[::-1], scores[::-1], strict=True)
            if score > NEG_INF / 2
        ]
        answers.append(tuple(best_first[:num_decodes]))
    return tuple(answers)


def _until_eos(tokens: list[int], eos_id: int) -> tuple[int, ...]:
    end = tokens.index(eos_id) + 1 if eos_id in tokens else len(tokens)
    return tuple(tokens[:end])
