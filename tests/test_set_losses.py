"""Sets of responses: the loss by hand, a set of two as a pair, and the batches that hold sets."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import mesh, tiny_config

from alignjax import evaluation, losses, step
from alignjax.config import RM, Compute
from alignjax.config import Batch as BatchConfig
from alignjax.data.batches import packed_steps
from alignjax.data.packing import plan_training
from alignjax.data.tokenset import TokenSet, in_memory
from alignjax.models import decoder
from alignjax.rewards import sequence_rewards
from alignjax.sharding import place, to_host
from alignjax.stages import Facts, stage_of

pytestmark = pytest.mark.slow  # minutes

F32 = Compute(dtype="float32", remat="none")
RANKS = [(1, 1, 2, 3), (1, 2), (1, 2, 3), (1, 2, 2, 2), (1, 2)]  # of sets, ties among them


def random_sets(ranks=RANKS, seed: int = 0) -> TokenSet:
    """Sets of random sequences of 2 to 12 tokens, each with a margin and a weight."""
    rng = np.random.default_rng(seed)
    sides = max(map(len, ranks))
    lengths = rng.integers(2, 13, sum(map(len, ranks)))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    trained = rng.random(offsets[-1]) < 0.5
    trained[offsets[1:] - 1], trained[offsets[:-1]] = True, False
    tokens = rng.integers(3, 128, offsets[-1]).astype(np.int32)
    found = in_memory(tokens, trained, offsets, sides, ranks=ranks)
    margin, weight = rng.uniform(-1, 1, (2, len(ranks))).astype(np.float32)
    return dataclasses.replace(found, margin=margin, weight=1 + weight)


def model_with_scores(key: int = 0):
    model = decoder.init(tiny_config(scored=True), jax.random.key(key))
    model.score = jax.random.normal(jax.random.key(key + 1), model.score.shape)
    return model


def one_step(data: TokenSet, micro: int = 2, length: int = 64):
    """All items as one step of rows of `length`, on the host: [A, B, ...]."""
    plan = plan_training(data.lengths(), BatchConfig(pairs=len(data), row_length=length), 0)
    return packed_steps(data, plan, micro)[0]


def gradients(data: TokenSet, config: RM, **rows):
    """Metrics and gradients of a step of all items, on the host."""
    batch = one_step(data, **rows)
    run = jax.jit(step.gradients, static_argnames=("stage", "compute"))
    micro = np.int32(len(batch.tokens))
    grads, metrics = run(
        model_with_scores(), place(batch, None, "batch"), micro, stage_of(config), F32
    )
    return {n: float(value) for n, value in metrics.items()}, jax.tree.map(to_host, grads)


def by_hand(rewards: list, data: TokenSet, centering: float) -> dict[str, float]:
    """What a step reports of sets, in float64; `rewards` are those of each set."""
    loss, pairs = [], []
    for own, start, margin in zip(rewards, data.starts, data.margin, strict=False):
        ranks, of_set = data.ranks[start : start + len(own)], []
        for i in range(len(own)):
            for j in range(len(own)):
                if ranks[i] < ranks[j]:
                    w, low = np.float64(own[i]), np.float64(own[j])
                    ahead = w - low - np.float64(margin)
                    of_set.append(np.log1p(np.exp(-ahead)) + centering * (w + low) ** 2)
                    pairs.append((w, low))
        loss.append(np.mean(of_set))
    w, low = np.array(pairs).T
    every = np.concatenate([np.float64(own) for own in rewards])
    return {
        "loss": np.average(loss, weights=np.float64(data.weight)),
        "rewards/chosen": w.mean(),
        "rewards/rejected": low.mean(),
        "rewards/margins": (w - low).mean(),
        "rewards/accuracies": ((w > low) + 0.5 * (w == low)).mean(),
        "rewards/min": every.min(),
        "rewards/mean": every.mean(),
        "rewards/max": every.max(),
    }


@pytest.mark.parametrize("centering", [0.0, 0.05])
def test_loss_and_metrics_of_a_step_by_hand(centering):
    data = random_sets()
    batch = one_step(data)
    found, real = (
        np.concatenate([to_host(part) for part in parts])
        for parts in zip(
            *(
                sequence_rewards(
                    model_with_scores(),
                    place(jax.tree.map(lambda x, m=m: x[m], batch), "batch"),
                    F32,
                )
                for m in range(len(batch.tokens))
            ),
            strict=True,
        )
    )
    items = batch.items.reshape(-1, batch.items.shape[-1])
    rewards = {
        items[r, p] - 1: found[r, p][real[r, p] > 0] for r, p in np.argwhere(items > 0).tolist()
    }
    assert [len(rewards[i]) for i in range(len(data))] == [len(own) for own in RANKS]
    expected = by_hand([rewards[i] for i in range(len(data))], data, centering)
    metrics, _ = gradients(data, RM(centering=centering))
    assert metrics == pytest.approx(expected, rel=1e-5)


def test_the_gradient_of_a_set_of_four_by_hand():
    """d loss / d reward of a tied set with a weight and a margin, from sigmoids in float64."""
    rewards = np.float32([[0.3, -0.2, 0.9, 0.1]])
    facts = Facts(None, None, np.float32([0.5]), np.float32([3]), np.int32([[1, 1, 2, 3]]))
    terms = stage_of(RM(centering=0.1)).terms

    def loss(rewards):
        return terms(rewards, facts)["loss"][0][0]

    value, grads = jax.value_and_grad(loss)(rewards)
    expected, total, r = np.zeros(4), 0.0, np.float64(rewards[0])
    for w, low in ((0, 2), (0, 3), (1, 2), (1, 3), (2, 3)):
        behind = 1 / (1 + np.exp(r[w] - r[low] - 0.5))
        total += 3 / 5 * (-np.log(1 - behind) + 0.1 * (r[w] + r[low]) ** 2)
        expected[[w, low]] += 3 / 5 * (np.array([-behind, behind]) + 0.2 * (r[w] + r[low]))
    assert float(value) == pytest.approx(total, rel=1e-5)
    np.testing.assert_allclose(grads[0], expected, rtol=1e-5)


def test_equal_rewards_count_half_and_tied_responses_not_at_all():
    rewards = np.float32([[1, 1, 0, 5]])
    one = np.ones(1, np.float32)
    facts = Facts(None, None, 0 * one, one, np.int32([[1, 2, 2, 3]]))
    values, counts = stage_of(RM()).terms(rewards, facts)["rewards/accuracies"]
    # Of five pairs one is a tie of rewards, one is right and three are behind.
    assert (float(values[0]), float(counts[0])) == (1.5, 5)


def test_a_set_of_two_is_a_pair_to_the_bit():
    pair = bradley_terry_terms(np.float32([[0.7, -0.4], [1.5, 2.5]]))
    sets = bradley_terry_terms(np.float32([[0.7, -0.4, 0], [1.5, 2.5, 0]]))
    for name, parts in pair.items():
        for part, other in zip(parts, sets[name], strict=True):
            assert np.asarray(part).tobytes() == np.asarray(other).tobytes(), name
    w, low = np.float32([0.7, 1.5]), np.float32([-0.4, 2.5])
    loss = losses.bradley_terry_loss(w, low, np.float32([0.1, 0.2]), 0.01) * np.float32([1, 2])
    assert np.asarray(pair["loss"][0]).tobytes() == np.asarray(loss).tobytes()


def bradley_terry_terms(rewards: np.ndarray) -> dict:
    """Terms of two pairs, perhaps with places for a third response that they do not have."""
    ranks = np.zeros(rewards.shape, np.int32)
    ranks[:, :2] = 1, 2
    facts = Facts(None, None, np.float32([0.1, 0.2]), np.float32([1, 2]), ranks)
    return stage_of(RM(centering=0.01)).terms(rewards, facts)


def test_a_pair_among_larger_sets_has_the_gradient_of_a_pair():
    """The loss and gradient of sets of two, and those of them beside a set of weight 0."""
    pairs = random_sets([(1, 2)] * 3)
    both = random_sets([(1, 2)] * 3 + [(1, 2, 3)])
    count = pairs.offsets[-1]
    tokens = np.concatenate([pairs.tokens, np.full(both.offsets[-1], 5, np.int32)[:30]])
    offsets = np.concatenate([pairs.offsets, count + np.array([10, 20, 30])])
    both = dataclasses.replace(
        both,
        tokens=tokens,
        trained=np.ones(len(tokens), bool),
        offsets=offsets,
        margin=np.append(pairs.margin, 0).astype(np.float32),
        weight=np.append(pairs.weight, 0).astype(np.float32),
    )
    alone, beside = gradients(pairs, RM()), gradients(both, RM())
    assert alone[0]["loss"] == pytest.approx(beside[0]["loss"], rel=1e-6)
    for a, b in zip(jax.tree.leaves(alone[1]), jax.tree.leaves(beside[1]), strict=True):
        assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(a)


@pytest.mark.parametrize("sizes", [(1, 4, 2), (2, 2, 2)])
def test_devices_change_nothing(sizes):
    one = gradients(random_sets(), RM(centering=0.01), micro=4)
    mesh(*sizes)
    many = gradients(random_sets(), RM(centering=0.01), micro=4)
    assert one[0] == pytest.approx(many[0], rel=1e-5)
    for a, b in zip(jax.tree.leaves(one[1]), jax.tree.leaves(many[1]), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(a)


def test_every_response_is_read_back_from_the_batches():
    data = random_sets([(1, 2), (1, 1, 2, 3, 4), (1, 2, 3)] * 9)
    plan = plan_training(data.lengths(), BatchConfig(pairs=5, row_length=64, epochs=2), 0)
    steps, seen = packed_steps(data, plan, 2), []
    for number in range(len(steps)):
        batch = steps[number]
        for m, r, p in np.argwhere(batch.items > 0).tolist():
            item = batch.items[m, r, p] - 1
            seen.append(item)
            start, end = data.starts[item : item + 2]
            assert batch.rank[m, r, p].tolist() == [
                *data.ranks[start:end],
                *[0] * (5 - end + start),
            ]
            for side in range(5):
                here = batch.segments[m, r] == 5 * p + side + 1
                own = slice(*data.offsets[start + side :][:2]) if side < end - start else slice(0)
                assert batch.tokens[m, r, here].tolist() == data.tokens[own].tolist()
        assert not batch.rank[batch.items == 0].any()
    assert sorted(seen) == sorted([*range(27)] * 2)


def test_an_evaluation_says_what_a_step_of_all_sets_says():
    data, model = random_sets(RANKS * 3), model_with_scores()
    rewards = evaluation.score(model, data, 64, 2, F32, scores=sequence_rewards)
    assert rewards.shape == (15, 4) and not rewards[~data.real()].any()
    config = RM(centering=0.02)
    found = evaluation.logged(stage_of(config), rewards, None, data)
    found = {name: value for name, value in found.items() if "=" not in name}
    metrics, _ = gradients(data, config)
    assert found == pytest.approx({f"eval_{n}": value for n, value in metrics.items()}, rel=1e-5)


def test_longer_wins_counts_every_pair():
    data = random_sets()
    tokens, right = data.trained_counts(), []
    for item, better, worse in np.concatenate([np.stack(p, 1) for p in data.pairs()]):
        right.append(0.5 + 0.5 * np.sign(tokens[item, better] - tokens[item, worse]))
    assert len(right) == 5 + 1 + 3 + 3 + 1
    assert evaluation.longer_wins(data) == pytest.approx(np.mean(right))
