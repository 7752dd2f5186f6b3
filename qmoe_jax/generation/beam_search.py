"""Beam search as T5X's `beam_search`: its scores, its brevity penalty, its end of the search.

Source of the semantics: t5x/decoding.py. From the same logits it gives T5X's sequences and scores.
Not taken over: prompts for the decoder.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from qmoe_jax.generation.sampling import NEG_INF, Number
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
from qmoe_jax.varying import varying_as


@flax.struct.dataclass
class BeamState:
    """State between steps; beams are in ascending order of their scores.

    Attributes:
      position: int32 scalar, how many tokens were generated.
      live_sequences: int32 [batch, beams, length + 1]; [..., 0] is the begin-of-sequence.
      live_log_probs: float32 [batch, beams], sums over tokens.
      finished_sequences: int32 [batch, beams, length + 1], with their eos.
      finished_scores: float32 [batch, beams], log probability over brevity penalty.
      finished: bool [batch, beams], which finished sequences are there.
      cache: of the live beams; arrays have batch * beams rows.
    """

    position: Array
    live_sequences: Array
    live_log_probs: Array
    finished_sequences: Array
    finished_scores: Array
    finished: Array
    cache: Cache


def brevity_penalty(alpha: Number, length: Int[Array, "..."] | int) -> Float[Array, "..."]:
    """((5 + length) / 6) ** alpha, which divides log probabilities (Wu et al. 2016, section 7)."""
    return jnp.power((5.0 + length) / 6.0, jnp.asarray(alpha, jnp.float32))


def beam_search(
    step: Step,
    cache: Cache,
    batch: int,
    *,
    beam_size: int,
    max_decode_length: int,
    alpha: Number = 0.6,
    eos_id: Int[Array, ""] | int = 1,
) -> tuple[Int[Array, "batch beams length"], Float[Array, "batch beams"]]:
    """Return the best sequences of each example, the best last, and their scores.

    Where no sequence of an example has ended by `max_decode_length`, its live sequences are
    returned, scored by their log probability without penalty. Where fewer than `beam_size` have
    ended, the rest are fillers with scores of about `NEG_INF`.

    Args:
      step: the model, for batch * beam_size rows, the beams of an example next to each other.
      cache: its empty cache.
      batch: number of examples.
      beam_size: beams per example, and sequences returned.
      max_decode_length: number of tokens to generate at most.
      alpha: strength of the brevity penalty.
      eos_id: the token that ends a sequence.
    """
    length = max_decode_length + 1  # with the begin-of-sequence
    # T5X counts the begin-of-sequence in the bound of what a live beam can still reach.
    largest_penalty = brevity_penalty(alpha, length)

    def searching(state: BeamState) -> Bool[Array, ""]:
        best_live = state.live_log_probs[:, -1:] / largest_penalty
        worst_finished = jnp.min(state.finished_scores, axis=1, keepdims=True)
        worst_finished = jnp.where(state.finished, worst_finished, NEG_INF)
        settled = jnp.all(worst_finished > best_live)
        hopeless = jnp.all(best_live < NEG_INF / largest_penalty) & (state.position > 0)
        return (state.position < max_decode_length) & ~settled & ~hopeless

    def extend(state: BeamState) -> BeamState:
        current = lax.dynamic_slice_in_dim(state.live_sequences, state.position, 1, axis=2)
        logits, new_cache = step(current.reshape(batch * beam_size, 1), state.cache)
        vocab = logits.shape[-1]
        log_probs = jax.nn.log_softmax(logits).reshape(batch, beam_size, vocab)
        log_probs = log_probs + state.live_log_probs[:, :, None]

        # Twice as many candidates as beams: if all of the best end, as many are left to go on.
        log_probs, chosen = lax.top_k(log_probs.reshape(batch, -1), 2 * beam_size)
        parents, tokens = chosen // vocab, chosen % vocab
        sequences = lax.dynamic_update_slice_in_dim(
            _take_beams(state.live_sequences, parents),
            tokens[:, :, None],
            state.position + 1,
            axis=2,
        )
        ended = tokens == eos_id

        live_log_probs = log_probs + ended * NEG_INF
        going_on = _best_ascending(live_log_probs, beam_size)

        scores = log_probs / brevity_penalty(alpha, state.position + 1) + ~ended * NEG_INF
        finished_sequences = jnp.concatenate([state.finished_sequences, sequences], axis=1)
        finished_scores = jnp.concatenate([state.finished_scores, scores], axis=1)
        finished = jnp.concatenate([state.finished, ended], axis=1)
        best = _best_ascending(finished_scores, beam_size)

        return BeamState(
            position=state.position + 1,
            live_sequences=_take_beams(sequences, going_on),
            live_log_probs=_take_beams(live_log_probs, going_on),
            finished_sequences=_take_beams(finished_sequences, best),
            finished_scores=_take_beams(finished_scores, best),
            finished=_take_beams(finished, best),
            cache=_take_rows(new_cache, _take_beams(parents, going_on)),
        )

    alone = jnp.full((batch, beam_size), NEG_INF, jnp.float32)
    start = BeamState(
        position=jnp.zeros((), jnp.int32),
        live_sequences=jnp.zeros((batch, beam_size, length), jnp.int32),
        # All beams begin alike; only the first counts.
        live_log_probs=alone.at[:, 0].set(0.0),
        finished_sequences=jnp.zeros((batch, beam_size, length), jnp.int32),
        finished_scores=alone,
        finished=jnp.zeros((batch, beam_size), bool),
        cache=cache,
    )
    state = lax.while_loop(searching, extend, varying_as(start, cache))
    any_finished = jnp.any(state.finished, axis=1)
    sequences = jnp.where(
        any_finished[:, None, None], state.finished_sequences, state.live_sequences
    )
    scores = jnp.where(any_finished[:, None], state.finished_scores, state.live_log_probs)
    return sequences[:, :, 1:], scores


def _best_ascending(scores: Float[Array, "batch candidates"], count: int) -> Array:
    """Return indices of the `count` highest scores, the highest last."""
    return jnp.flip(lax.top_k(scores, count)[1], axis=1)


def _take_beams(x: Array, beams: Int[Array, "batch taken"]) -> Array:
    """x [batch, beams, ...] at the given beams of each example."""
    index = beams.reshape(*beams.shape, *(1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1, mode="promise_in_bounds")


def _take_rows(cache: Cache, beams: Int[Array, "batch beams"]) -> Cache:
    """Return the cache of the given beams; its scalars (positions) are the same for all."""
    batch, beam_size = beams.shape

    def take(x: Array) -> Array:
        if x.ndim == 0:
            return x
        return _take_beams(x.reshape(batch, beam_size, *x.shape[1:]), beams).reshape(x.shape)

    return jax.tree.map(take, cache)


@functools.partial(jax.jit, static_argnames=("module", "max_decode_length", "beam_size"))
def beam_generate(
    module: SwitchTransformer,
    variables: Variables,
    encoder_input_tokens: Int[Array, "batch encoder_length"],
    *,
    max_decode_length: int,
    beam_size: int = 4,
    alpha: Number = 0.6,
    eos_id: Int[Array, ""] | int = 1,
) -> Generated:
    """Beam search with a KV cache, in one compiled loop; `beam_size` answers per example.

    Compiled once per module, shape of the tokens, `max_decode_length` and `beam_size`. Under a
    capacity factor padding takes capacity in the encoder, as in T5X; dropless it changes nothing.

    Args:
      module: the model (static).
      variables: its parameters, dense or codes.
      encoder_input_tokens: ids; 0 is padding.
      max_decode_length: number of tokens to generate at most (static).
      beam_size: beams per example, and answers (static).
      alpha: strength of the brevity penalty.
      eos_id: ends a sequence; what follows is 0.

    Raises:
      ValueError: more beams than the vocabulary can fill.
    """
    num_embeddings = module.config.num_embeddings
    if 2 * beam_size > num_embeddings:
        raise ValueError(
            f"beam_size is {beam_size}, but the model has {num_embeddings} embeddings; give at "
            f"most {num_embeddings // 2}"
        )
    encoded = encode_prompts(module, variables, encoder_input_tokens)
    tokens, scores = beam_search(
        model_step(module, variables, encoded, max_decode_length),
        empty_cache(module, variables, encoded, max_decode_length, beam_size),
        encoder_input_tokens.shape[0],
        beam_size=beam_size,
        max_decode_length=max_decode_length,
        alpha=alpha,
        eos_id=eos_id,
    )
    return Generated(tokens, scores)
