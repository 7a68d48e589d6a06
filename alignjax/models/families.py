"""Hugging Face's config.json and tensor names <-> ours."""

from alignjax.models.decoder import DecoderConfig

# Our leaf -> Hugging Face's tensor; {} is the layer. Both are [out, in]: no leaf is transposed.
TENSORS = {
    "embed": "model.embed_tokens.weight",
    "blocks.attn_norm": "model.layers.{}.input_layernorm.weight",
    "blocks.q": "model.layers.{}.self_attn.q_proj.weight",
    "blocks.k": "model.layers.{}.self_attn.k_proj.weight",
    "blocks.v": "model.layers.{}.self_attn.v_proj.weight",
    "blocks.o": "model.layers.{}.self_attn.o_proj.weight",
    "blocks.mlp_norm": "model.layers.{}.post_attention_layernorm.weight",
    "blocks.gate": "model.layers.{}.mlp.gate_proj.weight",
    "blocks.up": "model.layers.{}.mlp.up_proj.weight",
    "blocks.down": "model.layers.{}.mlp.down_proj.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
}

# Keys that change the mathematics, and the only values this decoder computes.
_FIXED = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "rope_scaling": (None,),
    "sliding_window": (None,),
}


def tensor_names(leaf: str, layers: int) -> list[str]:
    """Hugging Face's names of the tensors that make up a leaf: one, or one a layer."""
    name = TENSORS[leaf]
    return [name.format(i) for i in range(layers)] if "{}" in name else [name]


def from_hf(hf: dict, where: str) -> DecoderConfig:
    """The decoder that a config.json describes; `where` names the file in errors.

    Raises ValueError for an architecture, or a value, that this decoder does not compute.
    """
    if hf.get("model_type") != "llama":
        raise ValueError(
            f"{where}: model_type {hf.get('model_type')!r} is not supported; supported: 'llama'."
        )
    for key, values in _FIXED.items():
        if hf.get(key, values[0]) not in values:
            known = " or ".join(map(repr, values))
            raise ValueError(f"{where}: {key}={hf[key]!r} is not supported; supported: {known}.")
    rope = hf.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(
            f"{where}: rope_type={rope['rope_type']!r} is not supported; supported: 'default'."
        )
    try:
        heads = hf["num_attention_heads"]
        return DecoderConfig(
            vocab_size=hf["vocab_size"],
            hidden_size=hf["hidden_size"],
            layers=hf["num_hidden_layers"],
            heads=heads,
            kv_heads=hf.get("num_key_value_heads") or heads,
            head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
            mlp_size=hf["intermediate_size"],
            rope_theta=float(rope.get("rope_theta") or hf.get("rope_theta") or 10000.0),
            norm_eps=hf.get("rms_norm_eps", 1e-6),
            tied_head=hf.get("tie_word_embeddings", False),
        )
    except KeyError as error:
        raise ValueError(f"{where}: config.json lacks the key {error}.") from None
