"""The benchmarks of training steps, run as a user runs them, in sizes for tests."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
SCRIPT = BENCHMARKS / "device.py"
SMALL = ("--row-length=128", "--rows=4", "--rows-per-device=2")


def measured(tmp_path, *arguments: str) -> tuple[list[dict], str]:
    file = tmp_path / "found.json"
    said = run(SCRIPT, *arguments, "--steps=1", f"--json={file}")
    return json.loads(file.read_text()), said


def run(script: Path, *arguments: str) -> str:
    """What a script prints, on one device."""
    command = [sys.executable, str(script), *arguments]
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(BENCHMARKS.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_steps_of_both_frameworks_are_measured(tmp_path):
    pytest.importorskip("torch", reason="the extra `parity` is not installed")
    found, said = measured(
        tmp_path, *SMALL, "--models", "tiny_llama3_8b", "--stages", "sft", "rm", "dpo"
    )
    assert [(one["stage"], one["framework"]) for one in found] == [
        (stage, framework) for stage in ("sft", "rm", "dpo") for framework in ("alignjax", "torch")
    ]
    for one in found:
        assert one["tokens_per_second"] > 0 and len(one["seconds"]) == 3 and one["mfu"] is None
    assert said.startswith("## 1 x CPU, ") and said.count("| tiny_llama3_8b | ") == 6


def test_a_measurement_that_fails_is_told_in_its_place(tmp_path):
    found, said = measured(tmp_path, "--models=no_such", "--stages=sft", "--frameworks=alignjax")
    problem = "UserError: no_such: there is no such preset; there are"
    assert found[0]["problem"].startswith(f"alignjax.errors.{problem}")
    assert f"| no_such | sft | alignjax | alignjax.errors.{problem}" in said


@pytest.mark.slow
@pytest.mark.parametrize("stage, parameters", [("sft", 5261568), ("rm", 4213248)])
def test_steps_of_the_small_model_are_measured(stage, parameters):
    script = BENCHMARKS / "train_step.py"
    said = run(script, f"--stage={stage}", "--items=2", "--steps=2", "--json")
    found = json.loads(said)
    assert found["tokens_per_second"] > 0 and found["parameters"] == parameters
    assert 0.5 < found["fill"] <= 1


@pytest.mark.slow
def test_a_peer_is_measured_by_turns():
    pytest.importorskip("trl", reason="the extra `parity` is not installed")
    small = "--items 2 --steps 1"
    said = run(
        BENCHMARKS / "peers" / "compare.py",
        "--stage=dpo",
        f"--ours={small}",
        f"--trl={sys.executable} {small} --batch 1",
        "--turns=2",
        "--json",
    )
    found = json.loads(said)
    rates = {name: [one["tokens_per_second"] for one in own] for name, own in found["runs"].items()}
    ratios = [a / b for a, b in zip(rates["alignjax"], rates["trl"], strict=True)]
    assert found["ratio"] == {"trl": pytest.approx(sum(ratios) / 2)}
