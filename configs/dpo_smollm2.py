"""DPO of SmolLM2-135M-Instruct on 384 pairs of checkable instructions, on two CPU cores.

    python -m alignjax.train --config=dpo_smollm2

The data are the package's own (alignjax/demo): every couple of pairs shows the same two answers
under two opposed instructions, so neither the length of an answer nor any word in it decides.
"""

from pathlib import Path

import alignjax
from alignjax.config import DPO, Batch, Checkpoint, Compute, Data, Log, Model, Optimizer, Samples

config = DPO(
    name="dpo_smollm2",
    beta=0.1,
    model=Model(path="smollm2-135m-instruct"),
    compute=Compute(dtype="float32", remat="dots"),
    data=Data(path=str(Path(alignjax.__file__).parent / "demo" / "pairs.jsonl"), max_length=256),
    batch=Batch(pairs=12, row_length=512, rows_per_device=2, max_steps=16),
    optimizer=Optimizer(learning_rate=2e-5, schedule="linear", warmup_ratio=0.1),
    checkpoint=Checkpoint(every=10, keep=1),
    log=Log(every=1, eval_every=1000),
    samples=Samples(prompts=64, max_tokens=64, temperature=0.7),
)
