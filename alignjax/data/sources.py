"""What `data.path` names -> rows: files, globs, directories, saved datasets, datasets of a hub.

A source either has splits of its own, one of which is read, or its rows are divided: by their
`split` column where the first row has one, else by a hash of the prompt.
"""

import glob
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import TypedDict

from alignjax.config import Data
from alignjax.data import formats
from alignjax.data.columns import label
from alignjax.data.formats import Place, Record, first_line
from alignjax.data.splits import choose_split, hash01, may_divide, must_exist, no_split
from alignjax.errors import UserError
from alignjax.files import read_json

_ABOUT_DATA = ("dataset_info.json", "dataset_infos.json")  # of a hub's dataset; they hold no rows
_OTHER_DATA = (".csv", ".tsv", ".txt", ".xml", ".zst", ".xz", ".bz2", ".zip", ".tar")
_SHARD = re.compile(r"-\d{5}-of-")  # behind a split's name, as in train-00000-of-00003.parquet
_SPLIT_WORD = re.compile(r"(train(ing)?|val(id(ation)?)?|dev|test(ing)?|eval(uation)?)(?![a-z])")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?")


@dataclass(frozen=True)
class Row:
    place: Place
    values: dict | None  # None where it cannot be read
    problem: str  # "", or the whole sentence, which begins with the place
    in_split: bool  # whether it belongs to the split that was asked for
    part: int  # which of the path's names it comes from, counted from 0


@dataclass(frozen=True)
class _Source:
    """A file, or one split of a dataset."""

    name: str  # as the places of its rows have it
    records: Callable[[int], Iterator[Record]]  # given what a row may have, bytes
    identity: Callable[[], str]  # of the content
    own_split: bool  # the source's own split: every row of it is in


def title(data: Data, held_out: bool) -> str:
    """The path as the user gave it."""
    return data.eval_path if held_out and data.eval_path else data.path


def check(data: Data, parts: Sequence[bool] = (False, True)) -> None:
    """Raises UserError where a name in `data` stands for nothing; `parts` as for `unread`."""
    for held_out in parts:
        _sources(data, held_out)


def described(data: Data, held_out: bool) -> tuple[str, list[str]]:
    """What rows are read from: a SHA-256 of its content, and what the sources are called, in order.

    The content is all that decides the rows: files, their formats, order and parts. The names, and
    the settings that divide rows into splits, are not part of it.
    """
    found = _sources(data, held_out)
    parts = [(part, source.own_split, source.identity()) for part, source in found]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return digest, [source.name for _, source in found]


def read(data: Data, held_out: bool) -> Iterator[Row]:
    """Every row of what `data` names, in a fixed order, in a stream.

    A row that cannot be read is passed on once, with the training rows unless the held-out rows
    come from elsewhere. Raises UserError for what has no rows, and for damage of a whole file.
    """
    from_elsewhere = held_out and bool(data.eval_path)
    wanted = data.eval_split if held_out else data.split
    first: tuple[Place, bool] | None = None  # the first divided row, and whether it has a `split`
    others: set[str] = set()  # splits that rows name and that were not asked for
    found = False
    share = data.eval_fraction if may_divide(data) else 0.0
    for part, source in _sources(data, held_out):
        empty = True
        for place, values, problem in source.records(data.max_row_bytes):
            empty = False
            if values is None or source.own_split or from_elsewhere:
                in_split = source.own_split or from_elsewhere or not held_out
                yield Row(place, values, problem, in_split, part)
                continue
            try:
                split = label(values, "split", place)
                first = first or (place, split is not None)
                _check_even(place, split, *first)
            except UserError as error:
                yield Row(place, None, str(error), not held_out, part)
                continue
            if split is None:
                in_split = (hash01(values) < share) == held_out
            else:
                in_split = split == wanted
                if len(others) < 10 and not in_split:
                    others.add(split)
            found |= in_split
            yield Row(place, values, "", in_split, part)
        if empty:
            raise UserError(f"{source.name}: it holds no rows.")
    if first and first[1] and not found and must_exist(data, held_out):
        raise no_split(title(data, held_out), wanted, sorted(others), held_out)


def _check_even(place: Place, split: str | None, first: Place, first_has_split: bool) -> None:
    if (split is not None) != first_has_split:
        has, other = ("no `split`", "has one") if first_has_split else ("a `split`", "has none")
        raise UserError(
            f"{place}: the row has {has}, and the first row ({first}) {other}; give every row one, "
            "or none."
        )


# What a path names


def _sources(data: Data, held_out: bool) -> list[tuple[int, _Source]]:
    """What the path's names stand for, each with the number of its name."""
    key = "data.eval_path" if held_out and data.eval_path else "data.path"
    names = path_names(title(data, held_out))
    if not names:
        raise UserError(f"{key} is empty: name a file, directory or dataset of rows.")
    return [
        (part, source)
        for part, name in enumerate(names)
        for source in _resolve(name, key, data, held_out)
    ]


def path_names(path: str) -> list[str]:
    """The names that a path lists."""
    return [path] if _exists(path) else [name.strip() for name in path.split(",") if name.strip()]


def _exists(path: str) -> bool:
    try:
        return Path(os.path.expanduser(path)).exists()
    except OSError:  # many names with commas between can be too long for one
        return False


def unread(data: Data, parts: Sequence[bool] = (False, True)) -> list[str]:
    """Files in directories that `data` names which look like data and of which no row is read.

    Their format is not read, or their names tell a split that was not asked for. `parts` are the
    values of `held_out` that are read.
    """
    found = []
    for path in dict.fromkeys(title(data, held_out) for held_out in parts):
        for directory in (Path(os.path.expanduser(name)) for name in path_names(path)):
            if not directory.is_dir() or _is_saved(directory):
                continue
            taken = {
                file
                for held_out in parts
                if title(data, held_out) == path
                for file, _ in _chosen_files(directory, data, held_out)
            }
            found += [
                str(file)
                for file in sorted([*directory.glob("*"), *directory.glob("data/*")])
                if file not in taken and _looks_like_data(file)
            ]
    return found


def _looks_like_data(file: Path) -> bool:
    known = formats.kind(file) or file.suffix.lower() in _OTHER_DATA
    return bool(known) and file.is_file() and file.name not in _ABOUT_DATA


def _resolve(name: str, key: str, data: Data, held_out: bool) -> list[_Source]:
    path = Path(os.path.expanduser(name))  # which leaves a user that does not exist
    if path.is_dir():
        return _directory(path, data, held_out)
    if path.is_file():
        return [_file(path)]
    if path.exists():  # a pipe or a device may have no end
        raise UserError(f"{key}={name}: this is no regular file; name a file or a directory.")
    if glob.has_magic(name):
        matches = [Path(m) for m in sorted(glob.glob(str(path), recursive=True))]
        if files := [match for match in matches if match.is_file()]:
            return [_file(file) for file in files]
        raise UserError(f"{key}={name}: no file matches.")
    if _HUB_NAME.fullmatch(name) and not formats.kind(path):
        return _hub(name, key, data, held_out)
    raise UserError(f"{key}={name}: there is no such file or directory.")


def _file(file: Path, own_split: bool = False) -> _Source:
    def identity() -> str:
        return f"{formats.kind(file)} {_content(file)}"

    return _Source(str(file), partial(formats.records, file), identity, own_split)


def _content(file: Path) -> str:
    """SHA-256 of a file, read once for training and held-out rows."""
    try:
        stat = file.stat()
        return _content_then(file, stat.st_mtime_ns, stat.st_size)
    except OSError as error:
        raise UserError(f"{file}: it cannot be read ({first_line(error)}).") from None


@lru_cache
def _content_then(file: Path, mtime_ns: int, size: int) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _directory(directory: Path, data: Data, held_out: bool) -> list[_Source]:
    """A saved dataset, or a directory of data files, whose names may tell splits."""
    if (directory / "state.json").is_file():
        return [_saved(directory, False)]
    if _is_saved(directory):
        splits = read_json(directory / "dataset_dict.json", _Saved).get("splits", [])
        split, own = choose_split(str(directory), splits, data, held_out)
        return [_saved(directory / split, own)] if split else []
    return [_file(file, own) for file, own in _chosen_files(directory, data, held_out)]


def _is_saved(directory: Path) -> bool:
    return any((directory / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _chosen_files(directory: Path, data: Data, held_out: bool) -> list[tuple[Path, bool]]:
    """The files of a directory to read, and whether a file is a split of its own."""
    files = _data_files(directory) or _data_files(directory / "data")
    if not files:
        raise UserError(
            f"{directory}: the directory holds no data files ({', '.join(formats.KINDS)}, or those "
            "with .gz), nor does its data/; name the files, such as "
            f"'{directory}/*/*.parquet'."
        )
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(_split_name(file), []).append(file)
    names = {data.split, data.eval_split}
    if len(splits) == 1 or not any(s in names or _SPLIT_WORD.match(s) for s in splits):
        read, own = list(splits), False
    else:
        split, own = choose_split(str(directory), list(splits), data, held_out)
        read = [split] if split else []
    for split in read:
        forms = {_form(file): file.name for file in splits[split]}
        if len(forms) > 1:
            raise UserError(
                f"{directory}: {' and '.join(forms.values())} hold the same rows by their names; "
                "keep those of one kind, or name the files to read."
            )
    return [(file, own) for file in files if _split_name(file) in read]


def _data_files(directory: Path) -> list[Path]:
    return [
        file
        for file in sorted(directory.glob("*"))
        if file.is_file()
        and formats.kind(file)
        and not file.name.startswith(".")
        and file.name not in _ABOUT_DATA
    ]


def _form(file: Path) -> tuple[str, str]:
    """A file's suffixes, and of how many files it is one: alike for those of one split."""
    count = re.search(r"-of-\d{5}", file.name)
    return "".join(file.suffixes), count[0] if count else ""


def _split_name(file: Path) -> str:
    """What a file's name says before its suffixes and its number among others."""
    stem = Path(file.name[:-3] if file.name.lower().endswith(".gz") else file.name).stem
    return _SHARD.split(stem)[0]


# Datasets


class _Saved(TypedDict):
    """What dataset_dict.json and the state.json of each of its splits hold."""

    splits: list[str]
    _data_files: list[dict[str, str]]


def _saved(directory: Path, own_split: bool) -> _Source:
    """What `Dataset.save_to_disk` wrote: Arrow files that its state.json names in order."""

    def files() -> Iterator[Path]:
        state = directory / "state.json"
        for shard in read_json(state, _Saved).get("_data_files") or [{}]:
            file = directory / shard.get("filename", "")
            if file.parent != directory or ".." in file.name or not file.is_file():
                name = shard.get("filename")
                raise UserError(f"{state}: {name!r} is no file of this dataset; save it again.")
            yield file

    def records(most: int) -> Iterator[Record]:
        batches = chain.from_iterable(map(formats.arrow, files()))
        return formats.numbered(str(directory), batches, most)

    def identity() -> str:
        return " ".join(map(_content, files()))

    return _Source(str(directory), records, identity, own_split)


def _hub(name: str, key: str, data: Data, held_out: bool) -> list[_Source]:
    """A split of a hub's dataset, ORG/NAME or ORG/NAME:SUBSET."""
    wanted = data.eval_split if held_out else data.split
    first = (
        data.eval_split if may_divide(data) else wanted
    )  # whether it exists decides how rows divide
    dataset, splits = _load(name, key, first)
    split, own = wanted, True
    if dataset is None:
        split, own = choose_split(name, splits, data, held_out)
    if not split:
        return []
    if split != first:
        dataset, splits = _load(name, key, split)
    if dataset is None:
        raise no_split(name, split, splits, held_out)
    place = f"{name}, split {split}"

    def identity() -> str:
        return f"{split} {dataset._fingerprint}"

    def records(most: int) -> Iterator[Record]:
        tables = dataset.with_format("arrow").iter(1000)  # which decodes no column
        batches = chain.from_iterable(table.to_batches() for table in tables)
        pairs = ((batch.schema, formats.checked(batch)) for batch in batches)
        return formats.numbered(place, pairs, most)

    return [_Source(place, records, identity, own)]


def _load(name: str, key: str, split: str) -> tuple[object | None, list[str]]:
    """A split of a hub's dataset; or, where there is none, the splits that there are."""
    import datasets

    repository, _, subset = name.partition(":")
    try:
        return datasets.load_dataset(repository, subset or None, split=split), []
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        unknown = re.match(r"Unknown split .* Should be one of \[(.*)\]", str(error))
        if unknown:
            return None, re.findall(r"'([^']*)'", unknown[1])
        raise UserError(
            f"{key}={name}: there is no such file here, and the hub's dataset does not load "
            f"({first_line(error)})."
        ) from None
