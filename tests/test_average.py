"""A run that keeps an average of its weights, resumed, exported and read again."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import read_whole
from refusals import ended
from running import metrics_of, untimed
from safetensors.numpy import load_file

from alignjax import checkpoint, optim
from alignjax.config import RM
from alignjax.models.decoder import abstract
from alignjax.sharding import to_host
from alignjax.step import init_state
from alignjax.weights.orbax import open_orbax
from alignjax.weights.safetensors import open_directory
from alignjax.weights.source import decoder_config

MORE = ("--optimizer.ema-decay=0.5", "--batch.max-steps=6", "--log.eval-every=3")


def train(root: Path, name: str, *more: str) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        assert ended(patch, None, root, root / name, *MORE, *more, stage="rm") == (0, "")
    return root / name


@pytest.fixture(scope="module")
def averaged(root) -> Path:
    """The directory of a run of 6 steps, saved after 3 as well."""
    return train(root, "averaged")


def test_the_average_is_the_result_and_the_weights_are_kept_beside_it(averaged):
    export = open_directory(averaged / "export")
    config, tx = RM(run_dir=str(averaged)), optim.optimizer(RM().optimizer, 6)
    like = jax.eval_shape(lambda m: init_state(m, tx, 0.5), abstract(decoder_config(export)))
    state = checkpoint.restore(checkpoint.open_manager(config), 6, like)
    found = read_whole(export, "score.weight")
    np.testing.assert_array_equal(found, to_host(state.ema.score))
    assert (found != to_host(state.model.score)).any()
    assert (
        "The weights average those after each step, of decay 0.5"
        in (averaged / "export/README.md").read_text()
    )


def test_it_goes_on_with_the_same_bits(root, averaged):
    again = root / "again"
    shutil.copytree(averaged, again)
    shutil.rmtree(again / "checkpoints/6")
    shutil.rmtree(again / "export")
    train(root, "again")
    assert untimed(again) == untimed(averaged)
    one, other = (load_file(run / "export/model.safetensors") for run in (averaged, again))
    assert {n: a.tobytes() for n, a in one.items()} == {n: a.tobytes() for n, a in other.items()}


def test_another_run_that_starts_from_it_takes_the_average(root, averaged):
    """It is what was evaluated, too."""
    found, export = open_orbax(averaged), open_directory(averaged / "export")
    for name in export.tensors:
        np.testing.assert_array_equal(read_whole(found, name), read_whole(export, name))
    more = ("--optimizer.ema-decay=0", "--batch.max-steps=1", f"--model.path={averaged}")
    before, after = metrics_of(averaged)[-1], metrics_of(train(root, "from", *more))[0]
    assert after["eval_loss"] == pytest.approx(before["eval_loss"], abs=1e-6)
    assert after["eval_rewards/max"] == pytest.approx(before["eval_rewards/max"], abs=1e-6)


def test_training_is_that_of_a_run_without_an_average(root, averaged):
    plain = untimed(train(root, "plain", "--optimizer.ema-decay=0"))
    for one, other in zip(plain, untimed(averaged), strict=True):
        for name in {"loss", "grad_norm"} & other.keys():  # two programs may differ in a last bit
            assert one[name] == pytest.approx(other[name], rel=1e-6)
    assert plain[6]["eval_loss"] != untimed(averaged)[6]["eval_loss"]
