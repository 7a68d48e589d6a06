"""What there is to show of a planned run, read from its batches: values alone, no markup.

S sides of an item (chosen and rejected, one, or at most so many of a set).
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple

import numpy as np

from alignjax import evaluation
from alignjax.data.batches import PackedBatch, packed_steps
from alignjax.data.packing import plan_scoring
from alignjax.data.summary import count_rows
from alignjax.data.tokenset import TokenSet
from alignjax.inspection.pieces import token_reader
from alignjax.run import Run, described

BINS = 12  # of a histogram, at most
BAD_ROWS = 5  # shown of each set

Reader = Callable[[np.ndarray], list[str]]  # a sequence's ids -> the text of each token


class Token(NamedTuple):
    id: int
    text: str
    position: int  # in its sequence, from 0
    trained: bool


class Sequence(NamedTuple):
    segment: int  # its number in the row, from 1
    name: str  # what a user calls it: "pair 2, chosen"
    place: str  # of its row in the data: "FILE, line 3"
    tokens: list[Token]

    def heading(self, marked: str) -> str:
        """`marked` is what the trained tokens are called."""
        trained = sum(token.trained for token in self.tokens)
        return (
            f"segment {self.segment}: {self.name} - {len(self.tokens)} tokens, {trained} {marked} "
            f"- {self.place}"
        )

    def side(self) -> str:
        """Of a pair, "chosen" or "rejected"; else empty."""
        return self.name.partition(", ")[2]


class Row(NamedTuple):
    """A packed row, or one example alone."""

    title: str
    sequences: list[Sequence]
    padding: int  # tokens

    def heading(self) -> str:
        tokens = sum(len(sequence.tokens) for sequence in self.sequences)
        padding = f", {self.padding} tokens of padding" if self.padding else ""
        return f"{self.title}: {tokens} tokens{padding}"


class Histogram(NamedTuple):
    title: str
    edges: np.ndarray  # int64 [bins + 1]; a bin holds what is at least its edge, below the next
    counts: dict[str, np.ndarray]  # what a user calls the sequences -> int64 [bins]
    middles: dict[str, str]  # of the same: mean, median and the largest, in words


@dataclass(frozen=True)
class Contents:
    """All that is shown of a run but the first batch's loss."""

    title: str
    marked: str  # what a coloured token is: "trained", or "in the answer"
    lines: list[str]
    counts: dict[str, list[str]]  # rows read, kept and left out, of each of `sets`
    sets: list[str]
    bad_rows: list[str]  # "FILE, line 3: problem"
    histograms: list[Histogram]
    rows: list[Row]
    extremes: list[Row]


def contents(run: Run, rows: int) -> Contents:
    """What a run trains on, with the first `rows` packed rows in the order of training."""
    read = token_reader(run.tokenizer)
    lengths = run.train.lengths()
    largest, smallest = int(lengths.argmax()), int(lengths.argmin())
    lines, marked = described(run), "trained"
    if run.stage.unit == "pairs":
        longer = evaluation.longer_wins(run.train)
        lines.append(f'"the longer answer wins" is right in {longer:.1%} of the training pairs')
    if run.train.sides > 2:
        counts = np.diff(run.train.starts)
        pairs = sum(len(items) for items, _, _ in run.train.pairs())
        lines.append(
            f"a set has {counts.min()} to {counts.max()} responses, {counts.mean():.1f} on "
            f"average; all sets make {pairs:,} pairs"
        )
    if run.stage.name == "rm":
        marked = "in the answer"
        lines.append("a reward is read at the last token of a sequence, and all of it is trained")
    return Contents(
        title=f"{run.config.name}: what is trained",
        marked=marked,
        lines=lines,
        counts=count_rows(run.sets()),
        sets=list(run.sets()),
        bad_rows=[line for part in run.sets().values() for line in _bad_rows(part)],
        histograms=_histograms(run.train),
        rows=list(islice(packed_rows(run, read), rows)),
        extremes=[
            _alone(run, read, largest, "the largest"),
            _alone(run, read, smallest, "the smallest"),
        ],
    )


def packed_rows(run: Run, read: Reader):
    """Every row of training in its order, as the batches hold it."""
    steps = replace(run.steps, local=np.arange(run.rows))
    for step in range(len(steps)):
        first, end = steps.plan.steps[step : step + 2]
        batch = steps[step]
        flat = PackedBatch(*(array.reshape(-1, *array.shape[2:]) for array in batch))
        for i in range(end - first):
            title = f"step {step + 1}, row {i + 1} of {end - first}"
            yield _row(run, read, PackedBatch(*(array[i] for array in flat)), title)


def _alone(run: Run, read: Reader, item: int, title: str) -> Row:
    """An item as a batch of it alone holds it."""
    plan = plan_scoring(run.train.lengths(), int(run.train.lengths()[item]), 1, [item])
    batch = packed_steps(run.train, plan, 1)[0]
    return _row(run, read, PackedBatch(*(array[0, 0] for array in batch)), title)


def _row(run: Run, read: Reader, row: PackedBatch, title: str) -> Row:
    trained = np.zeros(len(row.tokens), bool)
    trained[row.targets[row.targets > 0]] = True
    sequences = []
    for segment in range(1, int(row.segments.max()) + 1):
        here = row.segments == segment
        if not here.any():  # of a set that has fewer
            continue
        place, side = divmod(segment - 1, run.train.sides)
        ids = row.tokens[here]
        columns = (ids.tolist(), read(ids), row.positions[here].tolist(), trained[here].tolist())
        name = _name(run, row, place, side)
        where = run.train.place(int(row.items[place]) - 1)
        tokens = [Token(*values) for values in zip(*columns, strict=True)]
        sequences.append(Sequence(segment, name, where, tokens))
    return Row(title, sequences, int((row.segments == 0).sum()))


def _name(run: Run, row: PackedBatch, place: int, side: int) -> str:
    """What a user calls a sequence of a row."""
    match run.train.sides:
        case 1:
            return f"sequence {place + 1}"
        case 2:
            return f"pair {place + 1}, {_PAIR[side]}"
        case _:
            rank, count = row.rank[place, side], (row.rank[place] > 0).sum()
            return f"set {place + 1}, response {side + 1} of {count} (rank {rank})"


_PAIR = ("chosen", "rejected")


def _histograms(data: TokenSet) -> list[Histogram]:
    """Of each side of pairs; of all sequences else."""
    names = _PAIR if data.sides == 2 else ("responses" if data.sides > 2 else "sequences",)
    real_NS = data.real()
    lengths_SN, trained_SN = (
        values_NS.T if data.sides == 2 else values_NS[real_NS][None]
        for values_NS in (data.by_item(np.diff(data.offsets)), data.trained_counts())
    )
    return [
        _histogram("tokens of a sequence", lengths_SN, names),
        _histogram("trained tokens of a sequence", trained_SN, names),
    ]


def _histogram(title: str, values_SN: np.ndarray, names: tuple[str, ...]) -> Histogram:
    low, high = int(values_SN.min()), int(values_SN.max())
    widths = (step * 10**power for power in range(10) for step in (1, 2, 5))
    width = next(width for width in widths if high // width - low // width < BINS)
    edges = np.arange(low // width, high // width + 2) * width
    columns = dict(zip(names, values_SN, strict=True))
    return Histogram(
        title,
        edges,
        {name: np.histogram(values, edges)[0] for name, values in columns.items()},
        {
            name: f"mean {values.mean():.0f}, median {np.median(values):.0f}, "
            f"largest {values.max()}"
            for name, values in columns.items()
        },
    )


def _bad_rows(part: TokenSet) -> list[str]:
    """What is wrong with the first of the rows that were skipped, and where all are listed."""
    if not part.bad_rows_file:
        return []
    lines = part.bad_rows_file.read_text(encoding="utf-8").splitlines()
    shown = (json.loads(line) for line in lines[:BAD_ROWS])
    found = ["{place}: {problem}".format(**line) for line in shown]
    more = len(lines) - len(found)
    return found + ([f"and {more} more, listed in {part.bad_rows_file}"] if more else [])
