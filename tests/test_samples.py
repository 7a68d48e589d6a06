"""What a run answers is chosen at its start and kept; what is damaged is made again."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
from tokencases import make, pair_row, write

from alignjax import companions, samples
from alignjax.config import DPO, Data, Samples
from alignjax.errors import UserError


@pytest.fixture
def run(tmp_path, tokenizer, tokenizer_dir):
    rules = [{"rule": "lowercase", "rule_value": ""}, {"rule": ["a", "list"]}, {}]
    data = [pair_row(f"why {i}", "so", "no", **rules[i]) for i in range(3)]
    path = write(tmp_path / "d.jsonl", data)
    return SimpleNamespace(
        config=DPO(data=Data(eval_path=path), samples=Samples(prompts=3)),
        directory=tmp_path / "run",
        held_out=make("", tokenizer, tokenizer_dir, tmp_path, held_out=True, eval_path=path),
        stage=SimpleNamespace(name="dpo"),
        tokenizer=tokenizer,
    )


def test_prompts_are_those_of_the_start_whatever_becomes_of_the_data(run, tmp_path):
    first = samples._prompts(run)
    assert [one["prompt"] for one in first] == ["why 0", "why 1", "why 2"]
    assert [one["rule"] for one in first] == [["lowercase", ""], [], []]
    assert run.tokenizer.decode(first[0]["ids"]) == (
        "<|im_start|>user\nwhy 0<|im_end|>\n<|im_start|>assistant\n"
    )
    (tmp_path / "d.jsonl").unlink()
    run.tokenizer.chat_template = "{{ 'another' }}"
    assert samples._prompts(run) == first
    (run.directory / "samples/prompts.json").write_text('[{"prompt": 5}]')
    with pytest.raises(UserError, match="prompts.json: .*prompt=5"):
        samples._prompts(run)


@pytest.mark.parametrize("damaged", ["", "[{", "{}", "[5]"])
def test_answers_that_are_damaged_are_given_again(run, damaged):
    assert samples.stored(run, 0) is None
    file = samples._file(run, 0)
    file.parent.mkdir(parents=True)
    answers = [{"prompt": "p", "answer": "a", "follows": True, "log_ratio": 0.5, "tokens": 2}]
    file.write_text(json.dumps(answers))
    assert samples.stored(run, 0) == answers
    file.write_text(damaged)
    assert samples.stored(run, 0) is None
    none = dataclasses.replace(run.config, samples=Samples())
    assert samples.stored(SimpleNamespace(config=none), 0) == []


@pytest.mark.parametrize("value", ["x", [0, "2"], 1.5, True, -1, 2**40, {"id": 2}])
def test_an_end_that_is_no_token_id_is_refused(tokenizer, tmp_path, value):
    source = SimpleNamespace(config={"eos_token_id": 0}, tokenizer_dir=tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1]}))
    assert companions.eos_ids(source, tokenizer) == [0, 1, 2]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(UserError, match=f"^{tmp_path}/generation_config.json: eos_token_id"):
        companions.eos_ids(source, tokenizer)
