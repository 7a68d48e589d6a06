"""Refuses settings that cannot work, or not together, before anything is loaded."""

from alignjax.config import DPO, RM, SFT, Data, Model, RMEval, Training, flat, to_dict

_ANY = float("inf")
# What a number may be: the least and the most.
_BOUNDS = {
    "seed": (0, 2**32 - 1),
    "beta": (0, _ANY),
    "label_smoothing": (0, 0.5),
    "margin": (0, _ANY),
    "sft_weight": (0, _ANY),
    "centering": (0, _ANY),
    "compute.vocab_chunk": (1, _ANY),
    "data.max_pairs": (0, _ANY),
    "data.max_prompt_length": (0, _ANY),
    "data.max_responses": (0, _ANY),
    "batch.pairs": (0, _ANY),
    "batch.sequences": (0, _ANY),
    "batch.rows": (0, _ANY),
    "batch.row_length": (1, _ANY),
    "batch.rows_per_device": (1, _ANY),
    "batch.epochs": (1, _ANY),
    "batch.max_steps": (0, _ANY),
    "optimizer.learning_rate": (0, _ANY),
    "optimizer.warmup_ratio": (0, 1),
    "optimizer.final_ratio": (0, 1),
    "optimizer.b1": (0, 1),
    "optimizer.b2": (0, 1),
    "optimizer.eps": (0, _ANY),
    "optimizer.weight_decay": (0, _ANY),
    "optimizer.clip_norm": (0, _ANY),
    "optimizer.ema_decay": (0, 1),
    "checkpoint.every": (1, _ANY),
    "checkpoint.keep": (1, _ANY),
    "log.every": (1, _ANY),
    "log.eval_every": (1, _ANY),
    "samples.prompts": (0, _ANY),
    "samples.show": (0, _ANY),
    "samples.max_tokens": (1, _ANY),
    "samples.temperature": (0, _ANY),
    "samples.batch": (1, _ANY),
    "export.shard_bytes": (1, _ANY),
}


def check_training(config: Training) -> None:
    """Raises ValueError for what a run cannot begin with."""
    _check_bounds(config)
    batch = config.batch
    own = "sequences" if isinstance(config, SFT) else "pairs"
    other = "sequences" if own == "pairs" else "pairs"
    if getattr(batch, other):
        raise ValueError(f"batch.{other} is not for this stage; use batch.{own} or batch.rows.")
    if bool(getattr(batch, own)) == bool(batch.rows):
        raise ValueError(f"set exactly one of batch.{own} and batch.rows to more than 0.")
    if isinstance(config, RM) and config.samples.prompts:
        raise ValueError("samples.prompts is not for this stage: a reward model gives no answers.")
    if isinstance(config, DPO):
        _check_loss(config)
    if config.samples.kl:
        _check_kl(config)
    if own == "pairs" and config.data.train_on == "everything":
        raise ValueError("data.train_on=everything is for sft: the sides of a pair share a prompt.")
    for key in ("max_pairs", "max_prompt_length"):
        if own == "sequences" and getattr(config.data, key):
            raise ValueError(f"data.{key} is for pairs, which this stage does not train on.")
    if config.optimizer.ema_decay == 1:
        raise ValueError(
            "optimizer.ema_decay=1.0 keeps the weights that training starts from: make it less, "
            "such as 0.999."
        )
    if config.data.max_responses and not isinstance(config, RM):
        raise ValueError(
            "data.max_responses is for sets of responses, which this stage does not train on."
        )
    if config.data.select != "random" and not config.data.max_pairs:
        raise ValueError(
            f"data.select={config.data.select} chooses nothing: set data.max_pairs, or leave it."
        )
    _check_model(config.model)
    if not config.data.path:
        raise ValueError("data.path is empty: name files, a dataset directory or ORG/NAME.")
    _check_data(config.data, batch.row_length, 2 if own == "pairs" else 1)


def check_evaluation(config: RMEval) -> None:
    """Raises ValueError for what an evaluation cannot begin with."""
    _check_bounds(config)
    _check_model(config.model)
    if not (config.data.path or config.data.eval_path):
        raise ValueError(
            "data.path and data.eval_path are empty: name files, a dataset directory or ORG/NAME."
        )
    _check_data(config.data, config.batch.row_length, 2)


def _check_kl(config: Training) -> None:
    """Refuses to measure what no answers, or answers of another distribution, can tell."""
    if not isinstance(config, DPO):
        raise ValueError("samples.kl is for dpo, which has a reference; leave it out.")
    if not config.samples.prompts:
        raise ValueError("samples.kl measures answers: set samples.prompts to more than 0.")
    if config.samples.temperature != 1:
        raise ValueError(
            f"samples.temperature={config.samples.temperature} draws other answers than the "
            "policy's own, which samples.kl measures: set it to 1."
        )


def _check_loss(config: DPO) -> None:
    """Refuses numbers that the kind of loss has no use for."""
    kind, e = config.loss, config.label_smoothing
    if e and kind in ("hinge", "ipo"):
        raise ValueError(f"label_smoothing={e} is not for loss={kind}: set it to 0.")
    if kind == "robust" and e == 0.5:
        raise ValueError(
            "label_smoothing=0.5 leaves loss=robust nothing to learn from: make it less."
        )
    if kind == "ipo" and config.margin:
        raise ValueError(
            f"margin={config.margin} is not for loss=ipo, whose margin is 1 / (2 beta): set it to "
            "0, and choose beta."
        )
    if kind == "ipo" and not config.beta:
        raise ValueError("beta=0 is not for loss=ipo, whose margin is 1 / (2 beta): raise it.")


def _check_bounds(config: Training | RMEval) -> None:
    values = flat(to_dict(config))
    for key, (low, high) in _BOUNDS.items():
        value = values.get(key, low)
        if not low <= value <= high:
            most = "" if high == _ANY else f" and at most {high:g}"
            raise ValueError(f"{key}={value}: it must be at least {low:g}{most}.")


def _check_model(model: Model) -> None:
    if not model.path:
        raise ValueError("model.path is empty: name a model directory, ORG/NAME or GGUF file.")


def _check_data(data: Data, row_length: int, sides: int) -> None:
    """Refuses lengths that do not fit: all `sides` of an item lie in one row."""
    if data.max_length < 2:
        raise ValueError(
            f"data.max_length={data.max_length}: it must be at least 2, for a token and what comes "
            "before it."
        )
    if data.max_responses == 1:
        raise ValueError("data.max_responses=1: a set needs 2 at least; 0 keeps all.")
    if not 0 <= data.eval_fraction < 1:
        raise ValueError(
            f"data.eval_fraction={data.eval_fraction}: it must be at least 0 and below 1."
        )
    if data.max_length * sides > row_length:
        raise ValueError(
            f"data.max_length={data.max_length} does not fit {sides} to a row of "
            f"batch.row_length={row_length}: make it {row_length // sides} or less."
        )
