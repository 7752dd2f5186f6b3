"""Seconds of compilation, apart from those of computing; and the speed that `infer` prints."""

import re
import time

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np

from qmoe_jax.cli.printed_answers import Speed
from qmoe_jax.generation import compile_time
from qmoe_jax.generation.compile_time import CompileTime

TRACE = "/jax/core/compile/jaxpr_trace_duration"
COMPILE = "/jax/core/compile/backend_compile_duration"


def test_compilation_is_counted_and_computing_is_not():
    @jax.jit
    def slow_to_trace(x):
        time.sleep(0.2)

        @jax.jit
        def inner(y):
            time.sleep(0.1)
            return jnp.sin(y)

        return inner(x) + 1

    x = np.ones(3)
    start = time.perf_counter()
    with CompileTime() as first:
        jax.block_until_ready(slow_to_trace(x))
    assert 0.3 <= first.seconds <= time.perf_counter() - start
    with CompileTime() as second:
        jax.block_until_ready(slow_to_trace(x))
        time.sleep(0.05)
    assert second.seconds == 0


def test_no_second_counts_twice(monkeypatch):
    """Events are recorded at their ends, those within others first."""
    now = [0.0]
    with CompileTime() as outer, CompileTime() as count:
        monkeypatch.setattr(compile_time.time, "perf_counter", lambda: now[0])
        for end, seconds, event in (
            (2.0, 1.0, TRACE),
            (4.0, 1.5, TRACE),
            (5.0, 4.5, TRACE),  # around both
            (8.0, 2.0, COMPILE),
            (9.0, 9.0, "/jax/something/else"),
        ):
            now[0] = end
            jax.monitoring.record_event_duration_secs(event, seconds)
    assert count.seconds == 4.5 + 2.0
    assert outer.seconds == count.seconds
    now[0] = 20.0
    jax.monitoring.record_event_duration_secs(COMPILE, 1.0)
    assert count.seconds == 6.5


class TestSpeed:
    def test_compilation_is_not_in_it(self):
        speed = Speed()
        speed.add(30, 1.0, 6.0)
        speed.add(60, 2.0, 0.0)
        line = speed.summary()
        assert line.startswith(
            "90 tokens in 3.0 s, 30.0 tokens/s, besides 6.0 s of compilation; peak memory "
        )

    def test_nothing_was_compiled(self):
        speed = Speed()
        speed.add(5, 0.5, 0.0)
        assert re.match(r"5 tokens in 0\.5 s, 10\.0 tokens/s; peak memory ", speed.summary())

    def test_nothing_was_generated(self):
        assert Speed().summary().startswith("nothing was left to generate; ")
