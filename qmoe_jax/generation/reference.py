"""The reference of generation: no cache; each step runs the decoder over the whole prefix again."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from qmoe_jax.generation.step import Variables
from qmoe_jax.models.switch import SwitchTransformer, cross_attention_mask, decoder_mask


def next_token_logits(
    module: SwitchTransformer,
    variables: Variables,
    encoded: Float[Array, "batch encoder_length embed"],
    encoder_input_tokens: Int[Array, "batch encoder_length"],
    generated: Int[Array, "batch length"],
    position: Int[Array, ""] | int,
) -> Float[Array, "batch vocab"]:
    """Logits of the token at `position`, from the tokens before it, teacher-forced.

    The decoder runs over all of `generated`, so that one program serves every position; what stands
    at `position` and behind does not count. Logits are computed for `position` alone.
    """
    inputs = jnp.pad(generated, ((0, 0), (1, 0)))[:, :-1]

    def last(model: SwitchTransformer) -> Array:
        # Up to the position everything is a token, also the 0 that begins a sequence or follows its
        # eos; behind it there is padding, which no expert computes.
        prefix = jnp.broadcast_to(jnp.arange(inputs.shape[1]) <= position, inputs.shape)
        prefix = prefix.astype(jnp.int32)
        hidden = model.decoder(
            model.token_embedder(inputs),
            prefix,
            encoded,
            decoder_mask(prefix),
            cross_attention_mask(prefix, encoder_input_tokens),
        )
        return model.logits(lax.dynamic_slice_in_dim(hidden, position, 1, axis=1))

    logits: Any = module.apply(variables, method=last)
    return logits[:, 0]


@functools.partial(jax.jit, static_argnames=("module", "max_decode_length"))
def greedy_generate_reference(
    module: SwitchTransformer,
    variables: Variables,
    encoder_input_tokens: Int[Array, "batch encoder_length"],
    *,
    max_decode_length: int,
    eos_id: Int[Array, ""] | int = 1,
) -> Int[Array, "batch max_decode_length"]:
    """`sampling.greedy_generate`, recomputing the prefix. The encoder runs once here too.

    Equal for dropless routing. With a capacity factor the decoder's token groups are other ones
    here, as between T5X's decoding and its teacher forcing.
    """
    encoded: Any = module.apply(
        variables, encoder_input_tokens, enable_dropout=False, method="encode"
    )
    batch = encoder_input_tokens.shape[0]

    def running(state: tuple[Array, Array, Array]) -> Array:
        position, _, ended = state
        return (position < max_decode_length) & ~jnp.all(ended)

    def advance(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        position, generated, ended = state
        logits = next_token_logits(
            module, variables, encoded, encoder_input_tokens, generated, position
        )
        token = jnp.where(ended, 0, jnp.argmax(logits, axis=-1).astype(jnp.int32))
        generated = lax.dynamic_update_slice(generated, token[:, None], (0, position))
        return position + 1, generated, ended | (token == eos_id)

    start = (
        jnp.zeros((), jnp.int32),
        jnp.zeros((batch, max_decode_length), jnp.int32),
        jnp.zeros((batch,), bool),
    )
    return lax.while_loop(running, advance, start)[1]
