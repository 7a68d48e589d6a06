"""Root mean square layer normalization (arXiv 1910.07467), in float32. D the last dimension."""

from functools import partial

import jax
import jax.numpy as jnp


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: jax.Array, w_D: jax.Array, eps: float) -> jax.Array:
    """x [..., D] over the root of its mean square, times w; in x's dtype.

    The gradient is written out with a dot for each row: XLA on CPU does not vectorise a sum of
    products, which autodiff makes of it.
    """
    return _forward(x, w_D, eps)[0]


def _forward(x, w_D, eps):
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * scale * w_D).astype(x.dtype), (x, w_D, scale)


def _backward(eps, saved, g):
    x, w_D, scale = saved
    wide, g = x.astype(jnp.float32), g.astype(jnp.float32)
    normal, dnormal = wide * scale, g * w_D
    mean = row_dot(dnormal, normal)[..., None] / x.shape[-1]
    dx = scale * (dnormal - normal * mean)
    dw_D = (g * normal).sum(tuple(range(x.ndim - 1)))
    return dx.astype(x.dtype), dw_D.astype(w_D.dtype)


rms_norm.defvjp(_forward, _backward)


def row_dot(x: jax.Array, y: jax.Array) -> jax.Array:
    """Sum of x y over the last dimension, float32 [...]."""
    return jnp.vecdot(x.astype(jnp.float32), y.astype(jnp.float32), precision="highest")
