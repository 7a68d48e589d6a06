"""GGUF files of random tiny models, as llama.cpp's converter writes them."""

from pathlib import Path

import numpy as np
from conftest import write_model
from presets import tiny

from alignjax.models.families import to_hf
from alignjax.models.rope import frequencies
from alignjax.models.shapes import DecoderConfig
from alignjax.weights import gguf


def write_gguf(
    file: Path,
    preset: str = "llama3_8b",
    arch: str = "",
    change: dict | None = None,
    metadata: dict | None = None,
    quantized: str = "F32",
    **sizes,
) -> tuple[DecoderConfig, dict[str, np.ndarray]]:
    """A GGUF file of a tiny model; returns its sizes and Hugging Face's tensors.

    `change` replaces llama.cpp's tensors by name (an array, or bytes and the name of what they
    are), and `metadata` values; None leaves one out. Matrices are stored as `quantized`.
    """
    from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
    from gguf.quants import quantize

    c = tiny(preset, **{"tied_head": True, **sizes})
    arch = arch or {"mistral": "llama"}.get(to_hf(c)["model_type"], to_hf(c)["model_type"])
    tensors = write_model(file.parent / f"of-{file.stem}", c)
    values = {
        f"{arch}.block_count": c.layers,
        f"{arch}.context_length": 512,
        f"{arch}.embedding_length": c.hidden_size,
        f"{arch}.feed_forward_length": c.mlp_size,
        f"{arch}.attention.head_count": c.heads,
        f"{arch}.attention.head_count_kv": c.kv_heads,
        f"{arch}.attention.key_length": c.head_dim,
        f"{arch}.attention.layer_norm_rms_epsilon": c.norm_eps,
        f"{arch}.rope.freq_base": c.rope_theta,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": ["t", "0", "t0", *(f"x{i}" for i in range(3, c.vocab_size))],
        "tokenizer.ggml.token_type": [1] * c.vocab_size,
        "tokenizer.ggml.merges": ["t 0"],
        "tokenizer.ggml.eos_token_id": 2,
    } | (metadata or {})
    kinds = {int: GGUFValueType.UINT32, float: GGUFValueType.FLOAT32, str: GGUFValueType.STRING}
    kinds |= {bool: GGUFValueType.BOOL}
    writer = GGUFWriter(file, arch)
    if "general.architecture" in values:
        del writer.kv_data[0]["general.architecture"]
    for key, value in values.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            writer.add_key_value(key, value, kinds[type(value)])
    stored = {}
    if c.rope_scaling is not None:
        slowed = frequencies(c.rope_theta, c.head_dim, c.rope_scaling)
        factors = frequencies(c.rope_theta, c.head_dim, None) / slowed
        stored["rope_freqs.weight"] = factors.astype(np.float32)
    theirs = {
        ours.format(i): name.format(i)
        for name, ours in gguf._NAMES.items()
        for i in range(c.layers)
    }
    for ours, array in tensors.items():
        for part, heads in (("q_proj", c.heads), ("k_proj", c.kv_heads)):
            if arch == "llama" and part in ours:
                halves = array.reshape(heads, 2, -1, array.shape[1])
                array = halves.swapaxes(1, 2).reshape(array.shape)
        if c.unit_offset and ours.endswith("norm.weight"):
            array = array + 1
        stored[theirs[ours]] = array
    for name, array in (stored | (change or {})).items():
        if isinstance(array, tuple):
            writer.add_tensor(name, array[0], raw_dtype=GGMLQuantizationType[array[1]])
        elif array is not None:
            kind = GGMLQuantizationType[quantized if array.ndim == 2 else "F32"]
            writer.add_tensor(name, quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return c, tensors
