"""Autoregressive generation with a KV cache: one compiled step, one compilation per length."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from qmoe_jax.models.switch import SwitchTransformer

Variables = Mapping[str, Any]


def empty_cache(
    module: SwitchTransformer,
    variables: Variables,
    encoded: Float[Array, "batch encoder_length embed"],
    encoder_input_tokens: Int[Array, "batch encoder_length"],
    max_decode_length: int,
) -> Mapping[str, Any]:
    """The zeroed collection `cache` for `max_decode_length` positions.

    Only shapes are evaluated: no forward pass is spent on it.
    """
    tokens = jnp.zeros((encoder_input_tokens.shape[0], max_decode_length), jnp.int32)
    _, state = jax.eval_shape(
        lambda: _decode(module, variables, encoded, encoder_input_tokens, tokens, max_decode_length)
    )
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), state["cache"])


def decode_step(
    module: SwitchTransformer,
    variables: Variables,
    cache: Mapping[str, Any],
    encoded: Float[Array, "batch encoder_length embed"],
    encoder_input_tokens: Int[Array, "batch encoder_length"],
    tokens: Int[Array, "batch 1"],
    max_decode_length: int,
) -> tuple[Float[Array, "batch vocab"], Mapping[str, Any]]:
    """One decoding step: logits of the next token, and the advanced cache."""
    logits, state = _decode(
        module,
        {**variables, "cache": cache},
        encoded,
        encoder_input_tokens,
        tokens,
        max_decode_length,
    )
    return logits[:, 0], state["cache"]


def _decode(
    module: SwitchTransformer,
    variables: Variables,
    encoded: Array,
    encoder_input_tokens: Array,
    tokens: Array,
    max_decode_length: int,
) -> Any:
    """The module's `decode` with its cache: logits, and the collections that changed."""
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


@functools.partial(jax.jit, static_argnames=("module", "max_decode_length", "eos_id"))
def greedy_generate(
    module: SwitchTransformer,
    variables: Variables,
    encoder_input_tokens: Int[Array, "batch encoder_length"],
    *,
    max_decode_length: int,
    eos_id: int = 1,
) -> Int[Array, "batch max_decode_length"]:
    """The most probable token at each step, as T5X's `temperature_sample` at temperature 0.

    Args:
      module: the model (static).
      variables: its parameters, dense or codes.
      encoder_input_tokens: ids; 0 is padding.
      max_decode_length: number of tokens to generate at most (static).
      eos_id: ends a sequence; what follows is 0 (static).

    Returns:
      The generated ids. Generation stops early when every sequence has ended.
    """
    encoded: Any = module.apply(
        variables, encoder_input_tokens, enable_dropout=False, method="encode"
    )
    batch = encoder_input_tokens.shape[0]
    cache = empty_cache(module, variables, encoded, encoder_input_tokens, max_decode_length)

    def running(state: tuple) -> Array:
        step, _, _, ended, _ = state
        return (step < max_decode_length) & ~jnp.all(ended)

    def advance(state: tuple) -> tuple:
        step, current, generated, ended, cache = state
        logits, cache = decode_step(
            module, variables, cache, encoded, encoder_input_tokens, current, max_decode_length
        )
        token = jnp.where(ended, 0, jnp.argmax(logits, axis=-1).astype(jnp.int32))
        generated = lax.dynamic_update_slice(generated, token[:, None], (0, step))
        return step + 1, token[:, None], generated, ended | (token == eos_id), cache

    start = (
        jnp.zeros((), jnp.int32),
        jnp.zeros((batch, 1), jnp.int32),
        jnp.zeros((batch, max_decode_length), jnp.int32),
        jnp.zeros((batch,), bool),
        cache,
    )
    return lax.while_loop(running, advance, start)[2]
