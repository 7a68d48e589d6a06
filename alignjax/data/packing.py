"""Which items share a row, and which rows make a step: computed over all lengths before training.

The plan depends on the data's lengths, the batch settings and the seed alone, so a step's data is a
function of (seed, step) on any number of devices and hosts.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from alignjax.config import Batch
from alignjax.errors import UserError

MOST_ITEMS = 1 << 28  # of a plan, which takes 30 bytes for each
_SLAB = 1 << 20  # items sorted at one time where steps are packed by themselves


@dataclass(frozen=True)
class Plan:
    """Items in the order of the rows, rows in the order of the steps."""

    items: np.ndarray  # int64 [placed items]
    rows: np.ndarray  # int64 [rows + 1], where each row's items begin
    steps: np.ndarray  # int64 [steps + 1], where each step's rows begin
    row_length: int

    def __len__(self) -> int:
        return len(self.steps) - 1

    def row_items(self, row: int) -> np.ndarray:
        return self.items[self.rows[row] : self.rows[row + 1]]

    def step_items(self, step: int) -> np.ndarray:
        return self.items[self.rows[self.steps[step]] : self.rows[self.steps[step + 1]]]

    def most_rows(self) -> int:
        """Rows of the step that has most."""
        return int(np.diff(self.steps).max())

    def most_items(self) -> int:
        """Items of the row that has most."""
        return int(np.diff(self.rows).max())


def best_fit(
    lengths: np.ndarray, capacity: int, per_step: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Packs items into rows of `capacity`: longest first, each into the fullest row that takes it.

    Returns the items row after row, how many each row has, and how many rows each step has. With
    `per_step` = N each N items in succession are a step, packed by itself; else all are one. Every
    length must be from 1 to `capacity`.
    """
    assert not len(lengths) or (lengths.min() > 0 and lengths.max() <= capacity)
    step_of = np.arange(len(lengths)) // (per_step or max(1, len(lengths)))
    keys = step_of * (capacity + 1) + capacity - lengths
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.diff(keys[order], prepend=-1))
    first = order[starts]
    counts = np.diff(starts, append=len(lengths))
    runs = zip(step_of[first].tolist(), lengths[first].tolist(), counts.tolist(), strict=True)
    row_of, step_rows = _walk(runs, capacity)
    return order[np.argsort(row_of, kind="stable")], np.bincount(row_of), step_rows


def _walk(runs: Iterable[tuple[int, int, int]], capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """The row of every item, and the rows of every step, for runs (step, length, count).

    A run is of items of one length: the fullest row that takes one of them takes as many as fit,
    because what it has left stays the least space that is enough. The fullest row is found by one
    look into a bit set of the free spaces that exist; of several the one filled last is taken.
    """
    row_of: list[int] = []
    begins: list[int] = []
    current, rows = -1, 0
    open_rows: dict[int, list[int]] = {}  # free space -> rows of this step that have it
    spaces = 0  # bit f is set where some row has f free
    for step, length, count in runs:
        if step != current:
            current, open_rows, spaces = step, {}, 0
            begins.append(rows)
        while count:
            enough = spaces >> length
            if enough:
                space = length + (enough & -enough).bit_length() - 1
                row = open_rows[space].pop()
                if not open_rows[space]:
                    spaces ^= 1 << space
            else:
                space, row = capacity, rows
                rows += 1
            taken = min(count, space // length)
            row_of += [row] * taken
            count -= taken
            left = space - taken * length
            if left:
                open_rows.setdefault(left, []).append(row)
                spaces |= 1 << left
    return np.array(row_of, np.int64), np.diff(begins, append=rows)


def plan_training(
    lengths: np.ndarray, batch: Batch, seed: int, epoch_items: np.ndarray | None = None
) -> Plan:
    """The plan of a whole run over `epoch_items`, int64 [m], or over every item once an epoch.

    With `batch.pairs` or `batch.sequences` = N, every epoch is shuffled, the epochs follow each
    other as one stream, and each N of it make a step, packed within the step; the last step of the
    run takes what is left. With `batch.rows` = N every epoch is shuffled and packed as a whole, and
    each N of the shuffled rows make a step.
    """
    per_step = batch.pairs or batch.sequences
    pool = np.arange(len(lengths)) if epoch_items is None else epoch_items
    items, sizes, step_rows = [], [], []
    # No more epochs are drawn than max_steps takes; with batch.rows a row has one item at least.
    wanted = min(batch.epochs * len(pool), batch.max_steps * (per_step or batch.rows) or np.inf)
    if wanted > MOST_ITEMS:
        raise UserError(
            f"batch.epochs={batch.epochs} of {len(pool):,} items are {wanted:,} to plan, over "
            f"{MOST_ITEMS:,}: lower it, or set batch.max_steps."
        )
    if per_step:
        epochs = -(-wanted // max(1, len(pool)))
        stream = _joined([_rng(seed, epoch).permutation(pool) for epoch in range(epochs)])[:wanted]
        slab = per_step * max(1, _SLAB // per_step)
        for start in range(0, len(stream), slab):
            ids = stream[start : start + slab]
            packed, packed_sizes, packed_rows = best_fit(lengths[ids], batch.row_length, per_step)
            items.append(ids[packed])
            sizes.append(packed_sizes)
            step_rows.append(packed_rows)
        return _plan(_joined(items), _joined(sizes), _joined(step_rows), batch.row_length)
    for epoch in range(batch.epochs):
        rng = _rng(seed, epoch)
        ids = rng.permutation(pool)
        packed, packed_sizes, _ = best_fit(lengths[ids], batch.row_length)
        rows = rng.permutation(len(packed_sizes))
        items.append(ids[packed[_items_of(rows, packed_sizes)]])
        sizes.append(packed_sizes[rows])
        if batch.max_steps and sum(map(len, sizes)) >= batch.max_steps * batch.rows:
            break
    sizes = _joined(sizes)
    step_rows = _steps_of(len(sizes), batch.rows)
    if batch.max_steps:
        step_rows = step_rows[: batch.max_steps]
    return _plan(_joined(items), sizes, step_rows, batch.row_length)


def plan_scoring(lengths: np.ndarray, row_length: int, rows_a_step: int, ids=None) -> Plan:
    """Every item once (or those of `ids`), in as few rows as can be, `rows_a_step` rows a step."""
    ids = np.arange(len(lengths)) if ids is None else np.asarray(ids)
    packed, sizes, _ = best_fit(lengths[ids], row_length)
    return _plan(ids[packed], sizes, _steps_of(len(sizes), rows_a_step), row_length)


def _rng(seed: int, epoch: int) -> np.random.Generator:
    return np.random.default_rng([seed, epoch])


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.int64), *parts])


def _items_of(rows: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Where the items of `rows` stand, row after row, among rows of `sizes` items."""
    counts = sizes[rows]
    shift = (np.cumsum(sizes) - sizes)[rows] - (np.cumsum(counts) - counts)
    return np.repeat(shift, counts) + np.arange(counts.sum())


def _steps_of(rows: int, per_step: int) -> np.ndarray:
    """Rows of each step where each `per_step` rows make one; the last takes what is left."""
    return np.diff(np.arange(0, rows, per_step), append=rows)


def _plan(items: np.ndarray, sizes: np.ndarray, step_rows: np.ndarray, row_length: int) -> Plan:
    """The plan of steps of `step_rows` rows of `sizes` items; what lies behind them is left out."""
    steps = _joined([[0], np.cumsum(step_rows)])
    rows = _joined([[0], np.cumsum(sizes[: steps[-1]])])
    return Plan(items[: rows[-1]], rows, steps, row_length)
