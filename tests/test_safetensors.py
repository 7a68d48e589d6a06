"""Hugging Face directories in and out."""

import dataclasses
import json
import re
from functools import partial

import ml_dtypes
import numpy as np
import pytest
from conftest import tiny_config, write_model
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from alignjax.models import families
from alignjax.weights import safetensors
from alignjax.weights import source as weights
from alignjax.weights.loading import load
from alignjax.weights.safetensors import (
    companions_of,
    export,
    open_directory,
    save_companions,
    write_directory,
)
from alignjax.weights.source import watched


def tensors_of(directory) -> dict[str, np.ndarray]:
    found = {}
    for file in directory.glob("*.safetensors"):
        found |= load_file(file)
    return found


def contents(directory) -> dict[str, bytes]:
    """What travels beside the weights."""
    return {name: file.read_bytes() for name, file in companions_of(directory).items()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("files", [1, 3])
def test_in_and_out_again_is_byte_identical(tmp_path, tied, dtype, files):
    kind = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    written = write_model(tmp_path / "in", tiny_config(tied), dtype=kind, files=files)
    source = open_directory(tmp_path / "in")
    assert {stored.dtype for stored in source.tensors.values()} == {kind}
    model = load(source)
    export(model, source, tmp_path / "out", "source", 20_000 if files > 1 else 10**9)
    got = tensors_of(tmp_path / "out")
    assert set(got) == set(written)
    for name, array in written.items():
        assert got[name].dtype == kind and got[name].tobytes() == array.tobytes(), name
    config = (json.loads((tmp_path / end / "config.json").read_text()) for end in ("in", "out"))
    assert next(config) == next(config)
    assert contents(tmp_path / "out") == contents(tmp_path / "in") != {}


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
    monkeypatch.setattr(safetensors, "write_companions", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(model, source, tmp_path / "out", "source", 10**9)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def mixed_model(directory) -> dict[str, np.ndarray]:
    """A model of three dtypes, with a buffer that old checkpoints carry along."""
    tensors = write_model(directory, tiny_config(False))
    kinds = [np.float32, np.float16, ml_dtypes.bfloat16]
    tensors = {name: t.astype(kinds[i % 3]) for i, (name, t) in enumerate(tensors.items())}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    save_file(tensors, directory / "model.safetensors")
    return tensors


def test_a_copy_keeps_each_tensor_and_every_key(tmp_path):
    tensors = mixed_model(tmp_path / "in")
    write_directory(open_directory(tmp_path / "in"), tmp_path / "out", "source", 10**9)
    got = tensors_of(tmp_path / "out")
    assert {n: (t.dtype, t.tobytes()) for n, t in got.items()} == {
        n: (t.dtype, t.tobytes()) for n, t in tensors.items()
    }
    assert contents(tmp_path / "out") == contents(tmp_path / "in") != {}
    config = (json.loads((tmp_path / end / "config.json").read_text()) for end in ("in", "out"))
    assert next(config) == next(config)


def test_whatever_makes_up_a_tokenizer_travels(tmp_path):
    write_model(tmp_path / "in", tiny_config())
    names = {
        "tokenizer.4.0.0.json",
        "tokenizer.model",
        "tokenizer.model.v3",
        "spiece.model",
        "tiktoken.model",
        "tekken.json",
        "vocab.txt",
        "vocab.json",
        "merges.txt",
        "chat_template.json",
        "additional_chat_templates/rag.jinja",
    }
    (tmp_path / "in/additional_chat_templates").mkdir()
    for name in (*names, "model.py", "notes.txt", "additional_chat_templates/notes.txt"):
        (tmp_path / "in" / name).write_text(name)
    write_directory(open_directory(tmp_path / "in"), tmp_path / "out", "source", 10**9)
    ever = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert set(contents(tmp_path / "out")) == names | ever | {"generation_config.json"}
    assert contents(tmp_path / "out") == contents(tmp_path / "in")
    assert not any((tmp_path / "out").rglob("*notes*"))


def test_an_export_keeps_the_dtype_of_each_tensor(tmp_path):
    tensors = mixed_model(tmp_path / "in")
    source = open_directory(tmp_path / "in")
    export(load(source), source, tmp_path / "out", "source", 10**9)
    got = tensors_of(tmp_path / "out")
    for name, array in got.items():
        assert (array.dtype, array.tobytes()) == (tensors[name].dtype, tensors[name].tobytes())
    assert set(tensors) - set(got) == {"model.layers.0.self_attn.rotary_emb.inv_freq"}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"torch_dtype": "float32"}, {"torch_dtype": "bfloat16"}),
        ({"dtype": "float32"}, {"dtype": "bfloat16"}),
        ({}, {"dtype": "bfloat16"}),
    ],
)
def test_another_dtype_is_written_into_config(tmp_path, keys, expected):
    tensors = write_model(tmp_path / "in", tiny_config())
    file = tmp_path / "in/config.json"
    config = {n: v for n, v in json.loads(file.read_text()).items() if n != "torch_dtype"}
    file.write_text(json.dumps(config | keys | {"a_key_of_theirs": [1]}))
    write_directory(open_directory(tmp_path / "in"), tmp_path / "out", "bfloat16", 10**9)
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written == config | expected | {"a_key_of_theirs": [1]}
    for name, array in tensors_of(tmp_path / "out").items():
        assert array.tobytes() == tensors[name].astype(ml_dtypes.bfloat16).tobytes()


def test_a_value_that_the_dtype_cannot_hold(tmp_path):
    tensors = write_model(tmp_path / "in", tiny_config())
    tensors["model.norm.weight"][3] = -7e4
    save_file(tensors, tmp_path / "in/model.safetensors")
    source = open_directory(tmp_path / "in")
    with pytest.raises(ValueError) as error:
        write_directory(source, tmp_path / "out", "float16", 10**9)
    assert str(error.value) == (
        f"{tmp_path / 'in'}: model.norm.weight has values up to 70000, more than float16 can hold; "
        "write it as bfloat16 or float32."
    )
    assert not (tmp_path / "out").exists()


def test_slabs_are_read_one_ahead_of_what_is_written(tmp_path, monkeypatch):
    tensors = write_model(tmp_path / "in", tiny_config())
    monkeypatch.setattr(weights, "row_blocks", partial(weights.row_blocks, most=1000))
    monkeypatch.setattr(safetensors, "row_blocks", weights.row_blocks)
    source = open_directory(tmp_path / "in")
    read, written, ahead = [], [], []
    original = safetensors.write_file

    def count(name, index):
        array = source.read(name, index)
        assert array.nbytes <= 1000
        read.append(array.nbytes)
        return array

    def spy(file, parts):
        def passed():
            yield next(parts)  # the header
            for part in parts:
                yield part
                written.append(part.nbytes)
                ahead.append(len(read) - len(written))

        original(file, passed())

    monkeypatch.setattr(safetensors, "write_file", spy)
    write_directory(dataclasses.replace(source, read=count), tmp_path / "out", "source", 20_000)
    total = sum(array.nbytes for array in tensors.values())
    assert (sum(written), sum(read)) == (total, total)
    assert max(ahead) <= 2 and len(read) > 100
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": total}
    got = tensors_of(tmp_path / "out")
    assert {n: a.tobytes() for n, a in got.items()} == {n: a.tobytes() for n, a in tensors.items()}


def test_watched_tells_how_many_gigabytes_were_read(tmp_path):
    write_model(tmp_path, tiny_config())
    big = np.broadcast_to(np.float32(1), 300_000_000)
    source = dataclasses.replace(open_directory(tmp_path), read=lambda name, index: big[index])
    told = []
    source = watched(source, lambda done, note: told.append((done, note)))
    assert source.read("model.norm.weight", (slice(0, 5),)).tolist() == [1] * 5
    source.read("model.norm.weight", (slice(None),))
    assert [(done, note.split(", ")[0]) for done, note in told] == [(0, "0.00 GB"), (1, "1.20 GB")]
    assert all(re.fullmatch(r"\d\.\d\d GB, \d+\.\d\d GB/s", note) for _, note in told)


def test_companions_are_kept_and_replaced(tmp_path):
    write_model(tmp_path / "in", tiny_config())
    source = open_directory(tmp_path / "in")
    assert save_companions(source, tmp_path / "run/model") == tmp_path / "run/model"
    held = {p.name: p.read_bytes() for p in (tmp_path / "run/model").iterdir()}
    expected = {p.name for p in (tmp_path / "in").iterdir()} - {"model.safetensors"}
    assert set(held) == expected
    for name in expected - {"config.json"}:
        assert held[name] == (tmp_path / "in" / name).read_bytes()
    assert json.loads(held["config.json"]) == source.config
    (tmp_path / "run/model/merges.txt").write_text("of another model")
    save_companions(dataclasses.replace(source, config={}), tmp_path / "run/model")
    found = {p.name: p.read_bytes() for p in (tmp_path / "run/model").iterdir()}
    assert found == held | {"config.json": b"{}\n"}


def test_an_array_that_lies_in_another_order_is_written_in_its_own(tmp_path):
    tensors = write_model(tmp_path / "in", tiny_config())
    source = open_directory(tmp_path / "in")
    turned = dataclasses.replace(source, read=lambda n, i: np.asfortranarray(source.read(n, i)))
    write_directory(turned, tmp_path / "out", "source", 10**9)
    got = load_file(tmp_path / "out/model.safetensors")
    assert {n: a.tobytes() for n, a in got.items()} == {n: a.tobytes() for n, a in tensors.items()}


def test_files_that_are_given_lie_beside_an_export(tmp_path):
    write_model(tmp_path / "in", tiny_config())
    source = open_directory(tmp_path / "in")
    beside = {"README.md": "card", "chat_template.jinja": "new"}
    export(load(source), source, tmp_path / "out", "source", 10**9, beside)
    assert {name: (tmp_path / "out" / name).read_text() for name in beside} == beside
