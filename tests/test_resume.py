"""A resumed run: which settings may change, and what is said of those that may not."""

import json
from dataclasses import replace

import numpy as np
import pytest

from alignjax import config as configs
from alignjax.config import DPO, Batch, Mesh, Optimizer
from alignjax.data.packing import plan_training
from alignjax.errors import UserError
from alignjax.resume import (
    _WRITTEN,
    FREE,
    check_directory,
    check_length,
    check_settings,
    record,
)

CONFIG = DPO(batch=Batch(pairs=4, epochs=2), optimizer=Optimizer(learning_rate=1e-3))
CONSTANT = replace(CONFIG, optimizer=Optimizer(schedule="constant", warmup_ratio=0))


def changed(config: DPO, key: str, value) -> DPO:
    section, _, name = key.partition(".")
    if not name:
        return replace(config, **{section: value})
    return replace(config, **{section: replace(getattr(config, section), **{name: value})})


def other(value):
    if isinstance(value, bool):
        return not value
    return {str: f"{value}x", int: 7, float: 0.125}[type(value)]


KEYS = configs.flat(configs.to_dict(CONFIG))


@pytest.mark.parametrize("key", KEYS)
def test_every_key_is_free_or_refused_with_both_values(tmp_path, key):
    record(CONFIG, tmp_path)
    value = other(KEYS[key])
    config = changed(CONFIG, key, value)
    if key in FREE or key.partition(".")[0] in FREE:
        check_settings(config, tmp_path, 3)
        return
    more = ""
    if key in ("batch.epochs", "batch.max_steps"):
        more = (
            " (a run can be made longer where optimizer.schedule is constant and "
            "optimizer.warmup_ratio 0)"
        )
    with pytest.raises(ValueError) as refusal:
        check_settings(config, tmp_path, 3)
    assert str(refusal.value) == (
        f"{tmp_path}: this run is at step 3 under other settings: {key} was {KEYS[key]!r}, is "
        f"{value!r}; take them back, or choose another --run_dir{more}."
    )


def test_what_the_issue_of_a_resumed_run_may_change_is_free():
    for key in ("log.every", "mesh.fsdp", "batch.rows_per_device", "data.path", "run_dir"):
        assert key in KEYS and (key in FREE or key.partition(".")[0] in FREE)
    assert all(any(k == f or k.startswith(f"{f}.") for k in KEYS) for f in FREE)


def test_every_differing_key_is_told(tmp_path):
    record(CONFIG, tmp_path)
    config = replace(CONFIG, beta=0.5, seed=1, mesh=Mesh(fsdp=2))
    with pytest.raises(ValueError, match=r"seed was 0, is 1; beta was 0\.1, is 0\.5; take them"):
        check_settings(config, tmp_path, 3)


def test_nothing_is_compared_before_the_first_checkpoint(tmp_path):
    record(CONFIG, tmp_path)
    check_settings(replace(CONFIG, beta=0.5), tmp_path, 0)


@pytest.mark.parametrize("then", ["older", "newer"])
def test_a_record_of_another_version(tmp_path, then):
    settings = configs.to_dict(CONFIG)
    settings |= {"gamma": 2} if then == "newer" else {}
    if then == "older":
        del settings["batch"]["epochs"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    key = "gamma was 2, is not a" if then == "newer" else "batch.epochs was not a setting, is 2"
    with pytest.raises(UserError, match=key):
        check_settings(CONFIG, tmp_path, 3)


def test_a_length_of_another_type(tmp_path):
    settings = configs.to_dict(CONSTANT)
    settings["batch"]["epochs"] = "2"
    (tmp_path / "config.json").write_text(json.dumps(settings))
    lengths = np.full(16, 10)
    plan = plan_training(lengths, CONSTANT.batch, 0)
    with pytest.raises(UserError, match=r"config\.json: batch\.epochs='2'"):
        check_length(CONSTANT, tmp_path, 3, plan, lengths, np.arange(16))


@pytest.mark.parametrize("name", _WRITTEN)
def test_a_directory_that_is_no_run_keeps_what_it_has(tmp_path, name):
    (tmp_path / ".lock").touch()
    (tmp_path / "notes").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / name).symlink_to(tmp_path / "elsewhere")
    if name != "config.json":
        check_directory(CONFIG, tmp_path)
    (tmp_path / "elsewhere" / "mine").touch()
    with pytest.raises(UserError, match=f"{tmp_path}.*{name}.*"):
        check_directory(CONFIG, tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).write_text('{"my": "project"}')
    with pytest.raises(UserError, match=f"{tmp_path}/{name}: .*choose another --run_dir"):
        check_directory(CONFIG, tmp_path)


@pytest.mark.parametrize("text", ["", '{"name": ', "[]", "null", '{"name": 1}', '{"model": "x"}'])
def test_a_config_that_is_no_runs(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json: "):
        check_directory(CONFIG, tmp_path)


@pytest.mark.parametrize("key", ["model.path", "data.path", "data.eval_path", "reference.path"])
def test_what_a_run_reads_is_not_what_it_writes(tmp_path, key):
    record(CONFIG, tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "mine").symlink_to(tmp_path / "model")
    check_directory(changed(CONFIG, key, str(tmp_path / "other")), tmp_path)
    check_directory(changed(CONFIG, key, str(tmp_path)), tmp_path)
    for inside in ("export", "checkpoints/3", "samples/*.json", "mine", "mine/x"):
        with pytest.raises(UserError, match=f"{key}={tmp_path}/.*choose another --run_dir"):
            check_directory(changed(CONFIG, key, f"{tmp_path}/{inside}"), tmp_path)


def test_a_constant_schedule_may_be_longer(tmp_path):
    record(CONSTANT, tmp_path)
    longer = changed(CONSTANT, "batch.epochs", 3)
    check_settings(longer, tmp_path, 3)
    lengths = np.full(16, 10)
    check_length(
        longer,
        tmp_path,
        8,
        plan_training(lengths, longer.batch, 0),
        lengths,
        np.arange(len(lengths)),
    )


def test_a_run_cannot_end_before_where_it_is(tmp_path):
    record(CONSTANT, tmp_path)
    shorter = changed(CONSTANT, "batch.max_steps", 2)
    lengths = np.full(16, 10)
    with pytest.raises(ValueError) as refusal:
        check_length(
            shorter,
            tmp_path,
            8,
            plan_training(lengths, shorter.batch, 0),
            lengths,
            np.arange(len(lengths)),
        )
    assert str(refusal.value) == (
        f"{tmp_path}: this run is at step 8 already, but batch.epochs and batch.max_steps end it "
        "at step 2; make them larger."
    )


def test_a_step_that_took_the_rest_of_the_data_cannot_be_filled_afterwards(tmp_path):
    record(CONSTANT, tmp_path)
    longer = changed(CONSTANT, "batch.epochs", 3)
    lengths = np.full(15, 10)  # two epochs are 30 pairs: the eighth step had two
    plan = plan_training(lengths, longer.batch, 0)
    check_length(longer, tmp_path, 7, plan, lengths, np.arange(len(lengths)))
    with pytest.raises(ValueError) as refusal:
        check_length(longer, tmp_path, 8, plan, lengths, np.arange(len(lengths)))
    assert str(refusal.value) == (
        f"{tmp_path}: this run has taken its last step, 8, on what was left of the data; a longer "
        "run fills that step, so it would be another one: choose another --run_dir."
    )
