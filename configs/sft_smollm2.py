"""SFT of SmolLM2-135M-Instruct on a sample of databricks-dolly-15k's conversations.

python -m alignjax.train --config=sft_smollm2 --data.path=FILE
"""

from alignjax.config import SFT, Batch, Checkpoint, Compute, Data, Log, Model, Optimizer, Samples

config = SFT(
    name="sft_smollm2",
    model=Model(path="smollm2-135m-instruct"),
    compute=Compute(dtype="float32", remat="dots"),
    data=Data(
        path="data/dolly_sft_sample.jsonl",
        eval_fraction=0.05,
        max_length=512,
        overlong="truncate",
    ),
    batch=Batch(sequences=8, row_length=512, rows_per_device=2, max_steps=60),
    optimizer=Optimizer(learning_rate=2e-5, schedule="cosine", warmup_ratio=0.1),
    checkpoint=Checkpoint(every=30, keep=1),
    log=Log(every=1, eval_every=1000),
    samples=Samples(prompts=3, max_tokens=128),
)
