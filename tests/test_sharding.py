"""Meshes that do not fit are one sentence."""

import jax
import numpy as np
import pytest
from conftest import mesh

from alignjax import sharding
from alignjax.errors import UserError
from alignjax.models import decoder
from alignjax.models.shapes import DecoderConfig

SMOLLM2 = DecoderConfig(49152, 576, 30, 9, 3, 64, 1536, 1e5, 1e-5, True)


def test_nine_heads_over_two_parts():
    mesh(fsdp=4, tensor=2)
    with pytest.raises(ValueError) as error:
        sharding.check_divides(SMOLLM2.dimensions())
    assert str(error.value) == (
        "The model's attention heads (9) cannot be split over mesh.tensor=2; sizes that work for "
        "this model: 1, 3."
    )


def test_sizes_that_work_have_copies_of_key_value_heads():
    mesh(tensor=8)
    model = DecoderConfig(1000, 96, 2, 12, 2, 8, 384, 1e4, 1e-5, True)
    with pytest.raises(ValueError, match=r"sizes that work for this model: 1, 2, 4, 6, 12\.$"):
        sharding.check_divides(model.dimensions())


def test_hidden_size_over_seven_parts():
    mesh(fsdp=7)
    with pytest.raises(ValueError, match=r"hidden size \(576\) cannot be split over mesh.fsdp=7"):
        sharding.check_divides(SMOLLM2.dimensions())


def test_sizes_that_divide_pass():
    mesh(fsdp=2, tensor=3)
    sharding.check_divides(SMOLLM2.dimensions())


def test_use_mesh_fills_in_what_is_left():
    assert dict(sharding.use_mesh(2, -1, 2).shape) == {"replica": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize("sizes", [(3, -1, 1), (1, 4, 1), (-1, -1, 1), (0, -1, 1)])
def test_use_mesh_refuses_what_does_not_fit(sizes):
    with pytest.raises(ValueError) as error:
        sharding.use_mesh(*sizes)
    assert str(error.value) == (
        f"mesh replica={sizes[0]} x fsdp={sizes[1]} x tensor={sizes[2]} does not fit 8 devices: "
        "make the product 8, or set one of the sizes to -1."
    )


def test_sizes_that_split_a_physical_axis_are_taken(monkeypatch):
    def whole_axes_alone(*arguments):
        raise NotImplementedError("failed to find assignment for logical axis")

    plain = sharding.use_mesh(1, 4, 2)
    monkeypatch.setattr(jax, "make_mesh", whole_axes_alone)
    assert sharding.use_mesh(1, 4, 2) == plain


def test_what_needs_a_mesh_says_how_to_set_one():
    jax.set_mesh(jax.sharding.Mesh(np.empty((), object), ()))
    for need in (
        lambda: decoder.init(SMOLLM2, jax.random.key(0)),
        lambda: sharding.place(np.ones(8), "batch"),
        lambda: sharding.local_rows(8),
    ):
        with pytest.raises(UserError, match=r"call alignjax\.sharding\.use_mesh\(\) first"):
            need()


def test_gathered_is_whole_along_the_model_dimension():
    assert sharding.gathered(sharding.spec("heads", "embed")) == jax.P("tensor", None)


def test_place_splits_and_to_host_joins():
    mesh(replica=2, fsdp=4)
    array = np.arange(32).reshape(8, 4)
    placed = sharding.place(array, "batch", None)
    assert [s.data.shape for s in placed.addressable_shards] == [(1, 4)] * 8
    np.testing.assert_array_equal(sharding.to_host(placed), array)
