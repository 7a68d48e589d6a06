"""Tokens of rows as memory-mapped arrays, and what is asked of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from alignjax.data.formats import Place


@dataclass(frozen=True)
class TokenSet:
    """Sequences back to back. Item i is those from `starts[i]` to before `starts[i + 1]`.

    It is one for SFT, (chosen, rejected) for a pair, and 2 or more from the best to the worst for a
    set. An SFT row longer than data.max_length can be several items.
    """

    tokens: np.ndarray  # int32 [all tokens]
    trained: np.ndarray  # bool [all tokens]
    offsets: np.ndarray  # int64 [sequences + 1]
    ranks: np.ndarray  # int32 [sequences], in their row, from 1; equally good ones share one
    starts: np.ndarray  # int64 [items + 1]
    file_index: np.ndarray  # int32 [items], which of `files` the row stands in
    lines: np.ndarray  # int64 [items], the row's number in it
    margin: np.ndarray  # float32 [items], 0 where the row has none
    weight: np.ndarray  # float32 [items], 1 where the row has none
    source: np.ndarray  # int32 [items], which of `sources` the row names
    part: np.ndarray  # int32 [items], which of the names in data.path gave the row
    turns: np.ndarray  # int32 [items], user turns of the prompt; 0 where it is plain text
    files: list[str]
    units: list[str]  # of each file: what its rows are called, "line" or "row"
    sources: list[str]  # "" where a row names none
    columns: list[str]  # those of margin, weight and source that rows have
    largest_token: int  # -1 where there is none
    counts: dict[str, int]  # rows read, left out by reason, changed, and kept
    sides: int  # sequences of an item, at most
    key: str  # a digest of the arrays and the sources
    bad_rows_file: Path | None = None  # {"place", "problem"} a line, where rows were skipped

    def __len__(self) -> int:
        return len(self.lines)

    def place(self, item: int) -> str:
        """Where an item's row stands, as in "FILE, line 3"."""
        file = self.file_index[item]
        return str(Place(self.files[file], int(self.lines[item]), self.units[file]))

    def lengths(self) -> np.ndarray:
        """Tokens of each item, all sides."""
        return np.diff(self.offsets[self.starts])

    def real(self) -> np.ndarray:
        """Whether an item has a side, bool [items, sides]."""
        return np.arange(self.sides) < np.diff(self.starts)[:, None]

    def by_item(self, values: np.ndarray) -> np.ndarray:
        """Values of the sequences as [items, sides], 0 where an item has fewer."""
        found = np.zeros((len(self), self.sides), values.dtype)
        found[self.real()] = values
        return found

    def pairs(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Every pair of two sides of which one is better: item, better side, worse side.

        They come in the order of the items, in parts, int64 [pairs of the part] each.
        """
        ranks_NS = self.by_item(self.ranks)
        for start in range(0, len(self), 1024):  # a set of 64 has 2,016
            ranks = ranks_NS[start : start + 1024]
            better = (ranks[:, :, None] > 0) & (ranks[:, :, None] < ranks[:, None])
            items, first, second = np.nonzero(better)
            yield start + items, first, second

    def trained_counts(self) -> np.ndarray:
        """Trained tokens of each sequence, [items, sides], 0 where an item has fewer."""
        counts = np.zeros(len(self.offsets) - 1, np.int64)
        for start in range(0, len(counts), 4096):  # a whole-array sum would take 8 bytes a token
            offsets = self.offsets[start : start + 4097]
            trained = self.trained[offsets[0] : offsets[-1]]
            before = np.concatenate([[0], np.cumsum(trained, dtype=np.int64)])
            counts[start : start + 4096] = np.diff(before[offsets - offsets[0]])
        return self.by_item(counts)


def in_memory(
    tokens: np.ndarray,
    trained: np.ndarray,
    offsets: np.ndarray,
    sides: int = 1,
    ranks: Sequence[Sequence[int]] | None = None,
    file: str = "(memory)",
    key: str = "",
) -> TokenSet:
    """Sequences as a cache of one file would give them, item i from its line i + 1.

    An item has `sides` of them, the best first, or as many as `ranks` names for each item.
    """
    items = (len(offsets) - 1) // sides if ranks is None else len(ranks)
    ranks = [range(1, sides + 1)] * items if ranks is None else ranks
    zeros = np.zeros(items, np.int32)
    return TokenSet(
        tokens=tokens,
        trained=trained,
        offsets=offsets,
        ranks=np.array([rank for own in ranks for rank in own], np.int32),
        starts=np.cumsum([0, *map(len, ranks)]),
        file_index=zeros,
        lines=np.arange(items) + 1,
        margin=zeros.astype(np.float32),
        weight=np.ones(items, np.float32),
        source=zeros,
        part=zeros,
        turns=zeros + 1,
        files=[file],
        units=["line"],
        sources=[""],
        columns=[],
        largest_token=int(np.max(tokens, initial=-1)),
        counts={"read": items, "kept": items},
        sides=sides,
        key=key,
    )
