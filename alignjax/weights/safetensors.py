"""Hugging Face model directories, in and out, without torch."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from alignjax.files import whole_directory
from alignjax.models.decoder import Decoder
from alignjax.models.families import tensor_names
from alignjax.sharding import to_host
from alignjax.weights.source import Source, leaf_name

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}

# What travels from a model directory to an export beside the weights, byte for byte.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def open_directory(path: Path) -> Source:
    """A directory with config.json and safetensors files as a `Source`.

    Raises ValueError, naming the file, where something is missing, damaged or of another format.
    """
    from safetensors import SafetensorError, safe_open

    config_file = path / "config.json"
    if not config_file.is_file():
        raise ValueError(f"{path}: there is no config.json, so this is not a model directory.")
    files = {}
    for name, file in _tensor_files(path).items():
        files.setdefault(file, []).append(name)
    handles, shapes, dtypes = {}, {}, set()
    for file, names in files.items():
        try:
            handle = safe_open(file, framework="numpy")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: not a whole safetensors file ({error}).") from None
        held = set(handle.keys())
        for name in names or held:
            if name not in held:
                raise ValueError(f"{file}: the index names the tensor {name}, which is not in it.")
            part = handle.get_slice(name)
            if part.get_dtype() not in DTYPES:
                raise ValueError(
                    f"{file}: {name} has dtype {part.get_dtype()}; supported: {', '.join(DTYPES)}."
                )
            handles[name], shapes[name] = handle, tuple(part.get_shape())
            dtypes.add(DTYPES[part.get_dtype()].name)
    config = json.loads(config_file.read_text(encoding="utf-8"))
    dtype = dtypes.pop() if len(dtypes) == 1 else "float32"
    return Source(path, config, dtype, shapes, lambda n, i: handles[n].get_slice(n)[i], path)


def _tensor_files(path: Path) -> dict[str, Path]:
    """Tensor -> file as the index says; without an index, the whole of model.safetensors."""
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        single = path / "model.safetensors"
        if not single.is_file():
            raise ValueError(f"{path}: there is no model.safetensors and no {index.name}.")
        from safetensors import safe_open

        try:
            with safe_open(single, framework="numpy") as handle:
                return dict.fromkeys(handle.keys(), single)
        except Exception as error:
            raise ValueError(f"{single}: not a whole safetensors file ({error}).") from None
    files = {}
    for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
        if Path(file).name != file or not (path / file).is_file():
            raise ValueError(f"{index}: it names the file {file!r}, which is not in {path}.")
        files[name] = path / file
    return files


def export(model: Decoder, source: Source, target: Path, dtype: str, shard_bytes: int) -> Path:
    """Writes a directory that transformers and vLLM load; it appears only when it is whole.

    `dtype` is "source" or a dtype's name. A tied head is left out, as transformers leaves it.
    """
    kind = source.dtype if dtype == "source" else dtype
    with whole_directory(target) as directory:
        names_in: list[list[str]] = []
        for tensors in _shards(model, kind, shard_bytes):
            _save(tensors, directory / f"part-{len(names_in)}")
            names_in.append(list(tensors))
        size = sum(file.stat().st_size for file in directory.iterdir())
        _name_shards(directory, names_in, size)
        _write_config(source.config, kind, directory)
        for name in COMPANIONS:
            if (source.tokenizer_dir / name).is_file():
                shutil.copyfile(source.tokenizer_dir / name, directory / name)
    return target


def _shards(model: Decoder, dtype: str, shard_bytes: int) -> Iterator[dict[str, np.ndarray]]:
    """The model's tensors on the host, at most `shard_bytes` of them at a time."""
    stored = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    shard: dict[str, np.ndarray] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(model):
        names = tensor_names(leaf_name(path), model.config.layers)
        stacked = leaf_name(path).startswith("blocks.")
        for i, name in enumerate(names):
            array = to_host(leaf[i] if stacked else leaf).astype(stored)
            if shard and sum(a.nbytes for a in shard.values()) + array.nbytes > shard_bytes:
                yield shard
                shard = {}
            shard[name] = array
    yield shard


def _save(tensors: dict[str, np.ndarray], file: Path) -> None:
    from safetensors.numpy import save_file

    save_file(tensors, file, metadata={"format": "pt"})


def _name_shards(directory: Path, names_in: list[list[str]], total: int) -> None:
    """Gives the parts their final names, which hold their number, and writes the index."""
    count = len(names_in)
    if count == 1:
        (directory / "part-0").rename(directory / "model.safetensors")
        return
    weight_map = {}
    for i, names in enumerate(names_in):
        file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        (directory / f"part-{i}").rename(directory / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _write_config(config: dict, dtype: str, directory: Path) -> None:
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    text = json.dumps({**config, key: dtype}, indent=2) + "\n"
    (directory / "config.json").write_text(text, encoding="utf-8")
