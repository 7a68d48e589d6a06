"""Trains one stage: `python -m alignjax.train --config=NAME [--a.b=value ...]`."""

import json
import os
import sys

from alignjax import config as configs


def main() -> int:
    """Parses the command line, then trains; a user's mistake is one sentence and exit code 2."""
    try:
        config = configs.parse("alignjax.train")
        configs.check(config)
        return train(config)
    except ValueError as error:
        if os.environ.get("ALIGNJAX_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1


def train(config: configs.SFT | configs.DPO) -> int:
    """Runs a stage to its end, or goes on where its directory stands.

    Resume order: the run's own checkpoints, then the model the config names.
    """
    print("starting", config.name, flush=True)
    import jax

    from alignjax import checkpoint, optim, report, samples
    from alignjax.files import write_whole
    from alignjax.loop import fit
    from alignjax.models.decoder import abstract
    from alignjax.progress import only_first_process, phase, say
    from alignjax.run import baseline, prepare, stored_baseline
    from alignjax.sharding import use_mesh
    from alignjax.step import State, init_state
    from alignjax.weights.safetensors import export
    from alignjax.weights.source import decoder_config, load

    use_mesh(config.mesh.replica, config.mesh.fsdp, config.mesh.tensor)
    only_first_process(jax.process_index())
    run = prepare(config)
    write_whole(run.directory / "config.json", json.dumps(configs.to_dict(config), indent=2))
    manager = checkpoint.open_manager(config)
    tx = optim.optimizer(config.optimizer, len(run.steps))

    first = manager.latest_step() or 0
    base = stored_baseline(run)
    before = _stored_samples(run)
    model = None
    if not first or base is None or before is None:
        with phase("loading weights"):
            model = jax.block_until_ready(load(run.source))
        base = base or baseline(run, model)
        before = samples.sample(run, model, 0) if before is None else before
    if first:
        del model
        with phase(f"restoring step {first}"):
            like = jax.eval_shape(
                lambda model: State(model, tx.init(model), jax.numpy.int32(0)),
                abstract(decoder_config(run.source)),
            )
            state = checkpoint.restore(manager, first, like)
        say(f"going on from step {first} of {run.directory}")
    else:
        state = init_state(model, tx)
        del model
    state = fit(run, state, first, base, manager)
    with phase("saving and exporting"):
        manager.wait_until_finished()
        target = run.directory / "export"
        export(state.model, run.source, target, config.export.dtype, config.export.shard_bytes)
    after = samples.sample(run, state.model, len(run.steps)) if config.samples.prompts else []
    report.show(run, base, before, after, target)
    return 0


def _stored_samples(run) -> list[dict] | None:
    file = run.directory / "samples" / "step-0.json"
    if not run.config.samples.prompts:
        return []
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


if __name__ == "__main__":
    sys.exit(main())
