"""Optimizers: one step by hand, schedules, what is decayed, and where moments lie."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import mesh, tiny_config
from test_step import F32, packed

from alignjax import optim
from alignjax.config import SFT, Optimizer
from alignjax.models import decoder
from alignjax.sharding import place, to_host
from alignjax.stages import stage_of
from alignjax.step import init_state, train_step

pytestmark = pytest.mark.slow  # minutes


def test_moments_lie_where_the_weights_lie():
    mesh(1, 4, 2)
    model = decoder.init(tiny_config(), jax.random.key(0))
    state = init_state(model, optim.optimizer(Optimizer(), 10))
    for moments in (state.optimizer[1][0].mu, state.optimizer[1][0].nu):
        jax.tree.map(lambda m, w: _same_sharding(m, w), moments, model)


def _same_sharding(moment, weight):
    assert moment.sharding == weight.sharding
    assert moment.dtype == jnp.float32


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_schedule_rises_to_the_peak_and_ends_where_the_run_ends(kind):
    config = Optimizer(learning_rate=1.0, schedule=kind, warmup_ratio=0.1, final_ratio=0.2)
    rates = [float(optim.schedule(config, 100)(i)) for i in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[10] == pytest.approx(1.0)
    assert rates[100] == pytest.approx({"cosine": 0.2, "linear": 0.2, "constant": 1.0}[kind])
    middle = {"cosine": 0.6, "linear": 0.6, "constant": 1.0}[kind]
    assert rates[55] == pytest.approx(middle)


def test_norms_and_biases_are_not_decayed():
    model = decoder.init(tiny_config(qkv_bias=True), jax.random.key(0))
    model = jax.tree.map(lambda leaf: leaf + 1, model)
    tx = optim.optimizer(Optimizer(learning_rate=1.0, weight_decay=0.5, warmup_ratio=0.0), 10)
    zeros = jax.tree.map(jnp.zeros_like, model)
    updates, _ = tx.update(zeros, tx.init(model), model)
    np.testing.assert_allclose(updates.blocks.q, -0.5 * model.blocks.q, rtol=1e-6)
    assert not np.any(updates.blocks.attn_norm) and not np.any(updates.norm)
    assert not np.any(updates.blocks.q_bias)


RATE, DECAY, B1, B2 = 0.01, 0.1, 0.9, 0.95


def two_steps(config: Optimizer, w, gradients):
    tx = optim.optimizer(config, 100)
    weights, state = {"q": jnp.float32(w)}, tx.init({"q": jnp.float32(w)})
    for g in gradients:
        updates, state = tx.update({"q": jnp.float32(g)}, state, weights)
        weights = optax.apply_updates(weights, updates)
    return np.asarray(weights["q"])


def adamw_by_hand(w, gradients):
    m = v = 0
    for t, g in enumerate(gradients, 1):
        m, v = B1 * m + (1 - B1) * g, B2 * v + (1 - B2) * g**2
        step = m / (1 - B1**t) / (np.sqrt(v / (1 - B2**t)) + 1e-8)
        w = w - RATE * (step + DECAY * w)
    return w


def lion_by_hand(w, gradients):
    m = 0
    for g in gradients:
        w = w - RATE * (np.sign(B1 * m + (1 - B1) * g) + DECAY * w)
        m = B2 * m + (1 - B2) * g
    return w


def adafactor_by_hand(w, gradients):
    """Second moments by means of rows and columns; no step has a root mean square above 1."""
    rows = columns = 0
    for t, g in enumerate(gradients, 1):
        b2 = 1 - t**-0.8
        rows = b2 * rows + (1 - b2) * (g**2 + 1e-30).mean(1)
        columns = b2 * columns + (1 - b2) * (g**2 + 1e-30).mean(0)
        step = g / np.sqrt(np.outer(rows, columns) / rows.mean())
        step /= max(1, np.sqrt(np.mean(step**2)))
        w = w - RATE * (step + DECAY * w)
    return w


@pytest.mark.parametrize(
    "rule, by_hand",
    [("adamw", adamw_by_hand), ("lion", lion_by_hand), ("adafactor", adafactor_by_hand)],
)
def test_two_steps_of_each_rule_by_hand(rule, by_hand):
    rng = np.random.default_rng(0)
    w, *gradients = rng.normal(size=(3, 128, 256))
    config = Optimizer(
        rule=rule,
        learning_rate=RATE,
        schedule="constant",
        warmup_ratio=0,
        weight_decay=DECAY,
        clip_norm=1e9,
    )
    got = two_steps(config, w, gradients)
    np.testing.assert_allclose(got, by_hand(w, gradients), rtol=1e-5, atol=1e-5)
    if rule != "adafactor":
        rounded = two_steps(replace(config, moment_dtype="bfloat16"), w, gradients)
        assert 0 < np.abs(rounded - got).max() < 2.1 * RATE


@pytest.mark.parametrize("rule", ["adamw", "lion"])
def test_the_first_moment_can_be_bfloat16(rule):
    state = optim.optimizer(Optimizer(rule=rule, moment_dtype="bfloat16"), 10).init(
        {"q": jnp.zeros((2, 2))}
    )
    assert state[1][0].mu["q"].dtype == jnp.bfloat16
    if rule == "adamw":
        assert state[1][0].nu["q"].dtype == jnp.float32


def test_adafactor_keeps_no_more_than_rows_and_columns():
    mesh(1, 4, 2)
    c = tiny_config(hidden_size=128, mlp_size=256, layers=2)
    model = decoder.init(c, jax.random.key(0))
    state = init_state(model, optim.optimizer(Optimizer(rule="adafactor"), 10))
    weights = sum(leaf.size for leaf in jax.tree.leaves(model))
    assert sum(leaf.size for leaf in jax.tree.leaves(state.optimizer)) < weights / 8


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 4, 2)])
@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_the_embedding_that_do_not_learn_stay_as_they_are(tied, sizes):
    """Bit for bit and under weight decay, while all other weights learn."""
    mesh(*sizes)
    words = [0, 5, 9]
    config = Optimizer(learning_rate=1e-2, weight_decay=0.1, warmup_ratio=0, eps=1e-12)
    tx = optim.optimizer(config, 10, words)
    batch = place(jax.tree.map(lambda a: a[None], packed(1)), None, "batch")
    state = init_state(decoder.init(tiny_config(tied), jax.random.key(0)), tx)
    before = jax.tree.map(to_host, state.model)
    run = partial(train_step, stage=stage_of(SFT()), compute=F32, tx=tx)
    for step in range(2):
        state, metrics = run(state, batch, np.int32(1), np.int32(step))
        assert float(metrics["loss"]) > 0
    after = jax.tree.map(to_host, state.model)
    changed = (after.embed != before.embed).any(1)
    assert np.flatnonzero(changed).tolist() == words
    assert (after.blocks.q != before.blocks.q).all()
    assert tied or (after.head[:128] != before.head[:128]).all()
