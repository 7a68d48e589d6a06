"""Extrapolation inside jit, of models that lie on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import BF16, mesh, tiny_config
from expomodels import random_pair, rounded_once
from expomodels import write_pair as write

from alignjax.extrapolation.alphas import Rules
from alignjax.extrapolation.mesh import extrapolate, leaf_alphas
from alignjax.weights.loading import load
from alignjax.weights.safetensors import open_directory


def models(root):
    return [load(open_directory(root / name)) for name in ("strong", "weak")]


def leaves(tree) -> list[np.ndarray]:
    return [np.asarray(one) for one in jax.tree.leaves(tree)]


def test_eight_devices_give_what_numpy_gives_and_every_alpha_one_program(tmp_path):
    write(tmp_path, tiny_config())
    mesh(fsdp=4, tensor=2)
    strong, weak = models(tmp_path)
    work = jax.jit(lambda *trees: extrapolate(*trees))
    for alpha in (0.3, -0.25, 4.0):
        found = work(strong, weak, alpha)
        for one, theta, theta_sft in zip(*map(leaves, (found, strong, weak)), strict=True):
            expected = theta + np.float32(alpha) * (theta - theta_sft)
            largest = np.maximum(np.abs(theta), np.abs(theta_sft))
            assert np.all(np.abs(one - expected) <= 2.0**-22 * (1 + alpha**2) * largest)
        shardings = [[leaf.sharding for leaf in jax.tree.leaves(tree)] for tree in (found, strong)]
        assert shardings[0] == shardings[1]
    assert work._cache_size() == 1
    text = work.lower(strong, weak, 0.3).compile().as_text()
    assert not any(word in text for word in ("all-gather", "all-reduce", "all-to-all", "permute"))


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16"])
def test_alphas_of_0_and_minus_1_are_exact_bits_and_all(kind):
    """theta much larger than theta_sft; -0.0, NaN with payloads, infinities and subnormals too."""
    rng = np.random.default_rng(0)
    width = np.dtype(jnp.dtype(kind)).itemsize
    bits = [rng.integers(0, 1 << 8 * width, (8, 64), f"u{width}", False) for _ in range(2)]
    bits[0][0, 0] = 1 << (8 * width - 1)  # -0.0
    strong, weak = ({"a": jnp.asarray(one.view(jnp.dtype(kind)))} for one in bits)
    mesh(fsdp=4, tensor=2)
    place = jax.sharding.NamedSharding(jax.sharding.get_mesh(), jax.P("fsdp", "tensor"))
    strong, weak = (jax.device_put(one, place) for one in (strong, weak))
    for alpha, expected in ((0.0, bits[0]), (-0.0, bits[0]), (-1.0, bits[1])):
        found = np.asarray(jax.jit(extrapolate)(strong, weak, alpha)["a"])
        assert found.tobytes() == expected.tobytes()
    theta = rng.standard_normal(64).astype(np.float32)
    strong, weak = {"a": jnp.asarray(1e8 * theta)}, {"a": jnp.asarray(theta)}
    assert np.asarray(extrapolate(strong, weak, -1.0)["a"]).tobytes() == theta.tobytes()


def test_bfloat16_rounds_once(tmp_path):
    write(tmp_path, dtype="bfloat16")
    strong, weak = (
        jax.tree.map(lambda one: one.astype(jnp.bfloat16), one) for one in models(tmp_path)
    )
    found = jax.jit(extrapolate)(strong, weak, 0.3)
    for one, theta, theta_sft in zip(*map(leaves, (found, strong, weak)), strict=True):
        wide = theta.astype(np.float32)
        expected = wide + np.float32(0.3) * (wide - theta_sft.astype(np.float32))
        assert one.dtype == BF16
        np.testing.assert_array_equal(one, expected.astype(BF16))


@pytest.mark.parametrize("alpha", [0.1, 0.3, 2.0])
def test_few_bfloat16_results_are_not_the_float64_ones_rounded_once(alpha):
    strong, weak = random_pair(np.random.default_rng(0), 1 << 20, BF16)
    found = np.asarray(jax.jit(extrapolate)(jnp.asarray(strong), jnp.asarray(weak), alpha))
    one, other = strong.astype(np.float64), weak.astype(np.float64)
    assert np.mean(found.astype(np.float64) != rounded_once(one + alpha * (one - other))) <= 2e-5


def test_alphas_by_module_and_layer_are_those_of_the_files(tmp_path):
    write(tmp_path)
    strong, weak = models(tmp_path)
    rules = Rules(layers="0,-1,2", norms="0", table='{"embed": -1, "layers.2.*down": 0}')
    work = jax.jit(lambda *trees: extrapolate(*trees))
    alphas = leaf_alphas(strong, rules, 0.3)
    assert alphas.blocks.q.shape == (3, 1, 1) and alphas.blocks.attn_norm.shape == (3, 1)
    found = work(strong, weak, alphas)
    same = np.testing.assert_array_equal
    same(found.embed, weak.embed)
    same(found.norm, strong.norm)
    same(found.blocks.attn_norm, strong.blocks.attn_norm)
    same(found.blocks.q[0], strong.blocks.q[0])
    same(found.blocks.q[1], weak.blocks.q[1])
    np.testing.assert_allclose(
        found.blocks.q[2], 3 * strong.blocks.q[2] - 2 * weak.blocks.q[2], atol=1e-6
    )
    same(found.blocks.down[2], strong.blocks.down[2])
    np.testing.assert_allclose(found.head, 1.3 * strong.head - 0.3 * weak.head, atol=1e-6)
    work(strong, weak, leaf_alphas(strong, Rules(mlp="1"), 0.5))
    assert work._cache_size() == 1
