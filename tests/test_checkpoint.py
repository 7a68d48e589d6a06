"""What a run keeps of its checkpoints."""

from dataclasses import replace

import jax
import pytest
from conftest import tiny_config

from alignjax import checkpoint, optim
from alignjax.config import DPO, Checkpoint, Optimizer
from alignjax.models import decoder
from alignjax.step import init_state


@pytest.mark.parametrize(("best", "kept"), [("min", {2, 5}), ("max", {3, 5})])
def test_the_best_is_kept_by_a_resumed_run_too(tmp_path, best, kept):
    config = replace(
        DPO(run_dir=str(tmp_path)), checkpoint=Checkpoint(keep=1, best=f"eval_loss:{best}")
    )
    model = decoder.init(tiny_config(layers=1), jax.random.key(0))
    state = init_state(model, optim.optimizer(Optimizer(), 9))
    losses = {1: 0.5, 2: 0.1, 3: 0.9, 4: None, 5: 0.4}
    for steps in ((1, 2, 3), (4, 5)):  # two starts of the run
        manager = checkpoint.open_manager(config)
        for step in steps:
            metrics = None if losses[step] is None else {"eval_loss": losses[step]}
            checkpoint.save(manager, state, step, config, metrics)
            checkpoint.wait(manager, state)
        manager.close()
    assert set(checkpoint.open_manager(config).all_steps()) == kept
