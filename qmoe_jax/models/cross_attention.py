"""Attention to the encoder, whose keys and values are projected once and not once a step."""

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from qmoe_jax.models.layers import Dense, attention_bias, softmax_attention

# The collection of projected keys and values.
PROJECTED = "projected"


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
    """

    num_heads: int
    head_dim: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        inputs_q: Float[Array, "rows queries embed"],
        inputs_kv: Float[Array, "rows keys embed"],
        mask: Bool[Array, "rows 1 #queries keys"],
    ) -> Float[Array, "rows queries embed"]:
        """Attend from `inputs_q` to `inputs_kv` where `mask` is True."""

        def project(name: str, x: Array) -> Array:
            joined = Dense(self.num_heads * self.head_dim, self.dtype, name=name)(x)
            return joined.reshape(*x.shape[:-1], self.num_heads, self.head_dim)

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
        query = query.reshape(examples, -1, *query.shape[2:])
        mask = jnp.broadcast_to(mask, (*mask.shape[:2], inputs_q.shape[1], mask.shape[-1]))
        mask = mask.reshape(examples, 1, query.shape[1], mask.shape[-1])
        attended = softmax_attention(query, key, value, attention_bias(mask, self.dtype))
        joined = attended.reshape(*inputs_q.shape[:2], self.num_heads * self.head_dim)
        return Dense(inputs_q.shape[-1], self.dtype, name="out")(joined)
