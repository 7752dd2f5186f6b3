"""A small recurrent net in place of a decoder: its logits depend on the whole prefix."""

import jax
import jax.numpy as jnp
import numpy as np


class ToyDecoder:
    """tanh(state A + embedding[token]) B, float32; the state is its cache.

    Attributes:
      first: float32 [examples, width], the state of each example before its first token.
    """

    def __init__(self, vocab: int, seed: int, eos_bias: float, examples: int, width: int = 8):
        rng = np.random.default_rng(seed)
        self.mixing = rng.normal(size=(width, width)).astype(np.float32) / width**0.5
        self.embedding = rng.normal(size=(vocab, width)).astype(np.float32)
        self.output = 1.5 * rng.normal(size=(width, vocab)).astype(np.float32)
        self.bias = np.zeros(vocab, np.float32)
        self.bias[1] = eos_bias
        self.first = rng.normal(size=(examples, width)).astype(np.float32)

    def only(self, example: int) -> "ToyDecoder":
        """The same net with one of the examples."""
        other = ToyDecoder.__new__(ToyDecoder)
        other.__dict__ = {**self.__dict__, "first": self.first[example : example + 1]}
        return other

    def cache(self, rows: int, num_decodes: int) -> dict:
        """The cache before the first step, the rows of an example next to each other."""
        first = jnp.repeat(jnp.asarray(self.first), num_decodes, axis=0)
        assert len(first) == rows
        return {"layer": {"state": first, "cache_index": jnp.zeros((), jnp.int32)}}

    def step(self, tokens, cache):
        """Logits [rows, vocab] and the advanced cache, for tokens [rows, 1]."""
        layer = cache["layer"]
        mixed = jnp.dot(layer["state"], self.mixing, precision=jax.lax.Precision.HIGHEST)
        state = jnp.tanh(mixed + jnp.asarray(self.embedding)[tokens[:, 0]])
        logits = jnp.dot(state, self.output, precision=jax.lax.Precision.HIGHEST) + self.bias
        return logits, {"layer": {"state": state, "cache_index": layer["cache_index"] + 1}}

    def logits(self, example: int, prefix) -> np.ndarray:
        """Logits after a prefix, in NumPy, from the beginning."""
        state = self.first[example]
        for token in (0, *prefix):
            state = np.tanh(state @ self.mixing + self.embedding[token])
        return state @ self.output + self.bias

    def log_probs(self, example: int, prefix) -> list[float]:
        """Log probabilities of the next token after a prefix, in NumPy."""
        logits = self.logits(example, prefix).astype(np.float64)
        return (logits - np.log(np.sum(np.exp(logits)))).tolist()
