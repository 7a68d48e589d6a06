"""Causal attention inside segments.

B batch, T query position, S key position, N key/value heads, G query heads each serves, K head
size.
"""

from functools import partial

import jax
import jax.numpy as jnp

from alignjax.errors import UserError
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
    if kernel == "blocks" and (length != keys or length <= BLOCK):
        mask_BTS = _mask(q_segments_BT, k_segments_BS, offset, window)
        return _dense(q_BTNGK, k_BSNK, v_BSNK, mask_BTS)
    heads = ("batch", None, "kv_heads")
    q_BTNGK = jax.reshard(q_BTNGK, spec(*heads, None, None))
    k_BSNK, v_BSNK = (jax.reshard(array, spec(*heads, None)) for array in (k_BSNK, v_BSNK))
    q_segments_BT = jax.reshard(q_segments_BT, spec("batch", None))
    if kernel == "blocks":
        rest = -length % BLOCK  # the row's last block is filled up with padding
        rows = [kernels.fill(one, rest) for one in (q_BTNGK, k_BSNK, v_BSNK, q_segments_BT)]
        return _blocks(*rows, window)[:, :length]
    if kernel == "splash":
        return kernels.splash(q_BTNGK, k_BSNK, v_BSNK, q_segments_BT, window)
    assert kernel == "triton"
    return kernels.triton(q_BTNGK, k_BSNK, v_BSNK, q_segments_BT)


def _choice(kernel: str, length: int, window: int | None) -> str:
    """The kernel meant by `Compute.attention`, for rows of `length` tokens."""
    windowed = window is not None and window < length
    if kernel == "triton" and windowed:
        raise UserError(
            f"compute.attention=triton has no sliding window, and this model's ({window} tokens) "
            f"is shorter than a row ({length}): set it to auto or blocks."
        )
    if kernel != "auto":
        return kernel
    best = {"tpu": "splash", "gpu": "triton"}.get(kernels.platform(), "blocks")
    return "blocks" if best == "triton" and windowed else best


def _mask(q_segments_BT, k_segments_BS, offset, window: int | None):
    """Which keys a query sees, [..., T, S]; query 0 stands `offset` places behind key 0."""
    length, keys = q_segments_BT.shape[-1], k_segments_BS.shape[-1]
    behind_TS = jnp.arange(length)[:, None] + offset - jnp.arange(keys)
    near_TS = behind_TS >= 0
    if window is not None:
        near_TS &= behind_TS < window
    return (q_segments_BT[..., :, None] == k_segments_BS[..., None, :]) & near_TS


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
# are made again in the backward pass, never stored. One row at a time, so that each has its own
# range. I blocks, T queries and S keys of one of them.


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blocks(q_BTNGK, k_BSNK, v_BSNK, segments_BT, window: int | None):
    return _blocks_forward(q_BTNGK, k_BSNK, v_BSNK, segments_BT, window)[0]


def _blocks_forward(q_BTNGK, k_BSNK, v_BSNK, segments_BT, window):
    arrays = (q_BTNGK, k_BSNK, v_BSNK, segments_BT)
    out_BTNGK, lse_BINGT = _by_row(partial(_row_forward, window), (5, 5), *arrays)
    return out_BTNGK, (*arrays, out_BTNGK, lse_BINGT)


def _blocks_backward(window, saved, g_BTNGK):
    gradients = _by_row(partial(_row_backward, window), (5, 4, 4), *saved, g_BTNGK)
    return (*gradients, None)


_blocks.defvjp(_blocks_forward, _blocks_backward)


def _by_row(function, dims: tuple[int, ...], *arrays):
    """Maps a function over the rows that a device has; its results have so many dimensions."""

    def part(ndim: int):
        return spec(*("batch", None, "kv_heads", None, None)[:ndim])

    return jax.shard_map(
        lambda *local: jax.lax.map(lambda row: function(*row), local),
        in_specs=tuple(part(array.ndim) for array in arrays),
        out_specs=tuple(part(ndim) for ndim in dims),
        check_vma=False,  # the loops' sums begin as plain zeros
    )(*arrays)


def _row_forward(window, q_TNGK, k_SNK, v_SNK, segments_T):
    """Attention of a row, and the log-sum-exp of each query's scores, float32 [I, N, G, T]."""
    q_INGTK, k_INSK, v_INSK = _queries(q_TNGK), _keys(k_SNK), _keys(v_SNK)
    scores = _block_scores(k_INSK, segments_T, window)

    def block(_, inputs):
        i, first, q_NGTK = inputs

        def add(j, sums):
            out_NGTK, top_NGT, total_NGT = sums
            scores_NGTS = scores(i, j, q_NGTK)
            new_NGT = jnp.maximum(top_NGT, scores_NGTS.max(-1))
            e_NGTS = jnp.exp(scores_NGTS - new_NGT[..., None])
            shrink_NGT = jnp.exp(top_NGT - new_NGT)
            more_NGTK = _dot("ngts,nsk->ngtk", e_NGTS.astype(v_SNK.dtype), _at(v_INSK, j))
            out_NGTK = out_NGTK * shrink_NGT[..., None] + more_NGTK
            return out_NGTK, new_NGT, total_NGT * shrink_NGT + e_NGTS.sum(-1)

        zero_NGTK = jnp.zeros_like(q_NGTK, jnp.float32)
        zero_NGT = zero_NGTK[..., 0]
        sums = (zero_NGTK, zero_NGT + jnp.finfo(jnp.float32).min, zero_NGT)
        out_NGTK, top_NGT, total_NGT = jax.lax.fori_loop(first, i + 1, add, sums)
        return None, (out_NGTK / total_NGT[..., None], top_NGT + jnp.log(total_NGT))

    first_I = _first_blocks(segments_T, window)
    inputs = (jnp.arange(len(first_I)), first_I, q_INGTK)
    _, (out_INGTK, lse_INGT) = jax.lax.scan(block, None, inputs)
    return _joined(out_INGTK).astype(q_TNGK.dtype), lse_INGT


def _row_backward(window, q_TNGK, k_SNK, v_SNK, segments_T, out_TNGK, lse_INGT, g_TNGK):
    """Gradients of a row's queries, keys and values."""
    q_INGTK, g_INGTK = _queries(q_TNGK), _in_blocks(g_TNGK)
    k_INSK, v_INSK = _keys(k_SNK), _keys(v_SNK)
    scores = _block_scores(k_INSK, segments_T, window)
    own_INGT = _in_blocks(row_dot(g_TNGK, out_TNGK)[..., None])[..., 0]
    v_INKS = v_INSK.swapaxes(-1, -2)  # XLA on CPU is quickest where no operand is transposed

    def block(sums, inputs):
        i, first, q_NGTK, g_NGTK, own_NGT, lse_NGT = inputs
        q_NGKT, g_NGKT = q_NGTK.swapaxes(-1, -2), g_NGTK.swapaxes(-1, -2)

        def add(j, sums):
            dq_NGTK, dk_INKS, dv_INKS = sums
            p_NGTS = jnp.exp(scores(i, j, q_NGTK) - lse_NGT[..., None])
            dp_NGTS = _dot("ngtk,nks->ngts", g_NGTK, _at(v_INKS, j))
            ds_NGTS = (p_NGTS * (dp_NGTS - own_NGT[..., None])).astype(q_NGTK.dtype)
            dq_NGTK += _dot("ngts,nsk->ngtk", ds_NGTS, _at(k_INSK, j))
            dk_NKS = _dot("ngkt,ngts->nks", q_NGKT, ds_NGTS)
            dv_NKS = _dot("ngkt,ngts->nks", g_NGKT, p_NGTS.astype(g_NGTK.dtype))
            return dq_NGTK, _add_at(dk_INKS, j, dk_NKS), _add_at(dv_INKS, j, dv_NKS)

        zero_NGTK = jnp.zeros_like(q_NGTK, jnp.float32)
        dq_NGTK, *sums = jax.lax.fori_loop(first, i + 1, add, (zero_NGTK, *sums))
        return tuple(sums), dq_NGTK

    zero_INKS = jnp.zeros_like(v_INKS, jnp.float32)
    first_I = _first_blocks(segments_T, window)
    inputs = (jnp.arange(len(first_I)), first_I, q_INGTK, g_INGTK, own_INGT, lse_INGT)
    dkeys, dq_INGTK = jax.lax.scan(block, (zero_INKS, zero_INKS), inputs)
    dk_SNK, dv_SNK = (
        _joined(array.swapaxes(-1, -2)[:, :, None])[:, :, 0].astype(k_SNK.dtype) for array in dkeys
    )
    dq_TNGK = _joined(dq_INGTK) * q_TNGK.shape[-1] ** -0.5
    return dq_TNGK.astype(q_TNGK.dtype), dk_SNK, dv_SNK


def _block_scores(k_INSK, segments_T, window: int | None):
    """A function (i, j, queries of block i) -> their scores with the keys of block j."""
    k_INKS = k_INSK.swapaxes(-1, -2)
    segments_IT = segments_T.reshape(-1, BLOCK)

    def scores(i, j, q_NGTK):
        mask_TS = _mask(_at(segments_IT, i), _at(segments_IT, j), (i - j) * BLOCK, window)
        scores_NGTS = _dot("ngtk,nks->ngts", q_NGTK, _at(k_INKS, j))
        return jnp.where(mask_TS, scores_NGTS, jnp.finfo(jnp.float32).min)

    return scores


_dot = partial(jnp.einsum, preferred_element_type=jnp.float32)


def _at(blocks, j):
    """Block j, which is there: XLA need not check."""
    return blocks.at[j].get(mode="promise_in_bounds")


def _add_at(blocks, j, more):
    return blocks.at[j].add(more, mode="promise_in_bounds")


def _first_blocks(segments_T, window: int | None):
    """The block with the earliest key that the queries of each block see, int32 [I]."""
    places_T = jnp.arange(len(segments_T))
    begins_T = jnp.diff(segments_T, prepend=-1) != 0
    first_I = jax.lax.cummax(jnp.where(begins_T, places_T, 0))[::BLOCK]
    if window is not None:
        first_I = jnp.maximum(first_I, places_T[::BLOCK] - window + 1)
    return first_I // BLOCK


def _queries(q_TNGK):
    return _in_blocks(q_TNGK * q_TNGK.shape[-1] ** -0.5)


def _keys(k_SNK):
    return _in_blocks(k_SNK[:, :, None])[:, :, 0]


def _in_blocks(x_TNGK):
    """An array in blocks of its places, [I, N, G, T, K]."""
    return x_TNGK.reshape(-1, BLOCK, *x_TNGK.shape[1:]).transpose(0, 2, 3, 1, 4)


def _joined(x_INGTK):
    """The places of all blocks, [T, N, G, K]."""
    x_ITNGK = x_INGTK.transpose(0, 3, 1, 2, 4)
    return x_ITNGK.reshape(-1, *x_ITNGK.shape[2:])
