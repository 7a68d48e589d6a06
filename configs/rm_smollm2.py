"""A reward model from SmolLM2-135M-Instruct, on samples of Anthropic's HH-RLHF and UltraFeedback.

    python -m alignjax.train --config=rm_smollm2 --data.path=FILE,FILE

The files hold rows `prompt`, `chosen`, `rejected` (strings or messages) and `split` (train or
test). Such data: Anthropic/hh-rlhf and HuggingFaceH4/ultrafeedback_binarized on the Hugging Face
hub (both MIT), written out as JSON lines. Sides above 384 tokens are dropped, so that the run fits
two CPU cores.

Run to its end on 2,000 and 994 such rows, 768 pairs of them trained on, and 503 pairs held out of
both: accuracy 55.5 %, 95 % interval 51.1 to 59.8 (a start with a score head of zeros has 50 %; the
change's interval is +1.1 to +9.8 points), loss 0.6890; "the longer answer wins" is right in 51.6 %.
So short a run of so small a model learns little.
"""

from alignjax.config import RM, Batch, Checkpoint, Compute, Data, Log, Model, Optimizer

config = RM(
    name="rm_smollm2",
    model=Model(path="smollm2-135m-instruct"),
    compute=Compute(dtype="float32", remat="dots"),
    data=Data(path="data/hh.jsonl,data/ultrafeedback.jsonl", max_length=384),
    batch=Batch(pairs=12, row_length=768, rows_per_device=1, max_steps=64),
    optimizer=Optimizer(learning_rate=5e-5, schedule="linear", warmup_ratio=0.1),
    checkpoint=Checkpoint(every=8, keep=1),
    log=Log(every=1, eval_every=64),
)
