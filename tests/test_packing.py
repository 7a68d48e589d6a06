"""Packing against a brute-force search, and plans that lose, repeat and reorder nothing."""

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from alignjax.config import Batch
from alignjax.data import packing
from alignjax.data.packing import Plan, best_fit, plan_scoring, plan_training
from alignjax.errors import UserError


def brute_force(lengths: np.ndarray, capacity: int) -> list[int]:
    """Fill of each row of best-fit decreasing, every row looked at for every item."""
    fills: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [i for i, fill in enumerate(fills) if fill + length <= capacity]
        if fitting:
            fills[max(fitting, key=lambda i: fills[i])] += length
        else:
            fills.append(length)
    return fills


def item_by_item(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Best-fit decreasing as plainly as it can be said; of rows equally full, the one that came to
    be so last takes the item."""
    rows: list[list[int]] = []
    free: list[int] = []
    turn: list[int] = []  # when each row was filled last
    for now, item in enumerate(np.argsort(-lengths, kind="stable").tolist()):
        fitting = [row for row in range(len(rows)) if free[row] >= lengths[item]]
        if not fitting:
            rows.append([])
            free.append(capacity)
            turn.append(now)
        row = min(fitting, key=lambda r: (free[r], -turn[r])) if fitting else len(rows) - 1
        rows[row].append(item)
        free[row] -= int(lengths[item])
        turn[row] = now
    return rows


def slow_plan(lengths: np.ndarray, batch: Batch, seed: int) -> Plan:
    """The plan of a run, as lists of lists."""
    per_step = batch.pairs or batch.sequences
    rngs = [np.random.default_rng([seed, epoch]) for epoch in range(batch.epochs)]
    orders = [rng.permutation(len(lengths)) for rng in rngs]
    if per_step:
        stream = np.concatenate(orders)
        parts = [stream[i : i + per_step] for i in range(0, len(stream), per_step)]
        steps = [
            [part[row] for row in item_by_item(lengths[part], batch.row_length)] for part in parts
        ]
    else:
        rows = []
        for rng, ids in zip(rngs, orders, strict=True):
            packed = item_by_item(lengths[ids], batch.row_length)
            rows += [ids[packed[i]] for i in rng.permutation(len(packed))]
        steps = [rows[i : i + batch.rows] for i in range(0, len(rows), batch.rows)]
    steps = steps[: batch.max_steps or None]
    rows = [row for step in steps for row in step]
    return Plan(
        np.concatenate(rows),
        np.cumsum([0] + [len(row) for row in rows]),
        np.cumsum([0] + [len(step) for step in steps]),
        batch.row_length,
    )


def packed_rows(lengths: np.ndarray, capacity: int, per_step: int = 0) -> list[list[int]]:
    items, sizes, step_rows = best_fit(lengths, capacity, per_step)
    assert step_rows.sum() == len(sizes)
    return [part.tolist() for part in np.split(items, np.cumsum(sizes)[:-1])]


def rows_of(plan: Plan) -> list[list[int]]:
    return [plan.row_items(row).tolist() for row in range(len(plan.rows) - 1)]


def check_rows(plan: Plan, lengths: np.ndarray) -> None:
    fills = [lengths[row].sum() for row in rows_of(plan)]
    assert max(fills) <= plan.row_length
    assert min(fills) > 0


def log_normal(count: int, capacity: int, seed: int = 0) -> np.ndarray:
    drawn = np.random.default_rng(seed).lognormal(5.5, 0.8, count)
    return np.clip(drawn, 8, capacity).astype(np.int64)


def test_best_fit_by_hand():
    # 7; 6; 5 fits nothing; 4 fits only beside 6; 3 beside 7 and leaves none; 2 and 2 beside 5.
    lengths = np.array([2, 6, 4, 3, 2, 7, 5])
    assert packed_rows(lengths, 10) == [[5, 3], [1, 2], [6, 0, 4]]


def test_best_fit_takes_the_fullest_row_that_fits():
    # The 3 has 4 free beside the 6 and 3 free beside the 7; the 4 then needs the former.
    assert packed_rows(np.array([6, 7, 4, 3]), 10) == [[1, 3], [0, 2]]


@pytest.mark.parametrize("seed", range(12))
def test_best_fit_is_best_fit_decreasing(seed):
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(20, 2049))
    lengths = rng.integers(1, capacity + 1, int(rng.integers(1, 400)))
    if seed % 2:
        lengths = np.maximum(1, lengths // 5)
    packed = packed_rows(lengths, capacity)
    assert packed == item_by_item(lengths, capacity)
    assert sorted(item for row in packed for item in row) == list(range(len(lengths)))
    fills = [int(lengths[row].sum()) for row in packed]
    assert max(fills) <= capacity
    assert sorted(fills) == sorted(brute_force(lengths, capacity))


def test_best_fit_of_items_as_long_as_a_row_and_of_none():
    assert packed_rows(np.array([8, 8, 8]), 8) == [[0], [1], [2]]
    assert [part.tolist() for part in best_fit(np.zeros(0, np.int64), 8)] == [[], [], []]


def test_best_fit_of_equal_lengths_fills_row_after_row():
    assert packed_rows(np.full(7, 3), 10) == [[0, 1, 2], [3, 4, 5], [6]]


def test_best_fit_of_steps_by_themselves():
    items, sizes, step_rows = best_fit(np.array([2, 7, 3, 8, 5, 5, 1]), 10, per_step=3)
    assert items.tolist() == [1, 2, 0, 3, 4, 5, 6]
    assert sizes.tolist() == [2, 1, 1, 2, 1]
    assert step_rows.tolist() == [2, 2, 1]


@pytest.mark.parametrize("length", [0, 11])
def test_best_fit_takes_no_length_that_fits_no_row(length):
    with pytest.raises(AssertionError):
        best_fit(np.array([3, length]), 10)


@pytest.mark.parametrize("capacity", [1024, 2048])
def test_log_normal_lengths_fill_their_rows(capacity):
    lengths = log_normal(5000, capacity // 2)
    _, sizes, _ = best_fit(lengths, capacity)
    assert lengths.sum() / (len(sizes) * capacity) >= 0.97


# Plans of runs


@pytest.mark.parametrize("field", ["pairs", "sequences", "rows"])
@pytest.mark.parametrize("seed", range(20))
def test_plan_is_the_slow_ones_to_the_last_number(field, seed, monkeypatch):
    monkeypatch.setattr(packing, "_SLAB", 64)  # several steps are packed together, in slabs
    rng = np.random.default_rng(seed)
    row_length = int(rng.integers(1, 300))
    longest = max(1, row_length // int(rng.integers(1, 9)))
    lengths = rng.integers(1, longest + 1, int(rng.integers(1, 250)))
    batch = Batch(
        row_length=row_length,
        epochs=int(rng.integers(1, 4)),
        max_steps=int(rng.choice([0, 0, 3])),
        **{field: int(rng.integers(1, 100))},
    )
    plan, slow = plan_training(lengths, batch, seed), slow_plan(lengths, batch, seed)
    for name in ("items", "rows", "steps"):
        assert getattr(plan, name).tolist() == getattr(slow, name).tolist()
        assert getattr(plan, name).dtype == np.int64
    assert plan.row_length == slow.row_length


@pytest.mark.parametrize(("count", "per_step", "epochs"), [(103, 8, 1), (103, 8, 3), (5, 8, 3)])
@pytest.mark.parametrize("field", ["pairs", "sequences"])
def test_each_step_has_its_items_and_each_epoch_every_item(field, count, per_step, epochs):
    lengths = np.random.default_rng(1).integers(10, 300, count)
    batch = Batch(**{field: per_step}, row_length=512, epochs=epochs)
    plan = plan_training(lengths, batch, seed=3)
    sizes = [len(plan.step_items(step)) for step in range(len(plan))]
    full, rest = divmod(count * epochs, per_step)
    assert sizes == [per_step] * full + [rest] * bool(rest)
    check_rows(plan, lengths)
    # A step that holds the end of an epoch holds the next one's beginning; elsewhere none repeats.
    seen = Counter()
    for step in range(len(plan)):
        seen.update(plan.step_items(step).tolist())
        done = min((step + 1) * per_step, count * epochs)
        assert max(seen.values()) <= -(-done // count)
        assert sum(number >= e for number in seen.values() for e in range(1, epochs + 1)) == done
        if done % count == 0:
            assert set(seen.values()) == {done // count}
            assert len(seen) == count
    assert dict(seen) == dict.fromkeys(range(count), epochs)


def test_a_step_is_packed_within_itself():
    lengths = np.random.default_rng(2).integers(10, 300, 64)
    plan = plan_training(lengths, Batch(pairs=16, row_length=512), seed=0)
    for step in range(4):
        rows = plan.steps[step + 1] - plan.steps[step]
        assert rows == len(brute_force(lengths[plan.step_items(step)], 512))


def test_rows_mode_makes_full_steps_and_takes_every_item_once_an_epoch():
    lengths = log_normal(700, 512)
    rows_an_epoch = len(brute_force(lengths, 1024))
    plan = plan_training(lengths, Batch(rows=7, row_length=1024, epochs=3), seed=0)
    assert len(plan.rows) - 1 == 3 * rows_an_epoch
    sizes = np.diff(plan.steps).tolist()
    full, rest = divmod(3 * rows_an_epoch, 7)
    assert sizes == [7] * full + [rest] * bool(rest)
    assert rest  # the last step of the run is the only one that is short
    check_rows(plan, lengths)
    rows = rows_of(plan)
    for epoch in range(3):
        part = rows[epoch * rows_an_epoch : (epoch + 1) * rows_an_epoch]
        assert sorted(item for row in part for item in row) == list(range(700))
    # The rows are shuffled: best-fit's own order would put the longest items first.
    fills = [len(row) for row in rows[:rows_an_epoch]]
    assert fills != sorted(fills)
    longest = [max(lengths[row]) for row in rows[:rows_an_epoch]]
    assert abs(np.corrcoef(longest, np.arange(rows_an_epoch))[0, 1]) < 0.3


@pytest.mark.parametrize("batch", [Batch(pairs=8, epochs=2), Batch(rows=4, epochs=2)])
def test_seed_decides_the_order_and_nothing_else_does(batch):
    lengths = log_normal(300, 1024)
    one, same = (plan_training(lengths, batch, seed=5) for _ in range(2))
    for name in ("items", "rows", "steps"):
        assert np.array_equal(getattr(one, name), getattr(same, name))
    other = plan_training(lengths, batch, seed=6)
    assert sorted(one.items) == sorted(other.items)
    assert np.mean(one.items == other.items) < 0.1
    half = len(one.items) // 2  # the second epoch has an order of its own
    assert np.mean(one.items[:half] == one.items[half:]) < 0.1


@pytest.mark.parametrize("batch", [{"pairs": 8}, {"rows": 4}])
def test_max_steps_cuts_the_same_plan_short(batch):
    lengths = log_normal(300, 1024)
    whole = plan_training(lengths, Batch(**batch, epochs=2), seed=1)
    cut = plan_training(lengths, Batch(**batch, epochs=2, max_steps=5), seed=1)
    assert (len(cut), len(whole) > 5) == (5, True)
    for step in range(5):
        assert np.array_equal(cut.step_items(step), whole.step_items(step))
    beyond = plan_training(lengths, Batch(**batch, epochs=2, max_steps=10_000), seed=1)
    assert len(beyond) == len(whole)  # it never adds an epoch
    endless = plan_training(lengths, Batch(**batch, epochs=10**9, max_steps=5), seed=1)
    assert np.array_equal(endless.items, cut.items) and np.array_equal(endless.rows, cut.rows)


@pytest.mark.parametrize("batch", [{"pairs": 8}, {"rows": 4}])
@pytest.mark.parametrize("max_steps", [0, 10**9])
def test_a_plan_of_absurd_size_is_refused_before_it_is_made(batch, max_steps):
    with pytest.raises(UserError, match=r"batch\.epochs=1000000000 of 300 items .* lower it"):
        plan_training(np.full(300, 9), Batch(**batch, epochs=10**9, max_steps=max_steps), seed=1)


def test_most_rows_and_most_items_by_hand():
    plan = Plan(np.arange(7), np.array([0, 2, 3, 7]), np.array([0, 1, 3]), 16)
    assert (len(plan), plan.most_rows(), plan.most_items()) == (2, 2, 4)
    assert plan.row_items(1).tolist() == [2]
    assert plan.step_items(1).tolist() == [2, 3, 4, 5, 6]


def test_plan_scoring_takes_every_item_once_in_few_rows():
    lengths = log_normal(300, 1024)
    plan = plan_scoring(lengths, 2048, rows_a_step=6)
    assert sorted(plan.items) == list(range(300))
    assert len(plan.rows) - 1 == len(brute_force(lengths, 2048))
    assert set(np.diff(plan.steps)[:-1]) == {6}
    check_rows(plan, lengths)
    ids = np.array([7, 3, 250])
    assert sorted(plan_scoring(lengths, 2048, 6, ids).items) == [3, 7, 250]


PLAN_A_MILLION = """
import resource, sys, time
import numpy as np
from alignjax.config import Batch
from alignjax.data.packing import plan_training

lengths = np.random.default_rng(0).lognormal(5.5, 0.8, 1_000_000).clip(8, 2048).astype(np.int64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
started = time.process_time()
plan = plan_training(lengths, Batch(**{sys.argv[1]: 64}, row_length=2048), 0)
seconds = time.process_time() - started
print(seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
print(len(plan.items), lengths.sum() / (2048 * (len(plan.rows) - 1)))
"""


@pytest.mark.parametrize(("field", "fill"), [("pairs", 0.94), ("rows", 0.99)])
def test_a_million_lengths_are_planned_in_seconds_and_little_memory(field, fill):
    # A process of its own, so that the peak is the plan's. 10 million took 7 to 16 s and 0.7 GB.
    command = [sys.executable, "-c", PLAN_A_MILLION, field]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, megabytes, items, filled = map(float, done.stdout.split())
    assert seconds < 20
    assert megabytes < 200
    assert items == 1_000_000
    assert filled >= fill
