"""Causal attention inside segments.

B batch, T query position, S key position, N key/value heads, G query heads each serves, K head
size.
"""

from functools import partial

import jax
import jax.numpy as jnp

from alignjax.models import kernels
from alignjax.models.norm import row_dot
from alignjax.sharding import spec

BLOCK = 64  # queries, and keys, of a block; smaller ones save work, larger ones save launches


def attention(
    q_BTNGK: jax.Array,
    k_BSNK: jax.Array,
    v_BSNK: jax.Array,
    q_segments_BT: jax.Array,
    k_segments_BS: jax.Array,
    offset: jax.Array | int = 0,
    window: int | None = None,
    kernel: str = "blocks",
) -> jax.Array:
    """Softmax attention where query t sees key s if both share a segment and s <= t + offset.

    With a `window` it sees no more than so many keys, its own among them. Scores and softmax are
    float32; the result [B, T, N, G, K] has q's dtype. A segment is a run of neighbouring places.
    Kernels other than "blocks" (see `Compute.attention`) are for whole rows, without an offset.
    """
    length, keys = q_BTNGK.shape[1], k_BSNK.shape[1]
    kernel = _choice(kernel, length, window)
    if kernel == "blocks" and (length != keys or length % BLOCK or length == BLOCK):
        mask_BTS = _mask(q_segments_BT, k_segments_BS, offset, window)
        return _dense(q_BTNGK, k_BSNK, v_BSNK, mask_BTS)
    heads = ("batch", None, "kv_heads")
    q_BTNGK = jax.reshard(q_BTNGK, spec(*heads, None, None))
    k_BSNK, v_BSNK = (jax.reshard(array, spec(*heads, None)) for array in (k_BSNK, v_BSNK))
    if kernel == "blocks":
        return _blocks(q_BTNGK, k_BSNK, v_BSNK, q_segments_BT, window)
    q_segments_BT = jax.reshard(q_segments_BT, spec("batch", None))
    if kernel == "splash":
        return kernels.splash(q_BTNGK, k_BSNK, v_BSNK, q_segments_BT, window)
    return kernels.triton(q_BTNGK, k_BSNK, v_BSNK, q_segments_BT)


def _choice(kernel: str, length: int, window: int | None) -> str:
    """The kernel meant by `Compute.attention`, for rows of `length` tokens."""
    windowed = window is not None and window < length
    if kernel == "triton" and windowed:
        raise ValueError(
            f"compute.attention=triton has no sliding window, and this model's ({window} tokens) "
            f"is shorter than a row ({length}): set it to auto or blocks."
        )
    if kernel != "auto":
        return kernel
    best = {"tpu": "splash", "gpu": "triton"}.get(kernels.platform(), "blocks")
    return "blocks" if best == "triton" and windowed else best


def _mask(q_segments_BT, k_segments_BS, offset, window: int | None):
    """Which keys a query sees, [B, T, S]; query 0 stands `offset` places behind key 0."""
    length, keys = q_segments_BT.shape[1], k_segments_BS.shape[1]
    behind_TS = jnp.arange(length)[:, None] + offset - jnp.arange(keys)
    near_TS = behind_TS >= 0
    if window is not None:
        near_TS &= behind_TS < window
    return (q_segments_BT[:, :, None] == k_segments_BS[:, None, :]) & near_TS


def _dense(q_BTNGK, k_BSNK, v_BSNK, mask_BTS):
    """Attention with all scores in memory at a time."""
    scores_BNTGS = _einsum("btngk,bsnk->bntgs", q_BTNGK * q_BTNGK.shape[-1] ** -0.5, k_BSNK)
    lowest = jnp.finfo(jnp.float32).min
    scores_BNTGS = jnp.where(mask_BTS[:, None, :, None], scores_BNTGS, lowest)
    top_BNTG = jax.lax.stop_gradient(scores_BNTGS.max(-1))
    e_BNTGS = jnp.exp(scores_BNTGS - top_BNTG[..., None])
    total_BNTG = e_BNTGS.sum(-1)
    out_BTNGK = _einsum("bntgs,bsnk->btngk", e_BNTGS.astype(v_BSNK.dtype), v_BSNK)
    out_BTNGK /= total_BNTG.swapaxes(1, 2)[..., None]
    return out_BTNGK.astype(q_BTNGK.dtype)


def _einsum(subscripts: str, *operands):
    """In float32, split over rows and key/value heads."""
    axes = {"b": "batch", "n": "kv_heads"}
    out = spec(*(axes.get(name) for name in subscripts.partition("->")[2]))
    return jnp.einsum(subscripts, *operands, preferred_element_type=jnp.float32, out_sharding=out)


# In blocks: queries meet only blocks of keys from where the first of their segments begins. Scores
# are made again in the backward pass, never stored. I blocks, T queries and S keys of one of them.


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blocks(q_BTNGK, k_BSNK, v_BSNK, segments_BT, window: int | None):
    return _blocks_forward(q_BTNGK, k_BSNK, v_BSNK, segments_BT, window)[0]


def _blocks_forward(q_BTNGK, k_BSNK, v_BSNK, segments_BT, window):
    q_IBNGTK, (k_IBNSK, v_IBNSK) = _queries(q_BTNGK), _keys(k_BSNK, v_BSNK)
    scores = _block_scores(k_IBNSK, segments_BT, window)

    def block(_, inputs):
        i, first, q_BNGTK = inputs

        def add(j, sums):
            out_BNGTK, top_BNGT, total_BNGT = sums
            scores_BNGTS = scores(i, j, q_BNGTK)
            new_BNGT = jnp.maximum(top_BNGT, scores_BNGTS.max(-1))
            e_BNGTS = jnp.exp(scores_BNGTS - new_BNGT[..., None])
            shrink_BNGT = jnp.exp(top_BNGT - new_BNGT)
            more = _einsum("bngts,bnsk->bngtk", e_BNGTS.astype(v_BSNK.dtype), v_IBNSK[j])
            out_BNGTK = out_BNGTK * shrink_BNGT[..., None] + more
            return out_BNGTK, new_BNGT, total_BNGT * shrink_BNGT + e_BNGTS.sum(-1)

        zero_BNGTK = jnp.zeros_like(q_BNGTK, jnp.float32)
        zero_BNGT = zero_BNGTK[..., 0]
        sums = (zero_BNGTK, zero_BNGT + jnp.finfo(jnp.float32).min, zero_BNGT)
        out_BNGTK, top_BNGT, total_BNGT = jax.lax.fori_loop(first, i + 1, add, sums)
        return None, (out_BNGTK / total_BNGT[..., None], top_BNGT + jnp.log(total_BNGT))

    first_I = _first_blocks(segments_BT, window)
    _, (out, lse_IBNGT) = jax.lax.scan(block, None, (jnp.arange(len(first_I)), first_I, q_IBNGTK))
    out_BTNGK = _joined(out).astype(q_BTNGK.dtype)
    return out_BTNGK, (q_BTNGK, k_BSNK, v_BSNK, segments_BT, out_BTNGK, lse_IBNGT)


def _blocks_backward(window, saved, g_BTNGK):
    q_BTNGK, k_BSNK, v_BSNK, segments_BT, out_BTNGK, lse_IBNGT = saved
    q_IBNGTK, g_IBNGTK = _queries(q_BTNGK), _in_blocks(g_BTNGK)
    k_IBNSK, v_IBNSK = _keys(k_BSNK, v_BSNK)
    scores = _block_scores(k_IBNSK, segments_BT, window)
    own_BTNG = row_dot(g_BTNGK, out_BTNGK)
    own_IBNGT = _in_blocks(own_BTNG[..., None])[..., 0]
    v_IBNKS = v_IBNSK.swapaxes(-1, -2)  # XLA on CPU is quickest where no operand is transposed

    def block(sums, inputs):
        i, first, q_BNGTK, g_BNGTK, own_BNGT, lse_BNGT = inputs
        q_BNGKT, g_BNGKT = q_BNGTK.swapaxes(-1, -2), g_BNGTK.swapaxes(-1, -2)

        def add(j, sums):
            dq_BNGTK, dk_IBNKS, dv_IBNKS = sums
            p_BNGTS = jnp.exp(scores(i, j, q_BNGTK) - lse_BNGT[..., None])
            dp_BNGTS = _einsum("bngtk,bnks->bngts", g_BNGTK, v_IBNKS[j])
            ds_BNGTS = (p_BNGTS * (dp_BNGTS - own_BNGT[..., None])).astype(q_BNGTK.dtype)
            dq_BNGTK += _einsum("bngts,bnsk->bngtk", ds_BNGTS, k_IBNSK[j])
            dk_BNKS = _einsum("bngkt,bngts->bnks", q_BNGKT, ds_BNGTS)
            dv_BNKS = _einsum("bngkt,bngts->bnks", g_BNGKT, p_BNGTS.astype(g_BNGTK.dtype))
            return dq_BNGTK, dk_IBNKS.at[j].add(dk_BNKS), dv_IBNKS.at[j].add(dv_BNKS)

        zero_BNGTK = jnp.zeros_like(q_BNGTK, jnp.float32)
        dq_BNGTK, *sums = jax.lax.fori_loop(first, i + 1, add, (zero_BNGTK, *sums))
        return tuple(sums), dq_BNGTK

    zero_IBNKS = jnp.zeros_like(v_IBNKS, jnp.float32)
    first_I = _first_blocks(segments_BT, window)
    rows = (jnp.arange(len(first_I)), first_I, q_IBNGTK, g_IBNGTK, own_IBNGT, lse_IBNGT)
    (dk_IBNKS, dv_IBNKS), dq_IBNGTK = jax.lax.scan(block, (zero_IBNKS, zero_IBNKS), rows)
    dk_BSNK, dv_BSNK = (
        _joined(array.swapaxes(-1, -2)[:, :, :, None])[:, :, :, 0].astype(k_BSNK.dtype)
        for array in (dk_IBNKS, dv_IBNKS)
    )
    dq_BTNGK = _joined(dq_IBNGTK) * q_BTNGK.shape[-1] ** -0.5
    return dq_BTNGK.astype(q_BTNGK.dtype), dk_BSNK, dv_BSNK, None


_blocks.defvjp(_blocks_forward, _blocks_backward)


def _block_scores(k_IBNSK, segments_BT, window: int | None):
    """A function (i, j, queries of block i) -> their scores with the keys of block j."""
    k_IBNKS = k_IBNSK.swapaxes(-1, -2)
    segments_IBT = segments_BT.reshape(len(segments_BT), -1, BLOCK).swapaxes(0, 1)

    def scores(i, j, q_BNGTK):
        mask_BTS = _mask(segments_IBT[i], segments_IBT[j], (i - j) * BLOCK, window)
        scores_BNGTS = _einsum("bngtk,bnks->bngts", q_BNGTK, k_IBNKS[j])
        return jnp.where(mask_BTS[:, None, None], scores_BNGTS, jnp.finfo(jnp.float32).min)

    return scores


def _first_blocks(segments_BT, window: int | None):
    """The block with the earliest key that any row's queries of each block see, int32 [I]."""
    places_T = jnp.arange(segments_BT.shape[1])
    before_BT = jnp.pad(segments_BT, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    begins_BT = segments_BT != before_BT
    first_BT = jax.lax.cummax(jnp.where(begins_BT, places_T, 0), axis=1)
    first_I = first_BT[:, ::BLOCK].min(0)
    if window is not None:
        first_I = jnp.maximum(first_I, places_T[::BLOCK] - window + 1)
    return first_I // BLOCK


def _queries(q_BTNGK):
    return _in_blocks(q_BTNGK * q_BTNGK.shape[-1] ** -0.5)


def _keys(*arrays_BSNK):
    return [_in_blocks(array[:, :, :, None])[:, :, :, 0] for array in arrays_BSNK]


def _in_blocks(x_BTNGK):
    """An array in blocks of its rows, [I, B, N, G, T, K]."""
    batch, length, *heads = x_BTNGK.shape
    cut = (batch, length // BLOCK, BLOCK, *heads)
    x_BITNGK = x_BTNGK.reshape(cut, out_sharding=spec("batch", None, None, "kv_heads", None, None))
    return x_BITNGK.transpose(1, 0, 3, 4, 2, 5)


def _joined(x_IBNGTK):
    """The rows of all blocks, [B, T, N, G, K]."""
    x_BITNGK = x_IBNGTK.transpose(1, 0, 4, 2, 3, 5)
    batch, blocks, length, *heads = x_BITNGK.shape
    out = spec("batch", None, "kv_heads", None, None)
    return x_BITNGK.reshape(batch, blocks * length, *heads, out_sharding=out)
