"""Temperature sampling with top-k and top-p as T5X's `temperature_sample`; at 0 it is greedy.

Source of the semantics: t5x/decoding.py and t5x/binary_search.py. The same key gives the tokens
that T5X gives from the same logits. Not taken over: prompts for the decoder.
"""

import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from qmoe_jax.generation.blanks import Blanks, fill
from qmoe_jax.generation.step import (
    Cache,
    Generated,
    Step,
    Variables,
    empty_cache,
    encode_prompts,
    model_step,
)
from qmoe_jax.models.switch import SwitchTransformer
from qmoe_jax.varying import varying_as, varying_zeros

# T5X's minus infinity for masked logits and scores.
NEG_INF = -1.0e7
# At and below this temperature the most probable token is taken.
MIN_TEMPERATURE = 1e-4

Number = int | float | np.ndarray | Array


@flax.struct.dataclass
class SamplingState:
    """State between steps.

    Attributes:
      position: int32 scalar, how many tokens were generated.
      tokens: int32 [rows, 1], the current token of each row.
      ended: bool [rows], rows that generated eos or are full.
      log_prob: float32 [rows], of what was generated.
      key: for the next step.
      cache: of the model.
      blanks: where a row also ends when its blanks are filled; None where only eos ends it.
    """

    position: Array
    tokens: Array
    ended: Array
    log_prob: Array
    key: Array
    cache: Cache
    blanks: Blanks | None = None


def top_k_mask(
    logits: Float[Array, "rows vocab"], top_k: Int[Array, ""] | int
) -> Float[Array, "rows vocab"]:
    """Keep the `top_k` largest logits of a row, and those that tie with the smallest of them."""
    keys = _ordered_bits(logits)
    threshold = _largest_threshold(keys, jnp.ones_like(logits), jnp.asarray(top_k, jnp.float32))
    return jnp.where(keys >= threshold[:, None], logits, NEG_INF)


def top_p_mask(
    logits: Float[Array, "rows vocab"], top_p: Float[Array, ""] | float
) -> Float[Array, "rows vocab"]:
    """Keep the fewest most probable tokens that hold at least `top_p`; ties are kept together."""
    probabilities = jax.nn.softmax(logits, axis=-1)
    keys = _ordered_bits(probabilities)
    threshold = _largest_threshold(keys, probabilities, jnp.asarray(top_p, jnp.float32))
    return jnp.where(keys >= threshold[:, None], logits, NEG_INF)


def _ordered_bits(x: Float[Array, "rows vocab"]) -> UInt32[Array, "rows vocab"]:
    """Unsigned integers in the order of the floats; -0.0 counts as 0.0."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits >= sign, ~bits, bits | sign)


def _largest_threshold(
    keys: UInt32[Array, "rows vocab"],
    weights: Float[Array, "rows vocab"],
    min_weight: Float[Array, ""],
) -> UInt32[Array, "rows"]:
    """Return the largest t whose keys >= t weigh `min_weight` together; 0 where none does.

    Found bit by bit: 32 sums instead of a sort, at any vocabulary size.
    """

    def try_bit(i: Array, threshold: Array) -> Array:
        candidate = threshold | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        weight = jnp.sum(jnp.where(keys >= candidate[:, None], weights, 0.0), axis=-1)
        return jnp.where(weight >= min_weight, candidate, threshold)

    return lax.fori_loop(0, 32, try_bit, varying_zeros(keys.shape[:1], jnp.uint32, keys))


def sample_token(
    logits: Float[Array, "rows vocab"],
    key: Array,
    *,
    temperature: Number,
    top_k: Number = 0,
    top_p: Number = 0.0,
    rescale_log_probs: bool = True,
) -> tuple[Int[Array, "rows"], Float[Array, "rows"]]:
    """Return the next token of each row, and its log probability.

    Args:
      logits: of the next token.
      key: a PRNG key.
      temperature: divides the logits; 0 takes the most probable token (the lowest id on ties).
      top_k: keep this many tokens; 0 keeps all.
      top_p: keep tokens of this probability together; 0 keeps all. Applied after `top_k`.
      rescale_log_probs: whether temperature and masks count in the log probability (T5X's default;
        it is 0 at temperature 0 then); otherwise it is the model's own.
    """
    temperature = jnp.asarray(temperature, jnp.float32)
    top_k = jnp.asarray(top_k, jnp.int32)
    top_p = jnp.asarray(top_p, jnp.float32)

    def sample() -> tuple[Array, Array]:
        scaled = logits / jnp.maximum(temperature, MIN_TEMPERATURE)
        scaled = lax.cond(top_k > 0, lambda x: top_k_mask(x, top_k), lambda x: x, scaled)
        scaled = lax.cond(top_p > 0, lambda x: top_p_mask(x, top_p), lambda x: x, scaled)
        token = jax.random.categorical(key, scaled).astype(jnp.int32)
        return token, _log_prob(scaled if rescale_log_probs else logits, token)

    def most_probable() -> tuple[Array, Array]:
        token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        if rescale_log_probs:
            return token, varying_zeros(token.shape, jnp.float32, token)
        return token, _log_prob(logits, token)

    return lax.cond(temperature > MIN_TEMPERATURE, sample, most_probable)


def _log_prob(
    logits: Float[Array, "rows vocab"], token: Int[Array, "rows"]
) -> Float[Array, "rows"]:
    log_probs = jax.nn.log_softmax(logits)
    return jnp.take_along_axis(log_probs, token[:, None], axis=-1)[:, 0]


def start_sampling(
    cache: Cache, rows: int, key: Array, blanks: Blanks | None = None
) -> SamplingState:
    """Return the state before the first step: 0 is also the begin-of-sequence."""
    of_rows = (
        jnp.zeros((rows, 1), jnp.int32),
        jnp.zeros((rows,), bool),
        jnp.zeros((rows,), jnp.float32),
    )
    tokens, ended, log_prob = varying_as(of_rows, cache)
    blanks = varying_as(blanks, cache)
    return SamplingState(jnp.zeros((), jnp.int32), tokens, ended, log_prob, key, cache, blanks)


def advance(
    step: Step,
    state: SamplingState,
    *,
    max_decode_length: int,
    eos_id: Int[Array, ""] | int,
    **sampling: Any,
) -> SamplingState:
    """One step: the next token of every row, 0 where the row has ended.

    Args:
      step: the model.
      state: of `start_sampling` or of the step before.
      max_decode_length: number of tokens at which a row is full.
      eos_id: the token that ends a row.
      **sampling: of `sample_token`.
    """
    this_key, next_key = jax.random.split(state.key)
    logits, cache = step(state.tokens, state.cache)
    token, log_prob = sample_token(logits, this_key, **sampling)
    token = jnp.where(state.ended, 0, token)
    full = state.position + 1 >= max_decode_length
    ended = state.ended | (token == eos_id) | full
    blanks = state.blanks
    if blanks is not None:
        blanks, filled = fill(blanks, token)
        ended = ended | filled
    return SamplingState(
        position=state.position + 1,
        tokens=token[:, None],
        ended=ended,
        log_prob=state.log_prob + jnp.where(state.ended, 0.0, log_prob),
        key=next_key,
        cache=cache,
        blanks=blanks,
    )


def temperature_sample(
    step: Step,
    cache: Cache,
    rows: int,
    key: Array,
    *,
    max_decode_length: int,
    eos_id: Int[Array, ""] | int = 1,
    blanks: Blanks | None = None,
    **sampling: Any,
) -> tuple[Int[Array, "rows max_decode_length"], Float[Array, "rows"]]:
    """Generate every row until it has ended: tokens, 0 after eos, and log probabilities.

    Args:
      step: the model.
      cache: its empty cache.
      rows: number of rows.
      key: a PRNG key.
      max_decode_length: number of tokens to generate at most.
      eos_id: the token that ends a row.
      blanks: of the rows' prompts; a row ends when they are filled too.
      **sampling: of `sample_token`.
    """

    def running(carry: tuple[SamplingState, Array]) -> Bool[Array, ""]:
        return ~jnp.all(carry[0].ended)

    def body(carry: tuple[SamplingState, Array]) -> tuple[SamplingState, Array]:
        state, generated = carry
        new = advance(step, state, max_decode_length=max_decode_length, eos_id=eos_id, **sampling)
        return new, lax.dynamic_update_slice(generated, new.tokens, (0, state.position))

    generated = varying_as(jnp.zeros((rows, max_decode_length), jnp.int32), cache)
    start = start_sampling(cache, rows, key, blanks), generated
    state, generated = lax.while_loop(running, body, start)
    return generated, state.log_prob


_STATIC = ("module", "max_decode_length", "num_decodes", "rescale_log_probs")


@functools.partial(jax.jit, static_argnames=_STATIC)
def sample_generate(
    module: SwitchTransformer,
    variables: Variables,
    encoder_input_tokens: Int[Array, "batch encoder_length"],
    key: Array,
    *,
    max_decode_length: int,
    num_decodes: int = 1,
    temperature: Number = 1.0,
    top_k: Number = 0,
    top_p: Number = 0.0,
    eos_id: Int[Array, ""] | int = 1,
    rescale_log_probs: bool = True,
    blanks: Blanks | None = None,
) -> Generated:
    """Sample `num_decodes` answers per example with a KV cache, in one compiled loop.

    Compiled once per module, shape of the tokens, `max_decode_length` and `num_decodes`; how to
    sample is no constant of the program. Under a capacity factor padding takes capacity in the
    encoder, as in T5X; dropless it changes nothing.

    Args:
      module: the model (static).
      variables: its parameters, dense or codes.
      encoder_input_tokens: ids; 0 is padding.
      key: a PRNG key; equal keys, prompts and shapes give equal answers.
      max_decode_length: number of tokens to generate at most (static).
      num_decodes: answers per example (static).
      temperature: as in `sample_token`, like `top_k`, `top_p` and `rescale_log_probs` (static).
      top_k: 0 keeps all tokens.
      top_p: 0 keeps all tokens.
      eos_id: ends a sequence; what follows is 0.
      rescale_log_probs: whether temperature and masks count in the scores.
      blanks: of the rows' prompts, batch * num_decodes of them; an answer then ends when they are
        filled too. None is T5X's way: eos alone ends it.
    """
    encoded = encode_prompts(module, variables, encoder_input_tokens)
    batch = encoder_input_tokens.shape[0]
    tokens, log_prob = temperature_sample(
        model_step(module, variables, encoded, max_decode_length),
        empty_cache(module, variables, encoded, max_decode_length, num_decodes),
        batch * num_decodes,
        key,
        max_decode_length=max_decode_length,
        eos_id=eos_id,
        blanks=blanks,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        rescale_log_probs=rescale_log_probs,
    )
    tokens = tokens.reshape(batch, num_decodes, max_decode_length)
    log_prob = log_prob.reshape(batch, num_decodes)
    ascending = jnp.argsort(log_prob, axis=-1)
    return Generated(
        jnp.take_along_axis(tokens, ascending[..., None], axis=1),
        jnp.take_along_axis(log_prob, ascending, axis=1),
    )


def greedy_generate(
    module: SwitchTransformer,
    variables: Variables,
    encoder_input_tokens: Int[Array, "batch encoder_length"],
    *,
    max_decode_length: int,
    eos_id: Int[Array, ""] | int = 1,
) -> Int[Array, "batch max_decode_length"]:
    """Take the most probable token at each step: `sample_generate` at temperature 0, its tokens."""
    generated = sample_generate(
        module,
        variables,
        encoder_input_tokens,
        jax.random.key(0),
        max_decode_length=max_decode_length,
        temperature=0.0,
        eos_id=eos_id,
    )
    return generated.tokens[:, 0]
