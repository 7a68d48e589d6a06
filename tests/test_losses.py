"""Losses against hand arithmetic."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.losses import dpo_loss, dpo_rewards, preference_accuracy, sft_loss


def test_dpo_loss_of_known_margins():
    # log-ratio differences 0, 10, 20 with beta 0.1: -log sigmoid(0), (1), (2)
    loss = dpo_loss(jnp.array([0.0, 10, 20]), jnp.zeros(3), jnp.zeros(3), jnp.zeros(3), 0.1)
    np.testing.assert_allclose(loss, [0.6931472, 0.3132617, 0.1269280], rtol=1e-6)


def test_dpo_loss_in_float64():
    pi_w, pi_l, ref_w, ref_l = -31.25, -27.5, -30.0, -28.75
    for beta, e in ((0.1, 0.0), (0.5, 0.1), (2.0, 0.3)):
        margin = beta * ((pi_w - ref_w) - (pi_l - ref_l))
        sigmoid = 1 / (1 + math.exp(-margin))
        expected = -(1 - e) * math.log(sigmoid) - e * math.log(1 - sigmoid)
        got = dpo_loss(*map(jnp.float32, (pi_w, pi_l, ref_w, ref_l)), beta, e)
        assert float(got) == pytest.approx(expected, rel=1e-6)


def test_dpo_gradient_pulls_the_sides_apart():
    # d loss / d pi_w = -beta sigmoid(-margin), and the opposite for pi_l
    grads = jax.grad(dpo_loss, argnums=(0, 1))(jnp.float32(1), jnp.float32(0), 0.0, 0.0, 0.5)
    expected = -0.5 / (1 + math.exp(0.5))
    assert [float(g) for g in grads] == pytest.approx([expected, -expected], rel=1e-6)


def test_swapping_the_sides_changes_the_margins_sign():
    w, rejected = dpo_rewards(-3.0, -5.0, -4.0, -4.5, 0.1)
    w_swapped, rejected_swapped = dpo_rewards(-5.0, -3.0, -4.5, -4.0, 0.1)
    assert w - rejected == -(w_swapped - rejected_swapped) == pytest.approx(0.15)


def test_ties_count_half():
    assert preference_accuracy(jnp.array([2.0, 0.0, -1.0])).tolist() == [1, 0.5, 0]


def test_sft_loss_is_the_negative_log_likelihood():
    assert float(sft_loss(jnp.float32(math.log(0.25)))) == pytest.approx(math.log(4))
