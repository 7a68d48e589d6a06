"""Attention in blocks against the plain formula; what a token may see, by gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh, tiny_config

from alignjax.config import Compute
from alignjax.models import decoder
from alignjax.models.attention import BLOCK, attention
from alignjax.sharding import place, spec, to_host

pytestmark = pytest.mark.slow  # minutes


def plain(q, k, v, segments, window=None):
    """The formula as it is written, with a full mask; float64 where the inputs are."""
    batch, length, heads, groups, size = q.shape
    scores = jnp.einsum("btngk,bsnk->bntgs", q, k) / np.sqrt(size)
    behind = np.arange(length)[:, None] - np.arange(length)
    mask = (segments[:, :, None] == segments[:, None, :]) & (behind >= 0)
    if window is not None:
        mask &= behind < window
    p = jax.nn.softmax(jnp.where(mask[:, None, :, None], scores, -1e30), axis=-1)
    return jnp.einsum("bntgs,bsnk->btngk", p, v)


def random_rows(rng, batch: int, length: int):
    q = rng.standard_normal((batch, length, 2, 3, 8)).astype(np.float32)
    k, v = rng.standard_normal((2, batch, length, 2, 8)).astype(np.float32)
    return q, k, v


SEGMENTS = {
    "one": lambda rng, length: np.ones((2, length), np.int32),
    "a few": lambda rng, length: np.sort(rng.integers(1, 5, (2, length)), axis=1),
    "many": lambda rng, length: np.sort(rng.integers(1, length // 5, (2, length)), axis=1),
    "padded": lambda rng, length: np.where(np.arange(length) < length // 3, 1, 0)[None].repeat(
        2, 0
    ),
}


@pytest.mark.parametrize("window", [None, 1, 40])
@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("length", [BLOCK, 7 * BLOCK, 3 * BLOCK + 17, 50])
def test_values_and_gradients_equal_the_plain_formula(length, segments, window):
    rng = np.random.default_rng(0)
    inputs = random_rows(rng, 2, length)
    segments = SEGMENTS[segments](rng, length).astype(np.int32)
    weight = rng.standard_normal(inputs[0].shape).astype(np.float32)

    def loss(q, k, v, fn):
        return (fn(q, k, v) * weight).sum()

    placed = place(segments, "batch")

    def blocks(q, k, v):
        return attention(q, k, v, placed, placed, window=window)

    expected = plain(*inputs, segments, window)
    np.testing.assert_allclose(blocks(*place(inputs, "batch")), expected, atol=3e-6)
    theirs = jax.grad(loss, (0, 1, 2))(*inputs, lambda *qkv: plain(*qkv, segments, window))
    ours = jax.jit(jax.grad(lambda *qkv: loss(*qkv, blocks), (0, 1, 2)))(*place(inputs, "batch"))
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


def test_blocks_that_no_document_needs_are_not_met():
    """Infinities in another document's keys would spoil whatever is computed with them."""
    rng = np.random.default_rng(0)
    q, k, v = random_rows(rng, 1, 8 * BLOCK)
    segments = np.repeat([[1, 2]], 4 * BLOCK, axis=1).astype(np.int32)
    v[:, : 4 * BLOCK] = np.inf  # 0 x infinity is not a number
    out = np.asarray(attention(*place((q, k, v, segments, segments), "batch")))
    assert np.isfinite(out[:, 4 * BLOCK :]).all()


def test_rows_that_end_within_a_block_are_met_in_blocks(monkeypatch):
    monkeypatch.setattr("alignjax.models.attention._dense", None)
    mesh(2, 1, 2)
    q, k, v = random_rows(np.random.default_rng(0), 2, 2 * BLOCK + 1)
    segments = np.ones(q.shape[:2], np.int32)
    out = attention(*place((q, k, v, segments, segments), "batch"))
    np.testing.assert_allclose(to_host(out), plain(q, k, v, segments), atol=3e-6)


def test_tokens_see_their_own_past_alone():
    """Gradients of one hidden state: non-zero for its own sequence up to it, zero elsewhere."""
    mesh()
    model = decoder.init(tiny_config(), jax.random.key(0))
    compute = Compute(dtype="float32", remat="none")
    length = 2 * BLOCK
    segments = np.where(np.arange(length) < 50, 1, 2)[None].astype(np.int32)
    positions = np.where(segments == 1, np.arange(length), np.arange(length) - 50).astype(np.int32)
    tokens = (np.arange(length)[None] % 100 + 3).astype(np.int32)
    tokens, positions, segments = place((tokens, positions, segments), "batch", None)

    def hidden(noise, at):
        rows = spec("batch", None, None)
        shifted = model.embed.at[tokens].get(out_sharding=rows) + noise
        original, decoder._embed = decoder._embed, lambda *_: shifted
        try:
            return jax.reshard(
                decoder.hidden_states(model, tokens, positions, segments, compute), jax.P()
            )[0, at, 0]
        finally:
            decoder._embed = original

    for at, seen in ((20, range(21)), (49, range(50)), (50, range(50, 51)), (127, range(50, 128))):
        grad = jax.grad(hidden)(place(np.zeros((1, length, 32), np.float32), "batch"), at)
        assert np.flatnonzero(np.abs(np.asarray(grad[0])).sum(-1)).tolist() == list(seen)
