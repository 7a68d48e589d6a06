"""One run, one directory: a second run in a directory is refused while the first one lives."""

import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from alignjax.errors import UserError
from alignjax.files import is_remote, make_directory, read_json, write_whole

BEAT_SECONDS = 30  # between heartbeats of a run on an object store
DEAD_SECONDS = 180  # without a heartbeat, after which its run counts as dead
SETTLE_SECONDS = 2  # between writing a claim on an object store and reading whose claim stands
_places: dict[str, os.stat_result] = {}  # absolute path of each directory held on a disk


@contextmanager
def held(directory: Path, key: str = "--run_dir") -> Iterator[None]:
    """Holds a run directory for the block; `key` is what a user named it by.

    On a disk by `flock`, which the kernel lets go of when the process dies, however it dies. An
    object store has no locks: there a heartbeat is written each 30 seconds, and a run that has
    missed them for 180 seconds counts as dead, and ends at its next one if another has taken over.

    Raises UserError with the owner's host and process id where another run holds it.
    """
    make_directory(directory)
    with _beating(directory) if is_remote(directory) else _locked(directory, key):
        yield


def check_place(directory: Path) -> None:
    """Refuse to write into a held directory that was moved, deleted or replaced meanwhile."""
    then = _places.get(os.path.abspath(directory))
    if then and not (directory.is_dir() and os.path.samestat(then, os.stat(directory))):
        raise UserError(
            f"{directory}: it was moved or replaced while this run was writing there; bring it "
            "back, and the same command goes on."
        )


def owner(directory: Path) -> str:
    """Return the id of the run that holds a directory; "" where none is seen there."""
    return (_owner(directory / ".lock") or {}).get("run", "")


@contextmanager
def _locked(directory: Path, key: str) -> Iterator[None]:
    path = directory / ".lock"
    with path.open("a+", encoding="utf-8", errors="replace") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(_refusal(directory, _owner(path) or {}, key)) from None
        if not (path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno()))):
            raise UserError(f"{directory}: another run has just ended here; start this one again.")
        if path.stat().st_size and _owner(path) is None:
            raise UserError(f"{path}: this is no run's; move it away, or choose another {key}.")
        file.truncate(0)
        file.write(json.dumps(_me()))
        file.flush()
        os.fsync(file.fileno())  # for other hosts to see
        _places[os.path.abspath(directory)] = directory.stat()
        try:
            yield
        finally:
            del _places[os.path.abspath(directory)]


@contextmanager
def _beating(directory: Path) -> Iterator[None]:
    file, me = directory / ".lock", _me()
    owner = read_json(file) if file.exists() else {}
    if time.time() - owner.get("beat", 0) < DEAD_SECONDS:
        more = f"; if it is dead, wait {DEAD_SECONDS} seconds from its last sign of life"
        raise UserError(_refusal(directory, owner, f"--run_dir{more}"))
    ended = threading.Event()

    def beat() -> None:
        write_whole(file, json.dumps({**me, "beat": time.time()}))

    def beat_on() -> None:
        while not ended.wait(BEAT_SECONDS):
            owner = _owner(file)
            if owner and owner.get("run") != me["run"]:  # this one stood still for too long
                said = f"error: {_refusal(directory, owner, '--run_dir')}"
                print(said, file=sys.stderr, flush=True)
                os._exit(2)
            else:
                with suppress(Exception):  # a store's client's own; the next beat tries again
                    beat()

    beat()
    time.sleep(SETTLE_SECONDS)
    owner = read_json(file)
    if owner.get("run") != me["run"]:
        raise UserError(_refusal(directory, owner, "--run_dir"))
    thread = threading.Thread(target=beat_on, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        owner = _owner(file)
        if owner and owner.get("run") == me["run"]:
            file.unlink(missing_ok=True)


def _owner(file: Path) -> dict | None:
    """Whose claim there is; None where there is none, or it cannot be read."""
    try:
        return read_json(file)
    except Exception:  # what a store's client raises
        return None


def _me() -> dict:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "run": uuid.uuid4().hex,
    }


def _refusal(directory: Path, owner: dict, key: str) -> str:
    who = "it did not say who"
    if {"pid", "host", "since"} <= owner.keys():
        who = "process {pid} on {host}, since {since}".format(**owner)
    return (
        f"{directory}: another run is writing here ({who}); stop that one, or choose another {key}."
    )
