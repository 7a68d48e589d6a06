"""Two runs in one directory: the second is refused while the first one lives, and not after."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from running import ROOT

from alignjax import lock
from alignjax.errors import UserError

HOLD = "import pathlib, sys, time; from alignjax import lock\n"
HOLD += "with lock.held(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"


def holder(directory) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(directory)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_with_the_owners_host_and_pid(tmp_path):
    with holder(tmp_path) as process:
        owner = json.loads((tmp_path / ".lock").read_text())
        with pytest.raises(ValueError) as refusal, lock.held(tmp_path):
            pass
        process.kill()
    assert owner["pid"] == process.pid and owner["host"] == socket.gethostname()
    assert str(refusal.value) == (
        f"{tmp_path}: another run is writing here (process {process.pid} on {owner['host']}, since "
        f"{owner['since']}); stop that one, or choose another --run_dir."
    )


def test_a_killed_owner_holds_nothing(tmp_path):
    with holder(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
    with lock.held(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()


def test_a_block_that_ends_lets_go(tmp_path):
    with lock.held(tmp_path):
        pass
    with lock.held(tmp_path):
        pass


@pytest.mark.parametrize("said", ["", "{", "[]", '{"pid": "x"}', '{"other": 1}'])
def test_an_owner_that_says_nothing_is_refused_all_the_same(tmp_path, said):
    with (tmp_path / ".lock").open("w") as file:
        file.write(said)
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=f"{tmp_path}: another run.*choose another"):
            with lock.held(tmp_path):
                pass


def test_a_lock_of_something_else_stays(tmp_path):
    (tmp_path / ".lock").write_text("precious")
    with pytest.raises(UserError, match=r"\.lock: .*choose another --run_dir"):
        with lock.held(tmp_path):
            pass
    assert (tmp_path / ".lock").read_text() == "precious"


@pytest.mark.parametrize("kind", ["moved", "replaced"])
def test_a_directory_that_goes_while_it_is_held_is_noticed(tmp_path, kind, monkeypatch):
    here = tmp_path / "run"
    with lock.held(here):
        lock.check_place(here)
        monkeypatch.chdir(tmp_path)
        lock.check_place(Path("run"))
        assert lock.owner(here) == json.loads((here / ".lock").read_text())["run"]
        here.rename(tmp_path / "moved")
        if kind == "replaced":
            here.mkdir()
        with pytest.raises(UserError, match=f"{here}: .*bring it back"):
            lock.check_place(here)
        assert lock.owner(here) == ""  # as another host would see it
    assert here.exists() == (kind == "replaced")


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """A directory that is treated as an object store's, its times shortened."""
    monkeypatch.setattr(lock, "is_remote", lambda path: True)
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(lock, "SETTLE_SECONDS", 0.05)
    return tmp_path


def beat(directory) -> float:
    return json.loads((directory / ".lock").read_text())["beat"]


def test_a_heartbeat_goes_on_while_the_block_runs_and_leaves_nothing(bucket):
    with lock.held(bucket):
        first = beat(bucket)
        end = time.monotonic() + 600
        while beat(bucket) == first and time.monotonic() < end:
            time.sleep(0.02)
        assert beat(bucket) > first
    assert not (bucket / ".lock").exists()


def test_a_second_run_on_an_object_store_is_refused_while_the_first_beats(bucket):
    owner = {"host": "far", "pid": 7, "since": "noon", "run": "x", "beat": time.time() - 60}
    (bucket / ".lock").write_text(json.dumps(owner))
    with pytest.raises(ValueError) as refusal, lock.held(bucket):
        pass
    assert str(refusal.value) == (
        f"{bucket}: another run is writing here (process 7 on far, since noon); stop that one, or "
        "choose another --run_dir; if it is dead, wait 180 seconds from its last sign of life."
    )
    assert json.loads((bucket / ".lock").read_text()) == owner


def test_a_run_that_missed_its_beats_counts_as_dead(bucket):
    owner = {"host": "far", "pid": 7, "since": "noon", "run": "x", "beat": time.time() - 181}
    (bucket / ".lock").write_text(json.dumps(owner))
    with lock.held(bucket):
        assert json.loads((bucket / ".lock").read_text())["pid"] == os.getpid()


def test_a_beat_that_fails_is_tried_again(bucket, monkeypatch):
    original, calls = lock.write_whole, []

    def write_whole(*arguments):
        calls.append(arguments)
        if len(calls) in (2, 3):
            raise ConnectionError("the store is away")
        original(*arguments)

    monkeypatch.setattr(lock, "write_whole", write_whole)
    with lock.held(bucket):
        first, end = beat(bucket), time.monotonic() + 600
        while beat(bucket) == first and time.monotonic() < end:
            time.sleep(0.02)
        assert beat(bucket) > first and len(calls) > 3


def test_a_run_whose_place_was_taken_ends_and_leaves_the_claim(bucket, monkeypatch, capsys):
    """It stood still for so long that it counted as dead."""
    other = {"host": "far", "pid": 7, "since": "noon", "run": "x", "beat": time.time()}
    codes = []
    monkeypatch.setattr(lock.os, "_exit", codes.append)
    with lock.held(bucket):
        (bucket / ".lock").write_text(json.dumps(other))
        end = time.monotonic() + 600
        while not codes and time.monotonic() < end:
            time.sleep(0.02)
    assert set(codes) == {2}
    assert json.loads((bucket / ".lock").read_text()) == other
    said = f"error: {bucket}: another run is writing here (process 7 on far, since noon); "
    assert capsys.readouterr().err.startswith(said)


def test_of_two_that_claim_at_once_the_later_one_has_it(bucket, monkeypatch):
    def overtaken(seconds):
        other = {"host": "far", "pid": 7, "since": "noon", "run": "x", "beat": time.time()}
        (bucket / ".lock").write_text(json.dumps(other))

    monkeypatch.setattr(lock.time, "sleep", overtaken)
    with pytest.raises(ValueError, match="process 7 on far"), lock.held(bucket):
        pass
