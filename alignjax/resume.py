"""Whether a run directory may be gone on with: the same settings, or settings that are free."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from alignjax import config as configs
from alignjax.data.packing import Plan, plan_training
from alignjax.errors import UserError
from alignjax.files import write_whole
from alignjax.models.families import from_hf
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


def check_settings(config: configs.Training, directory: Path, step: int) -> None:
    """Refuses to go on from a step under settings that would make another run of it.

    Raises UserError with every key that differs, its value then and now. The length of the run
    may change where the learning rate does not depend on it.
    """
    file = directory / "config.json"
    if not step or not file.is_file():
        return
    then, now = configs.flat(json.loads(file.read_text())), _keys(config)
    differs = [
        key
        for key in dict.fromkeys([*then, *now])
        if then.get(key) != now.get(key) and not _is_free(key)
    ]
    optimizer = config.optimizer
    constant = optimizer.schedule == "constant" and optimizer.warmup_ratio == 0
    if constant:
        differs = [key for key in differs if key not in _LENGTH]
    if not differs:
        return
    changes = "; ".join(f"{key} was {then.get(key)!r}, is {now.get(key)!r}" for key in differs)
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
    file = directory / "config.json"
    if not step or not file.is_file():
        return
    then = configs.flat(json.loads(file.read_text()))
    if all(then[key] == _keys(config)[key] for key in _LENGTH):
        return
    batch = replace(config.batch, **{key.partition(".")[2]: then[key] for key in _LENGTH})
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
