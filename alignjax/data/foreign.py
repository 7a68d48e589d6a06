"""Running what came with a model, its chat template and its tokenizer, within bounds."""

import os
import resource
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache

from jinja2 import sandbox

SECONDS, MEMORY = 10, 1 << 30  # that a chat template may take for one text


@contextmanager
def bounded() -> Iterator[None]:
    """Raise TimeoutError or MemoryError in code that takes too much, on the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    limits = resource.getrlimit(resource.RLIMIT_AS)
    if size := _opened_size():
        used = int(os.pread(size, 100, 0).split()[0]) * resource.getpagesize()
        most = min(n for n in (used + MEMORY, *limits) if n != resource.RLIM_INFINITY)
        resource.setrlimit(resource.RLIMIT_AS, (most, limits[1]))
    timer = signal.setitimer(signal.ITIMER_REAL, SECONDS, 0.1)  # again, where a template caught it
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        resource.setrlimit(resource.RLIMIT_AS, limits)


@cache
def _opened_size() -> int:
    """Prepare the process once; return the open file of its size, 0 where there is none."""
    signal.signal(signal.SIGALRM, _stop)
    sandbox.SandboxedEnvironment.intercepted_binops = frozenset(["**"])  # else folded on compiling
    sandbox.SandboxedEnvironment.default_binop_table["**"] = _power
    return os.open("/proc/self/statm", os.O_RDONLY) if sys.platform == "linux" else 0


def _stop(_, frame) -> None:
    if frame.f_code is not bounded.__wrapped__.__code__:  # which is about to end the alarm
        raise TimeoutError


def _power(base: float, exponent: float) -> float:
    """Return a power that is no larger than 64k bits; no signal stops the making of it."""
    if isinstance(base, int) and base.bit_length() * exponent > 1 << 16:
        raise OverflowError("a power is too large")
    return base**exponent


@contextmanager
def quiet() -> Iterator[None]:
    """Drop what is written to stderr in a block that fails: a panic in Rust says so by itself."""
    if sys.stderr is None:
        yield
        return
    with tempfile.TemporaryFile() as kept:
        before = os.dup(2)
        os.dup2(kept.fileno(), 2)
        try:
            yield
        except BaseException:
            kept.truncate(0)
            raise
        finally:
            os.dup2(before, 2)
            os.close(before)
            kept.seek(0)
            with suppress(OSError):
                os.write(2, kept.read())


def is_error(error: BaseException) -> bool:
    """Whether it is an error of the code that ran; a panic in Rust is no `Exception`."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"
