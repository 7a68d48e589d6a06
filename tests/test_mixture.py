"""Weights of a mixture and selections: which items an epoch holds, and that a plan takes them."""

import numpy as np
import pytest
from tokencases import PAIRS, make, write

from alignjax.config import Batch, Data
from alignjax.data import mixture
from alignjax.data.mixture import epoch_items
from alignjax.data.packing import plan_training
from alignjax.data.tokenset import in_memory
from alignjax.errors import UserError

SIZES = (10, 40, 20)  # items of each part
PARTS = "a.jsonl,b.jsonl,c.jsonl"


@pytest.fixture
def data():
    """Pairs of three parts; the chosen side of item i has 1 + 7 i mod 70 trained tokens."""
    items = sum(SIZES)
    chosen = 1 + 7 * np.arange(items) % items
    lengths = np.stack([chosen, np.full(items, 3)], 1).ravel() + 1
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    trained = np.ones(offsets[-1], bool)
    trained[offsets[:-1]] = False
    found = in_memory(np.zeros(offsets[-1], np.int32), trained, offsets, sides=2)
    found.part[:] = np.repeat(np.arange(3), SIZES)
    found.margin[:] = -np.arange(items) % 9
    return found


def counts(data, **settings) -> list[int]:
    """Items of each part in an epoch."""
    items = epoch_items(data, Data(path=PARTS, **settings), 0)
    assert items.dtype == np.int64 and np.all(np.diff(items) >= 0)
    return np.bincount(data.part[items], minlength=3).tolist()


def test_without_weights_every_item_is_there_once(data):
    assert epoch_items(data, Data(path=PARTS), 0).tolist() == list(range(70))


def test_weights_keep_a_share_or_repeat(data):
    assert counts(data, weights="1, 0.25, 0") == [10, 10, 0]
    assert counts(data, weights="2.5,0.1,1") == [25, 4, 20]
    items = epoch_items(data, Data(path=PARTS, weights="2.5,0,0"), 0)
    times = np.bincount(items)
    assert sorted(times.tolist()) == [2] * 5 + [3] * 5


@pytest.mark.parametrize("weights", ["1e308,1,1", "1e9,1,1", "nan,1,1", "-1,1,1", "1,1", "x,1,1"])
def test_weights_that_make_no_epoch_are_refused(data, weights):
    with pytest.raises(UserError, match=rf"^data.weights={weights}: give a number from 0 to 1000"):
        counts(data, weights=weights)


def test_an_epoch_of_absurd_size_is_refused_before_it_is_drawn(data, monkeypatch):
    monkeypatch.setattr(mixture, "MOST_ITEMS", 100)
    assert counts(data, weights="1,1,2.5") == [10, 40, 50]
    with pytest.raises(UserError, match=r"^data.weights=1,1,3: an epoch would have 110 items"):
        counts(data, weights="1,1,3")


def test_a_draw_depends_on_the_seed_alone(data):
    config = Data(path=PARTS, weights="1,0.5,0.5")
    one, same, other = (epoch_items(data, config, seed) for seed in (0, 0, 1))
    assert np.array_equal(one, same) and not np.array_equal(one, other)


def test_a_smaller_random_choice_is_part_of_a_larger_one(data):
    few, more = (set(epoch_items(data, Data(path=PARTS, max_pairs=n), 0)) for n in (10, 30))
    assert len(few) == 10 and len(more) == 30 and few < more
    assert few != set(range(10))


def test_selections_take_what_they_say(data):
    tokens = data.trained_counts()[:, 0]
    longest = epoch_items(data, Data(path=PARTS, max_pairs=9, select="longest"), 0)
    assert sorted(tokens[longest]) == sorted(tokens)[-9:]
    shortest = epoch_items(data, Data(path=PARTS, max_pairs=9, select="shortest"), 0)
    assert sorted(tokens[shortest]) == sorted(tokens)[:9]
    data.columns.append("margin")
    widest = epoch_items(data, Data(path=PARTS, max_pairs=9, select="score_gap"), 0)
    assert sorted(data.margin[widest]) == sorted(data.margin)[-9:]


def test_a_choice_is_made_among_what_the_weights_leave(data):
    assert sum(counts(data, weights="0,1,0", max_pairs=15)[1:2]) == 15


def test_a_plan_trains_on_the_epochs_items_alone_and_shuffles_across_parts(data):
    items = epoch_items(data, Data(path=PARTS, weights="1,0.5,2"), 0)
    for batch in (Batch(pairs=16, row_length=256, epochs=2), Batch(rows=2, row_length=256)):
        plan = plan_training(data.lengths(), batch, 0, items)
        assert sorted(plan.items) == sorted(np.tile(items, batch.epochs))
    first = data.part[plan_training(data.lengths(), Batch(pairs=16), 0, items).step_items(0)]
    assert len(set(first.tolist())) == 3


def test_what_does_not_fit_is_refused(data):
    with pytest.raises(ValueError, match="^data.select=score_gap: no row has a `margin`, by which"):
        epoch_items(data, Data(path=PARTS, max_pairs=9, select="score_gap"), 0)


def test_the_same_files_by_other_names_are_other_parts(tmp_path, tokenizer, tokenizer_dir):
    """A glob is one name, and a mixture has a weight for each name."""
    for name, row in zip("ab", PAIRS, strict=False):
        write(tmp_path / f"{name}.jsonl", [row])
    whole, listed = f"{tmp_path}/*.jsonl", f"{tmp_path}/a.jsonl,{tmp_path}/b.jsonl"
    parts = [
        make(path, tokenizer, tokenizer_dir, tmp_path).part.tolist() for path in (whole, listed)
    ]
    assert parts == [[0, 0], [0, 1]]
