"""Fused log-probs: equal to the dense formula, and never the memory of the logits."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh, random_batch, tiny_config

from alignjax.config import DPO, Compute
from alignjax.logps import sequence_logps, token_logps
from alignjax.models import decoder
from alignjax.sharding import place, spec
from alignjax.stages import batch_loss, stage_of


def dense(h_ND, head_VD, tokens_N, vocab=None, chunk=0, reduce_dtype=""):
    """The formula as it is written, with all logits."""
    head_VD = jax.reshard(head_VD, jax.P())[:vocab]
    logits_NV = jnp.einsum("nd,vd->nv", h_ND, head_VD, out_sharding=spec("batch", None))
    hit = jnp.arange(head_VD.shape[0]) == tokens_N[:, None]
    return jnp.where(hit, jax.nn.log_softmax(logits_NV), 0).sum(-1)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2), (1, 4, 2)])
@pytest.mark.parametrize("chunk", [1, 16, 50, 1000])
@pytest.mark.parametrize("vocab", [96, 83])
def test_values_and_gradients_equal_the_dense_formula(sizes, chunk, vocab):
    mesh(*sizes)
    rng = np.random.default_rng(0)
    h = place(rng.standard_normal((24, 16)).astype(np.float32), "batch", None)
    head = place(rng.standard_normal((96, 16)).astype(np.float32), "vocab", "embed")
    tokens = place(rng.integers(0, vocab, 24).astype(np.int32), "batch")
    weight = place(rng.standard_normal(24).astype(np.float32), "batch")

    def total(h, head, fn):
        return (weight * fn(h, head, tokens, vocab, chunk, "float32")).sum()

    ours = jax.jit(jax.value_and_grad(lambda h, w: total(h, w, token_logps), (0, 1)))(h, head)
    theirs = jax.jit(jax.value_and_grad(lambda h, w: total(h, w, dense), (0, 1)))(h, head)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), ours, theirs)
    assert not np.asarray(ours[1][1])[vocab:].any()  # rows beyond the vocabulary learn nothing


def test_a_document_is_never_trained_to_predict_the_next():
    """Only the trained tokens' own log-probs enter, each read one place before its token."""
    c = tiny_config()
    model = decoder.init(c, jax.random.key(0))
    batch = random_batch(c, np.random.default_rng(1), 1, 32, [[7, 9, 6, 8]])
    compute = Compute(dtype="float32", remat="none", vocab_chunk=16)
    logps, counts = sequence_logps(model, place(batch, "batch"), compute)
    assert counts[0].tolist() == [[4, 5], [3, 4]]  # the last n - n // 2 tokens of each
    start = 0
    for side, n in zip(np.asarray(logps).ravel(), [7, 9, 6, 8], strict=True):
        alone = place(batch.tokens[:, start : start + n], "batch", None)
        where = place(np.arange(n, dtype=np.int32)[None], "batch", None)
        h = decoder.hidden_states(model, alone, where, jnp.ones_like(where), compute)[0]
        own = dense(h[:-1], model.embed, alone[0, 1:])[n // 2 - 1 :]
        assert float(side) == pytest.approx(float(own.sum()), rel=1e-5)
        start += n


ROWS, LENGTH, VOCAB, CHUNK = 4, 96, 8192, 256


def step_memory(vocab: int, monkeypatch=None) -> tuple[int, int]:
    """Largest buffer, in elements, and peak temporaries, in bytes, of a compiled gradient."""
    c = tiny_config(vocab_size=vocab, layers=1)
    batch = random_batch(c, np.random.default_rng(0), ROWS, LENGTH, [[48, 48]] * ROWS)
    model = decoder.init(c, jax.random.key(0))
    compute = Compute(dtype="float32", remat="full", vocab_chunk=CHUNK)
    stage = stage_of(DPO())
    grad = jax.jit(jax.grad(lambda m, b: batch_loss(m, b, stage, compute), has_aux=True))
    compiled = grad.lower(model, place(batch, "batch")).compile()
    shapes = re.findall(r"[a-z]+\d+\[([\d,]+)\]", compiled.as_text())
    assert len(shapes) > 100
    largest = max(int(np.prod([int(n) for n in s.split(",")])) for s in shapes)
    return largest, compiled.memory_analysis().temp_size_in_bytes


def test_no_buffer_of_logits(monkeypatch):
    limit = ROWS * LENGTH * VOCAB // 4
    largest, _ = step_memory(VOCAB)
    assert largest < limit
    monkeypatch.setattr("alignjax.logps.token_logps", dense)
    largest, _ = step_memory(VOCAB)
    assert largest >= limit, "the control that makes the logits must be seen"


def test_doubling_the_vocabulary_costs_a_chunk_and_the_head_at_most():
    chunk = ROWS * LENGTH * CHUNK * 4
    head = VOCAB * 32 * 4  # what the head grows by
    (_, small), (_, large) = step_memory(VOCAB), step_memory(2 * VOCAB)
    assert large - small < 1.3 * (chunk + head)
