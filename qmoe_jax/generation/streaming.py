"""Generation that hands out each token as it comes: one compiled step, its cache in place."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from qmoe_jax.generation.blanks import Blanks
from qmoe_jax.generation.sampling import SamplingState, advance, start_sampling
from qmoe_jax.generation.step import (
    Encoded,
    Variables,
    empty_cache,
    encode_prompts,
    model_step,
)
from qmoe_jax.models.switch import SwitchTransformer


@functools.partial(jax.jit, static_argnames=("module", "max_decode_length"))
def _start_stream(
    module: SwitchTransformer,
    variables: Variables,
    encoder_input_tokens: Int[Array, "batch encoder_length"],
    key: Array,
    blanks: Blanks | None,
    max_decode_length: int,
) -> tuple[Encoded, SamplingState]:
    encoded = encode_prompts(module, variables, encoder_input_tokens)
    cache = empty_cache(module, variables, encoded, max_decode_length)
    return encoded, start_sampling(cache, encoder_input_tokens.shape[0], key, blanks)


@functools.partial(
    jax.jit,
    static_argnames=("module", "max_decode_length"),
    donate_argnames="state",
)
def _stream_step(
    module: SwitchTransformer,
    variables: Variables,
    encoded: Encoded,
    state: SamplingState,
    sampling: dict[str, Array],
    *,
    max_decode_length: int,
    eos_id: Int[Array, ""] | int,
) -> tuple[SamplingState, Int[Array, "batch"], Bool[Array, ""]]:
    step = model_step(module, variables, encoded, max_decode_length)
    new = advance(step, state, max_decode_length=max_decode_length, eos_id=eos_id, **sampling)
    return new, new.tokens[:, 0], jnp.all(new.ended)


def stream_tokens(
    module: SwitchTransformer,
    variables: Variables,
    encoder_input_tokens: Int[Array | np.ndarray, "batch encoder_length"],
    key: Array | None = None,
    *,
    max_decode_length: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 0.0,
    eos_id: Int[Array, ""] | int = 1,
    blanks: Blanks | None = None,
) -> Iterator[np.ndarray]:
    """Yield each step's tokens, int32 [batch], as soon as they are there; 0 after eos.

    The tokens are those of `sample_generate` with one decode per example and the same key. One
    step is compiled for all positions, and the cache is updated in place (donated).

    Args:
      module: the model.
      variables: its parameters, dense or codes.
      encoder_input_tokens: ids; 0 is padding.
      key: a PRNG key; needed only where the temperature is not 0.
      max_decode_length: number of tokens to generate at most.
      temperature: as in `sample_token`, like `top_k` and `top_p`; 0 is greedy.
      top_k: 0 keeps all tokens.
      top_p: 0 keeps all tokens.
      eos_id: ends a sequence.
      blanks: of the prompts; a sequence ends when they are filled too.
    """
    key = jax.random.key(0) if key is None else key
    sampling = {
        "temperature": jnp.asarray(temperature, jnp.float32),
        "top_k": jnp.asarray(top_k, jnp.int32),
        "top_p": jnp.asarray(top_p, jnp.float32),
    }
    encoded, state = _start_stream(
        module,
        variables,
        jnp.asarray(encoder_input_tokens),
        jnp.array(key),
        blanks,
        max_decode_length,
    )
    ended = False
    while not ended:
        state, tokens, all_ended = _stream_step(
            module,
            variables,
            encoded,
            state,
            sampling,
            max_decode_length=max_decode_length,
            eos_id=eos_id,
        )
        yield np.asarray(tokens)
        ended = bool(all_ended)
