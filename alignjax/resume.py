"""Whether a run directory may be gone on with: the same settings, or settings that are free."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from alignjax import config as configs
from alignjax import validate
from alignjax.data.packing import Plan, plan_training
from alignjax.data.sources import path_names
from alignjax.errors import UserError
from alignjax.files import led_to, location, write_whole
from alignjax.models.families import from_hf
from alignjax.weights.card import read_settings
from alignjax.weights.safetensors import read_config
from alignjax.weights.source import Source, decoder_config

# Settings that a resumed run may change: they move, show or keep things, or cut the same step into
# other pieces. What the paths lead to is compared by content. A section's name frees all of it.
FREE = (
    "name",
    "run_dir",
    "wandb",
    "model.path",
    "model.chat_template",
    "data.path",
    "data.eval_path",
    "data.cache_dir",
    "mesh",
    "batch.rows_per_device",
    "compute.attention",
    "compute.remat",
    "compute.vocab_chunk",
    "checkpoint.every",
    "checkpoint.keep",
    "log",
    "samples.show",
    "samples.batch",
    "export",
)
_LENGTH = ("batch.epochs", "batch.max_steps")
# What a run writes into its directory, besides .lock.
_WRITTEN = ("config.json", "metrics.jsonl", "started.txt", "wandb_id", "model", "export")
_WRITTEN += ("checkpoints", "tensorboard", "baseline", "samples", "eval", "bad_rows")
_READ = ("model.path", "model.chat_template", "reference.path", "data.path", "data.eval_path")


def check_directory(config: configs.Training, directory: Path) -> None:
    """Refuse a directory in which a run would overwrite what no run wrote, or what it reads.

    A run's directory has its config.json. Where there is none, nothing that a run writes may be
    there but empty directories, which may be links to a larger disk.
    """
    if (directory / "config.json").exists():
        read_settings(directory)
    else:
        for path in (directory / name for name in _WRITTEN):
            if path.exists() and not (path.is_dir() and not any(path.iterdir())):
                raise UserError(
                    f"{path}: a run would overwrite it, but {directory} is no run's (it has no "
                    "config.json); choose another --run_dir."
                )
    written = {led_to(directory / name): directory / name for name in _WRITTEN}
    for key, text in _keys(config).items():
        for name in path_names(text) if key in _READ and text else ():
            place = led_to(location(name))
            for inside in (place, *place.parents):
                if inside in written:
                    raise UserError(
                        f"{key}={name}: the run would overwrite it as {written[inside]}; choose "
                        "another --run_dir."
                    )


def check_settings(config: configs.Training, directory: Path, step: int) -> None:
    """Refuses to go on from a step under settings that would make another run of it.

    Raises UserError with every key that differs, its value then and now. The length of the run
    may change where the learning rate does not depend on it.
    """
    if not step:
        return
    then, now = configs.flat(read_settings(directory)), _keys(config)
    differs = [
        key
        for key in dict.fromkeys([*then, *now])
        if (key not in then or key not in now or then[key] != now[key]) and not _is_free(key)
    ]
    optimizer = config.optimizer
    constant = optimizer.schedule == "constant" and optimizer.warmup_ratio == 0
    if constant:
        differs = [key for key in differs if key not in _LENGTH or key not in then]
    if not differs:
        return
    there, here = ({k: repr(v) for k, v in keys.items()} for keys in (then, now))
    unset = "not a setting"  # of another version of alignjax
    changes = "; ".join(f"{k} was {there.get(k, unset)}, is {here.get(k, unset)}" for k in differs)
    more = ""
    if set(differs) & set(_LENGTH):
        more = (
            " (a run can be made longer where optimizer.schedule is constant and "
            "optimizer.warmup_ratio 0)"
        )
    raise UserError(
        f"{directory}: this run is at step {step} under other settings: {changes}; take them back, "
        f"or choose another --run_dir{more}."
    )


def check_model(directory: Path, step: int, source: Source) -> None:
    """Refuses to go on from a step with a model of other sizes or constants."""
    model = directory / "model"
    then = vars(from_hf(read_config(model), str(model)))
    now = vars(decoder_config(source))
    changes = "; ".join(f"{k} was {v!r}, is {now[k]!r}" for k, v in then.items() if v != now[k])
    if changes:
        raise UserError(
            f"{directory}: this run is at step {step} of another model than {source.path}: "
            f"{changes}; name that model again, or choose another --run_dir."
        )


def check_length(
    config: configs.Training,
    directory: Path,
    step: int,
    plan: Plan,
    lengths: np.ndarray,
    epoch_items: np.ndarray,
) -> None:
    """Refuses a run of another length whose steps so far would have been other ones."""
    if not step:
        return
    then = configs.flat(read_settings(directory))
    if all(then[key] == _keys(config)[key] for key in _LENGTH):
        return
    batch = replace(config.batch, **{key.partition(".")[2]: then[key] for key in _LENGTH})
    validate.check(batch, configs.Batch, f"{directory}/config.json", "batch")
    older = plan_training(lengths, batch, config.seed, epoch_items)
    if len(plan) < step:
        raise UserError(
            f"{directory}: this run is at step {step} already, but batch.epochs and "
            f"batch.max_steps end it at step {len(plan)}; make them larger."
        )
    ends = [p.rows[p.steps[step]] for p in (older, plan)]
    if not np.array_equal(older.items[: ends[0]], plan.items[: ends[1]]):
        raise UserError(
            f"{directory}: this run has taken its last step, {step}, on what was left of the data; "
            "a longer run fills that step, so it would be another one: choose another --run_dir."
        )


def record(config: configs.Training, directory: Path) -> None:
    write_whole(directory / "config.json", json.dumps(configs.to_dict(config), indent=2))


def _is_free(key: str) -> bool:
    return key in FREE or key.partition(".")[0] in FREE


def _keys(config: configs.Training) -> dict[str, object]:
    return configs.flat(configs.to_dict(config))
