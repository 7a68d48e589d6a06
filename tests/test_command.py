"""How a command ends: one sentence for what a user can mend, a trace for the rest."""

import errno
import gc
import json

import pytest

from alignjax import command, config, expo


def ended(capsys, work) -> tuple[int, str]:
    code = command.run(work)
    return code, capsys.readouterr().err


@pytest.fixture(autouse=True)
def no_traces(monkeypatch):
    monkeypatch.delenv("ALIGNJAX_TRACEBACK", raising=False)


def test_the_code_of_a_command_that_ends_well_is_its_own(capsys):
    assert ended(capsys, lambda: 0) == (0, "")
    assert ended(capsys, lambda: 143) == (143, "")


def test_a_mistake_that_alignjax_words_is_one_sentence(capsys):
    code, said = ended(capsys, lambda: config.load("nothing.py"))
    assert code == 2 and said.startswith(
        "error: --config=nothing.py: there is no such config or file; give"
    )
    assert said.count("\n") == 1


def test_an_error_that_nobody_worded_keeps_its_trace():
    with pytest.raises(json.JSONDecodeError):
        command.run(lambda: json.loads("{"))
    with pytest.raises(ValueError, match="invalid literal"):
        command.run(lambda: int("x"))
    with pytest.raises(ValueError, match="not enough values"):  # alignjax's line, not its words
        command.run(lambda: config._take_config(Bad()))


class Bad(list):
    def __iter__(self):
        raise ValueError("not enough values")


def test_the_trace_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("ALIGNJAX_TRACEBACK", "1")
    with pytest.raises(ValueError, match="there is no such config or file"):
        command.run(lambda: config.load("nothing.py"))


def raising(error):
    def work():
        raise error

    return work


@pytest.mark.parametrize(
    ("number", "sentence"),
    [
        (errno.ENOSPC, "no space is left on the disk; free some, and the same command goes on"),
        (errno.EDQUOT, "the disk quota is used up; free some, and the same command goes on"),
        (errno.EACCES, "permission is denied; name a place that this user may write to"),
        (errno.EROFS, "the file system is read-only; name a place that can be written to"),
    ],
)
def test_what_a_disk_refuses_names_the_path(capsys, number, sentence):
    assert ended(capsys, raising(OSError(number, "x", "runs/a/metrics.jsonl"))) == (
        2,
        f"error: runs/a/metrics.jsonl: {sentence}.\n",
    )


def test_another_failure_of_the_system_keeps_its_trace():
    with pytest.raises(OSError, match="x"):
        command.run(raising(OSError(errno.EIO, "x")))


def test_divergence_and_ctrl_c_have_codes_of_their_own(capsys):
    assert ended(capsys, raising(FloatingPointError("step 3: loss nan."))) == (
        1,
        "stopped: step 3: loss nan.\n",
    )
    assert ended(capsys, raising(KeyboardInterrupt())) == (
        130,
        "stopped: what was saved stays, and the same command goes on from there.\n",
    )


def test_garbage_is_still_collected_after_a_command(monkeypatch):
    """What is frozen stays, and with it every program that was compiled."""
    before = gc.get_freeze_count()
    assert command.run(lambda: 0) == 0
    monkeypatch.setattr("sys.argv", ["expo", "--weak=a", "--strong=b", "--alpha=0.3", "--out=c"])
    assert command.run(expo.main) == 2
    assert gc.isenabled() and gc.get_freeze_count() == before
