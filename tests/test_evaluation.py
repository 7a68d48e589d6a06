"""Scores of data sets, their intervals, and the reference that is kept on disk."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from conftest import mesh, tiny_config

from alignjax import evaluation, files, reference
from alignjax.config import DPO, RM, SFT, Compute
from alignjax.data.tokenset import TokenSet, in_memory
from alignjax.models import decoder
from alignjax.stages import stage_of

pytestmark = pytest.mark.slow  # minutes

F32 = Compute(dtype="float32", remat="none", vocab_chunk=32)


def pairs(count: int = 9, seed: int = 0) -> TokenSet:
    """Random pairs of uneven lengths; the later half of each side is trained."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(4, 20, 2 * count)
    trained = np.concatenate([np.arange(n) >= n // 2 for n in lengths])
    tokens = rng.integers(3, 128, lengths.sum()).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return in_memory(tokens, trained, offsets, 2, key=f"k{seed}")


@pytest.fixture
def model():
    return decoder.init(tiny_config(), jax.random.key(0))


def test_scores_do_not_depend_on_rows_row_length_or_mesh(model):
    data = pairs()
    one = evaluation.score(model, data, 48, 1, F32)
    assert one.shape == (9, 2) and np.isfinite(one).all() and (one < 0).all()
    np.testing.assert_allclose(evaluation.score(model, data, 128, 3, F32), one, rtol=1e-5)
    host = jax.tree.map(np.asarray, model)
    mesh(1, 4, 2)
    sharded = decoder.init(tiny_config(), jax.random.key(0))
    sharded = jax.tree.map(lambda like, w: jax.device_put(w, like.sharding), sharded, host)
    np.testing.assert_allclose(evaluation.score(sharded, data, 48, 4, F32), one, rtol=1e-5)


def test_scores_of_some_items_are_those_of_all(model):
    data = pairs()
    every = evaluation.score(model, data, 48, 2, F32)
    some = evaluation.score(model, data, 48, 2, F32, np.array([1, 6, 7]))
    assert np.flatnonzero(~np.isnan(some).any(1)).tolist() == [1, 6, 7]
    np.testing.assert_allclose(some[[1, 6, 7]], every[[1, 6, 7]], rtol=1e-5)


def test_metrics_of_a_set_by_hand():
    logps = np.array([[-10.0, -12.0], [-8.0, -5.0], [-3.0, -3.0]], np.float32)
    ref = np.array([[-11.0, -11.0], [-8.0, -8.0], [-3.0, -3.0]], np.float32)
    terms = evaluation.item_terms(stage_of(DPO(beta=0.5)), logps, ref, pairs(3))
    got = evaluation.means(terms)
    margins = [1.0, -1.5, 0.0]
    assert got["eval_rewards/margins"] == pytest.approx(np.mean(margins))
    assert got["eval_rewards/accuracies"] == pytest.approx(0.5)
    assert got["eval_loss"] == pytest.approx(np.mean(np.log1p(np.exp(-np.array(margins)))))


SOURCES = replace(
    pairs(5),
    source=np.array([0, 1, 1, 2, 0], np.int32),
    sources=["", "hh", "a/b c"],
    turns=np.array([1, 1, 2, 0, 1], np.int32),
)
REWARDS = np.array([[2, 1], [3, 0], [-4, -1], [5, 5], [-6, 7]], np.float32)


def test_a_reward_model_is_told_by_source_and_by_turns_by_hand():
    got = evaluation.logged(stage_of(RM()), REWARDS, None, SOURCES)
    own = {
        "": (0.5, -2.4, -6, 1.2, 7),
        "/source=hh": (0.5, 0, -4, -0.5, 3),
        "/source=a/b c": (0.5, 0, 5, 5, 5),
        "/turns=0": (0.5, 0, 5, 5, 5),
        "/turns=1": (2 / 3, -3, -6, 7 / 6, 7),
        "/turns=2": (0, -3, -4, -2.5, -1),
    }
    expected = {
        f"eval_rewards/{name}{subset}": value
        for subset, values in own.items()
        for name, value in zip(("accuracies", "margins", "min", "mean", "max"), values, strict=True)
    }
    assert {name: got[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert set(got) - set(expected) == {"eval_loss", "eval_rewards/chosen", "eval_rewards/rejected"}


def test_dpo_is_told_by_source_and_by_turns_and_has_no_spread():
    ref = np.array([[1, 1], [1, 2], [0, 0], [3, 1], [0, 1]], np.float32)
    got = evaluation.logged(stage_of(DPO(beta=0.5)), REWARDS, ref, SOURCES)
    margins = 0.5 * ((REWARDS - ref) @ [1, -1])
    for subset, own in {"": range(5), "/source=hh": [1, 2], "/turns=1": [0, 1, 4]}.items():
        assert got[f"eval_rewards/margins{subset}"] == pytest.approx(margins[own].mean())
        share = (margins[own] > 0).mean() + (margins[own] == 0).mean() / 2
        assert got[f"eval_rewards/accuracies{subset}"] == pytest.approx(share)
    assert not {f"eval_rewards/{name}" for name in ("min", "mean", "max")} & set(got)
    assert sum("=" in name for name in got) == 2 * 5


def test_labels_that_tell_nothing_new_or_are_too_many_have_no_metrics():
    same = replace(SOURCES, source=np.ones(5, np.int32), turns=np.ones(5, np.int32))
    assert not any("=" in name for name in evaluation.logged(stage_of(RM()), REWARDS, None, same))
    many = replace(
        pairs(20),
        source=np.array([*range(19), 18], np.int32),
        sources=[f"s{i}" for i in range(19)],
    )
    got = evaluation.logged(stage_of(RM()), np.zeros((20, 2), np.float32), None, many)
    kept = {name.split("=")[1] for name in got if "/source=" in name}
    assert len(kept) == 16 and "s18" in kept


def test_sft_is_told_as_a_whole():
    one = in_memory(np.zeros(6), np.ones(6, bool), np.array([0, 2, 4, 6]), 1)
    own = replace(one, source=np.array([0, 1, 0], np.int32), sources=["a", "b"])
    got = evaluation.logged(stage_of(SFT()), np.float32([[-1], [-2], [-6]]), None, own)
    assert got == {"eval_loss": pytest.approx(9 / 6)}


def test_the_interval_of_a_constant_change_is_that_change():
    rng = np.random.default_rng(0)
    before = rng.standard_normal(50)
    ones = np.ones(50)
    assert evaluation.paired_bootstrap((before, ones), (before + 0.25, ones)) == pytest.approx(
        (0.25, 0.25)
    )


def test_the_interval_matches_the_normal_approximation():
    rng = np.random.default_rng(1)
    change = rng.standard_normal(400) + 0.3
    zeros, ones = np.zeros(400), np.ones(400)
    low, high = evaluation.paired_bootstrap((zeros, ones), (change, ones))
    half = 1.96 * change.std() / 20
    assert low == pytest.approx(change.mean() - half, abs=0.015)
    assert high == pytest.approx(change.mean() + half, abs=0.015)


def test_longer_wins_counts_ties_half():
    offsets = np.array([0, 4, 6, 8, 12, 15, 18])
    data = in_memory(np.zeros(18), np.ones(18, bool), offsets, 2)
    assert evaluation.longer_wins(data) == pytest.approx(0.5)  # one right, one wrong, one tie


@pytest.fixture
def batches(monkeypatch):
    """The items of each batch that is scored."""
    scored, original = [], evaluation.score_step

    def counted(model, batch, **more):
        scored.append(np.asarray(batch.items)[np.asarray(batch.items) > 0].tolist())
        return original(model, batch, **more)

    monkeypatch.setattr(evaluation, "score_step", counted)
    return scored


def test_the_reference_is_computed_once(model, tmp_path, batches):
    data, weights = pairs(), reference.fingerprint(model)
    args = (weights, data, 48, 2, F32, tmp_path)
    some = reference.reference_logps(model, *args, np.array([2, 5]))
    assert np.flatnonzero(~np.isnan(some).any(1)).tolist() == [2, 5]
    whole = reference.reference_logps(model, *args)
    count = len(batches)
    assert reference.reference_logps(model, *args).tobytes() == whole.tobytes()
    assert len(batches) == count
    reference.reference_logps(model, "other weights", *args[1:])
    assert len(batches) > count


def test_the_reference_is_scored_as_if_nobody_had_used_its_cache(model, tmp_path, batches):
    """Other runs, a kill between two batches, and damage change no batch that is scored."""
    data, weights = pairs(), reference.fingerprint(model)

    def logps(cache, row_length=48, rows=2, compute=F32, **more):
        return reference.reference_logps(
            model, weights, data, row_length, rows, compute, tmp_path / cache, **more
        )

    whole, fresh = logps("fresh"), [*batches]
    assert len(fresh) > 1
    logps("used", ids=np.array([1, 4]))
    logps("used", row_length=64)
    logps("used", rows=1)
    logps("used", compute=replace(F32, vocab_chunk=16))
    batches.clear()
    assert logps("used").tobytes() == whole.tobytes() and batches == fresh

    (file,) = (tmp_path / "fresh/reference").glob("*.npy")
    half = whole.copy()
    half[np.array(sum(fresh[1:], [])) - 1] = np.nan
    for content, left in ((half, fresh[1:]), (whole[:5], fresh)):
        files.save_array(file, content)
        batches.clear()
        assert logps("fresh").tobytes() == whole.tobytes() and batches == left


def test_the_fingerprint_is_of_the_bits_and_not_of_the_mesh(model):
    one = reference.fingerprint(model)
    host = jax.tree.map(np.asarray, model)
    changed = jax.tree.map(np.array, host)
    changed.blocks.q[1, 2, 3] = np.nextafter(changed.blocks.q[1, 2, 3], 1)
    swapped = jax.tree.map(np.array, host)
    swapped.embed[[4, 5]] = swapped.embed[[5, 4]]
    place = jax.tree.map(lambda like, w: like.sharding, model, host)
    for other in (changed, swapped):
        assert reference.fingerprint(jax.tree.map(jax.device_put, other, place)) != one
    mesh(1, 4, 2)
    sharded = decoder.init(tiny_config(), jax.random.key(0))
    sharded = jax.tree.map(lambda like, w: jax.device_put(w, like.sharding), sharded, host)
    assert reference.fingerprint(sharded) == one
