"""What is shown of a loop: bars on a terminal, lines elsewhere, nothing for nothing."""

import io
import re
import time
import types

import pytest

from qmoe_jax import progress as module
from qmoe_jax.progress import progress


class Clock:
    """Seconds as a test lets them pass."""

    def __init__(self):
        self.now = 1000.0

    def time(self):
        return self.now

    monotonic = time


class Stderr(io.StringIO):
    def __init__(self, is_terminal):
        super().__init__()
        self.isatty = lambda: is_terminal


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr("tqdm.std.time", clock.time)
    monkeypatch.setattr(module._Lines, "_last", 0.0)
    return clock


@pytest.fixture
def terminal(monkeypatch, clock):
    stderr = Stderr(True)
    monkeypatch.setattr(module, "sys", types.SimpleNamespace(stderr=stderr))
    return stderr


@pytest.fixture
def log(monkeypatch, clock):
    stderr = Stderr(False)
    monkeypatch.setattr(module, "sys", types.SimpleNamespace(stderr=stderr))
    return stderr


def compression(clock, seconds):
    """Two layers of three batches, each of so many seconds."""
    with progress(title="compress", unit="layers", total=2, each=True) as outer:
        for layer in range(2):
            outer.note(f"layer {layer}")
            with progress(title="experts", unit="experts", total=6, inner=True) as inner:
                for _ in range(3):
                    clock.now += seconds
                    inner.update(2)
            outer.update()


class TestElsewhere:
    def test_a_line_a_layer(self, log, clock):
        compression(clock, 5)
        assert log.getvalue() == (
            "compress: 1/2 layers, 00:15, about 00:15 left, layer 0\n"
            "compress: 2/2 layers, 00:30, layer 1\n"
        )

    def test_and_one_in_half_a_minute_of_a_long_one(self, log, clock):
        compression(clock, 20)
        assert log.getvalue() == (
            "experts: 4/6 experts, 00:40, about 00:20 left\n"
            "experts: 6/6 experts, 01:00\n"
            "compress: 1/2 layers, 01:00, about 01:00 left, layer 0\n"
            "experts: 4/6 experts, 00:40, about 00:20 left\n"
            "experts: 6/6 experts, 01:00\n"
            "compress: 2/2 layers, 02:00, layer 1\n"
        )

    def test_few_bytes_a_second(self, log, clock):
        for _ in progress(range(128_000), title="evaluate", unit="batches"):
            clock.now += 1 / 128
        assert len(log.getvalue()) / 1000 < 3
        assert log.getvalue().splitlines()[-1] == "evaluate: 128,000/128,000 batches, 16:40"
        assert "\r" not in log.getvalue()

    def test_what_was_done_before_has_no_part_in_the_speed(self, log, clock):
        with progress(title="model", unit="tokens", total=4_000_000, scaled=True) as bar:
            bar.skip(2_000_000)
            clock.now += 60
            bar.update(1_000_000)
        assert log.getvalue() == "model: 3.00M/4.00M tokens, 01:00, about 01:00 left\n"

    def test_how_many_there_are_may_be_unknown(self, log, clock):
        for _ in progress(iter("ab"), title="tokenising", unit="examples"):
            clock.now += 31
        assert log.getvalue() == "tokenising: 1 examples, 00:31\ntokenising: 2 examples, 01:02\n"

    def test_a_loop_that_failed_is_not_said_to_have_ended(self, log, clock):
        def stopped():
            for number in (31, 1, 0):
                clock.now += number
                yield 1 / number

        with pytest.raises(ZeroDivisionError):
            list(progress(stopped(), title="x", unit="y", total=3))
        assert log.getvalue().startswith("x: 1/3 y")
        assert log.getvalue().count("\n") == 1


class TestOnATerminal:
    def test_bars_nested(self, terminal, clock):
        compression(clock, 5)
        last = terminal.getvalue().splitlines()[-1].split("\r")[-1]
        assert re.fullmatch(r"compress: 100%\|.*\| 2/2 \[00:30<00:00, .*layers, layer 1\]", last)
        assert "experts:  33%" in terminal.getvalue()

    def test_the_inner_bar_is_wiped_out(self, terminal, clock):
        with progress(title="inner", unit="x", total=2, inner=True) as bar:
            clock.now += 5
            bar.update()
        *_, last, after = terminal.getvalue().split("\r")
        assert last.isspace()
        assert after == ""


def test_clocks_go_on_while_nothing_is_counted(monkeypatch):
    """Of the outer bar too, and a bar appears although its first step is not done."""
    stderr = Stderr(True)
    monkeypatch.setattr(module, "sys", types.SimpleNamespace(stderr=stderr))
    monkeypatch.setattr(module, "_AT_ONCE", 0.1)
    monkeypatch.setattr(module, "_TICK", 0.1)
    inner = progress(title="inner", unit="y", total=2, inner=True)
    with progress(title="outer", unit="x", total=2), inner:
        deadline = time.monotonic() + 30
        while stderr.getvalue().count("outer:   0%") < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        shown = stderr.getvalue()
    for title in ("outer", "inner"):
        assert len(re.findall(rf"{title}:   0%.* 0/2 \[00:0\d<", shown)) >= 2
    deadline = time.monotonic() + 30
    while module._Bar._ticker is not None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert module._Bar._ticker is None


@pytest.mark.parametrize("where", ["terminal", "log"])
class TestNothing:
    """Neither a bar nor a line: there is nothing to do, or it is done at once."""

    def shown(self, request, where):
        return request.getfixturevalue(where).getvalue()

    def test_nothing_to_do(self, request, where, clock):
        self.shown(request, where)
        assert list(progress([], title="x", unit="y")) == []
        with progress(title="x", unit="y", total=0) as bar:
            clock.now += 100
            bar.note("z")
        assert self.shown(request, where) == ""

    def test_done_at_once(self, request, where, clock):
        self.shown(request, where)
        with progress(title="outer", unit="x", total=5) as outer:
            for _ in range(5):
                for _ in progress(range(100), title="inner", unit="y", inner=True):
                    clock.now += 0.0005
                outer.note("z")
                outer.update()
        assert outer.done == 5
        assert self.shown(request, where) == ""

    def test_not_wanted(self, request, where, clock):
        self.shown(request, where)
        for _ in progress(range(10), title="x", unit="y", shown=False):
            clock.now += 100
        assert self.shown(request, where) == ""
