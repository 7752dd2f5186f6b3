"""How far a loop is: a bar on a terminal; in a file or a pipe a line every so often.

What takes no time shows nothing, and neither does what has nothing to do.
"""

import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

from tqdm import tqdm

# What is done before that many seconds is done at once, to a reader.
_AT_ONCE = 1.0
# Between two looks at the clocks of bars.
_TICK = 1.0
# Between two lines, where they do not come of themselves.
_SECONDS = 30.0


class Progress:
    """Counts, and shows nothing. `progress` makes those that show.

    Attributes:
      done: so many of the units.
    """

    def __init__(self, iterable: Iterable[Any] | None = None):
        """Begin at 0; `iterable` is what `iter` goes through, counting."""
        self.done = 0
        self._iterable = () if iterable is None else iterable

    def __iter__(self) -> Iterator[Any]:
        with self:
            for item in self._iterable:
                yield item
                self.update()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None)

    def update(self, count: int = 1) -> None:
        """Count what was done."""
        self.done += count

    def skip(self, count: int) -> None:
        """Count what was done before, as by an earlier run: it has no part in the speed."""
        self.done += count

    def note(self, text: str) -> None:
        """Say something of what is being done, shown with the next count."""

    def close(self, *, failed: bool = False) -> None:
        """End; nothing is counted after it."""


def progress(
    iterable: Iterable[Any] | None = None,
    *,
    title: str,
    unit: str,
    total: int | None = None,
    scaled: bool = False,
    shown: bool = True,
    inner: bool = False,
    each: bool = False,
) -> Progress:
    """Show how far a loop is, on stderr.

    Args:
      iterable: what is gone through, by `for ... in progress(...)`; otherwise call `update`.
      title: what is being done.
      unit: what is counted, in the plural.
      total: how many there are; that of `iterable`, as far as it tells, where None.
      scaled: write 1.2M for 1,200,000.
      shown: False only counts.
      inner: part of another loop that is shown; its bar disappears at its end.
      each: off a terminal a line for each update, instead of one in half a minute.
    """
    if total is None and hasattr(iterable, "__len__"):
        total = len(iterable)  # pyright: ignore[reportArgumentType]
    if not shown or total == 0 or sys.stderr is None:
        return Progress(iterable)
    if sys.stderr.isatty():
        return _Bar(iterable, title, unit, total, scaled, inner)
    return _Lines(iterable, title, unit, total, scaled, each)


class _Bar(Progress):
    """A bar. Its clock goes on, and it appears, while what it counts takes its time."""

    _open: ClassVar[set["_Bar"]] = set()
    _ticker: ClassVar[threading.Thread | None] = None
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(
        self,
        iterable: Iterable[Any] | None,
        title: str,
        unit: str,
        total: int | None,
        scaled: bool,
        inner: bool,
    ):
        super().__init__(iterable)
        self._bar = _Delayed(
            total=total,
            desc=title,
            unit=unit,
            unit_scale=scaled,
            leave=not inner,
            delay=_AT_ONCE,
            file=sys.stderr,
        )
        with self._lock:
            self._open.add(self)
            if _Bar._ticker is None:
                _Bar._ticker = threading.Thread(target=_tick, daemon=True)
                _Bar._ticker.start()

    def update(self, count: int = 1) -> None:
        super().update(count)
        self._bar.update(count)

    def skip(self, count: int) -> None:
        super().skip(count)
        self._bar.initial += count
        self._bar.update(count)

    def note(self, text: str) -> None:
        self._bar.set_postfix_str(text, refresh=False)

    def close(self, *, failed: bool = False) -> None:
        with self._lock:
            self._open.discard(self)
        self._bar.close()


def _tick() -> None:
    """Move the clocks of all open bars until there is none."""
    while True:
        threading.Event().wait(_TICK)
        with _Bar._lock:
            if not _Bar._open:
                _Bar._ticker = None
                return
            for bar in _Bar._open:
                bar._bar.refresh()


class _Delayed(tqdm):
    """tqdm that keeps its delay when it is told to refresh, and then knows that it was shown."""

    def refresh(self, *args: Any, **options: Any) -> Any:
        if self.disable or time.time() < self.start_t + self.delay:
            return None
        # What `close` looks at, to clear what was shown.
        self.last_print_t = max(self.last_print_t, self.start_t + self.delay)
        return super().refresh(*args, **options)


class _Lines(Progress):
    """A line every so often, whatever loops are open; and one at the end of what had some."""

    _last = 0.0

    def __init__(
        self,
        iterable: Iterable[Any] | None,
        title: str,
        unit: str,
        total: int | None,
        scaled: bool,
        each: bool,
    ):
        super().__init__(iterable)
        self._title, self._unit, self._total = title, unit, total
        self._scaled, self._each = scaled, each
        self._skipped = 0
        self._note = ""
        self._told: int | None = None
        self._start = time.monotonic()

    def update(self, count: int = 1) -> None:
        super().update(count)
        if self._each or time.monotonic() - max(_Lines._last, self._start) >= _SECONDS:
            self._tell()

    def skip(self, count: int) -> None:
        super().skip(count)
        self._skipped += count

    def note(self, text: str) -> None:
        self._note = text

    def close(self, *, failed: bool = False) -> None:
        if self._told not in (None, self.done) and not failed:
            self._tell()

    def _tell(self) -> None:
        self._told = self.done
        _Lines._last = time.monotonic()
        seconds = _Lines._last - self._start
        total = "" if self._total is None else f"/{self._count(self._total)}"
        line = f"{self._title}: {self._count(self.done)}{total} {self._unit}, "
        line += tqdm.format_interval(seconds)
        counted = self.done - self._skipped
        if self._total is not None and counted > 0 and self.done < self._total:
            left = seconds / counted * (self._total - self.done)
            line += f", about {tqdm.format_interval(left)} left"
        # One write: lines of several threads or processes do not mix.
        sys.stderr.write(line + (f", {self._note}" if self._note else "") + "\n")
        sys.stderr.flush()

    def _count(self, number: int) -> str:
        return tqdm.format_sizeof(number) if self._scaled else f"{number:,}"
