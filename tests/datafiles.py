"""Files of rows in every format, written and read; a stand-in for the hub."""

import gzip
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from pyarrow import feather, parquet

from alignjax.config import Data
from alignjax.data import sources
from alignjax.data.sources import Row

ROWS = [
    {"prompt": "why?", "chosen": [{"role": "assistant", "content": "só"}], "margin": 0.5},
    {"prompt": "how?", "chosen": [{"role": "assistant", "content": "x\u2028y"}], "margin": None},
    {"prompt": "who?", "chosen": [], "margin": -1.0},
]


def dump(rows: list, indent: int | None = None) -> str:
    return json.dumps(rows, indent=indent, ensure_ascii=False)


def jsonl(rows: list[dict]) -> bytes:
    return "".join(f"{dump(row)}\n" for row in rows).encode()


def arrow(rows: list[dict], make, rows_a_batch: int | None = None) -> bytes:
    table = pa.Table.from_pylist(rows)
    sink = pa.BufferOutputStream()
    with make(sink, table.schema) as writer:
        writer.write_table(table, rows_a_batch)
    return sink.getvalue().to_pybytes()


def parquet_bytes(rows: list[dict], row_group: int | None = None) -> bytes:
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_pylist(rows), sink, row_group_size=row_group)
    return sink.getvalue().to_pybytes()


def feather_bytes(rows: list[dict]) -> bytes:
    sink = pa.BufferOutputStream()
    feather.write_feather(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def read(path, held_out: bool = False, **settings) -> list[Row]:
    return list(sources.read(Data(path=str(path), **settings), held_out))


def refusal(path, held_out: bool = False, **settings) -> str:
    with pytest.raises(ValueError) as caught:
        read(path, held_out, **settings)
    return str(caught.value)


def write(file: Path, content: bytes | str | list[dict]) -> Path:
    """A file of bytes, text or rows as JSON lines, compressed where its name says so."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        content = jsonl(content)
    content = content.encode() if isinstance(content, str) else content
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)
    return file


def asking(*names: str) -> list[dict]:
    return [{"prompt": name} for name in names]


def saved_splits(directory: Path, **splits: list[str]) -> Path:
    made = {name: datasets.Dataset.from_list(asking(*rows)) for name, rows in splits.items()}
    datasets.DatasetDict(made).save_to_disk(directory)
    return directory


def fake_hub(monkeypatch):
    """Stands for the hub: what it holds by (name, subset, split), and what was asked of it."""
    held: dict[tuple, list[str]] = {}
    asked: list[tuple] = []

    def load_dataset(name, subset=None, split=None):
        asked.append((name, subset, split))
        splits = [key[2] for key in held if key[:2] == (name, subset)]
        if not splits:
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist.\nSee")
        if split not in splits:
            raise ValueError(f'Unknown split "{split}". Should be one of {splits}.')
        return datasets.Dataset.from_list(asking(*held[name, subset, split]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return held, asked
