"""Rewards of packed sequences: the score head at each one's last token.

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

    The last token is found by the sequence's extent, and never by a token's id. The head is
    multiplied in float32 whatever the dtype of the model's arithmetic is.
    """
    if model.score is None:
        raise UserError("a language model gives no rewards: use logps.sequence_logps.")
    h_BTD = hidden_states(model, batch.tokens, batch.positions, batch.segments, compute)
    numbers = 1 + jnp.arange(batch.ref.shape[1] * batch.ref.shape[2])
    own_BTQ = batch.segments[..., None] == numbers
    places_T = jnp.arange(batch.segments.shape[1])
    last_BQ = jnp.where(own_BTQ, places_T[:, None], -1).max(1)
    h_BQD = jnp.take_along_axis(h_BTD, jnp.maximum(last_BQ, 0)[..., None], axis=1)
    rewards_BQ = jnp.einsum(
        "bqd,d->bq",
        h_BQD.astype(jnp.float32),
        model.score[0],
        precision="highest",
        out_sharding=spec("batch", None),
    )
    real_BQ = last_BQ >= 0
    out = spec("batch", None, None)
    return (
        jnp.where(real_BQ, rewards_BQ, 0).reshape(batch.ref.shape, out_sharding=out),
        real_BQ.astype(jnp.float32).reshape(batch.ref.shape, out_sharding=out),
    )
