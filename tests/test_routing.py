"""Token groups, capacity and the grouped expert MLP, against references."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qmoe_jax.models import layers, routing
from qmoe_jax.ops.grouped_mlp import grouped_mlp


@pytest.mark.parametrize("bidirectional", [True, False])
def test_relative_position_buckets_equal_t5s(bidirectional):
    import golden_data

    golden = np.load(golden_data.GOLDEN / "relpos_buckets.npz")
    expected = golden["bidirectional" if bidirectional else "causal"]
    distance = np.arange(-300, 301, dtype=np.int32)
    buckets = layers.relative_position_buckets(distance, bidirectional=bidirectional)
    np.testing.assert_array_equal(buckets, expected)


@pytest.mark.parametrize("num_experts", [1, 3, 8, 16])
def test_group_padding_is_the_least(num_experts):
    for batch in range(1, 9):
        for length in range(1, 40):
            rows, columns = routing.group_padding(batch, length, num_experts)
            assert rows == 0 or columns == 0
            assert ((batch + rows) * (length + columns)) % num_experts == 0
            added = rows * length + columns * batch
            for r in range(num_experts + 1):
                if ((batch + r) * length) % num_experts == 0:
                    assert added <= r * length
            for c in range(num_experts + 1):
                if (batch * (length + c)) % num_experts == 0:
                    assert added <= c * batch


@pytest.mark.parametrize("num_experts", [1, 4, 6])
def test_num_token_groups(num_experts):
    for multiple in range(1, 60):
        tokens = multiple * num_experts
        for max_group_size in (1, 7, 16, 1000):
            groups = routing.num_token_groups(tokens, max_group_size, num_experts)
            assert tokens % groups == 0
            assert groups % num_experts == 0
            assert groups >= num_experts


def test_num_token_groups_refuses():
    with pytest.raises(ValueError, match="7 tokens cannot be cut"):
        routing.num_token_groups(7, 100, 8)


def test_capacity_rounds_half_to_even():
    assert routing.expert_capacity(9, 8, 4.0, 2) == 4  # 4.5
    assert routing.expert_capacity(11, 8, 4.0, 2) == 6  # 5.5
    assert routing.expert_capacity(1, 8, 1.0, 4) == 4


def test_within_capacity_equals_a_loop():
    within_capacity = jax.jit(routing.within_capacity, static_argnums=(1, 2))
    rng = np.random.default_rng(1)
    for _ in range(20):
        groups, tokens, experts, capacity = rng.integers(1, 9, 4)
        index = rng.integers(0, experts, (groups, tokens))
        expected = np.zeros((groups, tokens), bool)
        for g in range(groups):
            taken = np.zeros(experts, int)
            for t in range(tokens):
                expected[g, t] = taken[index[g, t]] < capacity
                taken[index[g, t]] += 1
        kept = within_capacity(jnp.asarray(index), int(experts), int(capacity))
        np.testing.assert_array_equal(kept, expected)


def grouped_mlp_reference(x, expert_index, *, wi, wo, activation):
    """Run every expert on every token, then take the right one.

    Args:
      x: float [tokens, embed].
      expert_index: int [tokens]; a negative index yields zeros.
      wi: kernels float [experts, embed, mlp], one or two.
      wo: float [experts, mlp, embed].
      activation: as for `grouped_mlp`.
    """
    precision = jax.lax.Precision.HIGHEST
    everywhere = jax.vmap(
        lambda wi, wo: jnp.dot(
            activation([jnp.dot(x, w, precision=precision) for w in wi]), wo, precision=precision
        )
    )(tuple(wi), wo)
    taken = jnp.take_along_axis(everywhere, jnp.maximum(expert_index, 0)[None, :, None], axis=0)[0]
    return jnp.where((expert_index >= 0)[:, None], taken, 0)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("tokens", "experts", "block_size"),
    [(1, 1, 128), (7, 3, 4), (64, 5, 16), (65, 16, 16), (33, 40, 8), (0, 3, 8)],
)
def test_grouped_mlp_equals_its_reference(gated, tokens, experts, block_size):
    keys = jax.random.split(jax.random.key(tokens + experts), 5)
    embed, mlp = 6, 10
    x = jax.random.normal(keys[0], (tokens, embed))
    wi = [jax.random.normal(k, (experts, embed, mlp)) for k in keys[1 : 3 if gated else 2]]
    wo = jax.random.normal(keys[3], (experts, mlp, embed))
    # Some tokens have no expert, and experts are unevenly loaded.
    index = jax.random.randint(keys[4], (tokens,), -1, experts) // 2 * 2
    index = jnp.minimum(index, experts - 1)
    names = ("gelu", "linear") if gated else ("relu",)

    def activation(hidden):
        return layers.gated_activation(hidden, names)

    expected = grouped_mlp_reference(x, index, wi=wi, wo=wo, activation=activation)
    result = jax.jit(
        lambda x, index: grouped_mlp(
            x,
            index,
            num_experts=experts,
            fetch_wi=[lambda e, w=w: w[e] for w in wi],
            fetch_wo=lambda e: wo[e],
            activation=activation,
            block_size=block_size,
        )
    )(x, index)
    np.testing.assert_allclose(result, expected, atol=1e-5)
    assert not np.any(np.asarray(result)[np.asarray(index) < 0])
