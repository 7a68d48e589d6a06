"""Tokenized data on disk: tokenized once, then mapped into memory by every later run.

The cache is keyed by the data's content, the tokenizer with its template, and every setting that
changes a token. Rows are read, encoded and written in chunks, so memory does not grow with them.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from alignjax.config import Data
from alignjax.data import rows, sources
from alignjax.data.chat import Encoded, dates_of, encode_sides
from alignjax.data.fitting import Item, fit, problem_of, thinned, with_prompt_cut
from alignjax.data.formats import Place
from alignjax.data.tokenset import TokenSet
from alignjax.errors import UserError
from alignjax.files import whole_directory
from alignjax.weights.safetensors import companions_of

_VERSION = 10  # of the cache's format; increment it to invalidate every cache
_CHUNK = 1000  # sides encoded together, enough to keep all cores at work
_ARRAYS = {
    "tokens": np.int32,
    "trained": np.bool_,
    "offsets": np.int64,
    "ranks": np.int32,
    "starts": np.int64,
    "file_index": np.int32,
    "lines": np.int64,
    "margin": np.float32,
    "weight": np.float32,
    "source": np.int32,
    "part": np.int32,
    "turns": np.int32,
}


def examples(data: Data, stage: str, held_out: bool) -> Iterator[rows.Example]:
    """The rows of a split as examples of a stage, "sft", "rm" or "dpo", in the data's order.

    A bad row raises UserError, or is passed over with data.on_bad_row=skip.
    """
    for read in _read(data, stage, held_out):
        if read and read.example:
            yield read.example
        elif read and data.on_bad_row == "stop":
            raise _stop(read.problem)


def token_set(
    data: Data,
    stage: str,
    held_out: bool,
    tokenizer,
    tokenizer_dir: Path,
    cache: Path,
    progress: Callable[[int], None] = lambda done: None,
) -> TokenSet:
    """Tokenize a split, or load it from the cache; `progress` is called with the rows done.

    `stage` is "sft", "rm", "dpo", or "evaluation": as rm, with sides of the same tokens as ties.
    """
    content, names = sources.described(data, held_out)
    key = _key(data, stage, held_out, content, tokenizer, tokenizer_dir)
    listed = json.dumps(names if data.on_bad_row == "skip" else [])  # bad rows name their files
    directory = cache / "tokens" / f"{key}-{hashlib.sha256(listed.encode()).hexdigest()[:8]}"
    if not directory.is_dir():
        with whole_directory(directory) as partial:
            _write(partial, data, stage, held_out, names, tokenizer, progress)
            if sources.described(data, held_out)[0] != content:
                raise UserError(
                    f"{sources.title(data, held_out)}: it changed while it was tokenized, so "
                    "nothing is kept; run the same command again when it is complete."
                )
    meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
    bad_rows = directory / "bad_rows.jsonl"
    now = dict(zip(meta.pop("read_from"), names, strict=True))
    key = meta.pop("content")
    meta["files"] = [now[file] for file in meta["files"]]
    return TokenSet(
        **{name: _mapped(directory / f"{name}.bin", dtype) for name, dtype in _ARRAYS.items()},
        key=key,
        bad_rows_file=bad_rows if bad_rows.stat().st_size else None,
        **meta,
    )


def _mapped(file: Path, dtype) -> np.ndarray:
    if not file.stat().st_size:
        return np.zeros(0, dtype)  # an empty file cannot be mapped
    return np.memmap(file, dtype, mode="r")


def _key(
    data: Data, stage: str, held_out: bool, content: str, tokenizer, tokenizer_dir: Path
) -> str:
    settings = [_VERSION, stage, held_out, bool(data.eval_path)]
    settings += [tokenizer.chat_template, dates_of(tokenizer)]
    settings += [data.split, data.eval_split, data.eval_fraction]
    settings += [data.strings, data.train_on, data.max_length, data.overlong, data.on_bad_row]
    settings += [data.max_prompt_length, data.max_responses, data.max_row_bytes]
    settings.append(content)
    digest = hashlib.sha256(json.dumps(settings).encode())
    for name, file in companions_of(tokenizer_dir).items():
        digest.update(f"{name} {_sha256(file)}".encode())
    return digest.hexdigest()[:32]


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


# Reading


class _Read(NamedTuple):
    """A row of the split: an example, or a problem."""

    place: Place
    part: int
    example: rows.Example | None
    carried: dict[str, float | str]
    problem: str


def _read(data: Data, stage: str, held_out: bool) -> Iterator[_Read | None]:
    """Every row; None for one of another split."""
    for row in sources.read(data, held_out):
        if not row.in_split:
            yield None
        elif row.problem:
            yield _Read(row.place, row.part, None, {}, row.problem)
        else:
            yield _example(stage, row, data.strings)


def _example(stage: str, row: sources.Row, strings: str) -> _Read:
    try:
        example = rows.example(stage, row.values, row.place, strings)
        carried = rows.carried(stage, row.values, row.place)
        return _Read(row.place, row.part, example, carried, "")
    except ValueError as error:
        return _Read(row.place, row.part, None, {}, str(error))


def _stop(problem: str) -> UserError:
    return UserError(
        f"{problem.removesuffix('.')} (--data.on_bad_row=skip goes on without such rows)."
    )


# Writing


def _write(
    directory: Path,
    data: Data,
    stage: str,
    held_out: bool,
    read_from: list[str],
    tokenizer,
    progress,
) -> None:
    """Streams a split's arrays, its bad rows and what was counted into `directory`."""
    counts: Counter[str] = Counter()
    files: dict[tuple[str, str], int] = {}  # with the unit of its rows -> index
    names: dict[str, int] = {}  # of sources -> index
    columns: set[str] = set()
    largest, most = -1, rows.sides_of(stage)
    found = _read(data, stage, held_out)
    end = count = 0  # of tokens, of sequences
    with ExitStack() as opened:
        out = {name: opened.enter_context(_new(directory / f"{name}.bin")) for name in _ARRAYS}
        bad = opened.enter_context(_new(directory / "bad_rows.jsonl"))
        _append(out, {"offsets": [0], "starts": [0]})
        while chunk := list(islice(found, _CHUNK // rows.sides_of(stage))):
            values: dict[str, list] = {name: [] for name in _ARRAYS}
            for read, item in _items(chunk, data, stage, tokenizer, counts, bad):
                columns |= read.carried.keys()
                file = read.place.file, read.place.unit
                source = read.carried.get("source", "")
                values["file_index"].append(files.setdefault(file, len(files)))
                values["lines"].append(read.place.number)
                values["margin"].append(read.carried.get("margin", 0.0))
                values["weight"].append(read.carried.get("weight", 1.0))
                values["source"].append(names.setdefault(source, len(names)))
                values["part"].append(read.part)
                values["turns"].append(rows.user_turns(read.example))
                values["ranks"] += item.ranks
                count += len(item.ranks)
                values["starts"].append(count)
                most = max(most, len(item.ranks))
                for ids, mask in item.sequences:
                    end += len(ids)
                    largest = max(largest, int(ids.max()))
                    values["offsets"].append(end)
                    out["tokens"].write(ids.data)
                    out["trained"].write(mask.data)
            _append(out, values)
            progress(counts["read"] + counts["in other splits"])
    written = json.dumps([*names, *(_sha256(directory / f"{name}.bin") for name in _ARRAYS)])
    meta = {
        "content": hashlib.sha256(written.encode()).hexdigest()[:32],
        "read_from": read_from,
        "files": [name for name, _ in files],
        "units": [unit for _, unit in files],
        "sources": list(names),
        "columns": [name for name in ("margin", "weight", "source") if name in columns],
        "largest_token": largest,
        "counts": _in_order(counts),
        "sides": most,
    }
    (directory / "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def _new(file: Path) -> BinaryIO:
    return file.open("wb")


def _append(out: dict[str, BinaryIO], values: dict[str, list]) -> None:
    for name, more in values.items():
        out[name].write(np.asarray(more, _ARRAYS[name]).tobytes())


def _items(
    chunk: list[_Read | None],
    data: Data,
    stage: str,
    tokenizer,
    counts: Counter[str],
    bad: BinaryIO,
) -> Iterator[tuple[_Read, Item]]:
    """The items that a chunk's rows make; counts every row, and lists the bad ones in `bad`."""
    own = [read for read in chunk if read]
    counts["read"] += len(own)
    counts["in other splits"] += len(chunk) - len(own)
    for read, sequences, problem in _encoded(own, stage, tokenizer, data.train_on):
        if problem and data.on_bad_row == "stop":
            raise _stop(problem)
        if problem:
            counts["bad rows, skipped"] += 1
            place = str(read.place)
            line = {"place": place, "problem": problem.removeprefix(f"{place}: ")}
            bad.write(json.dumps(line).encode() + b"\n")
            continue
        sequences, cut = with_prompt_cut(sequences, data, tokenizer.bos_token_id)
        whole = Item(sequences, read.example.ranks)
        items, changed = fit(whole, data.max_length, data.overlong)
        counts[cut] += bool(items)
        counts[changed] += 1
        counts["kept"] += bool(items)
        for item in items:
            less, thinner = thinned(item, data.max_responses)
            counts[thinner] += 1
            yield read, less


def _encoded(
    chunk: list[_Read], stage: str, tokenizer, train_on: str
) -> Iterator[tuple[_Read, list[Encoded], str]]:
    """The sequences of each row, or what is wrong with it."""
    sides = [
        (side, str(read.place)) for read in chunk if read.example for side in read.example.sides
    ]
    found = iter(encode_sides(tokenizer, sides, train_on))
    for read in chunk:
        if read.example is None:
            yield read, [], read.problem
            continue
        encoded = [next(found) for _ in read.example.sides]
        errors = [str(side) for side in encoded if isinstance(side, UserError)]
        yield read, encoded, errors[0] if errors else problem_of(encoded, read.example, stage)


def _in_order(counts: Counter[str]) -> dict[str, int]:
    """What was counted: rows read, those left out or changed where there are any, and rows kept."""
    ends = (
        "splits",
        "tokens, dropped",
        "tokens",
        "truncated",
        "split",
        "truncation, dropped",
        "left out",
        "responses",
        "skipped",
    )
    between = {why: n for end in ends for why, n in counts.items() if n and why.endswith(end)}
    return {"read": counts["read"]} | between | {"kept": counts["kept"]}
