"""Text in, text out: prompts with blanks, filled by greedy generation."""

import dataclasses
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from qmoe_jax.errors import TokensError
from qmoe_jax.models.generation import greedy_generate
from qmoe_jax.models.load import load_switch
from qmoe_jax.models.switch import SwitchTransformer

_SENTINEL = re.compile(r"(<extra_id_\d+>)")
_WORD_MARK = "\N{LOWER ONE EIGHTH BLOCK}"


@dataclasses.dataclass(frozen=True)
class Filled:
    """A prompt, what the model generated for its blanks, and the two put together."""

    prompt: str
    generated: str
    text: str


class Vocabulary:
    """A sentencepiece vocabulary whose model file holds T5's sentinels, `<extra_id_0>` on top.

    Raises:
      TokensError: no readable sentencepiece model, or one without sentinels.
    """

    def __init__(self, path: str | os.PathLike[str]):
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=os.fspath(path))
        except (OSError, RuntimeError) as error:
            raise TokensError(
                f"cannot read a sentencepiece model from {os.fspath(path)!r} ({error}); give the "
                "sentencepiece.model that the checkpoint was trained with (copy gs:// files first)"
            ) from error
        self.eos_id = self._model.eos_id()
        # T5's models spell their sentinels with sentencepiece's word mark in front.
        pieces = [self._model.id_to_piece(i) for i in range(len(self))]
        self._sentinels = {
            i: piece.removeprefix(_WORD_MARK)
            for i, piece in enumerate(pieces)
            if _SENTINEL.fullmatch(piece.removeprefix(_WORD_MARK))
        }
        self._sentinel_ids = {piece: i for i, piece in self._sentinels.items()}
        if not self._sentinels:
            raise TokensError(
                f"the vocabulary {os.fspath(path)!r} has no piece <extra_id_0>; use the one with "
                "T5's 100 extra ids inside"
            )

    def __len__(self) -> int:
        return self._model.vocab_size()

    def encode(self, text: str) -> list[int]:
        """Ids of a text; sentinels written as `<extra_id_N>` become their ids. No eos.

        Raises:
          TokensError: a sentinel that the vocabulary does not have.
        """
        ids: list[int] = []
        for part in _SENTINEL.split(text):
            if _SENTINEL.fullmatch(part):
                if part not in self._sentinel_ids:
                    raise TokensError(
                        f"{part} is no sentinel of this vocabulary, which has "
                        f"{len(self._sentinel_ids)}; number the blanks from <extra_id_0>"
                    )
                ids.append(self._sentinel_ids[part])
            elif part:
                ids.extend(self._model.encode(part))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids up to eos; sentinels readable; padding and ids without piece left out."""
        words: list[str] = []
        run: list[int] = []
        for token in [*ids, self.eos_id]:
            if token == self.eos_id or token in self._sentinels:
                words.append(self._model.decode(run))
                run = []
                if token == self.eos_id:
                    break
                words.append(self._sentinels[token])
            elif 0 < token < len(self):
                run.append(token)
        return " ".join(word for word in words if word)


def fill_blanks(prompt: str, generated: str) -> str:
    """Puts generated spans into the blanks of a prompt; a blank without a span stays."""
    parts = _SENTINEL.split(generated)
    spans = {parts[i]: parts[i + 1].strip() for i in range(1, len(parts) - 1, 2)}
    return _SENTINEL.sub(lambda match: spans.get(match[1]) or match[1], prompt)


def fill_prompts(
    module: SwitchTransformer,
    variables: Any,
    vocabulary: Vocabulary,
    prompts: Sequence[str],
    *,
    max_decode_length: int = 32,
) -> list[Filled]:
    """Fills the blanks of prompts with a loaded model, all in one batch."""
    if not prompts:
        return []
    ids = [[*vocabulary.encode(prompt), vocabulary.eos_id] for prompt in prompts]
    # Few lengths, few compilations.
    length = -(-max(map(len, ids)) // 32) * 32
    inputs = np.zeros((len(ids), length), np.int32)
    for row, prompt_ids in zip(inputs, ids, strict=True):
        row[: len(prompt_ids)] = prompt_ids
    outputs = greedy_generate(
        module,
        variables,
        jnp.asarray(inputs),
        max_decode_length=max_decode_length,
        eos_id=vocabulary.eos_id,
    )
    generated = [vocabulary.decode(row.tolist()) for row in np.asarray(outputs)]
    return [
        Filled(prompt, answer, fill_blanks(prompt, answer))
        for prompt, answer in zip(prompts, generated, strict=True)
    ]


def infer(
    checkpoint: str | os.PathLike[str],
    vocabulary: str | os.PathLike[str],
    prompts: Sequence[str],
    *,
    max_decode_length: int = 32,
    activation_dtype: str = "float32",
    expert_capacity_factor: float | None = None,
    load: Callable[..., Any] = load_switch,
) -> list[Filled]:
    """Fills the blanks (`<extra_id_0>`, `<extra_id_1>`, ...) of prompts greedily.

    Args:
      checkpoint: native T5X or compressed, local or gs://.
      vocabulary: sentencepiece model file of the checkpoint, local.
      prompts: texts with blanks.
      max_decode_length: tokens to generate at most.
      activation_dtype: "float32" or "bfloat16".
      expert_capacity_factor: None is dropless; a number is T5X's capacity factor.
      load: `load_switch`, or one with routing fields bound.
    """
    words = Vocabulary(vocabulary)
    module, variables = load(checkpoint, activation_dtype, expert_capacity_factor)
    if len(words) > module.config.num_embeddings:
        raise TokensError(
            f"the vocabulary has {len(words)} pieces, but the model {module.config.num_embeddings} "
            "embeddings; give the vocabulary that the checkpoint was trained with"
        )
    return fill_prompts(module, variables, words, prompts, max_decode_length=max_decode_length)
