"""DPO of SmolLM2-135M-Instruct on a sample of UltraFeedback's binarized pairs.

python -m alignjax.train --config=dpo_smollm2_ultrafeedback --data.path=FILE
"""

from alignjax.config import DPO, Batch, Checkpoint, Compute, Data, Log, Model, Optimizer, Samples

config = DPO(
    name="dpo_smollm2_ultrafeedback",
    beta=0.1,
    model=Model(path="smollm2-135m-instruct"),
    compute=Compute(dtype="float32", remat="dots"),
    data=Data(path="data/ultrafeedback_sample.jsonl", max_length=384),
    batch=Batch(pairs=4, row_length=768, rows_per_device=1, max_steps=60),
    optimizer=Optimizer(learning_rate=5e-6, schedule="linear", warmup_ratio=0.1),
    checkpoint=Checkpoint(every=30, keep=1),
    log=Log(every=1, eval_every=1000),
    samples=Samples(prompts=3, max_tokens=128),
)
