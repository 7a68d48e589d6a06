"""Writing Orbax's format: plain Orbax restores it, and nothing of a tensor is lost on the way."""

import json

import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
from conftest import BF16, bytes_of, read_whole, tiny_config, write_model
from safetensors.numpy import load_file, save_file

from alignjax.models.families import tensor_names
from alignjax.models.shapes import leaf_shapes
from alignjax.weights import orbax, orbax_write
from alignjax.weights.safetensors import open_directory, write_directory


def test_plain_orbax_restores_what_is_written(written):
    stored = {}
    for file in (written.parent / "hf").glob("*.safetensors"):
        stored |= load_file(file)
    restored = ocp.StandardCheckpointer().restore(written / "weights")
    shapes = leaf_shapes(tiny_config())
    assert {name: leaf.shape for name, leaf in restored.items()} == shapes
    for leaf, array in restored.items():
        names = tensor_names(leaf, 3)
        expected = np.stack([stored[name] for name in names]) if len(names) > 1 else None
        expected = stored[names[0]] if expected is None else expected
        assert array.dtype == BF16 and array.tobytes() == expected.tobytes(), leaf


def test_a_chunk_of_blocks_is_one_layer(written):
    spec = {"driver": "file", "path": f"{written}/weights/blocks.gate/"}
    array = tensorstore.open({"driver": "zarr", "kvstore": spec}, open=True).result()
    assert array.shape == (3, 64, 32) and array.chunk_layout.read_chunk.shape == (1, 64, 32)
    assert array.codec.to_json()["compressor"] is None


@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        ((8192, 8192), 1024),  # an eighth
        ((1000, 8192), 256),  # 4 MiB
        ((28672, 8192), 2048),  # 32 MiB
        ((5, 1 << 25), 1),  # a row at least
        ((4096,), 4096),
    ],
)
def test_a_chunk_of_a_large_tensor(shape, rows):
    """Of 2 bytes an element."""
    assert orbax_write._chunk_rows(shape, 2) == rows


def test_slabs_are_whole_chunks_and_cover_each_tensor_once(monkeypatch):
    monkeypatch.setattr(orbax_write, "SLAB", 1 << 10)
    for rows, step in ((3, 15), (9, 9), (40, 40)):  # five chunks make a slab, one, less than one
        target = orbax_write.Target(["a", "b"], (2, 41, 32), BF16, rows)
        slabs = list(orbax_write._slabs({"blocks.q": target}))
        for layer in (0, 1):
            parts = [index[0] for _, at, index in slabs if at == layer]
            assert [part.start for part in parts] == list(range(0, 41, step))
            assert np.concatenate([np.arange(41)[part] for part in parts]).tolist() == [*range(41)]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_there_and_back_is_byte_identical(tmp_path, tied, dtype):
    kind = BF16 if dtype == "bfloat16" else np.dtype(dtype)
    tensors = write_model(tmp_path / "in", tiny_config(tied), dtype=kind)
    orbax_write.write_model(open_directory(tmp_path / "in"), tmp_path / "orbax", "source")
    assert orbax.is_orbax(tmp_path / "orbax") and not orbax.is_orbax(tmp_path / "in")
    back = orbax.open_orbax(tmp_path / "orbax")
    write_directory(back, tmp_path / "out", "source", 10**9)
    assert bytes_of(load_file(tmp_path / "out/model.safetensors")) == bytes_of(tensors)
    files = {p.name for p in (tmp_path / "in").iterdir()}
    assert {p.name for p in (tmp_path / "out").iterdir()} == files
    assert {p.name for p in (tmp_path / "orbax").iterdir()} == files - {"model.safetensors"} | {
        "weights"
    }
    for name in files - {"model.safetensors", "config.json"}:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "in" / name).read_bytes()
    config = json.loads((tmp_path / "in/config.json").read_text())
    assert json.loads((tmp_path / "out/config.json").read_text()) == config == back.config
    assert back.tokenizer_dir == tmp_path / "orbax"


def test_layers_of_different_dtypes_come_back_as_they_were(tmp_path):
    kinds = [np.float16, BF16, np.float32]
    tensors = write_model(tmp_path / "in", tiny_config())
    tensors = {name: t.astype(kinds[i % 3]) for i, (name, t) in enumerate(tensors.items())}
    save_file(tensors, tmp_path / "in/model.safetensors")
    orbax_write.write_model(open_directory(tmp_path / "in"), tmp_path / "orbax", "source")
    restored = ocp.StandardCheckpointer().restore(tmp_path / "orbax/weights")
    assert {restored[n].dtype for n in ("embed", "blocks.q", "norm")} == {
        np.dtype(np.float16),
        np.dtype(np.float32),
        BF16,
    }
    source = orbax.open_orbax(tmp_path / "orbax")
    assert {n: stored.dtype for n, stored in source.tensors.items()} == {
        n: t.dtype for n, t in tensors.items()
    }
    write_directory(source, tmp_path / "out", "source", 10**9)
    assert bytes_of(load_file(tmp_path / "out/model.safetensors")) == bytes_of(tensors)


def test_another_dtype(tmp_path):
    tensors = write_model(tmp_path / "in", tiny_config())
    orbax_write.write_model(open_directory(tmp_path / "in"), tmp_path / "orbax", "bfloat16")
    source = orbax.open_orbax(tmp_path / "orbax")
    assert source.config["torch_dtype"] == "bfloat16"
    for name, array in tensors.items():
        assert read_whole(source, name).tobytes() == array.astype(BF16).tobytes()


def test_an_array_of_zeros_is_stored_and_read(tmp_path):
    tensors = write_model(tmp_path / "in", tiny_config())
    tensors["model.norm.weight"] *= 0
    tensors["model.layers.1.mlp.up_proj.weight"] *= 0
    save_file(tensors, tmp_path / "in/model.safetensors")
    orbax_write.write_model(open_directory(tmp_path / "in"), tmp_path / "orbax", "source")
    source = orbax.open_orbax(tmp_path / "orbax")
    for name in tensors:
        assert read_whole(source, name).tobytes() == tensors[name].tobytes()


def test_a_conversion_that_fails_leaves_nothing(tmp_path, monkeypatch):
    write_model(tmp_path / "in", tiny_config())
    monkeypatch.setattr(orbax_write, "write_companions", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        orbax_write.write_model(open_directory(tmp_path / "in"), tmp_path / "out", "source")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
