"""Floating-point operations that a model's mathematics needs, counted from its sizes.

A multiplication and an addition are two. Padding, recomputation, norms and activations are never
counted, so that model FLOPs utilisation (arXiv 2204.02311, appendix B) compares implementations.
"""

import numpy as np

from alignjax.models.shapes import DecoderConfig

# Dense bfloat16 operations a second of one device, from its maker's data sheet, by a part of the
# name that JAX and PyTorch give it; the first that is found counts.
PEAKS = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "TPU v6": 918e12,
    "TPU v5p": 459e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v4": 275e12,
}


def peak(device: str) -> float | None:
    """Operations a second that a device can reach in bfloat16, or None where that is not known."""
    return next((rate for name, rate in PEAKS.items() if name.lower() in device.lower()), None)


def forward_flops(c: DecoderConfig, lengths: np.ndarray, scored: np.ndarray) -> float:
    """Of one forward pass over sequences of so many tokens, `scored` of which meet the head.

    A token attends to itself and the tokens before it in its sequence, at most `c.window` of them.
    The head of a reward model has one output.
    """
    lengths = np.asarray(lengths, np.float64)
    q_size, kv_size = c.heads * c.head_dim, c.kv_heads * c.head_dim
    matrices = 2 * c.hidden_size * (q_size + kv_size) + 3 * c.hidden_size * c.mlp_size
    full = lengths if c.window is None else np.minimum(lengths, c.window)
    seen = (full * (full + 1) / 2 + (lengths - full) * full).sum()  # pairs of query and key
    layer = 2 * matrices * lengths.sum() + 4 * q_size * seen
    outputs = 1 if c.scored else c.vocab_size
    return float(c.layers * layer + 2 * outputs * c.hidden_size * np.sum(scored))


def training_flops(c: DecoderConfig, lengths: np.ndarray, scored: np.ndarray) -> float:
    """Of a forward and a backward pass, which takes twice as many."""
    return 3 * forward_flops(c, lengths, scored)
