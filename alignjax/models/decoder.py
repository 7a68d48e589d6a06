"""A decoder-only transformer as a plain pytree and one pure function over it.

B batch, T position, S cached position, D model, N key/value heads, G query heads each serves, K
head size, V vocabulary, L layers. Weights are float32 masters in Hugging Face's layout [out, in],
so that reading and writing a checkpoint copies bytes; block weights are stacked over layers.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from alignjax.config import Compute
from alignjax.models.attention import attention
from alignjax.models.linear import linear
from alignjax.models.norm import rms_norm
from alignjax.models.rope import frequencies, rotate, rotations
from alignjax.models.shapes import DecoderConfig, block_shapes
from alignjax.sharding import axis_size, spec

VOCAB_MULTIPLE = 128  # of vocabulary entries that the weights have room for


def padded_vocab(size: int) -> int:
    """Rows of the embedding and the head: the vocabulary, filled up so that the mesh divides it.

    Rows beyond the vocabulary are zeros, which no token looks up and no probability falls on.
    """
    multiple = math.lcm(VOCAB_MULTIPLE, axis_size("vocab"))
    return -(-size // multiple) * multiple


def kv_axis(c: DecoderConfig) -> str | None:
    """Logical axis of key/value heads: None, a copy on each device, where they are too few."""
    return "kv_heads" if c.kv_heads % axis_size("kv_heads") == 0 else None


class Block(nnx.Module):
    """Weights of one layer."""

    attn_norm: jax.Array = nnx.data()
    q: jax.Array = nnx.data()
    k: jax.Array = nnx.data()
    v: jax.Array = nnx.data()
    o: jax.Array = nnx.data()
    mlp_norm: jax.Array = nnx.data()
    gate: jax.Array = nnx.data()
    up: jax.Array = nnx.data()
    down: jax.Array = nnx.data()
    q_bias: jax.Array | None = nnx.data()
    k_bias: jax.Array | None = nnx.data()
    v_bias: jax.Array | None = nnx.data()
    q_norm: jax.Array | None = nnx.data()
    k_norm: jax.Array | None = nnx.data()

    def __init__(self, c: DecoderConfig, key: jax.Array):
        keys, kv, shapes = jax.random.split(key, 7), kv_axis(c), block_shapes(c)
        self.attn_norm = _scale(c, shapes["attn_norm"])
        self.q = _normal(keys[0], shapes["q"], "heads", "embed")
        self.k = _normal(keys[1], shapes["k"], kv, "embed")
        self.v = _normal(keys[2], shapes["v"], kv, "embed")
        self.o = _normal(keys[3], shapes["o"], "embed", "heads")
        self.mlp_norm = _scale(c, shapes["mlp_norm"])
        self.gate = _normal(keys[4], shapes["gate"], "mlp", "embed")
        self.up = _normal(keys[5], shapes["up"], "mlp", "embed")
        self.down = _normal(keys[6], shapes["down"], "embed", "mlp")
        self.q_bias = _zeros(shapes["q_bias"], "heads") if c.qkv_bias else None
        self.k_bias = _zeros(shapes["k_bias"], kv) if c.qkv_bias else None
        self.v_bias = _zeros(shapes["v_bias"], kv) if c.qkv_bias else None
        self.q_norm = _scale(c, shapes["q_norm"]) if c.qk_norm else None
        self.k_norm = _scale(c, shapes["k_norm"]) if c.qk_norm else None


class Decoder(nnx.Module):
    """Weights of a whole model.

    `head` is None where the embedding serves as the head. A reward model has `score` [1, D] in its
    place, which is zero in a new one.
    """

    config: DecoderConfig
    embed: jax.Array = nnx.data()
    blocks: Block = nnx.data()
    norm: jax.Array = nnx.data()
    head: jax.Array | None = nnx.data()
    score: jax.Array | None = nnx.data()

    def __init__(self, config: DecoderConfig, key: jax.Array):
        keys = jax.random.split(key, 3)
        shape = (padded_vocab(config.vocab_size), config.hidden_size)
        self.config = config
        self.embed = _words(config, _normal(keys[0], shape, "vocab", "embed"))
        self.blocks = jax.vmap(lambda key: Block(config, key))(
            jax.random.split(keys[1], config.layers)
        )
        self.norm = _scale(config, (config.hidden_size,))
        self.head = self.score = None
        if config.scored:
            one = (1, config.hidden_size)
            self.score = jnp.zeros(one, jnp.float32, out_sharding=spec(None, None))
        elif not config.tied_head:
            self.head = _words(config, _normal(keys[2], shape, "vocab", "embed"))


class Cache(NamedTuple):
    """Keys and values of the tokens seen, [L, B, S, N, K], and their segments [B, S] (0 = none)."""

    k: jax.Array
    v: jax.Array
    segments: jax.Array


def empty_cache(c: DecoderConfig, batch: int, length: int, dtype: str) -> Cache:
    """A cache of `length` free places for each of `batch` rows."""
    shape = (c.layers, batch, length, _kv_parts(c), c.head_dim)
    sharding = spec(None, "batch", None, "kv_heads", None)
    return Cache(
        jnp.zeros(shape, dtype, out_sharding=sharding),
        jnp.zeros(shape, dtype, out_sharding=sharding),
        jnp.zeros((batch, length), jnp.int32, out_sharding=spec("batch", None)),
    )


def _scale(c: DecoderConfig, shape: tuple[int, ...]) -> jax.Array:
    """Weights of a norm that changes no scale yet."""
    return jnp.full(shape, 0 if c.unit_offset else 1, jnp.float32, out_sharding=spec(None))


def _zeros(shape: tuple[int, ...], axis: str | None) -> jax.Array:
    return jnp.zeros(shape, jnp.float32, out_sharding=spec(axis))


def _words(c: DecoderConfig, table_VD: jax.Array) -> jax.Array:
    """A table whose rows beyond the vocabulary are zeros."""
    real_V = jnp.arange(table_VD.shape[0]) < c.vocab_size
    return jnp.where(jax.reshard(real_V, spec("vocab"))[:, None], table_VD, 0)


def _normal(key: jax.Array, shape: tuple[int, ...], *axes: str | None) -> jax.Array:
    return 0.02 * jax.random.normal(key, shape, jnp.float32, out_sharding=spec(*axes))


def init(config: DecoderConfig, key: jax.Array) -> Decoder:
    """A model of random weights, normal with standard deviation 0.02, born sharded."""
    return jax.jit(Decoder, static_argnums=0)(config, key)


def abstract(config: DecoderConfig) -> Decoder:
    """Shapes, dtypes and shardings of a model, without its arrays."""
    return jax.eval_shape(lambda: Decoder(config, jax.random.key(0)))


def head_weight(model: Decoder) -> jax.Array:
    """What the last hidden state meets: [padded vocabulary, D], or [1, D] of a reward model."""
    if model.score is not None:
        return model.score
    return model.embed if model.head is None else model.head


def hidden_states(
    model: Decoder,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array,
    compute: Compute,
) -> jax.Array:
    """Final normalised hidden states [B, T, D] of packed rows.

    A token sees the tokens at or before it in its own segment (an id per sequence, 0 for padding);
    positions restart with each sequence.
    """

    def layer(x_BTD, block):
        def attend(q_BTNGK, k_BTNK, v_BTNK):
            rows = (q_BTNGK, k_BTNK, v_BTNK, segments_BT, segments_BT)
            return attention(*rows, window=c.window, kernel=compute.attention)

        return _block(c, block, x_BTD, turns, attend, compute), None

    c, turns = model.config, _turns(model.config, positions_BT)
    x_BTD = _embed(model, tokens_BT, compute)
    x_BTD, _ = jax.lax.scan(_remat(layer, compute.remat), x_BTD, model.blocks)
    return _rms_norm(c, x_BTD, model.norm)


def extend(
    model: Decoder,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array,
    cache: Cache,
    offset: jax.Array | int,
    compute: Compute,
) -> tuple[jax.Array, Cache]:
    """Hidden states [B, T, D] of tokens that follow a cache, and the cache with them written in.

    The tokens take places `offset` ... `offset + T - 1` of the cache, the same in every row.
    """
    segments_BS = jax.lax.dynamic_update_slice(cache.segments, segments_BT, (0, offset))
    c, turns = model.config, _turns(model.config, positions_BT)

    def layer(carry, inputs):
        x_BTD, k_LBSNK, v_LBSNK = carry
        block, i = inputs

        def attend(q_BTNGK, k_BTNK, v_BTNK):
            nonlocal k_LBSNK, v_LBSNK
            start = (i, 0, offset, 0, 0)
            k_LBSNK = jax.lax.dynamic_update_slice(k_LBSNK, k_BTNK[None], start)
            v_LBSNK = jax.lax.dynamic_update_slice(v_LBSNK, v_BTNK[None], start)
            k_BSNK = jax.lax.dynamic_index_in_dim(k_LBSNK, i, keepdims=False)
            v_BSNK = jax.lax.dynamic_index_in_dim(v_LBSNK, i, keepdims=False)
            segments = (segments_BT, segments_BS)
            return attention(q_BTNGK, k_BSNK, v_BSNK, *segments, offset, window=c.window)

        x_BTD = _block(c, block, x_BTD, turns, attend, compute)
        return (x_BTD, k_LBSNK, v_LBSNK), None

    start = (_embed(model, tokens_BT, compute), cache.k, cache.v)
    layers = (model.blocks, jnp.arange(c.layers))
    (x_BTD, k, v), _ = jax.lax.scan(layer, start, layers)
    return _rms_norm(c, x_BTD, model.norm), Cache(k, v, segments_BS)


def _turns(c: DecoderConfig, positions_BT: jax.Array):
    return rotations(frequencies(c.rope_theta, c.head_dim, c.rope_scaling), positions_BT)


def _kv_parts(c: DecoderConfig) -> int:
    """Key/value heads as attention sees them: repeated where there is not one for each device."""
    return c.kv_heads if kv_axis(c) else axis_size("kv_heads")


def _block(c: DecoderConfig, block: Block, x_BTD, turns, attend, compute: Compute):
    reduce_dtype = compute.reduce_dtype
    y_BTD = _rms_norm(c, x_BTD, block.attn_norm)
    q = _heads(c, linear(y_BTD, block.q, reduce_dtype), block.q_bias, block.q_norm, "heads")
    k = _heads(c, linear(y_BTD, block.k, reduce_dtype), block.k_bias, block.k_norm, kv_axis(c))
    v = _heads(c, linear(y_BTD, block.v, reduce_dtype), block.v_bias, None, kv_axis(c))
    out = attend(_grouped(c, rotate(q, turns)), _repeated(c, rotate(k, turns)), _repeated(c, v))
    out = out.reshape(*x_BTD.shape[:2], -1, out_sharding=spec("batch", None, "heads"))
    x_BTD = x_BTD + linear(out, block.o, reduce_dtype)

    y_BTD = _rms_norm(c, x_BTD, block.mlp_norm)
    gate_BTF = linear(y_BTD, block.gate, reduce_dtype)
    up_BTF = linear(y_BTD, block.up, reduce_dtype)
    gated_BTF = _gated(_ACTIVATIONS[c.activation], gate_BTF, up_BTF)
    return x_BTD + linear(gated_BTF, block.down, reduce_dtype)


@partial(jax.checkpoint, static_argnums=0)
def _gated(activation, gate_BTF, up_BTF):
    """Only the two factors are kept for the backward pass, and not what lies between."""
    return activation(gate_BTF) * up_BTF


_ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": partial(jax.nn.gelu, approximate=True)}


def _heads(c: DecoderConfig, x_BTI, bias_I, norm_K, axis: str | None):
    """A projection cut into heads [B, T, H, K], its bias added and each head normalised."""
    if bias_I is not None:
        x_BTI = x_BTI + bias_I.astype(x_BTI.dtype)
    shape = (*x_BTI.shape[:2], -1, c.head_dim)
    x_BTHK = x_BTI.reshape(shape, out_sharding=spec("batch", None, axis, None))
    return x_BTHK if norm_K is None else _rms_norm(c, x_BTHK, norm_K)


def _grouped(c: DecoderConfig, q_BTHK):
    """Query heads by the key/value head that they use, [B, T, N, G, K]."""
    shape = (*q_BTHK.shape[:2], _kv_parts(c), -1, c.head_dim)
    return q_BTHK.reshape(shape, out_sharding=spec("batch", None, "kv_heads", None, None))


def _repeated(c: DecoderConfig, k_BTHK):
    """Key or value heads [B, T, N, K], each as often as devices share it."""
    if kv_axis(c):
        return k_BTHK
    k_BTNK = jnp.repeat(k_BTHK, _kv_parts(c) // c.kv_heads, axis=2)
    return jax.reshard(k_BTNK, spec("batch", None, "kv_heads", None))


def _embed(model: Decoder, tokens_BT, compute: Compute):
    """Rows of the table; each device looks its own columns up for all, and sends what it finds.

    So neither the table nor its gradient, summed in float32, travels whole.
    """
    tokens_BT = jax.reshard(tokens_BT, spec("replicas", None))
    x_BTD = model.embed.at[tokens_BT].get(out_sharding=spec("replicas", None, "embed"))
    x_BTD = jax.reshard(x_BTD.astype(compute.dtype), spec("batch", None, None))
    if model.config.scaled_embedding:
        x_BTD = x_BTD * jnp.asarray(math.sqrt(model.config.hidden_size), x_BTD.dtype)
    return x_BTD


def _rms_norm(c: DecoderConfig, x, w):
    return rms_norm(x, 1 + w if c.unit_offset else w, c.norm_eps)


def _remat(layer, policy: str):
    if policy == "none":
        return layer
    if policy == "offload":
        kept = jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host")
        return jax.checkpoint(layer, policy=kept)
    if policy == "dots":
        saved = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        return jax.checkpoint(layer, policy=saved)
    assert policy == "full"
    return jax.checkpoint(layer)
