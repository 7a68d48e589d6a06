"""Hugging Face's config.json and tensor names <-> ours: what makes a family of models its own."""

from dataclasses import dataclass
from typing import Annotated, Any, TypedDict

from alignjax import validate
from alignjax.errors import UserError
from alignjax.models.rope import RopeScaling
from alignjax.models.shapes import DecoderConfig
from alignjax.validate import Bound

Size = Annotated[int, Bound(1, 1 << 24)]
Layers = Annotated[int, Bound(1, 4096)]
Positive = Annotated[float, Bound(above=0)]
_FACTORS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_Rope = TypedDict(
    "_Rope",
    {"type": str, "rope_type": str, "rope_theta": Positive | None}
    | dict.fromkeys(_FACTORS, Positive),
)
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
_SIZES_OR_NULL = ("num_key_value_heads", "head_dim", "sliding_window", "num_labels")
_NAMES = ("architectures", "layer_types")


TokenId = Annotated[int, Bound(0, 2**31 - 1)]


class Generation(TypedDict):
    """What is read of generation_config.json."""

    eos_token_id: TokenId | list[TokenId] | None


# What is read of config.json.
Config = TypedDict(
    "Config",
    dict.fromkeys(_SIZES, Size)
    | dict.fromkeys(_SIZES_OR_NULL, Size | None)
    | dict.fromkeys(_NAMES, list[str] | None)
    | dict.fromkeys(("rope_scaling", "rope_parameters"), _Rope | None)
    | {"num_hidden_layers": Layers, "rms_norm_eps": Positive, "rope_theta": Positive | None}
    | {"model_type": str, "hidden_act": str, "hidden_activation": str | None}
    | {"tie_word_embeddings": bool, "id2label": dict | None, "pad_token_id": int | None}
    | Generation.__annotations__,
)

# Our leaf -> Hugging Face's tensor; {} is the layer. Both are [out, in]: no leaf is transposed.
TENSORS = {
    "embed": "model.embed_tokens.weight",
    "blocks.attn_norm": "model.layers.{}.input_layernorm.weight",
    "blocks.q": "model.layers.{}.self_attn.q_proj.weight",
    "blocks.k": "model.layers.{}.self_attn.k_proj.weight",
    "blocks.v": "model.layers.{}.self_attn.v_proj.weight",
    "blocks.q_bias": "model.layers.{}.self_attn.q_proj.bias",
    "blocks.k_bias": "model.layers.{}.self_attn.k_proj.bias",
    "blocks.v_bias": "model.layers.{}.self_attn.v_proj.bias",
    "blocks.q_norm": "model.layers.{}.self_attn.q_norm.weight",
    "blocks.k_norm": "model.layers.{}.self_attn.k_norm.weight",
    "blocks.o": "model.layers.{}.self_attn.o_proj.weight",
    "blocks.mlp_norm": "model.layers.{}.post_attention_layernorm.weight",
    "blocks.gate": "model.layers.{}.mlp.gate_proj.weight",
    "blocks.up": "model.layers.{}.mlp.up_proj.weight",
    "blocks.down": "model.layers.{}.mlp.down_proj.weight",
    "norm": "model.norm.weight",
    "head": "lm_head.weight",
    "score": "score.weight",
}
_WORDS, _SCORES = "ForCausalLM", "ForSequenceClassification"  # how architectures end
_ONE_LABEL = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}


@dataclass(frozen=True)
class Family:
    """What a model_type means, and what its config.json may leave out (transformers' defaults)."""

    architecture: str
    own: dict[str, Any]  # fields of DecoderConfig
    defaults: dict[str, Any]  # keys of config.json


_LLAMA = {"hidden_act": "silu", "tie_word_embeddings": False}
_GELU = "gelu_pytorch_tanh"
FAMILIES = {
    "llama": Family("LlamaForCausalLM", {}, _LLAMA),
    "mistral": Family(
        "MistralForCausalLM", {}, _LLAMA | {"num_key_value_heads": 8, "sliding_window": 4096}
    ),
    "gemma": Family(
        "GemmaForCausalLM",
        {"activation": "gelu_tanh", "unit_offset": True, "scaled_embedding": True},
        {
            "hidden_act": _GELU,
            "tie_word_embeddings": True,
            "num_key_value_heads": 16,
            "head_dim": 256,
            "pad_token_id": 0,
        },
    ),
    "qwen2": Family("Qwen2ForCausalLM", {"qkv_bias": True}, _LLAMA | {"num_key_value_heads": 32}),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {"qk_norm": True},
        _LLAMA | {"num_key_value_heads": 32, "head_dim": 128},
    ),
}

# Keys that change the mathematics in some decoder or other, and the values that leave it as it is.
_OFF = ("attention_bias", "attention_out_bias", "mlp_bias", "rope_interleaved")
_OFF += ("use_bidirectional_attention", "use_qk_norm", "use_sliding_window")
_ONE = ("embedding_multiplier", "logit_scale", "logits_scaling", "partial_rotary_factor")
_ONE += ("residual_multiplier", "scale_depth", "scale_emb")
_ABSENT = ("attention_multiplier", "attn_logit_softcapping", "auto_map", "clip_qkv")
_ABSENT += ("final_logit_softcapping", "quantization_config", "query_pre_attn_scalar")
_ABSENT += ("rope_local_base_freq", "sliding_window_pattern")
_NEUTRAL: dict[str, tuple] = (
    dict.fromkeys(_OFF, (False, None))
    | dict.fromkeys(_ONE, (None, 1))
    | dict.fromkeys(_ABSENT, (None,))
    | dict.fromkeys(("mlp_only_layers", "no_rope_layers"), (None, []))
    | dict.fromkeys(("num_experts", "num_local_experts"), (None, 0))
)


def tensor_names(leaf: str, layers: int) -> list[str]:
    """Hugging Face's names of the tensors that make up a leaf: one, or one a layer."""
    name = TENSORS[leaf]
    return [name.format(i) for i in range(layers)] if "{}" in name else [name]


def from_hf(hf: dict, where: str) -> DecoderConfig:
    """The decoder that a config.json describes; `where` names the file in errors.

    Keys that change nothing are passed over. Raises UserError for an architecture, or a value,
    that this decoder does not compute.
    """
    validate.check(hf, Config, where)
    family = FAMILIES.get(hf.get("model_type"))
    if family is None:
        known = ", ".join(map(repr, FAMILIES))
        raise UserError(
            f"{where}: model_type {hf.get('model_type')!r} is not supported; supported: {known}."
        )
    for key, values in _NEUTRAL.items():
        if hf.get(key) not in (*values, None):
            raise _refusal(where, key, hf[key], " or ".join(map(repr, values)))
    hf = family.defaults | hf
    activation = hf["hidden_act"]
    if hf["model_type"] == "gemma":  # its first config.json files name one that nothing ever used
        activation = hf.get("hidden_activation") or (_GELU if activation == "gelu" else activation)
    if activation != family.defaults["hidden_act"]:
        raise _refusal(where, "hidden_act", activation, repr(family.defaults["hidden_act"]))
    theta, scaling = _rope(hf, where)
    scored = _scored(hf, where)
    try:
        return DecoderConfig(
            vocab_size=hf["vocab_size"],
            hidden_size=hf["hidden_size"],
            layers=hf["num_hidden_layers"],
            **_heads(hf, where),
            mlp_size=hf["intermediate_size"],
            rope_theta=theta,
            norm_eps=hf.get("rms_norm_eps", 1e-6),
            tied_head=hf["tie_word_embeddings"],
            rope_scaling=scaling,
            window=_window(hf, where),
            scored=scored,
            pad_id=hf.get("pad_token_id") if scored else None,
            **family.own,
        )
    except KeyError as error:
        raise UserError(f"{where}: config.json lacks the key {error}.") from None


def with_score(hf: dict) -> dict:
    """A language model's config.json as that of a reward model on the same decoder."""
    architecture = FAMILIES[hf["model_type"]].architecture.replace(_WORDS, _SCORES)
    kept = {key: hf[key] for key in hf if key not in ("num_labels", "problem_type")}
    return kept | {"architectures": [architecture], **_ONE_LABEL}


def _heads(hf: dict, where: str) -> dict[str, int]:
    width, heads = hf["hidden_size"], hf["num_attention_heads"]
    kv_heads, head_dim = hf.get("num_key_value_heads") or heads, hf.get("head_dim")
    if heads % kv_heads:
        raise _refusal(where, "num_key_value_heads", kv_heads, f"what divides {heads} heads")
    if not head_dim and width % heads:
        raise _refusal(where, "num_attention_heads", heads, f"what divides hidden_size={width}")
    head_dim = head_dim or width // heads
    if head_dim % 2:
        raise _refusal(where, "head_dim", head_dim, "even numbers")
    return {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}


def _scored(hf: dict, where: str) -> bool:
    """Whether it is a reward model: a classifier of one label."""
    scored = any(name.endswith(_SCORES) for name in hf.get("architectures") or [])
    names = hf.get("id2label")
    labels = hf.get("num_labels") or (2 if names is None else len(names))  # as transformers does
    if scored and labels != 1:
        raise UserError(
            f"{where}: it classifies into {labels} labels, which is not supported; supported: 1, "
            "the score of a reward model (one without id2label needs num_labels: 1 in config.json)."
        )
    return scored


def _refusal(where: str, key: str, value, known: str) -> UserError:
    return UserError(f"{where}: {key}={value!r} is not supported; supported: {known}.")


def _rope(hf: dict, where: str) -> tuple[float, RopeScaling | None]:
    """Theta and scaling, from transformers 5's `rope_parameters` or the older two keys."""
    new, old = (_rope_keys(hf, key, where) for key in ("rope_parameters", "rope_scaling"))
    if hf.get("rope_theta"):
        old["rope_theta"] = hf["rope_theta"]
    for key in new.keys() & old.keys():
        if new[key] != old[key]:
            raise UserError(
                f"{where}: rope_parameters says {key}={new[key]!r}, but the older keys say "
                f"{old[key]!r}; delete the wrong one."
            )
    rope = {"rope_type": "default", "rope_theta": 10000.0} | old | new
    theta, kind = float(rope["rope_theta"]), rope["rope_type"]
    if rope.get("partial_rotary_factor", 1) != 1:
        raise _refusal(where, "partial_rotary_factor", rope["partial_rotary_factor"], "1")
    try:
        match kind:
            case "default":
                return theta, None
            case "linear":
                return theta, RopeScaling("linear", float(rope["factor"]))
            case "llama3":
                low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
                if high <= low:
                    raise _refusal(where, "high_freq_factor", high, f"more than {low}")
                length = rope["original_max_position_embeddings"]
                return theta, RopeScaling("llama3", float(rope["factor"]), low, high, length)
    except KeyError as error:
        raise UserError(f"{where}: its rope scaling {kind!r} lacks the key {error}.") from None
    raise _refusal(where, "rope_type", kind, "'default' or 'linear' or 'llama3'")


def _rope_keys(hf: dict, key: str, where: str) -> dict:
    """One of the two dicts with its kind under `rope_type`, which older files call `type`."""
    given = dict(hf.get(key) or {})
    if not given:
        return {}
    if any(isinstance(value, dict) for value in given.values()):
        raise _refusal(where, key, given, "one for layers of all kinds")
    return {"rope_type": given.pop("type", "default")} | given


def _window(hf: dict, where: str) -> int | None:
    """The sliding window of all layers; Mistral alone has one."""
    window = hf.get("sliding_window") if hf["model_type"] == "mistral" else None
    wanted = "full_attention" if window is None else "sliding_attention"
    for kind in hf.get("layer_types") or []:
        if kind != wanted:
            raise _refusal(where, "layer_types", kind, repr(wanted))
    return window


def to_hf(c: DecoderConfig) -> dict:
    """A config.json that transformers reads as this decoder."""
    name = _family_of(c)
    family = FAMILIES[name]
    scaling = scaling_to_hf(c.rope_scaling)
    rope = {"rope_type": "default", "rope_theta": c.rope_theta} | (scaling or {})
    architecture = family.architecture
    found = {
        "architectures": [architecture.replace(_WORDS, _SCORES) if c.scored else architecture],
        "model_type": name,
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.mlp_size,
        "hidden_act": family.defaults["hidden_act"],
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tied_head,
        "rope_parameters": rope,
        "rope_theta": c.rope_theta,  # what transformers 4 reads
    }
    if c.scored:
        found |= {**_ONE_LABEL, "pad_token_id": c.pad_id}
    if scaling:
        found["rope_scaling"] = scaling
    return found | ({"sliding_window": c.window} if name == "mistral" else {})


def scaling_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """`rope_scaling` of config.json."""
    if scaling is None:
        return None
    found = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "linear":
        return found
    return found | {
        "low_freq_factor": scaling.low_frequency,
        "high_freq_factor": scaling.high_frequency,
        "original_max_position_embeddings": scaling.original_length,
    }


def _family_of(c: DecoderConfig) -> str:
    if c.window is not None:
        return "mistral"
    own = {key: getattr(c, key) for key in ("activation", "qkv_bias", "qk_norm", "unit_offset")}
    plain = {"activation": "silu", "qkv_bias": False, "qk_norm": False, "unit_offset": False}
    names = ("llama", "gemma", "qwen2", "qwen3")
    return next(
        name
        for name in names
        if plain | {k: v for k, v in FAMILIES[name].own.items() if k in own} == own
    )
