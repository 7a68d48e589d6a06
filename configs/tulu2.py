"""Tulu 2's DPO of 7B, 13B and 70B on UltraFeedback (arXiv 2311.10702).

    python -m alignjax.train --config=tulu2_70b_dpo

Not yet run. The settings are those of the published 70B run, on a TPU v3-512. The pairs are
HuggingFaceH4/ultrafeedback_binarized's: 61,135 today, 61,966 in its first release. ExPO
(arXiv 2404.16792) extrapolates the published models, with alpha = 0.5.

A side may have 8192 tokens, so a row has 16384, and the 32 pairs of a step, most of which are
short, fill only two or three of them. So the mesh splits the batch into few parts.
"""

from alignjax.config import DPO, Batch, Data, Mesh, Model, Optimizer


def dpo(size: str, mesh: Mesh) -> DPO:
    return DPO(
        name=f"tulu2_{size}_dpo",
        beta=0.1,
        model=Model(path=f"allenai/tulu-2-{size}", chat_template="tulu"),
        mesh=mesh,
        data=Data(
            path="HuggingFaceH4/ultrafeedback_binarized",
            split="train_prefs",
            eval_split="test_prefs",
            max_length=8192,
        ),
        batch=Batch(pairs=32, row_length=16384, epochs=3),
        optimizer=Optimizer(learning_rate=5e-7, schedule="linear", warmup_ratio=0.1),
    )


configs = {
    "tulu2_7b_dpo": (
        "DPO of Tulu 2 7B on UltraFeedback, on 8 devices.",
        dpo("7b", Mesh(fsdp=2, tensor=4)),
    ),
    "tulu2_13b_dpo": (
        "DPO of Tulu 2 13B on UltraFeedback, on 8 devices.",
        dpo("13b", Mesh(fsdp=2, tensor=4)),
    ),
    "tulu2_70b_dpo": (
        "DPO of Tulu 2 70B on UltraFeedback, on 64 devices.",
        dpo("70b", Mesh(fsdp=4, tensor=16)),
    ),
}
