"""Xwin-LM on Llama-2 7B, 13B and 70B: SFT, reward model, DPO (arXiv 2405.20335).

    python -m alignjax.train --config=xwin_sft_70b --data.path=CONVERSATIONS
    python -m alignjax.train --config=xwin_rm_70b --data.path=PAIRS
    python -m alignjax.train --config=xwin_dpo_70b --data.path=PAIRS

Or sft_70b, rm_70b, dpo_70b. Not yet run. RM and DPO start from the export of the SFT run of their
size, in runs/ of the working directory; --model.path names another.

From the paper: the base models, the order of the stages, Vicuna v1.1's conversation text. The data
are not public (instructions; Xwin-Pair, preferences by GPT-4; Xwin-Set, 64 answers a prompt ranked
by the reward model, of which DPO takes pairs), so data.path is left to the user. Public pairs:

    --data.path=HuggingFaceH4/ultrafeedback_binarized
    --data.split=train_prefs --data.eval_split=test_prefs

The settings are not public either, nor is what the reward models start from. In their place:
- SFT: Tulu 2's (arXiv 2311.10702): 2e-5, 1e-5 for 70B, warm-up 0.03, 128 sequences, 2 epochs;
- RM: EasyLM's: 1e-5 down to 1e-6, warm-up 0.03, 512 pairs, 1 epoch, overlong pairs dropped;
- DPO: Tulu 2's, of its 70B run on a TPU v3-512: 5e-7, warm-up 0.1, 32 pairs, 3 epochs, beta 0.1;
- sequences of up to 4096 tokens, Llama-2's context.
"""

from alignjax.config import DPO, RM, SFT, Batch, Data, Mesh, Model, Optimizer

MESHES = {"7b": Mesh(fsdp=8), "13b": Mesh(fsdp=8), "70b": Mesh(fsdp=16, tensor=4)}
# The 32 pairs of a DPO step fill few rows: 64 devices split them into 4 parts.
DPO_MESHES = MESHES | {"70b": Mesh(fsdp=4, tensor=16)}
DATA = Data(eval_fraction=0.01, max_length=4096)


def sft(size: str, learning_rate: float = 2e-5) -> SFT:
    return SFT(
        name=f"xwin_sft_{size}",
        model=Model(path=f"meta-llama/Llama-2-{size}-hf", chat_template="vicuna"),
        mesh=MESHES[size],
        data=DATA,
        batch=Batch(sequences=128, row_length=4096, epochs=2),
        optimizer=Optimizer(learning_rate=learning_rate, schedule="linear", warmup_ratio=0.03),
    )


def rm(size: str) -> RM:
    return RM(
        name=f"xwin_rm_{size}",
        model=Model(path=f"runs/xwin_sft_{size}/export"),
        mesh=MESHES[size],
        data=DATA,
        batch=Batch(pairs=512, row_length=8192),
        optimizer=Optimizer(
            learning_rate=1e-5, schedule="cosine", warmup_ratio=0.03, final_ratio=0.1
        ),
    )


def dpo(size: str) -> DPO:
    return DPO(
        name=f"xwin_dpo_{size}",
        beta=0.1,
        model=Model(path=f"runs/xwin_sft_{size}/export"),
        mesh=DPO_MESHES[size],
        data=DATA,
        batch=Batch(pairs=32, row_length=8192, epochs=3),
        optimizer=Optimizer(learning_rate=5e-7, schedule="linear", warmup_ratio=0.1),
    )


configs = {
    "xwin_sft_7b": ("SFT of Llama-2 7B on conversations, as Xwin-LM, on 8 devices.", sft("7b")),
    "xwin_sft_13b": ("SFT of Llama-2 13B on conversations, as Xwin-LM, on 8 devices.", sft("13b")),
    "xwin_sft_70b": (
        "SFT of Llama-2 70B on conversations, as Xwin-LM, on 64 devices.",
        sft("70b", learning_rate=1e-5),
    ),
    "xwin_rm_7b": ("Reward model from xwin_sft_7b, as Xwin-RM, on 8 devices.", rm("7b")),
    "xwin_rm_13b": ("Reward model from xwin_sft_13b, as Xwin-RM, on 8 devices.", rm("13b")),
    "xwin_rm_70b": ("Reward model from xwin_sft_70b, as Xwin-RM, on 64 devices.", rm("70b")),
    "xwin_dpo_7b": ("DPO of xwin_sft_7b on ranked answers, as Xwin-LM, on 8 devices.", dpo("7b")),
    "xwin_dpo_13b": (
        "DPO of xwin_sft_13b on ranked answers, as Xwin-LM, on 8 devices.",
        dpo("13b"),
    ),
    "xwin_dpo_70b": (
        "DPO of xwin_sft_70b on ranked answers, as Xwin-LM, on 64 devices.",
        dpo("70b"),
    ),
}
configs |= {
    name.removeprefix("xwin_"): (f"Short for {name}.", config)
    for name, (_, config) in configs.items()
}
