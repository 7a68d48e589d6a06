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
from alignjax.files import is_remote, write_whole

BEAT_SECONDS = 30  # between heartbeats of a run on an object store
DEAD_SECONDS = 180  # without a heartbeat, after which its run counts as dead
SETTLE_SECONDS = 2  # between writing a claim on an object store and reading whose claim stands


@contextmanager
def held(directory: Path, key: str = "--run_dir") -> Iterator[None]:
    """Holds a run directory for the block; `key` is what a user named it by.

    On a disk by `flock`, which the kernel lets go of when the process dies, however it dies. An
    object store has no locks: there a heartbeat is written each 30 seconds, and a run that has
    missed them for 180 seconds counts as dead, and ends at its next one if another has taken over.

    Raises UserError with the owner's host and process id where another run holds it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with _beating(directory) if is_remote(directory) else _locked(directory, key):
        yield


@contextmanager
def _locked(directory: Path, key: str) -> Iterator[None]:
    with (directory / ".lock").open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read()
            raise UserError(_refusal(directory, json.loads(owner) if owner else {}, key)) from None
        file.truncate(0)
        file.write(json.dumps(_me()))
        file.flush()
        yield


@contextmanager
def _beating(directory: Path) -> Iterator[None]:
    file, me = directory / ".lock", _me()
    owner = json.loads(file.read_text()) if file.exists() else None
    if owner and time.time() - owner["beat"] < DEAD_SECONDS:
        more = f"; if it is dead, wait {DEAD_SECONDS} seconds from its last sign of life"
        raise UserError(_refusal(directory, owner, f"--run_dir{more}"))
    ended = threading.Event()

    def beat() -> None:
        write_whole(file, json.dumps({**me, "beat": time.time()}))

    def beat_on() -> None:
        while not ended.wait(BEAT_SECONDS):
            owner = _owner(file)
            if owner and owner["run"] != me["run"]:  # this one stood still for too long
                said = f"error: {_refusal(directory, owner, '--run_dir')}"
                print(said, file=sys.stderr, flush=True)
                os._exit(2)
            else:
                with suppress(Exception):  # a store's client's own; the next beat tries again
                    beat()

    beat()
    time.sleep(SETTLE_SECONDS)
    owner = json.loads(file.read_text())
    if owner["run"] != me["run"]:
        raise UserError(_refusal(directory, owner, "--run_dir"))
    thread = threading.Thread(target=beat_on, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        owner = _owner(file)
        if owner and owner["run"] == me["run"]:
            file.unlink(missing_ok=True)


def _owner(file: Path) -> dict | None:
    """Whose claim there is on an object store; None where there is none, or it cannot be read."""
    try:
        return json.loads(file.read_text())
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
    who = (
        "process {pid} on {host}, since {since}".format(**owner) if owner else "it did not say who"
    )
    return (
        f"{directory}: another run is writing here ({who}); stop that one, or choose another {key}."
    )
