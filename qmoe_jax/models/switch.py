"""The Switch Transformer, called as T5X calls its modules, with parameters named as in T5X."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from qmoe_jax.config import SwitchConfig
from qmoe_jax.models.attention import CrossAttention, MultiHeadAttention
from qmoe_jax.models.dropout import DropoutRates, shared_dropout
from qmoe_jax.models.layers import (
    Dense,
    DenseMlp,
    Embed,
    RelativePositionBias,
    T5LayerNorm,
    causal_mask,
    decoder_token_mask,
    padding_mask,
    segment_mask,
)
from qmoe_jax.models.moe import CodedKernels, MoeLayer, coded_below

# NumPy arrays are welcome too: callers outside jit pass token files as they are.
Tokens = Int[Array | np.ndarray, "batch length"]
EncoderTokens = Int[Array | np.ndarray, "batch encoder_length"]
Hidden = Float[Array, "batch length embed"]
IsToken = Bool[Array, "batch length 1"]
# True where attention is allowed. In a decoding step there is one query.
SelfMask = Bool[Array, "batch 1 length length"]
CrossMask = Bool[Array, "batch 1 #length encoder_length"]
Bias = Float[Array, "1 heads #length keys"]


class EncoderLayer(nn.Module):
    """Self-attention and an MLP (dense, or a MoE when `sparse`), each behind its norm."""

    config: SwitchConfig
    sparse: bool
    coded: CodedKernels = ()
    dtype: DTypeLike = jnp.float32
    implementation: str = "xla"
    mesh: Mesh | None = None
    dropout: DropoutRates = DropoutRates()

    def setup(self) -> None:
        """Declare parameters and submodules."""
        config = self.config
        self.pre_attention_layer_norm = T5LayerNorm(self.dtype)
        self.attention = MultiHeadAttention(
            config.num_heads, config.head_dim, self.dtype, self.dropout.dense
        )
        self.pre_mlp_layer_norm = T5LayerNorm(self.dtype)
        self.mlp = _make_mlp(self)
        self.output_dropout = shared_dropout(self.dropout.dense)

    def __call__(
        self,
        x: Hidden,
        mask: SelfMask,
        bias: Bias,
        is_token: IsToken,
        *,
        enable_dropout: bool = False,
    ) -> Hidden:
        """Apply the layer to the residual stream; `is_token` zeroes padding."""
        x = self.attend(x, mask, bias, is_token, enable_dropout=enable_dropout)
        y = self.mlp(self.normalise_for_mlp(x, is_token), enable_dropout=enable_dropout)
        return x + self.output_dropout(y, deterministic=not enable_dropout)

    def attend(
        self,
        x: Hidden,
        mask: SelfMask,
        bias: Bias,
        is_token: IsToken,
        *,
        enable_dropout: bool = False,
    ) -> Hidden:
        """Return the layer up to its MLP: the residual stream after attention."""
        y = self.pre_attention_layer_norm(x) * is_token.astype(self.dtype)
        y = self.attention(y, y, mask, bias, enable_dropout=enable_dropout)
        return x + self.output_dropout(y, deterministic=not enable_dropout)

    def normalise_for_mlp(self, x: Hidden, is_token: IsToken) -> Hidden:
        """Return what the MLP sees; exactly zero at padding."""
        return self.pre_mlp_layer_norm(x) * is_token.astype(self.dtype)


class DecoderLayer(nn.Module):
    """Self-attention, attention to the encoder, and an MLP, each behind its norm."""

    config: SwitchConfig
    sparse: bool
    coded: CodedKernels = ()
    dtype: DTypeLike = jnp.float32
    implementation: str = "xla"
    mesh: Mesh | None = None
    dropout: DropoutRates = DropoutRates()

    def setup(self) -> None:
        """Declare parameters and submodules."""
        config = self.config
        self.pre_self_attention_layer_norm = T5LayerNorm(self.dtype)
        self.self_attention = MultiHeadAttention(
            config.num_heads, config.head_dim, self.dtype, self.dropout.dense
        )
        self.pre_cross_attention_layer_norm = T5LayerNorm(self.dtype)
        self.encoder_decoder_attention = CrossAttention(
            config.num_heads, config.head_dim, self.dtype, self.dropout.dense
        )
        self.pre_mlp_layer_norm = T5LayerNorm(self.dtype)
        self.mlp = _make_mlp(self)
        self.output_dropout = shared_dropout(self.dropout.dense)

    def __call__(
        self,
        x: Hidden,
        encoded: Float[Array, "batch encoder_length embed"],
        mask: SelfMask | None,
        cross_mask: CrossMask,
        bias: Bias,
        is_token: IsToken,
        *,
        enable_dropout: bool = False,
        decode: bool = False,
    ) -> Hidden:
        """Apply the layer to the residual stream; `is_token` zeroes padding."""
        attention = (encoded, mask, cross_mask, bias, is_token)
        x = self.attend(x, *attention, enable_dropout=enable_dropout, decode=decode)
        y = self.mlp(self.normalise_for_mlp(x, is_token), enable_dropout=enable_dropout)
        return x + self.output_dropout(y, deterministic=not enable_dropout)

    def attend(
        self,
        x: Hidden,
        encoded: Float[Array, "batch encoder_length embed"],
        mask: SelfMask | None,
        cross_mask: CrossMask,
        bias: Bias,
        is_token: IsToken,
        *,
        enable_dropout: bool = False,
        decode: bool = False,
    ) -> Hidden:
        """Return the layer up to its MLP: the residual stream after both attentions."""
        is_token = is_token.astype(self.dtype)
        y = self.pre_self_attention_layer_norm(x) * is_token
        y = self.self_attention(y, y, mask, bias, enable_dropout=enable_dropout, decode=decode)
        x = x + self.output_dropout(y, deterministic=not enable_dropout)
        y = self.pre_cross_attention_layer_norm(x) * is_token
        y = self.encoder_decoder_attention(y, encoded, cross_mask, enable_dropout=enable_dropout)
        return x + self.output_dropout(y, deterministic=not enable_dropout)

    def normalise_for_mlp(self, x: Hidden, is_token: IsToken) -> Hidden:
        """Return what the MLP sees; exactly zero at padding."""
        return self.pre_mlp_layer_norm(x) * is_token.astype(self.dtype)


def _make_mlp(layer: EncoderLayer | DecoderLayer) -> MoeLayer | DenseMlp:
    config, dropout = layer.config, layer.dropout
    if layer.sparse:
        coded = coded_below(layer.coded, "mlp")
        placement = (layer.dtype, layer.implementation, layer.mesh)
        return MoeLayer(config, coded, *placement, dropout.expert)
    return DenseMlp(
        config.wi_names, config.mlp_activations, config.mlp_dim, layer.dtype, dropout.dense
    )


class Encoder(nn.Module):
    """The encoder stack: one relative position bias for all layers, a final norm."""

    config: SwitchConfig
    coded: CodedKernels = ()
    dtype: DTypeLike = jnp.float32
    implementation: str = "xla"
    mesh: Mesh | None = None
    dropout: DropoutRates = DropoutRates()

    def setup(self) -> None:
        """Declare parameters and submodules."""
        config = self.config
        self.relpos_bias = RelativePositionBias(
            config.num_heads,
            config.relpos_buckets,
            config.relpos_max_distance,
            bidirectional=True,
            dtype=self.dtype,
        )
        self.layers = [
            EncoderLayer(
                config,
                i in config.encoder_sparse_layers,
                coded_below(self.coded, f"layers_{i}"),
                self.dtype,
                self.implementation,
                self.mesh,
                self.dropout,
            )
            for i in range(config.num_encoder_layers)
        ]
        self.encoder_norm = T5LayerNorm(self.dtype)
        self.input_dropout = shared_dropout(self.dropout.dense)
        self.output_dropout = shared_dropout(self.dropout.dense)

    def __call__(
        self, embedded: Hidden, tokens: Tokens, mask: SelfMask, *, enable_dropout: bool = False
    ) -> Hidden:
        """Encode embedded tokens; exactly zero at padding."""
        is_token = jnp.asarray(tokens > 0)[..., None]
        bias = self.relpos_bias(tokens.shape[1])
        x = self.input_dropout(embedded, deterministic=not enable_dropout)
        for layer in self.layers:
            x = layer(x, mask, bias, is_token, enable_dropout=enable_dropout)
        return self.normalise(x, is_token, enable_dropout=enable_dropout)

    def normalise(self, x: Hidden, is_token: IsToken, *, enable_dropout: bool = False) -> Hidden:
        """Return the final norm; exactly zero at padding."""
        y = self.output_dropout(self.encoder_norm(x), deterministic=not enable_dropout)
        return y * is_token.astype(self.dtype)


class Decoder(nn.Module):
    """The decoder stack: a causal relative position bias, a final norm, separate logits if any."""

    config: SwitchConfig
    coded: CodedKernels = ()
    dtype: DTypeLike = jnp.float32
    implementation: str = "xla"
    mesh: Mesh | None = None
    dropout: DropoutRates = DropoutRates()

    def setup(self) -> None:
        """Declare parameters and submodules."""
        config = self.config
        self.relpos_bias = RelativePositionBias(
            config.num_heads,
            config.relpos_buckets,
            config.relpos_max_distance,
            bidirectional=False,
            dtype=self.dtype,
        )
        self.layers = [
            DecoderLayer(
                config,
                i in config.decoder_sparse_layers,
                coded_below(self.coded, f"layers_{i}"),
                self.dtype,
                self.implementation,
                self.mesh,
                self.dropout,
            )
            for i in range(config.num_decoder_layers)
        ]
        self.decoder_norm = T5LayerNorm(self.dtype)
        self.input_dropout = shared_dropout(self.dropout.dense)
        self.output_dropout = shared_dropout(self.dropout.dense)
        if not config.tied_logits:
            self.logits_dense = Dense(config.num_embeddings, jnp.dtype(jnp.float32))

    def __call__(
        self,
        embedded: Hidden,
        tokens: Tokens,
        encoded: Float[Array, "batch encoder_length embed"],
        mask: SelfMask | None,
        cross_mask: CrossMask,
        *,
        enable_dropout: bool = False,
        decode: bool = False,
        cache_length: int | None = None,
    ) -> Hidden:
        """Decode embedded tokens into normalised hidden states; exactly zero at padding."""
        is_token = decoder_token_mask(tokens)[..., None]
        bias = self.relpos_bias(cache_length or tokens.shape[1], decode=decode)
        x = self.input_dropout(embedded, deterministic=not enable_dropout)
        for layer in self.layers:
            x = layer(
                x,
                encoded,
                mask,
                cross_mask,
                bias,
                is_token,
                enable_dropout=enable_dropout,
                decode=decode,
            )
        return self.normalise(x, is_token, enable_dropout=enable_dropout)

    def normalise(self, x: Hidden, is_token: IsToken, *, enable_dropout: bool = False) -> Hidden:
        """Return the final norm; exactly zero at padding."""
        y = self.output_dropout(self.decoder_norm(x), deterministic=not enable_dropout)
        return y * is_token.astype(self.dtype)


class SwitchTransformer(nn.Module):
    """Encoder-decoder Switch Transformer.

    Parameters have the names, shapes and orientation of native T5X checkpoints. Expert kernels
    may instead be stored as codes (`coded`); they stay codes in memory, and an expert is expanded
    when tokens reach it. `enable_dropout=True` selects the training capacity factor and, where the
    rates are not 0, dropout, with masks from the random numbers `dropout`.

    Gradients go to parameters of floats, to those that codes have too (levels, origins), and
    through the products of experts in any implementation, one expert expanded at a time
    (`ops.gradients`); reverse mode only.

    Attributes:
      config: geometry and routing.
      dtype: activation dtype, float32 or bfloat16; parameters are cast to it at use. Routers,
        expert outputs' weights and logits are float32 in every case.
      coded: the expert kernels that are stored as codes, by module path
        (`encoder/layers_1/mlp/expert/wi`).
      implementation: of products with codes (`ops.products.IMPLEMENTATIONS`).
      mesh: over which each layer's experts are split (`ops.expert_parallel`); None: they are not.
      dropout: rates with `enable_dropout=True`.
    """

    config: SwitchConfig
    dtype: DTypeLike = jnp.float32
    coded: CodedKernels = ()
    implementation: str = "xla"
    mesh: Mesh | None = None
    dropout: DropoutRates = DropoutRates()

    def setup(self) -> None:
        """Declare parameters and submodules."""
        config = self.config
        self.token_embedder = Embed(config.num_embeddings, config.embed_dim, self.dtype)
        encoder_coded, decoder_coded = (coded_below(self.coded, n) for n in ("encoder", "decoder"))
        placement = (self.dtype, self.implementation, self.mesh, self.dropout)
        self.encoder = Encoder(config, encoder_coded, *placement)
        self.decoder = Decoder(config, decoder_coded, *placement)

    def __call__(
        self,
        encoder_input_tokens: EncoderTokens,
        decoder_input_tokens: Tokens,
        decoder_target_tokens: Tokens,
        encoder_segment_ids: EncoderTokens | None = None,
        decoder_segment_ids: Tokens | None = None,
        encoder_positions: EncoderTokens | None = None,
        decoder_positions: Tokens | None = None,
        *,
        enable_dropout: bool = True,
        decode: bool = False,
        max_decode_length: int | None = None,
    ) -> Float[Array, "batch length vocab"]:
        """Logits of every target token, float32.

        Args:
          encoder_input_tokens: ids; 0 is padding.
          decoder_input_tokens: the targets shifted right by one, beginning with 0.
          decoder_target_tokens: ids; used for masks only.
          encoder_segment_ids: segments of packed examples.
          decoder_segment_ids: segments of packed examples.
          encoder_positions: accepted for T5X; relative position biases need none.
          decoder_positions: accepted for T5X.
          enable_dropout: use the training capacity factor, and dropout.
          decode: create or use the autoregressive cache.
          max_decode_length: length of the cache; needed for each decoding step.
        """
        encoded = self.encode(
            encoder_input_tokens,
            encoder_segment_ids,
            encoder_positions,
            enable_dropout=enable_dropout,
        )
        return self.decode(
            encoded,
            encoder_input_tokens,
            decoder_input_tokens,
            decoder_target_tokens,
            encoder_segment_ids,
            decoder_segment_ids,
            decoder_positions,
            enable_dropout=enable_dropout,
            decode=decode,
            max_decode_length=max_decode_length,
        )

    def encode(
        self,
        encoder_input_tokens: EncoderTokens,
        encoder_segment_ids: EncoderTokens | None = None,
        encoder_positions: EncoderTokens | None = None,
        *,
        enable_dropout: bool = True,
    ) -> Float[Array, "batch encoder_length embed"]:
        """Return encoder outputs in the activation dtype; exactly zero at padding."""
        del encoder_positions  # relative position biases need none
        mask = encoder_mask(encoder_input_tokens, encoder_segment_ids)
        embedded = self.token_embedder(encoder_input_tokens)
        return self.encoder(embedded, encoder_input_tokens, mask, enable_dropout=enable_dropout)

    def decode(
        self,
        encoded: Float[Array, "batch encoder_length embed"],
        encoder_input_tokens: EncoderTokens,
        decoder_input_tokens: Tokens,
        decoder_target_tokens: Tokens,
        encoder_segment_ids: EncoderTokens | None = None,
        decoder_segment_ids: Tokens | None = None,
        decoder_positions: Tokens | None = None,
        *,
        enable_dropout: bool = True,
        decode: bool = False,
        max_decode_length: int | None = None,
    ) -> Float[Array, "batch length vocab"]:
        """Logits from encoder outputs; see `__call__` for the arguments.

        Raises:
          ValueError: packed examples while decoding.
        """
        del decoder_positions  # relative position biases need none
        if decode:
            if encoder_segment_ids is not None or decoder_segment_ids is not None:
                raise ValueError(
                    "decode=True got segment ids: packed examples cannot be decoded step by step; "
                    "pass one example per row"
                )
            if max_decode_length is None and decoder_input_tokens.shape[1] == 1:
                raise ValueError(
                    "a decoding step needs max_decode_length, the length that the cache was "
                    "created with, to find its relative position bias"
                )
            mask = None
            cross_mask = jnp.broadcast_to(
                (encoder_input_tokens > 0)[:, None, None, :],
                (encoder_input_tokens.shape[0], 1, 1, encoder_input_tokens.shape[1]),
            )
        else:
            mask = decoder_mask(decoder_target_tokens, decoder_segment_ids)
            cross_mask = cross_attention_mask(
                decoder_target_tokens,
                encoder_input_tokens,
                decoder_segment_ids,
                encoder_segment_ids,
            )
        hidden = self.decoder(
            self.token_embedder(decoder_input_tokens),
            decoder_input_tokens,
            encoded,
            mask,
            cross_mask,
            enable_dropout=enable_dropout,
            decode=decode,
            cache_length=max_decode_length if decode else None,
        )
        return self.logits(hidden)

    def logits(self, hidden: Hidden) -> Float[Array, "batch length vocab"]:
        """Float32 logits from the normalised outputs of the decoder."""
        if self.config.tied_logits:
            return self.token_embedder.attend(hidden)
        return self.decoder.logits_dense(hidden)


def encoder_mask(tokens: Tokens, segment_ids: Tokens | None = None) -> SelfMask:
    """Self-attention of the encoder: between tokens of one example."""
    mask = padding_mask(tokens > 0, tokens > 0)
    if segment_ids is not None:
        mask = mask & segment_mask(segment_ids, segment_ids)
    return mask


def decoder_mask(target_tokens: Tokens, segment_ids: Tokens | None = None) -> SelfMask:
    """Self-attention of the decoder when teacher-forced: causal, between real targets."""
    mask = causal_mask(target_tokens.shape[1]) & padding_mask(target_tokens > 0, target_tokens > 0)
    if segment_ids is not None:
        mask = mask & segment_mask(segment_ids, segment_ids)
    return mask


def cross_attention_mask(
    target_tokens: Tokens,
    encoder_tokens: EncoderTokens,
    decoder_segment_ids: Tokens | None = None,
    encoder_segment_ids: EncoderTokens | None = None,
) -> Bool[Array, "batch 1 length encoder_length"]:
    """Attention of real targets to encoder tokens."""
    mask = padding_mask(target_tokens > 0, encoder_tokens > 0)
    if decoder_segment_ids is not None and encoder_segment_ids is not None:
        mask = mask & segment_mask(decoder_segment_ids, encoder_segment_ids)
    return mask
