"""What a decoder is made of: its sizes and constants, and the shape of each of its leaves.

Work on checkpoints alone needs no more of a model than this, and flax, which takes a quarter of a
second to import, is not imported for it.
"""

from dataclasses import dataclass
from typing import Literal

from alignjax.models.rope import RopeScaling

_PADDED = ("embed", "head")  # leaves with a row for each token, and some more on devices


@dataclass(frozen=True)
class DecoderConfig:
    """The sizes and constants that decide the mathematics of a decoder.

    The first ten describe Llama; the others are where Mistral, Gemma and Qwen differ from it.
    """

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
    rope_scaling: RopeScaling | None = None
    window: int | None = None  # tokens that a token sees, itself among them
    qkv_bias: bool = False
    qk_norm: bool = False  # of each head of q and k, before they are rotated
    activation: Literal["silu", "gelu_tanh"] = "silu"
    unit_offset: bool = False  # norms scale by 1 + w
    scaled_embedding: bool = False  # by sqrt(hidden_size)
    scored: bool = False  # a reward model: it gives a score, and no words
    pad_id: int | None = None  # of a reward model: its score is that of the last other token

    def dimensions(self) -> dict[str, tuple[int, str]]:
        """What the mesh has to divide: name for the user -> (size, logical axis)."""
        return {
            "attention heads": (self.heads, "heads"),
            "key/value heads": (self.kv_heads, "kv_heads"),
            "hidden size": (self.hidden_size, "embed"),
            "MLP size": (self.mlp_size, "mlp"),
        }


def block_shapes(c: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each leaf of one layer, by name."""
    q_size, kv_size = c.heads * c.head_dim, c.kv_heads * c.head_dim
    shapes = {
        "attn_norm": (c.hidden_size,),
        "q": (q_size, c.hidden_size),
        "k": (kv_size, c.hidden_size),
        "v": (kv_size, c.hidden_size),
        "o": (c.hidden_size, q_size),
        "mlp_norm": (c.hidden_size,),
        "gate": (c.mlp_size, c.hidden_size),
        "up": (c.mlp_size, c.hidden_size),
        "down": (c.hidden_size, c.mlp_size),
    }
    if c.qkv_bias:
        shapes |= {"q_bias": (q_size,), "k_bias": (kv_size,), "v_bias": (kv_size,)}
    if c.qk_norm:
        shapes |= {"q_norm": (c.head_dim,), "k_norm": (c.head_dim,)}
    return shapes


def leaf_shapes(c: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each leaf of a model as it is stored, blocks stacked over layers.

    In the order of the model's pytree. On devices the embedding and the head may have more rows, of
    zeros.
    """
    words = (c.vocab_size, c.hidden_size)
    shapes = {f"blocks.{name}": (c.layers, *shape) for name, shape in block_shapes(c).items()}
    shapes |= {"embed": words, "norm": (c.hidden_size,)}
    if c.scored:
        shapes["score"] = (1, c.hidden_size)
    elif not c.tied_head:
        shapes["head"] = words
    return dict(sorted(shapes.items()))


def is_stacked(leaf: str) -> bool:
    """Whether a leaf holds one tensor a layer, stacked."""
    return leaf.startswith("blocks.")


def true_shape(c: DecoderConfig, leaf: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a leaf without the rows that pad the vocabulary."""
    return (c.vocab_size, *shape[1:]) if leaf in _PADDED else shape
