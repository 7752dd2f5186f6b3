"""Dense layers of T5 1.1 as flaxformer computes them: norm, projection, embedding, biases, MLP."""

import functools
import operator
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from qmoe_jax.models.dropout import shared_dropout

# fan-in scaling; only `init` uses it, checkpoints replace it.
_kernel_init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
_stacked_kernel_init = nn.initializers.variance_scaling(
    1.0, "fan_in", "truncated_normal", batch_axis=(0,)
)

# flax's gelu is the tanh approximation, which is what flaxformer's 'gelu' means.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": nn.relu,
    "gelu": functools.partial(nn.gelu, approximate=True),
    "linear": lambda x: x,
}


def matmul_precision(dtype: DTypeLike) -> lax.Precision | None:
    """HIGHEST for float32, so that no GPU silently computes a float32 model in TF32."""
    return lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def apply_module(module: nn.Module, params: Any, *args: Any, method: str | None = None) -> Any:
    """`module.apply` with parameters alone and no mutable collection."""
    return module.apply({"params": params}, *args, method=method)


def gated_activation(
    intermediates: list[Float[Array, "... mlp"]], activations: tuple[str, ...]
) -> Float[Array, "... mlp"]:
    """Product of the activated input projections: relu(x wi), or gelu(x wi_0) * (x wi_1)."""
    activated = [ACTIVATIONS[name](x) for name, x in zip(activations, intermediates, strict=True)]
    return functools.reduce(operator.mul, activated)


class T5LayerNorm(nn.Module):
    """x / rms(x) * scale: no mean subtraction, no bias; statistics in float32.

    Attributes:
      dtype: dtype of the result; the scale is cast to it before the product.
      epsilon: added to the mean square.
    """

    dtype: DTypeLike = jnp.float32
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "... embed"]) -> Float[Array, "... embed"]:
        """Normalise the last axis; return `dtype`."""
        x = x.astype(jnp.float32)
        mean_square = jnp.mean(lax.square(x), axis=-1, keepdims=True)
        y = (x * lax.rsqrt(mean_square + self.epsilon)).astype(self.dtype)
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        return y * lax.broadcast_to_rank(scale.astype(self.dtype), y.ndim)


# Collection beside `params` of low-rank corrections: for the kernel of a module, at its path, `a`
# [in, rank] and `b` [rank, features]; of experts with a leading axis. A kernel is then W + a b.
ADAPTERS = "adapters"


class Dense(nn.Module):
    """x @ kernel without bias; kernel [in, features], cast to `dtype` at use.

    With arrays in the collection `adapters` it is x @ kernel + (x @ a) @ b.
    """

    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        """Project the last axis; return `dtype`."""
        kernel = self.param("kernel", _kernel_init, (x.shape[-1], self.features), jnp.float32)
        dot = functools.partial(jnp.dot, precision=matmul_precision(self.dtype))
        x = x.astype(self.dtype)
        y = dot(x, kernel.astype(self.dtype))
        if not self.has_variable(ADAPTERS, "a"):
            return y
        a, b = (self.get_variable(ADAPTERS, name).astype(self.dtype) for name in "ab")
        return y + dot(dot(x, a), b)


class StackedKernel(nn.Module):
    """The kernels of all experts, float `[experts, in, out]`, as one parameter."""

    num_experts: int
    in_features: int
    out_features: int

    @nn.compact
    def __call__(self) -> Float[Array, "experts in out"]:
        """Return the kernels in their stored dtype."""
        shape = (self.num_experts, self.in_features, self.out_features)
        return self.param("kernel", _stacked_kernel_init, shape, jnp.float32)


class Embed(nn.Module):
    """Token embedding; an id outside [0, num_embeddings) embeds as zeros, as in flaxformer."""

    num_embeddings: int
    features: int
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        """Declare parameters and submodules."""
        self.embedding = self.param(
            "embedding",
            nn.initializers.normal(1.0),
            (self.num_embeddings, self.features),
            jnp.float32,
        )

    def __call__(
        self, ids: Int[Array | np.ndarray, "batch length"]
    ) -> Float[Array, "batch length embed"]:
        """Look ids up; return `dtype`."""
        ids = jnp.asarray(ids)
        in_range = (ids >= 0) & (ids < self.num_embeddings)
        rows = self.embedding.astype(self.dtype)[jnp.clip(ids, 0, self.num_embeddings - 1)]
        return jnp.where(in_range[..., None], rows, jnp.zeros((), self.dtype))

    def attend(self, x: Float[Array, "... embed"]) -> Float[Array, "... vocab"]:
        """Tied logits, always float32: (x @ embedding.T) / sqrt(embed), divided after."""
        logits = jnp.dot(
            x.astype(jnp.float32),
            self.embedding.astype(jnp.float32).T,
            precision=matmul_precision(jnp.dtype(jnp.float32)),
        )
        return logits / np.float32(np.sqrt(np.float32(self.features)))


def relative_position_buckets(
    relative_position: Int[np.ndarray, "..."],
    *,
    bidirectional: bool,
    num_buckets: int = 32,
    max_distance: int = 128,
) -> Int[np.ndarray, "..."]:
    """T5's bucket of every key-minus-query distance, on the host.

    Half of the buckets (of one direction) hold exact distances, the other half are logarithmic up
    to `max_distance`. Computed in float32 with float32's epsilon, as the checkpoints were trained.
    """
    base = np.zeros_like(relative_position)
    distance = -relative_position
    if bidirectional:
        num_buckets //= 2
        base = (distance < 0).astype(relative_position.dtype) * num_buckets
        distance = np.abs(distance)
    else:
        distance = np.maximum(distance, 0)
    max_exact = num_buckets // 2
    log_ratio = np.log(distance.astype(np.float32) / max_exact + np.finfo(np.float32).eps) / np.log(
        max_distance / max_exact
    )
    logarithmic = max_exact + (log_ratio * (num_buckets - max_exact)).astype(np.int32)
    logarithmic = np.minimum(logarithmic, num_buckets - 1)
    buckets = base + np.where(distance < max_exact, distance, logarithmic)
    return buckets.astype(np.int32)


class RelativePositionBias(nn.Module):
    """The relative position bias that all self-attention layers of a stack share.

    Attributes:
      num_heads: attention heads.
      num_buckets: rows of the bias table `rel_embedding [heads, buckets]`.
      max_distance: from here on all distances share the last bucket.
      bidirectional: True in the encoder; a causal stack buckets only the past.
      dtype: dtype of the bias.
    """

    num_heads: int
    num_buckets: int
    max_distance: int
    bidirectional: bool
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, length: int, *, decode: bool = False
    ) -> Float[Array, "1 heads queries keys"]:
        """Return the bias of `length` queries on `length` keys.

        With `decode` and an initialised cache: the one row of the position that is being decoded
        ([1, heads, 1, length]); the position then advances.
        """
        table = self.param(
            "rel_embedding",
            nn.initializers.normal(1.0),
            (self.num_heads, self.num_buckets),
            jnp.float32,
        ).astype(self.dtype)
        # Distances -(length-1) .. length-1; a query's row is a window of this one table.
        distances = np.arange(-(length - 1), length, dtype=np.int32)
        by_distance = table[
            :,
            relative_position_buckets(
                distances,
                bidirectional=self.bidirectional,
                num_buckets=self.num_buckets,
                max_distance=self.max_distance,
            ),
        ]
        if decode:
            stepping = self.has_variable("cache", "cache_index")
            cache_index = self.variable("cache", "cache_index", jnp.zeros, (), jnp.int32)
            if stepping:
                start = length - 1 - cache_index.value
                row = lax.dynamic_slice_in_dim(by_distance, start, length, axis=1)
                cache_index.value = cache_index.value + 1
                return row[None, :, None, :]
        position = np.arange(length)
        return by_distance[:, position[None, :] - position[:, None] + length - 1][None]


class DenseMlp(nn.Module):
    """The MLP of a dense layer: wi (or gated wi_0, wi_1), activation, wo."""

    wi_names: tuple[str, ...]
    activations: tuple[str, ...]
    mlp_dim: int
    dtype: DTypeLike = jnp.float32
    dropout_rate: float = 0.0

    @nn.compact
    def __call__(
        self, x: Float[Array, "... embed"], *, enable_dropout: bool = False
    ) -> Float[Array, "... embed"]:
        """Apply the MLP; return `dtype`."""
        inputs = [Dense(self.mlp_dim, self.dtype, name=name)(x) for name in self.wi_names]
        hidden = gated_activation(inputs, self.activations)
        hidden = shared_dropout(self.dropout_rate)(hidden, deterministic=not enable_dropout)
        return Dense(x.shape[-1], self.dtype, name="wo")(hidden)


def attention_bias(
    mask: Bool[Array, "batch 1 queries keys"], dtype: DTypeLike
) -> Float[Array, "batch 1 queries keys"]:
    """0 where attention is allowed, -1e10 where not."""
    return jnp.where(mask, jnp.zeros((), dtype), jnp.asarray(-1e10, dtype))


def padding_mask(
    query_is_token: Bool[Array | np.ndarray, "batch queries"],
    key_is_token: Bool[Array | np.ndarray, "batch keys"],
) -> Bool[Array, "batch 1 queries keys"]:
    """Attention between tokens, none from or to padding."""
    mask = query_is_token[:, :, None] & key_is_token[:, None, :]
    return jnp.asarray(mask)[:, None]


def segment_mask(
    query_segments: Int[Array | np.ndarray, "batch queries"],
    key_segments: Int[Array | np.ndarray, "batch keys"],
) -> Bool[Array, "batch 1 queries keys"]:
    """Attention inside one packed example."""
    mask = query_segments[:, :, None] == key_segments[:, None, :]
    return jnp.asarray(mask)[:, None]


def causal_mask(length: int) -> Bool[Array, "1 1 queries keys"]:
    """Attention to the past and the present."""
    position = jnp.arange(length)
    return (position[:, None] >= position[None, :])[None, None]


def decoder_token_mask(
    decoder_input_tokens: Int[Array | np.ndarray, "batch length"],
) -> Bool[Array, "batch length"]:
    """Which decoder positions hold a token, although 0 is both padding and begin-of-sequence.

    A 0 counts if it stands first or if a token follows it (packed examples begin so).
    """
    decoder_input_tokens = jnp.asarray(decoder_input_tokens)
    followed = jnp.pad(decoder_input_tokens, ((0, 0), (0, 1)))[:, 1:] > 0
    first = (jnp.arange(decoder_input_tokens.shape[1]) == 0)[None]
    return (decoder_input_tokens > 0) | followed | first


def softmax_attention(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys heads head_dim"],
    value: Float[Array, "batch keys heads head_dim"],
    bias: Float[Array, "#batch #heads #queries #keys"],
    drop: Callable[[Array], Array] = lambda weights: weights,
) -> Float[Array, "batch queries heads head_dim"]:
    """Dot-product attention without 1/sqrt(head_dim): T5 folds it into the query's initialiser.

    Everything, the softmax too, is computed in the dtype of the query. `drop` is dropout of the
    weights, [batch, heads, queries, keys].
    """
    precision = matmul_precision(query.dtype)
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, precision=precision)
    weights = jax.nn.softmax(logits + bias.astype(logits.dtype)).astype(query.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", drop(weights), value, precision=precision)
