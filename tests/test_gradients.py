"""Gradients: of T5X's training loss beside T5X's own, of experts' products beside dense ones."""

import functools

import golden_data
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from markers import slow
from test_compressed_product import make_experts

import qmoe_jax
from qmoe_jax.checkpoints import names
from qmoe_jax.ops.experts import AdaptedExperts, DenseExperts, is_float
from qmoe_jax.ops.products import compressed_product, expert_mlp
from qmoe_jax.training.loss import training_loss

EVAL_FACTOR = {"base": 2.0, "xxl": 4.0, "c": 2.0}
CASES = [("c", "train_capacity")]
OTHER_CASES = [
    (model, case)
    for model in ("base", "xxl", "c")
    for case in ("eval_capacity", "train_capacity")
    if (model, case) not in CASES
]


@pytest.mark.parametrize("case", [*CASES, *slow(*OTHER_CASES)], ids="-".join)
def test_training_loss_and_every_gradient_are_t5x_own(golden_checkpoint, case):
    model, capacity = case
    path = golden_checkpoint(model, "t5x_float32_inference")
    module, variables = qmoe_jax.load_switch(path, "float32", EVAL_FACTOR[model])
    golden, expected = golden_data.load_golden(model), golden_data.load_gradients(model)
    batch = {n.split("/")[1]: jnp.asarray(golden[n]) for n in golden if n.startswith("batch/")}

    @jax.jit
    def loss_and_gradient(params):
        return jax.value_and_grad(training_loss_of, has_aux=True)(params)

    def training_loss_of(params):
        return training_loss(
            module,
            {"params": params},
            batch,
            num_tokens=jnp.float32((golden["batch/decoder_loss_weights"] > 0).sum()),
            enable_dropout=capacity == "train_capacity",
        )

    (loss, terms), gradient = loss_and_gradient(variables["params"])
    assert abs(loss - expected[f"{capacity}/loss"]) <= 1e-5
    ours = {"cross_ent_loss": "cross_entropy", "experts/auxiliary_loss": "auxiliary_loss"}
    for name in ("cross_ent_loss", "z_loss", "accuracy", "experts/auxiliary_loss"):
        wanted = expected[f"{capacity}/metric/{name}"]
        np.testing.assert_allclose(terms[ours.get(name, name)], wanted, rtol=1e-5)
    flat = names.flatten(gradient)
    wanted_names = {n.split("/grad/")[1] for n in expected if n.startswith(f"{capacity}/grad/")}
    assert flat.keys() == wanted_names
    for name, own in flat.items():
        own = np.asarray(own)
        wanted = expected[f"{capacity}/grad/{name}"]
        error = np.abs(golden_data.thinned(name, own) - wanted).max()
        assert error <= 1e-4 * np.abs(wanted).max(), name
        norm = np.linalg.norm(own.astype(np.float64))
        np.testing.assert_allclose(norm, expected[f"{capacity}/norm/{name}"], rtol=1e-4)


NUM_EXPERTS, EMBED, MLP, TOKENS = 4, 12, 20, 24
KINDS = ("dense", "tunstall", "lattice", "packed2")


def gated(hidden):
    return jax.nn.gelu(hidden[0]) * hidden[1]


def make_kernels(kind, adapted):
    """wi_0, wi_1 and wo; adapters of wi are shared, that of wo is every expert's own."""
    shapes = [(EMBED, MLP), (EMBED, MLP), (MLP, EMBED)]
    rng = np.random.default_rng(1)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    kernels = []
    for i, (num_in, num_out) in enumerate(shapes):
        if kind == "dense":
            kernel = DenseExperts(normal(NUM_EXPERTS, num_in, num_out))
        else:
            kernel = make_experts(kind, NUM_EXPERTS, num_out, num_in, seed=i)
        if adapted:
            count = 1 if i < 2 else NUM_EXPERTS
            kernel = AdaptedExperts(kernel, normal(count, num_in, 2), normal(count, 2, num_out))
        kernels.append(kernel)
    return kernels


def all_weights(kernel, floats):
    """[experts, in, out], all experts at once, as a function of the arrays of floats."""
    whole = kernel.layout()({**kernel.by_name, **floats})

    def one(expert):
        return whole.weights(whole.floats(expert), expert)

    return jax.lax.map(one, jnp.arange(NUM_EXPERTS))


def dense_mlp(x, index, weights, scale):
    """Every token by its expert's kernels, without a loop."""
    own = jnp.maximum(index, 0)
    dot = functools.partial(jnp.einsum, "ti,tio->to", precision="highest")
    hidden = gated([dot(x, w[own]) for w in weights[:-1]]) * scale[own]
    return jnp.where(index[:, None] < 0, 0, dot(hidden, weights[-1][own]))


def floats_of(kernel):
    return {name: array for name, array in kernel.by_name.items() if is_float(array)}


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(TOKENS, EMBED)), jnp.float32)
    # The last expert has no tokens, and some tokens have no expert.
    index = jnp.asarray(rng.integers(-1, NUM_EXPERTS - 1, TOKENS), jnp.int32)
    scale = jnp.asarray(rng.integers(0, 2, (NUM_EXPERTS, MLP)) * 2.0, jnp.float32)
    weight = jnp.asarray(rng.normal(size=(TOKENS, EMBED)), jnp.float32)
    return x, index, scale, weight


CASES_OF_EXPERTS = [("tunstall", "cpu", True), ("dense", "xla", False)]
OTHERS = [
    (kind, implementation, adapted)
    for kind in KINDS
    for implementation in ("xla", "cpu")
    for adapted in (False, True)
    if (kind, implementation, adapted) not in CASES_OF_EXPERTS
]


@pytest.mark.parametrize("case", [*CASES_OF_EXPERTS, *slow(*OTHERS)], ids=str)
def test_gradients_of_experts_are_those_through_dense_kernels(inputs, case):
    kind, implementation, adapted = case
    x, index, scale, weight = inputs
    kernels = make_kernels(kind, adapted)

    def loss(x, floats, mlp):
        return jnp.sum(weight * jnp.tanh(0.1 * mlp(x, floats)))

    def ours(x, floats):
        *wi, wo = (k.layout()({**k.by_name, **own}) for k, own in zip(kernels, floats, strict=True))
        return expert_mlp(
            x,
            index,
            num_experts=NUM_EXPERTS,
            wi=wi,
            wo=wo,
            activation=gated,
            hidden_scale=scale,
            implementation=implementation,
        )

    def dense(x, floats):
        weights = [all_weights(k, own) for k, own in zip(kernels, floats, strict=True)]
        return dense_mlp(x, index, weights, scale)

    def gradient(mlp):
        return jax.jit(jax.value_and_grad(functools.partial(loss, mlp=mlp), (0, 1)))

    # "cpu" takes levels as they are stored; "xla" as finely as a gradient is computed.
    floats = [floats_of(kernel) for kernel in kernels]
    if implementation == "xla":
        floats = jax.tree.map(lambda array: array.astype(jnp.float32), floats)
    value, found = gradient(ours)(x, floats)
    expected_value, expected = gradient(dense)(x, floats)
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    for own, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert own.dtype == wanted.dtype
        # A gradient of bfloat16 levels is of bfloat16 numbers.
        tolerance = 2.0**-7 if own.dtype == jnp.bfloat16 else 2e-5
        own, wanted = (np.asarray(array, np.float32) for array in (own, wanted))
        assert np.abs(own - wanted).max() <= tolerance * np.abs(wanted).max()
    assert np.abs(np.asarray(found[0]))[np.asarray(index) < 0].max() == 0


@pytest.mark.parametrize("kind", ["packed2", *slow("lattice")])
def test_gradients_of_one_kernel_are_finite_differences(inputs, kind):
    x, index, _, _ = inputs
    experts = make_kernels(kind, adapted=False)[0]
    (name,) = floats_of(experts)

    @jax.jit
    def loss(x, floats):
        own = experts.layout()({**experts.by_name, name: floats})
        y = compressed_product(x, index, own, num_experts=NUM_EXPERTS, out_features=MLP)
        return jnp.sum(y**2)

    floats = experts.arrays[name].astype(jnp.float32)
    gradient = jax.jit(jax.grad(loss, (0, 1)))(x, floats)
    rng = np.random.default_rng(2)
    step = 1e-2  # the loss is quadratic: central differences are exact but for rounding
    for i, start in enumerate((x, floats)):
        along = jnp.asarray(rng.normal(size=start.shape), jnp.float32) * jnp.abs(start).mean()
        ends = [[x, floats], [x, floats]]
        ends[0][i], ends[1][i] = start + step * along, start - step * along
        slope = (loss(*ends[0]) - loss(*ends[1])) / (2 * step)
        np.testing.assert_allclose(slope, jnp.vdot(gradient[i], along), rtol=2e-3)


def test_gradients_of_frozen_kernels_are_not_computed(inputs):
    """With a gradient of x alone, nothing as large as all kernels is in the program."""
    x, index, _, weight = inputs
    kernels = make_kernels("dense", adapted=False)

    def loss(x, arrays):
        *wi, wo = (k.layout()(own) for k, own in zip(kernels, arrays, strict=True))
        y = expert_mlp(x, index, num_experts=NUM_EXPERTS, wi=wi, wo=wo, activation=gated)
        return jnp.sum(weight * y)

    arrays = [kernel.by_name for kernel in kernels]
    shape = f"{NUM_EXPERTS},{EMBED},{MLP}"
    frozen, trained = (
        str(jax.make_jaxpr(jax.grad(loss, wanted))(x, arrays)).count(f"f32[{shape}] = broadcast")
        for wanted in (0, (0, 1))
    )
    assert (frozen, trained) == (0, 2)


@pytest.mark.parametrize("transform", ["remat", "vmap", "scan"])
def test_gradients_under_transformations(inputs, transform):
    x, index, _, weight = inputs
    kernels = make_kernels("dense", adapted=False)

    def loss(x):
        y = expert_mlp(
            x, index, num_experts=NUM_EXPERTS, wi=kernels[:2], wo=kernels[2], activation=gated
        )
        return jnp.sum(weight * y)

    expected = jax.jit(jax.grad(loss))(x)
    both = jnp.stack([x, 2 * x])
    if transform == "remat":
        found = jax.jit(jax.grad(jax.checkpoint(loss)))(x)
    elif transform == "vmap":
        found = jax.jit(jax.vmap(jax.grad(loss)))(both)[0]
    else:
        found = jax.jit(lambda xs: jax.lax.scan(lambda c, x: (c, jax.grad(loss)(x)), 0, xs)[1])(
            both
        )[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
