"""What a run shows while it works: a live bar on a terminal, plain lines in a log."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.text import Text

from alignjax.errors import printable

LOG_SECONDS = 10  # between lines of a phase in a log
LOG_WIDTH = 110  # columns of a table in a log


class _Console(Console):
    """Prints strings as they are: no markup, no emoji codes, no escape sequences of the data."""

    def render_str(self, text: str, **options) -> Text:
        return super().render_str(printable(text), **options)

    def render(self, renderable, options=None) -> Iterator[Segment]:
        for part in super().render(renderable, options):
            yield part if part.control else part._replace(text=printable(part.text))

    def on_broken_pipe(self) -> None:
        """Drop the output from here on: a run does not end because nobody reads its log."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


_terminal = sys.stdout.isatty()
console = _Console(
    highlight=False,
    markup=False,
    emoji=False,
    soft_wrap=True,
    width=None if _terminal else LOG_WIDTH,
)


def only_first_process(index: int) -> None:
    """Silences every process of a run but the first."""
    console.quiet = index != 0


def say(text: str) -> None:
    """A line that stays, above any bar."""
    console.print(text)


@contextmanager
def phase(title: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """Shows that `title` is under way; yields `update(done, note)`.

    On a terminal a spinner, with a bar where `total` is given, and the time left. Elsewhere a line
    at the start, one each 10 seconds that bring an update, and one at the end.
    """
    started = time.monotonic()
    if console.is_terminal and not console.quiet:
        columns = [SpinnerColumn(), TextColumn("{task.description}", markup=False)]
        if total is not None:
            columns += [BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
        columns += [TimeElapsedColumn(), TextColumn("{task.fields[note]}", markup=False)]
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(title, total=total, note="")
            yield lambda done, note="": bar.update(task, completed=done, note=note)
    else:
        say(f"{title} ...")
        last = started

        def update(done: int, note: str = "") -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= LOG_SECONDS:
                last = now
                say(f"{title}: {_remaining(done, total, now - started)} {note}".rstrip())

        yield update
    say(f"{title}: {time.monotonic() - started:.1f} s")


def _remaining(done: int, total: int | None, seconds: float) -> str:
    if not total or not done:
        return f"{done}, {seconds:.0f} s"
    return f"{done}/{total}, {seconds:.0f} s, ETA {clock(seconds / done * (total - done))}"


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def gigabytes(size: int) -> str:
    """A number of bytes for a user: "1.61 GB", "3.2 MB"."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
