"""What XLA calls for products with stored codes: its structs, its threads, and its errors."""

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import fake_xla
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_xla import FakeApi, FakeCall, ask_metadata
from test_cpu_product import assert_close, make_experts, make_tokens

from qmoe_jax.ops.cpu import products as on_cpu
from qmoe_jax.ops.cpu import targets
from qmoe_jax.ops.cpu.products import stored_product

codings = pytest.mark.parametrize("coding", on_cpu.CODINGS)


def make_call(api, coding="lattice", tokens=20, threads=0, shape=(3, 70, 90), **changed):
    """A call with a result of sevens, and what the result should be close to."""
    experts, weights = make_experts(coding, *shape)
    x, index = make_tokens(tokens, shape[0], shape[2])
    names = on_cpu._array_names(experts.spec)
    operands = [np.array(x), np.array(index), *fake_xla.stored(experts, names)]
    places = {"x": 0, "index": 1} | {name: 2 + n for n, name in enumerate(names)}
    for name, change in changed.items():
        operands[places[name]] = change(operands[places[name]])
    y = np.full((tokens, shape[1]), 7, np.float32)
    return FakeCall(api, operands, y, [1, threads]), y, (weights, x, index)


def test_structs_are_those_of_the_header():
    """Names of fields and their order, in the jaxlib that is installed."""
    header = (Path(jax.ffi.include_dir()) / "xla/ffi/api/c_api.h").read_text()
    header = re.sub(r"//.*", "", header)
    for struct in fake_xla.STRUCTS:
        body = re.search(rf"struct {struct.NAME} {{(.*?)}}", header, re.DOTALL)
        renamed = "XLA_FFI_InternalExtension" if struct is fake_xla.Extension else ""
        body = body or re.search(rf"struct {renamed} {{(.*?)}}", header, re.DOTALL)
        found = re.findall(r"(\w+)(?:\))?;", body.group(1))
        own = [name for name, *_ in struct._fields_]
        if struct is fake_xla.Api:
            functions = {
                fake_xla.ERROR_CREATE: "Error_Create",
                fake_xla.ERROR_DESTROY: "Error_Destroy",
                fake_xla.SCHEDULE: "ThreadPool_Schedule",
                fake_xla.NUM_THREADS: "ThreadPool_NumThreads",
            }
            for number, name in functions.items():
                assert found[4 + number] == f"XLA_FFI_{name}"
            found, own = found[:4], own[:4]
        assert found[: len(own)] == own, struct.NAME
        if struct in (fake_xla.Buffer, fake_xla.Args, fake_xla.Rets, fake_xla.Attrs):
            assert len(found) == len(own)


@codings
def test_a_handler_offers_the_version_that_it_was_made_for(coding):
    handler = targets.handler(coding)
    assert ask_metadata(handler, None) == ((0, 1), 99)  # there is no state field yet
    assert ask_metadata(handler, FakeApi(version=(0, 1))) == ((0, 1), 99)
    assert ask_metadata(handler, FakeApi(version=(0, 3))) == ((0, 3), 0)
    assert ask_metadata(handler, FakeApi(version=(0, 9))) == ((0, 4), 0)
    assert ask_metadata(handler, FakeApi(version=(1, 0)))[0][0] == -1
    assert ask_metadata(handler, FakeApi(), size=20)[0][0] == -1


@codings
@pytest.mark.parametrize("when", ["now", "threads", "later", "never"])
def test_whenever_the_pool_runs_its_tasks(coding, when):
    """Not once does the caller depend on them, nor do they on the caller."""
    expected = None
    for threads in (1, 2, 7, 0):
        api = FakeApi(when)
        call, y, truth = make_call(api, coding, threads=threads)
        assert call.run(targets.handler(coding)) is None
        assert_close(y, *truth)
        assert not y[np.asarray(truth[2]) < 0].any()
        expected = y.copy() if expected is None else expected
        np.testing.assert_array_equal(y, expected)
        if when == "never":
            assert api.destroyed == sorted(api.errors)
            assert not api.scheduled
        elif threads:
            assert len(api.scheduled) == threads - 1
        for thread in api.threads:
            thread.join()
        if when == "later":
            y[:] = 5
            for task in api.scheduled:
                task()
            assert (y == 5).all()


def test_there_are_no_more_tasks_than_cores_and_pieces(monkeypatch):
    from qmoe_jax.host_threads import num_threads

    for pool in (1, 1000):
        call, _, _ = make_call(api := FakeApi(num_threads=pool))
        call.run(targets.handler("lattice"))
        assert len(api.scheduled) == min(pool, num_threads()) - 1
    call, _, _ = make_call(api := FakeApi(), threads=50, shape=(1, 33, 20))
    call.run(targets.handler("lattice"))
    assert len(api.scheduled) == 1  # of two blocks


@codings
def test_nothing_to_multiply(coding):
    for tokens in (0, 1):
        call, y, _ = make_call(FakeApi(), coding, tokens, index=lambda index: index * 0 - 1)
        assert call.run(targets.handler(coding)) is None
        assert not y.any()


@codings
@pytest.mark.parametrize(
    "changed",
    [
        {"x": lambda x: x.astype(np.float64)},
        {"x": lambda x: x[:-1]},
        {"x": lambda x: x[0]},
        {"index": lambda index: index[:-1]},
        {"index": lambda index: index.astype(np.int64)},
        {"words": lambda words: words.view(np.uint8)},
        {"expert_offsets": lambda offsets: offsets[:-1]},
        {"dictionaries": lambda dictionaries: dictionaries[:-1]},
    ],
)
def test_other_operands_are_refused(coding, changed):
    call, y, _ = make_call(api := FakeApi(), coding, **changed)
    code, message = api.errors[call.run(targets.handler(coding))]
    assert code == 3
    assert f"{coding} codes" in message
    assert (y == 7).all()


@codings
def test_other_frames_are_refused(coding):
    def change(frame):
        yield frame.args, "size", 3
        yield frame.rets, "size", 2
        yield frame.attrs, "size", 1
        yield frame, "stage", 2
        yield frame.args, "struct_size", 48
        yield frame, "struct_size", 160

    for number in range(6):
        call, y, _ = make_call(api := FakeApi(), coding)
        struct, name, value = list(change(call.frame))[number]
        setattr(struct, name, value)
        assert api.errors[call.run(targets.handler(coding))][0] == 3
        assert (y == 7).all()


@codings
def test_xla_raises_the_error(coding):
    name = targets.registered(coding)
    call = jax.ffi.ffi_call(name, jax.ShapeDtypeStruct((2, 3), jnp.float32))
    with pytest.raises(Exception, match=f"product with {coding} codes are not those that"):
        jax.jit(call)(jnp.ones((2, 4))).block_until_ready()


def test_a_version_that_does_not_fit_is_told(monkeypatch):
    monkeypatch.setattr(targets, "_names", {})

    def refuse(*args, **kwargs):
        raise ValueError("the handler's API version (-1.4) is incompatible")

    monkeypatch.setattr(jax.ffi, "register_ffi_target", refuse)
    with pytest.raises(RuntimeError, match=r"\(-1.4\) is incompatible. Use implementation='xla'"):
        targets.registered("lattice")


@codings
def test_many_programs_at_once(coding):
    """Every one waits for its own pieces only."""
    experts, weights = make_experts(coding, 4, 100, 130)
    run = jax.jit(lambda x, i: stored_product(x, i, experts, num_threads=3, least_piece=1))
    cases = [make_tokens(9, 4, 130, seed=seed) for seed in range(4)]
    expected = [np.asarray(run(*case)) for case in cases]
    wrong = []

    def repeat(number):
        for _ in range(40):
            if not np.array_equal(run(*cases[number]), expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=repeat, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert_close(expected[0], weights, *cases[0])


PROGRAM = """
import sys
import jax, jax.numpy as jnp, numpy as np
from functools import partial
from jax import export
from jax.experimental.shard_map import shard_map
from jax.sharding import Mesh, PartitionSpec as P
from test_cpu_product import make_experts, make_tokens
from qmoe_jax.ops.cpu.products import stored_product
from qmoe_jax.ops.experts import CodedExperts

hits = []
jax.monitoring.register_event_listener(
    lambda name, **_: hits.append(name) if name.endswith("cache_hits") else None
)
experts, _ = make_experts("lattice", 3, 70, 90)
x, index = make_tokens(16, 3, 90)
run = jax.jit(lambda x, i, a: stored_product(x, i, CodedExperts(experts.spec, a, 90)))
operands = x, index, experts.arrays
before = len(hits)
plain = np.asarray(run(*operands))
print("hits", len(hits) - before)

mesh = Mesh(jax.devices(), "d")
split = shard_map(
    lambda x, i, a: run(x, i, a), mesh=mesh, in_specs=(P("d"), P("d"), P()), out_specs=P("d")
)
np.testing.assert_array_equal(jax.jit(split)(*operands), plain)
for device in jax.devices():
    there = jax.device_put(operands, device)
    y = run(*there)
    assert y.devices() == {device}
    np.testing.assert_array_equal(y, plain)
batched = jax.vmap(run, in_axes=(0, 0, None))(x.reshape(4, 4, 90), index.reshape(4, 4), operands[2])
np.testing.assert_array_equal(np.asarray(batched).reshape(16, -1), plain)
print("devices", len(jax.devices()))

allowed = [export.DisabledSafetyCheck.custom_call("qmoe_jax_lattice_product")]
exported = export.export(run, disabled_checks=allowed)(*operands).serialize()
again = export.deserialize(exported).call(*operands)
np.testing.assert_array_equal(again, plain)
print("exported")
"""


def test_kept_programs_exports_and_several_devices(tmp_path):
    """In processes of four devices; the second finds the programs of the first."""
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    printed = []
    for _ in range(2):
        result = subprocess.run(
            [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        printed.append(result.stdout.split())
    assert printed[0] == ["hits", "0", "devices", "4", "exported"]
    assert printed[1] == ["hits", "1", "devices", "4", "exported"]


def test_auto_expands_where_xla_does_not_take_the_product(monkeypatch):
    from qmoe_jax.models import load

    assert load._xla_takes(["lattice"])

    def refuse(coding):
        raise RuntimeError("the API is another one")

    monkeypatch.setattr(targets, "registered", refuse)
    with pytest.warns(UserWarning, match="'xla' here, which is slower. the API is another one"):
        assert not load._xla_takes(["lattice"])
