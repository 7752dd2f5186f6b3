"""Which examples a step trains on: a function of the seed and the step, so nothing is kept."""

import functools

import numpy as np
from jaxtyping import Int, Int32

from qmoe_jax.calibration.tokens import TokenFile


class ExampleOrder:
    """All examples in a random order, then again in another, without end."""

    def __init__(self, num_examples: int, batch_size: int, seed: int):
        """Begin an order.

        Args:
          num_examples: how many there are.
          batch_size: examples of a step.
          seed: of the order.
        """
        self._count, self._batch, self._seed = num_examples, batch_size, seed
        self._epoch = functools.lru_cache(maxsize=2)(self._shuffled)

    def _shuffled(self, epoch: int) -> Int[np.ndarray, "examples"]:
        return np.random.default_rng([self._seed, epoch]).permutation(self._count)

    def indices(self, step: int) -> Int[np.ndarray, "batch"]:
        """Return the examples of a step, from 0 on."""
        places = np.arange(step * self._batch, (step + 1) * self._batch)
        return np.array([self._epoch(int(p) // self._count)[p % self._count] for p in places])

    def batch(
        self, tokens: TokenFile, step: int, microbatches: int
    ) -> dict[str, Int32[np.ndarray, "microbatches batch length"]]:
        """Return the arrays of a step, cut into microbatches."""
        chosen = self.indices(step)
        return {
            name: array[chosen].reshape(microbatches, -1, array.shape[1])
            for name, array in tokens.tokens.arrays().items()
        }
