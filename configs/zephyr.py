"""DPO of Zephyr 7B's SFT model on UltraFeedback, and on parts of it, which ExPO extrapolates.

    python -m alignjax.train --config=zephyr_7b_dpo
    python -m alignjax.train --config=zephyr_7b_dpo_10

Not yet run. ExPO (arXiv 2404.16792) gives the settings but the lengths, which are those of the
alignment handbook's zephyr-7b-dpo-full (there a pair that is still too long with its prompt cut to
512 tokens has its answers cut; here it is dropped), and AdamW's b2, transformers' default.

The paper also trains on 5, 10, 20 and 40 % of the pairs: of the 61,135 that
HuggingFaceH4/ultrafeedback_binarized has today (61,966 in its first release). Which ones it took is
not public; here they are drawn at random, and a smaller part lies in each larger one.
"""

from dataclasses import replace

from alignjax.config import DPO, Batch, Data, Mesh, Model, Optimizer

PAIRS = 61_135

whole = DPO(
    name="zephyr_7b_dpo",
    beta=0.01,
    # Its own template has no BOS, which the handbook's trainers put in front of every sequence.
    model=Model(path="alignment-handbook/zephyr-7b-sft-full", chat_template="zephyr"),
    mesh=Mesh(fsdp=8),
    data=Data(
        path="HuggingFaceH4/ultrafeedback_binarized",
        split="train_prefs",
        eval_split="test_prefs",
        max_length=1024,
        max_prompt_length=512,
    ),
    batch=Batch(pairs=128, row_length=2048),
    optimizer=Optimizer(learning_rate=5e-7, schedule="cosine", warmup_ratio=0.1, b2=0.999),
)


def part(percent: int) -> DPO:
    pairs = PAIRS * percent // 100
    name = f"{whole.name}_{percent}"
    return replace(whole, name=name, data=replace(whole.data, max_pairs=pairs))


configs = {
    "zephyr_7b_dpo": ("DPO of Zephyr 7B's SFT model on UltraFeedback, on 8 devices.", whole),
    **{
        f"zephyr_7b_dpo_{percent}": (
            f"DPO of Zephyr 7B's SFT model on {percent} % of UltraFeedback, on 8 devices.",
            part(percent),
        )
        for percent in (5, 10, 20, 40)
    },
}
