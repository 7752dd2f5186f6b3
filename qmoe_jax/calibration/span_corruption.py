"""T5's span corruption as seqio preprocessors.

A share of the tokens ("noise") is cut out in spans. The inputs keep the rest with one sentinel in
place of each span; the targets list each span behind its sentinel. Sentinels descend from the
highest id of the vocabulary, `<extra_id_0>`.

    tokens   a b c d e f g h          noise   . . x x . . x .
    inputs   a b S0 e f S1 h          targets S0 c d S1 g

Two protocols make examples out of documents:

- `t5x_span_corruption`: the one that the Switch checkpoints were pretrained with. Documents are
  concatenated and split at the length whose corrupted inputs fill `inputs` exactly; both sides end
  in eos, which `seqio.preprocessors.append_eos_after_trim` adds. Equal to T5's `span_corruption`
  (google-research/text-to-text-transfer-transformer, t5/data/preprocessors.py), example by example,
  for the same seed and the same place in a task.
- `paper_span_corruption`: that of QMoE (IST-DASLab/qmoe, datautils.py). Each document alone, those
  that are too long skipped; eos belongs to the text and is corrupted with it, the inputs end in a
  further eos, and the targets end in a closing sentinel instead of eos.

TensorFlow and seqio are imported where a preprocessor runs, not with this module.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32

from qmoe_jax.calibration import text_packages

NOISE_DENSITY = 0.15
MEAN_SPAN_LENGTH = 3.0

# T5's limits for concatenation: tokens taken of one document, documents concatenated at a time.
_MAX_DOCUMENT_TOKENS = 65536
_DOCUMENTS_PER_GROUP = 128

# Names for the reader; TensorFlow is not imported here, so they cannot be checked types.
Dataset = Any
Tensor = Any
OutputFeatures = Mapping[str, Any]


def sentinel_range(vocabulary: Any) -> tuple[int, int]:
    """Return the sentinels of a seqio vocabulary: (lowest id, count).

    Of one that has no pieces, such as bytes, its extra ids, which are the highest, if any.

    Raises:
      ValueError: the highest pieces of the vocabulary are not `<extra_id_0>` and so on downwards.
    """
    size = vocabulary.vocab_size
    tokenizer = getattr(vocabulary, "tokenizer", None)
    if tokenizer is None:
        count = vocabulary.extra_ids or 0
        return size - count, count
    count = 0
    # Pieces may carry SentencePiece's word-start mark.
    while tokenizer.IdToPiece(size - 1 - count).lstrip("\u2581") == f"<extra_id_{count}>":
        count += 1
    if count == 0:
        raise ValueError(
            f"The highest id of the vocabulary, {size - 1}, is {tokenizer.IdToPiece(size - 1)!r}; "
            "span corruption needs <extra_id_0> there. Use a T5 vocabulary with its extra ids."
        )
    return size - count, count


def corruption_lengths(
    inputs_length: int,
    *,
    noise_density: float = NOISE_DENSITY,
    mean_span_length: float = MEAN_SPAN_LENGTH,
) -> tuple[int, int]:
    """How many tokens to corrupt so that the inputs, with eos, fill `inputs_length`.

    Returns:
      The number of raw tokens and the length of the targets, with eos or the closing sentinel:
      (568, 114) for 512.

    Raises:
      ValueError: noise that leaves no room between spans, or an `inputs_length` below 4.
    """
    _check_noise(noise_density, mean_span_length)
    if inputs_length < 4:
        raise ValueError(f"inputs_length is {inputs_length}; at least 4 is needed.")

    def corrupted(num_tokens: int) -> tuple[int, int]:
        num_noise = round(num_tokens * noise_density)
        num_spans = round(num_noise / mean_span_length)
        return num_tokens - num_noise + num_spans + 1, num_noise + num_spans + 1

    num_tokens = inputs_length - 1
    while corrupted(num_tokens + 1)[0] <= inputs_length:
        num_tokens += 1
    targets_length = corrupted(num_tokens)[1]
    # T5's exception: at half noise it gives up a token to keep the targets as short as the inputs.
    if noise_density == 0.5 and targets_length > inputs_length:
        num_tokens, targets_length = num_tokens - 1, targets_length - 1
    return num_tokens, targets_length


def random_spans_mask(
    length: Tensor,
    seeds: Tensor,
    *,
    noise_density: float = NOISE_DENSITY,
    mean_span_length: float = MEAN_SPAN_LENGTH,
) -> Tensor:
    """Draw which tokens are noise: spans that alternate, the first kept, the last noise.

    The numbers of noise tokens and of spans follow from the length; every choice of the span
    lengths is equally likely.

    Args:
      length: int32 scalar.
      seeds: two seeds of shape [2]: of the noise spans' lengths, of the kept spans' lengths.
      noise_density: share of the tokens that are noise.
      mean_span_length: mean length of a noise span.

    Returns:
      bool [length].
    """
    seqio, tf = _seqio_and_tensorflow()

    # float32 on purpose: half-way cases must round as they do in T5.
    padded_length = tf.maximum(length, 2)
    num_noise = tf.cast(tf.round(tf.cast(padded_length, tf.float32) * noise_density), tf.int32)
    num_noise = tf.clip_by_value(num_noise, 1, padded_length - 1)
    num_spans = tf.cast(tf.round(tf.cast(num_noise, tf.float32) / mean_span_length), tf.int32)
    num_spans = tf.maximum(num_spans, 1)

    def random_lengths(num_items: Tensor, seed: Tensor) -> Tensor:
        """[num_spans] positive lengths that add up to num_items."""
        is_cut = seqio.stateless_shuffle(
            tf.cast(tf.range(num_items - 1) < num_spans - 1, tf.int32), seed
        )
        cuts = tf.cast(tf.where(is_cut > 0)[:, 0], tf.int32) + 1
        edges = tf.concat([[0], cuts, [num_items]], axis=0)
        return edges[1:] - edges[:-1]

    noise_lengths = random_lengths(num_noise, seeds[0])
    kept_lengths = random_lengths(padded_length - num_noise, seeds[1])
    lengths = tf.reshape(tf.stack([kept_lengths, noise_lengths], axis=1), [-1])
    return tf.repeat(tf.tile([False, True], [num_spans]), lengths)[:length]


def corrupt(tokens: Tensor, noise_mask: Tensor, top_sentinel: int) -> tuple[Tensor, Tensor]:
    """Split tokens into inputs and targets; neither ends in eos.

    `corrupt_reference` is the same in plain loops.

    Args:
      tokens: int32 [length].
      noise_mask: bool [length].
      top_sentinel: id of the first sentinel; the following ones descend.

    Returns:
      inputs int32 [inputs] and targets int32 [targets].
    """
    _, tf = _seqio_and_tensorflow()

    def with_sentinels(dropped: Tensor) -> Tensor:
        starts = dropped & ~tf.concat([[False], dropped[:-1]], axis=0)
        sentinels = top_sentinel + 1 - tf.cumsum(tf.cast(starts, tokens.dtype))
        return tf.boolean_mask(tf.where(starts, sentinels, tokens), starts | ~dropped)

    return with_sentinels(noise_mask), with_sentinels(~noise_mask)


def corrupt_reference(
    tokens: Int32[np.ndarray, "length"],
    noise_mask: Bool[np.ndarray, "length"],
    top_sentinel: int,
) -> tuple[Int32[np.ndarray, "inputs"], Int32[np.ndarray, "targets"]]:
    """`corrupt` token by token in numpy: the reference that the tests compare with."""
    sides = []
    for drop_noise in (True, False):
        kept: list[int] = []
        sentinel = top_sentinel
        previous_dropped = False
        for token, noise in zip(tokens.tolist(), noise_mask.tolist(), strict=True):
            dropped = noise == drop_noise
            if not dropped:
                kept.append(token)
            elif not previous_dropped:
                kept.append(sentinel)
                sentinel -= 1
            previous_dropped = dropped
        sides.append(np.array(kept, np.int32))
    return sides[0], sides[1]


def t5x_span_corruption(
    dataset: Dataset,
    sequence_length: Mapping[str, int],
    output_features: OutputFeatures,
    *,
    drop_short: bool = False,
    noise_density: float = NOISE_DENSITY,
    mean_span_length: float = MEAN_SPAN_LENGTH,
) -> Dataset:
    """Concatenate documents, splits them to full length, corrupts.

    Args:
      dataset: `tf.data.Dataset` with tokens `targets`, int32 [tokens], no eos.
      sequence_length: lengths of `inputs` and `targets`, eos included.
      output_features: seqio features; the vocabulary of `targets` gives the sentinels.
      drop_short: leave out the shorter example at the end of each 128 documents, so that none has
        padding. T5 keeps it.
      noise_density: share of the tokens that are noise.
      mean_span_length: mean length of a noise span.

    Returns:
      `tf.data.Dataset` with `inputs` and `targets`, without eos: `append_eos_after_trim` is next.

    Raises:
      ValueError: `targets` is too short for `inputs`, or there are too few sentinels.
    """
    seqio, tf = _seqio_and_tensorflow()

    num_tokens = _checked_lengths(
        sequence_length, output_features, noise_density, mean_span_length, closing_sentinels=0
    )

    @seqio.map_over_dataset(num_seeds=1)
    def random_chunk(example, seed):
        tokens = example["targets"]
        length = tf.cast(tf.size(tokens), tf.float32)
        num_chunks = tf.cast(tf.math.ceil(length / float(_MAX_DOCUMENT_TOKENS)), tf.int32)
        chunk_seed = tf.random.experimental.stateless_split(seed)[1]
        chunk = tf.random.stateless_uniform([], chunk_seed, maxval=num_chunks, dtype=tf.int32)
        start = chunk * _MAX_DOCUMENT_TOKENS
        return {"targets": tokens[start : start + _MAX_DOCUMENT_TOKENS]}

    # Splitting draws nothing, but in T5 it uses up a seed: without it the masks would differ.
    @seqio.map_over_dataset(num_seeds=1)
    def segments(example, seed):
        del seed
        tokens = example["targets"]
        starts = tf.data.Dataset.range(0, tf.size(tokens, tf.int64), num_tokens)
        return starts.map(lambda start: {"targets": tokens[start : start + num_tokens]})

    dataset = dataset.filter(lambda example: tf.size(example["targets"]) > 0)
    dataset = random_chunk(dataset)
    dataset = dataset.ragged_batch(_DOCUMENTS_PER_GROUP)
    dataset = dataset.map(lambda group: {"targets": group["targets"].flat_values})
    dataset = segments(dataset).flat_map(lambda parts: parts)
    # Short ones are dropped last: dropped earlier, they would shift the others' seeds.
    dataset = _denoise(dataset, output_features, noise_density, mean_span_length)
    if drop_short:
        dataset = dataset.filter(lambda example: example["num_tokens"] == num_tokens)
    return dataset.map(lambda example: {key: example[key] for key in ("inputs", "targets")})


def paper_span_corruption(
    dataset: Dataset,
    sequence_length: Mapping[str, int],
    output_features: OutputFeatures,
    *,
    noise_density: float = NOISE_DENSITY,
    mean_span_length: float = MEAN_SPAN_LENGTH,
) -> Dataset:
    """Corrupt each document alone and skip those that are too long for `inputs`.

    With `inputs` 512 a document may have 568 tokens, eos included. Empty documents are skipped.

    Args:
      dataset: `tf.data.Dataset` with tokens `targets`, int32 [tokens], no eos.
      sequence_length: lengths of `inputs` and `targets`.
      output_features: seqio features; the vocabulary of `targets` gives sentinels and eos.
      noise_density: share of the tokens that are noise.
      mean_span_length: mean length of a noise span.

    Returns:
      `tf.data.Dataset` with `inputs`, which end in eos, and `targets`, which end in a sentinel:
      complete, so nothing is to be appended.

    Raises:
      ValueError: `targets` is too short for `inputs`, or there are too few sentinels.
    """
    _, tf = _seqio_and_tensorflow()

    num_tokens = _checked_lengths(
        sequence_length, output_features, noise_density, mean_span_length, closing_sentinels=1
    )
    vocabulary = output_features["targets"].vocabulary

    def append_eos(example):
        return {"targets": tf.concat([example["targets"], [vocabulary.eos_id]], axis=0)}

    def close(example):
        closing = vocabulary.vocab_size - 1 - example["num_spans"]
        return {
            "inputs": tf.concat([example["inputs"], [vocabulary.eos_id]], axis=0),
            "targets": tf.concat([example["targets"], [closing]], axis=0),
        }

    dataset = dataset.map(append_eos, num_parallel_calls=tf.data.AUTOTUNE)
    dataset = dataset.filter(
        lambda example: (
            (tf.size(example["targets"]) > 1) & (tf.size(example["targets"]) <= num_tokens)
        )
    )
    dataset = _denoise(dataset, output_features, noise_density, mean_span_length)
    return dataset.map(close, num_parallel_calls=tf.data.AUTOTUNE)


def _seqio_and_tensorflow() -> tuple[Any, Any]:
    # Untyped on purpose: the stubs that type checkers have for TensorFlow lack what is used here.
    return text_packages.seqio(), text_packages.tensorflow()


def _denoise(
    dataset: Dataset, output_features: OutputFeatures, noise_density: float, mean_span: float
) -> Dataset:
    """Add `inputs`, `targets`, `num_tokens` (raw) and `num_spans` to each example."""
    seqio, tf = _seqio_and_tensorflow()

    top_sentinel = output_features["targets"].vocabulary.vocab_size - 1

    @seqio.map_over_dataset(num_seeds=1)
    def denoise(example, seed):
        tokens = example["targets"]
        # T5 splits six: mask, inputs and targets get two each, and only the mask draws.
        seeds = tf.unstack(tf.random.experimental.stateless_split(seed, 6))[:2]
        mask = random_spans_mask(
            tf.size(tokens), seeds, noise_density=noise_density, mean_span_length=mean_span
        )
        inputs, targets = corrupt(tokens, mask, top_sentinel)
        num_spans = tf.size(targets) - tf.reduce_sum(tf.cast(mask, tf.int32))
        return {
            "inputs": inputs,
            "targets": targets,
            "num_tokens": tf.size(tokens),
            "num_spans": num_spans,
        }

    return denoise(dataset)


def _checked_lengths(
    sequence_length: Mapping[str, int],
    output_features: OutputFeatures,
    noise_density: float,
    mean_span_length: float,
    *,
    closing_sentinels: int,
) -> int:
    num_tokens, targets_length = corruption_lengths(
        sequence_length["inputs"], noise_density=noise_density, mean_span_length=mean_span_length
    )
    if sequence_length["targets"] < targets_length:
        raise ValueError(
            f"targets_length is {sequence_length['targets']}; inputs_length "
            f"{sequence_length['inputs']} gives targets of {targets_length}: raise it to that."
        )
    num_sentinels = sentinel_range(output_features["targets"].vocabulary)[1]
    num_needed = round(round(num_tokens * noise_density) / mean_span_length) + closing_sentinels
    if num_needed > num_sentinels:
        raise ValueError(
            f"inputs_length {sequence_length['inputs']} needs {num_needed} sentinels; the "
            f"vocabulary has {num_sentinels}. Lower inputs_length."
        )
    return num_tokens


def _check_noise(noise_density: float, mean_span_length: float) -> None:
    if not (
        0 < noise_density < 1
        and mean_span_length >= 1
        and noise_density / mean_span_length <= 1 - noise_density
    ):
        raise ValueError(
            f"noise_density {noise_density} with mean_span_length {mean_span_length}; needed are a "
            "density between 0 and 1, a span length of at least 1, and a kept token for each span."
        )
