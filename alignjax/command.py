"""How a command ends: in order, or with one sentence and an exit code."""

import atexit
import gc
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress

from alignjax.errors import SharedError, printable, sentence_of

STOPPED = "stopped: what was saved stays, and the same command goes on from there."


def run(main: Callable[[], int]) -> int:
    """Runs a command and gives its exit code.

    2: a user's mistake or a disk's refusal, in one sentence. 1: training diverged, or a fault of
    alignjax itself, with its traceback. 130: Ctrl-C. ALIGNJAX_TRACEBACK=1 shows where a user's
    mistake was noticed too. Of several processes, one that fails alone ends at once and does not
    wait for the others, which would wait for it.
    """
    atexit.register(gc.freeze)  # or Python's end looks through jax for garbage: a third of a second
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # torch is not missed here
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # no run ends because a terminal lacks a character
            stream.reconfigure(errors="backslashreplace")
    trace = os.environ.get("ALIGNJAX_TRACEBACK", "0") not in ("", "0")
    if not trace:
        for name in ("absl", "asyncio"):  # Orbax logs what it raises as well
            logging.getLogger(name).setLevel(logging.CRITICAL)
        sys.unraisablehook = _show
    shared = False  # whether every process ends here
    try:
        return main()
    except FloatingPointError as error:
        said, code, shared = f"stopped: {error}", 1, True
    except KeyboardInterrupt:
        said, code = STOPPED, 128 + signal.SIGINT
    except Exception as error:
        sentence = sentence_of(error)
        if trace or not sentence:
            if not (processes := _processes()):
                raise
            said, code = traceback.format_exc().rstrip(), 1
            if type(error).__name__ == "JaxRuntimeError":
                time.sleep(processes.NEWS)  # where another process is gone, that is what is said
        else:
            said, code, shared = f"error: {sentence}", 2, isinstance(error, SharedError)
    processes = _processes()
    if not processes or (shared and processes.is_first()):
        _tell(said)
    elif not shared:
        _tell(f"process {processes.state.process_id}: {said}")
        processes.leave(said.splitlines()[-1])
        os._exit(code)  # jax's own end waits minutes for processes that are stuck
    return code


def _tell(text: str) -> None:
    with suppress(OSError):  # nobody reads it
        print(printable(text), file=sys.stderr, flush=True)


def _show(unraisable) -> None:
    """Prints a trace, but not those of writes that tensorstore ends after Orbax has given up."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _processes():
    """The module of that name, None where this process is alone; it is not imported for that."""
    module = sys.modules.get("alignjax.processes")
    return module if module and module.state.client and module.state.num_processes > 1 else None
