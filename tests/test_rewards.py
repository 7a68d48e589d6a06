"""Reward models: the loss by hand, rewards at the last token, and what packing must not change."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from conftest import mesh, random_batch, tiny_config

from alignjax import losses
from alignjax.config import DPO, RM, SFT, Compute
from alignjax.errors import UserError
from alignjax.logps import sequence_logps
from alignjax.models import decoder
from alignjax.models.decoder import hidden_states
from alignjax.rewards import sequence_rewards
from alignjax.sharding import place
from alignjax.stages import batch_loss, stage_of
from alignjax.step import metrics_step

pytestmark = pytest.mark.slow  # minutes

F32 = Compute(dtype="float32", remat="none")
LENGTHS = [[10, 14, 12, 9], [20, 28], [3, 2, 5, 4], [24, 24]]


def model_with_scores(key: int = 0):
    model = decoder.init(tiny_config(scored=True), jax.random.key(key))
    model.score = jax.random.normal(jax.random.key(key + 1), model.score.shape)
    return model


def test_the_loss_by_hand():
    w, low = np.float32([0, 1, 3]), np.float32([0, 2, 1])
    np.testing.assert_allclose(
        losses.bradley_terry_loss(w, low), np.log(1 + np.exp(low - w)), rtol=1e-6
    )
    centred = losses.bradley_terry_loss(w, low, centering=0.5)
    np.testing.assert_allclose(
        centred - losses.bradley_terry_loss(w, low), 0.5 * (w + low) ** 2, rtol=1e-5
    )


def test_a_zero_head_gives_ln_2_and_half_the_pairs():
    model = decoder.init(tiny_config(scored=True), jax.random.key(0))
    batch = place(random_batch(model.config, np.random.default_rng(0), 4, 48, LENGTHS), "batch")
    loss, sums = batch_loss(model, batch, stage_of(RM()), F32)
    assert float(sums["loss"][1]) == 6 and float(loss) == pytest.approx(6 * np.log(2))
    assert float(sums["rewards/accuracies"][0]) == 3


def test_a_model_is_not_scored_by_the_other_head():
    for scored, score in ((True, sequence_logps), (False, sequence_rewards)):
        model = decoder.init(tiny_config(scored=scored), jax.random.key(0))
        batch = place(random_batch(model.config, np.random.default_rng(0), 4, 48, LENGTHS), "batch")
        with pytest.raises(UserError, match="a (reward|language) model gives no .*: use"):
            score(model, batch, F32)


def test_the_reward_is_that_of_the_last_token_of_each_sequence():
    """Also where a sequence ends with the row, and where padding has the id of its last token."""
    model = model_with_scores()
    batch = random_batch(model.config, np.random.default_rng(0), 4, 48, LENGTHS)
    for row, lengths in enumerate(LENGTHS):
        batch.tokens[row, sum(lengths) :] = batch.tokens[row, sum(lengths) - 1]
    got, real = sequence_rewards(model, place(batch, "batch"), F32)
    expected = np.zeros(got.shape, np.float32)
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for number, length in enumerate(lengths):
            tokens = batch.tokens[row : row + 1, start : start + length]
            where = np.arange(length, dtype=np.int32)[None]
            alone = place((tokens, where, np.ones_like(tokens)), "batch", None)
            h = np.asarray(hidden_states(model, *alone, F32))[0, -1]
            expected[row, number // 2, number % 2] = h @ np.asarray(model.score)[0]
            start += length
    np.testing.assert_allclose(got, expected, atol=1e-5)
    np.testing.assert_array_equal(real, expected != 0)


def test_the_reward_is_read_before_the_padding_token_of_the_config():
    """Where transformers reads it: at the last other token, or the first one of a sequence."""
    pad = 7
    model = model_with_scores()
    batch = random_batch(model.config, np.random.default_rng(0), 4, 48, LENGTHS)
    batch.tokens[batch.tokens == pad] = 8
    last = [[10 - 1, 14 - 3, 12 - 1, 9 - 1], [20 - 20, 28 - 2], [3, 2, 5, 4], [24 - 1, 24 - 1]]
    for row, (lengths, ends) in enumerate(zip(LENGTHS, last, strict=True)):
        for stop, end, length in zip(np.cumsum(lengths), ends, lengths, strict=True):
            batch.tokens[row, stop - length + end + (end > 0 or length == 20) : stop] = pad
    batch.tokens[2, 1] = pad  # in the middle of a sequence
    h = np.asarray(hidden_states(model, *place(batch, "batch")[:3], F32))
    model.config = replace(model.config, pad_id=pad)
    got, real = sequence_rewards(model, place(batch, "batch"), F32)
    assert np.asarray(real).sum() == sum(map(len, LENGTHS))
    for row, lengths in enumerate(LENGTHS):
        for number, (stop, length) in enumerate(zip(np.cumsum(lengths), lengths, strict=True)):
            own = batch.tokens[row, stop - length : stop]
            where = (np.arange(length) * (own != pad)).argmax()  # transformers' own words
            expected = h[row, stop - length + where] @ np.asarray(model.score)[0]
            assert np.asarray(got)[row, number // 2, number % 2] == pytest.approx(
                expected, abs=1e-5
            )


@pytest.mark.parametrize("shift", [9, -9])
@pytest.mark.parametrize("micro, sizes", [(1, (1, 1, 1)), (4, (1, 1, 1)), (2, (1, 2, 2))])
def test_a_step_tells_the_least_mean_and_largest_reward_of_all_responses(shift, micro, sizes):
    """Of all micro-batches and devices. No padding is among them: 0 would be an extreme."""
    mesh(*sizes)
    model = model_with_scores()
    batch = random_batch(model.config, np.random.default_rng(0), 4, 48, LENGTHS)

    def shifted(*arguments):
        rewards, real = sequence_rewards(*arguments)
        return jax.numpy.where(real > 0, rewards + shift, 0), real

    rewards, real = (np.asarray(a) for a in shifted(model, place(batch, "batch"), F32))
    own, sign = rewards[real > 0], np.sign(shift)
    assert (sign * own > 0).all() and not real.all()
    more = jax.tree.map(lambda a: np.concatenate([a, np.zeros_like(a)]), batch)
    lead = jax.tree.map(lambda a: a.reshape(2 * micro, -1, *a.shape[1:]), more)
    stage = replace(stage_of(RM()), scores=shifted)
    for count in (micro, 2 * micro):  # without the micro-batches of padding, and with them
        got = metrics_step(
            model, place(lead, None, "batch"), np.int32(count), stage=stage, compute=F32
        )
        found = [float(got[f"rewards/{name}"]) for name in ("min", "mean", "max")]
        assert found == pytest.approx([own.min(), own.mean(), own.max()], rel=1e-5)


@pytest.mark.parametrize("sizes", [(1, 4, 2), (2, 2, 2)])
def test_devices_change_no_reward_and_no_gradient(sizes):
    batch = random_batch(tiny_config(), np.random.default_rng(0), 4, 48, LENGTHS)
    stage, found = stage_of(RM(centering=0.01)), []
    alone = jax.tree.map(np.asarray, model_with_scores())
    for devices in ((1, 1, 1), sizes):
        mesh(*devices)
        want = jax.tree.leaves(decoder.abstract(alone.config))
        leaves = [
            jax.device_put(leaf, jax.NamedSharding(jax.sharding.get_mesh(), like.sharding.spec))
            for leaf, like in zip(jax.tree.leaves(alone), want, strict=True)
        ]
        model = jax.tree.unflatten(jax.tree.structure(alone), leaves)
        grads = jax.jit(jax.grad(lambda m, b: batch_loss(m, b, stage, F32)[0]))(
            model, place(batch, "batch")
        )
        rewards, _ = sequence_rewards(model, place(batch, "batch"), F32)
        found.append((np.asarray(rewards), jax.tree.map(np.asarray, grads)))
    np.testing.assert_allclose(found[1][0], found[0][0], atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
        found[1][1],
        found[0][1],
    )


def test_the_head_is_float32_where_the_model_is_bfloat16():
    model = model_with_scores()
    batch = place(random_batch(model.config, np.random.default_rng(0), 4, 48, LENGTHS), "batch")
    rewards, _ = sequence_rewards(model, batch, Compute(dtype="bfloat16", remat="none"))
    assert rewards.dtype == np.float32
    rounded = rewards.astype(jax.numpy.bfloat16).astype(np.float32)
    assert np.abs(np.asarray(rewards) - np.asarray(rounded)).max() > 1e-4


def test_a_pair_should_be_ahead_by_its_margin():
    w, low, margin = np.float32([1, 2]), np.float32([0, 0]), np.float32([0.5, 3])
    np.testing.assert_allclose(
        losses.bradley_terry_loss(w, low, margin), np.log(1 + np.exp(low - w + margin)), rtol=1e-6
    )


@pytest.mark.parametrize("stage", [RM(), DPO(), SFT()], ids=lambda stage: stage.name)
def test_a_weight_of_two_is_the_item_twice(stage):
    """In loss and gradient; and a weight of none is the item left out."""
    stage = stage_of(stage)
    sides = 1 if stage.unit == "sequences" else 2
    c = tiny_config(scored=stage.name == "rm")
    model = jax.tree.map(lambda leaf: leaf + 0.01, decoder.init(c, jax.random.key(0)))
    one = random_batch(c, np.random.default_rng(0), 1, 48, [[10, 14, 12, 9]], sides)
    twice = jax.tree.map(lambda array: np.concatenate([array, array]), one)
    real = (one.items > 0).astype(np.float32)
    heavy, first = real.copy(), np.zeros_like(real)
    heavy[0, 0], first[0, 0] = 2, 1
    found = []
    for batch, weight in ((one, heavy), (twice, np.concatenate([real, first]))):
        placed = place(batch._replace(weight=weight), "batch")

        def loss(model, placed=placed):
            total, sums = batch_loss(model, placed, stage, F32)
            return total / sums["loss"][1]

        found.append(jax.value_and_grad(loss)(model))
    assert float(found[0][0]) == pytest.approx(float(found[1][0]), rel=1e-5)
    for a, b in zip(*(jax.tree.leaves(grads) for _, grads in found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)
