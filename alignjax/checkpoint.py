"""Checkpoints of a run through Orbax: asynchronous, sharded, the last few and the best."""

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as managers

from alignjax import config as configs
from alignjax.sharding import concrete
from alignjax.step import State
from alignjax.weights.source import leaf_name


def open_manager(config: configs.SFT | configs.DPO) -> ocp.CheckpointManager:
    """The checkpoints of a run directory; half-written ones are never listed."""
    policies = [managers.LatestN(config.checkpoint.keep)]
    if config.checkpoint.best:
        metric, better = best_metric(config)
        policies.append(
            managers.BestN(
                get_metric_fn=lambda metrics: metrics[metric],
                reverse=better == "min",
                n=1,
                keep_checkpoints_without_metrics=False,
            )
        )
    return ocp.CheckpointManager(
        (configs.run_dir(config) / "checkpoints").absolute(),
        options=ocp.CheckpointManagerOptions(
            preservation_policy=managers.AnyPreservationPolicy(policies),
            enable_async_checkpointing=True,
        ),
    )


def best_metric(config) -> tuple[str, str]:
    """Splits "eval_loss:min" into the metric and its better end."""
    metric, _, better = config.checkpoint.best.rpartition(":")
    if not metric or better not in ("min", "max"):
        raise ValueError(
            f"checkpoint.best={config.checkpoint.best!r}: write a metric and :min or :max, such as "
            "eval_loss:min."
        )
    return metric, better


def save(manager, state: State, step: int, config, metrics: dict[str, float]) -> None:
    """Starts to save a state; returns before it is on disk."""
    manager.save(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(_flat(state)),
            config=ocp.args.JsonSave(configs.to_dict(config)),
        ),
        metrics=metrics,
    )


def restore(manager, step: int, like: State) -> State:
    """A saved state on the mesh in use; `like` (of `jax.eval_shape`) gives shapes and shardings."""
    wanted = concrete(like)
    found = manager.restore(
        step, args=ocp.args.Composite(state=ocp.args.StandardRestore(_flat(wanted)))
    )["state"]
    leaves = [found[leaf_name(path)] for path, _ in jax.tree_util.tree_leaves_with_path(wanted)]
    # A copy: the step donates its state, and restored buffers may be shared with Orbax.
    return jax.tree.unflatten(jax.tree.structure(wanted), [jnp.copy(leaf) for leaf in leaves])


def _flat(state: State) -> dict[str, jax.Array]:
    """Every leaf under its dotted name: "model.blocks.q", "optimizer.1.0.mu.blocks.q", "step"."""
    return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
