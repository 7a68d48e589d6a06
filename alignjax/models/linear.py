"""The one place where a weight is cast, gathered and multiplied, and its gradient reduced.

B batch, T position, N = B T, I input, O output features.
"""

from functools import partial

import jax
import jax.numpy as jnp

from alignjax.sharding import gathered

# Names in a compiled program and in profiles.
WEIGHT = "gathered_weight"
GRADIENT = "reduced_gradient"


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def linear(x_BTI: jax.Array, w_OI: jax.Array, reduce_dtype: str) -> jax.Array:
    """x W^T in x's dtype, with W [O, I] in Hugging Face's layout and float32 storage.

    W travels between devices in x's dtype. Its gradient is accumulated and reduced over the mesh in
    `reduce_dtype` and arrives sharded like W.
    """
    return _forward(x_BTI, w_OI, reduce_dtype)[0]


def gather(w: jax.Array, dtype) -> jax.Array:
    """A stored weight as it is used: cast, then whole along the model dimension."""
    with jax.named_scope(WEIGHT):
        return jax.reshard(w.astype(dtype), gathered(jax.typeof(w).sharding.spec))


def _flat(x_BTI: jax.Array) -> jax.Array:
    """[B T, I]: XLA on CPU is a fifth faster with two dimensions than with three."""
    batch, _, features = jax.typeof(x_BTI).sharding.spec
    return x_BTI.reshape(-1, x_BTI.shape[-1], out_sharding=jax.P(batch, features))


def _forward(x_BTI, w_OI, reduce_dtype):
    used_OI = gather(w_OI, x_BTI.dtype)
    batch = jax.typeof(x_BTI).sharding.spec[:2]
    out = jax.P(*batch, jax.typeof(used_OI).sharding.spec[0])
    return jnp.einsum("bti,oi->bto", x_BTI, used_OI, out_sharding=out), (x_BTI, w_OI)


def _backward(reduce_dtype, saved, g_BTO):
    x_BTI, w_OI = saved
    g_NO, x_NI = _flat(g_BTO), _flat(x_BTI)
    dx_NI = jnp.einsum(
        "no,oi->ni",
        g_NO,
        gather(w_OI, g_NO.dtype),
        out_sharding=jax.typeof(x_NI).sharding.spec,
    )
    with jax.named_scope(GRADIENT):
        dw_OI = jnp.einsum(
            "no,ni->oi",
            g_NO,
            x_NI,
            preferred_element_type=reduce_dtype,
            out_sharding=jax.typeof(w_OI).sharding.spec,
        )
    dx_BTI = dx_NI.reshape(x_BTI.shape, out_sharding=jax.typeof(x_BTI).sharding.spec)
    return dx_BTI, dw_OI.astype(w_OI.dtype)


linear.defvjp(_forward, _backward)
