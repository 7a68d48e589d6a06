"""metrics.jsonl cut back for a resumed run; TensorBoard and wandb beside it."""

import json
import sys
import types
from pathlib import Path

import pytest

from alignjax import metrics
from alignjax.config import DPO


def names(directory) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


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
    with metrics.writing(tmp_path, DPO(), -1) as log:
        for step in range(5):
            log.write({"step": step, "loss": 1.0})
            assert len(metrics.read(file)) == step + 1  # a kill from here on loses nothing
    with file.open("a") as out:
        out.write('{"step": 5, "lo')
    with metrics.writing(tmp_path, DPO(), 3) as log:
        for step in (4, 5):
            log.write({"step": step, "loss": 0.5})
            log.write({})
    read = metrics.read(file)
    assert [line["step"] for line in read] == [0, 1, 2, 3, 4, 5]
    assert [line["loss"] for line in read] == [1.0] * 4 + [0.5] * 2


def scalars(directory) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard would draw: events in order, those behind a purge left out."""
    from tensorboardX.proto import event_pb2

    found: dict[str, list[tuple[int, float]]] = {}
    files = sorted((directory / "tensorboard").iterdir(), key=lambda file: file.stat().st_mtime_ns)
    for file in files:
        data, at = file.read_bytes(), 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
            at += size + 16
            if event.session_log.status == event_pb2.SessionLog.START:
                for name, points in found.items():
                    found[name] = [point for point in points if point[0] < event.step]
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def test_tensorboard_has_the_names_of_sources_as_they_are(tmp_path):
    names = ["eval_rewards/margins/source=a b", "eval_rewards/margins/source=a_b"]
    with metrics.writing(tmp_path, DPO(), -1) as log:
        log.write({"step": 1} | dict.fromkeys(names, 0.5))
    assert scalars(tmp_path) == dict.fromkeys(names, [(1, 0.5)])


def test_tensorboard_has_each_step_once_after_a_resume(tmp_path):
    with metrics.writing(tmp_path, DPO(), -1) as log:
        for step in range(5):
            log.write({"step": step, "loss": float(step), "rewards/margins": 0.5})
    with metrics.writing(tmp_path, DPO(), 2) as log:
        for step in (3, 4, 5):
            log.write({"step": step, "loss": step + 0.25, "rewards/margins": 0.5})
    drawn = scalars(tmp_path)
    assert drawn["loss"] == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 3.25), (4, 4.25), (5, 5.25)]
    assert [step for step, _ in drawn["rewards/margins"]] == list(range(6))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_says_nothing_behind_the_run_when_tensorboard_is_closed(tmp_path, monkeypatch):
    full = Path("/dev/full").open("wb")
    monkeypatch.setattr("tensorboardX.record_writer.open_file", lambda path: full)
    with metrics.writing(tmp_path, DPO(), -1) as log:
        log.write({"step": 0, "loss": 1.0})
    assert full.closed  # or its end would print a second sentence, when nobody can catch it
    assert metrics.read(tmp_path / "metrics.jsonl") == [{"step": 0, "loss": 1.0}]


class Recorded(types.ModuleType):
    """Stands for wandb: keeps what it is told."""

    def __init__(self):
        super().__init__("wandb")
        self.inits, self.lines = [], []

    def init(self, **settings):
        self.inits.append(settings)
        return self

    def log(self, line, step):
        self.lines.append((step, line))


def test_wandb_is_told_the_same_lines_and_goes_on_with_its_run(tmp_path, monkeypatch):
    wandb = Recorded()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    for step in (-1, 0):
        with metrics.writing(tmp_path, DPO(name="x", wandb=True), step) as log:
            log.write({"step": step + 1, "loss": 0.5})
    assert wandb.lines == [(0, {"step": 0, "loss": 0.5}), (1, {"step": 1, "loss": 0.5})]
    first, second = wandb.inits
    assert first["id"] == second["id"] and first["resume"] == "allow"
    assert (first["project"], first["name"], first["config"]["beta"]) == ("alignjax", "x", 0.1)


def test_without_the_option_wandb_is_not_imported(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import raises
    with metrics.writing(tmp_path, DPO(), -1) as log:
        log.write({"step": 0, "loss": 0.5})
    metrics.check(DPO())
    with pytest.raises(ValueError) as refusal:
        metrics.check(DPO(wandb=True))
    assert str(refusal.value) == (
        'wandb is not installed: pip install "alignjax[wandb]", or leave out --wandb.'
    )


def test_an_object_store_is_written_on_flush_and_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "is_remote", lambda path: True)
    file = tmp_path / "metrics.jsonl"
    with metrics.writing(tmp_path, DPO(), -1) as log:
        log.write({"step": 0})
        assert not file.exists()
        log.flush()
        assert metrics.read(file) == [{"step": 0}]
        log.write({"step": 1})
    with metrics.writing(tmp_path, DPO(), 0) as log:
        log.write({"step": 1, "again": True})
    assert metrics.read(file) == [{"step": 0}, {"step": 1, "again": True}]
