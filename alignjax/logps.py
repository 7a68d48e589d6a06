"""Log-probabilities of tokens and of sequences, with the output head fused in.

No [tokens, vocabulary] array ever exists. B rows, M trained tokens of a row, N = B M, P items of a
row, S sides of an item, D model, V vocabulary; the vocabulary is cut into C chunks, each of which
the mesh splits into X parts of K entries.
"""

from functools import partial

import jax
import jax.numpy as jnp

from alignjax.config import Compute
from alignjax.data.batches import Batch
from alignjax.models.decoder import Decoder, head_weight, hidden_states
from alignjax.models.linear import GRADIENT, gather
from alignjax.sharding import axis_size, spec


def sequence_logps(model: Decoder, batch: Batch, compute: Compute) -> tuple[jax.Array, jax.Array]:
    """Summed log-probs of every packed sequence's trained tokens, and how many those are.

    Both float32 [B, P, S], 0 where a row holds no such sequence. Only hidden states that predict a
    trained token meet the head.
    """
    h_BTD = hidden_states(model, batch.tokens, batch.positions, batch.segments, compute)
    real_BM = batch.targets > 0
    tokens_BM = jnp.take_along_axis(batch.tokens, batch.targets, axis=1)
    segments_BM = jnp.take_along_axis(batch.segments, batch.targets, axis=1)
    before_BM1 = jnp.maximum(batch.targets - 1, 0)[..., None]
    h_BMD = jnp.take_along_axis(h_BTD, before_BM1, axis=1)
    logps_N = token_logps(
        h_BMD.reshape(-1, h_BMD.shape[-1], out_sharding=spec("batch", None)),
        head_weight(model),
        tokens_BM.reshape(-1, out_sharding=spec("batch")),
        model.config.vocab_size,
        compute.vocab_chunk,
        compute.reduce_dtype,
    )
    logps_BM = logps_N.reshape(tokens_BM.shape, out_sharding=spec("batch", None))
    numbers = 1 + jnp.arange(batch.ref.shape[1] * batch.ref.shape[2])
    own_BMQ = real_BM[..., None] & (segments_BM[..., None] == numbers)
    sums_BQ = jnp.where(own_BMQ, logps_BM[..., None], 0).sum(1)
    sharding = spec("batch", None, None)
    shape = batch.ref.shape
    return (
        sums_BQ.reshape(shape, out_sharding=sharding),
        own_BMQ.sum(1, dtype=jnp.float32).reshape(shape, out_sharding=sharding),
    )


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def token_logps(
    h_ND: jax.Array,
    head_VD: jax.Array,
    tokens_N: jax.Array,
    vocab: int,
    chunk: int,
    reduce_dtype: str,
) -> jax.Array:
    """log softmax(h W^T)[token] over the first `vocab` rows of W, float32 [N].

    One pass over chunks of about `chunk` vocabulary entries keeps a running log-sum-exp; the
    backward pass makes each chunk's logits once more, and reduces each chunk of the head's gradient
    over the mesh once, in `reduce_dtype`.
    """
    return _forward(h_ND, head_VD, tokens_N, vocab, chunk, reduce_dtype)[0]


def _chunks(head_VD: jax.Array, chunk: int) -> tuple[jax.Array, jax.Array]:
    """Head cut into [C, X, K, D], and the first vocabulary entry [C, X] of each part."""
    rows_of_all, width = head_VD.shape
    parts = axis_size("vocab")
    local = rows_of_all // parts
    fewest = min(local, max(1, rows_of_all // chunk))
    count = next(n for n in range(fewest, local + 1) if local % n == 0)
    rows, columns = jax.typeof(head_VD).sharding.spec
    cut_XCKD = head_VD.reshape(
        (parts, count, local // count, width), out_sharding=jax.P(rows, None, None, columns)
    )
    start_CX = jnp.arange(count)[:, None] * (local // count) + jnp.arange(parts) * local
    return cut_XCKD.swapaxes(0, 1), jax.reshard(start_CX, spec(None, "vocab"))


def _entries(start_X, part_XKD):
    """Which vocabulary entry each row of a chunk is, [X, K]."""
    return start_X[:, None] + jnp.arange(part_XKD.shape[1])


def _logits(h_ND, part_XKD, entries_XK, vocab: int):
    """Logits of a chunk, [N, X, K]; rows beyond the vocabulary get the lowest number there is."""
    logits_NXK = jnp.einsum(
        "nd,xkd->nxk",
        h_ND,
        part_XKD,
        preferred_element_type=jnp.float32,
        out_sharding=spec("batch", "vocab", None),
    )
    return jnp.where(entries_XK < vocab, logits_NXK, jnp.finfo(jnp.float32).min)


def _forward(h_ND, head_VD, tokens_N, vocab, chunk, reduce_dtype):
    def step(carry, inputs):
        top_N, total_N, own_N = carry
        part_XKD, start_X = inputs
        entries_XK = _entries(start_X, part_XKD)
        logits_NXK = _logits(h_ND, gather(part_XKD, h_ND.dtype), entries_XK, vocab)
        new_N = jnp.maximum(top_N, logits_NXK.max((1, 2)))
        total_N = total_N * jnp.exp(top_N - new_N)
        total_N += jnp.exp(logits_NXK - new_N[:, None, None]).sum((1, 2))
        hits_NXK = tokens_N[:, None, None] == entries_XK
        return (new_N, total_N, own_N + jnp.where(hits_NXK, logits_NXK, 0).sum((1, 2))), None

    zeros_N = jnp.zeros(tokens_N.shape, jnp.float32, out_sharding=spec("batch"))
    start = (zeros_N + jnp.finfo(jnp.float32).min, zeros_N, zeros_N)
    (top_N, total_N, own_N), _ = jax.lax.scan(step, start, _chunks(head_VD, chunk))
    lse_N = top_N + jnp.log(total_N)
    return own_N - lse_N, (h_ND, head_VD, tokens_N, lse_N)


def _backward(vocab, chunk, reduce_dtype, saved, g_N):
    h_ND, head_VD, tokens_N, lse_N = saved

    def step(dh_ND, inputs):
        part_XKD, start_X = inputs
        used_XKD = gather(part_XKD, h_ND.dtype)
        entries_XK = _entries(start_X, part_XKD)
        p_NXK = jnp.exp(_logits(h_ND, used_XKD, entries_XK, vocab) - lse_N[:, None, None])
        hits_NXK = tokens_N[:, None, None] == entries_XK
        dlogits_NXK = ((hits_NXK - p_NXK) * g_N[:, None, None]).astype(h_ND.dtype)
        dh_ND += jnp.einsum(
            "nxk,xkd->nd",
            dlogits_NXK,
            used_XKD,
            preferred_element_type=jnp.float32,
            out_sharding=spec("batch", None),
        )
        with jax.named_scope(GRADIENT):
            dpart_XKD = jnp.einsum(
                "nxk,nd->xkd",
                dlogits_NXK,
                h_ND,
                preferred_element_type=reduce_dtype,
                out_sharding=jax.typeof(part_XKD).sharding.spec,
            )
        return dh_ND, dpart_XKD.astype(head_VD.dtype)

    zeros_ND = jnp.zeros(h_ND.shape, jnp.float32, out_sharding=spec("batch", None))
    dh_ND, dhead_CXKD = jax.lax.scan(step, zeros_ND, _chunks(head_VD, chunk))
    stored = jax.typeof(head_VD).sharding.spec
    dhead_VD = dhead_CXKD.swapaxes(0, 1).reshape(head_VD.shape, out_sharding=stored)
    return dh_ND.astype(h_ND.dtype), dhead_VD, None


token_logps.defvjp(_forward, _backward)
