"""Tensors onto a mesh: each byte read once, the same values on any mesh, all of them finite."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from conftest import mesh, tiny_config, write_model
from safetensors.numpy import load_file, save_file

from alignjax.models import families
from alignjax.sharding import to_host
from alignjax.weights import source as weights
from alignjax.weights import spread, tensorfile
from alignjax.weights.loading import load
from alignjax.weights.safetensors import export, open_directory


def refusal(directory) -> str:
    with pytest.raises(ValueError) as error:
        load(open_directory(directory))
    return str(error.value)


@pytest.mark.parametrize("devices", [(1, 1, 1), (1, 4, 2), (2, 2, 2), (1, 1, 4), (4, 2, 1)])
@pytest.mark.parametrize("slab", [1 << 25, 1 << 11])
@pytest.mark.parametrize("own", [{}, {"qkv_bias": True}, {"qk_norm": True}, {"scored": True}])
def test_each_byte_is_read_once_on_any_mesh(tmp_path, monkeypatch, devices, slab, own):
    """Two key/value heads are copied on four devices; the last rows of the vocabulary are none."""
    c = tiny_config(False, vocab_size=100, **own)
    tensors = write_model(tmp_path, c, dtype=np.float16, files=2)
    asked = []
    original = tensorfile.read_bytes

    def spy(file, start, content):
        asked.extend((file.name, place) for place in range(start, start + len(content)))
        return original(file, start, content)

    monkeypatch.setattr(tensorfile, "read_bytes", spy)
    monkeypatch.setattr(spread, "SLAB", slab)
    mesh(*devices)
    model = load(open_directory(tmp_path))
    assert len(asked) == len(set(asked)) == sum(array.nbytes for array in tensors.values())
    for path, leaf in jax.tree_util.tree_leaves_with_path(model):
        name = weights.leaf_name(path)
        names = families.tensor_names(name, c.layers)
        held = to_host(leaf) if weights.is_stacked(name) else to_host(leaf)[None]
        for array, tensor in zip(held, names, strict=True):
            expected = tensors[tensor].astype(np.float32)
            assert array[: len(expected)].tobytes() == expected.tobytes(), tensor
            assert not array[len(expected) :].any()


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_every_finite_value_arrives_to_the_bit(tmp_path, kind):
    """Also -0 and numbers too small to be normal; all that 16 bits hold."""
    tensors = write_model(tmp_path, tiny_config(mlp_size=2048), dtype=kind)
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = bits.view(np.float16 if kind is np.float32 else kind).astype(np.float32)
    if kind is np.float32:
        values = (bits.astype(np.uint32) << 16 | bits).view(np.float32)
    values = np.where(np.isfinite(values), values, 0).reshape(2048, 32)
    tensors["model.layers.1.mlp.up_proj.weight"] = values.astype(kind)
    save_file(tensors, tmp_path / "model.safetensors")
    mesh(1, 4, 2)
    source = open_directory(tmp_path)
    model = load(source)
    assert to_host(model.blocks.up)[1].tobytes() == values.tobytes()
    export(model, source, tmp_path / "out", "source", 10**9)
    assert load_file(tmp_path / "out/model.safetensors")[
        "model.layers.1.mlp.up_proj.weight"
    ].tobytes() == (values.astype(kind).tobytes())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
)
@pytest.mark.parametrize("devices", [(1, 1, 1), (1, 4, 2)])
def test_weights_that_are_not_finite(tmp_path, name, value, devices):
    tensors = write_model(tmp_path, tiny_config(), files=2)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    tensors[name].flat[-1] = value
    file = tmp_path / index[name]
    save_file({n: t for n, t in tensors.items() if index[n] == file.name}, file)
    mesh(*devices)
    assert refusal(tmp_path) == (
        f"{file}: {name} holds values that are not finite (NaN or infinity); give a checkpoint "
        "whose weights are whole."
    )


def test_loading_onto_eight_devices_gives_the_same_weights(tmp_path):
    write_model(tmp_path / "m", tiny_config(False))
    one = jax.tree.map(to_host, load(open_directory(tmp_path / "m")))
    mesh(1, 4, 2)
    many = load(open_directory(tmp_path / "m"))
    assert str(many.blocks.q.sharding.spec) == "P(None, 'tensor', 'fsdp')"
    jax.tree.map(np.testing.assert_array_equal, one, jax.tree.map(to_host, many))
