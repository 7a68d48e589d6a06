"""Splash and Triton attention, interpreted on CPU, against the plain formula."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh, random_batch, tiny_config
from test_attention import plain

from alignjax.config import DPO, Compute
from alignjax.models import attention as dispatch
from alignjax.models import decoder, kernels
from alignjax.models.attention import attention
from alignjax.sharding import AXES, place, to_host
from alignjax.stages import batch_loss, stage_of

pytestmark = pytest.mark.slow  # minutes

# Key/value heads, query heads each serves, head size, window; families at their smallest.
FAMILIES = {
    "llama2": (2, 1, 128, None),
    "llama3": (1, 4, 128, None),
    "llama3.2": (2, 4, 64, None),
    "mistral": (2, 4, 128, 70),
    "danube": (1, 4, 80, 150),
    "gemma_2b": (1, 8, 256, None),
    "gemma_7b": (2, 1, 256, None),
    "qwen2.5": (1, 7, 64, None),
    "qwen3": (2, 2, 128, None),
}
# Largest error, over the largest value: about ten roundings of float32, two of bfloat16.
TOLERANCE = {"float32": 2e-6, "bfloat16": 1.5e-2}
UNWINDOWED = [family for family, (*_, window) in FAMILIES.items() if window is None]
CASES = [
    *(("splash", family, "float32") for family in FAMILIES),
    *(("splash", family, "bfloat16") for family in ("mistral", "gemma_2b", "danube")),
    *(("triton", family, "float32") for family in UNWINDOWED),
    *(("triton", family, "bfloat16") for family in ("llama3", "gemma_2b")),
]


def rows(family: str, dtype: str, batch: int, length: int):
    """Queries, keys, values and the segments of rows of three sequences and padding."""
    heads, groups, size, _ = FAMILIES[family]
    rng = np.random.default_rng(0)
    q = rng.standard_normal((batch, length, heads, groups, size)).astype(dtype)
    k, v = rng.standard_normal((2, batch, length, heads, size)).astype(dtype)
    segments = np.repeat([1, 2, 3, 0], [length // 5, length // 3, length // 3, length])[:length]
    return (q, k, v), np.tile(segments.astype(np.int32), (batch, 1))


def assert_equals_the_formula(kernel: str, family: str, dtype: str, batch=1, length=256):
    """Values, and the gradients of all three inputs."""
    inputs, segments = rows(family, dtype, batch, length)
    window = FAMILIES[family][-1]
    weight = np.random.default_rng(1).standard_normal(inputs[0].shape).astype(np.float32)

    def ours(q, k, v, ids):
        return attention(q, k, v, ids, ids, window=window, kernel=kernel)

    def theirs(q, k, v, ids):
        return plain(q, k, v, ids, window)

    def loss(arrays, ids, weight, fn):
        out = fn(*arrays, ids).astype(jnp.float32)
        return (out * weight).sum(), out

    run = jax.jit(jax.grad(loss, has_aux=True), static_argnums=3)
    got = run(*place((inputs, segments, weight), "batch"), ours)
    wide = tuple(np.asarray(array, np.float32) for array in inputs)
    expected = run(wide, segments, weight, theirs)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        one, other = (to_host(array).astype(np.float32) for array in (one, other))
        assert np.abs(one - other).max() <= TOLERANCE[dtype] * np.abs(other).max()


@pytest.mark.parametrize("kernel, family, dtype", CASES)
def test_values_and_gradients_equal_the_formula(kernel, family, dtype):
    assert_equals_the_formula(kernel, family, dtype)


@pytest.mark.parametrize("kernel", ["splash", "triton"])
def test_rows_of_any_length_over_eight_devices(kernel):
    mesh(2, 2, 2)
    assert_equals_the_formula(kernel, "llama3.2", "float32", batch=4, length=200)


@pytest.mark.parametrize("kernel", ["splash", "triton"])
def test_a_training_step_is_the_same_with_each_kernel(kernel):
    """One key/value head over two tensor parts, so heads are repeated; padding in every row."""
    mesh(1, 2, 2)
    c = tiny_config(kv_heads=1, layers=1)
    lengths = [[30, 25, 10, 9], [60, 50]]
    batch = place(random_batch(c, np.random.default_rng(0), 2, 128, lengths), "batch")
    model = decoder.init(c, jax.random.key(0))

    @partial(jax.jit, static_argnums=0)
    def gradient(name):
        compute = Compute(dtype="float32", remat="none", attention=name)
        return jax.grad(batch_loss, has_aux=True)(model, batch, stage_of(DPO()), compute)

    ours, theirs = gradient(kernel), gradient("blocks")
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        one, other = to_host(one), to_host(other)
        assert np.linalg.norm(one - other) <= 1e-5 * np.linalg.norm(other)


@pytest.mark.parametrize(
    "platform, window, kernel",
    [
        ("cpu", None, "blocks"),
        ("tpu", None, "splash"),
        ("tpu", 100, "splash"),
        ("gpu", None, "triton"),
        ("gpu", 100, "blocks"),
        ("gpu", 256, "triton"),
    ],
)
def test_auto_follows_the_mesh_also_where_its_devices_are_only_compiled_for(
    platform, window, kernel
):
    device = jax.sharding.AbstractDevice("any", 1, platform)
    abstract = jax.sharding.AbstractMesh((1, 1, 1), AXES, abstract_device=device)
    with jax.sharding.use_abstract_mesh(abstract):
        assert kernels.platform() == platform
        assert dispatch._choice("auto", 256, window) == kernel
        assert dispatch._choice("blocks", 256, window) == "blocks"


def test_triton_refuses_a_window_that_matters():
    with pytest.raises(ValueError) as error:
        assert_equals_the_formula("triton", "mistral", "float32")
    assert str(error.value) == (
        "compute.attention=triton has no sliding window, and this model's (70 tokens) is shorter "
        "than a row (256): set it to auto or blocks."
    )


def test_this_release_of_jax_is_one_that_the_kernels_were_tried_with():
    assert jax.__version__ in kernels.TRIED
