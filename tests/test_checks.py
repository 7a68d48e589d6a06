"""Settings that cannot work, or not together, and the sentences that refuse them."""

import dataclasses
import math
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest

from alignjax.checks import check_evaluation, check_training
from alignjax.config import DPO, RM, SFT, Batch, Data, Model, Optimizer, RMEval, Rows, Samples
from alignjax.convert import Convert
from alignjax.errors import UserError
from alignjax.expo import Expo
from alignjax.inspect import Inspect
from alignjax.validate import check

RUNNABLE = DPO(model=Model(path="m"), data=Data(path="d.jsonl"), batch=Batch(pairs=4))


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            dataclasses.replace(RUNNABLE, batch=Batch(pairs=4, sequences=4)),
            "batch.sequences is not for this stage; use batch.pairs or batch.rows.",
        ),
        (
            SFT(model=Model("m"), data=Data("d"), batch=Batch(pairs=4)),
            "batch.pairs is not for this stage; use batch.sequences or batch.rows.",
        ),
        (
            dataclasses.replace(RUNNABLE, batch=Batch()),
            "set exactly one of batch.pairs and batch.rows to more than 0.",
        ),
        (
            dataclasses.replace(RUNNABLE, batch=Batch(pairs=4, rows=4)),
            "set exactly one of batch.pairs and batch.rows to more than 0.",
        ),
        (
            SFT(model=Model("m"), data=Data("d"), batch=Batch(sequences=4, rows=4)),
            "set exactly one of batch.sequences and batch.rows to more than 0.",
        ),
        (
            dataclasses.replace(RUNNABLE, samples=Samples(kl=True, temperature=1)),
            "samples.kl measures answers: set samples.prompts to more than 0.",
        ),
        (
            dataclasses.replace(RUNNABLE, samples=Samples(kl=True, prompts=8)),
            "samples.kl measures the policy's own answers: set samples.temperature=1.",
        ),
        (
            SFT(model=Model("m"), data=Data("d"), batch=Batch(rows=4), samples=Samples(kl=True)),
            "samples.kl is for dpo, which has a reference; leave it out.",
        ),
        (
            dataclasses.replace(RUNNABLE, optimizer=Optimizer(ema_decay=1.0)),
            "optimizer.ema_decay=1.0: it must be at least 0 and below 1.",
        ),
        (
            dataclasses.replace(RUNNABLE, data=Data("d", max_responses=8)),
            "data.max_responses is for sets of responses, which this stage does not train on.",
        ),
        (
            RM(model=Model("m"), data=Data("d", max_responses=1), batch=Batch(pairs=4)),
            "data.max_responses=1: a set needs 2 at least; 0 keeps all.",
        ),
        (
            dataclasses.replace(RUNNABLE, model=Model()),
            "model.path is empty: name a model directory, ORG/NAME or GGUF file.",
        ),
        (
            dataclasses.replace(RUNNABLE, data=Data()),
            "data.path is empty: name files, a dataset directory or ORG/NAME.",
        ),
        (
            dataclasses.replace(
                RUNNABLE, data=Data("d", max_length=1025), batch=Batch(pairs=4, row_length=2049)
            ),
            "data.max_length=1025 does not fit 2 to a row of batch.row_length=2049: "
            "make it 1024 or less.",
        ),
        (
            SFT(
                model=Model("m"),
                data=Data("d", max_length=513),
                batch=Batch(sequences=4, row_length=512),
            ),
            "data.max_length=513 does not fit 1 to a row of batch.row_length=512: "
            "make it 512 or less.",
        ),
    ],
)
def test_check_refuses(config, sentence):
    with pytest.raises(ValueError) as caught:
        check_training(config)
    assert str(caught.value) == sentence


@pytest.mark.parametrize("text", ["a\0b", "/d/\udcff"])
def test_paths_are_text(text):
    for change in ({"run_dir": text}, {"model": Model(text)}, {"data": Data("d", cache_dir=text)}):
        with pytest.raises(UserError, match="it must be UTF-8, and without NUL; rename it"):
            check_training(dataclasses.replace(RUNNABLE, **change))


def test_check_passes_what_just_fits():
    check_training(
        dataclasses.replace(
            RUNNABLE, data=Data("d", max_length=1024), batch=Batch(pairs=4, row_length=2048)
        )
    )
    fits = Batch(rows=4, row_length=512)
    check_training(SFT(model=Model("m"), data=Data("d", max_length=512), batch=fits))


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            RMEval(data=Data("d")),
            "model.path is empty: name a model directory, ORG/NAME or GGUF file.",
        ),
        (
            RMEval(model=Model("m")),
            "data.path and data.eval_path are empty: name files, a dataset directory or ORG/NAME.",
        ),
        (
            RMEval(model=Model("m"), data=Data("d", max_length=65), batch=Rows(row_length=128)),
            "data.max_length=65 does not fit 2 to a row of batch.row_length=128: make it 64 or "
            "less.",
        ),
        (
            RMEval(model=Model("m"), data=Data("d"), batch=Rows(rows_per_device=0)),
            "batch.rows_per_device=0: it must be at least 1 and at most 65536.",
        ),
    ],
)
def test_check_refuses_an_evaluation(config, sentence):
    with pytest.raises(ValueError) as caught:
        check_evaluation(config)
    assert str(caught.value) == sentence


EVERY_CONFIG = [
    RUNNABLE,
    SFT(model=Model("m"), data=Data("d"), batch=Batch(sequences=4)),
    RM(model=Model("m"), data=Data("d"), batch=Batch(pairs=4)),
    RMEval(model=Model("m"), data=Data("d")),
    Inspect(),
    Convert("a", "b"),
    Expo("a", "b", "0.3"),
]
ODD = [0, -1, 2, math.nan, math.inf, 1e308, 10**20, 10**400, "x", None, [], ("x",), True]
ODD += [np.float64(0.5), np.int64(2), Path("x"), b"x"]


def odd_ones(value, key: str = ""):
    """Every form of a config in which one field has an odd value, with its key."""
    for item in dataclasses.fields(value):
        own, name = getattr(value, item.name), f"{key}{item.name}"
        inner = odd_ones(own, f"{name}.") if dataclasses.is_dataclass(own) else []
        for where, odd, changed in [*inner, *((name, odd, odd) for odd in ODD)]:
            yield where, odd, dataclasses.replace(value, **{item.name: changed})


def allowed(config, key: str, value) -> bool:
    """Whether the field's annotation, read by itself, allows a value."""
    *sections, name = key.split(".")
    for section in sections:
        config = getattr(config, section)
    hint = get_type_hints(type(config), include_extras=True)[name]
    kind, *bounds = get_args(hint) if hasattr(hint, "__metadata__") else (hint,)
    if kind in (int, float):
        if type(value) is not int and not (kind is float and type(value) is float):
            return False
        low, high, above, below = bounds[0]
        return (
            (low is None or value >= low)
            and (high is None or value <= high)
            and (above is None or value > above)
            and (below is None or value < below)
        )
    return type(value) is kind if kind in (str, bool) else value in get_args(kind)


@pytest.mark.parametrize("config", EVERY_CONFIG, ids=lambda config: type(config).__name__)
def test_every_field_is_within_its_bounds_or_refused_by_name(config):
    forms = list(odd_ones(config))
    assert len(forms) >= 3 * len(ODD)
    for key, odd, changed in forms:
        try:
            check(changed, type(changed), "here")
        except UserError as error:
            assert str(error).startswith(f"here: {key}="), (key, odd)
            assert not allowed(config, key, odd), (key, odd)
        else:
            assert allowed(config, key, odd), (key, odd)


@pytest.mark.parametrize("config", EVERY_CONFIG[:4], ids=lambda config: type(config).__name__)
def test_no_field_ends_the_checks_in_another_way(config):
    for key, _, changed in odd_ones(config):
        try:
            (check_evaluation if isinstance(config, RMEval) else check_training)(changed)
        except UserError as error:
            assert key.rpartition(".")[2] in str(error)
