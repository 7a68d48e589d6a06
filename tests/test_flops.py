"""Operations counted from sizes, against those of the compiled program and a figure of a paper."""

import jax
import numpy as np
import pytest
from flops import PEAKS, forward_flops, peak, training_flops
from presets import PRESETS, tiny

WEIGHTS = {"llama2_7b": 6.74e9, "llama3_8b": 8.03e9, "mistral_7b": 7.24e9, "qwen3_0.6b": 0.596e9}


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_short_sequence_takes_six_operations_a_weight_and_token(name):
    c = PRESETS[name]
    embedding = 0 if c.tied_head else c.vocab_size * c.hidden_size  # looked up, not multiplied
    expected = 6 * (WEIGHTS[name] - embedding) * 64
    assert training_flops(c, [8] * 8, [8] * 8) == pytest.approx(expected, rel=0.01)


def test_dots_of_the_dense_formula():
    """XLA's own count of a layer's products, with the full square of scores for the causal half."""
    c, length = tiny("llama2_7b", layers=1), 48

    def products(q_w, kv_w, o_w, gate_w, up_w, down_w, head_w, x):
        q, k, v = x @ q_w, x @ kv_w, x @ kv_w
        out = (q @ k.T) @ v  # all heads at once: as many operations as one by one
        h = (out @ o_w) @ gate_w * (x @ up_w)
        return (h @ down_w) @ head_w

    width = c.heads * c.head_dim
    sizes = [(c.hidden_size, width)] * 2 + [(width, c.hidden_size)]
    sizes += [(c.hidden_size, c.mlp_size)] * 2 + [(c.mlp_size, c.hidden_size)]
    sizes += [(c.hidden_size, c.vocab_size), (length, c.hidden_size)]
    shapes = [jax.ShapeDtypeStruct(size, np.float32) for size in sizes]
    jaxpr = jax.make_jaxpr(products)(*shapes)
    dots = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general"]
    counted = sum(2 * np.prod(e.outvars[0].aval.shape) * e.invars[0].aval.shape[1] for e in dots)
    half = 4 * width * (length**2 - length * (length + 1) / 2)  # that no token sees
    assert forward_flops(c, [length], [length]) == counted - half


def test_a_window_bounds_what_is_seen():
    c = tiny("mistral_7b", window=4)
    seen = 1 + 2 + 3 + 4 * 7
    without = forward_flops(tiny("mistral_7b", window=None), [10], [0])
    assert without - forward_flops(c, [10], [0]) == c.layers * 4 * 32 * (55 - seen)


def test_devices_by_name():
    assert peak("NVIDIA H100 80GB HBM3") == PEAKS["H100"]
    assert peak("NVIDIA H100 PCIe") == PEAKS["H100 PCIe"]
    assert peak("TPU v5 lite") == 197e12 and peak("TPU v5p") == 459e12
    assert peak("cpu") is None
