"""One training step, the same for every stage."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from alignjax.config import Compute
from alignjax.data.batches import PackedBatch
from alignjax.logps import sequence_logps
from alignjax.models.decoder import Decoder
from alignjax.stages import EXTREMES, Scoring, Stage, batch_loss, counted, pairs_per_token


class State(NamedTuple):
    """All that training changes: float32 master weights, optimizer state, steps done."""

    model: Decoder
    optimizer: optax.OptState
    step: jax.Array
    ema: Decoder | None = None  # float32 average of the weights after each step, where one is kept

    def result(self) -> Decoder:
        """The weights that are evaluated, answer prompts and are exported."""
        return self.model if self.ema is None else self.ema


def init_state(model: Decoder, tx: optax.GradientTransformation, ema_decay: float = 0.0) -> State:
    """State before the first step; moments and average are born sharded as the weights are."""
    ema = jax.tree.map(jnp.copy, model) if ema_decay else None
    return State(model, jax.jit(tx.init)(model), jnp.zeros((), jnp.int32), ema)


def gradients(
    model: Decoder, batch: PackedBatch, micro_batches: jax.Array, stage: Stage, compute: Compute
) -> tuple[Decoder, dict[str, jax.Array]]:
    """Gradient and metrics of the first `micro_batches` of a batch [A, B, ...].

    The gradient is that of the loss summed over the whole batch divided by its count, accumulated
    in float32, so micro-batches, devices and padding do not change it. It is 0 where every item
    has the weight 0.
    """
    rate = pairs_per_token(stage, batch)
    loss = partial(batch_loss, stage=stage, compute=compute, pairs_per_token=rate)
    grad = jax.grad(loss, has_aux=True)
    grads, sums = _joined(partial(grad, model), batch, micro_batches)
    count = counted(sums["loss"][1])
    return jax.tree.map(lambda g: g / count, grads), _means(sums)


def _joined(part: Callable, batch: PackedBatch, micro_batches: jax.Array):
    """What `part`, which gives (gradients, metrics), gives of the first `micro_batches` together.

    That is the sum of each, of a batch [A, B, ...], or among metrics the least or largest.
    """
    summed = jnp.add, 0

    def add(i, found):
        one = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), batch)
        grads, metrics = part(one)
        for name, before in found[1].items():
            metrics[name] = EXTREMES.get(name, summed)[0](before, metrics[name])
        return jax.tree.map(jnp.add, found[0], grads), metrics

    shapes = jax.eval_shape(part, jax.tree.map(lambda x: x[0], batch))
    grads, metrics = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, out_sharding=leaf.sharding.spec), shapes
    )
    starts = {name: zero + EXTREMES.get(name, summed)[1] for name, zero in metrics.items()}
    return jax.lax.fori_loop(0, micro_batches, add, (grads, starts))


def _means(sums: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: total / counted(number) for name, (total, number) in sums.items()}


@partial(jax.jit, static_argnames=("stage", "compute", "tx", "ema_decay"), donate_argnames="state")
def train_step(
    state: State,
    batch: PackedBatch,
    micro_batches: jax.Array,
    index: jax.Array,
    *,
    stage: Stage,
    compute: Compute,
    tx: optax.GradientTransformation,
    ema_decay: float = 0.0,
) -> tuple[State, dict[str, jax.Array]]:
    """Takes step number `index` on the first `micro_batches` of a batch [A, B, ...].

    The average of the weights, if any, becomes ema_decay of itself and the rest of the new weights.

    A step whose loss or gradient is not finite changes nothing, and neither does any later one:
    `state.step` stays behind `index`.
    """
    grads, metrics = gradients(state.model, batch, micro_batches, stage, compute)
    metrics["grad_norm"] = optax.tree.norm(grads)
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
    good = finite & (state.step == index)

    updates, moments = tx.update(grads, state.optimizer, state.model)
    model, ema = optax.apply_updates(state.model, updates), state.ema
    if ema is not None:
        ema = optax.incremental_update(model, ema, 1 - ema_decay)
    new = State(model, moments, state.step + 1, ema)
    return jax.tree.map(partial(jnp.where, good), new, state), metrics


@jax.jit
def finite(state: State) -> jax.Array:
    """Whether every weight, moment and average is finite: for saves, as it reads all of them."""
    leaves = (leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating))
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()


@partial(jax.jit, static_argnames=("stage", "compute"))
def metrics_step(
    model: Decoder, batch: PackedBatch, micro_batches: jax.Array, *, stage: Stage, compute: Compute
) -> dict[str, jax.Array]:
    """The metrics that `train_step` would log of a batch, but for the gradient's norm."""

    rate = pairs_per_token(stage, batch)

    def part(one: PackedBatch) -> tuple[tuple, dict[str, jax.Array]]:
        return (), batch_loss(model, one, stage, compute, rate)[1]

    return _means(_joined(part, batch, micro_batches)[1])


@partial(jax.jit, static_argnames=("scores", "compute"))
def score_step(
    model: Decoder, batch: PackedBatch, *, scores: Scoring = sequence_logps, compute: Compute
) -> jax.Array:
    """Log-probs or rewards [B, P, S] of the sequences of a micro-batch [1, B, ...]."""
    return scores(model, jax.tree.map(lambda x: x[0], batch), compute)[0]
