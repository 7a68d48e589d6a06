"""Two forms of one model on the same random tokens: do they say the same?"""

import importlib.util
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from alignjax.config import Compute
from alignjax.errors import UserError
from alignjax.models.decoder import head_weight, hidden_states
from alignjax.sharding import AXES, place, to_host
from alignjax.weights.loading import load
from alignjax.weights.safetensors import has_weights
from alignjax.weights.source import Source, decoder_config

_ROWS, _LENGTH = 2, 64  # of random tokens


class Agreement(NamedTuple):
    tokens: int
    difference: float  # largest of a logit
    spread: float  # standard deviation of all logits
    kl: float | None  # nats a token, mean; a reward model has none
    same: float | None  # share of tokens with the same most likely successor

    def __str__(self) -> str:
        what = "rewards" if self.kl is None else "logits"
        text = (
            f"on {self.tokens} random tokens {what} differ by at most {self.difference:.2g} (their "
            f"standard deviation is {self.spread:.2g})"
        )
        if self.kl is None:
            return text
        return (
            f"{text}, the mean KL divergence is {self.kl:.1e}, and {self.same:.1%} of the most "
            "likely next tokens are the same"
        )


def check_transformers() -> None:
    """Raises UserError where transformers cannot compute a model."""
    if importlib.util.find_spec("torch") is None:
        raise UserError(
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
        logits = _theirs(one, tokens_BT), _ours(other, tokens_BT)
    elif _is_theirs(other.path):
        logits = _ours(one, tokens_BT), _theirs(other, tokens_BT)
    else:
        logits = _ours(one, tokens_BT), _ours(other, tokens_BT)
    return agreement(*logits)


def agreement(p_BTV: np.ndarray, q_BTV: np.ndarray) -> Agreement:
    """Of logits, or rewards [B, T, 1]; the KL divergence is that of the second from the first."""
    scored = p_BTV.shape[-1] == 1
    log_p, log_q = (_log_softmax(logits.astype(np.float64)) for logits in (p_BTV, q_BTV))
    return Agreement(
        tokens=p_BTV[..., 0].size,
        difference=float(np.abs(p_BTV - q_BTV).max()),
        spread=float(p_BTV.std()),
        kl=None if scored else float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean()),
        same=None if scored else float((p_BTV.argmax(-1) == q_BTV.argmax(-1)).mean()),
    )


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def _is_theirs(path: Path) -> bool:
    return path.is_file() or has_weights(path)


def _theirs(source: Source, tokens_BT: np.ndarray) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    path, scored = source.path, decoder_config(source).scored
    where, file = (path.parent, path.name) if path.is_file() else (path, None)
    kind = AutoModelForSequenceClassification if scored else AutoModelForCausalLM
    model = kind.from_pretrained(
        where, gguf_file=file, dtype=torch.float32, trust_remote_code=False
    )
    with torch.no_grad():
        if scored:  # at every token, not the last one alone
            return model.score(model.model(torch.tensor(tokens_BT)).last_hidden_state).numpy()
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
        head_VD = to_host(head_weight(model))[: model.config.vocab_size]
    return h_BTD @ head_VD.T
