"""The sampler against the full forward pass."""

import jax
import numpy as np
import pytest
from conftest import mesh, tiny_config
from test_logps import dense

from alignjax.config import Compute
from alignjax.generation.native import generate
from alignjax.models import decoder
from alignjax.sharding import place

F32 = Compute(dtype="float32", remat="none")
PROMPTS = [[5, 9, 33], [7], [40, 41, 42, 43, 44, 45, 46], [99, 3]]


def greedy(model, prompt: list[int], count: int) -> list[int]:
    """The likeliest next token, by a full forward pass each time."""
    ids = list(prompt)
    for _ in range(count):
        tokens = place(np.asarray([ids], np.int32), "batch", None)
        where = place(np.arange(len(ids), dtype=np.int32)[None], "batch", None)
        h = decoder.hidden_states(
            model, tokens, where, place(np.ones((1, len(ids)), np.int32)), F32
        )
        ids.append(int(np.argmax(np.asarray(h[0, -1] @ model.embed.T))))
    return ids[len(prompt) :]


@pytest.fixture
def model():
    return jax.tree.map(lambda w: 3 * w, decoder.init(tiny_config(), jax.random.key(1)))


def test_greedy_decoding_with_the_cache_equals_the_full_forward_pass(model):
    got = generate(model, PROMPTS, [], 12, 0.0, 0, 4, F32)
    assert got == [greedy(model, prompt, 12) for prompt in PROMPTS]


def test_answers_do_not_depend_on_the_batch_or_the_mesh(model):
    one = generate(model, PROMPTS, [], 8, 0.0, 0, 1, F32)
    host = jax.tree.map(np.asarray, model)
    mesh(1, 2, 2)
    sharded = decoder.init(tiny_config(), jax.random.key(1))
    sharded = jax.tree.map(lambda like, w: jax.device_put(w, like.sharding), sharded, host)
    assert generate(sharded, PROMPTS, [], 8, 0.0, 0, 2, F32) == one


def test_an_end_token_closes_an_answer_and_is_left_out(model):
    free = generate(model, PROMPTS, [], 12, 0.0, 0, 4, F32)
    end = free[0][5]
    got = generate(model, PROMPTS, [end], 12, 0.0, 0, 4, F32)
    for before, after in zip(free, got, strict=True):
        assert after == (before[: before.index(end)] if end in before else before)
    kept = generate(model, PROMPTS, [end], 12, 0.0, 0, 4, F32, keep_end=True)
    for before, after in zip(free, kept, strict=True):
        assert after == (before[: before.index(end) + 1] if end in before else before)


def test_sampling_repeats_with_its_seed_and_follows_the_probabilities(model):
    draws = generate(model, [[5, 9, 33]] * 400, [], 1, 1.0, 7, 400, F32)
    assert draws == generate(model, [[5, 9, 33]] * 400, [], 1, 1.0, 7, 400, F32)
    tokens = place(np.asarray([[5, 9, 33]], np.int32), "batch", None)
    where = place(np.arange(3, dtype=np.int32)[None], "batch", None)
    h = decoder.hidden_states(model, tokens, where, where * 0 + 1, F32)[:, -1]
    each = [float(dense(h, model.embed, np.asarray([t]))[0]) for t in range(128)]
    top = int(np.argmax(each))
    share = np.mean([draw[0] == top for draw in draws])
    p = np.exp(each[top])
    assert abs(share - p) < 4 * np.sqrt(p * (1 - p) / 400)
