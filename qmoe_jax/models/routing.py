"""Switch routing as flaxformer computes it: token groups, top-1 choice, expert capacity.

Routing is per token group: a contiguous run of the flattened [batch * length] tokens. Padding
tokens are zero vectors, choose expert 0, and take capacity.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qmoe_jax.models.layers import Dense


def group_padding(batch: int, length: int, num_experts: int) -> tuple[int, int]:
    """Rows and columns to append so that the number of tokens is a multiple of `num_experts`.

    One of the two is zero: whichever adds fewer tokens, columns on a tie (flaxformer's
    `_maybe_pad`).
    """
    if (batch * length) % num_experts == 0:
        return 0, 0
    rows = next(n for n in range(1, num_experts + 1) if ((batch + n) * length) % num_experts == 0)
    columns = next(
        n for n in range(1, num_experts + 1) if (batch * (length + n)) % num_experts == 0
    )
    return (rows, 0) if columns * batch > rows * length else (0, columns)


def num_token_groups(num_tokens: int, max_group_size: int, num_experts: int) -> int:
    """Return the number of token groups: a positive multiple of `num_experts` dividing the tokens.

    Raises:
      ValueError: no such number exists.
    """
    groups = max(num_tokens // max_group_size, num_experts)
    while groups < num_tokens and (num_tokens % groups or groups % num_experts):
        groups += 1
    if num_tokens % groups:
        raise ValueError(
            f"{num_tokens} tokens cannot be cut into token groups that are a multiple of "
            f"{num_experts} experts; use a larger batch or longer sequences"
        )
    return groups


def expert_capacity(
    tokens_per_group: int, num_experts: int, capacity_factor: float, min_expert_capacity: int
) -> int:
    """Tokens that an expert takes from one token group; round half to even, as Python does."""
    return max(round(capacity_factor * tokens_per_group / num_experts), min_expert_capacity)


class RouterWeights(nn.Module):
    """Holds the router's projection under its checkpoint name `router_weights/w/kernel`."""

    num_experts: int

    @nn.compact
    def __call__(self, x: Float[Array, "... embed"]) -> Float[Array, "... experts"]:
        """Router logits, float32."""
        return Dense(self.num_experts, jnp.dtype(jnp.float32), name="w")(x)


class Router(nn.Module):
    """Router logits of every token, in float32 whatever the activations are."""

    num_experts: int

    @nn.compact
    def __call__(self, x: Float[Array, "... embed"]) -> Float[Array, "... experts"]:
        """Router logits, float32."""
        return RouterWeights(self.num_experts, name="router_weights")(x)


def choose_expert(
    router_logits: Float[Array, "... experts"],
) -> tuple[Float[Array, "... experts"], Int[Array, "..."], Float[Array, "..."]]:
    """Softmax and top-1 choice: `router_probs`, expert index (lowest on ties), its probability."""
    router_probs = jax.nn.softmax(router_logits.astype(jnp.float32), axis=-1)
    expert_index = jnp.argmax(router_probs, axis=-1).astype(jnp.int32)
    gate = jnp.max(router_probs, axis=-1)
    return router_probs, expert_index, gate


def within_capacity(
    expert_index: Int[Array, "groups tokens"], num_experts: int, capacity: int
) -> Bool[Array, "groups tokens"]:
    """Which tokens their expert takes: the first `capacity` of each group, in token order."""
    chosen = jax.nn.one_hot(expert_index, num_experts, dtype=jnp.int32)
    place = jnp.cumsum(chosen, axis=1)
    place = jnp.take_along_axis(place, expert_index[..., None], axis=-1)[..., 0]
    return place <= capacity


def load_balancing_loss(
    router_probs: Float[Array, "groups tokens experts"], expert_index: Int[Array, "groups tokens"]
) -> Float[Array, ""]:
    """Switch's auxiliary loss: 1 when balanced; mean over token groups."""
    num_experts = router_probs.shape[-1]
    fraction = jnp.mean(jax.nn.one_hot(expert_index, num_experts, dtype=jnp.float32), axis=1)
    probability = jnp.mean(router_probs, axis=1)
    return jnp.mean(fraction * probability) * num_experts**2


def router_z_loss(router_logits: Float[Array, "groups tokens experts"]) -> Float[Array, ""]:
    """Mean square of the routers' log-partition functions."""
    return jnp.mean(jax.nn.logsumexp(router_logits, axis=-1) ** 2)
