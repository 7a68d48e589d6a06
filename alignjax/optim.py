"""Optimizers with warm-up and decay, from the config's numbers; the rules are optax's."""

import math

import jax
import optax

from alignjax.config import Optimizer
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


def optimizer(config: Optimizer, steps: int) -> optax.GradientTransformation:
    """Clipping by the global norm, then the rule; norms and biases are never decayed.

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
        rule = optax.chain(
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.add_decayed_weights(**decay),
            optax.scale_by_learning_rate(rate),
        )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), rule)


def _matrices(weights):
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not leaf_name(path).endswith(("norm", "bias")), weights
    )
