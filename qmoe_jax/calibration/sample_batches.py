"""Samples in batches of similar length, in few padded shapes, so that few programs are compiled."""

import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int

_LENGTH_STEP = 64


@dataclasses.dataclass(frozen=True)
class SampleBatch:
    """Which samples go through the dense part of a layer together.

    Attributes:
      samples: int64 [at most batch_size], indices into the list buffers.
      encoder_length: padded length of the inputs.
      decoder_length: padded length of the targets.
      batch_size: rows of the padded batch; those past the samples are padding.
    """

    samples: Int[np.ndarray, "batch"]
    encoder_length: int
    decoder_length: int
    batch_size: int


def padded_length(longest: int, full_length: int) -> int:
    """Return the length that a batch is padded to: few lengths, so that few programs are compiled.

    Args:
      longest: tokens of its longest sample.
      full_length: upper bound.
    """
    return min(full_length, -(-max(longest, 1) // _LENGTH_STEP) * _LENGTH_STEP)


def plan_sample_batches(
    encoder_lengths: Int[np.ndarray, "samples"],
    decoder_lengths: Int[np.ndarray, "samples"],
    *,
    batch_size: int,
    full_encoder_length: int,
    full_decoder_length: int,
    first_sample: int = 0,
) -> Iterator[SampleBatch]:
    """Batches of samples, sorted by length (stable), so that little of a batch is padding.

    Args:
      encoder_lengths: tokens of each sample's inputs.
      decoder_lengths: tokens of each sample's targets.
      batch_size: samples of a batch.
      full_encoder_length: upper bound of the padded lengths.
      full_decoder_length: upper bound of theirs.
      first_sample: number of the first of these samples in the list buffers.
    """
    order = np.lexsort((decoder_lengths, encoder_lengths))
    for start in range(0, len(order), batch_size):
        samples = order[start : start + batch_size]
        yield SampleBatch(
            samples + first_sample,
            padded_length(int(encoder_lengths[samples].max()), full_encoder_length),
            padded_length(int(decoder_lengths[samples].max()), full_decoder_length),
            batch_size,
        )
