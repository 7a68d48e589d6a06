"""The configs of configs/: each passes, fits its mesh and devices, and its step lowers there.

The mesh has TPUs that are not there: sizes are true, no array is made and nothing is compiled.
"""

import math
import re
from dataclasses import replace

import jax
import numpy as np
import pytest
from lowering import traced
from presets import PRESETS

from alignjax import config as configs
from alignjax import sharding
from alignjax.checks import check_training
from alignjax.config import DPO, RM, SFT, Mesh, Training
from alignjax.data.sources import path_names
from alignjax.models import decoder
from alignjax.models.shapes import DecoderConfig

SIZES = {
    "smollm2-135m-instruct": "smollm2_135m",
    "meta-llama/Llama-2-7b-hf": "llama2_7b",
    "meta-llama/Llama-2-13b-hf": "llama2_13b",
    "meta-llama/Llama-2-70b-hf": "llama2_70b",
    "allenai/tulu-2-7b": "llama2_7b",
    "allenai/tulu-2-13b": "llama2_13b",
    "allenai/tulu-2-70b": "llama2_70b",
    "meta-llama/Meta-Llama-3-8B": "llama3_8b",
    "Columbia-NLP/LION-LLaMA-3-8b-sft-v1.0": "llama3_8b",
    "google/gemma-2b": "gemma_2b",
    "Columbia-NLP/LION-Gemma-2b-sft-v1.0": "gemma_2b",
    "alignment-handbook/zephyr-7b-sft-full": "mistral_7b",
}
NAMES = [name for name, line in configs.names().items() if not line.startswith("Short for")]
MANY = [name for name in NAMES if configs.load(name).mesh != Mesh()]  # for many devices


def sizes_of(config: Training) -> DecoderConfig:
    """Sizes of the model that a config starts from, through the runs that come before it."""
    before = re.fullmatch(r"runs/(\w+)/export", config.model.path)
    return sizes_of(configs.load(before[1])) if before else PRESETS[SIZES[config.model.path]]


@pytest.fixture(autouse=True)
def one_device():
    """In place of every test's mesh: none, or an abstract one would have to be as large."""
    jax.set_mesh(jax.sharding.Mesh(np.empty((), object), ()))


def on_mesh(mesh: Mesh):
    """A mesh of so many TPUs, of which there is none; fsdp=-1 is 8 of them."""
    sizes = (mesh.replica, 8 if mesh.fsdp == -1 else mesh.fsdp, mesh.tensor)
    kinds = (jax.sharding.AxisType.Explicit,) * 3
    tpu = jax.sharding.AbstractDevice("TPU v5", 1, "tpu")
    return jax.sharding.use_abstract_mesh(
        jax.sharding.AbstractMesh(sizes, sharding.AXES, kinds, abstract_device=tpu)
    )


def lower(config: Training) -> str:
    with on_mesh(config.mesh):
        return traced(config, sizes_of(config)).lower(lowering_platforms=("tpu",)).as_text()


def bytes_held(config: Training) -> float:
    """Of a device, as configs/__init__.py counts them: state, gradients and the layers' inputs."""
    c, batch = sizes_of(config), config.batch
    with on_mesh(config.mesh):
        weights = jax.tree.leaves(decoder.abstract(c))
        parameters = sum(math.prod(w.sharding.shard_shape(w.shape)) for w in weights)
    inputs = 2 * c.layers * c.hidden_size * batch.rows_per_device * batch.row_length
    return 20 * parameters + inputs


@pytest.mark.parametrize("name", NAMES)
def test_the_step_lowers_on_the_declared_mesh(name):
    """At its true sizes, with attention by the kernel for TPU."""
    config = configs.load(name)
    text = lower(config)
    sizes = (1, 8 if config.mesh.fsdp == -1 else config.mesh.fsdp, config.mesh.tensor)
    axes = ", ".join(f'"{axis}"={n}' for axis, n in zip(sharding.AXES, sizes, strict=True))
    assert f"sdy.mesh @mesh = <[{axes}]" in text
    assert "tpu_custom_call" in text


def test_what_is_offloaded_lies_on_the_host():
    config = configs.load("tulu2_7b_dpo")
    places = {}
    for remat in ("dots", "offload"):
        text = lower(replace(config, compute=replace(config.compute, remat=remat)))
        places[remat] = text.count("pinned_host")
    assert places["dots"] == 0 < places["offload"]


@pytest.mark.parametrize("sizes", [{"fsdp": 3}, {"tensor": 3}])
def test_a_mesh_that_does_not_divide_the_model_does_not_lower(sizes):
    config = configs.load("dpo_70b")
    with pytest.raises(ValueError, match="partitioned 3 times, but does not evenly divide"):
        lower(replace(config, mesh=replace(config.mesh, **sizes)))


@pytest.mark.parametrize("name", MANY)
def test_the_mesh_divides_the_model_and_the_batch(name):
    config = configs.load(name)
    batch = config.batch
    with on_mesh(config.mesh):
        sharding.check_divides(sizes_of(config).dimensions())
        rows = batch.rows_per_device * sharding.axis_size("batch")
    assert (batch.pairs or batch.sequences or batch.rows) % rows == 0


@pytest.mark.parametrize("name", MANY)
def test_the_mesh_lies_on_a_torus(name):
    """JAX gives an axis of a mesh whole axes of a TPU's torus, 2x2x2 or 4x4x4."""
    mesh = configs.load(name).mesh
    side = {8: 2, 64: 4}[mesh.fsdp * mesh.tensor]
    assert {mesh.fsdp, mesh.tensor} <= {1, side, side**2, side**3}


@pytest.mark.parametrize("name", MANY)
def test_a_device_of_80_gb_holds_its_part(name):
    """With 20 GB to spare for what a layer and the head make."""
    config = configs.load(name)
    assert config.compute.remat == "full"
    assert bytes_held(config) < 60e9


def test_the_arithmetic_of_70b():
    """As configs/__init__.py tells it: 21.6 GB, and 10.7 GB for a row."""
    config = configs.load("xwin_rm_70b")
    assert bytes_held(config) == pytest.approx(21.6e9 + 10.7e9, rel=0.01)
    assert bytes_held(replace(config, mesh=Mesh(fsdp=8))) > 80e9


@pytest.mark.parametrize("name", NAMES)
def test_passes_once_it_has_data(name):
    config = configs.load(name)
    assert config.name == name
    if not config.data.path:
        with pytest.raises(ValueError, match=r"^data\.path is empty: name files"):
            check_training(config)
    given = config.data.path or "rows.jsonl"
    check_training(replace(config, data=replace(config.data, path=given)))


@pytest.mark.parametrize("name", MANY)
def test_its_line_tells_the_stage_and_the_devices(name):
    config, line = configs.load(name), configs.names()[name]
    assert line.startswith({SFT: "SFT of ", RM: "Reward model from ", DPO: "DPO of "}[type(config)])
    assert line.endswith(f" on {config.mesh.fsdp * config.mesh.tensor} devices.")


def test_short_names_are_those_of_xwin():
    short = {f"{stage}_{size}b" for stage in ("sft", "rm", "dpo") for size in (7, 13, 70)}
    assert set(configs.names()) - set(NAMES) == short
    assert all(configs.load(name) == configs.load(f"xwin_{name}") for name in short)


# arXiv 2407.06542, 2404.16792, 2311.10702: rate, schedule, warm-up, b2, epochs, batch, beta, length
PUBLISHED = {
    "lion_gemma2b_sft": (2e-5, "cosine", 0.1, 0.999, 3, 32, None, 8192),
    "lion_llama3_8b_sft": (2e-5, "cosine", 0.1, 0.999, 1, 32, None, 8192),
    "lion_gemma2b_dpo": (5e-7, "linear", 0.1, 0.999, 2, 128, 0.05, 2048),
    "lion_llama3_8b_dpo": (5e-7, "cosine", 0.1, 0.999, 1, 128, 0.01, 2048),
    "zephyr_7b_dpo": (5e-7, "cosine", 0.1, 0.999, 1, 128, 0.01, 1024),
    "tulu2_7b_dpo": (5e-7, "linear", 0.1, 0.95, 3, 32, 0.1, 8192),
    "tulu2_13b_dpo": (5e-7, "linear", 0.1, 0.95, 3, 32, 0.1, 8192),
    "tulu2_70b_dpo": (5e-7, "linear", 0.1, 0.95, 3, 32, 0.1, 8192),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_has_the_published_settings(name):
    config = configs.load(name)
    tx, batch = config.optimizer, config.batch
    found = (tx.learning_rate, tx.schedule, tx.warmup_ratio, tx.b2, batch.epochs)
    beta = getattr(config, "beta", None)
    assert PUBLISHED[name] == (*found, batch.pairs or batch.rows, beta, config.data.max_length)


def test_parts_of_ultrafeedback():
    found = [configs.load(f"zephyr_7b_dpo_{part}").data.max_pairs for part in (5, 10, 20, 40)]
    assert found == [3056, 6113, 12227, 24454]


@pytest.mark.parametrize("name", ["lion_gemma2b_dpo", "lion_llama3_8b_dpo"])
def test_a_mixture_has_a_weight_for_each_set(name):
    data = configs.load(name).data
    weights = dict(zip(path_names(data.path), map(float, data.weights.split(",")), strict=True))
    assert weights["Columbia-NLP/DPO-PKU-SafeRLHF"] == 0.1
    assert weights["Columbia-NLP/DPO-Nectar"] == (1 if "llama" in name else 0.25)
