"""What the benchmarks train on. Importing it, and drawing the items, needs numpy alone.

A Llama of 5.3M parameters, in the words of transformers, and items of random tokens whose lengths
are log-normal. Side 0 of a pair is chosen, side 1 rejected; both begin with the pair's prompt.
"""

import argparse
from dataclasses import replace
from typing import NamedTuple

import numpy as np

LENGTH = 512  # most tokens of a sequence
MEDIAN, SIGMA = 0.35 * LENGTH, 0.8  # tokens of a sequence, and of their logarithm
ITEMS = 1024
PAD = 0  # no sequence holds it
LLAMA = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 32,
    "intermediate_size": 688,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2 * LENGTH,
    "tie_word_embeddings": False,
}


class Item(NamedTuple):
    """A prompt, empty in SFT, and what answers it: one document, or the two sides of a pair."""

    prompt: list[int]
    answers: list[list[int]]

    def tokens(self) -> int:
        """Tokens that a step on the item processes; a prompt counts with each answer."""
        return sum(len(self.prompt) + len(answer) for answer in self.answers)


def items(stage: str, seed: int = 0) -> list[Item]:
    """The items of a stage, "sft", "rm" or "dpo"; a third of a pair's shorter side is prompt."""
    rng = np.random.default_rng(seed)
    sides = 1 if stage == "sft" else 2
    lengths = rng.lognormal(np.log(MEDIAN), SIGMA, (ITEMS, sides)).clip(16, LENGTH).astype(int)
    prompts = lengths.min(1) // 3 if sides == 2 else np.zeros(ITEMS, int)

    def draw(count: int) -> list[int]:
        return rng.integers(PAD + 1, LLAMA["vocab_size"], count).tolist()

    return [
        Item(draw(prompt), [draw(length - prompt) for length in own])
        for own, prompt in zip(lengths, prompts, strict=True)
    ]


def parser(doc: str, stages, steps: int) -> argparse.ArgumentParser:
    """What every library's script takes; `steps` are measured where nothing else is asked for."""
    found = argparse.ArgumentParser(description=doc.splitlines()[0])
    found.add_argument("--stage", choices=list(stages), required=True)
    found.add_argument("--items", type=int, default=64, help="pairs or rows of a step")
    found.add_argument("--steps", type=int, default=steps, help="measured")
    found.add_argument("--warmup", type=int, default=1, help="steps before them")
    found.add_argument("--seed", type=int, default=0, help="of the order of the items")
    found.add_argument("--json", action="store_true", help="print one JSON object")
    return found


def model(stage: str):
    """The Llama as alignjax knows it; a reward model's for that stage."""
    from alignjax.models.families import from_hf

    return replace(from_hf(LLAMA | {"model_type": "llama"}, "LLAMA"), scored=stage == "rm")


def token_set(stage: str):
    """The items as alignjax has them after tokenization; what answers is trained."""
    own = items(stage)
    sequences = [item.prompt + answer for item in own for answer in item.answers]
    sides = len(own[0].answers)
    lengths = np.array([len(sequence) for sequence in sequences]).reshape(-1, sides)
    prompts = np.repeat([[len(item.prompt)] for item in own], sides, axis=1)
    return tokenized(np.concatenate(sequences), lengths, prompts)


def tokenized(tokens: np.ndarray, lengths: np.ndarray, prompts: np.ndarray):
    """A TokenSet of sequences back to back; `lengths` and `prompts` are [items, sides]."""
    from alignjax.data.tokenset import in_memory

    offsets = np.concatenate([[0], np.cumsum(lengths.ravel())])
    places = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths.ravel())
    trained = (places >= np.repeat(prompts.ravel(), lengths.ravel())) & (places > 0)
    return in_memory(tokens.astype(np.int32), trained, offsets, lengths.shape[1])
