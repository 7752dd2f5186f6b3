"""Attention: with an autoregressive cache in T5X's layout, and to the encoder.

Keys and values of the attention to the encoder are projected once and not once a step.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from qmoe_jax.models.dropout import shared_dropout
from qmoe_jax.models.layers import Dense, attention_bias, softmax_attention

# The collection of projected keys and values.
PROJECTED = "projected"


class MultiHeadAttention(nn.Module):
    """Attention with joined head-major kernels `query`, `key`, `value`, `out`, without biases.

    Attributes:
      num_heads: attention heads.
      head_dim: width of a head; num_heads * head_dim need not equal the width of the input.
      dtype: dtype of the computation.
      dropout_rate: of attention weights, with `enable_dropout`; queries share a mask.
    """

    num_heads: int
    head_dim: int
    dtype: DTypeLike = jnp.float32
    dropout_rate: float = 0.0

    @nn.compact
    def __call__(
        self,
        inputs_q: Float[Array, "batch queries embed"],
        inputs_kv: Float[Array, "batch keys embed"],
        mask: Bool[Array, "#batch 1 #queries keys_or_cache"] | None,
        bias: Float[Array, "1 heads #queries keys_or_cache"] | None = None,
        *,
        enable_dropout: bool = False,
        decode: bool = False,
    ) -> Float[Array, "batch queries embed"]:
        """Attend from `inputs_q` to `inputs_kv`.

        Args:
          inputs_q: projected to queries.
          inputs_kv: projected to keys and values.
          mask: True where attention is allowed; None allows all.
          bias: relative position bias, added to the logits.
          enable_dropout: drop attention weights.
          decode: keep keys and values in the collection `cache`. The first call (no cache yet)
            only creates it, sized by `inputs_kv`; each later call takes one position.

        Raises:
          ValueError: a decoding step with more than one position.
        """
        project = functools.partial(_project, self)
        query = project("query", inputs_q)
        key = project("key", inputs_kv)
        value = project("value", inputs_kv)

        if decode:
            stepping = self.has_variable("cache", "cached_key")
            # [batch, heads, head_dim, length], as T5X's beam search expects.
            cached_key = self.variable("cache", "cached_key", _empty_cache, key)
            cached_value = self.variable("cache", "cached_value", _empty_cache, value)
            cache_index = self.variable("cache", "cache_index", jnp.zeros, (), jnp.int32)
            if stepping:
                if query.shape[1] != 1:
                    raise ValueError(
                        f"a decoding step got {query.shape[1]} positions; pass one at a time "
                        "(decoder_input_tokens of shape [batch, 1])"
                    )
                index = cache_index.value
                cached_key.value = _write_position(cached_key.value, key, index)
                cached_value.value = _write_position(cached_value.value, value, index)
                cache_index.value = index + 1
                key = jnp.moveaxis(cached_key.value, -1, 1)
                value = jnp.moveaxis(cached_value.value, -1, 1)
                past = (jnp.arange(key.shape[1]) <= index)[None, None, None, :]
                mask = past if mask is None else mask & past

        total_bias = jnp.zeros((1, 1, 1, 1), self.dtype)
        if mask is not None:
            total_bias = attention_bias(mask, self.dtype)
        if bias is not None:
            total_bias = total_bias + bias
        drop = functools.partial(
            shared_dropout(self.dropout_rate), deterministic=not enable_dropout
        )
        attended = softmax_attention(query, key, value, total_bias, drop)
        joined = attended.reshape(*attended.shape[:-2], self.num_heads * self.head_dim)
        return Dense(inputs_q.shape[-1], self.dtype, name="out")(joined)


class CrossAttention(nn.Module):
    """Attention with the kernels of `MultiHeadAttention`, to inputs that do not change.

    A call with the collection `projected` mutable also writes its keys and values there. A call
    that finds them there takes them and does not look at the values of `inputs_kv`. It may then ask
    with several rows per row of keys (beams of one example, next to each other): these are further
    queries to the same keys, so keys and values are neither copied nor projected per beam.

    Attributes:
      num_heads: attention heads.
      head_dim: width of a head; num_heads * head_dim need not equal the width of the input.
      dtype: dtype of the computation.
      dropout_rate: of attention weights, with `enable_dropout`; queries share a mask.
    """

    num_heads: int
    head_dim: int
    dtype: DTypeLike = jnp.float32
    dropout_rate: float = 0.0

    @nn.compact
    def __call__(
        self,
        inputs_q: Float[Array, "rows queries embed"],
        inputs_kv: Float[Array, "rows keys embed"],
        mask: Bool[Array, "rows 1 #queries keys"],
        *,
        enable_dropout: bool = False,
    ) -> Float[Array, "rows queries embed"]:
        """Attend from `inputs_q` to `inputs_kv` where `mask` is True."""
        project = functools.partial(_project, self)
        query = project("query", inputs_q)
        if self.has_variable(PROJECTED, "key"):
            key = jnp.moveaxis(self.get_variable(PROJECTED, "key"), -1, 1)
            value = jnp.moveaxis(self.get_variable(PROJECTED, "value"), -1, 1)
        else:
            key = project("key", inputs_kv)
            value = project("value", inputs_kv)
            if self.is_mutable_collection(PROJECTED) and not self.is_initializing():
                # [batch, heads, head_dim, length], as in the cache: ten times as fast on XLA's CPU,
                # which would transpose any other layout at each step.
                self.put_variable(PROJECTED, "key", jnp.moveaxis(key, 1, -1))
                self.put_variable(PROJECTED, "value", jnp.moveaxis(value, 1, -1))

        # [examples, beams * queries, ...]: one row per row of keys.
        examples = key.shape[0]
        queries = query.shape[0] * query.shape[1] // max(examples, 1)
        query = query.reshape(examples, queries, *query.shape[2:])
        mask = jnp.broadcast_to(mask, (*mask.shape[:2], inputs_q.shape[1], mask.shape[-1]))
        mask = mask.reshape(examples, 1, queries, mask.shape[-1])
        drop = functools.partial(
            shared_dropout(self.dropout_rate), deterministic=not enable_dropout
        )
        attended = softmax_attention(query, key, value, attention_bias(mask, self.dtype), drop)
        joined = attended.reshape(*inputs_q.shape[:2], self.num_heads * self.head_dim)
        return Dense(inputs_q.shape[-1], self.dtype, name="out")(joined)


def _project(module: MultiHeadAttention | CrossAttention, name: str, x: Array) -> Array:
    """Project to the heads of a module, from inside of its call: [..., heads, head_dim]."""
    joined = Dense(module.num_heads * module.head_dim, module.dtype, name=name)(x)
    return joined.reshape(*x.shape[:-1], module.num_heads, module.head_dim)


def _empty_cache(x: Float[Array, "batch length heads head_dim"]) -> Array:
    batch, length, heads, head_dim = x.shape
    return jnp.zeros((batch, heads, head_dim, length), x.dtype)


def _write_position(cache: Array, x: Float[Array, "batch 1 heads head_dim"], index: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(
        cache, jnp.moveaxis(x, 1, -1).astype(cache.dtype), index, axis=3
    )
