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


def sigmoid_loss(ahead, label_smoothing: float = 0.0) -> jax.Array:
    """-log sigmoid of how far the chosen reward is ahead: DPO's loss (arXiv 2305.18290, eq. 7).

    With `label_smoothing` e > 0 a preference is taken as flipped with probability e (conservative
    DPO): (1 - e) loss(ahead) + e loss(-ahead).
    """
    e = label_smoothing
    return -(1 - e) * jax.nn.log_sigmoid(ahead) - e * jax.nn.log_sigmoid(-ahead)


def robust_loss(ahead, label_smoothing: float) -> jax.Array:
    """DPO's loss as labels without noise would give it on average, where a share e is flipped.

    ((1 - e) loss(ahead) - e loss(-ahead)) / (1 - 2 e) (Chowdhury et al., arXiv 2403.00409, eq. 12).
    """
    e = label_smoothing
    unbiased = -(1 - e) * jax.nn.log_sigmoid(ahead) + e * jax.nn.log_sigmoid(-ahead)
    return unbiased / (1 - 2 * e)


def hinge_loss(ahead) -> jax.Array:
    """max(0, 1 - ahead), of SLiC's kind (Zhao et al., arXiv 2305.10425; arXiv 2309.06657)."""
    return jax.nn.relu(1 - ahead)


def ipo_loss(difference, beta: float) -> jax.Array:
    """(difference - 1 / (2 beta))^2 (Azar et al., arXiv 2310.12036, equation 17).

    `difference` is that of the two sides' log-ratios, each a mean over its tokens.
    """
    return (difference - 1 / (2 * beta)) ** 2


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
