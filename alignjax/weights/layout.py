"""Where each row of a model lies in the files of its directory, so that any process writes any row.

A part is a few rows of one tensor, which lie in one piece of one file. Nothing is compressed.
"""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from alignjax.models.shapes import is_stacked
from alignjax.processes import is_first
from alignjax.weights.disk import Writer, through
from alignjax.weights.orbax import chunk_name
from alignjax.weights.orbax_write import Target, create_arrays, targets_of, write_metadata
from alignjax.weights.safetensors import files_of, header_for, stored_dtype, write_beside
from alignjax.weights.source import Source, row_blocks
from alignjax.weights.tensorfile import unwritten


class Part(NamedTuple):
    name: str  # of the tensor
    index: tuple[slice, ...]  # whole rows of it
    kind: np.dtype
    file: str  # within the directory
    start: int  # byte of the file
    size: int  # bytes


@dataclass(frozen=True)
class Layout:
    """A directory: its files' sizes and first bytes, the parts that fill them, and the rest."""

    sizes: dict[str, int]
    heads: dict[str, bytes]  # of files that begin with something else than a part
    parts: list[Part]
    begin: Callable[[Path], None]  # makes what has to be there before; on every process
    end: Callable[[Path, dict[str, str]], None]  # writes what lies beside them, and these files


def hugging_face(source: Source, dtype: str, shard_bytes: int, most: int) -> Layout:
    """A directory of safetensors files with a source's tensors, in parts of `most` bytes."""
    files = files_of(source, dtype, shard_bytes)
    sizes, heads, parts = {}, {}, []
    for file, names in files.items():
        heads[file] = header_for(source, names, dtype)
        at = len(heads[file])
        for name in names:
            shape, kind = source.tensors[name].shape, stored_dtype(source, name, dtype)
            for index in row_blocks(shape, kind.itemsize, most):
                parts.append(_part(name, index, shape, kind, file, at))
                at += parts[-1].size
        sizes[file] = at

    def end(directory: Path, more: dict[str, str]) -> None:
        write_beside(source, directory, files, dtype, more)

    return Layout(sizes, heads, parts, lambda directory: None, end)


def orbax(source: Source, dtype: str, most: int) -> Layout:
    """A model directory of ours, whose `weights/` plain Orbax restores."""
    targets = targets_of(source, dtype)
    sizes, parts = {}, []
    for leaf, target in targets.items():
        parts += _chunked(leaf, target, sizes, most)

    def begin(directory: Path) -> None:
        weights = (directory / "weights").absolute()
        write_metadata(weights, source, targets, dtype)
        if is_first():
            create_arrays(weights, targets)

    def end(directory: Path, more: dict[str, str]) -> None:
        write_beside(source, directory, {}, dtype, more)

    return Layout(sizes, {}, parts, begin, end)


def _chunked(leaf: str, target: Target, sizes: dict[str, int], most: int) -> Iterator[Part]:
    """The parts of a leaf's chunks, of which the last one is as long as the others."""
    shape = target.shape[is_stacked(leaf) :]
    row = math.prod(shape[1:]) * target.dtype.itemsize
    for layer, name in enumerate(target.names):
        for number in range(-(-shape[0] // target.rows)):
            place = (*((layer,) if is_stacked(leaf) else ()), number)
            file = f"weights/{leaf}/{chunk_name(place, len(target.shape))}"
            sizes[file] = target.rows * row
            first = number * target.rows
            rows = min(target.rows, shape[0] - first)
            for index in row_blocks((rows, *shape[1:]), target.dtype.itemsize, most):
                start, stop = index[0].start, index[0].stop
                inside = (slice(first + start, first + stop), *index[1:])
                yield _part(name, inside, shape, target.dtype, file, start * row)


def _part(name: str, index: tuple, shape: tuple, kind: np.dtype, file: str, start: int) -> Part:
    size = (index[0].stop - index[0].start) * math.prod(shape[1:]) * kind.itemsize
    return Part(name, index, kind, file, start, size)


def write_part(
    directory: Path, layout: Layout, part: Part, content: np.ndarray, writer: Writer
) -> None:
    """Puts a part's rows into its file, which gets its whole length, and its head, with them."""
    file = directory / part.file
    head = layout.heads.get(part.file, b"")
    try:
        opened = os.open(file, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            if os.fstat(opened).st_size != layout.sizes[part.file]:
                os.ftruncate(opened, layout.sizes[part.file])
            if part.start == len(head):
                through(opened, np.frombuffer(head, np.uint8), 0)
            flat = np.ascontiguousarray(content).reshape(-1).view(np.uint8)
            writer.write(file, opened, flat, part.start)
        finally:
            os.close(opened)
    except OSError as error:
        raise unwritten(file, error) from None
