"""A token file as a seqio task, so that T5X's programs see the tokens that ours see."""

import os
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from qmoe_jax.calibration.tokens import TokenFile, read_tokens

SPLIT = "validation"


def token_file_vocabulary(path: str | os.PathLike[str]) -> seqio.Vocabulary:
    """Make a vocabulary that leaves ids as they are, of the size that the tokens were made with.

    T5X wants one of the model and of the task, and compares them. For readable predictions give
    both the `seqio.SentencePieceVocabulary` instead.

    Args:
      path: token file.

    Raises:
      TokensError: it is missing or damaged.
    """
    metadata = read_tokens(path).metadata
    return seqio.PassThroughVocabulary(metadata.vocabulary_size, metadata.eos_id)


def token_file_task(
    path: str | os.PathLike[str],
    vocabulary: seqio.Vocabulary | None = None,
    name: str = "qmoe_jax_token_file",
    num_examples: int | None = None,
) -> str:
    """Register a seqio task with the examples of a token file, and return its name.

    In a gin file: `MIXTURE_OR_TASK_NAME = @tasks.token_file_task()`. Its only split is
    "validation". Its metric `loss_per_target_token` is the mean cross entropy in nats, as
    `qmoe-jax evaluate` prints it.

    Args:
      path: token file, of `qmoe-jax prepare-tokens`.
      vocabulary: of the task's features; `token_file_vocabulary(path)` where None.
      name: of the task; registered anew if it is there.
      num_examples: the first so many; all where None.

    Raises:
      TokensError: the file is missing or damaged.
    """
    file = read_tokens(path)
    file = file if num_examples is None else file[:num_examples]
    vocabulary = vocabulary or token_file_vocabulary(path)
    feature = seqio.Feature(vocabulary, add_eos=False, dtype=tf.int32)
    if name in seqio.TaskRegistry.names():
        seqio.TaskRegistry.remove(name)
    seqio.TaskRegistry.add(
        name,
        # seqio's own source does not fit seqio's own protocol to the letter.
        source=seqio.FunctionDataSource(  # pyright: ignore[reportArgumentType]
            lambda split, shuffle_files, seed=None: _dataset(file),
            splits=(SPLIT,),
            num_input_examples={SPLIT: len(file)},
            caching_permitted=False,
        ),
        preprocessors=[],
        output_features={"inputs": feature, "targets": feature},
        postprocess_fn=_count_targets,
        metric_fns=[loss_per_target_token],
    )
    return name


def loss_per_target_token(targets: list[Any], scores: list[Any]) -> dict[str, Any]:
    """Mean cross entropy of a target token in nats, and how many there were.

    Args:
      targets: number of target tokens of each example.
      scores: log likelihood of each example's targets.
    """
    num_targets = int(np.sum(targets, dtype=np.int64))
    loss = -float(np.sum(np.asarray(scores, np.float64))) / num_targets
    return {"loss_per_target_token": loss, "num_target_tokens": num_targets}


def _dataset(file: TokenFile) -> tf.data.Dataset:
    """Examples without their padding, `inputs` and `targets` int32 [length]."""
    tokens = file.tokens

    def examples() -> Any:
        for inputs, targets in zip(
            tokens.encoder_input_tokens, tokens.decoder_target_tokens, strict=True
        ):
            yield {"inputs": np.trim_zeros(inputs, "b"), "targets": np.trim_zeros(targets, "b")}

    ids = tf.TensorSpec([None], tf.int32)
    return tf.data.Dataset.from_generator(
        examples, output_signature={"inputs": ids, "targets": ids}
    )


def _count_targets(output: Any, example: Any = None, is_target: bool = False) -> Any:
    """seqio's postprocessing: of the targets, how many there are; of outputs, the outputs."""
    return int(np.count_nonzero(example["targets"])) if is_target else output
