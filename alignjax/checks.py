"""Refuses settings that cannot work, or not together, before anything is loaded."""

from alignjax import validate
from alignjax.config import DPO, RM, SFT, Batch, Data, Model, RMEval, Rows, Training
from alignjax.errors import UserError

_MOST_TOKENS = 1 << 26  # of a micro-batch on a device


def _refuse(wrong: object, why: str) -> None:
    if wrong:
        raise UserError(why)


def check_training(config: Training) -> None:
    """Raises UserError for what a run cannot begin with."""
    validate.check(config, type(config), "")
    batch, data, kl = config.batch, config.data, config.samples.kl
    own, other = "pairs", "sequences"
    if isinstance(config, SFT):
        own, other = other, own
        for key in ("max_pairs", "max_prompt_length"):
            why = f"data.{key} is for pairs, which this stage does not train on."
            _refuse(getattr(data, key), why)
    why = f"batch.{other} is not for this stage; use batch.{own} or batch.rows."
    _refuse(getattr(batch, other), why)
    why = f"set exactly one of batch.{own} and batch.rows to more than 0."
    _refuse(bool(getattr(batch, own)) == bool(batch.rows), why)
    if isinstance(config, RM):
        why = "samples.prompts is not for this stage: a reward model gives no answers."
        _refuse(config.samples.prompts, why)
    else:
        why = "data.max_responses is for sets of responses, which this stage does not train on."
        _refuse(data.max_responses, why)
    if isinstance(config, DPO):
        _check_loss(config)
    why = "samples.kl is for dpo, which has a reference; leave it out."
    _refuse(kl and not isinstance(config, DPO), why)
    why = "samples.kl measures answers: set samples.prompts to more than 0."
    _refuse(kl and not config.samples.prompts, why)
    why = f"samples.temperature={config.samples.temperature} draws other answers than the policy's "
    _refuse(kl and config.samples.temperature != 1, f"{why}own, which samples.kl measures: set 1.")
    why = "data.train_on=everything is for sft: the sides of a pair share a prompt."
    _refuse(own == "pairs" and data.train_on == "everything", why)
    why = f"data.select={data.select} chooses nothing: set data.max_pairs, or leave it."
    _refuse(data.select != "random" and not data.max_pairs, why)
    _check_model(config.model)
    _refuse(not data.path, "data.path is empty: name files, a dataset directory or ORG/NAME.")
    _check_data(data, batch, 2 if own == "pairs" else 1)


def check_evaluation(config: RMEval) -> None:
    """Raises UserError for what an evaluation cannot begin with."""
    validate.check(config, type(config), "")
    _check_model(config.model)
    why = "data.path and data.eval_path are empty: name files, a dataset directory or ORG/NAME."
    _refuse(not (config.data.path or config.data.eval_path), why)
    _check_data(config.data, config.batch, 2)


def _check_loss(config: DPO) -> None:
    """Refuses numbers that the kind of loss has no use for."""
    kind, e = config.loss, config.label_smoothing
    why = f"label_smoothing={e} is not for loss={kind}: set it to 0."
    _refuse(e and kind in ("hinge", "ipo"), why)
    why = "label_smoothing=0.5 leaves loss=robust nothing to learn from: make it less."
    _refuse(e == 0.5 and kind == "robust", why)
    why = "reference.path is not for loss=simpo, which has no reference: leave it."
    _refuse(kind == "simpo" and config.reference.path and not config.samples.kl, why)
    if kind == "ipo":
        why = f"margin={config.margin} is not for loss=ipo, whose margin is 1 / (2 beta): set it "
        _refuse(config.margin, f"{why}to 0, and choose beta.")
        why = "beta=0 is not for loss=ipo, whose margin is 1 / (2 beta): raise it."
        _refuse(not config.beta, why)


def _check_model(model: Model) -> None:
    why = "model.path is empty: name a model directory, ORG/NAME or GGUF file."
    _refuse(not model.path, why)


def _check_data(data: Data, batch: Batch | Rows, sides: int) -> None:
    """Refuses lengths that do not fit: all `sides` of an item lie in one row."""
    rows, length = batch.rows_per_device, batch.row_length
    why = f"batch.rows_per_device={rows} rows of batch.row_length={length} are over "
    _refuse(rows * length > _MOST_TOKENS, f"{why}{_MOST_TOKENS:,} tokens on a device: lower one.")
    why = "data.max_responses=1: a set needs 2 at least; 0 keeps all."
    _refuse(data.max_responses == 1, why)
    why = f"data.max_length={data.max_length} does not fit {sides} to a row of batch.row_length="
    _refuse(data.max_length * sides > length, f"{why}{length}: make it {length // sides} or less.")
