"""Reading GGUF files of llama.cpp: weights, tokenizer and chat template, without torch.

The format's own package, `gguf`, parses the file and dequantizes.
"""

import hashlib
import json
from functools import lru_cache
from pathlib import Path

import numpy as np

from alignjax.files import whole_directory
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
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_CONTROL, _USER_DEFINED = 3, 4  # llama.cpp's types of tokens that the text is split at


def open_gguf(path: Path, cache: Path) -> Source:
    """A GGUF file of a Llama model as a `Source`; its tokenizer is written under `cache`.

    Weights are dequantized to float32, the rows that are asked for; of q and k one whole tensor.
    """
    from gguf.quants import dequantize

    meta, stored = _read(path)
    config = _config(meta, stored, path)
    layers = config["num_hidden_layers"]
    theirs = {
        ours.format(i): name.format(i)
        for name, ours in _NAMES.items()
        for i in range(layers if "{}" in name else 1)
        if name.format(i) in stored
    }
    extra = set(stored) - set(theirs.values())
    if extra:
        raise ValueError(f"{path}: the tensor {min(extra)} is not part of this model.")

    def rows(name: str, part: slice) -> np.ndarray:
        tensor = stored[theirs[name]]
        try:
            return dequantize(tensor.data[part], tensor.tensor_type)
        except NotImplementedError:
            kind = tensor.tensor_type.name
            raise ValueError(f"{path}: {name} is quantized as {kind}, which is not read.") from None

    @lru_cache(maxsize=1)
    def unpermuted(name: str) -> np.ndarray:
        kind = "attention" if name.endswith("q_proj.weight") else "key_value"
        return unpermute(rows(name, slice(None)), config[f"num_{kind}_heads"])

    def read(name: str, index: tuple[slice, ...]) -> np.ndarray:
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            return unpermuted(name)[index]
        return rows(name, index[0])[(slice(None), *index[1:])]

    tensors = {
        ours: Stored(
            tuple(int(n) for n in reversed(stored[name].shape)), np.dtype(np.float32), path
        )
        for ours, name in theirs.items()
    }
    tokenizer_dir = _tokenizer_dir(meta, path, cache)
    return Source(path, config, tensors, read, tokenizer_dir)


def _read(path: Path) -> tuple[dict, dict]:
    """Metadata and tensors of a whole GGUF file of the one architecture that is supported."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        meta = {name: value.contents() for name, value in reader.fields.items()}
    except (ValueError, IndexError, OverflowError) as error:
        raise ValueError(
            f"{path}: this is not a whole GGUF file ({error}); copy or fetch it again."
        ) from None
    arch = meta.get("general.architecture")
    if arch != "llama":
        raise ValueError(f"{path}: architecture {arch!r} is not supported; supported: 'llama'.")
    return meta, {tensor.name: tensor for tensor in reader.tensors}


def _config(meta: dict, stored: dict, path: Path) -> dict:
    """The config.json that a GGUF file's metadata and tensors amount to."""
    if meta.get("llama.rope.scaling.type", "none") != "none" or "rope_freqs.weight" in stored:
        raise ValueError(f"{path}: rope scaling is not supported.")
    try:
        heads = meta["llama.attention.head_count"]
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "float32",
            "vocab_size": len(meta["tokenizer.ggml.tokens"]),
            "hidden_size": meta["llama.embedding_length"],
            "intermediate_size": meta["llama.feed_forward_length"],
            "num_hidden_layers": meta["llama.block_count"],
            "num_attention_heads": heads,
            "num_key_value_heads": meta.get("llama.attention.head_count_kv", heads),
            "head_dim": meta["llama.embedding_length"] // heads,
            "hidden_act": "silu",
            "max_position_embeddings": meta["llama.context_length"],
            "rms_norm_eps": _short(meta["llama.attention.layer_norm_rms_epsilon"]),
            "rope_theta": _short(meta.get("llama.rope.freq_base", 10000.0)),
            "rope_scaling": None,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": "output.weight" not in stored,
            "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": meta.get("tokenizer.ggml.eos_token_id"),
            "pad_token_id": meta.get("tokenizer.ggml.padding_token_id"),
        }
    except KeyError as error:
        raise ValueError(f"{path}: the metadata lacks the key {error}.") from None


def unpermute(array_OI: np.ndarray, heads: int) -> np.ndarray:
    """Undoes llama.cpp's reordering of the rows of q and k.

    llama.cpp rotates neighbouring pairs of a head's rows, Hugging Face the two halves of a head.
    """
    rows, width = array_OI.shape
    return array_OI.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def _short(value: float) -> float:
    """The shortest decimal of a float32: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _tokenizer_dir(meta: dict, path: Path, cache: Path) -> Path:
    """Writes tokenizer files as transformers reads them, once, and names their directory."""
    wanted = {name: value for name, value in meta.items() if name.startswith("tokenizer.")}
    key = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:16]
    target = cache / "tokenizers" / key
    if target.is_dir():
        return target
    from transformers import PreTrainedTokenizerFast

    tokens = meta["tokenizer.ggml.tokens"]
    named = {
        f"{role}_token": tokens[meta[f"tokenizer.ggml.{ours}_token_id"]]
        for role, ours in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if meta.get(f"tokenizer.ggml.{ours}_token_id") is not None
    }
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer(meta, path),
        clean_up_tokenization_spaces=False,
        model_max_length=meta["llama.context_length"],
        **named,
    )
    tokenizer.chat_template = meta.get("tokenizer.chat_template")
    ends = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    generation = {
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": sorted({meta[name] for name in ends if name in meta}),
        "pad_token_id": meta.get("tokenizer.ggml.padding_token_id"),
    }
    with whole_directory(target) as directory:
        tokenizer.save_pretrained(directory)
        (directory / "generation_config.json").write_text(json.dumps(generation, indent=2))
    return target


def build_tokenizer(meta: dict, path: Path):
    """The byte-level BPE tokenizer that a GGUF file's metadata describes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind = (meta["tokenizer.ggml.model"], meta.get("tokenizer.ggml.pre"))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    splits = {
        ("gpt2", "smollm"): [pre_tokenizers.Digits(individual_digits=True), byte_level],
        ("gpt2", "gpt-2"): [byte_level],
    }
    if kind not in splits:
        raise ValueError(
            f"{path}: tokenizer {kind[0]!r} with pre-tokenizer {kind[1]!r} is not supported in a "
            "GGUF file; give the Hugging Face directory of the model as model.path instead."
        )
    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits[kind])
    tokenizer.decoder = decoders.ByteLevel()
    for token, type_ in zip(tokens, meta["tokenizer.ggml.token_type"], strict=True):
        if type_ in (_CONTROL, _USER_DEFINED):
            added = AddedToken(token, special=type_ == _CONTROL, normalized=False)
            tokenizer.add_tokens([added])
    return tokenizer
