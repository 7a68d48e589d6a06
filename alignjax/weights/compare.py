"""Two forms of one model on the same random tokens: do they say the same?"""

import importlib.util
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from alignjax.config import Compute
from alignjax.models.decoder import head_weight, hidden_states
from alignjax.sharding import AXES, place, to_host
from alignjax.weights.safetensors import has_weights
from alignjax.weights.source import Source, decoder_config, load

_ROWS, _LENGTH = 2, 64  # of random tokens


class Agreement(NamedTuple):
    tokens: int
    difference: float  # largest of a logit
    spread: float  # standard deviation of all logits
    kl: float  # nats a token, mean
    same: float  # share of tokens with the same most likely successor


def check_transformers() -> None:
    """Raises ValueError where transformers cannot compute a model."""
    if importlib.util.find_spec("torch") is None:
        raise ValueError(
            "--check: transformers computes models with torch, which is not installed; install "
            "alignjax with the extra `parity`, or leave --check out."
        )


def compare(one: Source, other: Source) -> Agreement:
    """How far two forms of a model agree, in float32, each of them whole in memory in turn.

    One form is computed by transformers if it is a Hugging Face directory or a GGUF file, the first
    rather than the second; all else by this package's decoder.
    """
    size = decoder_config(one).vocab_size
    tokens_BT = np.random.default_rng(0).integers(0, size, (_ROWS, _LENGTH)).astype(np.int32)
    if _is_theirs(one.path):
        logits = _theirs(one.path, tokens_BT), _ours(other, tokens_BT)
    elif _is_theirs(other.path):
        logits = _ours(one, tokens_BT), _theirs(other.path, tokens_BT)
    else:
        logits = _ours(one, tokens_BT), _ours(other, tokens_BT)
    return agreement(*logits)


def agreement(p_BTV: np.ndarray, q_BTV: np.ndarray) -> Agreement:
    """Of logits; the KL divergence is that of the second from the first."""
    log_p, log_q = (_log_softmax(logits.astype(np.float64)) for logits in (p_BTV, q_BTV))
    return Agreement(
        tokens=p_BTV[..., 0].size,
        difference=float(np.abs(p_BTV - q_BTV).max()),
        spread=float(p_BTV.std()),
        kl=float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean()),
        same=float((p_BTV.argmax(-1) == q_BTV.argmax(-1)).mean()),
    )


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def _is_theirs(path: Path) -> bool:
    return path.is_file() or has_weights(path)


def _theirs(path: Path, tokens_BT: np.ndarray) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    where, file = (path.parent, path.name) if path.is_file() else (path, None)
    model = AutoModelForCausalLM.from_pretrained(
        where, gguf_file=file, dtype=torch.float32, trust_remote_code=False
    )
    with torch.no_grad():
        return model(torch.tensor(tokens_BT)).logits.numpy()


def _ours(source: Source, tokens_BT: np.ndarray) -> np.ndarray:
    kinds = (jax.sharding.AxisType.Explicit,) * len(AXES)
    mesh = jax.make_mesh((1,) * len(AXES), AXES, kinds, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        model = load(source)
        positions_BT = np.tile(np.arange(tokens_BT.shape[1], dtype=np.int32), (len(tokens_BT), 1))
        batch = place((tokens_BT, positions_BT, np.ones_like(tokens_BT)), "batch", None)
        compute = Compute(dtype="float32", remat="none")
        h_BTD = to_host(hidden_states(model, *batch, compute))
        head_VD = to_host(head_weight(model))[: decoder_config(source).vocab_size]
    return h_BTD @ head_VD.T
