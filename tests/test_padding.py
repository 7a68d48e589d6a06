"""Packing changes nothing: the same loss and gradients as padded rows, and as one by one.

The items of a step go through training's own gradient, packed. Against it stand each sequence in a
row of its own, padded to one length, and each by itself, unpadded, in a forward pass of its own.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config

from alignjax import step
from alignjax.config import DPO, RM, SFT, Compute
from alignjax.config import Batch as BatchConfig
from alignjax.data.batches import PackedBatch, packed_steps
from alignjax.data.packing import plan_training
from alignjax.data.tokenset import TokenSet, in_memory
from alignjax.models import decoder
from alignjax.sharding import place, to_host
from alignjax.stages import Facts, stage_of

pytestmark = pytest.mark.slow  # minutes

F32 = Compute(dtype="float32", remat="none", vocab_chunk=32)
LENGTHS = (5, 9, 14)  # few, since each is compiled
RANKS = {
    "sft": [(1,)] * 14,
    "dpo": [(1, 2)] * 7,
    "rm": [(1, 2)] * 7,
    "rm of sets": [(1, 1, 2, 3), (1, 2), (1, 2, 3), (1, 2, 2, 2), (1, 2)],
}
CONFIGS = {
    "sft": SFT(),
    "dpo": DPO(beta=0.5, sft_weight=0.1),
    "rm": RM(centering=0.05),
    "rm of sets": RM(centering=0.05),
}


def random_items(ranks: list[tuple[int, ...]]) -> tuple[TokenSet, np.ndarray]:
    """Items of random tokens, margins and weights, and random reference log-probs of them."""
    rng = np.random.default_rng(4)
    count, sides = sum(map(len, ranks)), max(map(len, ranks))
    offsets = np.concatenate([[0], np.cumsum(rng.choice(LENGTHS, count))])
    trained = rng.random(offsets[-1]) < 0.5
    trained[offsets[1:] - 1], trained[offsets[:-1]] = True, False
    tokens = rng.integers(3, 128, offsets[-1]).astype(np.int32)
    data = in_memory(tokens, trained, offsets, sides, ranks=ranks)
    margin, weight = rng.uniform(-1, 1, (2, len(ranks))).astype(np.float32)
    ref = data.by_item(rng.uniform(-40, -10, count).astype(np.float32))
    return dataclasses.replace(data, margin=margin, weight=1 + weight), ref


def start(name: str):
    model = decoder.init(tiny_config(scored=name.startswith("rm")), jax.random.key(0))
    if name.startswith("rm"):
        model.score = jax.random.normal(jax.random.key(1), model.score.shape)
    return model


def packed(name: str, data: TokenSet, ref: np.ndarray):
    """Loss and gradients of a step of all items in two micro-batches, as training takes it."""
    field = "sequences" if name == "sft" else "pairs"
    config = BatchConfig(**{field: len(data)}, row_length=64)
    plan = plan_training(data.lengths(), config, 0)
    assert 2 < len(plan.rows) - 1 < len(data)
    batch = packed_steps(data, plan, -(-(len(plan.rows) - 1) // 2), ref)[0]
    assert len(batch.tokens) == 2
    run = jax.jit(step.gradients, static_argnames=("stage", "compute"))
    stage = stage_of(CONFIGS[name])
    grads, metrics = run(start(name), place(batch, None, "batch"), np.int32(2), stage, F32)
    return float(metrics["loss"]), jax.tree.map(to_host, grads)


def alone(data: TokenSet, sequence: int, length: int) -> PackedBatch:
    """A row of one sequence, filled up to a length."""
    own = slice(*data.offsets[sequence:][:2])
    count = own.stop - own.start
    tokens, positions, segments, targets = np.zeros((4, 1, length), np.int32)
    tokens[0, :count], positions[0, :count] = data.tokens[own], np.arange(count)
    segments[0, :count] = 1
    places = np.flatnonzero(data.trained[own])
    targets[0, : len(places)] = places
    one = np.ones((1, 1), np.int32)
    numbers = np.ones((1, 1), np.float32)
    ref, rank = np.zeros((1, 1, 1), np.float32), np.ones((1, 1, 1), np.int32)
    return PackedBatch(tokens, positions, segments, targets, one, ref, numbers, numbers, rank)


def unpacked(name: str, data: TokenSet, ref: np.ndarray, padded: bool):
    """Loss and gradients from a score of each sequence that shares its row with no other."""
    stage, count = stage_of(CONFIGS[name]), len(data.ranks)
    lengths = np.full(count, max(LENGTHS)) if padded else np.diff(data.offsets)
    rows = [alone(data, i, int(n)) for i, n in enumerate(lengths)]
    if padded:
        rows = [jax.tree.map(lambda *arrays: np.concatenate(arrays), *rows)]
    batches = [place(row, "batch") for row in rows]
    score = jax.jit(lambda model, batch: stage.scores(model, batch, F32))
    where = np.nonzero(data.real())
    chosen = np.float64(data.weight) * data.trained_counts()[:, 0]
    rate = data.weight.sum() / chosen.sum()
    facts = (data.margin, data.weight, data.by_item(data.ranks), rate)

    def loss(model):
        parts = zip(*(score(model, batch) for batch in batches), strict=True)
        scores, tokens = (
            jnp.zeros(ref.shape)
            .at[where]
            .set(jnp.concatenate([jax.reshard(x, jax.P()).ravel() for x in part]))
            for part in parts
        )
        values, counts = stage.terms(scores, Facts(ref, tokens, *facts))["loss"]
        return values.sum() / counts.sum()

    value, grads = jax.value_and_grad(loss)(start(name))
    return float(value), jax.tree.map(to_host, grads)


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "one by one"])
@pytest.mark.parametrize("name", RANKS)
def test_packed_is(name, padded):
    data, ref = random_items(RANKS[name])
    one, other = packed(name, data, ref), unpacked(name, data, ref, padded)
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    for a, b in zip(jax.tree.leaves(one[1]), jax.tree.leaves(other[1]), strict=True):
        assert np.any(a) == np.any(b)
        assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(a)
