"""Nothing that a run leaves is NaN or infinite: weights, moments, exports, metrics."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from refusals import ended, pair, prepare, rows
from safetensors.numpy import load_file

from alignjax import checks, metrics
from alignjax.config import DPO
from alignjax.run import Run
from alignjax.step import finite, init_state
from alignjax.weights.source import leaf_name

pytestmark = pytest.mark.slow  # minutes


@pytest.fixture
def root(tmp_path):
    return prepare(tmp_path / "root")


def spoiling(step: int):
    """An optimizer that makes NaN of a norm at a step, counted from 1."""
    original = Run.optimizer

    def update(updates, done, params=None):
        def spoiled(path, leaf):
            bad = (done == step - 1) & (leaf_name(path) == "norm")
            return leaf + jnp.where(bad, jnp.nan, 0.0)

        return jax.tree_util.tree_map_with_path(spoiled, updates), done + 1

    def optimizer(run):
        count = optax.GradientTransformation(lambda _: jnp.zeros((), jnp.int32), update)
        return optax.chain(original(run), count)

    return optimizer


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (1, "the weights after step 1, or their moments, are not finite; no step is saved"),
        (3, "the weights after step 3, or their moments, are not finite; those of step 2 are"),
    ],
)
def test_no_state_is_saved_or_exported_that_is_not_finite(
    monkeypatch, capsys, root, tmp_path, step, said
):
    monkeypatch.setattr(Run, "optimizer", spoiling(step))
    more = ("--checkpoint.every=1", "--batch.max-steps=3")
    code, err = ended(monkeypatch, capsys, root, tmp_path / "run", *more)
    assert code == 1 and err.startswith(f"stopped: {said}")
    steps = sorted(file.name for file in (tmp_path / "run/checkpoints").iterdir())
    assert steps == [str(one) for one in range(1, step)]
    assert not (tmp_path / "run/export").exists()


def test_moments_that_are_not_finite_end_the_last_step_too(monkeypatch, capsys, root, tmp_path):
    monkeypatch.setattr(checks, "check_training", lambda config: None)
    more = ("--optimizer.b2=1", "--batch.max-steps=1")
    code, err = ended(monkeypatch, capsys, root, tmp_path / "run", *more)
    assert code == 1 and "after step 1, or their moments, are not finite" in err
    assert not (tmp_path / "run/export").exists()


def test_rows_that_all_weigh_nothing_give_numbers(monkeypatch, capsys, root, tmp_path):
    split = ["train"] * 5 + ["test"] * 3
    lines = [pair(prompt=f"p{i}", weight=0, split=one) for i, one in enumerate(split)]
    data = f"--data.path={rows(root, *lines)}"
    more = (data, "--sft-weight=1", "--batch.max-steps=1")
    assert ended(monkeypatch, capsys, root, tmp_path / "run", *more) == (0, "")
    for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines():
        found = json.loads(line, parse_constant=pytest.fail)
        assert found.get("eval_loss", 0) == found.get("loss", 0) == 0
    weights = load_file(tmp_path / "run/export/model.safetensors")
    assert all(np.isfinite(one).all() for one in weights.values())


def test_a_line_of_metrics_holds_no_number_that_json_does_not_know(tmp_path):
    with metrics.writing(tmp_path, DPO(), -1) as log:
        log.write({"step": 1, "loss": 0.5, "a": float("nan"), "source=\ud800\x1b[2J": 1.0})
        log.write({"step": 2, "loss": float("inf")})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "loss": 0.5, "source=\\ud800\\x1b[2J": 1.0},
        {"step": 2},
    ]


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_one_odd_number_anywhere_is_seen(odd):
    tx = optax.adam(1.0)
    good = init_state({"a": jnp.ones((2, 3)), "b": jnp.ones(4)}, tx, ema_decay=0.5)
    assert bool(finite(good))
    spoiled = {"a": jnp.ones((2, 3)).at[1, 2].set(odd), "b": jnp.ones(4)}
    moments = tx.init(spoiled)
    moments = (moments[0]._replace(nu=spoiled), *moments[1:])
    for bad in ({"model": spoiled}, {"ema": spoiled}, {"optimizer": moments}):
        assert not bool(finite(good._replace(**bad)))
