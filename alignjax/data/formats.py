"""One data file -> its rows as dicts, in a stream: JSON lines, JSON, Parquet, Arrow, each with .gz.

A row that cannot be read is passed on with a sentence in its place; a damaged file is an error.
"""

import codecs
import gzip
import json
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

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
_AT_ONCE = 1 << 28  # bytes that one column of those rows may take in memory
_LIST = 1 << 28  # bytes of a JSON list at most, which is read as a whole
_UNPACKED = 100  # times the size of a Parquet or Arrow file's .gz, which it may unpack to, and
_LEAST_UNPACKED = 1 << 30  # bytes which it may in any case
# Every column that a run reads; of Parquet, Arrow and datasets no other is read or decoded.
COLUMNS = """
    messages prompt completion conversations instruction input history output text system
    chosen rejected responses completions scores ranks score_chosen score_rejected
    margin weight source split rule rule_value tools functions chat_template_kwargs
""".split()


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


def records(file: Path, most: int) -> Iterator[Record]:
    """Yield the rows of a file in its order, with a problem for one of more than `most` bytes.

    Raises UserError where the file as a whole cannot be read: an unknown suffix, another format
    than its name says, or cut short.
    """
    form = kind(file)
    if not form:
        raise UserError(f"{file}: the suffix is none of {_SUFFIXES}; convert or rename the file.")
    with _named(file):
        if form in ("Parquet", "Arrow"):
            batches = (_parquet if form == "Parquet" else arrow)(file)
            yield from numbered(str(file), batches, most)
        else:
            yield from (_lines if form == "JSON lines" else _json)(file, most)


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


def _lines(file: Path, most: int) -> Iterator[Record]:
    with _opened(file) as opened:
        _check_text(file, opened)
        yield from _json_lines(file, opened, most)


def _json(file: Path, most: int) -> Iterator[Record]:
    """A list of rows, or JSON lines under a .json name: the content tells."""
    with _opened(file) as opened:
        _check_text(file, opened)
        head = opened.peek(4096).removeprefix(codecs.BOM_UTF8).lstrip()
        yield from (_json_list if head.startswith(b"[") else _json_lines)(file, opened, most)


def _check_text(file: Path, opened: BinaryIO) -> None:
    head = opened.peek(4)[:4]
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in head:
        raise UserError(f"{file}: the text is UTF-16; save it as UTF-8.")
    for magic, suffix in ((b"PAR1", ".parquet"), (b"ARRO", ".arrow")):
        if head == magic:
            raise UserError(
                f"{file}: the content is {KINDS[suffix]}; rename the file to end in {suffix}."
            )


def _json_lines(file: Path, opened: BinaryIO, most: int) -> Iterator[Record]:
    first = True
    for number, line in enumerate(iter(partial(opened.readline, most + 1), b""), 1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        cut = len(line) > most and not line.endswith(b"\n")
        line = line.rstrip()
        if not line and not cut:
            continue
        if first:
            _check_first_line(file, line)
            first = False
        values, _, problem = (None, 0, _too_large(most)) if cut else _parse(line)
        yield _record(Place(str(file), number, "line"), values, problem)
        while cut and (rest := opened.readline(1 << 20)):
            cut = not rest.endswith(b"\n")


def _too_large(most: int) -> str:
    return f"the row is larger than data.max_row_bytes={most}; shorten it, or raise the setting"


def _check_first_line(file: Path, line: bytes) -> None:
    """Refuses what would make every line a bad row."""
    if line.lstrip().startswith(b"["):
        raise UserError(f"{file}: the file is one JSON list; rename it to end in .json.")
    if line.strip() == b"{":
        raise UserError(
            f"{file}: a row goes over several lines; write a row a line, or one list of rows into "
            "a .json file."
        )


def _json_list(file: Path, opened: BinaryIO, most: int) -> Iterator[Record]:
    text = opened.read(_LIST + 1).removeprefix(codecs.BOM_UTF8)
    if len(text) > _LIST:
        raise UserError(
            f"{file}: a JSON list may have {_LIST:,} bytes; write a row a line into a .jsonl file "
            "(jq -c '.[]' does)."
        )
    rows, line, problem = _parse(text)
    if problem:
        raise UserError(f"{file}, line {line}: {problem}.")
    for number, values in enumerate(rows, 1):
        large = len(text) > most and len(json.dumps(values, ensure_ascii=False)) > most
        yield _record(Place(str(file), number, "row"), values, _too_large(most) if large else "")


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
        problem = "a row must be a JSON object, {...}"
    return Record(place, None, f"{place}: {problem}.") if problem else Record(place, values, "")


def in_words(text: str) -> str:
    """A user's word for the middle of a sentence: on one line, and not without end."""
    text = text.replace("\n", "\\n")
    return text if len(text) <= 60 else f"{text[:57]}..."


# Parquet and Arrow


def _parquet(file: Path) -> Iterator[tuple]:
    with _columnar(file) as plain:
        from pyarrow import parquet

        with parquet.ParquetFile(str(plain)) as opened:
            schema = opened.schema_arrow
            names = [schema.names[i] for i in _to_read(schema)]
            rows = _rows_at_once(opened.metadata)
            for batch in opened.iter_batches(rows, columns=names):
                yield schema, checked(batch)


def _rows_at_once(metadata) -> int:
    """How many rows of a Parquet file to decode at once, 16 at least where it compresses as usual.

    Each row may repeat one entry of a column's dictionary, which is as large as the column chunk.
    """
    largest = _AT_ONCE // _ROWS_AT_ONCE
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            if column.path_in_schema.split(".")[0] in COLUMNS:
                packed, size = column.total_compressed_size, column.total_uncompressed_size
                usual = size <= _UNPACKED * packed
                largest = max(largest, min(size, _AT_ONCE // 16) if usual else size)
    return max(_AT_ONCE // largest, 1)


def arrow(file: Path) -> Iterator[tuple]:
    """Batches of Arrow's IPC format, as a file or as a stream, each with the file's schema."""
    with _columnar(file) as plain:
        import pyarrow as pa

        with pa.memory_map(str(plain)) as mapped:
            is_file = mapped.read(6) == b"ARROW1"
            make = pa.ipc.open_file if is_file else pa.ipc.open_stream
            mapped.seek(0)
            schema = make(mapped).schema
            mapped.seek(0)
            options = pa.ipc.IpcReadOptions(included_fields=_to_read(schema))
            opened = make(mapped, options=options)
            if is_file:
                opened = map(opened.get_batch, range(opened.num_record_batches))
            for batch in opened:
                yield schema, checked(batch)


def _to_read(schema) -> list[int]:
    """The columns that training reads. None of them has dates, which Python may not hold."""
    import pyarrow as pa

    return [
        i
        for i, field in enumerate(schema)
        if field.name in COLUMNS and not pa.types.is_temporal(field.type)
    ]


@contextmanager
def _columnar(file: Path) -> Iterator[Path]:
    """A path that pyarrow can seek in, empty files refused, and its errors as one sentence."""
    import pyarrow as pa

    with _opened(file) as opened:
        if not opened.peek(1):
            raise UserError(f"{file}: it holds no rows.")
        with tempfile.NamedTemporaryFile() as scratch:
            plain = file
            if isinstance(opened, gzip.GzipFile):
                left = max(_LEAST_UNPACKED, _UNPACKED * file.stat().st_size)
                while left > 0 and (read := opened.read(1 << 20)):
                    left -= scratch.write(read)
                if left <= 0:
                    raise UserError(
                        f"{file}: it unpacks to over {_UNPACKED} times its size; gunzip it."
                    )
                scratch.flush()
                plain = Path(scratch.name)
            try:
                yield plain
            except (pa.ArrowException, OSError, ValueError) as error:
                if isinstance(error, UserError):
                    raise
                raise UserError(
                    f"{file}: this is no whole {kind(file)} file ({first_line(error)}); get it "
                    "again."
                ) from None


def checked(batch):
    """The columns of a batch that training reads, their offsets all within their buffers.

    Raises pyarrow's errors. Text counts as bytes: where it is not UTF-8, its row alone is bad.
    """
    import pyarrow as pa

    batch = batch.select(_to_read(batch.schema))
    for column in batch.columns:
        column.validate()
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as error:
            if "UTF8" not in str(error):
                raise
            column.view(_as_bytes(column.type)).validate(full=True)  # miscounts null children
    return batch


def _as_bytes(form):
    """An Arrow type with bytes in place of the text in it."""
    import pyarrow as pa

    form = form.storage_type if isinstance(form, pa.BaseExtensionType) else form
    bytes_of = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}
    bytes_of[pa.string_view()] = pa.binary_view()
    if pa.types.is_struct(form):
        return pa.struct([field.with_type(_as_bytes(field.type)) for field in form])
    lists = {pa.ListType: pa.list_, pa.LargeListType: pa.large_list}
    if type(form) in lists:
        item = form.value_field
        return lists[type(form)](item.with_type(_as_bytes(item.type)))
    return bytes_of.get(form, form)


def numbered(name: str, batches: Iterable[tuple], most: int) -> Iterator[Record]:
    """Yield the rows of (schema of the file, Arrow batch) pairs, numbered from 1."""
    number = 0
    for schema, batch in batches:
        names = batch.schema.names
        if len(set(names)) < len(names):
            raise UserError(f"{name}: two of the columns {', '.join(names)} have one name.")
        unread = {field.name: field.type for field in schema}  # so that they can be named
        for values, problem in _dicts(batch, most):
            number += 1
            yield _record(Place(name, number, "row"), unread | values, problem)


def _dicts(batch, most: int) -> Iterator[tuple[dict, str]]:
    """Rows of an Arrow batch, each with what is wrong where it is too large or unreadable."""
    found, problem = [], _too_large(most)
    try:
        if batch.num_rows <= _ROWS_AT_ONCE and sum(map(_unpacked, batch.columns)) <= most:
            found = _values(batch)
    except Exception as error:  # pyarrow has many kinds for values that Python cannot hold
        problem = f"a value cannot be read ({first_line(error)})"
    if found or not batch.num_rows:
        yield from ((values, "") for values in found)
    elif batch.num_rows == 1:
        yield {}, problem
    else:
        half = batch.num_rows // 2
        yield from _dicts(batch.slice(0, half), most)
        yield from _dicts(batch.slice(half), most)


def _unpacked(array) -> int:
    """Bytes that an array would have if no two values shared any, as those of a dictionary do.

    Of very long lists it is the count of values alone, since those may all lie in one place.
    """
    import pyarrow as pa
    from pyarrow import compute

    form = array.type
    if pa.types.is_dictionary(form):
        if form.value_type not in (pa.string(), pa.large_string(), pa.binary()):
            return len(array) * array.dictionary.nbytes
        lengths = compute.binary_length(array.dictionary).take(array.indices)
        return 8 * len(array) + (compute.sum(lengths).as_py() or 0)
    if pa.types.is_string_view(form) or pa.types.is_binary_view(form):
        views = np.frombuffer(array.buffers()[1], np.int32)[4 * array.offset :]  # 4 for each text
        return int(views[: 4 * len(array) : 4].sum(dtype=np.int64)) + 16 * len(array)
    if pa.types.is_struct(form):
        return 64 * len(array) + sum(map(_unpacked, array.flatten()))
    if isinstance(array, pa.ExtensionArray):
        return _unpacked(array.storage)
    if isinstance(array, pa.ListViewArray | pa.LargeListViewArray):
        count = compute.sum(compute.list_value_length(array)).as_py() or 0
        return count if count > _AT_ONCE else _unpacked(array.flatten())
    if hasattr(array, "flatten") and not pa.types.is_map(form):
        return 8 * len(array) + _unpacked(array.flatten())
    return array.nbytes


def _values(batch) -> list[dict]:
    rows = batch.to_pylist()
    if "arrow.json" in str(batch.schema.types):  # in which `datasets` keeps values of mixed types
        rows = [{f.name: _parsed(row[f.name], f.type) for f in batch.schema} for row in rows]
    return rows


def _parsed(value, form):
    """A value in which text that is JSON by its Arrow type is parsed."""
    import pyarrow as pa

    if value is None or isinstance(form, pa.JsonType):
        return value and json.loads(value)
    if pa.types.is_struct(form):
        return {field.name: _parsed(value[field.name], field.type) for field in form}
    if pa.types.is_list(form) or pa.types.is_large_list(form):
        return [_parsed(one, form.value_type) for one in value]
    return value
