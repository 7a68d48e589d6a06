"""Reward models trained as a user trains them: from a language model or another, and exported."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import hf_config, read_whole, tiny_config
from refusals import ended, prepare

from alignjax import command, convert, evaluate
from alignjax.models.families import from_hf
from alignjax.reward_source import reward_source
from alignjax.weights.safetensors import open_directory
from alignjax.weights.source import Source, decoder_config

STEPS = ("--batch.max-steps=6", "--optimizer.learning-rate=3e-3", "--log.eval-every=3")


@pytest.fixture(scope="module")
def trained(root):
    """The directory of a run of 6 steps, which no test changes."""
    with pytest.MonkeyPatch.context() as patch:
        assert ended(patch, None, root, root / "rm", *STEPS, stage="rm") == (0, "")
    return root / "rm"


def lines(directory) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_it_starts_at_ln_2_and_learns(trained):
    found = lines(trained)
    assert [line["step"] for line in found] == list(range(7))
    assert found[0]["eval_loss"] == pytest.approx(np.log(2))
    assert found[0]["eval_rewards/accuracies"] == 0.5 and found[0]["eval_rewards/chosen"] == 0
    assert found[6]["loss"] < found[1]["loss"] == pytest.approx(np.log(2))


def test_its_lines_have_the_spread_of_rewards(trained):
    found = lines(trained)
    for line in found:
        for start in ("", "eval_"):
            if f"{start}loss" in line:
                least, mean, most = (line[f"{start}rewards/{n}"] for n in ("min", "mean", "max"))
                both = line[f"{start}rewards/chosen"] + line[f"{start}rewards/rejected"]
                assert mean == pytest.approx(both / 2, abs=1e-6)
                assert least <= mean <= most
    scores = np.load(trained / "eval/step-6.npy")
    last = found[-1]
    assert (last["eval_rewards/min"], last["eval_rewards/max"]) == (scores.min(), scores.max())
    assert last["rewards/min"] < last["rewards/max"]
    assert not any("=" in name for line in found for name in line)  # one kind of pair


def test_the_export_is_a_classifier_of_one_label(trained, root):
    source = open_directory(trained / "export")
    assert decoder_config(source).scored and "lm_head.weight" not in source.tensors
    assert read_whole(source, "score.weight").any()
    assert source.config["architectures"] == ["LlamaForSequenceClassification"]
    assert "pipeline_tag: text-classification" in (trained / "export/README.md").read_text()
    assert json.loads((trained / "model/config.json").read_text()) == source.config


def test_a_reward_model_goes_on_from_another(trained, root, monkeypatch, capsys):
    more = (f"--model.path={trained / 'export'}", "--batch.max-steps=1")
    code, said = ended(monkeypatch, capsys, root, root / "again", *more, stage="rm")
    assert (code, said) == (0, "")
    before, after = lines(trained)[-1], lines(root / "again")[0]
    assert after["eval_loss"] == pytest.approx(before["eval_loss"], abs=1e-6)


@pytest.mark.parametrize("model", ["rm", "rm/export"])
def test_an_evaluation_gives_the_rewards_that_were_measured(trained, root, monkeypatch, model):
    file = root / "rm_eval.py"
    file.write_text("from alignjax.config import RMEval\nconfig = RMEval()\n")
    found = root / f"found-{model.replace('/', '-')}"
    arguments = [f"--config={file}", f"--model.path={root / model}", f"--out={found}"]
    arguments += [f"--data.path={root / 'rows.jsonl'}", "--data.max-length=128"]
    arguments += ["--batch.row-length=512", "--compute.dtype=float32"]
    monkeypatch.setenv("ALIGNJAX_CACHE", str(root / "cache"))
    monkeypatch.setattr("sys.argv", ["evaluate", *arguments])
    assert command.run(evaluate.main) == 0
    pairs = [json.loads(line) for line in (found / "pairs.jsonl").read_text().splitlines()]
    got = [[pair["chosen"], pair["rejected"]] for pair in pairs]
    np.testing.assert_allclose(got, np.load(trained / "eval/step-6.npy"), atol=1e-6)
    measured = json.loads((found / "results.json").read_text())["all"]
    assert measured["accuracy"] == lines(trained)[-1]["eval_rewards/accuracies"]


def test_samples_are_not_for_reward_models(root, monkeypatch, capsys, tmp_path):
    more = ("--samples.prompts=2",)
    assert ended(monkeypatch, capsys, root, tmp_path / "run", *more, stage="rm") == (
        2,
        "error: samples.prompts is not for this stage: a reward model gives no answers.\n",
    )


def test_the_padding_token_ends_no_answer(trained):
    """The tokenizer pads with the token that ends a turn; the export with another special one."""
    config = json.loads((trained / "export/config.json").read_text())
    assert config["pad_token_id"] == 0 == pads_with(trained / "export")
    assert from_hf(config, "x").pad_id == 0


def pads_with(directory) -> int:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory).pad_token_id


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    """A directory with a run of a step from a model whose tokenizer pads with another token."""
    root = prepare(tmp_path_factory.mktemp("padded"))
    model = root / "model"
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"pad_token_id": 0}))
    (model / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<|im_end|>"}))
    more = ("--batch.max-steps=1", "--optimizer.learning-rate=3e-3")
    with pytest.MonkeyPatch.context() as patch:
        assert ended(patch, None, root, root / "run", *more, stage="rm") == (0, "")
    return root


def test_the_tokenizer_pads_with_the_token_of_the_config(padded, tmp_path):
    """The source's pads with another one, which transformers would take for part of the answer."""
    model, run = padded / "model", padded / "run"
    assert pads_with(model) == 2
    assert open_directory(run / "export").config["pad_token_id"] == 0
    args = convert.parse([f"--src={run}", f"--dst={tmp_path / 'converted'}"])
    assert convert.convert(args) == 0
    for directory in (run / "export", run / "model", tmp_path / "converted"):
        assert pads_with(directory) == 0
        found = json.loads((directory / "tokenizer_config.json").read_text())
        source = json.loads((model / "tokenizer_config.json").read_text())
        assert found == source | {"pad_token": "<|endoftext|>"}


@pytest.mark.parametrize(
    ("given", "added", "rows", "pad"),
    [
        (-1, [], 128, 0),  # Llama's first configs say -1
        (None, [], 128, 0),
        (2, [], 128, 0),  # it ends a turn
        (5, [], 128, 5),
        (None, ["<|reserved_special_token_0|>"], 128, 99),
        (None, ["<spare>", "<|finetune_right_pad|>"], 128, 100),
        (None, ["[PAD]"], 99, 0),  # the embedding has no row for it
        (200, [], 128, 0),
    ],
)
def test_the_padding_token_that_is_chosen(tokenizer, given, added, rows, pad):
    assert len(tokenizer) == 99
    tokenizer.add_special_tokens(
        {"additional_special_tokens": added}, replace_extra_special_tokens=False
    )
    config = hf_config(tiny_config(vocab_size=rows)) | {"pad_token_id": given, "num_labels": 2}
    found = reward_source(Source(Path("x"), config, {}, None, Path("x")), tokenizer)
    assert found.config["pad_token_id"] == pad and decoder_config(found).pad_id == pad


def test_a_tokenizer_that_cannot_pad_is_told_of(tmp_path, capsys):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE({"a": 0, "</s>": 1}, [])), eos_token="</s>"
    )
    source = Source(Path("x"), hf_config(tiny_config()), {}, None, Path("x"))
    assert reward_source(source, tokenizer).config["pad_token_id"] is None
    assert "padding token" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_transformers_pads_a_batch_as_it_was_trained(padded):
    torch = pytest.importorskip("torch", reason="the extra `parity` is not installed")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    export = padded / "run/export"
    model = AutoModelForSequenceClassification.from_pretrained(export)
    tokenizer = AutoTokenizer.from_pretrained(export)
    texts = ["red<|im_end|>", "green blue one two<|im_end|>"]
    with torch.no_grad():
        alone = [model(**tokenizer(one, return_tensors="pt")).logits.item() for one in texts]
        batch = model(**tokenizer(texts, return_tensors="pt", padding=True)).logits[:, 0]
    assert batch.tolist() == pytest.approx(alone, abs=1e-5)
    assert alone[0] != alone[1]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_transformers_gives_the_rewards_that_were_measured(trained, root):
    torch = pytest.importorskip("torch", reason="the extra `parity` is not installed")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(trained / "export")
    tokenizer = AutoTokenizer.from_pretrained(trained / "export")
    rows = [json.loads(line) for line in (root / "rows.jsonl").read_text().splitlines()]
    held_out = [row for row in rows if row["split"] == "test"]
    measured = np.load(trained / "eval/step-6.npy")
    for row, rewards in zip(held_out, measured, strict=True):
        for side, reward in zip(("chosen", "rejected"), rewards, strict=True):
            chat = [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row[side]},
            ]
            ids = tokenizer.apply_chat_template(chat, return_dict=False)
            with torch.no_grad():
                got = model(torch.tensor([ids])).logits[0, 0].item()
            assert got == pytest.approx(float(reward), abs=1e-4)
