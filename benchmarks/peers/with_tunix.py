"""DPO steps of Tunix on the workload, in its own trainer, on the processor.

    PYTHON benchmarks/peers/with_tunix.py --stage dpo [--batch 4] [--json]

PYTHON is that of an environment with benchmarks/peers/tunix.txt. float32, AdamW, all cores; without
rematerialization, evaluation or saving. Tunix keeps no reference log-probs between steps and makes
them again in each; `--no-reference` leaves them out, and with them their part of the loss. It pads
every prompt and every answer to the longest of the data, as its own processing does.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import optax
import workload
from flax import nnx
from tunix.models.llama3 import model as llama3
from tunix.sft import hooks
from tunix.sft.dpo.dpo_trainer import DPOTrainer, DPOTrainingConfig, TrainingInput


def llama() -> llama3.Llama3:
    sizes = workload.LLAMA
    config = llama3.ModelConfig(
        num_layers=sizes["num_hidden_layers"],
        vocab_size=sizes["vocab_size"],
        embed_dim=sizes["hidden_size"],
        hidden_dim=sizes["intermediate_size"],
        num_heads=sizes["num_attention_heads"],
        head_dim=sizes["head_dim"],
        num_kv_heads=sizes["num_key_value_heads"],
        rope_theta=int(sizes["rope_theta"]),
        norm_eps=sizes["rms_norm_eps"],
    )
    return llama3.Llama3(config, rngs=nnx.Rngs(0))


def padded(rows: list[list[int]], width: int, left: bool) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask, [rows, width]."""
    tokens = np.full((len(rows), width), workload.PAD, np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[slice(width - len(ids), None) if left else slice(len(ids))] = ids
    return tokens, (tokens != workload.PAD).astype(np.int32)


def batches(items: list[workload.Item], size: int) -> Iterator[TrainingInput]:
    prompt = max(len(item.prompt) for item in items)
    answer = max(len(one) for item in items for one in item.answers)
    for start in range(0, len(items), size):
        own = items[start : start + size]
        arrays = {"prompt": padded([item.prompt for item in own], prompt, True)}
        for side, name in enumerate(("chosen", "rejected")):
            arrays[name] = padded([item.answers[side] for item in own], answer, False)
        yield TrainingInput(
            **{
                f"{name}_{part}": array
                for name, pair in arrays.items()
                for part, array in zip(("ids", "mask"), pair, strict=True)
            }
        )


class Clock(hooks.TrainingHooks):
    """Starts when so many micro-batches are done; Tunix itself tells of a step one step late."""

    def __init__(self, micro_batches: int):
        self.before = micro_batches
        self.start = None

    def on_train_start(self, trainer):
        pass

    def on_train_end(self, trainer):
        pass

    def on_train_step_start(self, trainer):
        if self.before == 0:
            jax.block_until_ready(nnx.state(trainer.model))
            self.start = time.perf_counter()
        self.before -= 1

    def on_train_step_end(self, trainer, step, loss):
        assert np.isfinite(loss)

    def on_eval_step_start(self, trainer):
        pass

    def on_eval_step_end(self, trainer, loss):
        pass


def main() -> None:
    parser = workload.parser(__doc__, ["dpo"], 1)
    parser.add_argument("--batch", type=int, default=4, help="of those, in a micro-batch")
    parser.add_argument("--reference", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    model = llama()
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {np.dtype("float32")}
    config = DPOTrainingConfig(
        eval_every_n_steps=10**6,
        max_steps=options.warmup + options.steps,
        gradient_accumulation_steps=options.items // options.batch,
    )
    trainer = DPOTrainer(model, llama() if options.reference else None, optax.adamw(5e-7), config)
    clock = Clock(options.warmup * config.gradient_accumulation_steps)
    order = np.random.default_rng(options.seed).permutation(workload.ITEMS)
    every = workload.items("dpo")
    items = [every[i] for i in order[: config.max_steps * options.items]]
    trainer.with_training_hooks(clock)
    trainer.train(batches(items, options.batch))
    jax.block_until_ready(nnx.state(model))
    seconds = time.perf_counter() - clock.start
    useful = sum(item.tokens() for item in items[options.warmup * options.items :])
    found = {
        "library": f"google-tunix {version('google-tunix')}",
        "stage": "dpo",
        "tokens_per_second": useful / seconds,
        "tokens_per_step": useful / options.steps,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model))),
    }
    print(json.dumps(found) if options.json else f"{found['tokens_per_second']:.0f} tokens/s")


if __name__ == "__main__":
    main()
