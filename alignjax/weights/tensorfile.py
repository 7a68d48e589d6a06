"""One safetensors file: what its header says, reading a part of a tensor, writing it in a stream.

The package `safetensors` checks a header. It has no way to write a file that does not fit into
memory; and of a tensor it reads all for a slice of it, or maps the file, pages and all.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from alignjax.errors import UserError

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# Buffers that older models hold beside their weights; a model is made without them.
BUFFERS = ("rotary_emb.inv_freq", ".position_ids", ".masked_bias", ".attn.bias")

# Bytes written at a time. For more, Linux looks for large free pages to keep them in: measured on
# 6.18 with ext4, writes of 8 MiB took eight times as long as those of 256 KiB.
WRITE = 1 << 18
_ALIGNED = 64  # bytes; NumPy's own arrays lie at multiples of 16


class Held(NamedTuple):
    """A tensor of a file."""

    shape: tuple[int, ...]
    dtype: np.dtype
    start: int  # place of its first byte


def read_header(file: Path) -> dict[str, Held]:
    """The tensors of a file in their order, without buffers of other dtypes.

    Raises UserError where the file is not as long as its header says, or has another dtype.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy"):
            pass  # it checks every number of the header, and reads nothing else
    except (SafetensorError, OSError) as error:
        cut = _ends_within(file)
        within = f"; it ends within {cut}" if cut else ""
        raise UserError(
            f"{file}: this is not a whole safetensors file ({error}{within}); copy or fetch it "
            "again."
        ) from None
    header, end = _parse(file)
    for name, entry in list(header.items()):
        if entry["dtype"] not in DTYPES and name.endswith(BUFFERS):
            del header[name]
        elif entry["dtype"] not in DTYPES:
            raise UserError(
                f"{file}: {name} has dtype {entry['dtype']}; supported: {', '.join(DTYPES)}."
            )
    in_order = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    return {
        name: Held(tuple(entry["shape"]), DTYPES[entry["dtype"]], end + entry["data_offsets"][0])
        for name, entry in in_order
    }


def _parse(file: Path) -> tuple[dict[str, dict], int]:
    """A file's header, and where it ends."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > file.stat().st_size:
            raise UserError("the header is longer than the file")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    return header, 8 + length


def _ends_within(file: Path) -> str:
    """The first tensor that lies, by a header that may be damaged, beyond the end; or nothing."""
    try:
        header, end = _parse(file)
        size = file.stat().st_size - end
        beyond = [(e["data_offsets"], n) for n, e in header.items() if e["data_offsets"][1] > size]
        return min(beyond)[1] if beyond else ""
    except Exception:  # whatever damage makes of a header
        return ""


def read_tensor(file: Path, name: str, held: Held, index: tuple[slice, ...]) -> np.ndarray:
    """A part of a tensor. Whole rows are read, and columns that are not asked for left out."""
    rows = held.shape[0] if held.shape else 1
    first, last, _ = index[0].indices(rows) if held.shape else (0, 1, 1)
    width = math.prod(held.shape[1:]) * held.dtype.itemsize
    content = aligned(max(last - first, 0) * width)
    try:
        whole = read_bytes(file, held.start + first * width, content) == len(content)
        why = "the file has become shorter"
    except OSError as error:
        whole, why = False, error.strerror
    if not whole:
        raise UserError(f"{file}: {name} cannot be read ({why}); copy or fetch it again.")
    array = content.view(held.dtype)
    if not held.shape:
        return array.reshape(())
    return array.reshape(-1, *held.shape[1:])[(slice(None), *index[1:])]


def aligned(size: int, to: int = _ALIGNED) -> np.ndarray:
    """Memory of so many bytes, not set, at an address from which XLA takes it without a copy."""
    room = np.empty(size + to, np.uint8)
    start = -room.ctypes.data % to
    return room[start : start + size]


def read_bytes(file: Path, start: int, content: np.ndarray) -> int:
    """Fills an array of bytes from a file; gives how many there were. All weights that lie in files
    as they are, not compressed, are read here."""
    done = 0
    with file.open("rb", buffering=0) as opened:
        opened.seek(start)
        while done < len(content):
            count = opened.readinto(content[done:])
            if not count:
                break
            done += count
    return done


def header_of(tensors: dict[str, tuple[tuple[int, ...], np.dtype]]) -> bytes:
    """How a file of these shapes and dtypes begins: the header's length, then JSON."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in tensors.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": codes[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_file(file: Path, parts: Iterable[np.ndarray | bytes]) -> None:
    """Writes a file from its parts: of safetensors the header, then tensors in its order."""
    try:
        opened = file.open("wb", buffering=0)
    except OSError as error:
        raise unwritten(file, error) from None
    with opened:
        for part in parts:
            # An array's buffer may lie in another order.
            array = np.frombuffer(part, np.uint8) if isinstance(part, bytes) else part
            content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            while len(content):
                try:
                    content = content[opened.write(content[:WRITE]) :]
                except OSError as error:
                    raise unwritten(file, error) from None


def unwritten(file: Path, error: OSError) -> UserError:
    """What to tell a user of a file that the disk does not take."""
    return UserError(f"{file}: the file could not be written ({error.strerror}); see to the disk.")
