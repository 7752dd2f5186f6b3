"""GPTQ against a reference in float64, its properties, and expert batches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import threadpoolctl
from markers import slow

from qmoe_jax.quantization import expert_batch
from qmoe_jax.quantization.expert_batch import (
    IMPLEMENTATIONS,
    ExpertStatus,
    quantize_experts,
)
from qmoe_jax.quantization.gptq import gptq, upper_factor
from qmoe_jax.quantization.grids import Ternary, TwoBit
from qmoe_jax.quantization.host_gptq import host_gptq
from qmoe_jax.quantization.rtn import round_to_nearest

jitted_gptq = jax.jit(gptq, static_argnames=("grid", "block_size", "act_order", "group_size"))


def slow_gptq(W, H, grid, damping=0.1, act_order=False, group_size=None):
    """Optimal brain surgeon, a column at a time, eliminating it from the explicit inverse.

    The grid's own levels, everything else float64 NumPy on `[in, out]`.
    """
    W = np.asarray(W, np.float64)
    H = np.asarray(H, np.float64)
    num_in = len(W)
    group_size = group_size or num_in
    levels = [
        np.asarray(grid.fit(jnp.asarray(W[at : at + group_size], jnp.float32)), np.float64)
        for at in range(0, num_in, group_size)
    ]
    H = H + max(damping * np.mean(np.diag(H)), 1e-6) * np.eye(num_in)
    order = np.argsort(-np.diag(H), kind="stable") if act_order else np.arange(num_in)
    W = W[order].copy()
    inverse = np.linalg.inv(H[np.ix_(order, order)])
    codes = np.zeros(W.shape, np.uint8)
    for i in range(num_in):
        code, q = slow_quantize(W[i], levels[order[i] // group_size], grid)
        codes[i] = code
        W -= np.outer(inverse[:, i], (W[i] - q) / inverse[i, i])
        inverse = inverse - np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    restored = np.zeros_like(codes)
    restored[order] = codes
    return restored


def slow_quantize(w, levels, grid):
    if grid.name == "ternary":
        low, high = levels.T
        code = np.where((w > high / 2) & (high > 0), 2, np.where((w < low / 2) & (low < 0), 1, 0))
        return code, np.choose(code, [0 * low, low, high])
    scale, zero = levels.T
    code = np.clip(np.round(w / scale) + zero, 0, 3)
    return code, scale * (code - zero)


def make_problem(num_in, num_out, seed=0, skew=0.5):
    """A kernel, and the Hessian of correlated tokens whose spectrum falls as i^-skew."""
    rng = np.random.default_rng(seed)
    W = rng.normal(size=(num_in, num_out)).astype(np.float32)
    mixing = rng.normal(size=(num_in, num_in)) / np.sqrt(num_in)
    spectrum = np.arange(1, num_in + 1) ** -skew
    X = (rng.normal(size=(4 * num_in + 8, num_in)) * spectrum) @ mixing
    H = 2 / len(X) * X.T @ X
    return jnp.asarray(W), jnp.asarray(H, jnp.float32)


def make_batch(num_experts, num_in, num_out):
    problems = [make_problem(num_in, num_out, seed) for seed in range(num_experts)]
    kernels, hessians = (jnp.stack(arrays) for arrays in zip(*problems, strict=True))
    return kernels, hessians, jnp.full(num_experts, 100)


def with_empty_expert(array):
    """One expert more, of zeros and without tokens: as a batch is filled up."""
    return jnp.pad(array, [(0, 1)] + [(0, 0)] * (array.ndim - 1))


def layer_error(W, codes, levels, H, grid):
    d = np.asarray(W, np.float64) - np.asarray(grid.dequantize(codes, levels), np.float64)
    return np.trace(d.T @ np.asarray(H, np.float64) @ d) / 2


def share_equal(a, b):
    return np.mean(np.asarray(a) == np.asarray(b))


HOW = [{"experts_at_once": 1}, {"experts_at_once": 4}, {"implementation": "host"}]

# Sizes around the panel (16), the block (32) and the LAPACK share (64).
SIZES = [
    *((1, 1), (7, 3), (33, 12), (100, 40)),
    *slow((1, 7), (5, 1), (16, 16), (31, 5), (64, 9)),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("grid", [Ternary(), TwoBit()], ids=lambda grid: grid.name)
def test_agrees_with_the_slow_twin(size, grid):
    W, H = make_problem(*size, seed=sum(size))
    result = jitted_gptq(W, H, grid, block_size=32)
    assert not result.fell_back
    assert share_equal(result.codes, slow_gptq(W, H, grid)) >= 0.9995
    expected = layer_error(W, result.codes, result.levels, H, grid)
    np.testing.assert_allclose(result.layer_error, expected, rtol=1e-3, atol=1e-6)


def test_default_block_size_agrees_with_the_slow_twin():
    W, H = make_problem(270, 24)
    assert share_equal(jitted_gptq(W, H, Ternary()).codes, slow_gptq(W, H, Ternary())) >= 0.9995


def test_act_order_agrees_with_the_slow_twin():
    W, H = make_problem(40, 30, skew=1.5)
    result = jitted_gptq(W, H, Ternary(), act_order=True)
    expected = slow_gptq(W, H, Ternary(), act_order=True)
    assert share_equal(result.codes, expected) >= 0.9995
    assert share_equal(result.codes, slow_gptq(W, H, Ternary())) < 0.999


class TestGroups:
    @pytest.mark.parametrize(
        ("num_in", "group_size", "grid", "act_order"),
        [
            (40, 8, Ternary(), False),
            (30, 10, TwoBit(), True),
            (21, 3, Ternary(), True),
            (33, 33, TwoBit(), False),
        ],
        ids=str,
    )
    def test_agrees_with_the_slow_twin(self, num_in, group_size, grid, act_order):
        W, H = make_problem(num_in, 12, seed=num_in, skew=1.5)
        result = jitted_gptq(W, H, grid, block_size=32, act_order=act_order, group_size=group_size)
        expected = slow_gptq(W, H, grid, act_order=act_order, group_size=group_size)
        assert share_equal(result.codes, expected) >= 0.9995
        assert result.levels.shape == (12 * num_in // group_size, 2)

    @pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
    def test_a_batch_is_what_each_expert_is(self, implementation):
        kernels, hessians, counts = make_batch(3, 32, 7)
        batch = quantize_experts(
            *(kernels, hessians, counts),
            grid=Ternary(),
            group_size=8,
            implementation=implementation,
        )
        assert batch.codes.shape == (3, 7 * 4, 8)
        values = expert_batch.dequantize_experts(Ternary(), batch.codes, batch.levels, 32)
        for expert in range(3):
            one = gptq(kernels[expert], hessians[expert], Ternary(), group_size=8)
            codes = np.asarray(batch.codes[expert]).reshape(7, 32).T
            np.testing.assert_array_equal(codes, one.codes)
            levels = np.asarray(one.levels).reshape(7, 4, 2)
            for column in range(32):
                low, high = levels[:, column // 8].T
                expected = np.choose(codes[column], [0 * low, low, high])
                np.testing.assert_array_equal(values[expert, column], expected)
        error = np.sum((np.asarray(kernels) - np.asarray(values)) ** 2, axis=(1, 2)) / 32
        np.testing.assert_allclose(batch.weight_error, error, rtol=1e-5)

    def test_groups_lower_the_layer_error(self):
        kernels, hessians, counts = make_batch(2, 64, 16)
        whole = quantize_experts(kernels, hessians, counts, grid=Ternary())
        groups = quantize_experts(kernels, hessians, counts, grid=Ternary(), group_size=16)
        assert np.all(groups.layer_error < whole.layer_error)

    def test_a_size_that_does_not_divide_is_refused(self):
        W, H = make_problem(30, 4)
        with pytest.raises(ValueError, match=r"group_size is 8.*30 input features"):
            gptq(W, H, Ternary(), group_size=8)


def test_act_order_helps_on_a_skewed_diagonal():
    errors = []
    for seed in range(6):
        W, H = make_problem(32, 32, seed)
        scale = np.random.default_rng(seed).lognormal(sigma=1.5, size=32)
        H = H * jnp.asarray(np.outer(scale, scale), jnp.float32)
        pair = [jitted_gptq(W, H, Ternary(), act_order=flag) for flag in (True, False)]
        errors.append([float(result.layer_error) for result in pair])
    with_order, without = np.sum(errors, axis=0)
    assert with_order < without


@pytest.mark.parametrize("grid", [Ternary(), TwoBit()], ids=lambda grid: grid.name)
def test_worse_on_weights_and_better_on_outputs(grid):
    W, H = make_problem(96, 64)
    result = jitted_gptq(W, H, grid)
    rounded = round_to_nearest(W, grid)
    outputs = layer_error(W, rounded.codes, rounded.levels, H, grid)
    assert float(result.layer_error) < 0.9 * outputs
    swept_weights, rounded_weights = (
        jnp.sum((W - grid.dequantize(codes, result.levels)) ** 2)
        for codes in (result.codes, rounded.codes)
    )
    assert swept_weights > rounded_weights


@pytest.mark.parametrize("block_size", [96, *slow(64)])
def test_independent_of_the_block_size(block_size):
    W, H = make_problem(90, 48)
    expected = jitted_gptq(W, H, Ternary(), block_size=32).codes
    codes = jitted_gptq(W, H, Ternary(), block_size=block_size).codes
    assert share_equal(codes, expected) >= 0.9995


def test_block_size_is_checked():
    W, H = make_problem(8, 4)
    with pytest.raises(ValueError, match="block_size is 12; it must be a positive multiple of 16"):
        gptq(W, H, Ternary(), block_size=12)


def test_identity_hessian_is_round_to_nearest():
    W, _ = make_problem(70, 20)
    for hessian in (jnp.eye(70), jnp.zeros((70, 70))):
        result = jitted_gptq(W, hessian, Ternary())
        np.testing.assert_array_equal(result.codes, round_to_nearest(W, Ternary()).codes)
        assert not result.fell_back


def test_dead_input_features():
    W, H = make_problem(40, 16)
    dead = jnp.asarray([0, 3, 17, 39])
    H = H.at[dead].set(0.0).at[:, dead].set(0.0)
    result = jitted_gptq(W, H, Ternary())
    assert not result.fell_back
    assert share_equal(result.codes, slow_gptq(W, H, Ternary())) >= 0.9995
    # A dead feature neither gives nor takes feedback.
    rounded = round_to_nearest(W, Ternary()).codes
    np.testing.assert_array_equal(result.codes[dead], rounded[dead])


@pytest.mark.parametrize("num_in", [1, 31, 64, 100, 161])
def test_upper_factor(num_in):
    _, H = make_problem(num_in, 1)
    V = np.asarray(jax.jit(upper_factor, static_argnums=2)(H, jnp.full(num_in, 0.1), 96))
    np.testing.assert_array_equal(V, np.triu(V))
    np.testing.assert_allclose(V @ V.T, H + 0.1 * np.eye(num_in), atol=1e-5)


class TestExpertBatch:
    """What holds for a batch, however it is computed."""

    @pytest.mark.parametrize("how", HOW, ids=str)
    @pytest.mark.parametrize("act_order", [False, True])
    def test_equals_a_loop(self, how, act_order):
        kernels, hessians, counts = make_batch(4, 30, 20)
        result = quantize_experts(
            kernels, hessians, counts, grid=Ternary(), act_order=act_order, **how
        )
        assert result.status.tolist() == [ExpertStatus.OK] * 4
        for expert in range(4):
            one = jitted_gptq(kernels[expert], hessians[expert], Ternary(), act_order=act_order)
            assert share_equal(result.codes[expert], one.codes.T) >= 0.999
            np.testing.assert_array_equal(result.levels[expert], one.levels)
            values = Ternary().dequantize(one.codes, one.levels)
            np.testing.assert_allclose(result.zero_share[expert], np.mean(values == 0), atol=2e-3)
            np.testing.assert_allclose(result.layer_error[expert], one.layer_error, rtol=1e-3)
            np.testing.assert_allclose(
                result.weight_error[expert], one.weight_error / 30, rtol=1e-3
            )

    @pytest.mark.parametrize("how", HOW, ids=str)
    def test_a_bad_expert_costs_only_itself(self, how):
        kernels, hessians, counts = make_batch(6, 30, 12)
        clean = quantize_experts(kernels, hessians, counts, grid=Ternary(), **how)
        hessians = hessians.at[0].multiply(-1.0)  # not positive definite
        hessians = hessians.at[1, 5, 7].set(jnp.nan)
        hessians = hessians.at[2, 29, 29].set(jnp.inf)
        counts = counts.at[3].set(0)
        bad_kernels = kernels.at[4, 2, 3].set(jnp.nan)
        result = quantize_experts(bad_kernels, hessians, counts, grid=Ternary(), **how)
        assert result.status.tolist() == [
            ExpertStatus.SINGULAR,
            ExpertStatus.NONFINITE_INPUT,
            ExpertStatus.NONFINITE_INPUT,
            ExpertStatus.NO_TOKENS,
            ExpertStatus.NONFINITE_INPUT,
            ExpertStatus.OK,
        ]
        np.testing.assert_array_equal(result.layer_error[:5], np.zeros(5))
        for expert in range(4):
            rounded = round_to_nearest(kernels[expert], Ternary()).codes
            np.testing.assert_array_equal(result.codes[expert], rounded.T)
        finite = jnp.where(jnp.isfinite(bad_kernels[4]), bad_kernels[4], 0)
        rounded = round_to_nearest(finite, Ternary()).codes
        np.testing.assert_array_equal(result.codes[4], rounded.T)
        np.testing.assert_array_equal(result.codes[5], clean.codes[5])
        for field in (result.levels, result.weight_error, result.layer_error, result.zero_share):
            assert np.isfinite(np.asarray(field)).all()

    @pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
    def test_bfloat16_kernels(self, implementation):
        kernels, hessians, counts = make_batch(2, 20, 9)
        rounded = kernels.astype(jnp.bfloat16)
        pair = [
            quantize_experts(W, hessians, counts, grid=TwoBit(), implementation=implementation)
            for W in (rounded, rounded.astype(jnp.float32))
        ]
        for ours, expected in zip(*pair, strict=True):
            np.testing.assert_array_equal(ours, expected)

    @pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
    @pytest.mark.parametrize("group_size", [None, 3])
    def test_no_experts(self, implementation, group_size):
        kernels, hessians, counts = (array[:0] for array in make_batch(1, 6, 4))
        result = quantize_experts(
            *(kernels, hessians, counts),
            grid=Ternary(),
            group_size=group_size,
            implementation=implementation,
        )
        rows = 4 * 6 // (group_size or 6)
        assert result.codes.shape == (0, rows, group_size or 6)
        assert result.levels.shape == (0, rows, 2)

    @pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
    def test_padding_changes_nothing(self, implementation):
        kernels, hessians, counts = make_batch(3, 24, 10)
        full = quantize_experts(
            kernels, hessians, counts, grid=Ternary(), implementation=implementation
        )
        padded = [with_empty_expert(array[:2]) for array in (kernels, hessians, counts)]
        result = quantize_experts(*padded, grid=Ternary(), implementation=implementation)
        np.testing.assert_array_equal(result.codes[:2], full.codes[:2])
        assert result.status[2] == ExpertStatus.NO_TOKENS


class TestHostGptq:
    """The path of a CPU. Sizes around the panel (64), the tile (256) and the strip (1536)."""

    @pytest.mark.parametrize(
        "size",
        [
            *((1, 1), (31, 5), (129, 257), (70, 1537)),
            *slow((1, 7), (5, 1), (7, 3), (16, 16), (33, 12), (64, 9), (100, 40)),
            *slow((65, 5), (200, 300), (9, 1536)),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("grid", [Ternary(), TwoBit()], ids=lambda grid: grid.name)
    def test_agrees_with_the_slow_twin(self, size, grid):
        W, H = make_problem(*size, seed=sum(size))
        result = quantize_experts(W[None], H[None], jnp.ones(1), grid=grid, implementation="host")
        assert result.status.tolist() == [ExpertStatus.OK]
        codes = result.codes[0].T
        assert share_equal(codes, slow_gptq(W, H, grid)) >= 0.9995
        values = grid.dequantize(codes, result.levels[0])
        expected = layer_error(W, codes, result.levels[0], H, grid)
        np.testing.assert_allclose(result.layer_error[0], expected, rtol=1e-3, atol=1e-6)
        expected = np.sum(np.square(np.asarray(W - values, np.float64))) / size[0]
        np.testing.assert_allclose(result.weight_error[0], expected, rtol=1e-5, atol=1e-12)
        np.testing.assert_allclose(result.zero_share[0], np.mean(np.asarray(values) == 0), 1e-6)

    @pytest.mark.parametrize(
        "act_order_and_group_size",
        [(True, None), (False, 10), (True, 26), *slow((False, None), (True, 10), (False, 26))],
        ids=str,
    )
    def test_options_agree_with_the_slow_twin(self, act_order_and_group_size):
        act_order, group_size = act_order_and_group_size
        W, H = make_problem(130, 40, skew=1.5)
        grid, damping = TwoBit(), 0.03
        options = {"damping": damping, "act_order": act_order, "group_size": group_size}
        result = quantize_experts(
            W[None], H[None], jnp.ones(1), grid=grid, implementation="host", **options
        )
        codes = np.asarray(result.codes[0]).reshape(40, 130).T
        assert share_equal(codes, slow_gptq(W, H, grid, **options)) >= 0.9995

    def test_the_number_of_threads_changes_no_bit(self):
        kernels, hessians, _ = make_batch(5, 100, 33)
        values = Ternary().dequantize(
            jnp.broadcast_to(jnp.arange(3, dtype=jnp.uint8)[:, None], (3, 33)),
            Ternary().fit(kernels[0]),
        )
        values = np.broadcast_to(np.asarray(values), (5, 1, 3, 33)).copy()
        inputs = (np.asarray(kernels), np.asarray(hessians), values)
        one = host_gptq(*inputs, range(5), threads=1)
        for ours, expected in zip(host_gptq(*inputs, range(5), threads=4), one, strict=True):
            np.testing.assert_array_equal(ours, expected)
        some = host_gptq(*inputs, [3, 1], threads=2)
        np.testing.assert_array_equal(some.codes[[1, 3]], one.codes[[1, 3]])
        assert not some.codes[[0, 2, 4]].any()

    @pytest.mark.parametrize(("weight", "hessian"), [(1e25, 1.0), (3e38, 1.0), (1.0, 3e38)])
    def test_numbers_too_large_are_rounded_without_a_warning(self, weight, hessian):
        kernels, hessians, counts = make_batch(1, 70, 12)
        kernels = kernels.at[0, 3, 4].set(weight)
        hessians = hessians.at[0, 69, 69].set(hessian).at[0, 68, 68].set(hessian)
        result = quantize_experts(kernels, hessians, counts, grid=Ternary(), implementation="host")
        assert result.status.tolist() == [ExpertStatus.SINGULAR]
        rounded = round_to_nearest(kernels[0], Ternary()).codes
        np.testing.assert_array_equal(result.codes[0], rounded.T)

    def test_blas_gets_its_threads_back(self):
        threads = [library["num_threads"] for library in threadpoolctl.threadpool_info()]
        kernels, hessians, counts = make_batch(2, 20, 8)
        quantize_experts(kernels, hessians, counts, grid=Ternary(), implementation="host")
        assert [library["num_threads"] for library in threadpoolctl.threadpool_info()] == threads

    def test_inside_jit_xla_takes_over(self):
        kernels, hessians, counts = make_batch(2, 20, 8)
        quantize = functools.partial(quantize_experts, grid=Ternary())
        traced = jax.jit(quantize)(kernels, hessians, counts)
        assert share_equal(traced.codes, quantize(kernels, hessians, counts).codes) >= 0.999
        with pytest.raises(ValueError, match='"host" is for method="gptq" on one device outside'):
            jax.jit(functools.partial(quantize, implementation="host"))(kernels, hessians, counts)


def test_round_to_nearest_batch():
    kernels, hessians, counts = make_batch(2, 30, 12)
    result = quantize_experts(kernels, None, counts, grid=Ternary(), method="rtn")
    assert result.status.tolist() == [ExpertStatus.RTN_REQUESTED] * 2
    np.testing.assert_array_equal(result.layer_error, [0, 0])
    measured = quantize_experts(kernels, hessians, counts, grid=Ternary(), method="rtn")
    np.testing.assert_array_equal(result.codes, measured.codes)
    codes, levels = round_to_nearest(kernels[1], Ternary())
    np.testing.assert_array_equal(result.codes[1], codes.T)
    expected = layer_error(kernels[1], codes, levels, hessians[1], Ternary())
    np.testing.assert_allclose(measured.layer_error[1], expected, rtol=1e-4)
    better = quantize_experts(kernels, hessians, counts, grid=Ternary())
    assert (better.layer_error < measured.layer_error).all()
    assert (better.weight_error > measured.weight_error).all()


def test_same_shape_compiles_once_and_padding_needs_no_other():
    kernels, hessians, counts = make_batch(3, 24, 10)
    quantize = functools.partial(quantize_experts, grid=Ternary(), implementation="xla")
    quantize(kernels, hessians, counts, damping=0.1)
    before = expert_batch._quantize_experts._cache_size()
    padded = [with_empty_expert(array[:2]) for array in (kernels, hessians, counts)]
    quantize(*padded, damping=0.2)
    quantize(*padded, damping=0.1)
    assert expert_batch._quantize_experts._cache_size() == before


def test_bad_arguments_say_what_to_do():
    kernels, hessians, counts = make_batch(2, 8, 4)
    with pytest.raises(ValueError, match="method is 'awq'; it must be one of"):
        quantize_experts(kernels, hessians, counts, grid=Ternary(), method="awq")
    with pytest.raises(ValueError, match="hessians is None; method 'gptq' needs one Hessian"):
        quantize_experts(kernels, None, counts, grid=Ternary())
    with pytest.raises(ValueError, match="experts_at_once is 0; it must be at least 1"):
        quantize_experts(kernels, hessians, counts, grid=Ternary(), experts_at_once=0)
    with pytest.raises(ValueError, match="implementation is 'cuda'; it must be .* or 'auto'"):
        quantize_experts(kernels, hessians, counts, grid=Ternary(), implementation="cuda")
    with pytest.raises(ValueError, match='"host" is for method="gptq"'):
        quantize_experts(kernels, None, counts, grid=Ternary(), method="rtn", implementation="host")
    with pytest.raises(ValueError, match=r"group_size is 3.*8 input features"):
        quantize_experts(kernels, hessians, counts, grid=Ternary(), group_size=3)
