"""Every sequence can be read back from the packed batches, with its targets and its reference."""

import dataclasses
import threading

import numpy as np
import pytest

from alignjax.config import Batch as BatchConfig
from alignjax.data.batches import PackedBatch, PackedSteps, packed_steps
from alignjax.data.packing import plan_scoring, plan_training
from alignjax.data.tokenset import TokenSet, in_memory

LENGTH = 64


def random_set(items: int, sides: int, seed: int = 0) -> TokenSet:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, LENGTH // sides + 1, items * sides)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    trained = rng.random(offsets[-1]) < 0.5
    trained[offsets[1:] - 1] = True
    trained[offsets[:-1]] = False
    tokens = rng.integers(0, 1000, offsets[-1]).astype(np.int32)
    return in_memory(tokens, trained, offsets, sides)


def make(sides: int, micro: int = 3, seed: int = 0, **batch) -> PackedSteps:
    data = random_set(57, sides, seed)
    batch = batch or {"pairs" if sides == 2 else "sequences": 10}
    plan = plan_training(data.lengths(), BatchConfig(**batch, row_length=LENGTH, epochs=2), seed)
    ref = np.random.default_rng(seed + 1).standard_normal((57, sides)).astype(np.float32)
    return packed_steps(data, plan, micro, ref)


def check_row(row: PackedBatch, data: TokenSet, ref: np.ndarray) -> list[int]:
    """Compares a packed row with the token set it came from; returns its items."""
    sides = data.sides
    segments = int(row.segments.max(initial=0))
    found, targets, end = [], [], 0
    for segment in range(1, segments + 1):
        places = np.flatnonzero(row.segments == segment)
        assert places.tolist() == list(range(end, end + len(places)))  # in order, no gap
        place, side = divmod(segment - 1, sides)
        item = int(row.items[place]) - 1
        assert item >= 0
        start, stop = data.offsets[sides * item + side : sides * item + side + 2]
        assert row.tokens[places].tolist() == data.tokens[start:stop].tolist()
        assert row.positions[places].tolist() == list(range(stop - start))
        trained = (end + np.flatnonzero(data.trained[start:stop])).tolist()
        assert end not in trained
        targets += trained
        assert row.ref[place, side] == ref[item, side]
        if side == 0:
            found.append(item)
        end += len(places)
    assert segments == sides * len(found)
    assert row.targets.tolist() == targets + [0] * (len(row.targets) - len(targets))
    for rest in (row.tokens[end:], row.positions[end:], row.segments[end:]):
        assert not rest.any()
    assert not row.items[len(found) :].any()
    assert not row.ref[len(found) :].any()
    return found


def rows_of(batch: PackedBatch):
    for micro in range(batch.tokens.shape[0]):
        for row in range(batch.tokens.shape[1]):
            yield PackedBatch(*(array[micro, row] for array in batch))


@pytest.mark.parametrize("sides", [1, 2])
@pytest.mark.parametrize("rows", [1, 3, 50])
@pytest.mark.parametrize("mode", ["items", "rows"])
def test_every_sequence_is_read_back(sides, rows, mode):
    steps = make(sides, rows, **({"rows": 4} if mode == "rows" else {}))
    seen = []
    for step in range(len(steps)):
        batch = steps[step]
        assert all(array.shape[1] == rows for array in batch)
        items = [item for row in rows_of(batch) for item in check_row(row, steps.data, steps.ref)]
        assert sorted(items) == sorted(steps.plan.step_items(step))
        seen += items
    assert sorted(seen) == sorted([*range(57)] * 2)  # two epochs


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("tokens", lambda a: a + (a > 0)),
        ("positions", lambda a: np.where(a > 0, a + 1, a)),
        ("segments", lambda a: np.where(a == 1, 2, np.where(a == 2, 1, a))),
        ("targets", lambda a: np.where(a > 0, a - 1, a)),
        ("items", lambda a: np.roll(a, 1, -1)),
        ("ref", lambda a: a[..., ::-1]),
    ],
)
def test_the_check_above_finds_each_kind_of_damage(field, change):
    steps = make(2)
    batch = steps[0]
    broken = batch._replace(**{field: change(getattr(batch, field))})
    with pytest.raises(AssertionError):
        for row in rows_of(broken):
            check_row(row, steps.data, steps.ref)


def test_a_row_of_pairs_by_hand():
    data = in_memory(
        tokens=np.array([10, 11, 12, 20, 21, 30, 31, 32, 40, 41, 42, 43], np.int32),
        trained=np.array([0, 1, 1, 0, 1, 0, 0, 1, 0, 0, 1, 0], bool),
        offsets=np.array([0, 3, 5, 8, 12]),
        sides=2,
    )
    ref = np.array([[-1.0, -2.0], [-3.0, -4.0]], np.float32)
    batch = packed_steps(data, plan_scoring(data.lengths(), 14, 1), 1, ref)[0]
    row = PackedBatch(*(array[0, 0] for array in batch))
    assert row.items.tolist() == [2, 1]  # the longer first
    assert row.tokens.tolist() == [30, 31, 32, 40, 41, 42, 43, 10, 11, 12, 20, 21, 0, 0]
    assert row.positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 0, 1, 0, 0]
    assert row.segments.tolist() == [1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 4, 4, 0, 0]
    assert row.targets.tolist() == [2, 5, 8, 9, 11] + [0] * 9  # no more than a row has places
    assert row.ref.tolist() == [[-3.0, -4.0], [-1.0, -2.0]]


@pytest.mark.parametrize("sides", [1, 2])
def test_targets_lie_in_one_segment_with_what_predicts_them(sides):
    steps = make(sides)
    total = 0
    for step in range(len(steps)):
        for row in rows_of(steps[step]):
            targets = row.targets[row.targets > 0]
            assert len(set(targets.tolist())) == len(targets)
            assert (row.segments[targets] > 0).all()
            assert (row.segments[targets] == row.segments[targets - 1]).all()
            assert (row.positions[targets] > 0).all()
            total += len(targets)
    assert total == 2 * steps.data.trained.sum()


def test_room_for_targets_is_the_fullest_rows_in_steps_of_32():
    data = random_set(57, 1)
    steps = packed_steps(data, plan_scoring(data.lengths(), 4 * LENGTH, 1), 1)
    fullest = max(np.count_nonzero(steps[step].targets) for step in range(len(steps)))
    assert 96 < fullest < 3 * LENGTH  # far from a row's 4 x 64 places
    assert steps.targets == -(-fullest // 32) * 32
    assert make(1).targets <= LENGTH


@pytest.mark.parametrize("sides", [1, 2])
def test_padding_rows_are_all_zero_and_only_at_the_end(sides):
    steps = make(sides, micro=4)
    most = -(-steps.plan.most_rows() // 4)
    padded = 0
    for step in range(len(steps)):
        batch = steps[step]
        assert batch.tokens.shape == (most, 4, LENGTH)
        rows = int(np.diff(steps.plan.steps)[step])
        flat = PackedBatch(*(array.reshape(-1, *array.shape[2:]) for array in batch))
        assert (flat.segments[:rows, 0] == 1).all()
        for array in flat:
            assert not array[rows:].any()
        padded += most * 4 - rows
        assert steps.micro_batches(step) == -(-rows // 4)
        held = batch.segments.any((1, 2))
        assert held.tolist() == [i < steps.micro_batches(step) for i in range(most)]
    assert padded > 0


def test_the_last_short_step_runs_fewer_micro_batches():
    steps = make(2, micro=1)
    counts = [steps.micro_batches(step) for step in range(len(steps))]
    assert counts == np.diff(steps.plan.steps).tolist()
    assert counts[-1] < max(counts)  # 4 of 10 pairs are left


@pytest.mark.parametrize("sides", [1, 2])
def test_useful_tokens_are_those_in_segments(sides):
    steps = make(sides)
    counted = [int(np.count_nonzero(steps[step].segments)) for step in range(len(steps))]
    assert steps.useful_tokens().tolist() == counted
    assert sum(counted) == 2 * len(steps.data.tokens)


def test_margins_and_weights_lie_with_their_items():
    steps = make(2)
    count = len(steps.data)
    margin, weight = (np.arange(count, dtype=np.float32) + base for base in (0.5, 100))
    steps = dataclasses.replace(
        steps, data=dataclasses.replace(steps.data, margin=margin, weight=weight)
    )
    seen = 0
    for step in range(len(steps)):
        batch = steps[step]
        real = batch.items > 0
        seen += real.sum()
        np.testing.assert_array_equal(batch.margin[real], margin[batch.items[real] - 1])
        np.testing.assert_array_equal(batch.weight[real], weight[batch.items[real] - 1])
        assert not batch.margin[~real].any() and not batch.weight[~real].any()
    assert seen >= count


def test_without_a_reference_ref_is_zero():
    steps = make(2)
    bare = dataclasses.replace(steps, ref=None)
    batch, other = bare[0], steps[0]
    assert not batch.ref.any()
    assert batch.ref.shape == other.ref.shape
    for array, same in zip(batch._replace(ref=other.ref), other, strict=True):
        assert np.array_equal(array, same)


@pytest.mark.parametrize("sides", [1, 2])
def test_reading_from_a_step_on_gives_the_same_batches(sides):
    steps = make(sides)
    count = len(steps)
    whole = list(steps.read())
    assert len(whole) == count
    for start in (1, 4, count - 1, count):
        part = list(steps.read(start))
        assert len(part) == count - start
        for batch, same in zip(part, whole[start:], strict=True):
            assert isinstance(batch, PackedBatch)
            for array, other in zip(batch, same, strict=True):
                assert np.array_equal(array, other)
                assert array.dtype == other.dtype
    for step, batch in enumerate(whole):
        for array, same in zip(batch, steps[step], strict=True):
            assert np.array_equal(array, same)
    assert [array.dtype for array in whole[0]] == [np.int32] * 5 + [np.float32] * 3 + [np.int32]


def test_the_next_batches_are_made_before_they_are_asked_for(monkeypatch):
    """While a step trains: in a thread, so it is waited for."""
    original, third = PackedSteps.__getitem__, threading.Event()

    def noting(steps, step):
        batch = original(steps, step)
        if step == 2:
            third.set()
        return batch

    monkeypatch.setattr(PackedSteps, "__getitem__", noting)
    batches = make(2).read()
    next(batches)
    assert third.wait(600)
    for array, same in zip(next(batches), original(make(2), 1), strict=True):
        assert np.array_equal(array, same)


@pytest.mark.parametrize("local", [[0], [1, 2], [0, 2]])
def test_a_process_builds_its_own_rows_of_each_micro_batch_and_no_others(local):
    whole = make(2)
    steps = dataclasses.replace(whole, local=np.array(local))
    for step in (0, 3, len(steps) - 1):
        for mine, everyone in zip(steps[step], whole[step], strict=True):
            assert np.array_equal(mine, everyone[:, local])


def test_items_are_known_for_all_rows_on_every_process():
    whole = make(2)
    steps = dataclasses.replace(whole, local=np.array([1]))
    for step in range(len(steps)):
        batch = whole[step]
        assert np.array_equal(steps.items(step), batch.items.reshape(-1, batch.items.shape[-1]))
