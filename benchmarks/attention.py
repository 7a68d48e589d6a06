"""Attention in blocks that documents bound, against a full mask: training steps on this machine.

    python benchmarks/attention.py [--median 110] [--sigma 0.74] [--json]

SFT steps in float32 of a Llama of 5.3M parameters on full rows of packed documents, whose lengths
are log-normal: by default as those of Dolly's conversations in SmolLM2's tokens; longer documents
gain less. The two versions take turns; the figures are medians, and the ratio is that of
neighbouring turns.
"""

import argparse
import json
import statistics
import time

import jax
import numpy as np

from alignjax import config as configs
from alignjax import optim
from alignjax.data.batches import Batch
from alignjax.models import attention, decoder
from alignjax.models.presets import tiny
from alignjax.sharding import place_rows, use_mesh
from alignjax.stages import stage_of
from alignjax.step import init_state, train_step

ROW, ROWS, TURNS = 512, 8, 9
MODEL = tiny(
    "llama2_7b",
    vocab_size=2048,
    hidden_size=256,
    layers=6,
    heads=8,
    kv_heads=8,
    head_dim=32,
    mlp_size=688,
    tied_head=True,
)


def batch(rng: np.random.Generator, median: float, sigma: float) -> Batch:
    """Micro-batches of one full row each; every token but a document's first is trained."""
    segments = np.zeros((ROWS, 1, ROW), np.int32)
    positions = np.zeros_like(segments)
    for row in range(ROWS):
        at = number = 0
        while at < ROW:
            length = int(np.clip(rng.lognormal(np.log(median), sigma), 8, ROW - at))
            number += 1
            segments[row, 0, at : at + length] = number
            positions[row, 0, at : at + length] = np.arange(length)
            at += length
    targets = np.zeros_like(segments)
    for row in range(ROWS):
        trained = np.flatnonzero(positions[row, 0])
        targets[row, 0, : len(trained)] = trained
    places = int(segments.max())
    items = np.arange(1, places + 1) * (np.arange(1, places + 1) <= segments.max(2)[..., None])
    return Batch(
        tokens=rng.integers(0, MODEL.vocab_size, segments.shape, np.int32),
        positions=positions,
        segments=segments,
        targets=targets,
        items=items.astype(np.int32),
        ref=np.zeros((ROWS, 1, places, 1), np.float32),
        margin=np.zeros((ROWS, 1, places), np.float32),
        weight=(items > 0).astype(np.float32),
    )


def step_with(block: int, rows: Batch):
    """A compiled training step whose attention goes in blocks of so many queries, and its state."""
    attention.BLOCK = block
    jax.clear_caches()
    config = configs.SFT(compute=configs.Compute(dtype="float32", remat="none"))
    tx = optim.optimizer(config.optimizer, 100)
    state = init_state(decoder.init(MODEL, jax.random.key(0)), tx)
    static = {"stage": stage_of(config), "compute": config.compute, "tx": tx}
    lowered = train_step.lower(state, rows, np.int32(ROWS), np.int32(0), **static)
    return lowered.compile(), state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--median", type=float, default=110, help="of the documents' tokens")
    parser.add_argument("--sigma", type=float, default=0.74, help="of their logarithm")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    use_mesh()
    rows = place_rows(batch(np.random.default_rng(0), options.median, options.sigma), 1)
    own = attention.BLOCK
    versions = {"full mask": step_with(ROW, rows), "blocks": step_with(own, rows)}
    seconds: dict[str, list[float]] = {name: [] for name in versions}
    for turn in range(TURNS + 1):
        for name, (step, state) in versions.items():
            started = time.perf_counter()
            state, metrics = step(state, rows, np.int32(ROWS), np.int32(0))
            jax.block_until_ready(metrics)
            versions[name] = step, state
            if turn:  # the first warms up
                seconds[name].append(time.perf_counter() - started)
    pairs = zip(seconds["full mask"], seconds["blocks"], strict=True)
    found = {f"{name}, tokens/s": ROW * ROWS / statistics.median(seconds[name]) for name in seconds}
    found["ratio"] = statistics.median(full / blocks for full, blocks in pairs)
    if options.json:
        print(json.dumps(found))
    else:
        print("\n".join(f"{name:24} {value:10.2f}" for name, value in found.items()))


if __name__ == "__main__":
    main()
