"""The model card of an export: what it names, and that its head is YAML of a model page."""

import json
from importlib.metadata import version

import pytest
import yaml

from alignjax import __version__
from alignjax import config as configs
from alignjax.weights.card import model_card


@pytest.mark.parametrize(
    ("base", "on_hub"),
    [("ORG/NAME", True), ("/models/mine", False), ("./a/b", False), ("x", False)],
)
def test_a_card_names_base_model_data_settings_and_versions(base, on_hub):
    run = configs.to_dict(configs.DPO(name="mine"))
    run["model"]["path"], run["data"]["path"] = base, "pairs.jsonl"
    _, head, body = model_card(run).split("---\n", 2)
    expected = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    expected |= {"tags": ["alignjax"]} | ({"base_model": base} if on_hub else {})
    assert yaml.safe_load(head) == expected
    assert f"\n# mine\n\n`{base}`, trained with alignjax." in body
    for row in (
        f"| base model | `{base}` |",
        "| data | `pairs.jsonl` |",
        f"| alignjax | {__version__} |",
        f"| jax | {version('jax')} |",
    ):
        assert row in body.splitlines()
    assert json.loads(body.split("```json\n")[1].split("```")[0]) == run


def test_a_card_says_where_the_weights_are_an_average():
    said = "with alignjax. The weights average those after each step, of decay 0.99. The license"
    run = configs.to_dict(configs.SFT(optimizer=configs.Optimizer(ema_decay=0.99)))
    assert said in model_card(run)
    assert (
        "average those" not in model_card(configs.to_dict(configs.SFT())).partition("## Config")[0]
    )


def test_a_model_directory_named_as_on_the_hub_is_no_hub_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org/name").mkdir(parents=True)
    run = configs.to_dict(configs.SFT())
    run["model"]["path"] = "org/name"
    assert "base_model" not in model_card(run)
