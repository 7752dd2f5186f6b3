"""Calibration and validation examples as the block loop walks through them."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int

from qmoe_jax.calibration.sample_batches import SampleBatch, plan_sample_batches
from qmoe_jax.calibration.tokens import TokenBatch, TokenFile, TokenMetadata
from qmoe_jax.errors import TokensError

Stack = Literal["encoder", "decoder"]


@dataclasses.dataclass(frozen=True)
class Samples:
    """Calibration samples, then validation samples, as the list buffers number them.

    Attributes:
      tokens: all examples.
      num_calibration: the first so many calibrate, the rest validate.
      lengths: int64 [samples] of each stack.
      enters_hessian: bool [rows of the list buffer] of each stack.
      metadata: of the calibration tokens.
    """

    tokens: TokenBatch
    num_calibration: int
    lengths: dict[Stack, Int[np.ndarray, "samples"]]
    enters_hessian: dict[Stack, Bool[np.ndarray, "rows"]]
    metadata: TokenMetadata

    @classmethod
    def build(
        cls, calibration: TokenFile, validation: TokenFile | None, *, premask_sentinels: bool
    ) -> "Samples":
        """Put calibration and validation examples behind one another.

        Raises:
          TokensError: no example, an empty one, or padding before a token.
        """
        files = [calibration] if validation is None else [calibration, validation]
        if len(calibration) == 0:
            raise TokensError("there are no calibration examples; num_examples must be at least 1")
        tokens = join_tokens([file.tokens for file in files])
        encoder, target = tokens.encoder_input_tokens, tokens.decoder_target_tokens
        lengths: dict[Stack, np.ndarray] = {}
        enters: dict[Stack, np.ndarray] = {}
        stacks: dict[Stack, np.ndarray] = {"encoder": encoder, "decoder": target}
        for stack, ids in stacks.items():
            real = ids > 0
            lengths[stack] = _prefix_lengths(real, stack)
            usable = real.copy()
            if premask_sentinels:
                sentinel = calibration.metadata.is_sentinel(ids)
                usable &= ~sentinel
                if stack == "decoder":
                    # A decoder position predicts ids[position]; the last predicts the end.
                    usable[np.arange(len(ids)), lengths[stack] - 1] = False
            usable[len(calibration) :] = False
            enters[stack] = usable[real]
        return cls(tokens, len(calibration), lengths, enters, calibration.metadata)

    def batches(self, batch_size: int) -> Iterator[SampleBatch]:
        """Calibration samples are never batched with validation samples."""
        bounds = (0, self.num_calibration, len(self.tokens))
        for start, stop in itertools.pairwise(bounds):
            yield from plan_sample_batches(
                self.lengths["encoder"][start:stop],
                self.lengths["decoder"][start:stop],
                batch_size=batch_size,
                full_encoder_length=self.tokens.encoder_input_tokens.shape[1],
                full_decoder_length=self.tokens.decoder_input_tokens.shape[1],
                first_sample=start,
            )

    def ids(self, name: str, batch: SampleBatch, length: int) -> Int[np.ndarray, "batch length"]:
        """Return a token array of a sample batch, padded to its shape."""
        padded = np.zeros((batch.batch_size, length), np.int32)
        padded[: len(batch.samples)] = getattr(self.tokens, name)[batch.samples, :length]
        return padded


def join_tokens(parts: list[TokenBatch]) -> TokenBatch:
    """All examples in one batch, padded to the longest."""
    joined = {}
    for name in parts[0].arrays():
        arrays = [part.arrays()[name] for part in parts]
        length = max(array.shape[1] for array in arrays)
        joined[name] = np.concatenate(
            [np.pad(array, ((0, 0), (0, length - array.shape[1]))) for array in arrays]
        )
    return TokenBatch(**joined, num_real=len(joined["encoder_input_tokens"]))


def _prefix_lengths(real: Bool[np.ndarray, "samples length"], stack: str) -> np.ndarray:
    lengths = real.sum(axis=1)
    if not np.array_equal(real, np.arange(real.shape[1])[None] < lengths[:, None]):
        raise TokensError(
            f"some {stack} examples have padding (id 0) before their last token; "
            "each example must be a run of tokens followed by padding"
        )
    if (lengths == 0).any():
        raise TokensError(
            f"example {int(np.flatnonzero(lengths == 0)[0])} has no {stack} token; leave it out"
        )
    return lengths.astype(np.int64)
