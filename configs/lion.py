"""LIONs on Gemma-2b and Llama-3-8B: SFT, then DPO (arXiv 2407.06542).

    python -m alignjax.train --config=lion_llama3_8b_sft
    python -m alignjax.train --config=lion_llama3_8b_dpo

Not yet run. Settings, data and SFT models are public (github.com/Columbia-NLP-Lab/LionAlignment);
what they leave out of AdamW is transformers' default. DPO starts from the published SFT model; of
one's own: --model.path=runs/lion_llama3_8b_sft/export.

What differs here:
- Text: LIONs wrote ChatML, with tokenizers whose reserved tokens are <|im_start|> and <|im_end|>;
  here a base model has the turns of its own family. For theirs, name a directory with such a
  tokenizer: --model.path=DIR --model.chat_template=chatml.
- Prompts are cut (to 512 tokens for Gemma, 1024 for Llama) only where a side is longer than 2048.
- Held-out rows are ours.

In SFT only the special tokens' rows of the embedding learn, and Gemma has loss on all text, as in
the scripts that LIONs shipped. DPO mixes sets by weight.
"""

from alignjax.config import DPO, SFT, Batch, Data, Mesh, Model, Optimizer

CONVERSATIONS = (
    "Columbia-NLP/OpenHermes-2.5",
    "Columbia-NLP/MetaMathQA",
    "Columbia-NLP/orca-math-word-problems-200k",
    "HuggingFaceH4/ultrachat_200k",
    "HuggingFaceH4/capybara",
    "HuggingFaceH4/deita-10k-v0-sft",
    "Columbia-NLP/ruozhiba_en",
    "Columbia-NLP/Magicoder-Evol-Instruct-110K",
    "Columbia-NLP/SlimOrca-Dedup",
)
PAIRS = {
    "Columbia-NLP/DPO-distilabel-capybara-dpo-7k-binarized": 1,
    "Columbia-NLP/DPO-distilabel-intel-orca-dpo-pairs_cleaned": 1,
    "Columbia-NLP/DPO-UltraFeedback_binarized": 1,
    "Columbia-NLP/DPO-py-dpo-v0.1": 1,
    "Columbia-NLP/DPO-HelpSteer": 1,
    "Columbia-NLP/DPO-PKU-SafeRLHF": 0.1,
}
GEMMA_PAIRS = PAIRS | {
    "Columbia-NLP/DPO-tldr-summarisation-preferences": 0.1,
    "Columbia-NLP/DPO-Nectar": 0.25,
}
LLAMA_PAIRS = PAIRS | {"Columbia-NLP/DPO-Nectar": 1}


def sft(run: str, base: Model, epochs: int, train_on: str) -> SFT:
    return SFT(
        name=f"{run}_sft",
        learned_words="special",
        model=base,
        mesh=Mesh(fsdp=8),
        data=Data(
            path=",".join(CONVERSATIONS),
            split="train_sft",
            eval_path="HuggingFaceH4/ultrachat_200k",
            eval_split="test_sft",
            train_on=train_on,
            max_length=8192,
        ),
        batch=Batch(rows=32, row_length=8192, epochs=epochs),
        optimizer=Optimizer(learning_rate=2e-5, schedule="cosine", warmup_ratio=0.1, b2=0.999),
    )


def dpo(
    run: str,
    start: str,
    pairs: dict[str, float],
    prompt: int,
    beta: float,
    schedule: str,
    epochs: int,
) -> DPO:
    return DPO(
        name=f"{run}_dpo",
        beta=beta,
        model=Model(f"Columbia-NLP/{start}"),
        mesh=Mesh(fsdp=8),
        data=Data(
            path=",".join(pairs),
            weights=",".join(map(str, pairs.values())),
            eval_fraction=0.01,
            max_length=2048,
            max_prompt_length=prompt,
        ),
        batch=Batch(pairs=128, row_length=4096, epochs=epochs),
        optimizer=Optimizer(learning_rate=5e-7, schedule=schedule, warmup_ratio=0.1, b2=0.999),
    )


configs = {
    "lion_gemma2b_sft": (
        "SFT of Gemma-2b on nine sets of conversations, as LIONs, on 8 devices.",
        sft("lion_gemma2b", Model("google/gemma-2b", "gemma"), 3, "everything"),
    ),
    "lion_llama3_8b_sft": (
        "SFT of Llama-3-8B on nine sets of conversations, as LIONs, on 8 devices.",
        sft("lion_llama3_8b", Model("meta-llama/Meta-Llama-3-8B", "llama3"), 1, "all"),
    ),
    "lion_gemma2b_dpo": (
        "DPO of LIONs' own SFT of Gemma-2b, on 8 devices.",
        dpo("lion_gemma2b", "LION-Gemma-2b-sft-v1.0", GEMMA_PAIRS, 512, 0.05, "linear", 2),
    ),
    "lion_llama3_8b_dpo": (
        "DPO of LIONs' own SFT of Llama-3-8B, on 8 devices.",
        dpo(
            "lion_llama3_8b",
            "LION-LLaMA-3-8b-sft-v1.0",
            LLAMA_PAIRS,
            1024,
            0.01,
            "cosine",
            epochs=1,
        ),
    ),
}
