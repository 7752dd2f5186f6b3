"""How long JAX took to compile: what a speed does not count."""

import functools
import time
from typing import Any, ClassVar

import jax.monitoring

# Tracing, lowering and the compiler itself; each event is recorded at its end.
_EVENTS = "/jax/core/compile/"


class CompileTime:
    """Counts the seconds of compilation within `with CompileTime() as compiling:`."""

    _open: ClassVar[list["CompileTime"]] = []

    def __init__(self) -> None:
        self._spans: list[tuple[float, float]] = []

    def __enter__(self) -> "CompileTime":
        _listen()
        self._open.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._open.remove(self)

    @property
    def seconds(self) -> float:
        """So many, so far. Functions are traced within functions: no second counts twice."""
        total, counted_to = 0.0, 0.0
        for start, end in sorted(self._spans):
            total += max(0.0, end - max(start, counted_to))
            counted_to = max(counted_to, end)
        return total


@functools.cache
def _listen() -> None:
    """Begin to listen, once a process: JAX takes listeners and does not give them back."""

    def record(event: str, duration_secs: float, **kwargs: Any) -> None:
        del kwargs
        if event.startswith(_EVENTS):
            end = time.perf_counter()
            for count in CompileTime._open:
                count._spans.append((end - duration_secs, end))

    jax.monitoring.register_event_duration_secs_listener(record)
