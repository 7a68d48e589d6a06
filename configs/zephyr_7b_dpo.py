"""DPO of Zephyr 7B's SFT model on UltraFeedback, which ExPO extrapolates, on 8 devices.

    python -m alignjax.train --config=zephyr_7b_dpo

Not yet run. ExPO (arXiv 2404.16792) gives the settings but the length, which is that of the
alignment handbook's zephyr-7b-dpo-full (there a prompt has at most 512 tokens as well, and what is
longer is cut; here pairs with a longer side are dropped), and AdamW's b2, transformers' default.

The paper also trains on 5, 10, 20 and 40 % of the pairs: 3,056, 6,113, 12,227 and 24,454 of the
61,135 that HuggingFaceH4/ultrafeedback_binarized has today (61,966 in its first release). Which
ones it took is not public. For such a run give a file with so many rows as data.path.
"""

from alignjax.config import DPO, Batch, Data, Mesh, Model, Optimizer

config = DPO(
    name="zephyr_7b_dpo",
    beta=0.01,
    model=Model(path="alignment-handbook/zephyr-7b-sft-full"),
    mesh=Mesh(fsdp=8),
    data=Data(
        path="HuggingFaceH4/ultrafeedback_binarized",
        split="train_prefs",
        eval_split="test_prefs",
        max_length=1024,
    ),
    batch=Batch(pairs=128, row_length=2048),
    optimizer=Optimizer(learning_rate=5e-7, schedule="cosine", warmup_ratio=0.1, b2=0.999),
)
