"""How a command ends: in order, or with one sentence and an exit code."""

import atexit
import dis
import errno
import gc
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable

# What a disk can refuse, and what a user can do about it.
_DISK = {
    errno.ENOSPC: "no space is left on the disk; free some, and the same command goes on",
    errno.EDQUOT: "the disk quota is used up; free some, and the same command goes on",
    errno.EACCES: "permission is denied; name a place that this user may write to",
    errno.EEXIST: "this is a file, where a directory is needed; name another place",
    errno.EBUSY: "this is a mount point; name a directory in it",
    errno.ENAMETOOLONG: "this name is too long; name another place",
    errno.ENOTDIR: "this lies below a file; name another place",
    errno.EROFS: "the file system is read-only; name a place that can be written to",
}


def run(main: Callable[[], int]) -> int:
    """Runs a command and gives its exit code.

    2: a user's mistake or a disk's refusal, in one sentence. 1: training diverged. 130: Ctrl-C.
    ALIGNJAX_TRACEBACK=1 shows where an error comes from; an error that no line of alignjax raised
    always does, since nobody has put it into words. Of several processes, one that fails alone ends
    at once and does not wait for the others, which would wait for it.
    """
    atexit.register(gc.freeze)  # or Python's end looks through jax for garbage: a third of a second
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # torch is not missed here
    if not os.environ.get("ALIGNJAX_TRACEBACK"):
        for name in ("absl", "asyncio"):  # Orbax logs what it raises as well
            logging.getLogger(name).setLevel(logging.CRITICAL)
        sys.unraisablehook = _show
    shared = False  # whether every process ends here
    try:
        return main()
    except FloatingPointError as error:
        said, code, shared = f"stopped: {error}", 1, True
    except KeyboardInterrupt:
        said = "stopped: what was saved stays, and the same command goes on from there."
        code = 128 + signal.SIGINT
    except Exception as error:
        words = worded(error)
        if os.environ.get("ALIGNJAX_TRACEBACK") or not words:
            if _process() is None:
                raise
            said, code = traceback.format_exc().rstrip(), 1
        else:
            said, code, shared = f"error: {words}", 2, isinstance(error, SharedError)
    process = _process()
    if process is None or (shared and process == 0):
        print(said, file=sys.stderr)
    elif not shared:
        print(f"process {process}: {said}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(code)  # jax's own end waits minutes for processes that are stuck
    return code


class SharedError(ValueError):
    """A mistake that is told to every process, so that they end together."""


def _show(unraisable) -> None:
    """Prints a trace, but not those of writes that tensorstore ends after Orbax has given up."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def worded(error: Exception) -> str:
    """What to tell a user of an error: alignjax's own words, or a disk's; else nothing."""
    if isinstance(error, OSError) and error.errno in _DISK:
        return f"{error.filename or 'writing'}: {_DISK[error.errno]}."
    return str(error) if is_worded(error) else ""


def is_worded(error: Exception) -> bool:
    """Whether a `raise ValueError` of alignjax's own is where an error comes from."""
    trace = error.__traceback__
    while trace.tb_next:
        trace = trace.tb_next
    frame = trace.tb_frame
    raised = dis.opname[frame.f_code.co_code[trace.tb_lasti]] == "RAISE_VARARGS"
    ours = frame.f_globals.get("__name__", "").partition(".")[0] in ("alignjax", "__main__")
    return type(error) in (ValueError, SharedError) and raised and ours


def _process() -> int | None:
    """The number of this process, None where it is alone; jax is asked only if it is there."""
    jax = sys.modules.get("jax")
    if not jax or not jax.distributed.is_initialized() or jax.process_count() == 1:
        return None
    return jax.process_index()
