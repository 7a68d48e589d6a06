"""Settings that cannot work, or not together, and the sentences that refuse them."""

import dataclasses

import pytest

from alignjax.checks import check_training
from alignjax.config import DPO, SFT, Batch, Data, Model

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


def test_check_passes_what_just_fits():
    check_training(
        dataclasses.replace(
            RUNNABLE, data=Data("d", max_length=1024), batch=Batch(pairs=4, row_length=2048)
        )
    )
    fits = Batch(rows=4, row_length=512)
    check_training(SFT(model=Model("m"), data=Data("d", max_length=512), batch=fits))
