"""Hugging Face directories that are damaged or not what they say: one sentence with the place."""

import json
import shutil

import numpy as np
import pytest
from conftest import tiny_config, write_model
from safetensors.numpy import load_file, save_file

from alignjax.models import families
from alignjax.weights.loading import load
from alignjax.weights.safetensors import open_directory


def refusal(directory) -> str:
    with pytest.raises(ValueError) as error:
        load(open_directory(directory))
    return str(error.value)


def test_an_index_that_names_a_tensor_its_file_lacks(tmp_path):
    write_model(tmp_path, tiny_config(), files=2)
    file = tmp_path / "model-00002-of-00002.safetensors"
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(
        index.read_text().replace('{"model.', '{"model.x": "' + file.name + '", "model.')
    )
    sentence = f"{file}: the index names the tensor model.x, which is not in it."
    assert refusal(tmp_path) == sentence


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("text", ['{"model_type": "lla', "[1]"])
def test_json_that_is_damaged(tmp_path, name, text):
    write_model(tmp_path, tiny_config(), files=2)
    (tmp_path / name).write_text(text)
    problem = (
        "it holds no JSON object"
        if text == "[1]"
        else "this is not JSON (Unterminated string starting at: line 1 column 16 (char 15))"
    )
    assert refusal(tmp_path) == f"{tmp_path / name}: {problem}; copy or fetch it again."


def test_an_index_without_a_map(tmp_path):
    write_model(tmp_path, tiny_config(), files=2)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("{}")
    sentence = f"{index}: the key 'weight_map' is missing; copy or fetch it again."
    assert refusal(tmp_path) == sentence


def test_a_directory_without_config_or_weights(tmp_path):
    sentence = f"{tmp_path}: there is no config.json, so this is not a model directory."
    assert refusal(tmp_path) == sentence
    write_model(tmp_path, tiny_config())
    (tmp_path / "model.safetensors").unlink()
    there_is_no = f"{tmp_path}: there is no model.safetensors and no model.safetensors.index.json"
    advice = "; save the model with transformers, whose save_pretrained writes safetensors."
    assert refusal(tmp_path) == there_is_no + advice
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    torch = " but pytorch_model.bin, weights that only torch reads"
    assert refusal(tmp_path) == there_is_no + torch + advice


def test_a_missing_file_of_the_index(tmp_path):
    write_model(tmp_path, tiny_config(), files=2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert refusal(tmp_path) == (
        f"{tmp_path}/model.safetensors.index.json: it names the file "
        f"'model-00002-of-00002.safetensors', which is not in {tmp_path}, for "
        "model.layers.0.input_layernorm.weight."
    )


@pytest.mark.parametrize(
    "leads", ["../x.safetensors", "{0}/x.safetensors", "", ".", 5, None, ["x"]]
)
def test_an_index_that_leads_out_of_the_directory(tmp_path, leads):
    write_model(tmp_path / "m", tiny_config(), files=2)
    shutil.copy(tmp_path / "m/model-00001-of-00002.safetensors", tmp_path / "x.safetensors")
    index = tmp_path / "m/model.safetensors.index.json"
    found = json.loads(index.read_text())
    leads = leads.format(tmp_path) if isinstance(leads, str) else leads
    found["weight_map"]["model.norm.weight"] = leads
    index.write_text(json.dumps(found))
    assert refusal(tmp_path / "m") == (
        f"{index}: it names the file {leads!r}, which is not in {tmp_path}/m, for "
        "model.norm.weight."
    )


def test_one_tensor_in_two_files(tmp_path):
    write_model(tmp_path, tiny_config(), files=2)
    first, second = (tmp_path / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    held = load_file(second)
    save_file(held | {"model.norm.weight": np.ones(32, np.float32)}, second)
    owner = first if "model.norm.weight" in load_file(first) else None
    assert owner and refusal(tmp_path) == (
        f"{second}: it holds the tensor model.norm.weight, which {first.name} holds too; copy or "
        "fetch the model again."
    )


def test_a_missing_a_misshapen_and_a_strange_tensor(tmp_path):
    for change, sentence in (
        (lambda t: t.pop("model.norm.weight"), "the tensor model.norm.weight is missing."),
        (
            lambda t: t.update({"model.norm.weight": np.ones(31, np.float32)}),
            "model.norm.weight has shape (31,), but the config says (32,).",
        ),
        (
            lambda t: t.update({"model.extra": np.ones(3, np.float32)}),
            "the tensor model.extra is not part of this model.",
        ),
    ):
        tensors = dict(write_model(tmp_path, tiny_config()))
        change(tensors)
        file = tmp_path / "model.safetensors"
        save_file(tensors, file)
        place = tmp_path if "missing" in sentence else file
        assert refusal(tmp_path) == f"{place}: {sentence}"


@pytest.mark.parametrize(
    "change, sentence",
    [
        (
            {"model_type": "bert"},
            "model_type 'bert' is not supported; supported: "
            + ", ".join(map(repr, families.FAMILIES))
            + ".",
        ),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; supported: 'silu'."),
        (
            {"model_type": "gemma", "hidden_act": "relu"},
            "hidden_act='relu' is not supported; supported: 'gelu_pytorch_tanh'.",
        ),
        (
            {"model_type": "gemma", "hidden_act": "gelu", "hidden_activation": "gelu"},
            "hidden_act='gelu' is not supported; supported: 'gelu_pytorch_tanh'.",
        ),
    ],
)
def test_mathematics_that_the_decoder_does_not_compute(tmp_path, change, sentence):
    write_model(tmp_path, tiny_config())
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    assert refusal(tmp_path) == f"{tmp_path}: {sentence}"


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_stored_beside_a_tied_embedding(tmp_path, tied):
    """Equal to it, it is the embedding again; transformers would not tie a different one."""
    tensors = write_model(tmp_path, tiny_config(tied))
    embed, head = "model.embed_tokens.weight", "lm_head.weight"
    tensors[head] = tensors[embed].copy()
    save_file(tensors, tmp_path / "model.safetensors")
    assert (load(open_directory(tmp_path)).head is None) is tied
    tensors[head][7, 3] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    if not tied:
        assert load(open_directory(tmp_path)).head[7, 3] == tensors[head][7, 3]
        return
    assert refusal(tmp_path) == (
        f"{tmp_path}: lm_head.weight differs from model.embed_tokens.weight, but config.json ties "
        "them; set tie_word_embeddings to false there."
    )


def test_a_config_that_lacks_a_size(tmp_path):
    write_model(tmp_path, tiny_config())
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace("hidden_size", "width"))
    assert refusal(tmp_path) == f"{tmp_path}: config.json lacks the key 'hidden_size'."
