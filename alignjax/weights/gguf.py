"""Reading GGUF files of llama.cpp: weights, tokenizer and chat template, without torch.

The format's own package, `gguf`, parses the file and dequantizes.
"""

from functools import lru_cache
from pathlib import Path
from typing import TypedDict

import numpy as np

from alignjax import validate
from alignjax.errors import UserError
from alignjax.models.families import FAMILIES, Layers, Positive, Size, scaling_to_hf
from alignjax.models.rope import RopeScaling, frequencies
from alignjax.weights.gguf_tokenizer import check_tokenizer, tokenizer_dir
from alignjax.weights.source import Source, Stored

# llama.cpp's tensor -> Hugging Face's; {} is the layer.
_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "blk.{}.attn_norm.weight": "model.layers.{}.input_layernorm.weight",
    "blk.{}.attn_q.weight": "model.layers.{}.self_attn.q_proj.weight",
    "blk.{}.attn_k.weight": "model.layers.{}.self_attn.k_proj.weight",
    "blk.{}.attn_v.weight": "model.layers.{}.self_attn.v_proj.weight",
    "blk.{}.attn_output.weight": "model.layers.{}.self_attn.o_proj.weight",
    "blk.{}.ffn_norm.weight": "model.layers.{}.post_attention_layernorm.weight",
    "blk.{}.ffn_gate.weight": "model.layers.{}.mlp.gate_proj.weight",
    "blk.{}.ffn_up.weight": "model.layers.{}.mlp.up_proj.weight",
    "blk.{}.ffn_down.weight": "model.layers.{}.mlp.down_proj.weight",
    "blk.{}.attn_q.bias": "model.layers.{}.self_attn.q_proj.bias",
    "blk.{}.attn_k.bias": "model.layers.{}.self_attn.k_proj.bias",
    "blk.{}.attn_v.bias": "model.layers.{}.self_attn.v_proj.bias",
    "blk.{}.attn_q_norm.weight": "model.layers.{}.self_attn.q_norm.weight",
    "blk.{}.attn_k_norm.weight": "model.layers.{}.self_attn.k_norm.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma")  # Mistral's files say llama
_ROPE_FACTORS = "rope_freqs.weight"  # by which Llama 3.1 slows the rotation of each pair of a head
_TEXTS, _PARTS = ("general.architecture", "tokenizer.chat_template"), ("split.no", "split.count")
_General = TypedDict("_General", dict.fromkeys(_TEXTS, str) | dict.fromkeys(_PARTS, int))
_COUNTS = ("context_length", "embedding_length", "feed_forward_length", "attention.head_count")
_COUNTS += ("attention.head_count_kv", "attention.key_length", "rope.dimension_count")
_NUMBERS = ("attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.scaling.factor")
_Sizes = TypedDict(
    "_Sizes",
    {"block_count": Layers, "rope.scaling.type": str}
    | dict.fromkeys(_COUNTS, Size)
    | dict.fromkeys(_NUMBERS, Positive),
)
_MOST_READ = 1 << 23  # numbers and texts of a header; the largest vocabularies have a quarter


def open_gguf(path: Path, cache: Path) -> Source:
    """A GGUF file as a `Source`; its tokenizer is written under `cache`.

    Weights are dequantized to float32, the rows that are asked for; of a Llama's q and k, whose
    rows are reordered, one whole tensor.
    """
    from gguf.quants import dequantize

    meta, stored = _read(path)
    arch = meta["general.architecture"]
    config = _config(meta, stored, path)
    stored.pop(_ROPE_FACTORS, None)
    layers = config["num_hidden_layers"]
    theirs = {
        ours.format(i): name.format(i)
        for name, ours in _NAMES.items()
        for i in range(layers if "{}" in name else 1)
        if name.format(i) in stored
    }
    extra = set(stored) - set(theirs.values())
    if extra:
        raise UserError(f"{path}: the tensor {min(extra)} is not part of this model.")

    def rows(name: str, part: slice) -> np.ndarray:
        tensor = stored[theirs[name]]
        try:
            return dequantize(tensor.data[part], tensor.tensor_type)
        except NotImplementedError:
            kind = tensor.tensor_type.name
            raise UserError(f"{path}: {name} is quantized as {kind}, which is not read.") from None

    @lru_cache(maxsize=1)
    def unpermuted(name: str) -> np.ndarray:
        kind = "attention" if name.endswith("q_proj.weight") else "key_value"
        return unpermute(rows(name, slice(None)), config[f"num_{kind}_heads"])

    def read(name: str, index: tuple[slice, ...]) -> np.ndarray:
        if arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            return unpermuted(name)[index]
        array = rows(name, index[0])[(slice(None), *index[1:])]
        # Gemma multiplies by 1 + w, and llama.cpp stores that sum.
        return array - 1 if arch == "gemma" and name.endswith("norm.weight") else array

    tensors = {
        ours: Stored(
            tuple(int(n) for n in reversed(stored[name].shape)), np.dtype(np.float32), path
        )
        for ours, name in theirs.items()
    }
    return Source(path, config, tensors, read, tokenizer_dir(meta, path, cache))


def _read(path: Path) -> tuple[dict, dict]:
    """Metadata and tensors of a whole GGUF file of an architecture that is supported."""
    from gguf import GGUFReader

    class Bounded(GGUFReader):
        """A reader that reads no more than a file holds, whatever its counts say."""

        read = 0

        def _get(self, offset, dtype, count=1, override_order=None):
            found = super()._get(offset, dtype, count, override_order)
            self.read += 1
            if len(found) != count or self.read > _MOST_READ:
                raise ValueError("it ends too early, or its header never does")
            return found

    try:
        reader = Bounded(path)
        meta = {name: value.contents() for name, value in reader.fields.items()}
    except (ValueError, IndexError, OverflowError, KeyError, RecursionError) as error:
        raise UserError(
            f"{path}: this is not a whole GGUF file ({error}); copy or fetch it again."
        ) from None
    validate.check(meta, _General, str(path))
    arch, parts = meta.get("general.architecture"), meta.get("split.count", 1)
    if parts > 1:
        raise UserError(
            f"{path}: this is part {meta.get('split.no', 0) + 1} of {parts} of a model; join them "
            "(llama-gguf-split --merge, of llama.cpp), and name the result."
        )
    if arch not in _ARCHITECTURES:
        known = ", ".join(map(repr, _ARCHITECTURES))
        raise UserError(f"{path}: architecture {arch!r} is not supported; supported: {known}.")
    sizes = {key.removeprefix(f"{arch}."): meta[key] for key in meta if key.startswith(f"{arch}.")}
    for key, value in sizes.items():
        if isinstance(value, list) and len(set(value)) == 1:  # the same in each layer
            meta[f"{arch}.{key}"] = sizes[key] = value[0]
    validate.check(sizes, _Sizes, str(path), arch)
    check_tokenizer(meta, path)
    return meta, {tensor.name: tensor for tensor in reader.tensors}


def _config(meta: dict, stored: dict, path: Path) -> dict:
    """The config.json that a GGUF file's metadata and tensors amount to."""
    arch = meta["general.architecture"]

    def value(name: str, *default):
        key = f"{arch}.{name}"
        return meta.get(key, *default) if default else meta[key]

    try:
        heads, width = value("attention.head_count"), value("embedding_length")
        theta, head_dim = _short(value("rope.freq_base", 10000.0)), width // heads
        head_dim = value("attention.key_length", head_dim)
        turned = value("rope.dimension_count", head_dim)
        if turned != head_dim:
            raise UserError(
                f"{path}: {turned} of {head_dim} dimensions of a head are rotated, which is not "
                "supported; supported: all of them."
            )
        defaults = FAMILIES[arch].defaults
        return {
            "architectures": [FAMILIES[arch].architecture],
            "model_type": arch,
            "dtype": "float32",
            "vocab_size": len(meta["tokenizer.ggml.tokens"]),
            "hidden_size": width,
            "intermediate_size": value("feed_forward_length"),
            "num_hidden_layers": value("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": value("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "hidden_act": defaults["hidden_act"],
            "max_position_embeddings": value("context_length"),
            "rms_norm_eps": _short(value("attention.layer_norm_rms_epsilon")),
            "rope_theta": theta,
            "rope_scaling": scaling_to_hf(_rope_scaling(value, stored, theta, head_dim, path)),
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": "output.weight" not in stored,
            "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": meta.get("tokenizer.ggml.eos_token_id"),
            "pad_token_id": meta.get("tokenizer.ggml.padding_token_id"),
        }
    except KeyError as error:
        raise UserError(f"{path}: the metadata lacks the key {error}.") from None


def _rope_scaling(
    value, stored: dict, theta: float, head_dim: int, path: Path
) -> RopeScaling | None:
    """The scaling; of Llama 3.1's llama.cpp keeps the result, and not the terms."""
    kind = value("rope.scaling.type", "none")
    if kind == "linear":
        return RopeScaling("linear", _short(value("rope.scaling.factor")))
    if kind != "none":
        raise UserError(f"{path}: rope scaling {kind!r} is not supported; supported: 'linear'.")
    if _ROPE_FACTORS not in stored:
        return None
    factors = np.asarray(stored[_ROPE_FACTORS].data, np.float32)
    scaling = RopeScaling("llama3", round(float(factors.max()), 3))
    expected = frequencies(theta, head_dim, None) / frequencies(theta, head_dim, scaling)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        raise UserError(
            f"{path}: {_ROPE_FACTORS} holds other factors than Llama 3.1's rope scaling gives; "
            "give the Hugging Face directory of the model as model.path instead."
        )
    return scaling


def unpermute(array_OI: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's reordering of the rows of q and k.

    llama.cpp rotates neighbouring pairs of a head's rows, Hugging Face the two halves of a head.
    """
    rows, width = array_OI.shape
    return array_OI.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def _short(value: float) -> float:
    """The shortest decimal of a float32: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))
