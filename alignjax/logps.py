"""Log-probabilities of tokens and of sequences, with the output head fused in.

No [tokens, vocabulary] array ever exists. B rows, M trained tokens of a row, N = B M, P items of a
row, S sides of an item, D model, V vocabulary; the vocabulary is cut into C chunks of W entries.
"""

from functools import partial

import jax
import jax.numpy as jnp

from alignjax.config import Compute
from alignjax.data.batches import PackedBatch
from alignjax.errors import UserError
from alignjax.models.decoder import Decoder, head_weight, hidden_states
from alignjax.models.linear import GRADIENT, gather
from alignjax.sharding import axis_size, spec


def sequence_logps(
    model: Decoder, batch: PackedBatch, compute: Compute
) -> tuple[jax.Array, jax.Array]:
    """Summed log-probs of every packed sequence's trained tokens, and how many those are.

    Both float32 [B, P, S], 0 where a row holds no such sequence. Only hidden states that predict a
    trained token meet the head.
    """
    if model.config.scored:
        raise UserError("a reward model gives no log-probs: use rewards.sequence_rewards.")
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
    """Head in chunks [C, W, D], part of each on every device, and their entries [C, W]."""
    rows, width = head_VD.shape
    parts = axis_size("vocab")
    local = rows // parts
    fewest = min(local, max(1, rows // chunk))
    count = next(n for n in range(fewest, local + 1) if local % n == 0)
    cut, whole = (parts, count, local // count), (count, rows // count)
    vocab, model = jax.typeof(head_VD).sharding.spec
    cut_XCKD = head_VD.reshape((*cut, width), out_sharding=jax.P(vocab, None, None, model))
    out = jax.P(None, vocab, model)
    chunks_CWD = cut_XCKD.swapaxes(0, 1).reshape((*whole, width), out_sharding=out)
    entries_CW = jnp.arange(rows).reshape(cut).swapaxes(0, 1).reshape(whole)
    return chunks_CWD, jax.reshard(entries_CW, spec(None, "vocab"))


def _joined(chunks_CWD: jax.Array, like_VD: jax.Array) -> jax.Array:
    """What `_chunks` cut, as one array again."""
    count, width = chunks_CWD.shape[0], chunks_CWD.shape[2]
    stored = jax.typeof(like_VD).sharding.spec
    vocab, model = stored
    cut = (count, axis_size("vocab"), -1, width)
    cut_CXKD = chunks_CWD.reshape(cut, out_sharding=jax.P(None, vocab, None, model))
    return cut_CXKD.swapaxes(0, 1).reshape(like_VD.shape, out_sharding=stored)


def _logits(h_ND, part_WD, entries_W, vocab: int, rows: int):
    """Logits of a chunk, [N, W]; of all rows those beyond the vocabulary get the lowest number."""
    logits_NW = jnp.einsum(
        "nd,wd->nw",
        h_ND,
        part_WD,
        preferred_element_type=jnp.float32,
        out_sharding=spec("batch", "vocab"),
    )
    if rows == vocab:
        return logits_NW
    return jnp.where(entries_W < vocab, logits_NW, jnp.finfo(jnp.float32).min)


def _forward(h_ND, head_VD, tokens_N, vocab, chunk, reduce_dtype):
    def step(carry, inputs):
        top_N, total_N, own_N = carry
        part_WD, entries_W = inputs
        used_WD = gather(part_WD, h_ND.dtype)
        logits_NW = _logits(h_ND, used_WD, entries_W, vocab, len(head_VD))
        new_N = jnp.maximum(top_N, logits_NW.max(1))
        total_N = total_N * jnp.exp(top_N - new_N)
        total_N += jnp.exp(logits_NW - new_N[:, None]).sum(1)
        hits_NW = tokens_N[:, None] == entries_W
        return (new_N, total_N, own_N + jnp.where(hits_NW, logits_NW, 0).sum(1)), None

    zeros_N = jnp.zeros(tokens_N.shape, jnp.float32, out_sharding=spec("batch"))
    start = (zeros_N + jnp.finfo(jnp.float32).min, zeros_N, zeros_N)
    (top_N, total_N, own_N), _ = jax.lax.scan(step, start, _chunks(head_VD, chunk))
    lse_N = top_N + jnp.log(total_N)
    return own_N - lse_N, (h_ND, head_VD, tokens_N, lse_N)


def _backward(vocab, chunk, reduce_dtype, saved, g_N):
    h_ND, head_VD, tokens_N, lse_N = saved

    def step(dh_ND, inputs):
        part_WD, entries_W = inputs
        used_WD = gather(part_WD, h_ND.dtype)
        logits_NW = _logits(h_ND, used_WD, entries_W, vocab, len(head_VD))
        p_NW = jnp.exp(logits_NW - lse_N[:, None])
        hits_NW = tokens_N[:, None] == entries_W
        dlogits_NW = ((hits_NW - p_NW) * g_N[:, None]).astype(h_ND.dtype)
        dh_ND += jnp.einsum(
            "nw,wd->nd",
            dlogits_NW,
            used_WD,
            preferred_element_type=jnp.float32,
            out_sharding=spec("batch", None),
        )
        with jax.named_scope(GRADIENT):
            dpart_WD = jnp.einsum(
                "nw,nd->wd",
                dlogits_NW,
                h_ND,
                preferred_element_type=reduce_dtype,
                out_sharding=jax.typeof(part_WD).sharding.spec,
            )
        return dh_ND, dpart_WD.astype(head_VD.dtype)

    zeros_ND = jnp.zeros(h_ND.shape, jnp.float32, out_sharding=spec("batch", None))
    dh_ND, dhead_CWD = jax.lax.scan(step, zeros_ND, _chunks(head_VD, chunk))
    return dh_ND.astype(h_ND.dtype), _joined(dhead_CWD, head_VD), None


token_logps.defvjp(_forward, _backward)
