"""Attention in blocks against the plain formula; what a token may see, by gradients."""

import jax
import numpy as np
import pytest
from conftest import mesh, tiny_config

from alignjax.config import Compute
from alignjax.models import decoder
from alignjax.models.attention import BLOCK, attention
from alignjax.sharding import place, spec


def plain(q, k, v, segments):
    """One query at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    batch, length, heads, groups, size = q.shape
    for b in range(batch):
        for t in range(length):
            seen = [s for s in range(t + 1) if segments[b, s] == segments[b, t]]
            for n in range(heads):
                for g in range(groups):
                    scores = k[b, seen, n] @ q[b, t, n, g] / np.sqrt(size)
                    weights = np.exp(scores - scores.max())
                    out[b, t, n, g] = weights / weights.sum() @ v[b, seen, n]
    return out


@pytest.mark.parametrize("length", [BLOCK, 3 * BLOCK, 50])
def test_matches_the_plain_formula(length):
    rng = np.random.default_rng(0)
    q = rng.standard_normal((2, length, 2, 3, 8)).astype(np.float32)
    k, v = rng.standard_normal((2, 2, length, 2, 8)).astype(np.float32)
    segments = np.sort(rng.integers(1, 5, (2, length)), axis=1).astype(np.int32)
    got = attention(*place((q, k, v, segments, segments), "batch"))
    np.testing.assert_allclose(got, plain(q, k, v, segments), atol=2e-6)


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
