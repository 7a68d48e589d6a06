"""A resumed run: which settings may change, and what is said of those that may not."""

from dataclasses import replace

import numpy as np
import pytest

from alignjax import config as configs
from alignjax.config import DPO, Batch, Mesh, Optimizer
from alignjax.data.packing import plan_training
from alignjax.resume import FREE, check_length, check_settings, record

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


def test_nothing_is_compared_before_the_first_checkpoint_or_without_a_record(tmp_path):
    check_settings(replace(CONFIG, beta=0.5), tmp_path, 3)
    record(CONFIG, tmp_path)
    check_settings(replace(CONFIG, beta=0.5), tmp_path, 0)


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
