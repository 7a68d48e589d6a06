"""A decoder-only transformer as a plain pytree and one pure function over it.

B batch, T position, S cached position, D model, N key/value heads, G query heads each serves, K
head size, V vocabulary, L layers. Weights are float32 masters in Hugging Face's layout [out, in],
so that reading and writing a checkpoint copies bytes; block weights are stacked over layers.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from alignjax.config import Compute
from alignjax.models.attention import attention
from alignjax.models.linear import gather, linear
from alignjax.sharding import spec


@dataclass(frozen=True)
class DecoderConfig:
    """The sizes and constants that decide the mathematics of a decoder."""

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_size: int
    rope_theta: float
    norm_eps: float
    tied_head: bool

    def dimensions(self) -> dict[str, tuple[int, str]]:
        """What the mesh has to divide: name for the user -> (size, logical axis)."""
        return {
            "attention heads": (self.heads, "heads"),
            "key/value heads": (self.kv_heads, "kv_heads"),
            "hidden size": (self.hidden_size, "embed"),
            "MLP size": (self.mlp_size, "mlp"),
            "vocabulary": (self.vocab_size, "vocab"),
        }


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

    def __init__(self, c: DecoderConfig, key: jax.Array):
        q_size, kv_size = c.heads * c.head_dim, c.kv_heads * c.head_dim
        keys = jax.random.split(key, 7)
        self.attn_norm = _ones(c.hidden_size)
        self.q = _normal(keys[0], (q_size, c.hidden_size), "heads", "embed")
        self.k = _normal(keys[1], (kv_size, c.hidden_size), "kv_heads", "embed")
        self.v = _normal(keys[2], (kv_size, c.hidden_size), "kv_heads", "embed")
        self.o = _normal(keys[3], (c.hidden_size, q_size), "embed", "heads")
        self.mlp_norm = _ones(c.hidden_size)
        self.gate = _normal(keys[4], (c.mlp_size, c.hidden_size), "mlp", "embed")
        self.up = _normal(keys[5], (c.mlp_size, c.hidden_size), "mlp", "embed")
        self.down = _normal(keys[6], (c.hidden_size, c.mlp_size), "embed", "mlp")


class Decoder(nnx.Module):
    """Weights of a whole model; `head` is None where the embedding serves as the head."""

    config: DecoderConfig
    embed: jax.Array = nnx.data()
    blocks: Block = nnx.data()
    norm: jax.Array = nnx.data()
    head: jax.Array | None = nnx.data()

    def __init__(self, config: DecoderConfig, key: jax.Array):
        keys = jax.random.split(key, 3)
        shape = (config.vocab_size, config.hidden_size)
        self.config = config
        self.embed = _normal(keys[0], shape, "vocab", "embed")
        self.blocks = jax.vmap(lambda key: Block(config, key))(
            jax.random.split(keys[1], config.layers)
        )
        self.norm = _ones(config.hidden_size)
        self.head = None if config.tied_head else _normal(keys[2], shape, "vocab", "embed")


class Cache(NamedTuple):
    """Keys and values of the tokens seen, [L, B, S, N, K], and their segments [B, S] (0 = none)."""

    k: jax.Array
    v: jax.Array
    segments: jax.Array


def empty_cache(c: DecoderConfig, batch: int, length: int, dtype: str) -> Cache:
    """A cache of `length` free places for each of `batch` rows."""
    shape = (c.layers, batch, length, c.kv_heads, c.head_dim)
    sharding = spec(None, "batch", None, "kv_heads", None)
    return Cache(
        jnp.zeros(shape, dtype, out_sharding=sharding),
        jnp.zeros(shape, dtype, out_sharding=sharding),
        jnp.zeros((batch, length), jnp.int32, out_sharding=spec("batch", None)),
    )


def _ones(size: int) -> jax.Array:
    return jnp.ones(size, jnp.float32, out_sharding=spec(None))


def _normal(key: jax.Array, shape: tuple[int, int], *axes: str) -> jax.Array:
    return 0.02 * jax.random.normal(key, shape, jnp.float32, out_sharding=spec(*axes))


def init(config: DecoderConfig, key: jax.Array) -> Decoder:
    """A model of random weights, normal with standard deviation 0.02, born sharded."""
    return jax.jit(Decoder, static_argnums=0)(config, key)


def abstract(config: DecoderConfig) -> Decoder:
    """Shapes, dtypes and shardings of a model, without its arrays."""
    return jax.eval_shape(lambda: Decoder(config, jax.random.key(0)))


def head_weight(model: Decoder) -> jax.Array:
    """The [V, D] matrix whose rows are scored against the last hidden state."""
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
            return attention(q_BTNGK, k_BTNK, v_BTNK, segments_BT, segments_BT)

        return _block(model.config, block, x_BTD, rope, attend, compute), None

    rope = _rope(model.config, positions_BT)
    x_BTD = _embed(model, tokens_BT, compute)
    x_BTD, _ = jax.lax.scan(_remat(layer, compute.remat), x_BTD, model.blocks)
    return _rms_norm(x_BTD, model.norm, model.config.norm_eps)


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
    rope = _rope(model.config, positions_BT)

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
            return attention(q_BTNGK, k_BSNK, v_BSNK, segments_BT, segments_BS, offset)

        x_BTD = _block(model.config, block, x_BTD, rope, attend, compute)
        return (x_BTD, k_LBSNK, v_LBSNK), None

    start = (_embed(model, tokens_BT, compute), cache.k, cache.v)
    layers = (model.blocks, jnp.arange(model.config.layers))
    (x_BTD, k, v), _ = jax.lax.scan(layer, start, layers)
    return _rms_norm(x_BTD, model.norm, model.config.norm_eps), Cache(k, v, segments_BS)


def _block(c: DecoderConfig, block: Block, x_BTD, rope, attend, compute: Compute):
    batch, length, _ = x_BTD.shape
    groups = c.heads // c.kv_heads
    kv_shape = (batch, length, c.kv_heads, c.head_dim)
    q_shape = (batch, length, c.kv_heads, groups, c.head_dim)
    kv_spec = spec("batch", None, "kv_heads", None)
    q_spec = spec("batch", None, "kv_heads", None, None)

    y_BTD = _rms_norm(x_BTD, block.attn_norm, c.norm_eps)
    q = linear(y_BTD, block.q, compute.reduce_dtype).reshape(q_shape, out_sharding=q_spec)
    k = linear(y_BTD, block.k, compute.reduce_dtype).reshape(kv_shape, out_sharding=kv_spec)
    v = linear(y_BTD, block.v, compute.reduce_dtype).reshape(kv_shape, out_sharding=kv_spec)
    out = attend(_rotate(q, rope), _rotate(k, rope), v)
    out = out.reshape(batch, length, -1, out_sharding=spec("batch", None, "heads"))
    x_BTD = x_BTD + linear(out, block.o, compute.reduce_dtype)

    y_BTD = _rms_norm(x_BTD, block.mlp_norm, c.norm_eps)
    gate_BTF = linear(y_BTD, block.gate, compute.reduce_dtype)
    up_BTF = linear(y_BTD, block.up, compute.reduce_dtype)
    return x_BTD + linear(jax.nn.silu(gate_BTF) * up_BTF, block.down, compute.reduce_dtype)


def _embed(model: Decoder, tokens_BT, compute: Compute):
    table_VD = gather(model.embed, compute.dtype)
    return table_VD.at[tokens_BT].get(out_sharding=spec("batch", None, None))


def _rms_norm(x_BTD, w_D, eps: float):
    x = x_BTD.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return (x * scale * w_D).astype(x_BTD.dtype)


def _rope(c: DecoderConfig, positions_BT):
    """Cosine and sine [B, T, K / 2] of each position's rotation (RoFormer, arXiv 2104.09864)."""
    frequencies = c.rope_theta ** (-jnp.arange(0, c.head_dim, 2, dtype=jnp.float32) / c.head_dim)
    angles = positions_BT[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def _rotate(x, rope):
    """Rotates the halves of the last dimension of [B, T, ..., K] against each other, in float32."""
    cos, sin = (jnp.expand_dims(part, tuple(range(2, x.ndim - 1))) for part in rope)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def _remat(layer, policy: str):
    if policy == "none":
        return layer
    if policy == "dots":
        saved = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        return jax.checkpoint(layer, policy=saved)
    return jax.checkpoint(layer)
