"""A run that goes on with other numbers of devices and processes: same data, same losses."""

import json

import pytest
from conftest import tiny_config, write_model, write_pairs
from running import arguments, environment, launch, launch_several, untimed

pytestmark = pytest.mark.slow  # minutes

MORE = ("--optimizer.schedule=constant", "--optimizer.warmup-ratio=0")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("elastic")
    write_model(root / "model", tiny_config())
    write_pairs(root / "rows.jsonl", 40, 12)
    return root


def part(root, run: str, steps: int, stage: str) -> list[str]:
    return arguments(root, run, *MORE, f"--batch.max-steps={steps}", stage=stage)


@pytest.mark.parametrize("stage", ["dpo", "sft"])
def test_8_then_4_then_1_devices_then_2_processes(prepared, tmp_path, stage):
    if stage == "sft":
        text = (prepared / "rows.jsonl").read_text().replace('"chosen"', '"completion"')
        (prepared / "rows.jsonl").write_text(text)
    whole, moved = (f"{stage}-{name}" for name in ("whole", "moved"))
    launch(part(prepared, whole, 20, stage), environment(tmp_path / "whole"))
    cache = tmp_path / "moved"
    for steps, devices, mesh in ((5, 8, "--mesh.tensor=2"), (10, 4, ""), (15, 1, "")):
        command = part(prepared, moved, steps, stage) + ([mesh] if mesh else [])
        launch(command, environment(cache, devices))
    command = part(prepared, moved, 20, stage)
    text = launch_several(command, environment(cache), 2, tmp_path / "logs")
    assert "going on from step 15" in text
    ends = {5, 10, 15}  # the last step of a part is evaluated, which the whole run's is not
    for one, other in zip(untimed(prepared / whole), untimed(prepared / moved), strict=True):
        if one["step"] in ends - {10}:
            other = {name: value for name, value in other.items() if not name.startswith("eval_")}
        assert set(one) == set(other)
        for name in ("step", "epoch", "num_tokens", "learning_rate"):
            assert one.get(name) == other.get(name)
        for name in ("loss", "eval_loss"):
            assert one.get(name, 0) == pytest.approx(other.get(name, 0), abs=1e-5)
    kept = json.loads((prepared / moved / "config.json").read_text())
    assert kept["batch"]["max_steps"] == 20
