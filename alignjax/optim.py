"""Optimizers with warm-up and decay, from the config's numbers; the rules are optax's."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from alignjax.config import Optimizer
from alignjax.models.decoder import Decoder
from alignjax.weights.source import leaf_name


def schedule(config: Optimizer, steps: int) -> optax.Schedule:
    """Learning rate of each step: up from peak / warm-up steps, then down to the end of the run."""
    peak, final = config.learning_rate, config.learning_rate * config.final_ratio
    warmup = math.ceil(config.warmup_ratio * steps)
    rest = max(1, steps - warmup)
    decay = {
        "cosine": optax.cosine_decay_schedule(peak, rest, config.final_ratio),
        "linear": optax.linear_schedule(peak, final, rest),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    if not warmup:
        return decay
    rise = optax.linear_schedule(peak / warmup, peak, warmup)
    return optax.join_schedules([rise, decay], [warmup])


def optimizer(
    config: Optimizer, steps: int, words: Sequence[int] | None = None
) -> optax.GradientTransformation:
    """Clipping by the global norm, then the rule; norms and biases are never decayed.

    With `words` only those rows of the embedding learn, and only they count in the norm.

    Every rule's decay is decoupled and scaled by the learning rate. Adafactor takes rates as they
    are, not relative to a weight's size, and keeps no first moment (arXiv 1804.04235); Lion is
    arXiv 2302.06675's.
    """
    rate = schedule(config, steps)
    decay = {"weight_decay": config.weight_decay, "mask": _matrices}
    moments = {"b1": config.b1, "b2": config.b2, "mu_dtype": config.moment_dtype}
    if config.rule == "adamw":
        rule = optax.adamw(rate, **moments, eps=config.eps, **decay)
    elif config.rule == "lion":
        rule = optax.lion(rate, **moments, **decay)
    else:
        assert config.rule == "adafactor"
        rule = optax.chain(
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(**decay),
            optax.scale_by_learning_rate(rate),
        )
    clipped = optax.chain(optax.clip_by_global_norm(config.clip_norm), rule)
    if words is None:
        return clipped
    kept = optax.stateless(lambda updates, _: _of_words(updates, words))
    return optax.chain(kept, clipped, kept)  # behind the rule too: it decays weights


def _of_words(updates: Decoder, words: Sequence[int]) -> Decoder:
    """Updates of a model, those of the embedding's other rows set to zero."""
    chosen_V = np.isin(np.arange(updates.embed.shape[0]), words)
    rows = jax.typeof(updates.embed).sharding.spec[0]
    chosen_V1 = jax.reshard(jnp.asarray(chosen_V), jax.P(rows))[:, None]

    def kept(path, leaf):
        return jnp.where(chosen_V1, leaf, 0) if leaf_name(path) == "embed" else leaf

    return jax.tree_util.tree_map_with_path(kept, updates)


def _matrices(weights):
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not leaf_name(path).endswith(("norm", "bias")), weights
    )
