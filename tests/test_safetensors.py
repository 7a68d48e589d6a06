"""Hugging Face directories in and out."""

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from conftest import mesh, tiny_config, write_model
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from alignjax.models import families
from alignjax.sharding import to_host
from alignjax.weights.safetensors import COMPANIONS, export, open_directory
from alignjax.weights.source import load


def tensors_of(directory) -> dict[str, np.ndarray]:
    found = {}
    for file in directory.glob("*.safetensors"):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("files", [1, 3])
def test_in_and_out_again_is_byte_identical(tmp_path, tied, dtype, files):
    kind = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    written = write_model(tmp_path / "in", tiny_config(tied), dtype=kind, files=files)
    source = open_directory(tmp_path / "in")
    assert source.dtype == dtype
    model = load(source)
    export(model, source, tmp_path / "out", "source", 20_000 if files > 1 else 10**9)
    got = tensors_of(tmp_path / "out")
    assert set(got) == set(written)
    for name, array in written.items():
        assert got[name].dtype == kind and got[name].tobytes() == array.tobytes(), name
    assert json.loads((tmp_path / "out/config.json").read_text()) == {
        **json.loads((tmp_path / "in/config.json").read_text()),
        "torch_dtype": dtype,
    }
    for name in COMPANIONS:
        if (tmp_path / "in" / name).is_file():
            assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "in" / name).read_bytes()


def test_shards_are_indexed_and_no_larger_than_asked(tmp_path):
    write_model(tmp_path / "in", tiny_config())
    source = open_directory(tmp_path / "in")
    export(load(source), source, tmp_path / "out", "source", 20_000)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())["weight_map"]
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        with safe_open(file, "numpy") as held:
            assert {n for n, f in index.items() if f == file.name} == set(held.keys())
            assert held.metadata() == {"format": "pt"}
        assert file.stat().st_size < 20_000 + 4096


def test_loading_onto_eight_devices_gives_the_same_weights(tmp_path):
    write_model(tmp_path / "m", tiny_config(False))
    one = jax.tree.map(to_host, load(open_directory(tmp_path / "m")))
    mesh(1, 4, 2)
    many = load(open_directory(tmp_path / "m"))
    assert str(many.blocks.q.sharding.spec) == "P(None, 'tensor', 'fsdp')"
    jax.tree.map(np.testing.assert_array_equal, one, jax.tree.map(to_host, many))


def refusal(directory) -> str:
    with pytest.raises(ValueError) as error:
        load(open_directory(directory))
    return str(error.value)


def test_a_shard_cut_short(tmp_path):
    write_model(tmp_path, tiny_config())
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert refusal(tmp_path).startswith(f"{file}: not a whole safetensors file (")


def test_a_missing_file_of_the_index(tmp_path):
    write_model(tmp_path, tiny_config(), files=2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert refusal(tmp_path) == (
        f"{tmp_path}/model.safetensors.index.json: it names the file "
        f"'model-00002-of-00002.safetensors', which is not in {tmp_path}."
    )


def test_an_index_that_leads_out_of_the_directory(tmp_path):
    write_model(tmp_path / "m", tiny_config(), files=2)
    shutil.copy(tmp_path / "m/model-00001-of-00002.safetensors", tmp_path / "x.safetensors")
    index = tmp_path / "m/model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001-of-00002", "../x"))
    assert "'../x.safetensors', which is not in" in refusal(tmp_path / "m")


def test_a_missing_a_misshapen_and_a_strange_tensor(tmp_path):
    for change, sentence in (
        (lambda t: t.pop("model.norm.weight"), "the tensor model.norm.weight is missing."),
        (
            lambda t: t.update({"model.norm.weight": np.ones(31, np.float32)}),
            "model.norm.weight has shape (31,), but the config says (32,).",
        ),
        (
            lambda t: t.update({"model.extra": np.ones(3, np.float32)}),
            "the tensor model.extra is not part of a Llama model.",
        ),
    ):
        tensors = dict(write_model(tmp_path, tiny_config()))
        change(tensors)
        save_file(tensors, tmp_path / "model.safetensors")
        assert refusal(tmp_path) == f"{tmp_path}: {sentence}"


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"model_type": "bert"}, "model_type 'bert' is not supported; supported: 'llama'."),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; supported: ('silu',)."),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}},
            "rope_type='llama3' is not supported; supported: 'default'.",
        ),
    ],
)
def test_mathematics_that_the_decoder_does_not_compute(tmp_path, change, sentence):
    write_model(tmp_path, tiny_config())
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    assert refusal(tmp_path) == f"{tmp_path}: {sentence}"


def test_rope_theta_is_read_from_both_layouts():
    base = {
        "model_type": "llama",
        "vocab_size": 8,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    new = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}
    assert families.from_hf({**base, "rope_theta": 5e5}, "x").rope_theta == 5e5
    assert families.from_hf({**base, **new}, "x").rope_theta == 1e5
    assert families.from_hf(base, "x").rope_theta == 1e4


def test_an_export_that_fails_leaves_nothing(tmp_path, monkeypatch):
    write_model(tmp_path / "in", tiny_config())
    source = open_directory(tmp_path / "in")
    model = load(source)
    monkeypatch.setattr("shutil.copyfile", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(model, source, tmp_path / "out", "source", 10**9)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]
