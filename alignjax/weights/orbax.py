"""Models in Orbax's format, in and out: a model directory of ours, or a training run.

A model directory holds config.json, the tokenizer's files and `weights/`, an Orbax checkpoint of a
flat dict: our leaf -> array, those of blocks stacked over layers. A run holds `model/`, which is
the same without the weights, and `checkpoints/N`, whose item `state` names its leaves
"model.embed", "optimizer..." and "step".
"""

import json
import math
import os
import re
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from alignjax.files import is_remote, whole_directory
from alignjax.models.families import TENSORS, tensor_names
from alignjax.weights.safetensors import (
    DTYPES,
    as_stored,
    dtype_named,
    has_weights,
    read_config,
    stored_dtype,
    with_dtype,
    write_companions,
)
from alignjax.weights.source import (
    Source,
    Stored,
    decoder_config,
    is_stacked,
    leaf_shapes,
    read_whole,
)

_COMMIT = "_CHECKPOINT_METADATA"  # Orbax's note that a checkpoint is whole
_SPARE_CACHE = 1 << 24  # bytes that a cache needs beyond the chunks it holds


class _Place(NamedTuple):
    """Where the parts of a model lie."""

    checkpoint: Path  # what Orbax committed as one
    arrays: Path
    prefix: str  # of the model's leaves among the arrays
    beside: Path  # config.json and tokenizer files


def is_orbax(path: Path) -> bool:
    """Whether a directory is a model directory, a run, or a checkpoint of one."""
    if has_weights(path):
        return False
    return (path / "weights").is_dir() or _is_run(path) or _is_step(path)


def _is_run(path: Path) -> bool:
    return (path / "checkpoints").is_dir() or (path / "model" / "config.json").is_file()


def _is_step(path: Path) -> bool:
    return (path / "state").is_dir() or (path.name.isdigit() and path.parent.name == "checkpoints")


def open_orbax(path: Path) -> Source:
    """A model directory, a run (its latest checkpoint) or one checkpoint of it as a `Source`.

    Only slices of the model's own leaves are read. Raises ValueError, naming the file, where
    something is missing, damaged or half written.
    """
    place = _place(path)
    config = read_config(place.beside)
    own_dtypes = _read_commit(place.checkpoint)
    arrays = {
        leaf: _open_array(place.arrays, place.prefix + leaf, spec)
        for leaf, spec in _specs(place).items()
    }
    tensors, where = {}, {}
    for leaf, array in arrays.items():
        dtype = array.dtype.numpy_dtype
        if dtype not in DTYPES.values():
            known = ", ".join(kind.name for kind in DTYPES.values())
            raise ValueError(f"{place.arrays}: {leaf} has dtype {dtype.name}; supported: {known}.")
        names = tensor_names(leaf, array.shape[0] if is_stacked(leaf) else 1)
        for layer, name in enumerate(names):
            where[name] = (array, (layer,) if is_stacked(leaf) else ())
            shape = array.shape[1:] if is_stacked(leaf) else array.shape
            own = dtype_named(own_dtypes[name]) if name in own_dtypes else dtype
            tensors[name] = Stored(tuple(shape), own, place.arrays)

    def read(name: str, index: tuple[slice, ...]) -> np.ndarray:
        array, layer = where[name]
        try:
            part = array[(*layer, *index)].read().result()
        except ValueError as error:
            raise ValueError(_damaged(place.arrays, name, error)) from None
        return part.astype(tensors[name].dtype, copy=False)

    if place.prefix:  # a run trains in float32, whatever the config of its first weights says
        config = with_dtype(config, next(iter(tensors.values())).dtype.name)
    return Source(place.checkpoint if place.prefix else path, config, tensors, read, place.beside)


def _place(path: Path) -> _Place:
    if _is_step(path):
        return _run_place(path)
    if not _is_run(path):
        return _Place(path / "weights", path / "weights", "", path)
    steps = path / "checkpoints"
    there = steps.iterdir() if steps.is_dir() else ()
    numbers = [int(step.name) for step in there if step.name.isdigit()]
    if not numbers:
        raise ValueError(f"{path}: the run has no checkpoint yet; wait until it has saved one.")
    return _run_place(steps / str(max(numbers)))


def _run_place(step: Path) -> _Place:
    beside = step.absolute().parent.parent / "model"
    if not (beside / "config.json").is_file():
        raise ValueError(
            f"{step}: there is no {beside}/config.json, which says what model this is; copy the "
            "config.json and tokenizer files of the model that the run started from there."
        )
    return _Place(step, step / "state", "model.", beside)


def _read_commit(checkpoint: Path) -> dict[str, str]:
    """Refuses a checkpoint that Orbax did not finish; gives the dtypes noted by `write_model`."""
    try:
        found = json.loads((checkpoint / _COMMIT).read_text(encoding="utf-8"))
        whole = bool(found["commit_timestamp_nsecs"])
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise ValueError(
            f"{checkpoint}: the checkpoint is not whole ({_COMMIT} is missing or half written); "
            "delete it, or name another one."
        )
    return (found.get("custom_metadata") or {}).get("dtypes", {})


def _specs(place: _Place) -> dict[str, dict]:
    """How tensorstore opens each leaf of the model that a checkpoint holds."""
    try:
        found = json.loads((place.arrays / "_METADATA").read_text(encoding="utf-8"))
        held = {
            ".".join(str(key["key"]) for key in entry["key_metadata"])
            for entry in found["tree_metadata"].values()
        }
        layout = found["use_ocdbt"], found["use_zarr3"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(_damaged(place.arrays, "_METADATA", error)) from None
    names = {leaf: place.prefix + leaf for leaf in TENSORS if place.prefix + leaf in held}
    if not names:
        raise ValueError(
            f"{place.arrays}: it holds none of a model's arrays, such as {place.prefix}embed."
        )
    # A chunk that is gone would read as zeros; Orbax may leave chunks out only if it says so.
    strict = bool(found.get("store_array_data_equal_to_fill_value"))
    return {leaf: _spec(place.arrays, name, *layout, strict) for leaf, name in names.items()}


def _spec(directory: Path, name: str, ocdbt: bool, zarr3: bool, strict: bool) -> dict:
    def place(path: Path) -> str | dict:
        # Not file://PATH, which a space or % in a path would spoil.
        text = f"{os.fspath(path)}/"
        return text if is_remote(path) else {"driver": "file", "path": text}

    directory = directory.absolute()
    store = {"driver": "ocdbt", "base": place(directory), "path": f"{name}/"}
    return {
        "driver": "zarr3" if zarr3 else "zarr",
        "kvstore": store if ocdbt else place(directory / name),
        "fill_missing_data_reads": not strict,
    }


def _open_array(directory: Path, name: str, spec: dict):
    """A tensorstore array that keeps the chunks in which one layer lies.

    An array saved from few devices is one chunk of all layers, or few: without a cache each layer
    would decode it again.
    """
    import tensorstore as ts

    open_ = partial(ts.open, spec, open=True, read=True)
    try:
        array = open_().result()
        chunk = array.chunk_layout.read_chunk.shape
        if len(chunk) < 3 or chunk[0] == 1:
            return array
        size = chunk[0] * array.dtype.numpy_dtype.itemsize
        size *= math.prod(-(-n // c) * c for n, c in zip(array.shape[1:], chunk[1:], strict=True))
        pool = {"cache_pool": {"total_bytes_limit": size + _SPARE_CACHE}}
        return open_(context=ts.Context(pool)).result()
    except ValueError as error:
        raise ValueError(_damaged(directory, name, error)) from None


def _damaged(directory: Path, name: str, error: Exception) -> str:
    return f"{directory}: {name} cannot be read ({reason(error)}); copy the checkpoint again."


def reason(error: Exception) -> str:
    """What tensorstore says, for the middle of a sentence: without its specs and source lines."""
    said = re.split(r" \[[\w ]+='", str(error))[0]
    return " ".join(said.split())[:300].rstrip(".")


def write_model(source: Source, target: Path, dtype: str) -> Path:
    """Writes a source as a model directory, the whole model in host memory; all of it or nothing.

    Plain Orbax restores `weights/`. Layers of one leaf that differ in dtype are stacked as float32,
    and their own dtypes are noted in the checkpoint's metadata.
    """
    config = decoder_config(source)
    leaves, own_dtypes = {}, {}
    for leaf, shape in leaf_shapes(config).items():
        names = tensor_names(leaf, config.layers)
        kinds = {name: stored_dtype(source, name, dtype) for name in names}
        mixed = len(set(kinds.values())) > 1
        array = np.empty(shape, np.float32 if mixed else kinds[names[0]])
        for layer, name in enumerate(names):
            part = as_stored(source, name, read_whole(source, name), dtype)
            array[layer if is_stacked(leaf) else ...] = part
        leaves[leaf] = array
        if mixed:
            own_dtypes |= {name: kind.name for name, kind in kinds.items()}
    with whole_directory(target, replace=True) as directory:
        _save((directory / "weights").absolute(), leaves, {"dtypes": own_dtypes})
        write_companions(source, directory, dtype)
    return target


def _save(path: Path, leaves: dict[str, np.ndarray], metadata: dict) -> None:
    """Writes a checkpoint of arrays in host memory, without the copy that Orbax makes by default.

    A chunk of blocks is one layer, so that a layer is read alone.
    """
    import jax
    import orbax.checkpoint as ocp

    handlers = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)),
        (jax.Array, ocp.type_handlers.ArrayHandler()),
    )
    save_args = {leaf: ocp.SaveArgs(shard_axes=(0,) if is_stacked(leaf) else ()) for leaf in leaves}
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=handlers)
    with ocp.Checkpointer(handler) as checkpointer:
        args = ocp.args.PyTreeSave(leaves, save_args)
        checkpointer.save(path, args=args, custom_metadata=metadata)
