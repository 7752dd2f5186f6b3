"""The memory of a planned run, against XLA's account and what is allocated."""

import dataclasses
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plan_factories import facts, resources, some_tokens

from qmoe_jax.planning import memory
from qmoe_jax.planning.plan import make_plan
from qmoe_jax.planning.sizes import ZeroShare
from qmoe_jax.quantization import host_gptq
from qmoe_jax.quantization.expert_batch import quantize_experts
from qmoe_jax.quantization.grids import Ternary
from qmoe_jax.quantization.settings import CompressionSettings

ZEROS = {"ternary": ZeroShare(0.857, "given")}


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("name", ["switch_base_8", "switch_xxl_128", "switch_c_2048"])
def test_memory_grows_with_the_expert_batch(name, method, on_cpu):
    model, tokens = facts(name), some_tokens(100, 10)
    before = (0, 0)
    for batch in range(1, 9):
        settings = CompressionSettings(expert_batch=batch, method=method)
        host = sum(memory.host_memory(model, tokens, settings, buffers_on_disk=False).values())
        phases = memory.device_memory(model, tokens, settings, on_cpu=on_cpu)
        now = (host, sum(phases["quantize"].values()))
        assert now[0] > before[0]
        assert now[1] > before[1]
        before = now


@pytest.mark.parametrize(
    ("device", "host_gb"), [("t4", None), ("h100", 40.0), ("cpu", 60.0), ("t4", 2.0)]
)
def test_the_largest_expert_batch_is_the_largest_that_fits(device, host_gb):
    model, tokens, settings = facts(), some_tokens(), CompressionSettings()
    there = resources(device, host_bytes=None if host_gb is None else round(1e9 * host_gb))
    largest = make_plan(model, tokens, settings, there).largest_expert_batch

    def fits(batch):
        changed = dataclasses.replace(settings, expert_batch=batch)
        return memory.fits_memory(model, tokens, changed, there)

    # Memory only grows, as above: around the answer, and some others.
    tried = {*range(largest - 2, largest + 3), *range(1, model.config.num_experts + 1, 16)}
    tried &= set(range(1, model.config.num_experts + 1))
    assert [batch for batch in sorted(tried) if fits(batch)] == sorted(
        batch for batch in tried if batch <= largest
    )


@pytest.mark.parametrize(
    ("experts", "width", "out", "at_once"), [(2, 128, 320, 2), (2, 256, 64, 1), (3, 256, 128, 3)]
)
def test_workspace_against_xla_s_own_account(experts, width, out, at_once):
    """Not below what XLA allots, up to a tenth for what does not grow; not above twice that."""

    def quantize(kernels, hessians, counts):
        return quantize_experts(
            kernels, hessians, counts, grid=Ternary(), experts_at_once=at_once
        ).codes

    shapes = [(experts, width, out), (experts, width, width), (experts,)]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    compiled = jax.jit(quantize).lower(*arguments).compile()
    allotted = compiled.memory_analysis().temp_size_in_bytes
    predicted = memory.gptq_workspace(width, out, at_once)
    assert predicted > 0.9 * allotted
    assert predicted < 2 * allotted


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("width", "out", "threads"), [(512, 256, 1), (256, 1000, 2)])
def test_host_workspace_against_what_is_allocated(width, out, threads, act_order):
    """Not below it, and not above twice that."""
    kernels = np.random.default_rng(0).normal(size=(4, width, out)).astype(np.float32)
    hessians = np.broadcast_to(np.eye(width, dtype=np.float32), (4, width, width))
    values = np.zeros((4, 1, 3, out), np.float32)

    def quantize():
        return host_gptq.host_gptq(
            kernels, hessians, values, range(4), act_order=act_order, threads=threads
        )

    quantize()  # compiles
    tracemalloc.start()
    codes = quantize().codes
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    predicted = host_gptq.workspace_bytes(width, out, threads)
    # Index arrays, a tile of codes and Python's own do not grow with the kernel's area.
    assert predicted > 0.9 * (peak - codes.nbytes)
    assert predicted < 2.1 * (peak - codes.nbytes)


def test_hidden_states_and_buffers():
    model, tokens = facts(), some_tokens(100, 20)
    hidden = memory.hidden_state_bytes(model, tokens)
    assert hidden == {"encoder": 120 * 512 * 768 * 4, "decoder": 120 * 114 * 768 * 4}
    settings = CompressionSettings()
    held = {
        on_disk: memory.host_memory(model, tokens, settings, buffers_on_disk=on_disk)[
            "hidden states"
        ]
        for on_disk in (False, True)
    }
    assert held == {False: sum(hidden.values()), True: 0}
    output, buffers = memory.disk(
        model, tokens, settings, 5, zeros=ZEROS, buffers_on_disk=True, journal=False
    )
    assert output == {"compressed checkpoint": 5}
    assert sum(buffers.values()) == sum(hidden.values())
