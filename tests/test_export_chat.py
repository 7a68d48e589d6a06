"""What an export says of chats: the template that was trained, and what ends an answer."""

import json
from pathlib import Path

import pytest
from refusals import ended

from alignjax import templates
from alignjax.weights.safetensors import companions_of


@pytest.fixture
def exported(monkeypatch, capsys, root, tmp_path):
    """Runs one step and gives the export's directory."""

    def run(*overrides: str) -> Path:
        code, said = ended(
            monkeypatch, capsys, root, tmp_path / "run", "--batch.max-steps=1", *overrides
        )
        assert (code, said) == (0, "")
        export, model = tmp_path / "run/export", tmp_path / "run/model"
        for name, file in companions_of(export).items():  # who takes the checkpoint has them too
            assert (model / name).read_bytes() == file.read_bytes()
        return export

    return run


def generation(directory: Path, **values) -> None:
    (directory / "generation_config.json").write_text(json.dumps(values))


@pytest.mark.parametrize("stored", [{"eos_token_id": 0}, {"eos_token_id": [0], "top_p": 0.9}])
def test_the_end_of_a_turn_ends_an_answer(root, exported, stored):
    generation(root / "model", **stored)
    found = json.loads(
        (exported("--model.chat-template=chatml") / "generation_config.json").read_text()
    )
    assert found == stored | {"eos_token_id": [0, 2]}  # 2 is <|im_end|>


def test_a_model_without_generation_config_whose_config_tells_the_end(root, exported):
    (root / "model" / "generation_config.json").unlink()
    assert not (exported() / "generation_config.json").exists()


def test_a_generation_config_that_knows_the_end_stays_as_it_is(root, exported):
    generation(root / "model", eos_token_id=[2, 1])
    held = (root / "model" / "generation_config.json").read_bytes()
    assert (exported() / "generation_config.json").read_bytes() == held


def test_the_template_that_was_chosen_is_exported(root, exported):
    generation(root / "model", eos_token_id=2)
    (root / "model" / "chat_template.jinja").write_text("{{ 'another' }}")
    shipped = Path(templates.__file__).parent / "chatml.jinja"
    assert (exported("--model.chat-template=chatml") / "chat_template.jinja").read_text() == (
        shipped.read_text()
    )
