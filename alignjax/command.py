"""How a command ends: in order, or with one sentence and an exit code."""

import dis
import errno
import logging
import os
import signal
import sys
from collections.abc import Callable

# What a disk can refuse, and what a user can do about it.
_DISK = {
    errno.ENOSPC: "no space is left on the disk; free some, and the same command goes on",
    errno.EDQUOT: "the disk quota is used up; free some, and the same command goes on",
    errno.EACCES: "permission is denied; name a place that this user may write to",
    errno.EEXIST: "this is a file, where a directory is needed; name another place",
    errno.ENOTDIR: "this lies below a file; name another place",
    errno.EROFS: "the file system is read-only; name a place that can be written to",
}


def run(main: Callable[[], int]) -> int:
    """Runs a command and gives its exit code.

    2: a user's mistake or a disk's refusal, in one sentence. 1: training diverged. 130: Ctrl-C.
    ALIGNJAX_TRACEBACK=1 shows where an error comes from; an error that no line of alignjax raised
    always does, since nobody has put it into words.
    """
    if not os.environ.get("ALIGNJAX_TRACEBACK"):
        for name in ("absl", "asyncio"):  # Orbax logs what it raises as well
            logging.getLogger(name).setLevel(logging.CRITICAL)
        sys.unraisablehook = _show
    try:
        return main()
    except (ValueError, OSError) as error:
        sentence = _sentence(error)
        if os.environ.get("ALIGNJAX_TRACEBACK") or not sentence:
            raise
        code = 2
    except FloatingPointError as error:
        sentence, code = f"stopped: {error}", 1
    except KeyboardInterrupt:
        sentence = "stopped: nothing of this start was saved; the same command starts again."
        code = 128 + signal.SIGINT
    if _speaks():
        print(sentence, file=sys.stderr)
    return code


def _show(unraisable) -> None:
    """Prints a trace, but not those of writes that tensorstore ends after Orbax has given up."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def _sentence(error: Exception) -> str:
    """What to tell a user of an error; empty where it is not one of ours or a disk's."""
    if isinstance(error, OSError) and error.errno in _DISK:
        return f"error: {error.filename or 'writing'}: {_DISK[error.errno]}."
    return f"error: {error}" if is_worded(error) else ""


def is_worded(error: Exception) -> bool:
    """Whether a `raise ValueError` of alignjax's own is where an error comes from."""
    trace = error.__traceback__
    while trace.tb_next:
        trace = trace.tb_next
    frame = trace.tb_frame
    raised = dis.opname[frame.f_code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"
    ours = frame.f_globals.get("__name__", "").partition(".")[0] in ("alignjax", "__main__")
    return type(error) is ValueError and raised and ours


def _speaks() -> bool:
    """Whether this is the process that tells; jax is asked only if it is there."""
    jax = sys.modules.get("jax")
    if not jax or not jax.distributed.is_initialized():
        return True
    return jax.process_index() == 0
