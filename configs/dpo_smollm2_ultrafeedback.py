"""DPO of SmolLM2-135M-Instruct on a sample of UltraFeedback's binarized pairs.

    python -m alignjax.train --config=dpo_smollm2_ultrafeedback --data.path=FILE

The file holds rows `prompt`, `chosen`, `rejected` (strings) and `split` (train or test). Such data:
HuggingFaceH4/ultrafeedback_binarized on the Hugging Face hub (MIT), written out as JSON lines.

Lengths are cut short so that the run fits two CPU cores: sides above 384 tokens are dropped, which
leaves 35 % of the pairs. Seen on 994 + 199 pairs with 2 cores of an AMD EPYC (Zen 4), float32, busy
with other work at the same time: 350 training pairs kept and 74 held out; 4.0 pairs, 3.0 rows and
1,671 tokens a step, fill 73.3 %; 50 useful tokens a second over the run, 126 in its best step; peak
memory 7.3 GiB. Held out, from step 0 to step 60: loss 0.6931 to 0.6700 (change -0.0232, 95 %
interval -0.0430 to -0.0028), accuracy 50.0 % to 64.9 % (+14.9 points, +4.1 to +25.7), margin 0 to
0.0555. "The longer answer wins" is right in 45.9 %.
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
