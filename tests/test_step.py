"""The training step: packing, devices, micro-batches and recomputation never change it."""

from functools import partial

import jax
import numpy as np
import pytest
from conftest import mesh, random_batch, tiny_config

from alignjax import optim, step
from alignjax.config import DPO, RM, SFT, Compute, Optimizer
from alignjax.data.batches import PackedBatch
from alignjax.logps import sequence_logps
from alignjax.models import decoder
from alignjax.sharding import place, to_host
from alignjax.stages import batch_loss, stage_of
from alignjax.step import init_state, score_step, train_step
from alignjax.weights.source import leaf_name

pytestmark = pytest.mark.slow  # minutes

F32 = Compute(dtype="float32", remat="none", vocab_chunk=32)
# Sequences of each row, of uneven lengths and trained parts.
LENGTHS = [
    [9, 7, 12, 5],
    [20, 11],
    [6, 6, 6, 13],
    [15, 14],
    [8, 19],
    [31, 9],
    [5, 7, 11, 9],
    [4, 4],
]


def packed(sides: int = 2) -> PackedBatch:
    return random_batch(tiny_config(), np.random.default_rng(3), 8, 48, LENGTHS, sides)


PER_ITEM = ("items", "ref", "margin", "weight", "rank")


def one_a_row(batch: PackedBatch, sides: int) -> PackedBatch:
    """The same items, one to a row: pairs keep their two sides."""
    rows = []
    for r in range(len(batch.tokens)):
        for p in np.flatnonzero(batch.items[r]):
            row = PackedBatch(*(np.zeros_like(a[r]) for a in batch))
            item = {name: getattr(batch, name)[r, p : p + 1] for name in PER_ITEM}
            row = row._replace(**item)
            at, targets = 0, []
            for s in range(sides):
                here = np.flatnonzero(batch.segments[r] == sides * p + s + 1)
                trained = here[np.isin(here, batch.targets[r][batch.targets[r] > 0])]
                n = len(here)
                row.tokens[at : at + n] = batch.tokens[r, here]
                row.positions[at : at + n] = batch.positions[r, here]
                row.segments[at : at + n] = s + 1
                targets += (trained - here[0] + at).tolist()
                at += n
            row.targets[: len(targets)] = targets
            rows.append(row)
    return PackedBatch(*(np.stack(arrays) for arrays in zip(*rows, strict=True)))


def gradients(batch: PackedBatch, micro: int, stage, compute=F32, tied=True):
    """Metrics and gradients of a whole step, on the host."""
    model = decoder.init(tiny_config(tied), jax.random.key(0))
    lead = jax.tree.map(lambda a: a.reshape(micro, -1, *a.shape[1:]), batch)
    fn = jax.jit(step.gradients, static_argnames=("stage", "compute"))
    grads, metrics = fn(model, place(lead, None, "batch"), np.int32(micro), stage, compute)
    return {n: float(value) for n, value in metrics.items()}, jax.tree.map(to_host, grads)


def assert_same(one, other, tolerance=1e-5):
    """Per leaf, the norm of the difference over the norm; a leaf that should be zero is zero."""
    assert one[0] == pytest.approx(other[0], rel=1e-5, abs=1e-6)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(one[1]), jax.tree.leaves(other[1]), strict=True
    ):
        if not np.any(a):
            assert not np.any(b), leaf_name(path)
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(a), leaf_name(path)


STAGES = {"dpo": (stage_of(DPO(beta=0.1, label_smoothing=0.1)), 2), "sft": (stage_of(SFT()), 1)}


@pytest.mark.parametrize("name", STAGES)
def test_packed_equals_one_item_a_row(name):
    stage, sides = STAGES[name]
    batch = packed(sides)
    single = one_a_row(batch, sides)
    assert len(single.tokens) == (batch.items > 0).sum() > len(batch.tokens)
    assert_same(gradients(batch, 1, stage), gradients(single, 1, stage))


@pytest.mark.parametrize("name", STAGES)
def test_micro_batches_change_nothing(name):
    stage, sides = STAGES[name]
    one = gradients(packed(sides), 1, stage)
    assert_same(one, gradients(packed(sides), 4, stage))


@pytest.mark.parametrize(
    "name, tied, sizes",
    [
        ("dpo", True, (1, 8, 1)),
        ("dpo", False, (1, 4, 2)),
        ("sft", True, (1, 4, 2)),
        ("sft", False, (2, 2, 2)),
    ],
)
def test_devices_change_nothing(name, tied, sizes):
    stage, sides = STAGES[name]
    one = gradients(packed(sides), 1, stage, tied=tied)
    mesh(*sizes)
    assert_same(one, gradients(packed(sides), 1, stage, tied=tied))


@pytest.mark.parametrize("remat", ["dots", "full", "offload"])
def test_recomputation_changes_nothing(remat):
    stage, sides = STAGES["dpo"]
    compute = Compute(dtype="float32", remat=remat, vocab_chunk=32)
    assert_same(gradients(packed(), 1, stage), gradients(packed(), 1, stage, compute))


def test_padding_rows_and_micro_batches_beyond_the_count_change_nothing():
    stage, _ = STAGES["dpo"]
    batch = packed()
    empty = PackedBatch(*(np.concatenate([a, np.zeros_like(a)]) for a in batch))
    assert_same(gradients(batch, 1, stage), gradients(empty, 1, stage))


def test_the_gradient_is_that_of_the_mean_not_of_the_mean_of_means():
    """Against jax.grad of sum / count over everything at once."""
    stage, sides = STAGES["sft"]
    batch = packed(sides)
    model = decoder.init(tiny_config(), jax.random.key(0))

    placed = place(batch, "batch")

    def mean(model):
        _, sums = batch_loss(model, placed, stage, F32)
        return sums["loss"][0] / sums["loss"][1]

    value, grads = jax.value_and_grad(mean)(model)
    got = gradients(batch, 4, stage)
    assert got[0]["loss"] == pytest.approx(float(value), rel=1e-6)
    assert_same((got[0], jax.tree.map(to_host, grads)), got)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-6), ("bfloat16", 2e-3)])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 4, 2)])
def test_dpo_starts_at_ln_2_and_leaves_it(dtype, tolerance, sizes):
    mesh(*sizes)
    compute = Compute(dtype=dtype, remat="none", vocab_chunk=32)
    model = decoder.init(tiny_config(), jax.random.key(0))
    lead = jax.tree.map(lambda a: a[None], packed())
    batch = place(lead, None, "batch")
    lead = lead._replace(ref=to_host(score_step(model, batch, compute=compute))[None])
    batch = place(lead, None, "batch")
    tx = optim.optimizer(Optimizer(learning_rate=1e-3, warmup_ratio=0.0), 10)
    advance = partial(train_step, stage=stage_of(DPO()), compute=compute, tx=tx)
    state, first = advance(init_state(model, tx), batch, np.int32(1), np.int32(0))
    assert abs(float(first["loss"]) - np.log(2)) <= tolerance
    assert abs(float(first["rewards/margins"])) <= 4 * tolerance
    state, second = advance(state, batch, np.int32(1), np.int32(1))
    assert float(second["loss"]) < np.log(2) - 10 * tolerance
    assert float(second["rewards/margins"]) > 0


@pytest.mark.parametrize("kind", [DPO, SFT, RM])
def test_equal_configs_have_one_stage_and_one_program(kind):
    first, again, other = stage_of(kind()), stage_of(kind()), stage_of(kind(seed=1))
    assert first == again and hash(first) == hash(again) and first != other
    traced = []

    @partial(jax.jit, static_argnames="stage")
    def step(x, stage):
        traced.append(stage)
        return x + 1

    for stage in (first, again):
        step(np.float32(1), stage=stage)
    assert traced == [first]


def soft(x):
    """-log sigmoid(x)."""
    return np.log1p(np.exp(-x))


def by_hand(config: DPO, pi, ref, tokens, weight) -> dict[str, np.ndarray]:
    """What is reported of each pair; arguments float64 [pairs, 2], and [pairs].

    The SFT term of a pair is its share of the mean over all chosen tokens.
    """
    reward = config.beta * (pi / tokens if config.loss == "simpo" else pi - ref)
    margin = reward[:, 0] - reward[:, 1]
    ahead, e = margin - config.margin, config.label_smoothing
    difference = ((pi - ref) / tokens) @ [1, -1]
    loss = {
        "sigmoid": (1 - e) * soft(ahead) + e * soft(-ahead),
        "simpo": (1 - e) * soft(ahead) + e * soft(-ahead),
        "robust": ((1 - e) * soft(ahead) - e * soft(-ahead)) / (1 - 2 * e),
        "hinge": np.maximum(0, 1 - ahead),
        "ipo": (difference - 1 / (2 * config.beta)) ** 2,
    }[config.loss]
    rate = weight.sum() / (weight * tokens[:, 0]).sum()
    found = {
        "loss": loss - config.sft_weight * rate * pi[:, 0],
        "rewards/chosen": reward[:, 0],
        "rewards/rejected": reward[:, 1],
        "rewards/margins": margin,
        "rewards/accuracies": (margin > 0) + 0.5 * (margin == 0),
        "logps/chosen": pi[:, 0],
        "logps/rejected": pi[:, 1],
        "logps/margins": pi[:, 0] - pi[:, 1],
        "tokens/chosen": tokens[:, 0],
        "tokens/rejected": tokens[:, 1],
    }
    share = len(pi) / tokens[:, 0].sum()  # metrics know no weights
    return found | ({"nll_loss": -share * pi[:, 0]} if config.sft_weight else {})


KINDS = [
    DPO(),
    DPO(label_smoothing=0.1),
    DPO(margin=0.5, beta=0.5),
    DPO(loss="robust", label_smoothing=0.2),
    DPO(loss="hinge", beta=0.05),
    DPO(loss="ipo"),
    DPO(loss="simpo", beta=2.0, margin=0.5),
    DPO(sft_weight=0.2),
]


@pytest.mark.parametrize(
    "config", KINDS, ids=lambda c: f"{c.loss}-{c.label_smoothing}-{c.margin}-{c.sft_weight}"
)
def test_loss_gradient_and_metrics_of_every_kind_by_hand(config):
    """The gradient: that of each sequence's log-prob, weighed by differences of the hand's loss."""
    stage, batch = stage_of(config), packed()
    model = decoder.init(tiny_config(), jax.random.key(0))
    placed = place(batch, "batch")
    real = batch.items > 0
    pi, tokens = (np.float64(x)[real] for x in sequence_logps(model, placed, F32))
    ref, weight = np.float64(batch.ref[real]), np.float64(batch.weight[real])
    metrics, grads = gradients(batch, 1, stage)
    found = by_hand(config, pi, ref, tokens, weight)
    expected = {name: values.mean() for name, values in found.items()}
    expected["loss"] = np.average(found["loss"], weights=weight)
    close = pytest.approx(expected, rel=1e-5, abs=1e-6)  # margins are differences of rewards
    assert {name: metrics[name] for name in expected} == close
    assert set(metrics) == set(expected)

    slopes, h = np.zeros_like(pi), 1e-6
    for side in range(2):
        step = h * np.eye(2)[side]
        up, down = (
            by_hand(config, at, ref, tokens, weight)["loss"] for at in (pi + step, pi - step)
        )
        slopes[:, side] = weight * (up - down) / (2 * h) / weight.sum()
    weights = np.zeros(batch.ref.shape, np.float32)
    weights[real] = slopes

    def weighed(model):
        return (sequence_logps(model, placed, F32)[0] * weights).sum()

    assert_same((metrics, jax.tree.map(to_host, jax.grad(weighed)(model))), (metrics, grads))


@pytest.mark.parametrize(
    "config", [DPO(), DPO(sft_weight=0.2), SFT()], ids=["dpo", "dpo-sft", "sft"]
)
def test_a_step_of_items_that_all_weigh_nothing_has_no_gradient(config):
    batch = packed(1 if isinstance(config, SFT) else 2)
    metrics, grads = gradients(batch._replace(weight=0 * batch.weight), 2, stage_of(config))
    assert metrics["loss"] == 0 and all(np.isfinite(value) for value in metrics.values())
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(grads))


def stepped(decay: float, steps: int, sizes=(1, 1, 1)):
    """Models after each step, from before the first one, and the last state."""
    mesh(*sizes)
    batch = place(jax.tree.map(lambda a: a[None], packed()), None, "batch")
    tx = optim.optimizer(Optimizer(learning_rate=1e-2, warmup_ratio=0.0), 10)
    advance = partial(train_step, stage=stage_of(DPO()), compute=F32, tx=tx, ema_decay=decay)
    state = init_state(decoder.init(tiny_config(), jax.random.key(0)), tx, decay)
    models = [jax.tree.map(to_host, state.model)]
    for index in range(steps):
        state, _ = advance(state, batch, np.int32(1), np.int32(index))
        models.append(jax.tree.map(to_host, state.model))
    return models, state


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 4, 2)])
def test_two_steps_of_the_average_by_hand(sizes):
    models, state = stepped(0.75, 2, sizes)
    for zero, one, two, average in zip(*map(jax.tree.leaves, (*models, state.ema)), strict=True):
        expected = np.float64(zero) * 0.75**2 + np.float64(one) * 0.75 * 0.25 + two * 0.25
        np.testing.assert_allclose(to_host(average), expected, rtol=1e-6, atol=1e-7)
        assert average.dtype == np.float32
    assert jax.tree.all(jax.tree.map(lambda a, b: a.sharding == b.sharding, state.ema, state.model))
    assert state.result() is state.ema


def test_an_average_changes_no_step_and_without_one_the_state_is_smaller():
    plain, without = stepped(0.0, 2)
    averaged, state = stepped(0.75, 2)
    jax.tree.map(np.testing.assert_array_equal, plain, averaged)
    assert without.ema is None and without.result() is without.model
    names = [leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    kept = [leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(without)]
    assert kept == [name for name in names if not name.startswith("ema.")]
    assert len(names) == len(kept) + len(jax.tree.leaves(state.model))


def test_a_step_that_is_not_finite_changes_nothing_nor_does_any_later_one():
    stage, _ = STAGES["dpo"]
    good = jax.tree.map(lambda a: a[None], packed())
    bad = good._replace(ref=np.where(good.items[..., None] == 3, np.nan, good.ref))
    tx = optim.optimizer(Optimizer(learning_rate=1e-3), 10)
    advance = partial(train_step, stage=stage, compute=F32, tx=tx, ema_decay=0.5)
    state = init_state(decoder.init(tiny_config(), jax.random.key(0)), tx, 0.5)
    state, _ = advance(state, place(good, None, "batch"), np.int32(1), np.int32(0))
    before = jax.tree.map(to_host, state)
    state, metrics = advance(state, place(bad, None, "batch"), np.int32(1), np.int32(1))
    assert np.isnan(float(metrics["loss"]))
    state, metrics = advance(state, place(good, None, "batch"), np.int32(1), np.int32(2))
    assert np.isfinite(float(metrics["loss"]))
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(to_host, state))
