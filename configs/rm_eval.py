"""How often a reward model prefers the chosen side of held-out pairs, by alignjax.evaluate.

    python -m alignjax.evaluate --config=rm_eval --model.path=RUN_DIR/export --data.path=FILE

It scores the rows that a training run with the same `data` keys holds out; `--data.eval_path=FILE`
takes all rows of a file. The model is an `rm` run, a checkpoint of it, its export, or another
classifier of one label. Shown are the accuracy with its 95 % interval beside that of "the longer
answer wins", overall, by the rows' `source` and by the prompt's user turns, and the calibration;
`--out=DIR` writes it to results.json, and the rewards of each pair to pairs.jsonl. Of a file of
sets all ordered pairs count, an interval counts each set once, and the rewards are in sets.jsonl.
"""

from alignjax.config import Compute, Data, Model, RMEval, Rows

config = RMEval(
    name="rm_eval",
    model=Model(path="runs/rm_smollm2/export"),
    compute=Compute(dtype="float32"),
    data=Data(path="data/hh.jsonl,data/ultrafeedback.jsonl", max_length=384),
    batch=Rows(row_length=768, rows_per_device=2),
)
