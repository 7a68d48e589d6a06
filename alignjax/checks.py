"""Refuses settings that cannot work, or not together, before anything is loaded."""

from alignjax import validate
from alignjax.config import DPO, RM, SFT, Batch, Data, Model, RMEval, Rows, Training
from alignjax.errors import UserError

_MOST_TOKENS = 1 << 26  # of a micro-batch on a device


def check_training(config: Training) -> None:
    """Raises UserError for what a run cannot begin with."""
    validate.check(config, type(config), "")
    batch = config.batch
    own = "sequences" if isinstance(config, SFT) else "pairs"
    other = "sequences" if own == "pairs" else "pairs"
    if getattr(batch, other):
        raise UserError(f"batch.{other} is not for this stage; use batch.{own} or batch.rows.")
    if bool(getattr(batch, own)) == bool(batch.rows):
        raise UserError(f"set exactly one of batch.{own} and batch.rows to more than 0.")
    if isinstance(config, RM) and config.samples.prompts:
        raise UserError("samples.prompts is not for this stage: a reward model gives no answers.")
    if isinstance(config, DPO):
        _check_loss(config)
    if config.samples.kl:
        _check_kl(config)
    if own == "pairs" and config.data.train_on == "everything":
        raise UserError("data.train_on=everything is for sft: the sides of a pair share a prompt.")
    for key in ("max_pairs", "max_prompt_length"):
        if own == "sequences" and getattr(config.data, key):
            raise UserError(f"data.{key} is for pairs, which this stage does not train on.")
    if config.data.max_responses and not isinstance(config, RM):
        raise UserError(
            "data.max_responses is for sets of responses, which this stage does not train on."
        )
    if config.data.select != "random" and not config.data.max_pairs:
        raise UserError(
            f"data.select={config.data.select} chooses nothing: set data.max_pairs, or leave it."
        )
    _check_model(config.model)
    if not config.data.path:
        raise UserError("data.path is empty: name files, a dataset directory or ORG/NAME.")
    _check_data(config.data, batch, 2 if own == "pairs" else 1)


def check_evaluation(config: RMEval) -> None:
    """Raises UserError for what an evaluation cannot begin with."""
    validate.check(config, type(config), "")
    _check_model(config.model)
    if not (config.data.path or config.data.eval_path):
        raise UserError(
            "data.path and data.eval_path are empty: name files, a dataset directory or ORG/NAME."
        )
    _check_data(config.data, config.batch, 2)


def _check_kl(config: Training) -> None:
    """Refuses to measure what no answers, or answers of another distribution, can tell."""
    if not isinstance(config, DPO):
        raise UserError("samples.kl is for dpo, which has a reference; leave it out.")
    if not config.samples.prompts:
        raise UserError("samples.kl measures answers: set samples.prompts to more than 0.")
    if config.samples.temperature != 1:
        raise UserError(
            f"samples.temperature={config.samples.temperature} draws other answers than the "
            "policy's own, which samples.kl measures: set it to 1."
        )


def _check_loss(config: DPO) -> None:
    """Refuses numbers that the kind of loss has no use for."""
    kind, e = config.loss, config.label_smoothing
    if e and kind in ("hinge", "ipo"):
        raise UserError(f"label_smoothing={e} is not for loss={kind}: set it to 0.")
    if kind == "robust" and e == 0.5:
        raise UserError(
            "label_smoothing=0.5 leaves loss=robust nothing to learn from: make it less."
        )
    if kind == "ipo" and config.margin:
        raise UserError(
            f"margin={config.margin} is not for loss=ipo, whose margin is 1 / (2 beta): set it to "
            "0, and choose beta."
        )
    if kind == "ipo" and not config.beta:
        raise UserError("beta=0 is not for loss=ipo, whose margin is 1 / (2 beta): raise it.")


def _check_model(model: Model) -> None:
    if not model.path:
        raise UserError("model.path is empty: name a model directory, ORG/NAME or GGUF file.")


def _check_data(data: Data, batch: Batch | Rows, sides: int) -> None:
    """Refuses lengths that do not fit: all `sides` of an item lie in one row."""
    row_length = batch.row_length
    if batch.rows_per_device * row_length > _MOST_TOKENS:
        raise UserError(
            f"batch.rows_per_device={batch.rows_per_device} rows of batch.row_length={row_length} "
            f"are over {_MOST_TOKENS:,} tokens on a device: lower one of them."
        )
    if data.max_responses == 1:
        raise UserError("data.max_responses=1: a set needs 2 at least; 0 keeps all.")
    if data.max_length * sides > row_length:
        raise UserError(
            f"data.max_length={data.max_length} does not fit {sides} to a row of "
            f"batch.row_length={row_length}: make it {row_length // sides} or less."
        )
