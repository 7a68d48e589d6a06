"""Files and directories that are whole or not there, and metrics cut back for a resumed run."""

import json

import pytest

from alignjax import metrics
from alignjax.files import whole_directory, write_whole


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
        with whole_directory(target) as partial:
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


def test_directory_starts_empty_after_a_killed_try(tmp_path):
    target = tmp_path / "b"
    with whole_directory(target) as partial:
        leftover = partial
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
    path_type = type(target)
    original = path_type.write_text

    def write_text(path, text, **options):
        original(path, text[:1], **options)
        seen.append(target.read_text())
        return original(path, text, **options)

    monkeypatch.setattr(path_type, "write_text", write_text)
    write_whole(target, "new")
    assert (seen, target.read_text()) == (["old"], "new")


def test_write_whole_keeps_the_older_text_and_leaves_nothing_behind(tmp_path):
    target = tmp_path / "f.json"
    write_whole(target, "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(target, "half an emoji \ud83d")
    assert target.read_text() == "old"
    assert names(tmp_path) == ["f.json"]


# metrics.jsonl


def lines(*steps: int) -> str:
    return "".join(json.dumps({"step": step, "loss": step / 4}) + "\n" for step in steps)


@pytest.mark.parametrize(
    ("before", "step", "after"),
    [
        (lines(0, 1, 2, 3), 2, lines(0, 1, 2)),
        (lines(0, 1, 2, 3), 3, lines(0, 1, 2, 3)),
        (lines(0, 1, 2, 3), 9, lines(0, 1, 2, 3)),
        (lines(0, 1, 2, 3), 0, lines(0)),
        (lines(1, 2), 0, ""),
        (lines(5, 10, 15, 20), 12, lines(5, 10)),
        (lines(0, 1, 1, 2), 1, lines(0, 1, 1)),  # a step's metrics and its evaluation
        (lines(0, 1, 2) + '{"step": 3, "lo', 9, lines(0, 1, 2)),
        (lines(0, 1) + '{"step": 2}', 9, lines(0, 1)),  # whole JSON, its newline cut off
        ('{"st', 9, ""),
        ("", 9, ""),
    ],
)
def test_cut_back(tmp_path, before, step, after):
    file = tmp_path / "metrics.jsonl"
    file.write_text(before)
    metrics.cut_back(file, step)
    assert file.read_text() == after


def test_cut_back_makes_no_file(tmp_path):
    metrics.cut_back(tmp_path / "metrics.jsonl", 3)
    assert names(tmp_path) == []


def test_a_resumed_run_repeats_no_line(tmp_path):
    file = tmp_path / "metrics.jsonl"
    for step in range(5):
        metrics.append(file, {"step": step, "loss": 1.0, "note": "a\u2028b\nc"})
    with file.open("a") as out:
        out.write('{"step": 5, "lo')
    metrics.cut_back(file, 3)
    for step in (4, 5):
        metrics.append(file, {"step": step, "loss": 0.5, "note": ""})
    read = metrics.read(file)
    assert [line["step"] for line in read] == [0, 1, 2, 3, 4, 5]
    assert [line["loss"] for line in read] == [1.0] * 4 + [0.5] * 2
    assert read[0]["note"] == "a\u2028b\nc"
