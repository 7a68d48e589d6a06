"""Losses on plain vectors of log-probabilities: one number for each token or pair.

pi is the policy, ref the reference; w the chosen ("winning") answer, l the rejected one.
"""

import jax
import jax.numpy as jnp


def sft_loss(logps: jax.Array) -> jax.Array:
    """Negative log-likelihood, nats, of each token (or sum over tokens)."""
    return -logps


def dpo_rewards(pi_w, pi_l, ref_w, ref_l, beta: float) -> tuple[jax.Array, jax.Array]:
    """Implicit rewards beta (log pi - log ref) of the chosen and rejected answers, nats times beta.

    Differences are taken side by side before they are scaled, so that a policy equal to its
    reference gives exactly 0 (Rafailov et al., arXiv 2305.18290, section 4).
    """
    return beta * (pi_w - ref_w), beta * (pi_l - ref_l)


def dpo_loss(pi_w, pi_l, ref_w, ref_l, beta: float, label_smoothing: float = 0.0) -> jax.Array:
    """DPO's loss of each pair (arXiv 2305.18290, equation 7); all arguments [pairs], float32.

    With `label_smoothing` e > 0 a preference is taken as flipped with probability e (conservative
    DPO): (1 - e) loss(margin) + e loss(-margin).
    """
    reward_w, reward_l = dpo_rewards(pi_w, pi_l, ref_w, ref_l, beta)
    margin = reward_w - reward_l
    e = label_smoothing
    return -(1 - e) * jax.nn.log_sigmoid(margin) - e * jax.nn.log_sigmoid(-margin)


def bradley_terry_loss(reward_w, reward_l, margin=0.0, centering: float = 0.0) -> jax.Array:
    """Negative log-likelihood of each preference (arXiv 2203.02155, equation 1), [pairs], float32.

    The chosen side should be ahead by the pair's `margin` (Llama 2, arXiv 2307.09288, equation 2).
    With `centering` c > 0 it has c (r_w + r_l)^2 added, which fixes the level of rewards that
    differences leave open (Eisenstein et al., arXiv 2312.09244).
    """
    ahead = reward_w - reward_l - margin
    return -jax.nn.log_sigmoid(ahead) + centering * (reward_w + reward_l) ** 2


def preference_accuracy(margin) -> jax.Array:
    """1 where the chosen side is ahead, 0 where it is behind, 0.5 for a tie."""
    return 0.5 * (jnp.sign(margin) + 1)
