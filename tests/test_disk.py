"""Pieces of files past the system's cache: the same bytes whatever the disk can, quick or slow."""

import errno
import os

import numpy as np
import pytest

from alignjax.weights import disk

SIZE = 3 << 20
PIECES = [(0, 1 << 20), (1 << 20, 700_001), ((1 << 20) + 700_001, SIZE - (1 << 20) - 700_001)]
SHIFTED = [(0, 13), (13, 1 << 19), (13 + (1 << 19), SIZE - 13 - (1 << 19))]


@pytest.fixture
def content() -> np.ndarray:
    return np.frombuffer(np.random.default_rng(0).bytes(SIZE + 1), np.uint8)[1:]  # on no boundary


@pytest.fixture
def opened_past_the_cache(monkeypatch) -> list:
    """The files that were opened so."""
    original, found = os.open, []

    def spy(file, flags, *more):
        if flags & os.O_DIRECT:
            found.append(file)
        return original(file, flags, *more)

    monkeypatch.setattr(os, "open", spy)
    return found


def write(file, content, pieces, writer) -> bytes:
    with file.open("wb") as opened:
        opened.truncate(len(content))
        for start, size in reversed(pieces):
            writer.write(file, opened.fileno(), content[start : start + size], start)
    return file.read_bytes()


def can(directory) -> bool:
    """Whether a file system takes such writes."""
    file = directory / "probe"
    file.touch()
    try:
        os.close(os.open(file, os.O_WRONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


@pytest.mark.parametrize("pieces", [PIECES, SHIFTED], ids=["pieces", "shifted"])
def test_pieces_of_any_place_and_size(tmp_path, content, pieces, opened_past_the_cache):
    able = can(tmp_path)
    opened_past_the_cache.clear()
    assert write(tmp_path / "file", content, pieces, disk.Writer()) == content.tobytes()
    large = sum(size > disk.WRITE + disk._BLOCK for _, size in pieces)
    assert len(opened_past_the_cache) == (large if able else 1)


def test_a_file_system_that_cannot(tmp_path, content, monkeypatch):
    original = os.open

    def refusing(file, flags, *more):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return original(file, flags, *more)

    monkeypatch.setattr(os, "open", refusing)
    writer = disk.Writer()
    assert write(tmp_path / "file", content, PIECES, writer) == content.tobytes()
    assert not writer.direct


def test_a_slow_disk_is_left_to_the_system(tmp_path, content, monkeypatch, opened_past_the_cache):
    if not can(tmp_path):
        pytest.skip("the file system has no O_DIRECT")
    opened_past_the_cache.clear()
    monkeypatch.setattr(disk, "_TRIED", 1 << 20)
    for rate, count in ((disk._QUICK * 2, 3), (disk._QUICK / 2, 1)):
        now = iter(np.arange(100) * (1 << 20) / rate)
        monkeypatch.setattr(disk.time, "monotonic", lambda now=now: next(now))
        writer = disk.Writer()
        assert write(tmp_path / "file", content, PIECES, writer) == content.tobytes()
        assert len(opened_past_the_cache) == count
        opened_past_the_cache.clear()


def test_what_a_disk_refuses_is_raised(tmp_path, content, monkeypatch):
    original = os.pwrite

    def full(opened, part, start):
        if len(part) > disk.WRITE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(opened, part, start)

    monkeypatch.setattr(os, "pwrite", full)
    if not can(tmp_path):
        pytest.skip("the file system has no O_DIRECT")
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "file", content, PIECES, disk.Writer())
