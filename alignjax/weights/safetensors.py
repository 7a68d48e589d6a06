"""Hugging Face model directories, in and out, without torch."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from alignjax.files import whole_directory
from alignjax.models.decoder import Decoder
from alignjax.models.families import tensor_names
from alignjax.sharding import to_host
from alignjax.weights.source import Source, Stored, is_stacked, leaf_name, read_whole

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
    config = read_config(path)
    handles, tensors = {}, {}
    for file, names in _names_of(path).items():
        handle = _open(file)
        held = set(handle.keys())
        for name in names or sorted(held):
            if name not in held:
                raise ValueError(f"{file}: the index names the tensor {name}, which is not in it.")
            part = handle.get_slice(name)
            if part.get_dtype() not in DTYPES:
                raise ValueError(
                    f"{file}: {name} has dtype {part.get_dtype()}; supported: {', '.join(DTYPES)}."
                )
            handles[name] = handle
            tensors[name] = Stored(tuple(part.get_shape()), DTYPES[part.get_dtype()], file)
    return Source(path, config, tensors, lambda n, i: handles[n].get_slice(n)[i], path)


def read_config(directory: Path) -> dict:
    """The config.json of a model directory."""
    file = directory / "config.json"
    if not file.is_file():
        raise ValueError(f"{directory}: there is no config.json, so this is not a model directory.")
    return _read_json(file)


def _read_json(file: Path) -> dict:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: this is not JSON ({error}); copy or fetch it again.") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file}: it holds no JSON object; copy or fetch it again.")
    return found


def _open(file: Path):
    """A handle on a file that is as long as its header says."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file}: this is not a whole safetensors file ({error}); copy or fetch it again."
        ) from None


def has_weights(path: Path) -> bool:
    """Whether a directory holds safetensors files that a model is read from."""
    names = ("model.safetensors.index.json", "model.safetensors")
    return any((path / name).is_file() for name in names)


def _names_of(path: Path) -> dict[Path, list[str]]:
    """File -> its tensors as the index says; without an index model.safetensors, all of it."""
    index, single = path / "model.safetensors.index.json", path / "model.safetensors"
    if not has_weights(path):
        torch = min((file.name for file in path.glob("pytorch_model*")), default="")
        held = f" but {torch}, weights that only torch reads" if torch else ""
        raise ValueError(
            f"{path}: there is no {single.name} and no {index.name}{held}; save the model with "
            "transformers, whose save_pretrained writes safetensors."
        )
    if not index.is_file():
        return {single: []}
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index}: the key 'weight_map' is missing; copy or fetch it again.")
    files: dict[Path, list[str]] = {}
    for name, file in weight_map.items():
        if Path(file).name != file or not (path / file).is_file():
            raise ValueError(f"{index}: it names the file {file!r}, which is not in {path}.")
        files.setdefault(path / file, []).append(name)
    return files


def export(model: Decoder, source: Source, target: Path, dtype: str, shard_bytes: int) -> Path:
    """Writes a model as a directory that transformers and vLLM load.

    `dtype` is a dtype's name, or "source": each tensor as the source stores it. A tied head is left
    out, as transformers leaves it. Every process has to call it; the first one writes.
    """

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for path, leaf in jax.tree_util.tree_leaves_with_path(model):
            stacked = is_stacked(leaf_name(path))
            for i, name in enumerate(tensor_names(leaf_name(path), model.config.layers)):
                yield name, to_host(leaf[i] if stacked else leaf)

    if jax.process_index():
        for _ in tensors():  # takes part in gathering each tensor
            pass
        return target
    return _write(tensors(), source, target, dtype, shard_bytes)


def write_directory(source: Source, target: Path, dtype: str, shard_bytes: int) -> Path:
    """Writes a source as a Hugging Face directory, no more than a shard of it in memory."""
    tensors = ((name, read_whole(source, name)) for name in source.tensors)
    return _write(tensors, source, target, dtype, shard_bytes)


def _write(tensors, source: Source, target: Path, dtype: str, shard_bytes: int) -> Path:
    """Writes a directory tensor by tensor; it appears only when it is whole."""
    with whole_directory(target, replace=True) as directory:
        names_in: list[list[str]] = []
        total = 0
        stored = ((name, as_stored(source, name, array, dtype)) for name, array in tensors)
        for shard in _shards(stored, shard_bytes):
            _save(shard, directory / f"part-{len(names_in)}")
            names_in.append(list(shard))
            total += sum(array.nbytes for array in shard.values())
            del shard  # else it stays while the next one is gathered
        _name_shards(directory, names_in, total)
        write_companions(source, directory, dtype)
    return target


def stored_dtype(source: Source, name: str, dtype: str) -> np.dtype:
    """The dtype in which a tensor is written: the named one, or for "source" its own."""
    if dtype == "source":
        return source.tensors[name].dtype
    return dtype_named(dtype)


def dtype_named(name: str) -> np.dtype:
    return {kind.name: kind for kind in DTYPES.values()}[name]


def as_stored(source: Source, name: str, array: np.ndarray, dtype: str) -> np.ndarray:
    """A tensor in the dtype in which it is written; refuses to overflow."""
    kind = stored_dtype(source, name, dtype)
    if array.dtype == kind:
        return array
    with np.errstate(over="ignore"):
        cast = array.astype(kind)
    if np.isinf(cast).any() and np.isfinite(array).all():
        raise ValueError(
            f"{source.path}: {name} has values up to {float(np.abs(array).max()):g}, more than "
            f"{kind.name} can hold; write it as bfloat16 or float32."
        )
    return cast


def _shards(
    tensors: Iterable[tuple[str, np.ndarray]], shard_bytes: int
) -> Iterator[dict[str, np.ndarray]]:
    """Tensors gathered to at most `shard_bytes`, or a larger one alone."""
    shard: dict[str, np.ndarray] = {}
    size = 0
    for name, array in tensors:
        if shard and size + array.nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = array
        size += array.nbytes
    yield shard


def _save(tensors: dict[str, np.ndarray], file: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    # save_file writes an array's buffer as it lies.
    whole = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    try:
        save_file(whole, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise ValueError(
            f"{file}: the file could not be written ({error}); see to the disk."
        ) from None


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


def save_companions(source: Source, target: Path) -> Path:
    """Keeps config.json and the tokenizer files of a source in a directory of their own.

    A target that is there stays. A run keeps them beside its checkpoints, which hold arrays alone.
    """
    if not (target / "config.json").is_file():
        with whole_directory(target) as directory:
            write_companions(source, directory, "source")
    return target


def write_companions(source: Source, directory: Path, dtype: str) -> None:
    """Writes what lies beside the weights; config.json names `dtype` unless it is "source"."""
    config = source.config if dtype == "source" else with_dtype(source.config, dtype)
    text = json.dumps(config, indent=2) + "\n"
    (directory / "config.json").write_text(text, encoding="utf-8")
    for name in COMPANIONS:
        file = source.tokenizer_dir / name
        if file.is_file():
            (directory / name).write_bytes(file.read_bytes())


def with_dtype(config: dict, dtype: str) -> dict:
    """A config.json that says what dtype the weights have, under the key it has for that."""
    keys = [key for key in ("torch_dtype", "dtype") if key in config] or ["dtype"]
    return config | dict.fromkeys(keys, dtype)
