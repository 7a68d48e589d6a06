"""Losses against hand arithmetic."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax import losses
from alignjax.losses import dpo_rewards, preference_accuracy, sft_loss


def minus_log_sigmoid(x: float) -> float:
    return -math.log(1 / (1 + math.exp(-x)))


def test_the_sigmoid_loss_of_known_margins():
    # log-ratio differences 0, 10, 20 with beta 0.1: -log sigmoid(0), (1), (2)
    w, low = dpo_rewards(jnp.array([0.0, 10, 20]), jnp.zeros(3), jnp.zeros(3), jnp.zeros(3), 0.1)
    np.testing.assert_allclose(
        losses.sigmoid_loss(w - low), [0.6931472, 0.3132617, 0.1269280], rtol=1e-6
    )


@pytest.mark.parametrize("ahead", [-2.5, 0.0, 0.75, 3.0])
@pytest.mark.parametrize("e", [0.0, 0.1, 0.3])
def test_smoothed_and_robust_losses_by_hand(ahead, e):
    right, wrong = minus_log_sigmoid(ahead), minus_log_sigmoid(-ahead)
    smoothed = losses.sigmoid_loss(jnp.float32(ahead), e)
    assert float(smoothed) == pytest.approx((1 - e) * right + e * wrong, rel=1e-6)
    robust = losses.robust_loss(jnp.float32(ahead), e)
    assert float(robust) == pytest.approx(((1 - e) * right - e * wrong) / (1 - 2 * e), rel=1e-5)


def test_the_robust_loss_is_unbiased():
    """Over labels of which a share e is flipped it is the loss of the true label."""
    e, ahead = 0.2, jnp.float32(1.5)
    mean = (1 - e) * losses.robust_loss(ahead, e) + e * losses.robust_loss(-ahead, e)
    assert float(mean) == pytest.approx(float(losses.sigmoid_loss(ahead)), rel=1e-6)


def test_the_hinge_ends_where_the_chosen_side_is_ahead_by_one():
    assert losses.hinge_loss(jnp.array([-1.0, 0.25, 1.0, 9.0])).tolist() == [2, 0.75, 0, 0]


def test_ipo_is_least_where_the_difference_is_half_of_one_over_beta():
    assert losses.ipo_loss(jnp.array([5.0, 4.0, 7.0]), 0.1).tolist() == [0, 1, 4]


def test_the_gradient_pulls_the_sides_apart():
    # d loss / d pi_w = -beta sigmoid(-margin), and the opposite for pi_l
    def loss(pi_w, pi_l):
        w, low = dpo_rewards(pi_w, pi_l, 0.0, 0.0, 0.5)
        return losses.sigmoid_loss(w - low)

    grads = jax.grad(loss, argnums=(0, 1))(jnp.float32(1), jnp.float32(0))
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
