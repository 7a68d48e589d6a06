"""A model on a mesh: any vocabulary, any number of key/value heads, the same log-probs."""

from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest
from conftest import mesh, random_batch, write_model
from presets import PRESETS, tiny
from safetensors.numpy import load_file

from alignjax.config import DPO, Compute
from alignjax.generation.native import generate
from alignjax.logps import sequence_logps
from alignjax.models import decoder
from alignjax.models.shapes import leaf_shapes, true_shape
from alignjax.sharding import check_divides, place, to_host
from alignjax.stages import batch_loss, stage_of
from alignjax.weights.loading import load
from alignjax.weights.safetensors import export, open_directory
from alignjax.weights.source import leaf_name

pytestmark = pytest.mark.slow  # minutes

COMPUTE = Compute(dtype="float32", remat="full", vocab_chunk=64)
ODD = {
    "a padded vocabulary": tiny("llama2_7b", vocab_size=131, tied_head=True),
    "a padded head": tiny("llama2_7b", vocab_size=131),
    "one key/value head": tiny("gemma_2b"),
    "two for four devices": tiny("qwen2.5_0.5b"),
    "a window": tiny("mistral_7b"),
    "normed heads": tiny("qwen3_4b"),
}


def model_on(c, *sizes: int):
    """The same random model on a mesh: the first device's weights, placed anew."""
    mesh()
    one = jax.tree.map(np.asarray, decoder.init(c, jax.random.key(0)))
    mesh(*sizes)
    check_divides(c.dimensions())
    want = jax.tree.leaves(decoder.abstract(c))
    leaves = [
        jax.device_put(leaf, jax.NamedSharding(jax.sharding.get_mesh(), like.sharding.spec))
        for leaf, like in zip(jax.tree.leaves(one), want, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(one), leaves)


@cache
def losses(c, *sizes: int):
    model = model_on(c, *sizes)
    rng = np.random.default_rng(0)
    batch = random_batch(c, rng, 4, 128, [[30, 34, 20, 44], [64, 64], [10, 11, 12, 13], [50, 40]])
    batch = place(batch, "batch")
    logps, _ = jax.jit(lambda model, batch: sequence_logps(model, batch, COMPUTE))(model, batch)
    stage = stage_of(DPO())
    grads = jax.jit(jax.grad(lambda model, batch: batch_loss(model, batch, stage, COMPUTE)[0]))(
        model, batch
    )
    return np.asarray(logps), jax.tree.map(np.asarray, grads)


@pytest.mark.parametrize("kind", ["words", "tied", "scored"])
@pytest.mark.parametrize("name", PRESETS)
def test_shapes_are_those_of_the_models_leaves(name, kind):
    c = replace(PRESETS[name], tied_head=kind == "tied", scored=kind == "scored")
    leaves = jax.tree_util.tree_leaves_with_path(decoder.abstract(c))
    held = {leaf_name(path): leaf.shape for path, leaf in leaves}
    found = leaf_shapes(c)
    assert list(found) == list(held)
    assert found == {leaf: true_shape(c, leaf, shape) for leaf, shape in held.items()}


@pytest.mark.parametrize("sizes", [(1, 4, 2), (1, 2, 4)])
@pytest.mark.parametrize("name", ODD)
def test_a_mesh_changes_no_log_prob_and_no_gradient(name, sizes):
    c = ODD[name]
    alone, alone_grads = losses(c, 1, 1, 1)
    split, split_grads = losses(c, *sizes)
    np.testing.assert_allclose(split, alone, rtol=1e-5, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
        split_grads,
        alone_grads,
    )
    for table in (split_grads.embed, split_grads.head):
        assert table is None or not table[c.vocab_size :].any()


@pytest.mark.parametrize("vocab", [32002, 151936])
def test_vocabularies_of_real_models_on_a_mesh(tmp_path, vocab):
    """Log-probs as on one device; an export has the bytes that were read, and no more rows."""
    c = tiny("gemma_2b", vocab_size=vocab, layers=1)
    tensors = write_model(tmp_path / "in", c)
    source = open_directory(tmp_path / "in")
    batch = random_batch(c, np.random.default_rng(0), 4, 64, [[30, 34], [20, 44], [10, 50], [8, 9]])
    found = []
    for sizes in ((1, 1, 1), (1, 4, 2)):
        mesh(*sizes)
        model = load(source)
        assert model.embed.shape[0] % 128 == 0 and not to_host(model.embed)[vocab:].any()
        logps, _ = jax.jit(lambda m, b: sequence_logps(m, b, COMPUTE))(model, place(batch, "batch"))
        found.append(np.asarray(logps))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5, atol=1e-5)
    export(model, source, tmp_path / "out", "source", 10**9)
    written = load_file(tmp_path / "out/model.safetensors")
    assert {n: a.tobytes() for n, a in written.items()} == {
        n: a.tobytes() for n, a in tensors.items()
    }


@pytest.mark.parametrize(("size", "tensor", "rows"), [(32000, 1, 32000), (32001, 2, 32128)])
def test_the_vocabulary_is_filled_up(size, tensor, rows):
    mesh(1, 1, tensor)
    assert decoder.padded_vocab(size) == rows
    model = decoder.init(tiny("llama2_7b", vocab_size=131), jax.random.key(0))
    for table in (model.embed, model.head):
        assert table.shape[0] == 256 and not np.asarray(table)[131:].any()


def test_padding_is_never_sampled():
    """All logits of real tokens far below 0, which is what padded rows would give."""
    model = decoder.init(tiny("llama2_7b", vocab_size=131, tied_head=True), jax.random.key(0))
    model.norm = 1e-3 * model.norm
    answers = generate(model, [[3, 4, 5]] * 8, [], 32, 5.0, 0, 8, COMPUTE)
    assert max(map(max, answers)) < 131


@pytest.mark.parametrize("name", ODD)
def test_the_cache_gives_what_the_whole_row_gives(name):
    c = ODD[name]
    model = decoder.init(c, jax.random.key(1))
    prompt = np.random.default_rng(0).integers(3, c.vocab_size, 20).tolist()
    (answer,) = generate(model, [prompt], [], 12, 0.0, 0, 1, COMPUTE)
    row = np.array([prompt + answer], np.int32)
    positions = np.arange(row.shape[1], dtype=np.int32)[None]
    arrays = place((row, positions, np.ones_like(row)), "batch", None)
    h = np.asarray(decoder.hidden_states(model, *arrays, COMPUTE))[0]
    logits = h @ np.asarray(decoder.head_weight(model))[: c.vocab_size].T
    assert logits.argmax(-1)[19:-1].tolist() == answer
