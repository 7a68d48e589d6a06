"""Writing a model in Orbax's format, in a stream, which plain Orbax restores.

Arrays are not compressed, so any rows of a chunk lie at a place that is known in its file. A chunk
is an eighth of a layer's tensor, so that several processes read their parts and nothing twice.
"""

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from alignjax.models.families import tensor_names
from alignjax.models.shapes import is_stacked, leaf_shapes
from alignjax.processes import is_first
from alignjax.weights.orbax import array_spec, chunk_name
from alignjax.weights.safetensors import WRITTEN, part, stored_dtype, write_companions
from alignjax.weights.source import SLAB, Source, ahead, decoder_config
from alignjax.weights.tensorfile import write_file
from alignjax.weights.together import at_once, share, shared_directory

_CHUNKS = 8  # of a tensor
_SMALLEST, _LARGEST = 1 << 22, 1 << 25  # bytes of a chunk, unless a tensor or a row says otherwise


class Target(NamedTuple):
    """An array to be written."""

    names: list[str]  # tensors of which it is made
    shape: tuple[int, ...]
    dtype: np.dtype
    rows: int  # of a tensor that make one chunk


def write_model(source: Source, target: Path, dtype: str) -> Path:
    """Writes a source as a model directory; of its tensors a few slabs are in memory.

    Plain Orbax restores `weights/`. Layers of one leaf that differ in dtype are stacked as float32,
    and their own dtypes are noted in the checkpoint's metadata. While one slab is written the next
    one is read; several processes share the slabs out.
    """
    targets = targets_of(source, dtype)
    with shared_directory(target, WRITTEN) as directory:
        weights = (directory / "weights").absolute()
        write_metadata(weights, source, targets, dtype)
        at_once(lambda: create_arrays(weights, targets) if is_first() else None)
        at_once(lambda: _write_arrays(source, weights, targets, dtype))
        if is_first():
            write_companions(source, directory, dtype)
    return target


def targets_of(source: Source, dtype: str) -> dict[str, Target]:
    config = decoder_config(source)
    targets = {}
    for leaf, shape in leaf_shapes(config).items():
        names = tensor_names(leaf, config.layers)
        kinds = {stored_dtype(source, name, dtype) for name in names}
        kind = kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)
        rows = _chunk_rows(shape[is_stacked(leaf) :], kind.itemsize)
        targets[leaf] = Target(names, shape, kind, rows)
    return targets


def _chunk_rows(shape: tuple[int, ...], itemsize: int) -> int:
    """Rows of a tensor in one chunk: an eighth, of 4 MiB at least and 32 MiB at most."""
    row = math.prod(shape[1:]) * itemsize
    rows = max(-(-shape[0] // _CHUNKS), -(-_SMALLEST // row))
    return min(rows, max(_LARGEST // row, 1), shape[0])


def write_metadata(path: Path, source: Source, targets: dict[str, Target], dtype: str) -> None:
    """Lets Orbax write a checkpoint of these leaves, each of a single number for now.

    Every process has to call it.
    """
    import orbax.checkpoint as ocp

    own_dtypes = {
        name: stored_dtype(source, name, dtype).name
        for one in targets.values()
        for name in one.names
        if stored_dtype(source, name, dtype) != one.dtype
    }
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)  # a file a chunk: any process writes it
    with ocp.Checkpointer(handler) as checkpointer:
        args = ocp.args.PyTreeSave({leaf: np.zeros(1, np.float32) for leaf in targets})
        checkpointer.save(path, args=args, custom_metadata={"dtypes": own_dtypes})


def create_arrays(path: Path, targets: dict[str, Target]) -> None:
    """Puts arrays of their true shape, without a chunk yet, in place of those that Orbax wrote."""
    import tensorstore as ts

    for leaf, one in targets.items():
        stacked = (1,) if is_stacked(leaf) else ()
        chunks = (*stacked, one.rows, *one.shape[len(stacked) + 1 :])
        ts.open(
            array_spec(path, leaf, ocdbt=False, zarr3=False, strict=True),
            create=True,
            delete_existing=True,
            dtype=ts.dtype(one.dtype),
            shape=one.shape,
            chunk_layout=ts.ChunkLayout(chunk_shape=chunks, inner_order=range(len(chunks))),
            codec=ts.CodecSpec({"driver": "zarr", "compressor": None}),
        ).result()


def _write_arrays(source: Source, path: Path, targets: dict[str, Target], dtype: str) -> None:
    """Writes the chunks that fall to this process, while the slab after them is read.

    A chunk of zarr that is not compressed is a file of its rows as they lie. tensorstore would take
    six times as long to write it as `write_file` does, since it writes all of it at once.
    """
    slabs = share(list(_slabs(targets)))

    def read(leaf: str, layer: int, index: tuple[slice, ...]) -> np.ndarray:
        found = part(source, targets[leaf].names[layer], index, dtype)
        return found.astype(targets[leaf].dtype, copy=False)

    work = (partial(read, *slab) for slab in slabs)
    for (leaf, layer, index), content in zip(slabs, ahead(work), strict=True):
        rows, stacked = targets[leaf].rows, (layer,) if is_stacked(leaf) else ()
        for start in range(0, len(content), rows):
            chunk = content[start : start + rows]
            number = (index[0].start + start) // rows
            name = chunk_name((*stacked, number), len(targets[leaf].shape))
            missing = np.zeros((rows - len(chunk), *chunk.shape[1:]), chunk.dtype)
            write_file(path / leaf / name, [chunk, missing])  # the last chunk is as long as others


def _slabs(targets: dict[str, Target]) -> Iterator[tuple[str, int, tuple[slice, ...]]]:
    """Leaf, layer and rows of what is read and written at once: whole chunks."""
    for leaf, one in targets.items():
        shape = one.shape[is_stacked(leaf) :]
        chunk = one.rows * math.prod(shape[1:]) * one.dtype.itemsize
        step = one.rows * max(SLAB // chunk, 1)
        for layer in range(len(one.names)):
            for start in range(0, shape[0], step):
                rest = (slice(None),) * (len(shape) - 1)
                yield leaf, layer, (slice(start, min(start + step, shape[0])), *rest)
