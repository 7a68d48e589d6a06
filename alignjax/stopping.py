"""SIGTERM and Ctrl-C: every process stops training after the same step."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
from jax.experimental import multihost_utils

from alignjax.command import STOPPED


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
    signal reached any of them. A second signal, of several processes a second Ctrl-C, ends the
    process at once.

    Several processes agree through jax's preemption service, which takes SIGTERM for itself.
    """
    several = jax.process_count() > 1
    caught: list[int] = []

    def note(number, frame) -> None:
        signal.signal(number, signal.SIG_DFL)
        caught.append(number)
        if several:
            os.kill(os.getpid(), signal.SIGTERM)

    mine = (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM)
    older = {number: signal.signal(number, note) for number in mine}
    try:
        if several:
            yield multihost_utils.reached_preemption_sync_point
        else:
            yield lambda step: bool(caught)
    finally:
        for number, handler in older.items():
            signal.signal(number, handler)
