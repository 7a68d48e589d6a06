"""Rotary position embedding (RoFormer, arXiv 2104.09864), with the scalings that models ship with.

B batch, T position, K head size.
"""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class RopeScaling(NamedTuple):
    """How a model that was trained on `original_length` tokens reaches `factor` times as far.

    "linear" slows every rotation (arXiv 2306.15595). "llama3" slows those that turn less than
    `low_frequency` times within the original length, leaves those alone that turn more than
    `high_frequency` times, and goes from one to the other between (Llama 3.1's config.json).
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    original_length: int = 8192


def frequencies(theta: float, head_dim: int, scaling: RopeScaling | None) -> np.ndarray:
    """Radians a position by which each pair of a head turns, float32 [K / 2]."""
    turn_K = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    if scaling is not None and scaling.kind == "linear":
        turn_K = turn_K / scaling.factor
    elif scaling is not None:
        turns_K = scaling.original_length * turn_K / (2 * math.pi)
        span = scaling.high_frequency - scaling.low_frequency
        keep_K = np.clip((turns_K - scaling.low_frequency) / span, 0, 1)
        turn_K = turn_K * (keep_K + (1 - keep_K) / scaling.factor)
    return turn_K.astype(np.float32)


def rotations(frequencies_K: np.ndarray, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine [B, T, K / 2] of each position's rotation."""
    angles = positions_BT[..., None].astype(jnp.float32) * frequencies_K
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, rotations: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the halves of the last dimension of [B, T, ..., K] against each other, in float32."""
    cos, sin = (jnp.expand_dims(part, tuple(range(2, x.ndim - 1))) for part in rotations)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
