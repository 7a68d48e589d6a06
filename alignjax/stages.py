"""What each training stage minimises and reports, as functions of log-probabilities.

P items (pairs, or conversations), S sides of an item. The same terms serve the training step, on
the items of a row, and the evaluation, on all items of a data set.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from alignjax import losses
from alignjax.config import DPO, SFT, Compute
from alignjax.data.batches import Batch
from alignjax.logps import sequence_logps
from alignjax.models.decoder import Decoder

# name -> (values, counts), both [..., P]; the metric is sum(values) / sum(counts)
Terms = dict[str, tuple[jax.Array, jax.Array]]


@dataclass(frozen=True)
class Stage:
    name: str
    unit: str  # what a user calls an item
    needs_reference: bool
    terms: Callable[[jax.Array, jax.Array, jax.Array], Terms]  # (logps, ref, tokens), [..., P, S]


def stage_of(config: SFT | DPO) -> Stage:
    if isinstance(config, DPO):
        return Stage(
            "dpo",
            "pairs",
            True,
            lambda pi, ref, tokens: dpo_terms(pi, ref, config.beta, config.label_smoothing),
        )
    return Stage("sft", "sequences", False, lambda pi, ref, tokens: sft_terms(pi, tokens))


def sft_terms(pi_PS: jax.Array, tokens_PS: jax.Array) -> Terms:
    """Loss in nats a trained token, so that a long answer weighs as much as its tokens."""
    return {"loss": (losses.sft_loss(pi_PS[..., 0]), tokens_PS[..., 0])}


def dpo_terms(pi_PS: jax.Array, ref_PS: jax.Array, beta: float, label_smoothing: float) -> Terms:
    """Loss and rewards a pair; side 0 is chosen, side 1 rejected."""
    vectors = (pi_PS[..., 0], pi_PS[..., 1], ref_PS[..., 0], ref_PS[..., 1])
    reward_w, reward_l = losses.dpo_rewards(*vectors, beta)
    margin = reward_w - reward_l
    one = jnp.ones_like(margin)
    return {
        "loss": (losses.dpo_loss(*vectors, beta, label_smoothing), one),
        "rewards/chosen": (reward_w, one),
        "rewards/rejected": (reward_l, one),
        "rewards/margins": (margin, one),
        "rewards/accuracies": (losses.preference_accuracy(margin), one),
        "logps/chosen": (vectors[0], one),
        "logps/rejected": (vectors[1], one),
    }


def batch_loss(model: Decoder, batch: Batch, stage: Stage, compute: Compute):
    """Summed loss of a micro-batch, and every metric as its (sum, count)."""
    pi_BPS, tokens_BPS = sequence_logps(model, batch, compute)
    real_BP = batch.items > 0
    sums = {
        name: jnp.stack([jnp.where(real_BP, part, 0).sum() for part in parts])
        for name, parts in stage.terms(pi_BPS, batch.ref, tokens_BPS).items()
    }
    return sums["loss"][0], sums
