"""Sizes of published models, from the config.json files that they were released with."""

from dataclasses import replace

from alignjax.errors import UserError
from alignjax.models.rope import RopeScaling
from alignjax.models.shapes import DecoderConfig


def _llama(hidden: int, layers: int, heads: int, kv_heads: int, mlp: int, **more) -> DecoderConfig:
    sizes = {
        "vocab_size": 32000,
        "hidden_size": hidden,
        "layers": layers,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": 128,
        "mlp_size": mlp,
        "rope_theta": 10000.0,
        "norm_eps": 1e-5,
        "tied_head": False,
    }
    return DecoderConfig(**(sizes | more))


_LLAMA_3 = {"vocab_size": 128256, "rope_theta": 500000.0}
_LLAMA_31 = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
_LLAMA_32 = {**_LLAMA_3, "tied_head": True, "rope_scaling": _LLAMA_31._replace(factor=32.0)}
_GEMMA = {
    "vocab_size": 256000,
    "head_dim": 256,
    "norm_eps": 1e-6,
    "tied_head": True,
    "activation": "gelu_tanh",
    "unit_offset": True,
    "scaled_embedding": True,
}
_QWEN = {"vocab_size": 151936, "rope_theta": 1e6, "norm_eps": 1e-6, "tied_head": True}
_QWEN_25 = {**_QWEN, "qkv_bias": True}
_QWEN_3 = {**_QWEN, "qk_norm": True}

PRESETS = {
    "llama2_7b": _llama(4096, 32, 32, 32, 11008),
    "llama2_13b": _llama(5120, 40, 40, 40, 13824),
    "llama2_70b": _llama(8192, 80, 64, 8, 28672),
    "llama3_8b": _llama(4096, 32, 32, 8, 14336, **_LLAMA_3),
    "llama3_70b": _llama(8192, 80, 64, 8, 28672, **_LLAMA_3),
    "llama3.1_8b": _llama(4096, 32, 32, 8, 14336, **_LLAMA_3, rope_scaling=_LLAMA_31),
    "llama3.1_70b": _llama(8192, 80, 64, 8, 28672, **_LLAMA_3, rope_scaling=_LLAMA_31),
    "llama3.2_1b": _llama(2048, 16, 32, 8, 8192, head_dim=64, **_LLAMA_32),
    "llama3.2_3b": _llama(3072, 28, 24, 8, 8192, **_LLAMA_32),
    "mistral_7b": _llama(4096, 32, 32, 8, 14336, window=4096),
    "mistral_7b_v0.3": _llama(4096, 32, 32, 8, 14336, vocab_size=32768, rope_theta=1e6),
    "gemma_2b": _llama(2048, 18, 8, 1, 16384, **_GEMMA),
    "gemma_7b": _llama(3072, 28, 16, 16, 24576, **_GEMMA),
    "smollm2_135m": _llama(
        576, 30, 9, 3, 1536, vocab_size=49152, head_dim=64, rope_theta=1e5, tied_head=True
    ),
    "qwen2.5_0.5b": _llama(896, 24, 14, 2, 4864, head_dim=64, **_QWEN_25),
    "qwen2.5_1.5b": _llama(1536, 28, 12, 2, 8960, **_QWEN_25),
    "qwen2.5_3b": _llama(2048, 36, 16, 2, 11008, **_QWEN_25),
    "qwen3_0.6b": _llama(1024, 28, 16, 8, 3072, **_QWEN_3),
    "qwen3_1.7b": _llama(2048, 28, 16, 8, 6144, **_QWEN_3),
    "qwen3_4b": _llama(2560, 36, 32, 8, 9728, **_QWEN_3),
}


def tiny(name: str, **changes) -> DecoderConfig:
    """A preset's family in a size for tests: what differs between families stays as it is."""
    full = PRESETS[name]
    sizes = {
        "vocab_size": 128,
        "hidden_size": 32,
        "layers": 3,
        "heads": 4,
        "kv_heads": 4 if full.heads == full.kv_heads else min(2, full.kv_heads),
        "head_dim": 8,
        "mlp_size": 64,
        "window": full.window and 7,
        "rope_scaling": full.rope_scaling and full.rope_scaling._replace(original_length=16),
    }
    return replace(full, **(sizes | changes))


def preset(name: str) -> DecoderConfig:
    """A preset by name; `tiny_NAME` is its family in a size for tests.

    Raises UserError, naming those that exist, for another name.
    """
    known = name.removeprefix("tiny_")
    if known not in PRESETS:
        raise UserError(f"{name}: there is no such preset; there are {', '.join(PRESETS)}.")
    return PRESETS[name] if name == known else tiny(known)
