"""Files and directories that are whole or not there, on a disk and in a bucket."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from alignjax import config, files
from alignjax.errors import UserError
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
        with whole_directory(target, ("old", "n*")) as partial:
            (partial / name).write_text(name)
        (target / "mine").mkdir(exist_ok=True)
        (target / "mine" / name).write_text("precious")
    assert names(target) == ["mine", "new"] and names(target / "mine") == ["new", "old"]
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
    with pytest.raises(RuntimeError), whole_directory(target, ("old",)) as partial:
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


@pytest.mark.parametrize("before", [1, 2, 3, 4])
def test_a_kill_in_the_midst_of_a_replacement_loses_nothing_that_is_not_ours(tmp_path, before):
    """`before` which of the four renames: away, into place, and two of others' files back."""
    target = tmp_path / "b"
    target.mkdir()
    for name in ("old", "theirs", "theirs too"):
        (target / name).write_text(name)
    script = f"""
import os, pathlib
from alignjax.files import whole_directory
left, rename = [{before}], pathlib.Path.rename
def killed(path, to):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), 9)
    return rename(path, to)
pathlib.Path.rename = killed
with whole_directory(pathlib.Path({str(target)!r}), ("old", "n*")) as partial:
    (partial / "new").write_text("killed")
"""
    done = subprocess.run([sys.executable, "-c", script], check=False)
    assert done.returncode == -9
    with whole_directory(target, ("old", "n*")) as partial:
        (partial / "new").write_text("1")
    assert (names(tmp_path), names(target)) == (["b"], ["new", "theirs", "theirs too"])


def test_what_killed_processes_left_is_removed_and_what_living_ones_write_is_not(tmp_path):
    target, kind = tmp_path / "b", "partial"
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


@pytest.mark.parametrize("dangling", [False, True])
def test_links_are_followed_and_stay(tmp_path, dangling):
    other = tmp_path / "disk"
    other.mkdir()
    for name in ("b", "f"):
        (tmp_path / name).symlink_to(other / name)
    if not dangling:
        (other / "b").mkdir()
        (other / "f").write_text("old")
    with whole_directory(tmp_path / "b", ("x",)) as partial:
        (partial / "x").write_text("1")
        assert partial.parent == other
    write_whole(tmp_path / "f", "new")
    assert all((tmp_path / name).is_symlink() for name in ("b", "f"))
    assert (other / "b" / "x").read_text() == "1" and (other / "f").read_text() == "new"
    assert names(other) == ["b", "f"] and names(tmp_path) == ["b", "disk", "f"]


@pytest.mark.parametrize("name", ["a**b", "a[b]", "?"])
def test_names_are_no_patterns(tmp_path, name):
    left = tmp_path / f".{name}.{socket.gethostname()}.{dead_pid()}.partial"
    left.write_text("1")
    write_whole(tmp_path / name, "x")
    with whole_directory(tmp_path / "d" / name) as partial:
        (partial / "x").write_text("1")
    assert names(tmp_path) == sorted(["d", name]) and names(tmp_path / "d") == [name]


def test_a_file_of_another_kind_is_not_overwritten(tmp_path):
    file = tmp_path / "f"
    files.check_own(file, '{"place"')
    for text in ("", '{"p', '{"prompt": 1}'):
        file.write_text(text)
        with pytest.raises(UserError, match=f"{file}: .*name another"):
            files.check_own(file, '{"place"')
    file.write_text('{"place": 1}')
    files.check_own(file, '{"place"')
    with pytest.raises(UserError, match="directory"):
        files.check_own(tmp_path, "")


@pytest.mark.parametrize("path", ["~no-such-user/x", "x://y"])
def test_a_place_that_cannot_be(path):
    with pytest.raises(UserError, match=path):
        files.location(path)


def test_a_directory_that_cannot_be_made():
    with pytest.raises(UserError, match="/proc/x/y: .*name another place"):
        files.make_directory(Path("/proc/x/y"))


def test_no_home_is_asked_for_only_where_it_is_needed(monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("ALIGNJAX_CACHE", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    assert config.cache_dir(config.DPO(data=config.Data(cache_dir="c"))) == Path("c")
    with pytest.raises(UserError, match="home"):
        config.cache_dir(config.DPO())


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
    file = tmp_path / "a" / "x.npy"
    assert load_array(file, (2, 2)).tobytes() == np.load(file).tobytes() == array.tobytes()
    content = file.read_bytes()
    assert load_array(file, (4, 1)) is None
    np.save(file, array.astype(np.float64))
    assert load_array(file, (2, 2)) is None
    for damaged in (b"", b"x", content[:-1], content[:70], content + b"1"):
        file.write_bytes(damaged)
        assert load_array(file, (2, 2)) is None
    file.unlink()
    assert load_array(file, (2, 2)) is None


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
