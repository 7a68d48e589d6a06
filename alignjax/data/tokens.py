"""Tokenized data on disk: tokenized once, then mapped into memory by every later run.

The cache is keyed by the file's content, the tokenizer with its template, and every setting that
changes a token.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from alignjax.config import Data
from alignjax.data import rows
from alignjax.data.chat import encode_side
from alignjax.files import whole_directory
from alignjax.weights.safetensors import COMPANIONS

_VERSION = 1  # of what is stored; a change makes every cache anew


@dataclass(frozen=True)
class TokenSet:
    """Sequences back to back. Item i is `sides` sequences: (chosen, rejected), or one for SFT."""

    tokens: np.ndarray  # int32 [all tokens]
    trained: np.ndarray  # bool [all tokens]
    offsets: np.ndarray  # int64 [sequences + 1]
    lines: np.ndarray  # int64 [items], line of the file
    sides: int
    key: str  # what the tokens depend on
    file: str
    dropped: dict[str, int]  # reason -> rows

    def __len__(self) -> int:
        return len(self.lines)

    def lengths(self) -> np.ndarray:
        """Tokens of each item, all sides."""
        return np.diff(self.offsets).reshape(-1, self.sides).sum(1)

    def trained_counts(self) -> np.ndarray:
        """Trained tokens of each sequence, [items, sides]."""
        starts = np.concatenate([[0], np.cumsum(self.trained, dtype=np.int64)])
        return np.diff(starts[self.offsets]).reshape(-1, self.sides)


def examples(data: Data, stage: str, held_out: bool) -> Iterator[rows.Example]:
    """The rows of a split as examples of a stage, "sft" or "dpo", in the file's order."""
    path = Path(data.eval_path if held_out and data.eval_path else data.path)
    split = data.eval_split if held_out else data.split
    found = rows.read_jsonl(path)
    if not (held_out and data.eval_path):
        found = rows.in_split(found, split, held_out, data.eval_fraction)
    make = rows.pair_example if stage == "dpo" else rows.sft_example
    for line, row in found:
        yield make(line, row, data.strings, f"{path}, line {line}")


def token_set(
    data: Data,
    stage: str,
    held_out: bool,
    tokenizer,
    tokenizer_dir: Path,
    cache: Path,
    progress: Callable[[int], None] = lambda done: None,
) -> TokenSet:
    """Tokenizes a split, or finds it in the cache. `progress` is told how many rows are done."""
    key = _key(data, stage, held_out, tokenizer, tokenizer_dir)
    directory = cache / "tokens" / key
    if not directory.is_dir():
        _write(directory, data, stage, held_out, tokenizer, progress)
    meta = json.loads((directory / "meta.json").read_text())
    arrays = {
        name: np.load(directory / f"{name}.npy", mmap_mode="r")
        for name in ("tokens", "trained", "offsets", "lines")
    }
    return TokenSet(**arrays, key=key, **meta)


def _key(data: Data, stage: str, held_out: bool, tokenizer, tokenizer_dir: Path) -> str:
    path = Path(data.eval_path if held_out and data.eval_path else data.path)
    digest = hashlib.sha256()
    settings = [_VERSION, stage, held_out, bool(data.eval_path), tokenizer.chat_template]
    settings += [data.split, data.eval_split, data.eval_fraction, data.strings, data.train_on]
    settings += [data.max_length, data.overlong]
    digest.update(json.dumps(settings).encode())
    for file in [path, *(tokenizer_dir / name for name in COMPANIONS)]:
        if file.is_file():
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:32]


def _write(directory: Path, data: Data, stage: str, held_out: bool, tokenizer, progress) -> None:
    tokens, trained, lengths, lines = [], [], [], []
    dropped: Counter[str] = Counter()
    path = data.eval_path if held_out and data.eval_path else data.path
    for number, example in enumerate(examples(data, stage, held_out), 1):
        where = f"{path}, line {example.line}"
        sides = [encode_side(tokenizer, side, data.train_on, where) for side in example.sides]
        progress(number)
        truncated = False
        if stage == "sft" and data.overlong == "truncate":
            truncated = len(sides[0][0]) > data.max_length
            sides = [(ids[: data.max_length], mask[: data.max_length]) for ids, mask in sides]
        if any(len(ids) > data.max_length for ids, _ in sides):
            dropped[f"longer than {data.max_length} tokens"] += 1
        elif not all(any(mask[1:]) for _, mask in sides):
            dropped["no trained token"] += 1
        elif len(sides) == 2 and sides[0][0] == sides[1][0]:
            dropped["chosen equals rejected"] += 1
        else:
            lines.append(example.line)
            dropped["truncated (kept)"] += truncated
            for ids, mask in sides:
                tokens.append(np.asarray(ids, np.int32))
                # Nothing comes before a first token, so nothing can predict it.
                trained.append(np.asarray([False, *mask[1:]]))
                lengths.append(len(ids))
    with whole_directory(directory) as partial:
        arrays = {
            "tokens": np.concatenate([*tokens, np.zeros(0, np.int32)]),
            "trained": np.concatenate([*trained, np.zeros(0, bool)]),
            "offsets": np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64),
            "lines": np.asarray(lines, np.int64),
        }
        for name, array in arrays.items():
            np.save(partial / f"{name}.npy", array)
        meta = {"sides": 2 if stage == "dpo" else 1, "file": str(path), "dropped": dict(+dropped)}
        (partial / "meta.json").write_text(json.dumps(meta))
