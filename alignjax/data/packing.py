"""Which items share a row, and which rows make a step: computed over all lengths before training.

The plan depends on the data's lengths, the batch settings and the seed alone, so a step's data is a
function of (seed, step) on any number of devices and hosts.
"""

from dataclasses import dataclass

import numpy as np

from alignjax.config import Batch


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


def best_fit(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Packs items into rows of `capacity`: longest first, each into the fullest row that takes it.

    Best-fit decreasing; O(n) dictionary work plus one lookup in a bit set of the free spaces that
    exist. Every length must be at most `capacity`.
    """
    open_rows: dict[int, list[int]] = {}  # free space -> rows that have it
    spaces = 0  # bit f is set where some row has f free
    packed: list[list[int]] = []
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        enough = spaces >> length
        if enough:
            space = length + (enough & -enough).bit_length() - 1
            row = open_rows[space].pop()
            if not open_rows[space]:
                spaces &= ~(1 << space)
        else:
            space, row = capacity, len(packed)
            packed.append([])
        packed[row].append(item)
        left = space - length
        if left:
            open_rows.setdefault(left, []).append(row)
            spaces |= 1 << left
    return packed


def plan_training(lengths: np.ndarray, batch: Batch, seed: int) -> Plan:
    """The plan of a whole run.

    With `batch.pairs` or `batch.sequences` = N, every epoch is shuffled, the epochs follow each
    other as one stream, and each N of it make a step, packed within the step; the last step of the
    run takes what is left. With `batch.rows` = N every epoch is shuffled and packed as a whole, and
    each N of the shuffled rows make a step.
    """
    per_step = batch.pairs or batch.sequences
    packed_steps: list[list[list[int]]] = []
    if per_step:
        stream = np.concatenate(
            [_rng(seed, epoch).permutation(len(lengths)) for epoch in range(batch.epochs)]
        )
        for start in range(0, len(stream), per_step):
            ids = stream[start : start + per_step]
            rows = best_fit(lengths[ids], batch.row_length)
            packed_steps.append([ids[row].tolist() for row in rows])
    else:
        rows = []
        for epoch in range(batch.epochs):
            rng = _rng(seed, epoch)
            ids = rng.permutation(len(lengths))
            packed = best_fit(lengths[ids], batch.row_length)
            rows += [ids[packed[i]].tolist() for i in rng.permutation(len(packed))]
        packed_steps = [rows[i : i + batch.rows] for i in range(0, len(rows), batch.rows)]
    if batch.max_steps:
        packed_steps = packed_steps[: batch.max_steps]
    return _plan(packed_steps, batch.row_length)


def plan_scoring(lengths: np.ndarray, row_length: int, rows_a_step: int, ids=None) -> Plan:
    """Every item once (or those of `ids`), in as few rows as can be, `rows_a_step` rows a step."""
    ids = np.arange(len(lengths)) if ids is None else np.asarray(ids)
    rows = [ids[row].tolist() for row in best_fit(lengths[ids], row_length)]
    return _plan([rows[i : i + rows_a_step] for i in range(0, len(rows), rows_a_step)], row_length)


def _rng(seed: int, epoch: int) -> np.random.Generator:
    return np.random.default_rng([seed, epoch])


def _plan(packed_steps: list[list[list[int]]], row_length: int) -> Plan:
    rows = [row for step in packed_steps for row in step]
    return Plan(
        items=np.asarray([item for row in rows for item in row], np.int64),
        rows=np.cumsum([0] + [len(row) for row in rows]),
        steps=np.cumsum([0] + [len(step) for step in packed_steps]),
        row_length=row_length,
    )
