"""A model or a setting that a run cannot work with: one sentence, and nothing is left."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import hf_config, tiny_config, write_model
from refusals import LAYERS, ended, rows
from safetensors.numpy import load_file, save_file

pytestmark = pytest.mark.slow  # minutes


@pytest.fixture
def model(root, tmp_path):
    """A copy of the model to spoil."""
    return Path(shutil.copytree(root / "model", tmp_path / "model"))


# Models


def without(file: str):
    return lambda model: (model / file).unlink()


def cut(file: str, size: int = 100):
    def spoil(model: Path) -> None:
        (model / file).write_bytes((model / file).read_bytes()[:-size])

    return spoil


def configured(**changes):
    return lambda model: (model / "config.json").write_text(
        json.dumps(hf_config(tiny_config(layers=LAYERS)) | changes)
    )


def stored(change):
    """Spoils the tensors of a model: `change` edits the dict of them in place."""

    def spoil(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        change(tensors)
        save_file(tensors, model / "model.safetensors")

    return spoil


def renamed(tensors: dict) -> None:
    tensors["model.layers.0.self_attn.wq.weight"] = tensors.pop(
        "model.layers.0.self_attn.q_proj.weight"
    )


def not_a_number(tensors: dict) -> None:
    tensors["model.norm.weight"][3] = np.nan


def fewer_words(tensors: dict) -> None:
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:64].copy()


def pickled(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def indexed(model: Path) -> None:
    names = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00002.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


# What is done to a model directory, {0} -> what is said.
MODELS = {
    "no config": (
        without("config.json"),
        "{0}: there is no config.json, so this is not a model directory.",
    ),
    "half a config": (
        cut("config.json", 2),
        "{0}/config.json: this is not JSON (Unterminated string starting at: line 1 column 476 "
        "(char 475)); copy or fetch it again.",
    ),
    "another architecture": (
        configured(model_type="mamba"),
        "{0}: model_type 'mamba' is not supported; supported: 'llama', 'mistral', "
        "'gemma', 'qwen2', 'qwen3'.",
    ),
    "scaled rope": (
        configured(rope_parameters={"rope_type": "yarn", "factor": 4.0}),
        "{0}: rope_type='yarn' is not supported; supported: 'default' or 'linear' or 'llama3'.",
    ),
    "rope that is scaled in one place only": (
        configured(rope_scaling={"type": "linear", "factor": 4.0}),
        "{0}: rope_parameters says rope_type='default', but the older keys say 'linear'; delete "
        "the wrong one.",
    ),
    "soft-capped logits": (
        configured(final_logit_softcapping=30.0),
        "{0}: final_logit_softcapping=30.0 is not supported; supported: None.",
    ),
    "code of its own": (
        configured(auto_map={"AutoModel": "modeling.py"}),
        "{0}: auto_map={{'AutoModel': 'modeling.py'}} is not supported; supported: None.",
    ),
    "weights cut short": (
        cut("model.safetensors"),
        "{0}/model.safetensors: this is not a whole safetensors file (Error while deserializing "
        "header: incomplete metadata, file not fully covered; it ends within "
        "model.norm.weight); copy or fetch it again.",
    ),
    "pickled weights": (
        pickled,
        "{0}: there is no model.safetensors and no model.safetensors.index.json but "
        "pytorch_model.bin, weights that only torch reads; save the model with transformers, whose "
        "save_pretrained writes safetensors.",
    ),
    "a shard that is missing": (
        indexed,
        "{0}/model.safetensors.index.json: it names the file 'model-00001-of-00002.safetensors', "
        "which is not in {0}, for model.embed_tokens.weight.",
    ),
    "tensors of other names": (
        stored(renamed),
        "{0}: the tensor model.layers.0.self_attn.q_proj.weight is missing.",
    ),
    "tensors of other shapes": (
        configured(intermediate_size=128),
        "{0}/model.safetensors: model.layers.0.mlp.down_proj.weight has shape (32, 64), but the "
        "config says (32, 128).",
    ),
    "more tensors": (
        stored(lambda tensors: tensors.update({"score.weight": np.zeros((1, 32), np.float32)})),
        "{0}/model.safetensors: the tensor score.weight is not part of this model.",
    ),
    "a head for scores": (
        lambda model: write_model(model, tiny_config(layers=LAYERS, scored=True)),
        "{0}: this is a reward model, which has no head that gives words; name a language model.",
    ),
    "two labels": (
        configured(architectures=["LlamaForSequenceClassification"]),
        "{0}: it classifies into 2 labels, which is not supported; supported: 1, the score of a "
        "reward model (one without id2label needs num_labels: 1 in config.json).",
    ),
    "a head that is not the embedding": (
        stored(lambda tensors: tensors.update({"lm_head.weight": np.ones((128, 32), np.float32)})),
        "{0}: lm_head.weight differs from model.embed_tokens.weight, but config.json ties them; "
        "set tie_word_embeddings to false there.",
    ),
    "fewer words than its tokenizer": (
        lambda model: (configured(vocab_size=64)(model), stored(fewer_words)(model)),
        "{0}: the tokenizer gives token 93 ('y'), but the embedding has 64 rows; use the tokenizer "
        "that belongs to the model, or resize the embedding.",
    ),
    "weights that are no numbers": (
        stored(not_a_number),
        "{0}/model.safetensors: model.norm.weight holds values that are not finite (NaN or "
        "infinity); give a checkpoint whose weights are whole.",
    ),
    "a chat template in no place": (
        lambda model: [without(file)(model) for file in ("chat_template.jinja",)],
        "{1}, line 1: the model has no chat template; name one with --model.chat_template=NAME "
        "(or a file), or set data.strings=plain for plain text.",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_with(root, tmp_path, model, monkeypatch, capsys, name):
    spoil, sentence = MODELS[name]
    spoil(model)
    code, said = ended(monkeypatch, capsys, root, tmp_path / "run", f"--model.path={model}")
    assert (code, said) == (2, f"error: {sentence.format(model, root / 'rows.jsonl')}\n")
    assert not list((tmp_path / "run/checkpoints").iterdir())
    assert not (tmp_path / "run/export").exists()


def test_a_model_without_a_tokenizer(root, model, refusal):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (model / file).unlink()
    said = refusal(f"--model.path={model}")
    assert said.startswith(f"{model}: its tokenizer does not load (")


def test_a_file_that_is_no_gguf(root, refusal):
    (root / "model.gguf").write_bytes(b"GGUF and then nothing")
    said = refusal(f"--model.path={root / 'model.gguf'}")
    assert said.startswith(f"{root / 'model.gguf'}: this is not a whole GGUF file (")


# Settings

# Overrides -> what is said.
SETTINGS = {
    ("--beta.x=1",): (
        "--beta.x: there is no such key; there are batch.*, beta, checkpoint.*, compute.*, data.*, "
        "export.*, label_smoothing, log.*, loss, margin, mesh.*, model.*, name, optimizer.*, "
        "reference.*, run_dir, samples.*, seed, sft_weight, wandb."
    ),
    ("--batch.size=1",): (
        "--batch.size: there is no such key; there are batch.epochs, batch.max_steps, batch.pairs, "
        "batch.row_length, batch.rows, batch.rows_per_device, batch.sequences."
    ),
    ("--model.path=nowhere",): (
        "model.path=nowhere: there is no such file or directory, and it is neither ORG/NAME on the "
        "hub nor one of: smollm2-135m-instruct."
    ),
    ("--model.path=models/my model",): (
        "model.path=models/my model: the hub did not give it (Repo id must use alphanumeric chars, "
        "'-', '_' or '.'. The name cannot start or end with '-' or '.' and the maximum length is "
        "96: 'models/my model'.)."
    ),
    ("--model.path=",): "model.path is empty: name a model directory, ORG/NAME or GGUF file.",
    ("--data.path=",): "data.path is empty: name files, a dataset directory or ORG/NAME.",
    ("--batch.rows=4",): "set exactly one of batch.pairs and batch.rows to more than 0.",
    ("--batch.pairs=0",): "set exactly one of batch.pairs and batch.rows to more than 0.",
    ("--batch.pairs=-4",): "batch.pairs=-4: it must be at least 0 and at most 2147483647.",
    ("--batch.sequences=4",): (
        "batch.sequences is not for this stage; use batch.pairs or batch.rows."
    ),
    ("--batch.epochs=0",): "batch.epochs=0: it must be at least 1 and at most 1000000.",
    ("--checkpoint.every=0",): "checkpoint.every=0: it must be at least 1 and at most 2147483647.",
    ("--seed=-1",): "seed=-1: it must be at least 0 and at most 4294967295.",
    ("--label-smoothing=0.6",): "label_smoothing=0.6: it must be at least 0 and at most 0.5.",
    (
        "--compute.vocab-chunk=0",
    ): "compute.vocab_chunk=0: it must be at least 1 and at most 2147483647.",
    ("--samples.batch=0",): "samples.batch=0: it must be at least 1 and at most 2147483647.",
    ("--data.max-length=1",): ("data.max_length=1: it must be at least 2 and at most 1048576."),
    ("--data.max-length=200",): (
        "data.max_length=200 does not fit 2 to a row of batch.row_length=256: make it 128 or less."
    ),
    ("--data.eval-fraction=1",): "data.eval_fraction=1.0: it must be at least 0 and below 1.",
    ("--model.chat-template=nowhere.jinja",): (
        "model.chat_template=nowhere.jinja: there is no such file, nor is it one of: chatml, "
        "gemma, llama2, llama3, mistral, mistral-v3, mistral-v3-tekken, mistral-v7, tulu, vicuna, "
        "zephyr."
    ),
    ("--mesh.tensor=3",): (
        "mesh replica=1 x fsdp=-1 x tensor=3 does not fit 8 devices: make the product 8, or set "
        "one of the sizes to -1."
    ),
    ("--mesh.tensor=8",): (
        "The model's attention heads (4) cannot be split over mesh.tensor=8; sizes that work for "
        "this model: 1, 2, 4."
    ),
    ("--checkpoint.best=eval_loss",): (
        "checkpoint.best='eval_loss': write a metric and :min or :max, such as eval_loss:min."
    ),
    ("--checkpoint.best=eval_los:min",): (
        "checkpoint.best='eval_los:min': there is no metric eval_los; there are eval_loss, "
        "eval_rewards/chosen, eval_rewards/rejected, eval_rewards/margins, "
        "eval_rewards/accuracies, eval_logps/chosen, eval_logps/rejected, eval_logps/margins, "
        "eval_tokens/chosen, eval_tokens/rejected."
    ),
    ("--loss=hinge", "--label-smoothing=0.1"): (
        "label_smoothing=0.1 is not for loss=hinge: set it to 0."
    ),
    ("--loss=robust", "--label-smoothing=0.5"): (
        "label_smoothing=0.5 leaves loss=robust nothing to learn from: make it less."
    ),
    ("--loss=ipo", "--margin=1"): (
        "margin=1.0 is not for loss=ipo, whose margin is 1 / (2 beta): set 0."
    ),
    ("--loss=ipo", "--beta=0"): (
        "beta=0 is not for loss=ipo, whose margin is 1 / (2 beta): raise it."
    ),
    ("--data.train-on=everything",): (
        "data.train_on=everything is for sft: the sides of a pair share a prompt."
    ),
    ("--data.select=longest",): (
        "data.select=longest chooses nothing: set data.max_pairs, or leave it."
    ),
    ("--data.select=score_gap", "--data.max-pairs=2"): (
        "data.select=score_gap: no row has a `margin`, by which the chosen answer's score is above "
        "the rejected one's (for dpo also `score_chosen` and `score_rejected`); add that column, "
        "or choose another selection."
    ),
    ("--data.weights=1,2",): (
        "data.weights=1,2: give a number from 0 to 1000 for each name of data.path (1 here), with "
        "commas between."
    ),
    ("--data.weights=0",): "data.weights=0 leaves no row to train on.",
}


@pytest.mark.parametrize("overrides", SETTINGS, ids=" ".join)
def test_a_setting(refusal, overrides):
    assert refusal(*overrides) == SETTINGS[overrides]


def test_a_config_that_does_not_exist(monkeypatch, capsys, root):
    from alignjax import command, config, train

    monkeypatch.setattr("sys.argv", ["train", "--config=dpo_7x"])
    assert command.run(train.main) == 2
    known = ", ".join(config.names())
    assert capsys.readouterr().err == (
        "error: --config=dpo_7x: there is no such config or file; give a path ending in .py or one "
        f"of: {known}.\n"
    )


def test_the_best_of_a_run_that_measures_nothing(root, refusal):
    good = {"prompt": "one", "chosen": "two", "rejected": "three"}
    file = rows(root, good, file="alone.jsonl")
    assert refusal(f"--data.path={file}", "--checkpoint.best=eval_loss:min") == (
        "checkpoint.best='eval_loss:min': no row is held out, so there is nothing to measure; set "
        "data.eval_path or data.eval_fraction."
    )


def test_a_run_directory_that_is_a_file(root, refusal):
    (root / "file").write_text("x")
    assert refusal(f"--run-dir={root / 'file'}") == (
        f"{root / 'file'}: this is a file, where a directory is needed; name another place."
    )
    assert refusal(f"--run-dir={root / 'file/run'}") == (
        f"{root / 'file/run'}: this lies below a file; name another place."
    )
    assert (root / "file").read_text() == "x"
