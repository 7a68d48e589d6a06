"""SIGTERM and Ctrl-C: every process stops training after the same step."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax

from alignjax.command import STOPPED
from alignjax.processes import agree_to_stop


@contextmanager
def ending_at_once() -> Iterator[None]:
    """In the block Ctrl-C ends the process: arrays are read in threads, which crash at its end."""

    def end(number, frame) -> None:
        print(STOPPED, file=sys.stderr, flush=True)
        os._exit(128 + number)

    older = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, older)


@contextmanager
def asked_to_stop() -> Iterator[Callable[[int], bool]]:
    """While the block runs a signal does not end the process; yields `asked(step)`.

    Call it after each step, on every process: it is true at one step, the same for all, after a
    signal reached any of them. A second signal ends the process at once.
    """
    caught: list[int] = []

    def note(number, frame) -> None:
        signal.signal(number, signal.SIG_DFL)
        caught.append(number)
        os.write(2, b"stopping after the step begun last; a second signal ends at once\n")

    def asked(step: int) -> bool:
        if jax.process_count() == 1:
            return bool(caught)
        return agree_to_stop(step, bool(caught and caught.pop()))

    older = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in older.items():
            signal.signal(number, handler)
