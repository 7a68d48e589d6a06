"""Models in Orbax's format, in and out: a model directory of ours, or a training run.

A model directory holds config.json, the tokenizer's files and `weights/`, an Orbax checkpoint of a
flat dict: our leaf -> array, those of blocks stacked over layers. A run holds `model/`, which is
the same without the weights, and `checkpoints/N`, whose item `state` names its leaves
"model.embed", "optimizer..." and "step", and "ema.embed" where the run keeps an average of the
weights. The average is then what is read, as it is what the run exports.
"""

import math
import os
import re
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from alignjax import validate
from alignjax.errors import UserError
from alignjax.files import is_remote, read_json
from alignjax.models.families import TENSORS, from_hf, tensor_names
from alignjax.models.shapes import is_stacked, true_shape
from alignjax.weights.card import model_card, read_settings
from alignjax.weights.safetensors import (
    dtype_named,
    has_weights,
    read_config,
    with_dtype,
)
from alignjax.weights.source import Source, Stored, decoder_config
from alignjax.weights.tensorfile import DTYPES, read_bytes

_COMMIT = "_CHECKPOINT_METADATA"  # Orbax's note that a checkpoint is whole
_NUMBER = re.compile("[0-9]+")  # of a step
_AVERAGE = "ema."  # before the leaves of a run's average
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
    named = _NUMBER.fullmatch(path.name) and path.parent.name == "checkpoints"
    return (path / "state").is_dir() or bool(named)


def open_orbax(path: Path, weights: bool = True) -> Source:
    """A model directory, a run (its latest checkpoint) or one checkpoint of it as a `Source`.

    Only slices of the model's own leaves are read; whole rows of a run's are checked by the sums
    saved with them. Raises UserError, naming the file, where something is missing, damaged or half
    written.
    """
    place = _place(path)
    config = read_config(place.beside)
    own_dtypes = _read_commit(place.checkpoint)
    model = from_hf(config, str(path))
    tensors, where = {}, {}
    arrays = _open_arrays(place)
    sums = _saved_sums(place) if place.prefix and weights else {}
    for leaf, array in arrays.items():
        dtype = array.dtype.numpy_dtype
        if dtype not in DTYPES.values():
            known = ", ".join(kind.name for kind in DTYPES.values())
            raise UserError(f"{place.arrays}: {leaf} has dtype {dtype.name}; supported: {known}.")
        shape, stacked = array.shape, is_stacked(leaf)
        if stacked and shape[0] != model.layers:
            raise UserError(
                f"{place.arrays}: {leaf} has shape {tuple(shape)}, but the config says "
                f"{model.layers} layers."
            )
        if place.prefix and shape[0] > true_shape(model, leaf, shape)[0]:
            shape = true_shape(model, leaf, shape)  # without the rows that pad the vocabulary
        plain = _plain(array, stacked)
        for layer, name in enumerate(tensor_names(leaf, model.layers)):
            where[name] = array, ((layer,) if stacked else ()), plain, sums.get(leaf)
            own = dtype_named(own_dtypes[name]) if name in own_dtypes else dtype
            tensors[name] = Stored(tuple(shape[stacked:]), own, place.arrays)

    def read(name: str, index: tuple[slice, ...]) -> np.ndarray:
        array, layer, plain, saved = where[name]
        shape, dtype, _ = tensors[name]
        inside = tuple(slice(*i.indices(n)) for i, n in zip(index, shape, strict=True))
        try:
            if plain:
                found = _read_plain(plain, layer, inside)
            else:
                found = array[(*layer, *inside)].read().result()
            if saved is not None and found.shape[-1] == array.shape[-1]:  # rows are whole
                wanted = saved[(*layer, *inside[:-1])]
                if not np.array_equal(row_sums(found).ravel(), wanted.ravel()):
                    raise ValueError("it is not as it was saved")
        except (ValueError, OSError) as error:
            raise UserError(_damaged(place.arrays, name, error)) from None
        own = found.astype(dtype, copy=False)
        if own is not found and not np.array_equal(own.astype(found.dtype), found, equal_nan=True):
            raise UserError(
                f"{place.checkpoint}: {name} is not of {dtype.name}, as {_COMMIT} has it; copy the "
                "checkpoint again."
            )
        return own

    if place.prefix:  # a run trains in float32, whatever the config of its first weights says
        config = with_dtype(config, next(iter(tensors.values())).dtype.name)
    return Source(place.checkpoint if place.prefix else path, config, tensors, read, place.beside)


def row_sums(array: np.ndarray) -> np.ndarray:
    """Return a sum modulo 2^32 of each row's bits, in which an element is weighed by its place.

    A checkpoint of a run holds those that were saved, uint32, so that any rows of it can be checked
    as they are read. Sums of integers do not depend on their order, or how a row was cut.
    """
    bits = array.view(f"uint{8 * array.dtype.itemsize}").astype(np.uint32, copy=False)
    odd = 2 * np.arange(array.shape[-1], dtype=np.uint32) + np.uint32(1)
    return np.einsum("...i,i->...", bits, odd)


def _saved_sums(place: _Place) -> dict[str, np.ndarray]:
    """Leaf -> the sums of its rows that a run's checkpoint holds."""
    held = place._replace(arrays=place.checkpoint / "sums")
    sums = {}
    for leaf, (name, spec) in _specs(held).items():
        array = _open_array(held, name, spec, None)
        try:
            sums[leaf] = array.read().result()
        except (ValueError, OSError) as error:
            raise UserError(_damaged(held.arrays, name, error)) from None
    return sums


class _Plain(NamedTuple):
    """An array whose chunks are files of whole rows of one tensor, as they lie in memory."""

    directory: Path
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    dtype: np.dtype


def _plain(array, stacked: bool) -> _Plain | None:
    """An array as `write_model` writes it; None where it is stored in another way."""
    spec = array.spec().to_json()
    if spec["driver"] != "zarr" or spec["kvstore"]["driver"] != "file":
        return None
    about, one = spec["metadata"], ((1,) if stacked else ())
    chunk, first = tuple(about["chunks"]), len(one) + 1  # of the dimensions that are not cut
    as_written = {"compressor": None, "filters": None, "order": "C", "dimension_separator": "."}
    if (
        any(about[key] != value for key, value in as_written.items())
        or about["dtype"].startswith(">")
        or (chunk[: len(one)], chunk[first:]) != (one, array.shape[first:])
    ):
        return None
    where = Path(spec["kvstore"]["path"])
    return _Plain(where, tuple(array.shape), chunk, array.dtype.numpy_dtype)


def _read_plain(plain: _Plain, layer: tuple[int, ...], index: tuple[slice, ...]) -> np.ndarray:
    """A part of a tensor, of which no other rows are read."""
    rows, rest = plain.chunk[len(layer)], plain.shape[len(layer) + 1 :]
    first, last = index[0].start, max(index[0].stop, index[0].start)
    content = np.empty((last - first, *rest), plain.dtype)
    width = math.prod(rest) * plain.dtype.itemsize
    for number in range(first // rows, -(-last // rows)):
        begin, end = max(first, number * rows), min(last, (number + 1) * rows)
        file = plain.directory / chunk_name((*layer, number), len(plain.shape))
        space = content[begin - first : end - first].reshape(-1).view(np.uint8)
        if not file.is_file():
            raise UserError(f"{file.name} is missing")
        if read_bytes(file, (begin - number * rows) * width, space) < len(space):
            raise UserError(f"{file.name} is too short")
    return content[(slice(None), *index[1:])]


def chunk_name(numbers: tuple[int, ...], dimensions: int) -> str:
    """The file of a chunk, of which there is one alone in the last dimensions."""
    return ".".join(map(str, (*numbers, *(0,) * (dimensions - len(numbers)))))


def run_card(source: Source) -> dict[str, str]:
    """README.md of a model that a run has trained, as file name -> text; else nothing."""
    run = source.tokenizer_dir.parent
    if source.path.parent.name != "checkpoints" or not (run / "config.json").is_file():
        return {}
    return {"README.md": model_card(read_settings(run), decoder_config(source).scored)}


def _place(path: Path) -> _Place:
    if _is_step(path):
        return _run_place(path)
    if not _is_run(path):
        return _Place(path / "weights", path / "weights", "", path)
    steps = path / "checkpoints"
    there = steps.iterdir() if steps.is_dir() else ()
    numbers = [int(step.name) for step in there if _NUMBER.fullmatch(step.name)]
    if not numbers:
        raise UserError(f"{path}: the run has no checkpoint yet; wait until it has saved one.")
    return _run_place(steps / str(max(numbers)))


def _run_place(step: Path) -> _Place:
    place = step if is_remote(step) else Path(os.path.abspath(step))
    beside = place.parent.parent / "model"
    if not (beside / "config.json").is_file():
        raise UserError(
            f"{step}: there is no {beside}/config.json, which says what model this is; copy the "
            "config.json and tokenizer files of the model that the run started from there."
        )
    return _Place(step, step / "state", "model.", beside)


def _read_commit(checkpoint: Path) -> dict[str, str]:
    """Refuses a checkpoint that Orbax did not finish; gives the dtypes noted by `write_model`."""
    try:
        found = read_json(checkpoint / _COMMIT)
        whole = bool(found["commit_timestamp_nsecs"])
    except (ValueError, KeyError):
        whole = False
    if not whole:
        raise UserError(
            f"{checkpoint}: the checkpoint is not whole ({_COMMIT} is missing or half written); "
            "delete it, or name another one."
        )
    noted, where = found.get("custom_metadata") or {}, f"{checkpoint}/{_COMMIT}"
    validate.check(noted, dict, where, "custom_metadata")
    dtypes = noted.get("dtypes", {})
    kinds = dict[str, Literal["float32", "float16", "bfloat16"]]
    validate.check(dtypes, kinds, where, "custom_metadata.dtypes")
    return dtypes


def _specs(place: _Place) -> dict[str, tuple[str, dict]]:
    """Each leaf of the model's result: its name in a checkpoint, and how tensorstore opens it."""
    try:
        found = read_json(place.arrays / "_METADATA")
        held = {
            ".".join(str(key["key"]) for key in entry["key_metadata"])
            for entry in found["tree_metadata"].values()
        }
        layout = found["use_ocdbt"], found["use_zarr3"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(_damaged(place.arrays, "_METADATA", error)) from None
    averaged = place.prefix and any(name.startswith(_AVERAGE) for name in held)
    prefix = _AVERAGE if averaged else place.prefix
    names = {leaf: prefix + leaf for leaf in TENSORS if prefix + leaf in held}
    if not names:
        raise UserError(
            f"{place.arrays}: it holds none of a model's arrays, such as {prefix}embed."
        )
    # A chunk that is gone would read as zeros; Orbax may leave chunks out only if it says so.
    strict = bool(found.get("store_array_data_equal_to_fill_value"))
    return {
        leaf: (name, array_spec(place.arrays, name, *layout, strict))
        for leaf, name in names.items()
    }


def array_spec(directory: Path, name: str, ocdbt: bool, zarr3: bool, strict: bool) -> dict:
    """How tensorstore opens an array; `strict` where a chunk that is gone is an error."""

    def place(path: Path) -> str | dict:
        # Not file://PATH, which a space or % in a path would spoil.
        text = f"{os.fspath(path)}/"
        return text if is_remote(path) else {"driver": "file", "path": text}

    directory = directory.resolve()  # tensorstore takes no `..`
    store = {"driver": "ocdbt", "base": place(directory), "path": f"{name}/"}
    return {
        "driver": "zarr3" if zarr3 else "zarr",
        "kvstore": store if ocdbt else place(directory / name),
        "fill_missing_data_reads": not strict,
    }


def _open_arrays(place: _Place) -> dict:
    """Leaf -> tensorstore array; all of them keep the chunks that they read last.

    A chunk is decoded for any part of it: without a cache, again for each. The cache has room for
    those of one array in which a row lies; or where others than a run of ours put several layers
    into a chunk, for those in which a layer does.
    """
    import tensorstore as ts

    specs = _specs(place)
    cached = 0
    for name, spec in specs.values():
        array = _open_array(place, name, spec, ts.Context())
        chunk = array.chunk_layout.read_chunk.shape
        first = 1 if len(chunk) == 3 and chunk[0] > 1 else len(chunk) - 1  # held from end to end
        rest = zip(array.shape[first:], chunk[first:], strict=True)
        chunk = (*chunk[:first], *(-(-n // c) * c for n, c in rest))
        cached = max(cached, math.prod(chunk) * array.dtype.numpy_dtype.itemsize)
    context = ts.Context({"cache_pool": {"total_bytes_limit": cached + _SPARE_CACHE}})
    return {leaf: _open_array(place, *found, context) for leaf, found in specs.items()}


def _open_array(place: _Place, name: str, spec: dict, context):
    import tensorstore as ts

    try:
        array = ts.open(spec, open=True, read=True, context=context).result()
        if not array.shape:
            raise ValueError("it has no dimensions")
    except ValueError as error:
        raise UserError(_damaged(place.arrays, name, error)) from None
    return array


def _damaged(directory: Path, name: str, error: Exception) -> str:
    return f"{directory}: {name} cannot be read ({reason(error)}); copy the checkpoint again."


def reason(error: Exception) -> str:
    """What tensorstore says, for the middle of a sentence: without its specs and source lines."""
    said = re.split(r" \[[\w ]+='", str(error))[0]
    return " ".join(said.split())[:300].rstrip(".")
