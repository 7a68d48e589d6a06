"""Refuses settings that cannot work, or not together, before anything is loaded."""

import re
from collections.abc import Iterator

from alignjax import validate
from alignjax.config import DPO, RM, SFT, RMEval, Training, flat, to_dict
from alignjax.errors import UserError

_MOST_TOKENS = 1 << 26  # of a micro-batch on a device


def check_training(config: Training) -> None:
    """Raises UserError for what a run cannot begin with."""
    _refuse(config, _of_training(config))


def check_evaluation(config: RMEval) -> None:
    """Raises UserError for what an evaluation cannot begin with."""
    _refuse(config, _of_evaluation(config))


def _refuse(config: Training | RMEval, problems: Iterator[str]) -> None:
    validate.check(config, type(config), "")
    for key, value in flat(to_dict(config)).items():
        if re.search("[\0\ud800-\udfff]", str(value)):
            raise UserError(f"{key}={value!r}: it must be UTF-8, and without NUL; rename it.")
    for problem in problems:
        raise UserError(problem)


def _of_training(config: Training) -> Iterator[str]:
    batch, data, samples = config.batch, config.data, config.samples
    own, other = "pairs", "sequences"
    if isinstance(config, SFT):
        own, other = other, own
        for key in ("max_pairs", "max_prompt_length"):
            if getattr(data, key):
                yield f"data.{key} is for pairs, which this stage does not train on."
    if getattr(batch, other):
        yield f"batch.{other} is not for this stage; use batch.{own} or batch.rows."
    if bool(getattr(batch, own)) == bool(batch.rows):
        yield f"set exactly one of batch.{own} and batch.rows to more than 0."
    if isinstance(config, RM) and samples.prompts:
        yield "samples.prompts is not for this stage: a reward model gives no answers."
    if not isinstance(config, RM) and data.max_responses:
        yield "data.max_responses is for sets of responses, which this stage does not train on."
    if isinstance(config, DPO):
        yield from _of_loss(config)
    if samples.kl:
        if not isinstance(config, DPO):
            yield "samples.kl is for dpo, which has a reference; leave it out."
        if not samples.prompts:
            yield "samples.kl measures answers: set samples.prompts to more than 0."
        if samples.temperature != 1:
            yield "samples.kl measures the policy's own answers: set samples.temperature=1."
    if own == "pairs" and data.train_on == "everything":
        yield "data.train_on=everything is for sft: the sides of a pair share a prompt."
    if data.select != "random" and not data.max_pairs:
        yield f"data.select={data.select} chooses nothing: set data.max_pairs, or leave it."
    if not data.path:
        yield "data.path is empty: name files, a dataset directory or ORG/NAME."
    yield from _of_input(config, 2 if own == "pairs" else 1)


def _of_evaluation(config: RMEval) -> Iterator[str]:
    if not (config.data.path or config.data.eval_path):
        yield "data.path and data.eval_path are empty: name files, a dataset directory or ORG/NAME."
    yield from _of_input(config, 2)


def _of_loss(config: DPO) -> Iterator[str]:
    """Numbers that the kind of loss has no use for."""
    kind, e = config.loss, config.label_smoothing
    if e and kind in ("hinge", "ipo"):
        yield f"label_smoothing={e} is not for loss={kind}: set it to 0."
    if e == 0.5 and kind == "robust":
        yield "label_smoothing=0.5 leaves loss=robust nothing to learn from: make it less."
    if kind == "simpo" and config.reference.path and not config.samples.kl:
        yield "reference.path is not for loss=simpo, which has no reference: leave it."
    if kind == "ipo" and config.margin:
        yield f"margin={config.margin} is not for loss=ipo, whose margin is 1 / (2 beta): set 0."
    if kind == "ipo" and not config.beta:
        yield "beta=0 is not for loss=ipo, whose margin is 1 / (2 beta): raise it."


def _of_input(config: Training | RMEval, sides: int) -> Iterator[str]:
    """No model, or lengths that do not fit: all `sides` of an item lie in one row."""
    data, rows, length = config.data, config.batch.rows_per_device, config.batch.row_length
    if not config.model.path:
        yield "model.path is empty: name a model directory, ORG/NAME or GGUF file."
    if rows * length > _MOST_TOKENS:
        wrong = f"batch.rows_per_device={rows} rows of batch.row_length={length}"
        yield f"{wrong} are over {_MOST_TOKENS:,} tokens on a device: lower one."
    if data.max_responses == 1:
        yield "data.max_responses=1: a set needs 2 at least; 0 keeps all."
    if data.max_length * sides > length:
        yield (
            f"data.max_length={data.max_length} does not fit {sides} to a row of batch.row_length="
            f"{length}: make it {length // sides} or less."
        )
