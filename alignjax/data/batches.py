"""A plan's steps as arrays, read by Grain: the only state of the data is the step.

A micro-batches of a step, B rows of a micro-batch, T tokens of a row, M trained tokens of a row, P
items of a row, S sides of an item (chosen and rejected, one, or at most so many of a set).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import grain
import numpy as np

from alignjax.data.packing import Plan
from alignjax.data.tokenset import TokenSet


class PackedBatch(NamedTuple):
    """Packed rows; leading dimensions [A, B] on the mesh, [B] inside a step.

    On the host B counts only the rows that belong to the process.

    The item in place p of a row has the segments S p + 1 ... S p + S, the best before the worst;
    the last of these are of no token where it has fewer sides.
    """

    tokens: np.ndarray  # int32 [T]
    positions: np.ndarray  # int32 [T], restart with each sequence
    segments: np.ndarray  # int32 [T], a number per sequence from 1; 0 is padding
    targets: np.ndarray  # int32 [M], places of the trained tokens; 0 = none (nothing precedes it)
    items: np.ndarray  # int32 [P], item number + 1; 0 = none
    ref: np.ndarray  # float32 [P, S], log-probs of the sequences under the reference
    margin: np.ndarray  # float32 [P], by which the chosen side should be ahead
    weight: np.ndarray  # float32 [P], of the item in the loss
    rank: np.ndarray  # int32 [P, S], of the side, the best has the least; 0 = there is none


@dataclass(frozen=True)
class PackedSteps:
    """Random access to the batches of a plan, for Grain. `ref` is [items, S], or None."""

    data: TokenSet
    plan: Plan
    rows: int  # of a micro-batch, over all processes
    local: np.ndarray  # of those, the ones that this process reads
    targets: int
    ref: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, step: int) -> PackedBatch:
        micro = -(-self.plan.most_rows() // self.rows)
        lead = (micro, len(self.local))
        length, places, sides = self.plan.row_length, self.plan.most_items(), self.data.sides
        batch = PackedBatch(
            tokens=np.zeros((*lead, length), np.int32),
            positions=np.zeros((*lead, length), np.int32),
            segments=np.zeros((*lead, length), np.int32),
            targets=np.zeros((*lead, self.targets), np.int32),
            items=np.zeros((*lead, places), np.int32),
            ref=np.zeros((*lead, places, sides), np.float32),
            margin=np.zeros((*lead, places), np.float32),
            weight=np.zeros((*lead, places), np.float32),
            rank=np.zeros((*lead, places, sides), np.int32),
        )
        first, end = self.plan.steps[step : step + 2]
        for i in range(micro):
            for j, row in enumerate(first + i * self.rows + self.local):
                if row < end:
                    part = PackedBatch(*(array[i, j] for array in batch))
                    self._fill(part, self.plan.row_items(row))
        return batch

    def _fill(self, row: PackedBatch, items: np.ndarray) -> None:
        at, trained, sides = 0, [], self.data.sides
        for place, item in enumerate(items):
            row.items[place] = item + 1
            row.margin[place] = self.data.margin[item]
            row.weight[place] = self.data.weight[item]
            if self.ref is not None:
                row.ref[place] = self.ref[item]
            first, behind = self.data.starts[item : item + 2]
            row.rank[place, : behind - first] = self.data.ranks[first:behind]
            for side in range(behind - first):
                start, end = self.data.offsets[first + side :][:2]
                here = slice(at, at + end - start)
                row.tokens[here] = self.data.tokens[start:end]
                row.positions[here] = np.arange(end - start)
                row.segments[here] = sides * place + side + 1
                trained.append(at + np.flatnonzero(self.data.trained[start:end]))
                at += end - start
        found = np.concatenate(trained)
        row.targets[: len(found)] = found

    def items(self, step: int) -> np.ndarray:
        """Item number + 1 of every place of the step, 0 = none, on every process: [A B, P]."""
        first, end = self.plan.steps[step : step + 2]
        rows = -(-self.plan.most_rows() // self.rows) * self.rows
        found = np.zeros((rows, self.plan.most_items()), np.int64)
        for i, row in enumerate(range(first, end)):
            items = self.plan.row_items(row)
            found[i, : len(items)] = items + 1
        return found

    def micro_batches(self, step: int) -> int:
        """Micro-batches of a step that hold rows; the others are padding and are not run."""
        return int(-(-(self.plan.steps[step + 1] - self.plan.steps[step]) // self.rows))

    def useful_tokens(self) -> np.ndarray:
        """Tokens of each step that are not padding, int64 [steps]."""
        per_item = np.concatenate([[0], np.cumsum(self.data.lengths()[self.plan.items])])
        return np.diff(per_item[self.plan.rows[self.plan.steps]])

    def read(self, start: int = 0) -> Iterator[PackedBatch]:
        """Batches of the steps from `start` on, made ahead in a thread."""
        ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        return iter(grain.MapDataset.source(self)[start:].to_iter_dataset(ahead))


def packed_steps(
    data: TokenSet, plan: Plan, rows: int, ref: np.ndarray | None = None, local=None
) -> PackedSteps:
    """Batches of a plan in micro-batches of `rows`, with room for the trained tokens of any row.

    `local` are the rows of a micro-batch to build, if not all of them.
    """
    trained = data.trained_counts().sum(1)
    per_row = np.add.reduceat(trained[plan.items], plan.rows[:-1])
    targets = -(-int(per_row.max()) // 32) * 32  # a round number keeps compiled shapes few
    local = np.arange(rows) if local is None else local
    return PackedSteps(data, plan, rows, local, min(targets, plan.row_length), ref)
