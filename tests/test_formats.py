"""Rows of every format of file, and what cannot be read, in sentences."""

import gzip
import itertools
import re
import struct
import tracemalloc
from decimal import Decimal
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
from datafiles import ROWS, arrow, dump, feather_bytes, jsonl, parquet_bytes, read, refusal, write
from pyarrow import feather, parquet

from alignjax.config import Data
from alignjax.data import formats, sources
from alignjax.data.rows import carried, example
from alignjax.data.sources import Place, Row
from alignjax.errors import UserError

# Formats


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "content", "unit"),
    [
        ("d.jsonl", jsonl(ROWS), "line"),
        ("d.ndjson", b"\xef\xbb\xbf" + jsonl(ROWS).replace(b"\n", b"\r\n"), "line"),
        ("d.JSONL", jsonl(ROWS).rstrip(), "line"),
        ("d.json", dump(ROWS), "row"),
        ("d.json", "\ufeff \n" + dump(ROWS, indent=2), "row"),
        ("d.json", jsonl(ROWS), "line"),
        ("d.parquet", parquet_bytes(ROWS, 2), "row"),
        ("d.arrow", arrow(ROWS, pa.ipc.new_file, 2), "row"),
        ("d.arrow", arrow(ROWS, pa.ipc.new_stream, 2), "row"),
        ("d.feather", feather_bytes(ROWS), "row"),
    ],
)
def test_every_format_gives_the_same_rows(tmp_path, name, content, unit, gz):
    file = write(tmp_path / (name + gz), content)
    places = [Place(str(file), number, unit) for number in (1, 2, 3)]
    assert read(file) == [Row(p, r, "", True, 0) for p, r in zip(places, ROWS, strict=True)]
    assert str(places[2]) == f"{file}, {unit} 3"


@pytest.mark.parametrize("make", [pa.ipc.new_file, pa.ipc.new_stream, None])
def test_rows_of_large_batches_are_numbered_through(tmp_path, make):
    rows = [{"prompt": str(i)} for i in range(2500)]
    content = arrow(rows, make, 1700) if make else parquet_bytes(rows, 1700)
    found = read(write(tmp_path / ("d.arrow" if make else "d.parquet"), content))
    assert [(row.place.number, row.values) for row in found] == list(enumerate(rows, 1))


def test_blank_lines_are_passed_over_and_counted(tmp_path):
    file = write(tmp_path / "d.jsonl", '{"a": 1}\n\n  \n{"a": 2}\r\n{"a": 3}')
    assert [(row.place.number, row.values) for row in read(file)] == [
        (1, {"a": 1}),
        (4, {"a": 2}),
        (5, {"a": 3}),
    ]


# Streaming


def test_json_lines_are_streamed(tmp_path):
    row = {"prompt": "x" * 10_000}
    file = write(tmp_path / "d.jsonl", jsonl([row]) * 1000)  # 10 MB
    stream = sources.read(Data(path=str(file)), False)
    tracemalloc.start()
    try:
        assert sum(len(row.values["prompt"]) for row in stream) == 10_000_000
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["d.jsonl.gz", "d.parquet", "d.arrow"])
def test_rows_before_the_damage_come_first(tmp_path, name):
    """What is not asked for is not read: the damage shows only where it lies."""
    rows = [{"prompt": f"{i * 7919 % 1009} {i}"} for i in range(4000)]
    file = tmp_path / name
    if name == "d.jsonl.gz":
        write(file, rows)
        content = bytearray(file.read_bytes())
        del content[-20:]
    elif name == "d.parquet":
        content = bytearray(parquet_bytes(rows, 2000))
        second = parquet.ParquetFile(pa.BufferReader(bytes(content))).metadata.row_group(1)
        start = second.column(0).dictionary_page_offset or second.column(0).data_page_offset
        content[start : start + 40] = b"\xff" * 40
    else:
        content = bytearray(arrow(rows, pa.ipc.new_stream, 2000))
        del content[-2000:]
    file.write_bytes(content)
    stream = sources.read(Data(path=str(file)), False)
    assert [row.values for row in itertools.islice(stream, 2000)] == rows[:2000]
    with pytest.raises(ValueError, match=f"^{re.escape(str(file))}: this is no whole "):
        list(stream)


# Rows that cannot be read


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (b'{"a": ]', "this is not JSON (Expecting value at column 7)."),
        (b'  {"a": 1,', "this is not JSON (Expecting property name enclosed in double quotes at "),
        (b"{'a': 1}", "this is not JSON (Expecting property name enclosed in double quotes at "),
        (b'{"a": 1} {', "this is not JSON (Extra data at column 10)."),
        (b"[1]", "a row must be a JSON object, {...}."),
        (b"null", "a row must be a JSON object, {...}."),
        (b"true", "a row must be a JSON object, {...}."),
        (b"5", "a row must be a JSON object, {...}."),
        (b'"text"', "a row must be a JSON object, {...}."),
        (
            b'{"a": "\xe9"}',
            "byte 8 of the line (0xe9) is not UTF-8; save the file as UTF-8.",
        ),
        (b'{"a": ' + b"[" * 99999, "this JSON is too large a value (maximum recursion depth "),
        (b'{"a": ' + b"1" * 9999 + b"}", "this JSON is too large a value (Exceeds the limit "),
    ],
)
def test_unreadable_line_is_passed_on_with_its_place(tmp_path, line, sentence):
    file = write(tmp_path / "d.jsonl", b'{"prompt": "a"}\n\n' + line + b'\n{"prompt": "b"}\n')
    good, bad, after = read(file)
    assert (good.values, after.values, after.place.number) == ({"prompt": "a"}, {"prompt": "b"}, 4)
    assert (bad.place, bad.values) == (Place(str(file), 3, "line"), None)
    if sentence.endswith(" "):  # the rest is Python's, and changes with its version
        assert bad.problem.startswith(f"{file}, line 3: {sentence}")
        assert bad.problem.endswith(").")
    else:
        assert bad.problem == f"{file}, line 3: {sentence}"


def test_unreadable_rows_of_a_json_list_and_of_parquet(tmp_path):
    file = write(tmp_path / "d.json", '[{"a": 1}, 5]')
    assert [row.problem for row in read(file)] == [
        "",
        f"{file}, row 2: a row must be a JSON object, {{...}}.",
    ]
    offsets, text = pa.array([0, 1, 2, 3], pa.int32()).buffers()[1], pa.py_buffer(b"a\xffb")
    spoilt = pa.StringArray.from_buffers(3, offsets, text)
    file = tmp_path / "d.parquet"
    parquet.write_table(pa.table({"prompt": spoilt}), file)
    rows = read(file)
    assert [row.values for row in rows] == [{"prompt": "a"}, None, {"prompt": "b"}]
    assert rows[1].problem == (
        f"{file}, row 2: a value cannot be read ('utf-8' codec can't decode byte 0xff in position "
        "0: invalid start byte)."
    )


def test_unreadable_row_is_reported_once(tmp_path):
    file = write(tmp_path / "d.jsonl", b'{"prompt": "a"}\n{\n')
    other = write(tmp_path / "e.jsonl", b'{"prompt": "b"}\n{\n')

    def reported(held_out: bool, **settings) -> list[str]:
        rows = read(file, held_out, eval_fraction=0.5, **settings)
        return [row.place.file for row in rows if row.problem and row.in_split]

    assert (reported(False), reported(True)) == ([str(file)], [])
    both = reported(False, eval_path=str(other)), reported(True, eval_path=str(other))
    assert both == ([str(file)], [str(other)])


# Files that cannot be read


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("d.jsonl", b"", "it holds no rows."),
        ("d.jsonl", b" \n\n", "it holds no rows."),
        ("d.jsonl.gz", b"", "it holds no rows."),
        ("d.json", b"", "it holds no rows."),
        ("d.json", b"[]", "it holds no rows."),
        ("d.parquet", b"", "it holds no rows."),
        ("d.arrow.gz", b"", "it holds no rows."),
        (
            "d.csv",
            b"prompt,chosen\n",
            "the suffix is none of .jsonl, .ndjson, .json, .parquet, .arrow, .feather, each also "
            "with .gz behind it; convert or rename the file.",
        ),
        ("d.jsonl", dump(ROWS).encode("utf-16"), "the text is UTF-16; save it as UTF-8."),
        ("d.json", dump(ROWS).encode("utf-16-be"), "the text is UTF-16; save it as UTF-8."),
        ("d.json.gz", dump(ROWS).encode("utf-16-le"), "the text is UTF-16; save it as UTF-8."),
        (
            "d.jsonl",
            dump(ROWS, indent=1),
            "the file is one JSON list; rename it to end in .json.",
        ),
        (
            "d.json",
            '{\n "data": []\n}',
            "a row goes over several lines; write a row a line, or one list of rows into a .json "
            "file.",
        ),
        (
            "d.parquet",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n",
            "this is a Git LFS pointer, not the data; run `git lfs pull` beside it.",
        ),
        (
            "d.jsonl",
            gzip.compress(jsonl(ROWS), mtime=0),
            "the content is gzip; rename the file to end in .gz.",
        ),
        (
            "d.json",
            parquet_bytes(ROWS),
            "the content is Parquet; rename the file to end in .parquet.",
        ),
        (
            "d.jsonl",
            arrow(ROWS, pa.ipc.new_file),
            "the content is Arrow; rename the file to end in .arrow.",
        ),
    ],
)
def test_file_refusals(tmp_path, name, content, sentence):
    file = write(tmp_path / name, content)
    assert refusal(file) == f"{file}: {sentence}"


def test_a_file_of_columns_without_rows_is_refused(tmp_path):
    table = pa.table({"prompt": pa.array([], pa.string())})
    parquet.write_table(table, tmp_path / "d.parquet")
    assert refusal(tmp_path / "d.parquet") == f"{tmp_path}/d.parquet: it holds no rows."


@pytest.mark.parametrize(
    ("content", "line", "problem"),
    [
        ('[{"a": 1},\n {"a": ]}]', 2, "this is not JSON (Expecting value at column 8)"),
        ('[\n{"a": 1}\n{"a": 2}]', 3, "this is not JSON (Expecting ',' delimiter at column 1)"),
        (
            b'[\n{"a": 1},\n{"a": "\xe9"}]',
            3,
            "byte 8 of the line (0xe9) is not UTF-8; save the file as UTF-8",
        ),
    ],
)
def test_error_inside_a_json_list_names_the_line(tmp_path, content, line, problem):
    file = write(tmp_path / "d.json", content)
    assert refusal(file) == f"{file}, line {line}: {problem}."


@pytest.mark.parametrize(
    ("name", "content", "form"),
    [
        ("d.jsonl.gz", gzip.compress(jsonl(ROWS), mtime=0)[:-9], "gzip"),
        ("d.jsonl.gz", jsonl(ROWS), "gzip"),
        ("d.json.gz", gzip.compress(dump(ROWS).encode(), mtime=0)[:30], "gzip"),
        ("d.parquet.gz", gzip.compress(parquet_bytes(ROWS), mtime=0)[:-100], "gzip"),
        ("d.parquet", parquet_bytes(ROWS)[:-5], "Parquet"),
        ("d.parquet", jsonl(ROWS), "Parquet"),
        ("d.parquet.gz", gzip.compress(jsonl(ROWS), mtime=0), "Parquet"),
        ("d.arrow", arrow(ROWS, pa.ipc.new_file)[:-50], "Arrow"),
        ("d.arrow", arrow(ROWS, pa.ipc.new_stream)[:-100], "Arrow"),
        ("d.feather", jsonl(ROWS), "Arrow"),
    ],
)
def test_cut_or_wrong_content_is_one_sentence_about_the_file(tmp_path, name, content, form):
    file = tmp_path / name
    file.write_bytes(content)
    found = refusal(file)
    assert re.fullmatch(
        re.escape(f"{file}: this is no whole {form} file (") + r"[^\n]+\); get it again\.", found
    ), found


def test_suffixes_are_told_from_names():
    kinds = [formats.kind(Path(n)) for n in ("a.jsonl", "a.b.JSON.gz", "a.gz", "jsonl", "a.csv")]
    assert kinds == ["JSON lines", "JSON", "", "", ""]


# What is not read, and what is too large


def odd_columns(**known) -> pa.Table:
    """Columns that no run reads, with values that Python cannot hold or only a library decodes."""
    return pa.table(
        known
        | {
            "t": pa.array([2**62, 1], pa.timestamp("us")),
            "day": pa.array([2**31 - 1, 1], pa.date32()),
            "text": pa.array([2**62, 1], pa.duration("ms")),
            "zone": pa.array([1, 2], pa.timestamp("us", "no/where")),
            "image": [{"bytes": None, "path": "/etc/hostname"}] * 2,
        }
    )


@pytest.mark.parametrize("name", ["d.parquet", "d.arrow", "d.feather", "d.arrow.gz", "saved"])
def test_columns_that_no_run_reads_do_not_matter_but_are_named(tmp_path, name):
    table = odd_columns(prompt=["a", "b"])
    if name == "saved":
        datasets.Dataset(table.cast(table.schema.remove_metadata())).save_to_disk(tmp_path / name)
    else:
        sink = pa.BufferOutputStream()
        if name == "d.parquet":
            parquet.write_table(table, sink)
        elif name == "d.feather":
            feather.write_feather(table, sink)
        else:
            with pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
        write(tmp_path / name, sink.getvalue().to_pybytes())
    found = read(tmp_path / name)
    assert [row.values["prompt"] for row in found] == ["a", "b"]
    assert list(found[0].values) == table.column_names
    with pytest.raises(UserError, match=r"`text`, `zone`, `image`"):
        example("dpo", found[0].values, found[0].place, "chat")
    with pytest.raises(UserError, match=r"row 1: text=.*duration\[ms\]"):
        example("sft", {"text": found[0].values["text"]}, found[0].place, "chat")


def test_a_file_without_any_column_that_is_read_has_its_rows(tmp_path):
    parquet.write_table(pa.table({"words": ["a", "b"]}), tmp_path / "d.parquet")
    assert [list(row.values) for row in read(tmp_path / "d.parquet")] == [["words"]] * 2


def test_values_of_every_arrow_type_that_columns_may_have(tmp_path):
    table = pa.table(
        {
            "prompt": pa.array(["a", "b"]).dictionary_encode(),
            "chosen": pa.array(["x", None], pa.large_string()),
            "margin": pa.array([Decimal("0.5"), None]),
            "messages": pa.array([[("role", "user")], None], pa.map_(pa.string(), pa.string())),
            "history": pa.array([['["q", 1]'], None], pa.list_(pa.string())).cast(
                pa.list_(pa.json_())
            ),
        }
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    file = write(tmp_path / "d.arrow", sink.getvalue().to_pybytes())
    (first, second) = (row.values for row in read(file))
    assert first == {
        "prompt": "a",
        "chosen": "x",
        "margin": Decimal("0.5"),
        "messages": [("role", "user")],
        "history": [["q", 1]],
    }
    assert second == {"prompt": "b"} | dict.fromkeys(list(first)[1:])
    assert carried("dpo", first, Place("f", 1, "row")) == {"margin": 0.5}


@pytest.mark.parametrize(
    ("offsets", "said"),
    [
        ([0, 8, 16, 2_000_000], "2000000"),
        ([0, 8, 16, 2**31 - 1], "2147483647"),
        ([-1000, 8, 16, 24], "egative"),
        ([0, 24, 8, 24], "monotonic"),
    ],
)
def test_offsets_that_lead_out_of_a_batch_are_one_sentence(tmp_path, offsets, said):
    content = bytearray(arrow([{"prompt": "MARKERab"}] * 3, pa.ipc.new_file))
    at = content.index(struct.pack("<4i", 0, 8, 16, 24))
    content[at : at + 16] = struct.pack("<4i", *offsets)
    file = write(tmp_path / "d.arrow", bytes(content))
    assert re.fullmatch(rf"{re.escape(str(file))}: .*{said}.*get it again\.", refusal(file))


@pytest.mark.parametrize("name", ["d.jsonl", "d.jsonl.gz", "d.json", "d.parquet", "d.arrow"])
def test_a_row_that_is_too_large_is_a_bad_one(tmp_path, name):
    rows = [{"prompt": "a"}, {"prompt": "x" * 5000}, {"prompt": "b"}, {"prompt": "y" * 900}]
    make = {"json": dump, "parquet": parquet_bytes}.get(name[2:], jsonl)
    content = arrow(rows, pa.ipc.new_stream) if name == "d.arrow" else make(rows)
    found = read(write(tmp_path / name, content), max_row_bytes=1000)
    assert [row.values for row in found] == [rows[0], None, *rows[2:]]
    assert f"{found[1].place}: the row is larger than data.max_row_bytes=1000" in found[1].problem
    assert found[1].place.number == 2


def test_a_long_line_of_spaces_is_not_kept(tmp_path):
    with gzip.open(tmp_path / "d.jsonl.gz", "wb", 1) as packed:
        packed.write(jsonl(ROWS))
        for _ in range(64):
            packed.write(b" " * (1 << 20))
    tracemalloc.start()
    try:
        *good, bad = read(tmp_path / "d.jsonl.gz", max_row_bytes=10_000)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()
    assert [row.values for row in good] == ROWS and "max_row_bytes" in bad.problem


def test_what_unpacks_to_far_more_is_refused(tmp_path, monkeypatch):
    for name, key, content in (
        ("d.json.gz", "_LIST", dump([{"prompt": " " * 9999}])),
        ("d.arrow.gz", "_LEAST_UNPACKED", arrow([{"prompt": " " * 999_999}], pa.ipc.new_file)),
    ):
        file = write(tmp_path / name, content)
        assert len(read(file)) == 1
        monkeypatch.setattr(formats, key, 1000)
        assert refusal(file).startswith(f"{file}: ")


@pytest.mark.parametrize("name", ["coded.parquet", "plain.parquet", "coded.arrow"])
def test_one_text_that_stands_for_all_rows_is_not_unpacked_at_once(tmp_path, monkeypatch, name):
    """64 kB in a file of 500 rows, whose text would be 32 MB."""
    monkeypatch.setattr(formats, "_AT_ONCE", 1 << 20)
    text, indices = "a" * (1 << 16), pa.array([0] * 500, pa.int32())
    coded = pa.DictionaryArray.from_arrays(indices, pa.array([text]))
    table, file = pa.table({"prompt": ["p"] * 500, "completion": coded}), tmp_path / name
    if name.endswith("parquet"):
        parquet.write_table(table, file, store_schema=name == "coded.parquet")
    else:
        with pa.ipc.new_file(str(file), table.schema) as written:
            written.write_table(table)
    largest, values = 0, formats._values

    def spy(batch):
        nonlocal largest
        largest = max(largest, sum(map(formats._unpacked, batch.columns)))
        return values(batch)

    monkeypatch.setattr(formats, "_values", spy)
    found = list(formats.records(file, 1 << 20))
    assert [record.values for record in found] == [{"prompt": "p", "completion": text}] * 500
    assert 1 << 16 < largest <= 1 << 21


def lists(ends: list[int], values):
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), values)


TEXT = pa.array(["x" * 10**6])
MANY = pa.DictionaryArray.from_arrays(pa.array([0] * 20_000, pa.int32()), TEXT)
VIEW = TEXT.cast(pa.string_view()).buffers()
VIEWS = np.tile(np.frombuffer(VIEW[1], np.uint8)[:16], 6000)
ROLES = pa.array(["user", "assistant"] * 10_000)
# Each of a few MB at most, whose rows would have 20 GB, or a billion values.
SHARED = {
    "messages": lists([0, 20_000], pa.StructArray.from_arrays([ROLES, MANY], ["role", "content"])),
    "completions": lists([0, 20_000], MANY),
    "prompt": lists([0, 10**9], pa.Array.from_buffers(pa.struct([]), 10**9, [None])),
    "responses": lists(
        [0, 6000],
        pa.Array.from_buffers(pa.string_view(), 6000, [None, pa.py_buffer(VIEWS), VIEW[2]]),
    ),
    "scores": pa.ListViewArray.from_arrays(
        *(pa.array([number], pa.int32()) for number in (0, 1 << 24)), pa.nulls(1 << 24, pa.int8())
    ),
}


@pytest.mark.parametrize("name", SHARED)
def test_a_row_whose_values_share_bytes_is_measured_without_them(tmp_path, name):
    table = pa.table({name: SHARED[name]})
    with pa.ipc.new_file(str(tmp_path / "d.arrow"), table.schema) as written:
        written.write_table(table)
    [found] = formats.records(tmp_path / "d.arrow", 8_000_000)
    assert "the row is larger than data.max_row_bytes=8000000" in found.problem


@pytest.mark.parametrize("name", ["d.parquet", "d.arrow"])
@pytest.mark.parametrize("more", [{"tool_calls": None}, {"k": [None, None]}, {"k": {"z": None}}])
def test_keys_of_messages_that_are_always_null(tmp_path, name, more):
    turns = [{"role": "user", "content": "q"} | more, {"role": "assistant", "content": "a"} | more]
    rows = [{"messages": turns}] * 8
    content = parquet_bytes(rows) if name == "d.parquet" else arrow(rows, pa.ipc.new_file)
    found = list(formats.records(write(tmp_path / name, content), 8_000_000))
    assert [record.values["messages"] for record in found] == [turns] * 8
