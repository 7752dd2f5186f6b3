"""Text in, text out: prompts with blanks, and the spans that are generated for them."""

import dataclasses
import os
import re
from collections.abc import Sequence

from qmoe_jax.errors import TokensError
from qmoe_jax.generation.prompts import Answer, generate_batches
from qmoe_jax.generation.settings import GenerationSettings
from qmoe_jax.generation.step import Variables
from qmoe_jax.models.switch import SwitchTransformer
from qmoe_jax.paths import local_path

_SENTINEL = re.compile(r"(<extra_id_\d+>)")
_WORD_MARK = "\N{LOWER ONE EIGHTH BLOCK}"
# Sentinels of every public T5 model.
_EXTRA_IDS = 100


# T5X rounds the number of embeddings up to a multiple of 128; others round more generously. Beyond
# this the vocabulary is another model's.
_MOST_UNUSED_EMBEDDINGS = 1024


@dataclasses.dataclass(frozen=True)
class Filled:
    """A prompt, what the model generated for its blanks, and the two put together.

    Attributes:
      prompt: text with blanks.
      generated: sentinels, each followed by its span.
      text: the prompt with its blanks filled.
      tokens: ids of `generated`, with eos if the model ended.
      score: as in `prompts.Answer`.
    """

    prompt: str
    generated: str
    text: str
    tokens: tuple[int, ...] = ()
    score: float = 0.0


class Vocabulary:
    """A sentencepiece vocabulary with T5's sentinels, `<extra_id_0>` on top.

    Where the model file holds none, as that of cc_all.32000, 100 stand above its pieces: those that
    seqio's `extra_ids=100` means.

    Raises:
      TokensError: no readable sentencepiece model.
    """

    def __init__(self, path: str | os.PathLike[str]):
        import sentencepiece

        file = local_path(path, "the vocabulary", TokensError)
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=os.fspath(file))
        except (OSError, RuntimeError, ValueError) as error:
            raise TokensError(
                f"cannot read a sentencepiece model from {os.fspath(path)!r} ({error}); give the "
                "sentencepiece.model that the checkpoint was trained with (copy gs:// files first)"
            ) from error
        self.eos_id = self._model.eos_id()
        # T5's models spell their sentinels with sentencepiece's word mark in front.
        self._num_pieces = self._model.vocab_size()
        pieces = [self._model.id_to_piece(i) for i in range(self._num_pieces)]
        self._sentinels = {
            i: piece.removeprefix(_WORD_MARK)
            for i, piece in enumerate(pieces)
            if _SENTINEL.fullmatch(piece.removeprefix(_WORD_MARK))
        }
        self._len = self._num_pieces
        if not self._sentinels:
            self._len += _EXTRA_IDS
            self._sentinels = {self._len - 1 - i: f"<extra_id_{i}>" for i in range(_EXTRA_IDS)}
        self._sentinel_ids = {piece: i for i, piece in self._sentinels.items()}

    @property
    def sentinel_ids(self) -> tuple[int, ...]:
        """Ids of all sentinels."""
        return tuple(self._sentinels)

    @property
    def num_extra_ids(self) -> int:
        """Sentinels that the file does not hold: what seqio and transformers call `extra_ids`."""
        return self._len - self._num_pieces

    def __len__(self) -> int:
        return self._len

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
            elif 0 < token < self._num_pieces:
                run.append(token)
        return " ".join(word for word in words if word)


def fill_blanks(prompt: str, generated: str, *, before: str = "", after: str = "") -> str:
    """Put generated spans into the blanks of a prompt; a blank without a span stays.

    Args:
      prompt: text with blanks `<extra_id_0>`, `<extra_id_1>`, ...
      generated: sentinels, each followed by its span; the first span of a sentinel counts.
      before: put in front of each span, to make it stand out.
      after: put behind each span.
    """
    parts = _SENTINEL.split(generated)
    spans: dict[str, str] = {}
    for i in range(1, len(parts) - 1, 2):
        spans.setdefault(parts[i], parts[i + 1].strip())

    def fill(match: re.Match[str]) -> str:
        span = spans.get(match[1])
        return f"{before}{span}{after}" if span else match[1]

    return _SENTINEL.sub(fill, prompt)


def filled(prompt: str, answer: Answer, vocabulary: Vocabulary) -> Filled:
    """Return an answer as text."""
    generated = vocabulary.decode(answer.tokens)
    text = fill_blanks(prompt, generated)
    return Filled(prompt, generated, text, answer.tokens, answer.score)


def check_vocabulary(vocabulary: Vocabulary, num_embeddings: int) -> None:
    """Refuse a vocabulary that cannot be the model's.

    Raises:
      TokensError: more pieces than embeddings, or far fewer.
    """
    if not 0 <= num_embeddings - len(vocabulary) < _MOST_UNUSED_EMBEDDINGS:
        raise TokensError(
            f"the vocabulary has {len(vocabulary)} pieces, but the model {num_embeddings} "
            "embeddings; give the vocabulary that the checkpoint was trained with"
        )


def encode_prompts(vocabulary: Vocabulary, prompts: Sequence[str]) -> list[list[int]]:
    """Ids of prompts, each with its eos.

    Raises:
      TokensError: a prompt is empty, or has a sentinel that the vocabulary does not have.
    """
    encoded = []
    for number, prompt in enumerate(prompts, 1):
        ids = vocabulary.encode(prompt)
        if not ids:
            raise TokensError(f"prompt {number} is empty ({prompt!r}); write a text with blanks")
        encoded.append([*ids, vocabulary.eos_id])
    return encoded


def prompt_remarks(prompt: str) -> list[str]:
    """Say what about a prompt is not as in the texts that the model was trained on.

    Returns:
      Sentences without their subject; none for a prompt whose blanks are there, each once.
    """
    blanks = _SENTINEL.findall(prompt)
    if not blanks:
        return [
            "has no blank, so there is nothing to fill in; write <extra_id_0> where text is missing"
        ]
    twice = sorted({blank for blank in blanks if blanks.count(blank) > 1})
    return [
        f"has {blank} {blanks.count(blank)} times, and all get the same text; number blanks in turn"
        for blank in twice
    ]


def fill_prompts(
    module: SwitchTransformer,
    variables: Variables,
    vocabulary: Vocabulary,
    prompts: Sequence[str],
    *,
    max_decode_length: int = 32,
) -> list[Filled]:
    """Fill the blanks of prompts greedily, all in one batch."""
    settings = GenerationSettings(
        max_decode_length=max_decode_length, batch_size=max(len(prompts), 1)
    )
    answers = generate(module, variables, vocabulary, prompts, settings)
    return [best_first[0] for best_first in answers]


def generate(
    module: SwitchTransformer,
    variables: Variables,
    vocabulary: Vocabulary,
    prompts: Sequence[str],
    settings: GenerationSettings | None = None,
) -> list[list[Filled]]:
    """Fill the blanks of prompts (`<extra_id_0>`, `<extra_id_1>`, ...).

    Args:
      module: the model.
      variables: its parameters, dense or codes.
      vocabulary: the model's.
      prompts: texts with blanks.
      settings: how to generate; greedily, 8 prompts at a time, where None.

    Returns:
      Every answer to each prompt, the best first.

    Raises:
      TokensError: another model's vocabulary, or a prompt that is empty or too long.
    """
    settings = settings or GenerationSettings()
    check_vocabulary(vocabulary, module.config.num_embeddings)
    ids = encode_prompts(vocabulary, prompts)
    answers: list[list[Filled]] = [[] for _ in prompts]
    for batch in generate_batches(
        module,
        variables,
        ids,
        settings,
        eos_id=vocabulary.eos_id,
        sentinels=vocabulary.sentinel_ids,
    ):
        for i, best_first in zip(batch.indices, batch.answers, strict=True):
            answers[i] = [filled(prompts[i], answer, vocabulary) for answer in best_first]
    return answers
