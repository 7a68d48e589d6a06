"""Causal attention inside segments.

B batch, T query position, S key position, N key/value heads, G query heads each serves, K head
size.
"""

import jax
import jax.numpy as jnp

from alignjax.sharding import spec

BLOCK = 64  # queries that share one causal bound; smaller saves work, larger saves launches


def attention(
    q_BTNGK: jax.Array,
    k_BSNK: jax.Array,
    v_BSNK: jax.Array,
    q_segments_BT: jax.Array,
    k_segments_BS: jax.Array,
    offset: jax.Array | int = 0,
) -> jax.Array:
    """Softmax attention where query t sees key s if both share a segment and s <= t + offset.

    Scores and softmax are float32; the result [B, T, N, G, K] has q's dtype. With offset 0 queries
    go in blocks, and a block skips all keys that come after it.
    """
    length, keys = q_BTNGK.shape[1], k_BSNK.shape[1]
    if length != keys or length % BLOCK or length == BLOCK:
        return _dense(q_BTNGK, k_BSNK, v_BSNK, q_segments_BT, k_segments_BS, offset)
    dense = jax.checkpoint(_dense, static_argnums=(5,))  # scores are made again, never stored
    out = []
    for end in range(BLOCK, length + 1, BLOCK):
        rows = slice(end - BLOCK, end)
        seen = (k_BSNK[:, :end], v_BSNK[:, :end], q_segments_BT[:, rows], k_segments_BS[:, :end])
        out.append(dense(q_BTNGK[:, rows], *seen, end - BLOCK))
    return jnp.concatenate(out, axis=1)


def _dense(q_BTNGK, k_BSNK, v_BSNK, q_segments_BT, k_segments_BS, offset):
    batch, _, kv_heads = spec("batch", None, "kv_heads")
    scores_BNTGS = jnp.einsum(
        "btngk,bsnk->bntgs",
        q_BTNGK * q_BTNGK.shape[-1] ** -0.5,
        k_BSNK,
        preferred_element_type=jnp.float32,
        out_sharding=jax.P(batch, kv_heads),
    )
    before_TS = jnp.arange(k_BSNK.shape[1]) <= jnp.arange(q_BTNGK.shape[1])[:, None] + offset
    mask_BTS = (q_segments_BT[:, :, None] == k_segments_BS[:, None, :]) & before_TS
    scores_BNTGS = jnp.where(mask_BTS[:, None, :, None], scores_BNTGS, jnp.finfo(jnp.float32).min)
    p_BNTGS = jax.nn.softmax(scores_BNTGS, axis=-1).astype(v_BSNK.dtype)
    return jnp.einsum(
        "bntgs,bsnk->btngk", p_BNTGS, v_BSNK, out_sharding=jax.P(batch, None, kv_heads)
    )
