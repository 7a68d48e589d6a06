"""Causal attention inside segments.

B batch, T query position, S key position, N key/value heads, G query heads each serves, K head
size; I blocks of queries.
"""

from functools import partial

import jax
import jax.numpy as jnp

from alignjax.models import kernels
from alignjax.sharding import spec

BLOCK = 64  # queries that share one range of keys; smaller saves work, larger saves launches


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
        return _dense(q_BTNGK, k_BSNK, v_BSNK, mask_BTS)[0]
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


def _scores(q_BTNGK, k_BSNK, mask_BTS):
    scores_BNTGS = _einsum("btngk,bsnk->bntgs", q_BTNGK * q_BTNGK.shape[-1] ** -0.5, k_BSNK)
    return jnp.where(mask_BTS[:, None, :, None], scores_BNTGS, jnp.finfo(jnp.float32).min)


def _dense(q_BTNGK, k_BSNK, v_BSNK, mask_BTS):
    """Attention, and the log-sum-exp of each query's scores, float32 [B, N, T, G]."""
    scores_BNTGS = _scores(q_BTNGK, k_BSNK, mask_BTS)
    top_BNTG = jax.lax.stop_gradient(scores_BNTGS.max(-1))
    e_BNTGS = jnp.exp(scores_BNTGS - top_BNTG[..., None])
    total_BNTG = e_BNTGS.sum(-1)
    out_BTNGK = _einsum("bntgs,bsnk->btngk", e_BNTGS.astype(v_BSNK.dtype), v_BSNK)
    out_BTNGK /= total_BNTG.swapaxes(1, 2)[..., None]
    return out_BTNGK.astype(q_BTNGK.dtype), top_BNTG + jnp.log(total_BNTG)


def _einsum(subscripts: str, *operands):
    """In float32, split over rows and key/value heads."""
    axes = {"b": "batch", "n": "kv_heads"}
    out = spec(*(axes.get(name) for name in subscripts.partition("->")[2]))
    return jnp.einsum(subscripts, *operands, preferred_element_type=jnp.float32, out_sharding=out)


# In blocks of queries, each of which meets only keys from where the first of its segments begins,
# rounded up to 1, 2, 4 ... blocks. Scores are made again in the backward pass, never stored.


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _blocks(q_BTNGK, k_BSNK, v_BSNK, segments_BT, window: int | None):
    return _blocks_forward(q_BTNGK, k_BSNK, v_BSNK, segments_BT, window)[0]


def _blocks_forward(q_BTNGK, k_BSNK, v_BSNK, segments_BT, window):
    def block(size, i, start):
        q, q_segments = (_cut(array, i * BLOCK, BLOCK) for array in (q_BTNGK, segments_BT))
        k, v, segments = (_cut(array, start, size) for array in (k_BSNK, v_BSNK, segments_BT))
        return _dense(q, k, v, _mask(q_segments, segments, i * BLOCK - start, window))

    def step(_, inputs):
        return None, _choose(block, *inputs, q_BTNGK.shape[1])

    first_I = _first_blocks(segments_BT, window)
    _, (out_IBTNGK, lse_IBNTG) = jax.lax.scan(step, None, (jnp.arange(len(first_I)), first_I))
    out_BTNGK = _whole(out_IBTNGK)
    return out_BTNGK, (q_BTNGK, k_BSNK, v_BSNK, segments_BT, out_BTNGK, lse_IBNTG)


def _blocks_backward(window, saved, g_BTNGK):
    q_BTNGK, k_BSNK, v_BSNK, segments_BT, out_BTNGK, lse_IBNTG = saved
    scale = q_BTNGK.shape[-1] ** -0.5

    def block(size, i, start, lse_BNTG, dk_BSNK, dv_BSNK):
        rows = (q_BTNGK, g_BTNGK, out_BTNGK, segments_BT)
        q, g, out, q_segments = (_cut(array, i * BLOCK, BLOCK) for array in rows)
        k, v, segments = (_cut(array, start, size) for array in (k_BSNK, v_BSNK, segments_BT))
        mask_BTS = _mask(q_segments, segments, i * BLOCK - start, window)
        p_BNTGS = jnp.exp(_scores(q, k, mask_BTS) - lse_BNTG[..., None])
        own_BTNG = (g.astype(jnp.float32) * out).sum(-1)
        dp_BNTGS = _einsum("btngk,bsnk->bntgs", g, v)
        ds_BNTGS = p_BNTGS * (dp_BNTGS - own_BTNG.swapaxes(1, 2)[..., None]) * scale
        ds_BNTGS = ds_BNTGS.astype(q.dtype)
        dq_BTNGK = _einsum("bntgs,bsnk->btngk", ds_BNTGS, k).astype(q.dtype)
        dk = _einsum("bntgs,btngk->bsnk", ds_BNTGS, q)
        dv = _einsum("bntgs,btngk->bsnk", p_BNTGS.astype(g.dtype), g)
        return dq_BTNGK, _add(dk_BSNK, dk, start), _add(dv_BSNK, dv, start)

    def step(carry, inputs):
        i, first, lse_BNTG = inputs
        dq_BTNGK, *carry = _choose(block, i, first, q_BTNGK.shape[1], lse_BNTG, *carry)
        return tuple(carry), dq_BTNGK

    zeros = [jnp.zeros_like(array, jnp.float32) for array in (k_BSNK, v_BSNK)]
    first_I = _first_blocks(segments_BT, window)
    inputs = (jnp.arange(len(first_I)), first_I, lse_IBNTG)
    (dk_BSNK, dv_BSNK), dq_IBTNGK = jax.lax.scan(step, tuple(zeros), inputs)
    return _whole(dq_IBTNGK), dk_BSNK.astype(k_BSNK.dtype), dv_BSNK.astype(v_BSNK.dtype), None


_blocks.defvjp(_blocks_forward, _blocks_backward)


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


def _choose(block, i, first, length: int, *operands):
    """`block(keys, i, start, *operands)` for the fewest keys that reach from `first` to block i."""
    blocks = length // BLOCK
    sizes = sorted({min(n << k, blocks) for k in range(blocks.bit_length()) for n in (2, 3)} | {1})
    branches = [
        lambda *operands, size=size: block(
            size * BLOCK, i, jnp.maximum(i + 1 - size, 0) * BLOCK, *operands
        )
        for size in sizes
    ]
    return jax.lax.switch(jnp.searchsorted(jnp.array(sizes), i + 1 - first), branches, *operands)


def _cut(array, start, size: int):
    return jax.lax.dynamic_slice_in_dim(array, start, size, axis=1)


def _whole(x_IBTNGK):
    """Blocks of queries as one array [B, T, N, G, K]."""
    blocks, batch, length, *heads = x_IBTNGK.shape
    out = spec("batch", None, "kv_heads", None, None)
    return x_IBTNGK.swapaxes(0, 1).reshape(batch, blocks * length, *heads, out_sharding=out)


def _add(array, part, start):
    """Adds a part to an array at places from `start` on."""
    own = jax.lax.dynamic_slice_in_dim(array, start, part.shape[1], axis=1)
    return jax.lax.dynamic_update_slice_in_dim(array, own + part, start, axis=1)
