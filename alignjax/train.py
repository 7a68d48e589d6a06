"""Trains one stage: `python -m alignjax.train --config=NAME [--a.b=value ...]`."""

import shlex
import signal
import sys
from functools import partial

from alignjax import checks, command
from alignjax import config as configs
from alignjax.errors import SharedError, UserError


def main() -> int:
    config = configs.parse("alignjax.train")
    checks.check_training(config)
    return train(config)


def train(config: configs.Training) -> int:
    """Runs a stage to its end, or goes on where its directory stands.

    Resume order: the run's own checkpoints, then the model the config names. Gives the exit code:
    0, or 143 where a signal stopped the run after a step, which is then saved.
    """
    from alignjax.progress import say

    say(f"starting {config.name}")
    import jax

    from alignjax import lock, processes
    from alignjax.progress import only_first_process
    from alignjax.resume import check_directory
    from alignjax.sharding import use_mesh

    processes.join(configs.flat(configs.to_dict(config)))
    only_first_process(jax.process_index())
    use_mesh(config.mesh.replica, config.mesh.fsdp, config.mesh.tensor)
    directory = configs.run_dir(config)
    processes.on_first(lambda: check_directory(config, directory))
    with processes.first_holds(lambda: lock.held(directory)):
        if len(set(processes.on_each(lambda: lock.owner(directory)))) > 1:
            raise SharedError(f"{directory}: name a --run_dir on a disk that all hosts share.")
        return _train(config)


def _train(config: configs.Training) -> int:
    import jax

    from alignjax import checkpoint, lock, metrics, processes, report, samples
    from alignjax.loop import fit
    from alignjax.models.decoder import abstract
    from alignjax.progress import phase, say
    from alignjax.reference import fingerprint
    from alignjax.resume import record
    from alignjax.run import baseline, is_complete, load_shown, prepare, stored_baseline
    from alignjax.step import init_state
    from alignjax.stopping import ending_at_once
    from alignjax.weights.card import read_settings
    from alignjax.weights.safetensors import export
    from alignjax.weights.source import decoder_config

    processes.on_first(lambda: metrics.check(config))
    manager = checkpoint.open_manager(config)
    first = manager.latest_step() or 0
    run = prepare(config, first)
    initial = partial(init_state, tx=run.optimizer(), ema_decay=config.optimizer.ema_decay)

    start = checkpoint.start_of(manager, first) if first else {}
    base = stored_baseline(run, start)
    before = samples.stored(run, 0)
    model = None
    then = read_settings(run.directory)["model"]["path"] if first else ""  # it may have moved
    complete = then == config.model.path and before is not None and is_complete(run, base)
    if not complete or config.samples.kl and first < len(run.steps):  # evaluations will read it
        model = load_shown(run.source)
        weights = fingerprint(model)
        known = start.get("weights") or (base.weights if base else weights)
        if known != weights:
            if first:
                raise UserError(
                    f"{run.directory}: this run is at step {first} of other weights than those of "
                    f"{run.source.path}; name the model that it started from, or choose another "
                    "--run_dir."
                )
            base = before = None  # of a start that saved nothing
        if not is_complete(run, base) or not first and run.reference is not run.source:
            base = baseline(run, model, weights, start)  # before step 1 a reference may be changed
        before = samples.sample(run, model, 0, base.reference) if before is None else before
    if first:
        del model
        with phase(f"restoring step {first}"), ending_at_once():
            like = jax.eval_shape(initial, abstract(decoder_config(run.source)))
            state, first = checkpoint.restore_newest(manager, like)
        processes.on_first(lambda: record(config, run.directory))
        say(f"going on from step {first} of {run.directory}")
    else:
        state = initial(model)
        del model
    state, done = fit(run, state, first, base, manager)
    with phase("saving"), ending_at_once():
        checkpoint.wait(manager, state)
    if done < len(run.steps):
        same = shlex.join(["python", "-m", "alignjax.train", *sys.argv[1:]])
        say(
            f"stopped by a signal after step {done} of {len(run.steps)}, which is saved in "
            f"{run.directory}; to go on:\n  {same}"
        )
        return 128 + signal.SIGTERM
    processes.on_first(lambda: lock.check_place(run.directory))
    with phase("exporting"):
        target = run.directory / "export"
        how, beside = config.export, run.beside_export()
        export(state.result(), run.source, target, how.dtype, how.shard_bytes, beside)
    after = samples.stored(run, done)
    if after is None:
        after = samples.sample(run, state.result(), done, base.reference)
    if jax.process_index() == 0:
        report.show(run, base, before, after, target)
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main))
