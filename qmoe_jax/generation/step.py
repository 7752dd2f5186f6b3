"""The parts of autoregressive generation: encode once, then a position at a time over a cache.

`sampling` and `beam_search` hold the loops. They are T5X's, and so is the layout of the cache.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from qmoe_jax.models.attention import PROJECTED
from qmoe_jax.models.switch import SwitchTransformer
from qmoe_jax.varying import varying_as

Variables = Mapping[str, Any]
Cache = Any

# What a loop needs of a model: the current tokens [rows, 1] and the cache to the logits of the next
# tokens, float32 [rows, vocab], and the advanced cache.
Step = Callable[[Array, Cache], tuple[Array, Cache]]


class Encoded(NamedTuple):
    """What decoding steps need of the encoder.

    Attributes:
      tokens: the encoder's input, int [batch, encoder_length].
      projected: keys and values of every layer's attention to the encoder.
    """

    tokens: Array
    projected: Any


class Generated(NamedTuple):
    """What was generated, the best of each example last, as T5X returns it.

    Attributes:
      tokens: int32 [batch, num_decodes, max_decode_length]; 0 after eos.
      scores: float32 [batch, num_decodes], ascending.
    """

    tokens: Array
    scores: Array


def encode_prompts(
    module: SwitchTransformer,
    variables: Variables,
    encoder_input_tokens: Int[Array, "batch encoder_length"],
) -> Encoded:
    """Run the encoder, and project its outputs to the decoder's keys and values."""
    encoded: Any = module.apply(
        variables, encoder_input_tokens, enable_dropout=False, method="encode"
    )
    begin = jnp.zeros((encoder_input_tokens.shape[0], 1), jnp.int32)
    # Of this pass only the projections are kept; XLA removes the rest.
    _, state = module.apply(
        variables,
        encoded,
        encoder_input_tokens,
        begin,
        begin,
        enable_dropout=False,
        method="decode",
        mutable=[PROJECTED],
    )
    # Without a barrier XLA moves the projections' transposition into the loop over steps.
    return Encoded(encoder_input_tokens, lax.optimization_barrier(state[PROJECTED]))


def empty_cache(
    module: SwitchTransformer,
    variables: Variables,
    encoded: Encoded,
    max_decode_length: int,
    num_decodes: int = 1,
) -> Cache:
    """Make the zeroed `cache` for batch * num_decodes rows of `max_decode_length` positions.

    Only shapes are evaluated: no forward pass is spent on it.
    """
    rows = encoded.tokens.shape[0] * num_decodes
    tokens = jax.ShapeDtypeStruct((rows, max_decode_length), jnp.int32)

    def create(tokens: Array) -> Any:
        return _decode(
            module,
            {**variables, PROJECTED: encoded.projected},
            _no_outputs(module, encoded, num_decodes),
            jnp.repeat(encoded.tokens, num_decodes, axis=0),
            tokens,
            max_decode_length,
        )

    _, state = jax.eval_shape(create, tokens)
    cache = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), state["cache"])
    return varying_as(cache, (variables, encoded))


def decode_step(
    module: SwitchTransformer,
    variables: Variables,
    encoded: Encoded,
    cache: Cache,
    tokens: Int[Array, "rows 1"],
    max_decode_length: int,
) -> tuple[Float[Array, "rows vocab"], Cache]:
    """One decoding step: logits of the next token, and the advanced cache.

    Args:
      module: the model.
      variables: its parameters, dense or codes.
      encoded: of `encode_prompts`.
      cache: of `empty_cache` or of the step before.
      tokens: the current token of each row; rows of one example stand next to each other.
      max_decode_length: what the cache was made for.
    """
    num_decodes = tokens.shape[0] // max(encoded.tokens.shape[0], 1)
    logits, state = _decode(
        module,
        {**variables, "cache": cache, PROJECTED: encoded.projected},
        _no_outputs(module, encoded, num_decodes),
        jnp.repeat(encoded.tokens, num_decodes, axis=0),
        tokens,
        max_decode_length,
    )
    return logits[:, 0], state["cache"]


def model_step(
    module: SwitchTransformer, variables: Variables, encoded: Encoded, max_decode_length: int
) -> Step:
    """`decode_step` of a model, as the loops take it."""
    return lambda tokens, cache: decode_step(
        module, variables, encoded, cache, tokens, max_decode_length
    )


def _no_outputs(module: SwitchTransformer, encoded: Encoded, num_decodes: int) -> Array:
    """Stand for the encoder's outputs where their projections are at hand; never read."""
    batch, length = encoded.tokens.shape
    return jnp.zeros((batch * num_decodes, length, module.config.embed_dim), module.dtype)


def _decode(
    module: SwitchTransformer,
    variables: Variables,
    encoded: Array,
    encoder_input_tokens: Array,
    tokens: Array,
    max_decode_length: int,
) -> Any:
    """Return the module's `decode` with its cache: logits, and the collections that changed."""
    return module.apply(
        variables,
        encoded,
        encoder_input_tokens,
        tokens,
        tokens,  # targets: only their shape matters while decoding
        enable_dropout=False,
        decode=True,
        max_decode_length=max_decode_length,
        method="decode",
        mutable=["cache"],
    )
