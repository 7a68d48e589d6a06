"""Hugging Face model directories, in and out, without torch."""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import jax
import numpy as np

from alignjax.errors import UserError
from alignjax.files import location, read_json, whole_directory
from alignjax.models.families import Config, Generation, tensor_names
from alignjax.models.shapes import is_stacked
from alignjax.processes import is_first
from alignjax.progress import say
from alignjax.sharding import to_host
from alignjax.weights.source import Source, Stored, ahead, leaf_name, row_blocks
from alignjax.weights.tensorfile import (
    DTYPES,
    Held,
    header_of,
    read_header,
    read_tensor,
    write_file,
)
from alignjax.weights.together import at_once, share, shared_directory

if TYPE_CHECKING:
    from alignjax.models.decoder import Decoder  # flax is slow to import

# What travels from a model directory to an export beside the weights: all that transformers may
# make a tokenizer of, tokenizer.4.0.0.json and spiece.model among it, and how to generate.
COMPANIONS = (
    "tokenizer*.json",
    "tokenizer.model*",
    "*.model",
    "*tekken*.json",
    "*vocab*.json",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
)
# What is written into a model directory, of which an older one loses no other file.
WRITTEN = (*COMPANIONS, "config.json", "README.md", "model*.safetensors*", "weights")


# What torch.compile and data parallel training put into the names of the tensors they save.
_WRAPPED = re.compile(r"^module\.|_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.")


class _Index(TypedDict):
    weight_map: dict[str, str]


def companions_of(directory: Path) -> dict[str, Path]:
    """Return the files beside a model's weights that travel with it, by their names in it."""
    found = {file for pattern in COMPANIONS for file in directory.glob(pattern) if file.is_file()}
    return {file.relative_to(directory).as_posix(): file for file in sorted(found)}


def open_directory(path: Path | str) -> Source:
    """A directory with config.json and safetensors files as a `Source`.

    Raises UserError, naming the file, where something is missing, damaged or of another format.
    """
    path = location(path)
    config = read_config(path)
    found: dict[str, tuple[Path, Held]] = {}
    stored_as: dict[str, str] = {}
    for file in _files_with_weights(path):
        for stored, held in read_header(file).items():
            name = _WRAPPED.sub("", stored)
            if name in found:
                raise UserError(
                    f"{file}: it holds the tensor {name}, which {found[name][0].name} holds too; "
                    "copy or fetch the model again."
                )
            found[name], stored_as[name] = (file, held), stored
    wrapped = [stored for name, stored in stored_as.items() if name != stored]
    if wrapped:
        say(f"{path}: the model was wrapped when saved; {wrapped[0]} is read without the prefix.")
    tensors = {name: Stored(held.shape, held.dtype, file) for name, (file, held) in found.items()}

    def read(name: str, index: tuple[slice, ...]) -> np.ndarray:
        file, held = found[name]
        return read_tensor(file, stored_as[name], held, index)

    return Source(path, config, tensors, read, path)


def open_described(path: Path | str) -> Source:
    """A directory with config.json and a tokenizer as a `Source` of no tensors."""
    path = location(path)
    return Source(path, read_config(path), {}, _no_tensor, path)


def _no_tensor(name: str, index: tuple[slice, ...]) -> np.ndarray:
    raise AssertionError(f"{name}: the model was opened without its weights")


def read_config(directory: Path) -> dict:
    """The config.json of a model directory, whose generation_config.json is checked too."""
    file, generation = directory / "config.json", directory / "generation_config.json"
    if (directory / "adapter_config.json").is_file():
        raise UserError(
            f"{directory}: adapter_config.json makes this an adapter of another model; merge both "
            "(merge_and_unload and save_pretrained of peft) and name the result, or delete it "
            "if the weights here are merged."
        )
    if not file.is_file():
        raise UserError(f"{directory}: there is no config.json, so this is not a model directory.")
    if generation.is_file():
        read_json(generation, Generation)
    return read_json(file, Config)


def has_weights(path: Path) -> bool:
    """Whether a directory holds safetensors files that a model is read from."""
    names = ("model.safetensors.index.json", "model.safetensors")
    return any((path / name).is_file() for name in names)


def _files_with_weights(path: Path) -> list[Path]:
    """The files that transformers reads: model.safetensors, or else those that the index names."""
    index, single = path / "model.safetensors.index.json", path / "model.safetensors"
    if single.is_file():
        return [single]
    if not index.is_file():
        torch = min((file.name for file in path.glob("pytorch_model*")), default="")
        held = f" but {torch}, weights that only torch reads" if torch else ""
        raise UserError(
            f"{path}: there is no {single.name} and no {index.name}{held}; save the model with "
            "transformers, whose save_pretrained writes safetensors."
        )
    weight_map = read_json(index, _Index).get("weight_map")
    if not weight_map:
        raise UserError(f"{index}: the key 'weight_map' is missing; copy or fetch it again.")
    for name, file in weight_map.items():
        if Path(file).name != file or not (path / file).is_file():
            raise UserError(
                f"{index}: it names the file {file!r}, which is not in {path}, for {name}."
            )
    return [path / file for file in dict.fromkeys(weight_map.values())]


def export(
    model: "Decoder",
    source: Source,
    target: Path | str,
    dtype: str = "source",
    shard_bytes: int = 5_000_000_000,
    beside: dict[str, str] | None = None,
) -> Path:
    """Writes a model as a directory that transformers and vLLM load.

    `beside` gives more files, name -> text, such as README.md; they replace the source's own.
    `dtype` is a dtype's name, or "source": each tensor as the source stores it. A tied head is left
    out, as transformers leaves it. Every process has to call it; the first one writes.
    """
    target, place = location(target), {}
    for path, array in jax.tree_util.tree_leaves_with_path(model):
        leaf = leaf_name(path)
        for layer, name in enumerate(tensor_names(leaf, model.config.layers)):
            place[name] = array, (layer if is_stacked(leaf) else ...)
    source = replace(source, tensors={name: source.tensors[name] for name in place})
    files = files_of(source, dtype, shard_bytes)

    def whole(name: str) -> np.ndarray:
        array, layer = place[name]
        return to_host(array[layer])[: source.tensors[name].shape[0]]  # without padding

    if jax.process_index():
        for name in chain(*files.values()):  # takes part in gathering each tensor
            whole(name)
        return target
    with whole_directory(target, WRITTEN) as directory:
        for file, names in files.items():
            parts = (as_stored(source, name, whole(name), dtype) for name in names)
            write_file(directory / file, chain([header_for(source, names, dtype)], parts))
        write_beside(source, directory, files, dtype, beside)
    return target


def write_directory(
    source: Source, target: Path, dtype: str, shard_bytes: int, beside: dict[str, str] | None = None
) -> Path:
    """Writes a source as a Hugging Face directory; of its tensors a few slabs are in memory.

    While one slab is written the next one is read. Several processes share the files out.
    """
    files = files_of(source, dtype, shard_bytes)

    def parts(names: list[str]) -> Iterator[Callable[[], np.ndarray]]:
        for name in names:
            shape, kind, _ = source.tensors[name]
            for index in row_blocks(shape, kind.itemsize):
                yield partial(part, source, name, index, dtype)

    def write(directory: Path) -> None:
        for file in share(list(files)):
            header = header_for(source, files[file], dtype)
            write_file(directory / file, chain([header], ahead(parts(files[file]))))

    with shared_directory(target, WRITTEN) as directory:
        at_once(lambda: write(directory))
        if is_first():
            write_beside(source, directory, files, dtype, beside)
    return target


def part(source: Source, name: str, index: tuple, dtype: str) -> np.ndarray:
    """A part of a tensor in the dtype in which it is written."""
    return as_stored(source, name, source.read(name, index), dtype)


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
        raise UserError(
            f"{source.path}: {name} has values up to {float(np.abs(array).max()):g}, more than "
            f"{kind.name} can hold; write it as bfloat16 or float32."
        )
    return cast


def files_of(source: Source, dtype: str, shard_bytes: int) -> dict[str, list[str]]:
    """File -> tensors in it, together at most `shard_bytes`, or a larger one alone."""
    shards, size = [[]], 0
    for name in source.tensors:
        more = size_as(source, name, dtype)
        if shards[-1] and size + more > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += more
    for names in shards:  # wider dtypes first: each tensor begins at a multiple of its width
        names.sort(key=lambda name: -stored_dtype(source, name, dtype).itemsize)
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    ends = f"of-{len(shards):05d}.safetensors"
    return {f"model-{i + 1:05d}-{ends}": names for i, names in enumerate(shards)}


def size_as(source: Source, name: str, dtype: str) -> int:
    """Bytes of a tensor as it is written."""
    return math.prod(source.tensors[name].shape) * stored_dtype(source, name, dtype).itemsize


def header_for(source: Source, names: list[str], dtype: str) -> bytes:
    return header_of(
        {name: (source.tensors[name].shape, stored_dtype(source, name, dtype)) for name in names}
    )


def write_beside(
    source: Source, directory: Path, files: dict, dtype: str, beside: dict[str, str] | None
) -> None:
    """Writes what lies beside the tensors' files: index, config, tokenizer and more."""
    if len(files) > 1:
        weight_map = {name: file for file, names in files.items() for name in names}
        total = sum(size_as(source, name, dtype) for name in weight_map)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    write_companions(source, directory, dtype, beside)


def save_companions(source: Source, target: Path, beside: dict[str, str] | None = None) -> Path:
    """Keeps config.json and the tokenizer files of a source in a directory of their own.

    A run keeps them beside its checkpoints, which hold arrays alone.
    `beside` as in `write_companions`.
    """
    with whole_directory(target, WRITTEN) as directory:
        write_companions(source, directory, "source", beside)
    return target


def write_companions(
    source: Source, directory: Path, dtype: str, beside: dict[str, str] | None = None
) -> None:
    """Writes what lies beside the weights; config.json names `dtype` unless it is "source".

    `beside` gives more files, name -> text, which replace the source's own.
    """
    config = source.config if dtype == "source" else with_dtype(source.config, dtype)
    text = json.dumps(config, indent=2) + "\n"
    (directory / "config.json").write_text(text, encoding="utf-8")
    for name, file in companions_of(source.tokenizer_dir).items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(file.read_bytes())
    for name, text in (beside or {}).items():
        (directory / name).write_text(text, encoding="utf-8", errors="backslashreplace")


def with_dtype(config: dict, dtype: str) -> dict:
    """A config.json that says what dtype the weights have, under the key it has for that."""
    keys = [key for key in ("torch_dtype", "dtype") if key in config] or ["dtype"]
    return config | dict.fromkeys(keys, dtype)
