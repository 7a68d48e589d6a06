"""theta + alpha (theta - theta_sft) on slices of tensors, in float32 and rounded once.

XLA compiles it to one pass; what is too small for that to pay, NumPy does, to the same bits. On
random bfloat16 pairs 0.0004 % of the elements are not the float64 result rounded once; float64
would have none, and takes the processor 2.3 times as long.
"""

import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from alignjax.weights.source import rows_within
from alignjax.weights.stream import MOST
from alignjax.weights.tensorfile import aligned

PIECE = 1 << 16  # elements: the most of NumPy at a time, to stay in a cache
_BF16 = np.dtype(ml_dtypes.bfloat16)
_TINY = np.float32(2.0**-100)  # of a larger float32, no difference and hardly a product underflows


def extrapolated(
    strong: np.ndarray, weak: np.ndarray, alphas: Sequence[float], kind: np.dtype
) -> list[np.ndarray]:
    """theta + alpha (theta - theta_sft) for each alpha, as arrays of dtype `kind`.

    `strong` and `weak` have one shape and any of the dtypes float32, bfloat16 and float16. Alphas
    of 0 and -1 are no different here; who wants the source's own bytes takes those.
    """
    factors = np.asarray(alphas, np.float32)
    if strong.size <= PIECE:
        return [_uncompiled(strong, weak, factor, kind) for factor in factors]
    row = math.prod(strong.shape[1:])
    length = max(row * rows_within(row * kind.itemsize, MOST), strong.size)
    sides = (_filled_up(strong, length), _filled_up(weak, length))
    tiny, *found = _compiled(*sides, factors, np.uint32(0), kind)
    if tiny:
        return [_uncompiled(strong, weak, factor, kind) for factor in factors]
    return [np.asarray(one)[: strong.size].reshape(strong.shape) for one in found]


def _filled_up(side: np.ndarray, length: int) -> np.ndarray:
    """Flat, with zeros up to a length; most parts have it, and another one takes compiling."""
    flat = side.reshape(-1)
    if len(flat) == length:
        return flat
    room = aligned(length * flat.itemsize)
    room[: flat.nbytes] = flat.view(np.uint8)
    room[flat.nbytes :] = 0
    return room.view(flat.dtype)


@jax.jit(static_argnums=4)
def _compiled(strong, weak, factors, zero, kind) -> list[jax.Array]:
    """Whether XLA, to which a subnormal number is 0, would be wrong; and the results.

    The processor would round product and sum at once; see `rounded`.
    """
    theta, other = strong.astype(jnp.float32), weak.astype(jnp.float32)
    delta = theta - other

    def moved(factor):
        return (theta + rounded(factor * delta, zero)).astype(kind)

    tiny = _is_tiny(theta) | _is_tiny(other)
    return [tiny.any(), *map(moved, factors)]


def rounded(product: jax.Array, zero: jax.Array) -> jax.Array:
    """A product that is rounded to float32 before it is added to something.

    Rounded with the sum, a float32 alpha like 0.3, not quite what was typed, would break ties:
    0.003 % of the elements. `zero`, uint32, which the compiler does not know to be 0, keeps the
    two apart.
    """
    bits = jax.lax.bitcast_convert_type(product, jnp.uint32) ^ zero
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _is_tiny(numbers: jax.Array) -> jax.Array:
    """Which are so small, and not 0: by their bits, as comparing makes a subnormal one 0."""
    bits = jax.lax.bitcast_convert_type(numbers, jnp.uint32) & jnp.uint32(0x7FFFFFFF)
    return bits - 1 < _TINY.view(np.uint32) - 1


def _uncompiled(strong, weak, factor: np.float32, kind: np.dtype) -> np.ndarray:
    """The same by NumPy, which knows subnormal numbers and needs no program."""
    theta = _wide(strong)
    with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinities go where they lead
        return (theta + factor * (theta - _wide(weak))).astype(kind)


def _wide(array: np.ndarray) -> np.ndarray:
    """As float32. ml_dtypes would hold Python's lock, so bfloat16 is moved as bits."""
    if array.dtype != _BF16:
        return array.astype(np.float32, copy=False)
    bits = array.view(np.uint16).astype(np.uint32)
    bits <<= 16
    return bits.view(np.float32)


def pieces(strong: np.ndarray, weak: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """theta and theta - theta_sft of two arrays, flat, in float32, a piece after the other."""
    strong, weak = strong.reshape(-1), weak.reshape(-1)
    for at in range(0, len(strong), PIECE):
        theta = _wide(strong[at : at + PIECE])
        yield theta, theta - _wide(weak[at : at + PIECE])
