"""Hugging Face directories that are damaged or not what they say: one sentence with the place."""

import json
import os
import shutil

import numpy as np
import pytest
from conftest import read_whole, tiny_config, write_model
from safetensors.numpy import load_file, save_file

from alignjax.models import families
from alignjax.weights.loading import load
from alignjax.weights.safetensors import open_directory
from alignjax.weights.source import check_tensors, decoder_config


def refusal(directory) -> str:
    with pytest.raises(ValueError) as error:
        load(open_directory(directory))
    return str(error.value)


@pytest.mark.parametrize("tied", [True, False])
def test_an_index_that_names_a_tensor_its_file_lacks(tmp_path, tied):
    """transformers leaves a tied head in the index, which only says what files there are."""
    write_model(tmp_path, tiny_config(tied), files=2)
    index = tmp_path / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    file = tmp_path / found["weight_map"].setdefault(
        "lm_head.weight", "model-00002-of-00002.safetensors"
    )
    index.write_text(json.dumps(found))
    held = load_file(file)
    held.pop("lm_head.weight", None)
    save_file(held, file)
    if tied:
        assert load(tmp_path).head is None
    else:
        assert refusal(tmp_path) == f"{tmp_path}: the tensor lm_head.weight is missing."


@pytest.mark.parametrize("left", [True, False])
def test_one_file_is_read_before_an_older_index(tmp_path, left):
    """As transformers does; saving anew leaves the index, and may leave its files."""
    write_model(tmp_path, tiny_config(), files=2)
    if not left:
        for file in tmp_path.glob("model-*"):
            file.unlink()
    newer = write_model(tmp_path, tiny_config(), seed=1)
    source = open_directory(str(tmp_path))
    assert set(source.tensors) == set(newer)
    for name, array in newer.items():
        np.testing.assert_array_equal(read_whole(source, name), array)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_tensors_of_a_wrapped_model_are_read_by_their_own_names(tmp_path, prefix, capsys):
    tensors = write_model(tmp_path, tiny_config())
    wrapped = {prefix + name: array for name, array in tensors.items()}
    save_file(wrapped, tmp_path / "model.safetensors")
    source = open_directory(tmp_path)
    check_tensors(source)
    for name, array in tensors.items():
        np.testing.assert_array_equal(read_whole(source, name), array)
    assert f"{prefix}model." in capsys.readouterr().out
    save_file(
        wrapped | {"model.norm.weight": np.ones(32, np.float32)}, tmp_path / "model.safetensors"
    )
    assert "model.norm.weight, which" in refusal(tmp_path)


@pytest.mark.parametrize(
    "name", ["self_attn.rotary_emb.inv_freq", "attn.masked_bias", "attn.bias", "x.position_ids"]
)
@pytest.mark.parametrize("dtype", [np.int64, np.bool_, np.float32])
def test_buffers_are_passed_over(tmp_path, name, dtype):
    tensors = write_model(tmp_path, tiny_config())
    buffer = {f"model.layers.0.{name}": np.ones(4, dtype)}
    save_file(tensors | buffer, tmp_path / "model.safetensors")
    load(tmp_path)
    save_file(tensors | {"model.other": np.ones(4, np.int64)}, tmp_path / "model.safetensors")
    assert "model.other has dtype I64" in refusal(tmp_path)


@pytest.mark.parametrize("config", [True, False])
def test_an_adapter_is_named_as_one(tmp_path, config):
    write_model(tmp_path, tiny_config())
    (tmp_path / "adapter_config.json").write_text("{}")
    if not config:
        (tmp_path / "config.json").unlink()
    said = refusal(tmp_path)
    assert said.startswith(f"{tmp_path}: adapter_config.json") and "merge_and_unload" in said


@pytest.mark.parametrize("leads", ["fifo", "/dev/zero"])
@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors.index.json", "model-00002-of-00002.safetensors"]
)
def test_a_file_that_leads_to_a_pipe_or_device(tmp_path, name, leads):
    write_model(tmp_path, tiny_config(), files=2)
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to(tmp_path / leads)
    assert name in refusal(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("text", ['{"model_type": "lla', "[1]"])
def test_json_that_is_damaged(tmp_path, name, text):
    write_model(tmp_path, tiny_config(), files=2)
    (tmp_path / name).write_text(text)
    said = refusal(tmp_path)
    assert said.startswith(f"{tmp_path / name}: ")
    assert ("must be an object" if text == "[1]" else "not JSON") in said


@pytest.mark.parametrize(
    "held",
    [{}, {"weight_map": {}}, {"weight_map": ["x"]}, {"weight_map": {"x": 5}}, {"weight_map": None}],
)
def test_an_index_without_a_map(tmp_path, held):
    write_model(tmp_path, tiny_config(), files=2)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps(held))
    said = refusal(tmp_path)
    assert said.startswith(f"{index}: ") and "weight_map" in said


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


@pytest.mark.parametrize("leads", ["../x.safetensors", "{0}/x.safetensors", "", "."])
def test_an_index_that_leads_out_of_the_directory(tmp_path, leads):
    write_model(tmp_path / "m", tiny_config(), files=2)
    shutil.copy(tmp_path / "m/model-00001-of-00002.safetensors", tmp_path / "x.safetensors")
    index = tmp_path / "m/model.safetensors.index.json"
    found = json.loads(index.read_text())
    leads = leads.format(tmp_path)
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


def changed(tmp_path, **values) -> None:
    """A model whose config.json has other values; `...` takes a key away."""
    write_model(tmp_path, tiny_config())
    file = tmp_path / "config.json"
    held = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in held.items() if value is not ...}))


@pytest.mark.parametrize(
    "key, value",
    [
        ("hidden_size", "32"),
        ("hidden_size", 32.0),
        ("vocab_size", 128.0),
        ("vocab_size", True),
        ("num_attention_heads", 0),
        ("num_attention_heads", -4),
        ("num_key_value_heads", 3),
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", "2"),
        ("head_dim", 7),
        ("model_type", ["llama"]),
        ("rms_norm_eps", None),
        ("rms_norm_eps", "1e-5"),
        ("rms_norm_eps", float("nan")),
        ("tie_word_embeddings", None),
        ("rope_theta", "abc"),
        ("rope_theta", -1.0),
        ("rope_scaling", "linear"),
        ("rope_scaling", {"type": "linear", "factor": None}),
        ("rope_scaling", {"type": "linear", "factor": 0}),
        ("rope_parameters", {"full_attention": {"rope_theta": 1e6}}),
        ("architectures", 5),
        ("architectures", [5]),
        ("layer_types", 5),
        ("eos_token_id", "x"),
        ("pad_token_id", [1]),
    ],
)
def test_a_config_of_other_types_and_sizes(tmp_path, key, value):
    changed(tmp_path, **{"rope_parameters": ..., key: value})
    said = refusal(tmp_path)
    assert said.startswith(f"{tmp_path}") and key in said


def test_rope_scaling_whose_frequencies_are_the_wrong_way_round(tmp_path):
    scaling = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
    scaling |= {"low_freq_factor": 4.0, "high_freq_factor": 4.0}
    changed(tmp_path, rope_parameters=..., rope_scaling=scaling)
    assert "high_freq_factor=4.0" in refusal(tmp_path)


def test_heads_that_do_not_divide_the_width(tmp_path):
    changed(tmp_path, head_dim=..., num_attention_heads=5, num_key_value_heads=5)
    assert "num_attention_heads=5" in refusal(tmp_path)


@pytest.mark.parametrize("ends", ["x", [2, "x"], {"a": 1}, 2.0])
def test_generation_config_of_other_types(tmp_path, ends):
    write_model(tmp_path, tiny_config())
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    said = refusal(tmp_path)
    assert said.startswith(f"{tmp_path}/generation_config.json: eos_token_id")


@pytest.mark.parametrize(
    "keys, labels",
    [
        ({"num_labels": 1}, 1),
        ({"id2label": {"0": "a"}, "num_labels": 2}, 2),
        ({"id2label": {"0": "a"}}, 1),
        ({}, 2),
        ({"num_labels": 3}, 3),
        ({"id2label": {}, "num_labels": 1}, 1),
    ],
)
def test_the_labels_of_a_classifier_are_those_of_transformers(tmp_path, keys, labels):
    from transformers import AutoConfig

    plain = {"id2label": ..., "label2id": ..., "num_labels": ...}
    changed(tmp_path, architectures=["LlamaForSequenceClassification"], **plain | keys)
    assert AutoConfig.from_pretrained(tmp_path).num_labels == labels
    source = open_directory(tmp_path)
    if labels == 1:
        assert decoder_config(source).scored
    else:
        assert f"{labels} labels" in refusal(tmp_path) and "num_labels" in refusal(tmp_path)
