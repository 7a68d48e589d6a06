"""Checkpoints of a run through Orbax: asynchronous, sharded, the last few and the best."""

import errno
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as managers

from alignjax import config as configs
from alignjax import lock
from alignjax.errors import DISK, UserError
from alignjax.files import is_remote
from alignjax.processes import on_first
from alignjax.progress import gigabytes, say
from alignjax.sharding import concrete
from alignjax.stages import Facts, stage_of
from alignjax.step import State
from alignjax.weights.orbax import reason
from alignjax.weights.source import leaf_name

_PAGE = 4096  # bytes


def open_manager(config: configs.Training) -> ocp.CheckpointManager:
    """The checkpoints of a run directory; half-written ones are never listed."""
    policies, measured = [managers.LatestN(config.checkpoint.keep)], {}
    if config.checkpoint.best:
        metric, better = best_metric(config)
        best = managers.BestN(
            get_metric_fn=lambda metrics: metrics[metric],
            reverse=better == "min",
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        policies.append(best)
        # Without a best_fn Orbax writes no metrics, and a resumed run would not know the best.
        measured = {"best_fn": best.get_metric_fn, "best_mode": better}
    return ocp.CheckpointManager(
        (configs.run_dir(config) / "checkpoints").absolute(),
        item_handlers={
            "state": ocp.StandardCheckpointHandler(),
            "sums": ocp.StandardCheckpointHandler(),
            "config": ocp.JsonCheckpointHandler(),
        },
        options=ocp.CheckpointManagerOptions(
            preservation_policy=managers.AnyPreservationPolicy(policies),
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
            **measured,
        ),
    )


def best_metric(config) -> tuple[str, str]:
    """Splits "eval_loss:min" into the metric, which the stage must have, and its better end."""
    metric, _, better = config.checkpoint.best.rpartition(":")
    if not metric or better not in ("min", "max"):
        raise UserError(
            f"checkpoint.best={config.checkpoint.best!r}: write a metric and :min or :max, such as "
            "eval_loss:min."
        )
    sides, items = np.ones((1, 2), np.float32), np.ones(1, np.float32)
    facts = Facts(sides, sides, items, items, sides.astype(np.int32))
    known = [f"eval_{name}" for name in stage_of(config).terms(sides, facts)]
    if metric not in known:
        raise UserError(
            f"checkpoint.best={config.checkpoint.best!r}: there is no metric {metric}; there are "
            f"{', '.join(known)}."
        )
    return metric, better


def save(manager, state: State, step: int, config, metrics: dict | None, start=None) -> None:
    """Starts to save a state; returns before it is on disk.

    With it go the sums of every array's rows, and `start`, the weights of `Baseline.start`.
    Raises UserError, naming the directory and the space needed, where the disk is full, now or
    since the last save. Older checkpoints stay as they are.
    """
    leaves, need = _flat(state), _space(state)
    about, sums = {"start": start or {}}, _row_sums(leaves)
    with _disk_errors(manager, need):
        manager.wait_until_finished()  # the space that the last one takes is known then
        if not on_first(lambda: _fits(manager, need)):
            raise UserError(_disk_full(manager, need))
        manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(leaves, save_args=_chunks(leaves)),
                sums=ocp.args.StandardSave(sums),
                config=ocp.args.JsonSave(configs.to_dict(config) | {"about": about}),
            ),
            metrics=metrics,
        )


def _chunks(leaves: dict[str, jax.Array]) -> dict[str, ocp.SaveArgs]:
    """Matrices of all layers lie in chunks of one layer, so that it can be read without others."""
    stacked = ocp.SaveArgs(shard_axes=(0,))
    return {
        name: stacked if "blocks." in name and leaf.ndim == 3 else ocp.SaveArgs()
        for name, leaf in leaves.items()
    }


def wait(manager, state: State) -> None:
    """Returns when the last save is on disk; raises UserError where the disk was too full."""
    with _disk_errors(manager, _space(state)):
        manager.wait_until_finished()


@contextmanager
def _disk_errors(manager, need: int) -> Iterator[None]:
    """Turns what Orbax raises of a disk into one sentence."""
    try:
        yield
    except (OSError, ValueError) as error:
        lock.check_place(manager.directory.parent)  # it may have gone while this was written
        number = next((n for n in DISK if os.strerror(n) in str(error)), 0)
        if number == errno.ENOSPC:
            raise UserError(_disk_full(manager, need)) from None
        if not number:
            raise
        raise OSError(number, "", os.fspath(manager.directory)) from None


def _space(state: State) -> int:
    """Bytes that a checkpoint takes on a disk, where each part of an array fills whole pages."""
    leaves = jax.tree.leaves(state)
    return sum(leaf.nbytes + _PAGE * len(leaf.sharding.device_set) for leaf in leaves)


def _fits(manager, need: int) -> bool:
    free = _free_bytes(manager)
    return free is None or free >= need


def _free_bytes(manager) -> int | None:
    if is_remote(manager.directory):
        return None
    return shutil.disk_usage(manager.directory).free


def _disk_full(manager, need: int) -> str:
    whole = manager.all_steps()
    newest = f"the checkpoint of step {max(whole)} is whole" if whole else "there is no older one"
    free = _free_bytes(manager)
    return (
        f"{manager.directory}: the disk is full: a checkpoint needs {gigabytes(need)}, "
        f"{gigabytes(free)} are free, and {newest}; free some space, and the same command goes on "
        "from there."
    )


def _row_sums(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Each array's `weights.orbax.row_sums`; one after the other, since devices meet in them."""
    return {name: _row_sums_of(leaf).block_until_ready() for name, leaf in leaves.items()}


@jax.jit
def _row_sums_of(leaf: jax.Array) -> jax.Array:
    bits = jnp.atleast_1d(leaf).view(f"uint{8 * leaf.dtype.itemsize}").astype(jnp.uint32)
    odd = 2 * jnp.arange(bits.shape[-1], dtype=jnp.uint32) + 1
    return jnp.atleast_1d((bits * odd).sum(-1, dtype=jnp.uint32))


def start_of(manager, step: int) -> dict:
    """Return what `save` was given as `start`."""
    try:
        args = ocp.args.Composite(config=ocp.args.JsonRestore())
        return dict(manager.restore(step, args=args)["config"]["about"]["start"])
    except Exception:  # Orbax raises it bare; `restore` says more
        return {}


def restore_newest(manager, like: State) -> tuple[State, int]:
    """Restore the newest checkpoint that is whole, and return it with its step.

    Newer ones are moved aside, and it is said. Raises UserError where none is whole, or all are of
    another model or optimizer.
    """
    damaged = {}
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            state = restore(manager, step, like)
            break
        except UserError as error:
            damaged[manager.directory / str(step)] = error
    else:
        raise next(iter(damaged.values()))
    for path, error in damaged.items():
        aside = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
        on_first(lambda path=path, aside=aside: path.rename(aside) and None)
        why = str(error).rpartition(";")[0]
        say(f"{why}; it is now {aside.name}, and the run goes on from step {step}")
    if damaged:
        manager.reload()
    return state, step


def restore(manager, step: int, like: State) -> State:
    """A saved state on the mesh in use; `like` (of `jax.eval_shape`) gives shapes and shardings.

    Raises UserError where the checkpoint is damaged, or of another model or optimizer.
    """
    wanted = concrete(like)
    _check_shapes(manager, step, wanted)
    items = {"state": _flat(wanted)}
    items["sums"] = concrete(jax.tree.map(partial(jax.eval_shape, _row_sums_of), items["state"]))
    args = {item: ocp.args.StandardRestore(leaves) for item, leaves in items.items()}
    try:
        found = manager.restore(step, args=ocp.args.Composite(**args))
        for name, own in _row_sums(found["state"]).items():
            if not jnp.array_equal(own, found["sums"][name]):
                raise ValueError(f"{name} is not as it was saved")
    except Exception as error:  # Orbax raises it bare
        raise UserError(_damaged(manager, step, error)) from None
    # A copy: the step donates its state, and restored buffers may be shared with Orbax.
    leaves = [jnp.copy(found["state"][name]) for name in items["state"]]
    return jax.tree.unflatten(jax.tree.structure(wanted), leaves)


def _damaged(manager, step: int, error: Exception) -> str:
    return (
        f"{os.fspath(manager.directory / str(step))}: the checkpoint cannot be read "
        f"({reason(error.__cause__ or error)}); delete it, and the run starts again."
    )


def _check_shapes(manager, step: int, wanted: State) -> None:
    try:
        metadata = manager.item_metadata(step)["state"]
    except Exception as error:  # Orbax raises it bare, where damage hits what describes the arrays
        raise UserError(_damaged(manager, step, error)) from None
    held = {name: tuple(leaf.shape) for name, leaf in metadata.items()}
    for name, leaf in _flat(wanted).items():
        if held.get(name) != tuple(leaf.shape):
            there = f"with shape {held[name]}" if name in held else "not at all"
            raise UserError(
                f"{os.fspath(manager.directory / str(step))}: the checkpoint holds {name} {there}, "
                f"but this run needs it with shape {tuple(leaf.shape)}: the run directory belongs "
                "to another model or optimizer; choose another --run_dir, or delete it."
            )


def _flat(state: State) -> dict[str, jax.Array]:
    """Every leaf under its dotted name: "model.blocks.q", "optimizer.1.0.mu.blocks.q", "step"."""
    return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
