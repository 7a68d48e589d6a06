"""One data file -> its rows as dicts, in a stream: JSON lines, JSON, Parquet, Arrow, each with .gz.

A row that cannot be read is passed on with a sentence in its place; a damaged file is an error.
"""

import codecs
import gzip
import json
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from alignjax.errors import UserError

KINDS = {
    ".jsonl": "JSON lines",
    ".ndjson": "JSON lines",
    ".json": "JSON",
    ".parquet": "Parquet",
    ".arrow": "Arrow",
    ".feather": "Arrow",
}
_SUFFIXES = f"{', '.join(KINDS)}, each also with .gz behind it"
_ROWS_AT_ONCE = 1000  # of Parquet and Arrow, as Python values


@dataclass(frozen=True)
class Place:
    """Where a row came from."""

    file: str
    number: int  # counted from 1
    unit: str  # "line" or "row"

    def __str__(self) -> str:
        return f"{self.file}, {self.unit} {self.number}"


class Record(NamedTuple):
    place: Place
    values: dict | None  # None where the row cannot be read
    problem: str  # "", or the whole sentence that says why


def kind(file: Path) -> str:
    """The format that a file's name says, one of `KINDS`, or "" for another suffix."""
    name = file.name.lower().removesuffix(".gz")
    return KINDS.get(Path(name).suffix, "")


def records(file: Path) -> Iterator[Record]:
    """The rows of a file in its order.

    Raises UserError where the file as a whole cannot be read: an unknown suffix, no rows, another
    format than its name says, or cut short.
    """
    form = kind(file)
    if not form:
        raise UserError(f"{file}: the suffix is none of {_SUFFIXES}; convert or rename the file.")
    read = {"JSON lines": _lines, "JSON": _json, "Parquet": _parquet, "Arrow": _arrow}[form]
    empty = True
    with _named(file):
        for record in read(file):
            empty = False
            yield record
    if empty:
        raise UserError(f"{file}: the file holds no rows.")


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """Turns what a reader says of a damaged file into one sentence that names the file."""
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{file}: this is no whole gzip file ({error}); get it again.") from None
    except OSError as error:
        raise UserError(f"{file}: it cannot be read ({first_line(error)}).") from None


def first_line(error: Exception) -> str:
    """What an exception says, fit for the middle of a sentence."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")


@contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    """A file's bytes, decompressed where its name ends in .gz; refuses what is not its content."""
    opener = gzip.open if file.name.lower().endswith(".gz") else open
    with opener(file, "rb") as opened:
        head = opened.peek(64)
        if head.startswith(b"version https://git-lfs"):
            raise UserError(
                f"{file}: this is a Git LFS pointer, not the data; run `git lfs pull` beside it."
            )
        if head.startswith(b"\x1f\x8b"):
            raise UserError(f"{file}: the content is gzip; rename the file to end in .gz.")
        yield opened


# JSON


def _lines(file: Path) -> Iterator[Record]:
    with _opened(file) as opened:
        _check_text(file, opened)
        yield from _json_lines(file, opened)


def _json(file: Path) -> Iterator[Record]:
    """A list of rows, or JSON lines under a .json name: the content tells."""
    with _opened(file) as opened:
        _check_text(file, opened)
        head = opened.peek(4096).removeprefix(codecs.BOM_UTF8).lstrip()
        yield from (_json_list if head.startswith(b"[") else _json_lines)(file, opened)


def _check_text(file: Path, opened: BinaryIO) -> None:
    head = opened.peek(4)[:4]
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in head:
        raise UserError(f"{file}: the text is UTF-16; save it as UTF-8.")
    for magic, suffix in ((b"PAR1", ".parquet"), (b"ARRO", ".arrow")):
        if head == magic:
            raise UserError(
                f"{file}: the content is {KINDS[suffix]}; rename the file to end in {suffix}."
            )


def _json_lines(file: Path, opened: BinaryIO) -> Iterator[Record]:
    first = True
    for number, line in enumerate(opened, 1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        line = line.rstrip()
        if not line:
            continue
        if first:
            _check_first_line(file, line)
            first = False
        values, _, problem = _parse(line)
        yield _record(Place(str(file), number, "line"), values, problem)


def _check_first_line(file: Path, line: bytes) -> None:
    """Refuses what would make every line a bad row."""
    if line.lstrip().startswith(b"["):
        raise UserError(f"{file}: the file is one JSON list; rename it to end in .json.")
    if line.strip() == b"{":
        raise UserError(
            f"{file}: a row goes over several lines; write a row a line, or one list of rows into "
            "a .json file."
        )


def _json_list(file: Path, opened: BinaryIO) -> Iterator[Record]:
    rows, line, problem = _parse(opened.read().removeprefix(codecs.BOM_UTF8))
    if problem:
        raise UserError(f"{file}, line {line}: {problem}.")
    for number, values in enumerate(rows, 1):
        yield _record(Place(str(file), number, "row"), values, "")


def _parse(text: bytes) -> tuple[object, int, str]:
    """JSON text's value; else None, the line at fault counted from 1, and what is wrong with it."""
    try:
        return json.loads(text.decode()), 0, ""
    except UnicodeDecodeError as error:
        before = text[: error.start]
        at = error.start - before.rfind(b"\n")
        byte = f"byte {at} of the line (0x{text[error.start]:02x})"
        return None, before.count(b"\n") + 1, f"{byte} is not UTF-8; save the file as UTF-8"
    except json.JSONDecodeError as error:
        problem = f"this is not JSON ({error.msg.rstrip(':')} at column {error.colno})"
        return None, error.lineno, problem
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits; a thousand brackets
        return None, 1, f"this JSON is too large a value ({first_line(error)})"


def _record(place: Place, values: object, problem: str) -> Record:
    if not problem and not isinstance(values, dict):
        problem = f"a row must be a JSON object, {{...}}, not {type_name(values)}"
    return Record(place, None, f"{place}: {problem}.") if problem else Record(place, values, "")


def type_name(value: object) -> str:
    """A value's type as JSON's users call it, with its article."""
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "a string"}
    names |= {list: "a list", dict: "an object"}
    return names.get(type(value)) or f"a {type(value).__name__}"


# Parquet and Arrow


def _parquet(file: Path) -> Iterator[Record]:
    with _columnar(file) as plain:
        from pyarrow import parquet

        with parquet.ParquetFile(str(plain)) as opened:
            yield from _numbered(file, opened.iter_batches(batch_size=_ROWS_AT_ONCE))


def _arrow(file: Path) -> Iterator[Record]:
    """Arrow's IPC format, as a file or as a stream: the first bytes tell."""
    with _columnar(file) as plain:
        import pyarrow as pa

        with pa.memory_map(str(plain)) as mapped:
            if mapped.read(6) == b"ARROW1":
                opened = pa.ipc.open_file(mapped)
                batches = (opened.get_batch(i) for i in range(opened.num_record_batches))
            else:
                mapped.seek(0)
                batches = pa.ipc.open_stream(mapped)
            yield from _numbered(file, batches)


@contextmanager
def _columnar(file: Path) -> Iterator[Path]:
    """A path that pyarrow can seek in, empty files refused, and its errors as one sentence."""
    import pyarrow as pa

    with _opened(file) as opened:
        if not opened.peek(1):
            raise UserError(f"{file}: the file holds no rows.")
        with tempfile.NamedTemporaryFile() as scratch:
            plain = file
            if isinstance(opened, gzip.GzipFile):
                shutil.copyfileobj(opened, scratch)
                scratch.flush()
                plain = Path(scratch.name)
            try:
                yield plain
            except (pa.ArrowException, OSError) as error:
                raise UserError(
                    f"{file}: this is no whole {kind(file)} file ({first_line(error)}); get it "
                    "again."
                ) from None


def _numbered(file: Path, batches) -> Iterator[Record]:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, _ROWS_AT_ONCE):
            for values in _dicts(batch.slice(start, _ROWS_AT_ONCE)):
                number += 1
                place = Place(str(file), number, "row")
                if isinstance(values, dict):
                    yield Record(place, values, "")
                else:
                    yield Record(place, None, f"{place}: a value cannot be read ({values}).")


def _dicts(batch) -> Iterator[dict | str]:
    """Rows of an Arrow batch; what is wrong, in place of a row with a value Python cannot hold."""
    try:
        yield from batch.to_pylist()
        return
    except ValueError:  # such as text that is not UTF-8: find the row
        pass
    for i in range(batch.num_rows):
        try:
            yield batch.slice(i, 1).to_pylist()[0]
        except ValueError as error:
            yield first_line(error)
