"""The benchmark of training steps, run as a user runs it, in a size for tests."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "device.py"
SMALL = ("--row-length=128", "--rows=4", "--rows-per-device=2")


def measured(tmp_path, *arguments: str) -> tuple[list[dict], str]:
    file = tmp_path / "found.json"
    command = [sys.executable, str(SCRIPT), *arguments, "--steps=1", f"--json={file}"]
    environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(SCRIPT.parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text()), done.stdout


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
    assert found[0]["problem"].startswith("ValueError: no_such: there is no such preset; there are")
    assert "| no_such | sft | alignjax | ValueError: no_such: there is no such preset" in said
