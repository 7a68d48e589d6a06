"""Where a model comes from: one view of Hugging Face directories, GGUF files and Orbax models."""

import hashlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypeVar

import jax
import numpy as np

from alignjax.errors import UserError
from alignjax.models.families import from_hf, tensor_names
from alignjax.models.shapes import DecoderConfig, is_stacked, leaf_shapes
from alignjax.processes import check_same, in_turn
from alignjax.weights.tensorfile import BUFFERS
from alignjax.weights.together import at_once, share

Result = TypeVar("Result")

SLAB = 1 << 23  # bytes of a tensor that a conversion reads or writes at a time


class Stored(NamedTuple):
    """What a checkpoint says of one tensor."""

    shape: tuple[int, ...]
    dtype: np.dtype
    file: Path  # or the directory of an Orbax checkpoint


@dataclass(frozen=True)
class Source:
    """A checkpoint on disk, in Hugging Face's terms.

    `read(name, index)` gives a slice of a tensor as a numpy array in its stored dtype.
    """

    path: Path
    config: dict  # config.json
    tensors: dict[str, Stored]  # by name, in an order that is quick to read
    read: Callable[[str, tuple[slice, ...]], np.ndarray]
    tokenizer_dir: Path  # tokenizer files, chat template and generation_config.json


def open_together(opened: Callable[[], Source]) -> Source:
    """Return what `opened` gives on every process, the first one first.

    Raises UserError, on all of them, where they open other files; of large ones samples are read.
    """
    source = in_turn(opened)
    if jax.process_count() > 1:
        check_same({f"the model {source.path.name}": at_once(lambda: _digest(source))})
    return source


def _digest(source: Source) -> str:
    digest = hashlib.sha256(repr(sorted(source.config.items())).encode())
    for i, (name, (shape, dtype, _)) in enumerate(source.tensors.items()):
        digest.update(f"{name} {shape} {dtype}".encode())
        if i % (len(source.tensors) // 32 + 1) == 0:
            middle = (slice(size // 2, size // 2 + 1) for size in shape[:-1])
            digest.update(source.read(name, (*middle, *[slice(1024)][: len(shape)])).tobytes())
    return digest.hexdigest()[:16]


def decoder_config(source: Source) -> DecoderConfig:
    return from_hf(source.config, str(source.path))


def leaf_name(path) -> str:
    """A leaf's place in a pytree as dotted words, "blocks.q"."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def row_blocks(shape: tuple[int, ...], itemsize: int, most: int = SLAB) -> list[tuple]:
    """Indices of the parts of a tensor, of whole rows and at most `most` bytes (or one row)."""
    if not shape:
        return [()]
    rest = (slice(None),) * (len(shape) - 1)
    step = rows_within(math.prod(shape[1:]) * itemsize, most)
    return [(slice(at, min(at + step, shape[0])), *rest) for at in range(0, shape[0], step)]


def rows_within(row: int, most: int) -> int:
    """How many rows of so many bytes are at most `most`; one at least."""
    return max(most // max(row, 1), 1)


def ahead(work: Iterable[Callable[[], Result]]) -> Iterator[Result]:
    """The results of `work` in order, each begun while the one before it is being used."""
    with ThreadPoolExecutor(1) as pool:
        waiting = deque()
        try:
            for one in work:
                waiting.append(pool.submit(one))
                if len(waiting) == 2:
                    yield waiting.popleft().result()
            if waiting:
                yield waiting.popleft().result()
        finally:
            for left in waiting:
                left.cancel()


def size_of(source: Source) -> int:
    """Bytes of all tensors."""
    return sum(math.prod(s.shape) * s.dtype.itemsize for s in source.tensors.values())


def watched(source: Source, update: Callable[[int, str], None]) -> Source:
    """The same source, which tells `update` what it has read: whole GB, and GB and GB/s as text."""
    done, started = 0, time.monotonic()

    def read(name: str, index: tuple[slice, ...]) -> np.ndarray:
        nonlocal done
        array = source.read(name, index)
        done += array.nbytes
        rate = done / 1e9 / max(time.monotonic() - started, 1e-3)
        update(int(done / 1e9), f"{done / 1e9:.2f} GB, {rate:.2f} GB/s")
        return array

    return replace(source, read=read)


def check_tensors(source: Source) -> None:
    """Raises UserError where a checkpoint does not hold the tensors that its config says."""
    config = decoder_config(source)
    known = {"lm_head.weight"} if config.tied_head else set()
    for leaf, shape in leaf_shapes(config).items():
        names = tensor_names(leaf, config.layers)
        for name in names:
            if name not in source.tensors:
                raise UserError(f"{source.path}: the tensor {name} is missing.")
            stored = source.tensors[name]
            wanted = shape[1:] if is_stacked(leaf) else shape
            if stored.shape != wanted:
                raise UserError(
                    f"{stored.file}: {name} has shape {stored.shape}, but the config says {wanted}."
                )
        known |= set(names)
    extra = {n for n in source.tensors if n not in known and not n.endswith(BUFFERS)}
    if extra:
        name = min(extra)
        raise UserError(
            f"{source.tensors[name].file}: the tensor {name} is not part of this model."
        )
    if config.tied_head and "lm_head.weight" in source.tensors:
        _check_tied(source)


def _check_tied(source: Source) -> None:
    """Refuses a stored head that a tied model would drop although it differs."""
    head, embed = "lm_head.weight", "model.embed_tokens.weight"
    shape = source.tensors[head].shape
    same_shape = shape == source.tensors[embed].shape

    def compare() -> None:
        for index in share(row_blocks(shape, 4)):
            if not (
                same_shape and np.array_equal(source.read(head, index), source.read(embed, index))
            ):
                raise UserError(
                    f"{source.path}: {head} differs from {embed}, but config.json ties them; set "
                    "tie_word_embeddings to false there."
                )

    at_once(compare)
