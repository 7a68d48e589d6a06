"""Training steps of TRL on the workload, in its own trainers, on the processor.

    PYTHON benchmarks/peers/with_trl.py --stage dpo [--batch 1] [--mode padded] [--json]

PYTHON is that of an environment with benchmarks/peers/trl.txt. float32, AdamW, all cores; without
gradient checkpointing, logging, evaluation or saving. DPO's reference log-probs are a column of
zeros, since their values do not change the time. One item a micro-batch was its quickest.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import datasets
import torch
import transformers
import trl
import workload
from tokenizers import Tokenizer, models

MODES = {"sft": ("bfd", "bfd_split", "wrapped", "padded"), "rm": (), "dpo": ()}


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """What the trainers want to see; it makes no token here."""
    words = {str(i): i for i in range(workload.LLAMA["vocab_size"])}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="1")),
        pad_token=str(workload.PAD),
        eos_token="1",
    )


def rows(stage: str) -> datasets.Dataset:
    """The items as the trainers have them after tokenization, with their lengths for grouping."""
    found = []
    for item in workload.items(stage):
        row = {"length": item.tokens()}
        if stage == "sft":
            row["input_ids"] = item.answers[0]
        else:
            prompt = item.prompt if stage == "rm" else []
            row["chosen_ids"], row["rejected_ids"] = (prompt + answer for answer in item.answers)
            row["length"] = len(item.prompt) + max(map(len, item.answers))
        if stage == "dpo":
            row |= {"prompt_ids": item.prompt, "ref_chosen_logps": 0.0, "ref_rejected_logps": 0.0}
        found.append(row)
    return datasets.Dataset.from_list(found)


class DPO(trl.DPOTrainer):
    """Takes rows that are tokenized, and have the reference's log-probs."""

    def _prepare_dataset(self, dataset, *_):
        return dataset

    def _precompute_ref_logps(self, dataset, *_):
        return dataset


class Steps(transformers.TrainerCallback):
    """When each step ended, and the tokens seen until then."""

    def __init__(self):
        self.seen, self.ends = 0, []

    def on_step_end(self, *_, **__):
        self.ends.append((time.perf_counter(), self.seen))

    def counting(self, trainer) -> None:
        """Counts the tokens of a trainer's batches that are not padding."""
        inner = trainer.training_step

        def step(model, inputs, *more, **named):
            self.seen += int((inputs["input_ids"] != workload.PAD).sum())
            return inner(model, inputs, *more, **named)

        trainer.training_step = step


def trainer_of(options, directory: str, callback: Steps):
    llama = transformers.LlamaConfig(**workload.LLAMA, pad_token_id=workload.PAD, use_cache=False)
    settings = {
        "output_dir": directory,
        "seed": options.seed,
        "per_device_train_batch_size": options.batch,
        "gradient_accumulation_steps": options.items // options.batch,
        "max_steps": options.warmup + options.steps,
        "train_sampling_strategy": "group_by_length" if options.grouped else "random",
        "remove_unused_columns": False,  # the lengths, for grouping
        "max_length": workload.LENGTH,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    common = {
        "train_dataset": rows(options.stage),
        "processing_class": tokenizer(),
        "callbacks": [callback],
    }
    if options.stage == "rm":
        llama.num_labels = 1
        model = transformers.LlamaForSequenceClassification(llama)
        return trl.RewardTrainer(model, trl.RewardConfig(**settings), **common)
    model = transformers.LlamaForCausalLM(llama)
    if options.stage == "dpo":
        config = trl.DPOConfig(**settings, precompute_ref_log_probs=True)
        return DPO(model, args=config, **common)
    packing = options.mode != "padded"
    strategy = {"packing_strategy": options.mode} if packing else {}
    return trl.SFTTrainer(model, trl.SFTConfig(**settings, packing=packing, **strategy), **common)


def main() -> None:
    parser = workload.parser(__doc__, MODES, 2)
    parser.add_argument("--batch", type=int, default=1, help="of those, in a micro-batch")
    parser.add_argument("--mode", default="bfd", help="sft: a packing strategy, or padded")
    parser.add_argument("--grouped", action=argparse.BooleanOptionalAction, default=False)
    options = parser.parse_args()
    torch.set_num_threads(os.cpu_count())
    torch.manual_seed(0)
    steps = Steps()
    with tempfile.TemporaryDirectory() as directory:
        trainer = trainer_of(options, directory, steps)
        steps.counting(trainer)
        trainer.train()
    (began, before), (ended, after) = steps.ends[options.warmup - 1], steps.ends[-1]
    found = {
        "library": f"trl {version('trl')}",
        "stage": options.stage,
        "tokens_per_second": (after - before) / (ended - began),
        "tokens_per_step": (after - before) / options.steps,
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
    }
    print(json.dumps(found) if options.json else f"{found['tokens_per_second']:.0f} tokens/s")


if __name__ == "__main__":
    main()
