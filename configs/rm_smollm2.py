"""A reward model from SmolLM2-135M-Instruct, on a sample of UltraFeedback's binarized pairs.

    python -m alignjax.train --config=rm_smollm2 --data.path=FILE

The file holds rows `prompt`, `chosen`, `rejected` (strings) and `split` (train or test). Such data:
HuggingFaceH4/ultrafeedback_binarized on the Hugging Face hub (MIT), written out as JSON lines.
Sides above 384 tokens are dropped, so that the run fits two CPU cores. Not run to its end yet.
"""

from alignjax.config import RM, Batch, Checkpoint, Compute, Data, Log, Model, Optimizer

config = RM(
    name="rm_smollm2",
    model=Model(path="smollm2-135m-instruct"),
    compute=Compute(dtype="float32", remat="dots"),
    data=Data(path="data/ultrafeedback_sample.jsonl", max_length=384),
    batch=Batch(pairs=8, row_length=768, rows_per_device=1, max_steps=60),
    optimizer=Optimizer(learning_rate=2e-5, schedule="linear", warmup_ratio=0.1),
    checkpoint=Checkpoint(every=30, keep=1),
    log=Log(every=1, eval_every=20),
)
