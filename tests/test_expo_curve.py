"""The benchmark of held-out rows over alphas, run on a tiny pair."""

import json
import sys

import pytest
from conftest import tiny_config, write_pairs
from expomodels import write_pair
from running import ROOT, environment, launch

ACCURACY, MARGIN = "held-out accuracy", "held-out margin"
RULE = "answers that follow the rule"


@pytest.fixture(scope="module")
def curve(tmp_path_factory):
    """What is said of alphas from the weak side to beyond the strong one, and the figure."""
    root = tmp_path_factory.mktemp("curve")
    write_pair(root, tiny_config(), size=2e-3)
    write_pairs(root / "rows.jsonl", 8, held_out=32)
    lines = map(json.loads, (root / "rows.jsonl").read_text().splitlines())
    ruled = [json.dumps(one | {"rule": "lowercase", "rule_value": ""}) for one in lines]
    (root / "rows.jsonl").write_text("\n".join(ruled) + "\n")
    (root / "dpo.py").write_text("from alignjax.config import DPO\nconfig = DPO()\n")
    command = [sys.executable, str(ROOT / "benchmarks" / "expo_curve.py")]
    command += [f"--config={root / 'dpo.py'}", f"--strong={root / 'strong'}"]
    command += [f"--model.path={root / 'weak'}", f"--data.path={root / 'rows.jsonl'}"]
    command += ["--data.max-length=128", "--batch.row-length=256", "--compute.dtype=float32"]
    command += ["--samples.prompts=4", "--samples.max-tokens=4"]
    command += [f"--run-dir={root / 'out'}", "--alphas=-1,-0.5,0,2", "--batch.pairs=4"]
    done = launch(command, environment(root / "cache"))
    rows = json.loads((root / "out" / "curve.json").read_text())
    return rows, done.stdout, (root / "out" / "curve.svg").read_text()


@pytest.mark.slow
def test_the_curve_leaves_the_weak_side_steadily(curve):
    rows, _, _ = curve
    assert [row["alpha"] for row in rows] == ["-1", "-0.5", "0", "2"]
    margins = [row[MARGIN] for row in rows]
    assert rows[0][ACCURACY] == 0.5 and margins[0] == 0  # the weak side is its own reference
    assert margins[1] / margins[2] == pytest.approx(0.5, abs=0.15)
    assert margins[3] / margins[2] == pytest.approx(3, abs=0.9)


@pytest.mark.slow
def test_the_curve_is_told_and_drawn(curve):
    rows, said, figure = curve
    assert said.count("\n| ") >= len(rows) + 1
    assert f"| 0 | {rows[2][ACCURACY]:.1%} | {rows[2][MARGIN]:.4f} |" in said
    assert all(row[RULE] in (0, 0.25, 0.5, 0.75, 1) for row in rows)
    assert f"{rows[2][MARGIN]:.4f} | {rows[2][RULE]:.1%} |" in said
    assert figure.count("<circle") == 3 * len(rows) and figure.count("<polyline") == 3
