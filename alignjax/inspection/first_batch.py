"""The metrics of the first training batch under the model that training starts from."""

import math
from dataclasses import replace
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from alignjax import evaluation
from alignjax.config import DPO
from alignjax.models.decoder import Decoder
from alignjax.progress import phase
from alignjax.run import Run, load_shown
from alignjax.sharding import place_rows
from alignjax.stages import Facts
from alignjax.step import metrics_step
from alignjax.weights.source import decoder_config

TITLE = "first batch, under the starting model"


class FirstBatch(NamedTuple):
    metrics: dict[str, float]  # as the first step logs them
    expected: dict[str, float]  # what the start alone makes of some of them
    notes: list[str]

    def table(self) -> list[list[str]]:
        """A head, and a line for each metric; what is expected is left out where nothing is."""
        lines = [["", "is", "expected"]]
        for name, value in self.metrics.items():
            expected = f"{self.expected[name]:.6f}" if name in self.expected else ""
            lines.append([name, f"{value:.6f}", expected])
        return lines if self.expected else [line[:2] for line in lines]


def first_batch(run: Run) -> FirstBatch:
    """Loads the model and takes the first step's forward pass, with the step's own loss.

    The reference's log-probs are computed for this batch alone, and not kept: what is kept is
    scored in the order of a whole run, on which its last bits depend.
    """
    config, steps = run.config, run.steps
    model = load_shown(run.source)
    items = np.unique(steps.plan.step_items(0))
    if run.stage.needs_reference:
        with phase("reference log-probs, first batch", len(items)) as update:
            args = (config.batch.row_length, run.rows, config.compute, items, update)
            steps = replace(steps, ref=evaluation.score(model, run.train, *args))
    with phase("first batch"):
        batch = place_rows(steps[0], run.rows)
        micro = np.int32(steps.micro_batches(0))
        found = metrics_step(model, batch, micro, stage=run.stage, compute=config.compute)
        metrics = {name: float(value) for name, value in found.items()}
    return FirstBatch(metrics, _expected(run, model, items), _notes(run))


def _expected(run: Run, model: Decoder, items: np.ndarray) -> dict[str, float]:
    """Loss and margin of pairs whose sides a start cannot tell apart; else nothing.

    So it is where the policy is its own reference, and under a score head of zeros.
    """
    blank = run.stage.name == "rm" and not bool(jnp.any(model.score))
    if not (run.stage.needs_reference or blank):
        return {}
    known = ["rewards/margins"]
    if not (isinstance(run.config, DPO) and run.config.sft_weight):
        known.append("loss")
    zeros_PS = np.zeros((len(items), run.train.sides), np.float32)
    ranks_PS = run.train.by_item(run.train.ranks)[items]
    facts = Facts(zeros_PS, zeros_PS, run.train.margin[items], run.train.weight[items], ranks_PS)
    terms = run.stage.terms(zeros_PS, facts)
    return {
        name: float(evaluation.ratio(values.sum(), counts.sum()))
        for name, (values, counts) in terms.items()
        if name in known
    }


def _notes(run: Run) -> list[str]:
    if run.stage.needs_reference:
        return ["before its first step the policy is its own reference, so margins are rounding"]
    if run.stage.name == "sft":
        vocab = decoder_config(run.source).vocab_size
        return [f"a model that knows nothing has loss ln {vocab} = {math.log(vocab):.4f}"]
    return []
