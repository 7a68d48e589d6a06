"""Files and directories that are whole or not there, on a disk and in a bucket."""

import os
import socket
import subprocess
from pathlib import Path

import numpy as np
import pytest

from alignjax import files
from alignjax.files import load_array, save_array, whole_directory, write_whole


def names(directory) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_directory_takes_its_name_at_the_end(tmp_path):
    target = tmp_path / "a" / "b"
    with whole_directory(target) as partial:
        (partial / "x").write_text("1")
        assert not target.exists()
        assert partial.parent == target.parent  # one file system, so that the rename is one step
        assert partial.name.startswith(".")
    assert names(target.parent) == ["b"]
    assert (target / "x").read_text() == "1"


def test_directory_replaces_an_older_one_whole(tmp_path):
    target = tmp_path / "b"
    for name in ("old", "new"):
        with whole_directory(target, replace=True) as partial:
            (partial / name).write_text(name)
    assert names(target) == ["new"]
    assert names(tmp_path) == ["b"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_directory_leaves_nothing_behind_on_an_exception(tmp_path, error):
    target = tmp_path / "b"
    with pytest.raises(error), whole_directory(target) as partial:
        (partial / "x").write_text("1")
        raise error
    assert names(tmp_path) == []


def test_directory_keeps_the_older_one_on_an_exception(tmp_path):
    target = tmp_path / "b"
    with whole_directory(target) as partial:
        (partial / "old").write_text("1")
    with pytest.raises(RuntimeError), whole_directory(target) as partial:
        (partial / "new").write_text("1")
        raise RuntimeError
    assert (names(tmp_path), names(target)) == (["b"], ["old"])


def test_directory_that_another_process_finished_meanwhile_stays(tmp_path):
    target = tmp_path / "b"
    with whole_directory(target) as mine:
        (mine / "mine").write_text("1")
        target.mkdir()
        (target / "theirs").write_text("1")
    assert (names(tmp_path), names(target)) == (["b"], ["theirs"])


def dead_pid() -> int:
    with subprocess.Popen(["true"]) as process:
        pass
    return process.pid


@pytest.mark.parametrize("kind", ["partial", "older"])
def test_what_killed_processes_left_is_removed_and_what_living_ones_write_is_not(tmp_path, kind):
    target = tmp_path / "b"
    host = socket.gethostname()
    dead = tmp_path / f".b.{host}.{dead_pid()}.{kind}"
    kept = [f".b.{host}.{os.getppid()}.{kind}", f".b.elsewhere.{dead_pid()}.{kind}", ".b.x.partial"]
    for name in [dead.name, *kept]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "stale").write_text("1")
    file = tmp_path / f".f.{host}.{dead_pid()}.{kind}"
    file.write_text("1")
    with whole_directory(target) as partial:
        (partial / "x").write_text("1")
    write_whole(tmp_path / "f", "1")
    assert (names(tmp_path), names(target)) == (sorted([*kept, "b", "f"]), ["x"])


def test_directory_starts_empty_after_a_killed_try_of_the_same_pid(tmp_path):
    target = tmp_path / "b"
    leftover = files._partial(target)
    leftover.mkdir()
    (leftover / "stale").write_text("1")
    with whole_directory(target) as partial:
        assert partial == leftover
        (partial / "x").write_text("1")
    assert (names(tmp_path), names(target)) == (["b"], ["x"])


def test_write_whole_replaces(tmp_path):
    target = tmp_path / "a" / "f.json"
    write_whole(target, "old")
    write_whole(target, "für 🐝")
    assert target.read_bytes() == "für 🐝".encode()
    assert names(target.parent) == ["f.json"]


def test_write_whole_never_shows_half_a_text(tmp_path, monkeypatch):
    target = tmp_path / "f.json"
    write_whole(target, "old")
    seen = []
    original = Path.write_bytes

    def write_bytes(path, content):
        original(path, content[:1])
        seen.append(target.read_text())
        return original(path, content)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    write_whole(target, "new")
    assert (seen, target.read_text()) == (["old"], "new")


def test_write_whole_keeps_the_older_text_and_leaves_nothing_behind(tmp_path):
    target = tmp_path / "f.json"
    write_whole(target, "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(target, "half an emoji \ud83d")
    assert target.read_text() == "old"
    assert names(tmp_path) == ["f.json"]


def test_an_array_is_read_back(tmp_path):
    array = np.array([[1.5, np.nan], [-0.0, 3]], np.float32)
    save_array(tmp_path / "a" / "x.npy", array)
    assert load_array(tmp_path / "a" / "x.npy").tobytes() == array.tobytes()
    assert np.load(tmp_path / "a" / "x.npy").tobytes() == array.tobytes()


def test_a_directory_for_an_object_store_arrives_with_its_config_last(tmp_path, monkeypatch):
    order = []
    original = files.shutil.copyfileobj

    def copy(there, here):
        order.append(Path(here.name).relative_to(tmp_path / "bucket").as_posix())
        original(there, here)

    monkeypatch.setattr(files, "is_remote", lambda path: "bucket" in str(path))
    monkeypatch.setattr(files.shutil, "copyfileobj", copy)
    with whole_directory(tmp_path / "bucket") as partial:
        for name in ("z", "config.json", "a"):
            (partial / name).write_text(name)
        (partial / "deep").mkdir()
        (partial / "deep" / "y").write_text("y")
        assert not (tmp_path / "bucket").exists()
    assert order == ["a", "deep/y", "z", "config.json"]
    assert (tmp_path / "bucket" / "deep" / "y").read_text() == "y"


def test_location_tells_a_disk_from_a_bucket(tmp_path):
    assert type(files.location(str(tmp_path))) is type(tmp_path)
    there = files.location("gs://bucket/run")
    assert files.is_remote(there) and not files.is_remote(tmp_path)
    assert os.fspath(there / "a.json") == "gs://bucket/run/a.json"


def test_home_and_here_are_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.location("~/run") == tmp_path / "run"
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    with files.whole_directory(Path()) as partial:
        (partial / "a").write_text("1")
    assert (here / "a").read_text() == "1"
    assert [file.name for file in tmp_path.iterdir()] == ["here"]
