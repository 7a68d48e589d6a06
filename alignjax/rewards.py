"""Rewards of packed sequences: the score head at each one's last token that is not padding.

B rows, T position, P items of a row, S sides of an item, Q = P S sequences of a row, D model.
"""

import jax
import jax.numpy as jnp

from alignjax.config import Compute
from alignjax.data.batches import PackedBatch
from alignjax.errors import UserError
from alignjax.models.decoder import Decoder, hidden_states
from alignjax.sharding import spec


def sequence_rewards(
    model: Decoder, batch: PackedBatch, compute: Compute
) -> tuple[jax.Array, jax.Array]:
    """The reward of every packed sequence, and 1 where there is one; float32 [B, P, S].

    As transformers does, the reward is read at the last token that is not `pad_token_id` of the
    model's config.json, or at the first one if there is no other. The head is multiplied in float32
    whatever the dtype of the model's arithmetic is.
    """
    if model.score is None:
        raise UserError("a language model gives no rewards: use logps.sequence_logps.")
    h_BTD = hidden_states(model, batch.tokens, batch.positions, batch.segments, compute)
    numbers = 1 + jnp.arange(batch.ref.shape[1] * batch.ref.shape[2])
    own_BTQ = batch.segments[..., None] == numbers
    places_T = 1 + jnp.arange(batch.segments.shape[1])
    pad_id = model.config.pad_id
    places_BT = places_T if pad_id is None else jnp.where(batch.tokens == pad_id, 0, places_T)
    last_BQ = jnp.where(own_BTQ, places_BT[..., None], -1).argmax(1)
    h_BQD = jnp.take_along_axis(h_BTD, last_BQ[..., None], axis=1)
    rewards_BQ = jnp.einsum(
        "bqd,d->bq",
        h_BQD.astype(jnp.float32),
        model.score[0],
        precision="highest",
        out_sharding=spec("batch", None),
    )
    real_BQ = own_BTQ.any(1)
    out = spec("batch", None, None)
    return (
        jnp.where(real_BQ, rewards_BQ, 0).reshape(batch.ref.shape, out_sharding=out),
        real_BQ.astype(jnp.float32).reshape(batch.ref.shape, out_sharding=out),
    )
