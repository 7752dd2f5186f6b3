"""The dense part of the block loop: jitted functions that take one padded sample batch each.

They call the very modules of the model, so that calibration cannot drift from inference. Routing
is dropless: every token of a sample reaches its expert, whatever it is batched with.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qmoe_jax.config import SwitchConfig
from qmoe_jax.models.layers import (
    Dense,
    Embed,
    RelativePositionBias,
    T5LayerNorm,
    apply_module,
    decoder_token_mask,
)
from qmoe_jax.models.routing import Router, choose_expert
from qmoe_jax.models.switch import (
    DecoderLayer,
    EncoderLayer,
    cross_attention_mask,
    decoder_mask,
    encoder_mask,
)

Params = Any
Tokens = Int[Array, "batch length"]
Hidden = Float[Array, "batch length embed"]
RelEmbedding = Float[Array, "heads buckets"]


@dataclasses.dataclass(frozen=True)
class Routed:
    """Where the tokens of a sparse layer go: expert index and router probability, per position."""

    expert_index: Int[Array, "batch length"]
    gate: Float[Array, "batch length"]


jax.tree_util.register_dataclass(Routed, ["expert_index", "gate"], [])


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def embed(
    config: SwitchConfig, dtype: str, embedding: Float[Array, "vocab embed"], tokens: Tokens
) -> Hidden:
    """Embedded tokens."""
    module = Embed(config.num_embeddings, config.embed_dim, jnp.dtype(dtype))
    return apply_module(module, {"embedding": embedding}, tokens)


def _bias(layer: EncoderLayer | DecoderLayer, rel_embedding: RelEmbedding, length: int) -> Array:
    config = layer.config
    module = RelativePositionBias(
        config.num_heads,
        config.relpos_buckets,
        config.relpos_max_distance,
        bidirectional=isinstance(layer, EncoderLayer),
        dtype=layer.dtype,
    )
    return apply_module(module, {"rel_embedding": rel_embedding}, length)


def _route(
    layer: EncoderLayer | DecoderLayer, params: Params, x: Hidden, is_token: Array
) -> Routed:
    z = apply_module(layer, params, x, is_token, method="normalise_for_mlp")
    router = Router(layer.config.num_experts)
    _, expert_index, gate = choose_expert(apply_module(router, params["mlp"]["router"], z))
    return Routed(expert_index, gate)


@functools.partial(jax.jit, static_argnames="layer")
def encoder_block(
    layer: EncoderLayer, params: Params, rel_embedding: RelEmbedding, x: Hidden, tokens: Tokens
) -> tuple[Hidden, Routed | None]:
    """Return an encoder layer; a sparse one only up to its experts.

    Args:
      layer: static.
      params: the layer's parameters; a sparse layer's without expert kernels.
      rel_embedding: the stack's relative position bias.
      x: residual stream.
      tokens: `encoder_input_tokens`.

    Returns:
      The residual stream (float32), and for a sparse layer the routing of what follows.
    """
    is_token = (tokens > 0)[..., None]
    mask = encoder_mask(tokens)
    bias = _bias(layer, rel_embedding, tokens.shape[1])
    if not layer.sparse:
        y = apply_module(layer, params, x, mask, bias, is_token)
        return y.astype(jnp.float32), None
    y = apply_module(layer, params, x, mask, bias, is_token, method="attend")
    return y.astype(jnp.float32), _route(layer, params, y, is_token)


@functools.partial(jax.jit, static_argnames="layer")
def decoder_block(
    layer: DecoderLayer,
    params: Params,
    rel_embedding: RelEmbedding,
    x: Hidden,
    encoded: Float[Array, "batch encoder_length embed"],
    encoder_tokens: Int[Array, "batch encoder_length"],
    input_tokens: Tokens,
    target_tokens: Tokens,
) -> tuple[Hidden, Routed | None]:
    """Return a decoder layer; a sparse one only up to its experts. See `encoder_block`."""
    is_token = decoder_token_mask(input_tokens)[..., None]
    attention = (
        x,
        encoded.astype(layer.dtype),
        decoder_mask(target_tokens),
        cross_attention_mask(target_tokens, encoder_tokens),
        _bias(layer, rel_embedding, input_tokens.shape[1]),
        is_token,
    )
    if not layer.sparse:
        return apply_module(layer, params, *attention).astype(jnp.float32), None
    y = apply_module(layer, params, *attention, method="attend")
    return y.astype(jnp.float32), _route(layer, params, y, is_token)


@functools.partial(jax.jit, static_argnames="dtype")
def final_norm(dtype: str, scale: Float[Array, "embed"], x: Hidden) -> Hidden:
    """Apply the norm that closes a stack, float32. Padding is left to the list buffer."""
    module = T5LayerNorm(jnp.dtype(dtype))
    return apply_module(module, {"scale": scale}, x).astype(jnp.float32)


@functools.partial(jax.jit, static_argnames="config")
def logits(config: SwitchConfig, params: Params, hidden: Hidden) -> Float[Array, "b l vocab"]:
    """Float32 logits; `params` holds `embedding`, or `kernel` of separate logits."""
    if config.tied_logits:
        module = Embed(config.num_embeddings, config.embed_dim)
        return apply_module(module, params, hidden, method="attend")
    return apply_module(Dense(config.num_embeddings), params, hidden)
