"""What each training stage minimises and reports, as functions of what a model says of sequences.

That is a number for each: a log-probability, or a reward. P items (pairs, sets, or conversations),
S sides of an item, at most. The same terms serve the training step, on the items of a row, and the
evaluation, on all items of a data set.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alignjax import losses
from alignjax.config import DPO, RM, SFT, Compute, Training
from alignjax.data.batches import PackedBatch
from alignjax.logps import sequence_logps
from alignjax.models.decoder import Decoder
from alignjax.rewards import sequence_rewards

# name -> (values, counts), both [..., P]; the metric is sum(values) / sum(counts)
Terms = dict[str, tuple[jax.Array, jax.Array]]
# (model, batch, compute) -> a number for each sequence and its trained tokens, float32 [B, P, S]
Scoring = Callable[[Decoder, PackedBatch, Compute], tuple[jax.Array, jax.Array]]
# Metrics that parts of a batch do not sum: how those of two parts join, and that of no part.
EXTREMES = {"rewards/min": (jnp.minimum, np.inf), "rewards/max": (jnp.maximum, -np.inf)}


class Facts(NamedTuple):
    """What is known of items beside their scores."""

    ref: jax.Array  # [..., P, S], log-probs under the reference
    tokens: jax.Array  # [..., P, S], trained tokens
    margin: jax.Array  # [..., P], by which the chosen side should be ahead; rows' `margin`, or 0
    weight: jax.Array  # [..., P], of the item in the loss; rows' `weight`, or 1
    rank: jax.Array  # [..., P, S], the best side has the least; 0 where there is none
    pairs_per_token: jax.Array | float = 1.0  # of the step's chosen sides, for an SFT term


@dataclass(frozen=True)
class Stage:
    """What a stage is; those of equal configs are equal, so that `jax.jit` compiles once."""

    config: Training
    name: str
    unit: str  # what a user calls an item
    needs_reference: bool
    scores: Scoring
    terms: Callable[[jax.Array, Facts], Terms] = field(compare=False)  # of scores [..., P, S]
    sft_term: bool = False  # whether the loss has one, beside that of pairs


def stage_of(config: Training) -> Stage:
    if isinstance(config, DPO):
        return Stage(
            config,
            "dpo",
            "pairs",
            config.loss != "simpo",
            sequence_logps,
            lambda pi, facts: dpo_terms(pi, facts, config),
            config.sft_weight > 0,
        )
    if isinstance(config, RM):
        return Stage(
            config,
            "rm",
            "pairs",
            False,
            sequence_rewards,
            lambda rewards, facts: rm_terms(rewards, facts, config.centering),
        )
    assert isinstance(config, SFT)
    return Stage(config, "sft", "sequences", False, sequence_logps, sft_terms)


def sft_terms(pi_PS: jax.Array, facts: Facts) -> Terms:
    """Loss in nats a trained token, so that a long answer weighs as much as its tokens."""
    loss, tokens = losses.sft_loss(pi_PS[..., 0]), facts.tokens[..., 0]
    return {"loss": (facts.weight * loss, facts.weight * tokens)}


def rm_terms(rewards_PS: jax.Array, facts: Facts, centering: float) -> Terms:
    """Loss of an item: the mean over its pairs, which are all in which one side is the better.

    So a set of K responses weighs as much as a pair does, whatever K is: 1 / (K choose 2) of it
    each pair (arXiv 2203.02155, equation 1), ties left out. Its margin is that of each of its
    pairs, and each is centred. The other metrics are means over pairs, whichever item they are of.
    """
    better_PSS = (facts.rank[..., :, None] > 0) & (
        facts.rank[..., :, None] < facts.rank[..., None, :]
    )
    rewards = rewards_PS[..., :, None], rewards_PS[..., None, :]
    margin = facts.margin[..., None, None]
    loss_PSS = losses.bradley_terry_loss(*rewards, margin, centering)
    of_pairs = _preferences(*rewards, loss_PSS, jnp.ones_like(loss_PSS))
    found = {
        name: tuple(jnp.where(better_PSS, part, 0).sum((-1, -2)) for part in parts)
        for name, parts in of_pairs.items()
    }
    total, pairs = found["loss"]
    mean = total / jnp.maximum(pairs, 1)  # a place that holds no item has none
    return found | {"loss": (facts.weight * mean, facts.weight)}


def dpo_terms(pi_PS: jax.Array, facts: Facts, config: DPO) -> Terms:
    """Loss and implicit rewards a pair; side 0 is chosen, side 1 rejected.

    SimPO's rewards are mean log-probs a token, without a reference (Meng et al., arXiv 2405.14734).
    The SFT term is a mean over the chosen sides' tokens of the whole step, whichever pair they are
    of, as TRL's.
    """
    pi_w, pi_l = pi_PS[..., 0], pi_PS[..., 1]
    tokens_w, tokens_l = facts.tokens[..., 0], facts.tokens[..., 1]
    if config.loss == "simpo":
        mean_PS = pi_PS / jnp.maximum(facts.tokens, 1)
        rewards = config.beta * mean_PS[..., 0], config.beta * mean_PS[..., 1]
    else:
        reference = facts.ref[..., 0], facts.ref[..., 1]
        rewards = losses.dpo_rewards(pi_w, pi_l, *reference, config.beta)
    loss = _dpo_loss(rewards, pi_PS, facts, config)
    one = jnp.ones_like(pi_w)
    found = {
        "logps/chosen": (pi_w, one),
        "logps/rejected": (pi_l, one),
        "logps/margins": (pi_w - pi_l, one),
        "tokens/chosen": (tokens_w, one),
        "tokens/rejected": (tokens_l, one),
    }
    if config.sft_weight:
        nll = losses.sft_loss(pi_w)
        loss += config.sft_weight * facts.pairs_per_token * nll
        found["nll_loss"] = (nll, tokens_w)
    return _preferences(*rewards, loss, facts.weight) | found


def _dpo_loss(rewards, pi_PS: jax.Array, facts: Facts, config: DPO) -> jax.Array:
    ahead = rewards[0] - rewards[1] - config.margin
    match config.loss:
        case "hinge":
            return losses.hinge_loss(ahead)
        case "ipo":
            ratios_PS = (pi_PS - facts.ref) / jnp.maximum(facts.tokens, 1)
            return losses.ipo_loss(ratios_PS[..., 0] - ratios_PS[..., 1], config.beta)
        case "robust":
            return losses.robust_loss(ahead, config.label_smoothing)
        case "sigmoid" | "simpo":
            return losses.sigmoid_loss(ahead, config.label_smoothing)
    raise AssertionError(config.loss)


def _preferences(
    reward_w: jax.Array, reward_l: jax.Array, loss: jax.Array, weight: jax.Array
) -> Terms:
    """Metrics of pairs under the names that users know from TRL; weights are the loss's alone."""
    margin = reward_w - reward_l
    one = jnp.ones_like(margin)
    return {
        "loss": (weight * loss, weight),
        "rewards/chosen": (reward_w, one),
        "rewards/rejected": (reward_l, one),
        "rewards/margins": (margin, one),
        "rewards/accuracies": (losses.preference_accuracy(margin), one),
    }


def batch_loss(
    model: Decoder,
    batch: PackedBatch,
    stage: Stage,
    compute: Compute,
    pairs_per_token: jax.Array | float = 1.0,
):
    """Summed loss of a micro-batch, and every metric as its (sum, count), or (extreme, 1)."""
    scores_BPS, tokens_BPS = stage.scores(model, batch, compute)
    facts = Facts(batch.ref, tokens_BPS, batch.margin, batch.weight, batch.rank, pairs_per_token)
    real_BP = batch.items > 0
    sums = {
        name: jnp.stack([jnp.where(real_BP, part, 0).sum() for part in parts])
        for name, parts in stage.terms(scores_BPS, facts).items()
    }
    if stage.name == "rm":
        sums |= _spread(scores_BPS, real_BP[..., None] & (tokens_BPS > 0))
    return sums["loss"][0], sums


def pairs_per_token(stage: Stage, batch: PackedBatch) -> jax.Array | float:
    """Pairs of a whole step [A, B, ...] over their chosen sides' trained tokens, both by weight.

    1 for a loss without an SFT term.
    """
    if not stage.sft_term:
        return 1.0
    segments_ABM = jnp.take_along_axis(batch.segments, batch.targets, axis=2)
    chosen_ABM = (batch.targets > 0) & (segments_ABM % 2 == 1)
    places_ABM = jnp.maximum(segments_ABM - 1, 0) // 2
    weight_ABM = jnp.take_along_axis(batch.weight, places_ABM, axis=2)
    return batch.weight.sum() / counted(jnp.where(chosen_ABM, weight_ABM, 0).sum())


def counted(number: jax.Array) -> jax.Array:
    """A sum of weights to divide by: 1 where all are 0, and so is what it divides."""
    return jnp.where(number == 0, 1, number)


def _spread(rewards_BPS: jax.Array, real_BPS: jax.Array) -> dict[str, jax.Array]:
    """The least, mean and largest reward of all responses of a micro-batch, padding left out."""
    rewards_BPS, one = jax.lax.stop_gradient(rewards_BPS), jnp.float32(1)
    return {
        "rewards/min": jnp.stack([jnp.where(real_BPS, rewards_BPS, np.inf).min(), one]),
        "rewards/mean": jnp.stack(
            [jnp.where(real_BPS, rewards_BPS, 0).sum(), real_BPS.sum(dtype=jnp.float32)]
        ),
        "rewards/max": jnp.stack([jnp.where(real_BPS, rewards_BPS, -np.inf).max(), one]),
    }
