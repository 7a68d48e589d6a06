"""The first batch's loss as `alignjax.inspect` tells it, and what the start alone makes of it."""

import re

import numpy as np
import pytest
from refusals import ended as trained
from running import metrics_of
from test_inspect import ROWS, ended
from tokencases import pair_row, write

pytestmark = pytest.mark.slow  # minutes


@pytest.mark.parametrize("stage", ["sft", "dpo", "rm"])
def test_the_first_batch_has_the_loss_that_the_first_step_logs(
    monkeypatch, capsys, root, tmp_path, stage
):
    run = tmp_path / "run"
    more = ("--batch.max-steps=1", "--samples.prompts=0")
    if stage == "sft":
        more += (f"--data.path={write(tmp_path / 'hand.jsonl', ROWS['sft'])}",)
    code, out, err = ended(monkeypatch, capsys, root, run, *more, stage=stage)
    assert (code, err) == (0, "")
    assert [file.name for file in run.iterdir()] == ["inspect.html"]
    said = re.findall(r"│ (\S+)\s+│\s+(-?\d+\.\d{6}) │(?:\s+(\S*) │)?", out)
    assert trained(monkeypatch, capsys, root, run, *more, stage=stage) == (0, "")
    logged = next(line for line in metrics_of(run) if line["step"] == 1)
    metrics = {name: float(value) for name, value, _ in said}
    assert set(metrics) <= set(logged) and "loss" in metrics
    metrics.pop("rewards/accuracies", None)  # of margins that are rounding's
    for name, value in metrics.items():
        assert value == pytest.approx(logged[name], abs=3e-6), name
    expected = {name: float(value) for name, _, value in said if value}
    if stage == "sft":
        assert not expected and f"ln {128} = {np.log(128):.4f}" in out
    else:
        assert expected["loss"] == pytest.approx(np.log(2), abs=1e-6)
        assert expected["rewards/margins"] == 0


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("--loss=hinge",), {"loss": "1.000000", "rewards/margins": "0.000000"}),
        (("--sft-weight=0.5",), {"rewards/margins": "0.000000"}),
        (("--loss=simpo",), {}),
    ],
)
def test_nothing_is_expected_that_the_start_does_not_decide(
    monkeypatch, capsys, root, tmp_path, more, expected
):
    code, out, err = ended(monkeypatch, capsys, root, tmp_path / "run", *more, "--rows=0")
    assert (code, err) == (0, "")
    said = re.findall(r"│ (\S+)\s+│\s+(-?\d+\.\d{6}) │(?:\s+(\S*) │)?", out)
    assert {name: value for name, _, value in said if value} == expected
    assert "loss" in {name for name, _, _ in said}


def test_margins_and_weights_of_rows_are_in_what_is_expected(monkeypatch, capsys, root, tmp_path):
    rows = [pair_row("why", "because", "no", margin=2.0, weight=3.0), pair_row("how", "so", "no")]
    more = (f"--data.path={write(tmp_path / 'm.jsonl', rows)}",)
    _, out, _ = ended(monkeypatch, capsys, root, tmp_path / "run", *more, stage="rm")
    loss = (3 * np.log1p(np.exp(2)) + np.log(2)) / 4
    assert f"{loss:.6f}" in next(line for line in out.splitlines() if "│ loss" in line)
    found = re.search(r"│ loss\s+│\s+(\S+) │\s+(\S+) │", out)
    assert found[1] == found[2] == f"{loss:.6f}"
