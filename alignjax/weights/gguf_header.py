"""A GGUF file's metadata and where its tensors lie, read within bounds whatever the file says.

The format: github.com/ggml-org/ggml/blob/master/docs/gguf.md. The reader of the package `gguf`
trusts every count, and takes memory for it.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from alignjax.errors import UserError

_LONGEST = 1 << 28  # bytes of a header; those of the largest vocabularies take a tenth
_STRING, _ARRAY = 8, 9
_NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?"}
_NUMBERS |= {10: "<u8", 11: "<i8", 12: "<f8"}


class Tensor(NamedTuple):
    shape: tuple[int, ...]
    kind: Any  # gguf.GGMLQuantizationType
    data: np.ndarray  # bytes, of which a row is a row of the tensor


def read_gguf(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """Metadata by key and tensors by name; raises UserError where the file is not whole."""
    try:
        return _read(np.memmap(path, np.uint8, mode="r"))
    except ValueError as error:
        raise UserError(
            f"{path}: this is not a whole GGUF file ({error}); copy or fetch it again."
        ) from None


def _read(content: np.ndarray) -> tuple[dict, dict[str, Tensor]]:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    header, at = memoryview(content[:_LONGEST]), 0

    def take(size: int) -> memoryview:
        nonlocal at
        if size > len(header) - at:
            raise ValueError("its header does not end")
        at += size
        return header[at - size : at]

    def count(size: int = 8) -> int:
        return int.from_bytes(take(size), "little")

    def text() -> str:
        return str(take(count()), "utf-8")

    def value(kind: int) -> Any:
        if kind == _STRING:
            return text()
        inner, length = (count(4), count()) if kind == _ARRAY else (kind, 1)
        if inner == _STRING:
            return [text() for _ in range(length)]
        if inner not in _NUMBERS:
            raise ValueError(f"a value of type {inner}")
        numbers = take(length * np.dtype(_NUMBERS[inner]).itemsize)
        found = np.frombuffer(numbers, _NUMBERS[inner]).tolist()
        return found if kind == _ARRAY else found[0]

    magic, version = bytes(take(4)), count(4)
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(f"it begins with {magic} and version {version}")
    tensors, keys, meta, places = count(), count(), {}, {}
    for _ in range(keys):
        key = text()
        if key in meta:
            raise ValueError(f"the key {key!r} is there twice")
        meta[key] = value(count(4))
    for _ in range(tensors):
        name, dimensions = text(), count(4)
        if name in places or not 1 <= dimensions <= 4:
            raise ValueError(f"{name} is there twice, or has {dimensions} dimensions")
        shape = tuple(reversed([count() for _ in range(dimensions)]))
        places[name] = shape, GGMLQuantizationType(count(4)), count()
    alignment = meta.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise ValueError(f"general.alignment={alignment!r}")
    start, found = -(-at // alignment) * alignment, {}
    for name, (shape, kind, offset) in places.items():
        block, width = GGML_QUANT_SIZES[kind]
        stored = *shape[:-1], shape[-1] // block * width
        begin, end = start + offset, start + offset + math.prod(stored)
        if shape[-1] % block or end > len(content):
            raise ValueError(f"it ends within {name}")
        found[name] = Tensor(shape, kind, content[begin:end].reshape(stored))
    return meta, found
