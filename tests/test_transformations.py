"""A module gives its plain logits under every transformation of JAX and Flax.

A new transformation is a row of `ONE_DEVICE` or `FOUR_DEVICES`: how it calls the module, and what
the plain call is that it must agree with. Run as a program, this file prints what the rows of
`FOUR_DEVICES` give as JSON; pytest's own process has one device.
"""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.experimental import checkify
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from markers import slow

import qmoe_jax
from qmoe_jax.generation.beam_search import beam_generate
from qmoe_jax.generation.sampling import greedy_generate, sample_generate

BATCH = 4
INPUTS_LENGTH, TARGETS_LENGTH = 12, 8
FACTORS = {"dropless": None, "capacity": 1.0}


def random_batch(size):
    """Encoder inputs, decoder inputs and targets, some of them padding."""
    rng = np.random.default_rng(0)
    inputs = rng.integers(3, 500, (size, INPUTS_LENGTH), np.int32)
    targets = rng.integers(3, 500, (size, TARGETS_LENGTH), np.int32)
    inputs[1:2, 9:], targets[1:2, 5:] = 0, 0
    return inputs, np.pad(targets[:, :-1], ((0, 0), (1, 0))), targets


def load(path, factor, num_devices=1):
    """A checkpoint's module and variables: its first dense and its first sparse layer.

    A third of the layers compiles in a third of the time.
    """
    module, variables = qmoe_jax.load_switch(
        path,
        "float32",
        factor,
        num_devices=num_devices,
        implementation="xla",  # which takes all of these; test_cpu_product.py has those of "cpu"
    )
    config = dataclasses.replace(
        module.config,
        num_encoder_layers=1,
        num_decoder_layers=2,
        encoder_sparse_layers=(),
        decoder_sparse_layers=(1,),
    )
    params = dict(variables["params"])
    for stack, left_out in ("encoder", ("1", "2", "3")), ("decoder", ("2", "3")):
        kept = params[stack].items()
        params[stack] = {name: part for name, part in kept if not name.endswith(left_out)}
    return module.clone(config=config), {"params": params}


def call(module):
    """The plain call, as a function of variables and a batch."""
    return lambda variables, *batch: module.apply(variables, *batch, enable_dropout=False)


def call_one(module):
    """The plain call on one example, [length] each."""
    return lambda variables, *one: call(module)(variables, *[x[None] for x in one])[0]


@functools.cache
def jitted(module):
    return jax.jit(call(module))


def plain(module, variables, batch, parts):
    """Logits of the plain call, jitted, the batch cut into so many calls."""
    pieces = zip(*[np.split(x, parts) for x in batch], strict=True)
    return np.concatenate([jitted(module)(variables, *piece) for piece in pieces])


@dataclasses.dataclass(frozen=True)
class Row:
    """A transformation.

    Attributes:
      logits: of a module, its variables and a batch.
      parts: calls that the batch is cut into: with a capacity, each is routed apart.
      same_program: it compiles what the plain call does, so logits are equal to the bit.
      dropless_only: it cannot be done with a capacity factor.
    """

    logits: Callable[[nn.Module, Any, tuple[np.ndarray, ...]], Any]
    parts: int = 1
    same_program: bool = False
    dropless_only: bool = False

    def check(self, logits, module, variables, batch):
        """Raise AssertionError unless logits are those of the plain call."""
        parts = self.parts if module.config.eval_capacity_factor else 1  # else they are the same
        expected = plain(module, variables, batch, parts)
        assert np.shape(logits) == expected.shape
        if self.same_program:
            np.testing.assert_array_equal(logits, expected)
        else:
            np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


# JAX's transformations of one example.


def vmap(module, variables, batch):
    one = jax.vmap(call_one(module), in_axes=(None, 0, 0, 0))
    return jax.jit(one)(variables, *batch)


def vmap_of_jit(module, variables, batch):
    return jax.vmap(jax.jit(call_one(module)), in_axes=(None, 0, 0, 0))(variables, *batch)


def scan(module, variables, batch):
    def loop(variables, *batch):
        return lax.scan(lambda c, one: (c, call_one(module)(variables, *one)), 0, batch)[1]

    return jax.jit(loop)(variables, *batch)


def map_examples(module, variables, batch):
    def loop(variables, *batch):
        return lax.map(lambda one: call_one(module)(variables, *one), batch)

    return jax.jit(loop)(variables, *batch)


def fori_loop(module, variables, batch):
    def loop(variables, *batch):
        def body(i, logits):
            return logits.at[i].set(call_one(module)(variables, *[x[i] for x in batch]))

        shape = (BATCH, TARGETS_LENGTH, module.config.num_embeddings)
        return lax.fori_loop(0, BATCH, body, jnp.zeros(shape))

    return jax.jit(loop)(variables, *map(jnp.asarray, batch))


# JAX's transformations of a batch.


def vmap_of_batches(module, variables, batch):
    halves = [x.reshape(2, BATCH // 2, -1) for x in batch]
    logits = jax.jit(jax.vmap(call(module), in_axes=(None, 0, 0, 0)))(variables, *halves)
    return logits.reshape(BATCH, *logits.shape[2:])


def vmap_of_variables(module, variables, batch):
    both = twice(variables)
    return jax.jit(jax.vmap(call(module), in_axes=(0, None, None, None)))(both, *batch)[1]


def cond(module, variables, batch):
    def either(variables, *batch):
        yes, no = call(module), lambda *operands: -call(module)(*operands)
        return lax.cond(batch[0][0, 0] > 0, yes, no, variables, *batch)

    return jax.jit(either)(variables, *batch)


def remat(module, variables, batch):
    return jax.jit(jax.checkpoint(call(module)))(variables, *batch)


def eager(module, variables, batch):
    return call(module)(variables, *batch)


def compiled_ahead(module, variables, batch):
    return jax.jit(call(module)).lower(variables, *batch).compile()(variables, *batch)


def checkified(module, variables, batch):
    checked = checkify.checkify(jax.jit(call(module)), errors=checkify.float_checks)
    error, logits = checked(variables, *batch)
    error.throw()
    return logits


def exported(module, variables, batch):
    stored = export.export(jax.jit(call(module)))(variables, *batch).serialize()
    return export.deserialize(stored).call(variables, *batch)


def exported_of_any_batch(module, variables, batch):
    scope = export.SymbolicScope()
    shapes = [export.symbolic_shape(f"batch, {x.shape[1]}", scope=scope) for x in batch]
    operands = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in shapes]
    stored = export.export(jax.jit(call(module)))(variables, *operands).serialize()
    return export.deserialize(stored).call(variables, *batch)


def under(*contexts):
    """The jitted call, traced and run in JAX's configuration contexts."""

    def logits(module, variables, batch):
        batch = [jnp.asarray(x) for x in batch]
        entered = [context() for context in contexts]
        for context in entered:
            context.__enter__()
        try:
            return jax.jit(call(module))(variables, *batch)
        finally:
            for context in reversed(entered):
                context.__exit__(None, None, None)

    return logits


no_ranks = functools.partial(jax.numpy_rank_promotion, "raise")
no_dtypes = functools.partial(jax.numpy_dtype_promotion, "strict")


# Flax's transformations, of the module inside of another.


class Lifted(nn.Module):
    model: nn.Module
    lift: Callable[..., Any]

    @nn.compact
    def __call__(self, *batch):
        return self.lift(self.model, *batch)


def lifted(lift):
    def logits(module, variables, batch):
        inside = {"params": {"model": variables["params"]}}
        return jax.jit(Lifted(module, lift).apply)(inside, *batch)

    return logits


def inner(model, *batch):
    return model(*batch, enable_dropout=False)


def inner_one(model, *one):
    return inner(model, *[x[None] for x in one])[0]


def inner_scan(model, *batch):
    def body(model, carry, *one):
        return carry, inner_one(model, *one)

    lift = nn.scan(body, variable_broadcast="params", split_rngs={"params": False})
    return lift(model, 0, *batch)[1]


def inner_cond(model, *batch):
    def no(model, *batch):
        return -inner(model, *batch)

    return nn.cond(batch[0][0, 0] > 0, inner, no, model, *batch)


INNER_VMAP = nn.vmap(
    inner_one, variable_axes={"params": None}, split_rngs={"params": False}, in_axes=0
)


def bound(module, variables, batch):
    def logits(variables, *batch):
        return module.bind(variables)(*batch, enable_dropout=False)

    return jax.jit(logits)(variables, *batch)


ONE_DEVICE = {
    "vmap": Row(vmap, BATCH),
    "vmap of jit": Row(vmap_of_jit, BATCH),
    "vmap of batches": Row(vmap_of_batches, 2),
    "vmap of variables": Row(vmap_of_variables),
    "scan": Row(scan, BATCH),
    "map": Row(map_examples, BATCH),
    "fori_loop": Row(fori_loop, BATCH),
    "cond": Row(cond),
    "remat": Row(remat),
    "eager": Row(eager),
    "compiled ahead": Row(compiled_ahead, same_program=True),
    "checkify": Row(checkified),
    "export": Row(exported),
    "export of any batch": Row(exported_of_any_batch, dropless_only=True),
    "no rank promotion": Row(under(no_ranks), same_program=True),
    "no dtype promotion": Row(under(no_dtypes), same_program=True),
    "debug_nans": Row(under(lambda: jax.debug_nans(True), lambda: jax.debug_infs(True))),
    "checking_leaks": Row(under(jax.checking_leaks), same_program=True),
    "transfer_guard": Row(under(lambda: jax.transfer_guard("disallow")), same_program=True),
    "x64": Row(under(lambda: jax.enable_x64(True))),
    "nn.jit": Row(lifted(nn.jit(inner))),
    "nn.remat": Row(lifted(nn.remat(inner))),
    "nn.vmap": Row(lifted(INNER_VMAP), BATCH),
    "nn.scan": Row(lifted(inner_scan), BATCH),
    "nn.cond": Row(lifted(inner_cond)),
    "nn.map_variables": Row(lifted(nn.map_variables(inner, "params", lambda params: params))),
    "bind": Row(bound, same_program=True),
}


# Several devices. Where not said otherwise, variables are on all of them and examples are split.

EVERYWHERE, SPLIT = PartitionSpec(), PartitionSpec("data")
SPECS = (EVERYWHERE, SPLIT, SPLIT, SPLIT)


def twice(variables):
    return jax.tree.map(lambda x: jnp.stack([x, x]), variables)


def two_devices():
    return Mesh(np.array(jax.devices()[:2]), ("data",))


def shard_map(make=call, **settings):
    """`shard_map` of what `make(module)` returns, with JAX's own checks."""

    def logits(module, variables, batch):
        mapped = jax.shard_map(
            make(module), mesh=two_devices(), in_specs=SPECS, out_specs=SPLIT, **settings
        )
        return jax.jit(mapped)(variables, *batch)

    return logits


def vmap_inside(module):
    return jax.vmap(call_one(module), in_axes=(None, 0, 0, 0))


def scan_inside(module):
    def loop(variables, *batch):
        return lax.scan(lambda c, one: (c, call_one(module)(variables, *one)), 0, batch)[1]

    return loop


def remat_inside(module):
    return jax.checkpoint(call(module))


def vmap_of_shard_map(module, variables, batch):
    mapped = jax.shard_map(call(module), mesh=two_devices(), in_specs=SPECS, out_specs=SPLIT)
    halves = [x.reshape(2, BATCH // 2, -1) for x in batch]
    logits = jax.jit(jax.vmap(mapped, in_axes=(None, 0, 0, 0)))(variables, *halves)
    return logits.reshape(BATCH, *logits.shape[2:])


def shard_map_of_variables(module, variables, batch):
    """Each device has variables of its own, and all examples."""

    def own(variables, *batch):
        return call(module)(jax.tree.map(lambda x: x[0], variables), *batch)[None]

    specs = (SPLIT, EVERYWHERE, EVERYWHERE, EVERYWHERE)
    mapped = jax.shard_map(own, mesh=two_devices(), in_specs=specs, out_specs=SPLIT)
    return jax.jit(mapped)(twice(variables), *batch)[1]


def shard_map_of_experts(module, variables, batch):
    """Each device has experts of its own, and all else in common."""
    is_own = functools.partial(jax.tree_util.tree_map_with_path, lambda path, _: kernels_of(path))
    own = is_own(variables)
    doubled = jax.tree.map(lambda x, o: jnp.stack([x, x]) if o else x, variables, own)
    specs = jax.tree.map(lambda o: SPLIT if o else EVERYWHERE, own)

    def logits(variables, *batch):
        held = jax.tree.map(lambda x, o: x[0] if o else x, variables, own)
        return call(module)(held, *batch)[None]

    mapped = jax.shard_map(
        logits, mesh=two_devices(), in_specs=(specs, *3 * (EVERYWHERE,)), out_specs=SPLIT
    )
    return jax.jit(mapped)(doubled, *batch)[1]


def kernels_of(path):
    return "'expert'" in jax.tree_util.keystr(path)


def shard_map_of_one_axis(module, variables, batch):
    """The other axis of the mesh is left to XLA."""
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("data", "other"))
    mapped = jax.shard_map(
        call(module), mesh=mesh, in_specs=SPECS, out_specs=SPLIT, axis_names={"data"}
    )
    return jax.jit(mapped)(variables, *batch)


def pmap(module, variables, batch):
    halves = [x.reshape(2, BATCH // 2, -1) for x in batch]
    logits = jax.pmap(call(module), in_axes=(None, 0, 0, 0))(variables, *halves)
    return np.asarray(logits).reshape(BATCH, *logits.shape[2:])


def sharded_inputs(module, variables, batch):
    placed = place(two_devices(), (variables, *batch), SPECS)
    return jax.jit(call(module))(*placed)


def exported_shard_map(module, variables, batch):
    mesh = two_devices()
    mapped = jax.shard_map(call(module), mesh=mesh, in_specs=SPECS, out_specs=SPLIT)
    stored = export.export(jax.jit(mapped))(variables, *batch).serialize()
    return export.deserialize(stored).call(*place(mesh, (variables, *batch), SPECS))


def place(mesh, operands, specs):
    shardings = [NamedSharding(mesh, spec) for spec in specs]
    return [jax.device_put(x, s) for x, s in zip(operands, shardings, strict=True)]


# Generation: loops over steps, on each device over its own prompts.


def random_prompts():
    return jnp.asarray(random_batch(BATCH)[0])


def answers(module, variables, prompts, kind):
    """Ids [batch, decodes, length] by a kind of generation."""
    if kind == "beams":
        found = beam_generate(module, variables, prompts, max_decode_length=5, beam_size=2)
    else:
        key, temperature = jax.random.key(3), {"sampled": 1.0, "greedy": 0.0}[kind]
        found = sample_generate(
            module, variables, prompts, key, max_decode_length=5, temperature=temperature, top_k=3
        )
    return found.tokens


def same_answers(kind, module, variables):
    """Whether prompts split over two devices are answered as in two calls."""
    prompts = random_prompts()
    mapped = jax.shard_map(
        lambda variables, prompts: answers(module, variables, prompts, kind),
        mesh=two_devices(),
        in_specs=(EVERYWHERE, SPLIT),
        out_specs=SPLIT,
    )
    halves = [answers(module, variables, half, kind) for half in np.split(prompts, 2)]
    return np.array_equal(jax.jit(mapped)(variables, prompts), np.concatenate(halves))


GENERATION = {
    f"shard_map of generation, {kind}": functools.partial(same_answers, kind)
    for kind in ("greedy", "sampled", "beams")
}


def exported_split_experts(module, variables, batch):
    stored = export.export(jax.jit(call(module)))(variables, *batch).serialize()
    placed = place(module.mesh, batch, 3 * (EVERYWHERE,))
    return export.deserialize(stored).call(variables, *placed)


FOUR_DEVICES = {
    "shard_map": Row(shard_map(), 2),
    "shard_map without checks": Row(shard_map(check_vma=False), 2),
    "shard_map of vmap": Row(shard_map(vmap_inside), BATCH),
    "shard_map of scan": Row(shard_map(scan_inside), BATCH),
    "shard_map of remat": Row(shard_map(remat_inside), 2),
    "vmap of shard_map": Row(vmap_of_shard_map, BATCH),
    "shard_map of variables": Row(shard_map_of_variables),
    "shard_map of experts": Row(shard_map_of_experts),
    "shard_map of one axis": Row(shard_map_of_one_axis, 2),
    "pmap": Row(pmap, 2),
    "sharded inputs": Row(sharded_inputs),
    "export of shard_map": Row(exported_shard_map, 2),
}
# The same for a module whose experts are split over all devices.
SPLIT_EXPERTS = {
    "split experts": Row(lambda module, variables, batch: jitted(module)(variables, *batch)),
    "split experts, vmap": Row(vmap, BATCH),
    "split experts, scan": Row(scan, BATCH),
    "split experts, remat": Row(remat),
    "split experts, export": Row(exported_split_experts),
    "split experts, no rank promotion": ONE_DEVICE["no rank promotion"],
}


# Compiled for each case apart, so the default run takes what differs most.
DEFAULT_ON_ONE_DEVICE = {
    ("compressed", "dropless"): (
        "vmap",
        "scan",
        "remat",
        "export of any batch",
        "no rank promotion",
        "no dtype promotion",
        "transfer_guard",
        "nn.vmap",
    ),
    ("native", "capacity"): ("vmap", "no rank promotion"),
}
DEFAULT_ON_FOUR_DEVICES = {
    ("compressed", "dropless"): ("shard_map", "shard_map of experts"),
    ("native", "capacity"): ("shard_map", "split experts"),
}


def cases(rows, default):
    """(checkpoint, routing, row) of the default run, and of all the others."""
    dropless = {name for name, row in rows.items() if getattr(row, "dropless_only", True)}
    every = [
        (checkpoint, routing, name)
        for checkpoint in ("native", "compressed")
        for routing in FACTORS
        for name in rows
        if routing == "dropless" or name not in dropless
    ]
    fast = [(*kind, name) for kind, names in default.items() for name in names]
    return fast, [case for case in every if case not in fast]


ON_ONE_DEVICE = cases(ONE_DEVICE, DEFAULT_ON_ONE_DEVICE)
ON_FOUR_DEVICES = cases(FOUR_DEVICES | SPLIT_EXPERTS | GENERATION, DEFAULT_ON_FOUR_DEVICES)


def run_on_four_devices(paths, chosen):
    """What is wrong with each case, or None."""
    found = {}
    loaded = functools.cache(load)
    batch = random_batch(BATCH)
    for checkpoint, routing, name in chosen:
        path, factor = paths[checkpoint], FACTORS[routing]
        one = loaded(path, factor)
        try:
            if name in GENERATION:
                problem = None if GENERATION[name](*one) else "other answers"
            else:
                used = loaded(path, factor, 4) if name in SPLIT_EXPERTS else one
                row = (FOUR_DEVICES | SPLIT_EXPERTS)[name]
                row.check(row.logits(*used, batch), *one, batch)
                problem = None
        except Exception as error:
            problem = repr(error)
        found["-".join((checkpoint, routing, name))] = problem
    return found


@pytest.fixture(scope="module")
def paths(base, gptq):
    return {"native": str(base), "compressed": str(gptq[0])}


@pytest.fixture(scope="module")
def loaded(paths):
    """`loaded(checkpoint, routing)`: a module and its variables."""
    return functools.cache(lambda checkpoint, routing: load(paths[checkpoint], FACTORS[routing]))


@pytest.mark.parametrize("case", [*ON_ONE_DEVICE[0], *slow(*ON_ONE_DEVICE[1])], ids="-".join)
def test_on_one_device(loaded, case):
    checkpoint, routing, name = case
    module, variables = loaded(checkpoint, routing)
    row, batch = ONE_DEVICE[name], random_batch(BATCH)
    row.check(row.logits(module, variables, batch), module, variables, batch)


@pytest.mark.parametrize("chosen", [ON_FOUR_DEVICES[0], *slow(ON_FOUR_DEVICES[1])], ids=len)
def test_on_four_devices(paths, chosen):
    process = subprocess.run(
        [sys.executable, __file__, json.dumps([paths, chosen])],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout.splitlines()[-1])
    assert len(found) == len(chosen)
    assert not {case: problem for case, problem in found.items() if problem}


KINDS = [("native", "capacity"), ("compressed", "dropless")]
OTHER_KINDS = [("native", "dropless"), ("compressed", "capacity")]


@pytest.mark.parametrize("kind", [*KINDS, *slow(*OTHER_KINDS)], ids="-".join)
def test_shapes_without_computing(loaded, kind):
    module, variables = loaded(*kind)
    logits = jax.eval_shape(call(module), variables, *random_batch(BATCH))
    assert logits.shape == (BATCH, TARGETS_LENGTH, module.config.num_embeddings)
    assert logits.dtype == jnp.float32


@pytest.mark.parametrize("kind", [*KINDS, *slow(*OTHER_KINDS)], ids="-".join)
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_export_for_other_devices(loaded, kind, platform):
    """Only lowered: nothing here runs it."""
    module, variables = loaded(*kind)
    lowered = export.export(jax.jit(call(module)), platforms=[platform])
    exported = lowered(variables, *random_batch(BATCH))
    assert exported.platforms == (platform,)
    assert exported.out_avals[0].shape == (BATCH, TARGETS_LENGTH, module.config.num_embeddings)


@pytest.mark.parametrize("kind", [*KINDS, *slow(*OTHER_KINDS)], ids="-".join)
@pytest.mark.parametrize("transform", [jax.jit, *slow(lambda function: function)])
def test_a_batch_of_no_examples(loaded, kind, transform):
    module, variables = loaded(*kind)
    config = module.config
    inputs, decoder_inputs, targets = batch = random_batch(0)

    def method(name):
        return transform(functools.partial(module.apply, enable_dropout=False, method=name))

    assert transform(call(module))(variables, *batch).shape == (0, 8, config.num_embeddings)
    encoded = method("encode")(variables, inputs)
    assert encoded.shape == (0, 12, config.embed_dim)
    logits = method("decode")(variables, encoded, inputs, decoder_inputs, targets)
    assert logits.shape == (0, 8, config.num_embeddings)


def test_tokens_for_no_prompts(loaded):
    module, variables = loaded("compressed", "dropless")
    prompts = jnp.zeros((0, INPUTS_LENGTH), jnp.int32)
    assert greedy_generate(module, variables, prompts, max_decode_length=5).shape == (0, 5)


if __name__ == "__main__":
    print(json.dumps(run_on_four_devices(*json.loads(sys.argv[1]))))
