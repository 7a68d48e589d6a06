"""Attention in blocks that documents bound, against full masks: training steps on this machine.

    python benchmarks/attention.py [--devices 1] [--rows-per-device 1] [--median 179] [--sigma 0.8]
        [--json]

SFT steps in float32 of a Llama of 5.3M parameters on full rows of packed documents, whose lengths
are log-normal; those of Dolly's conversations in SmolLM2's tokens have median 110 and sigma 0.74.
A full mask is taken by `jax.nn.dot_product_attention` and by this library's own dense attention.
XLA runs the small products of a block on one core, so that blocks need a device a core: by default
there are as many CPU devices as cores, each with rows of its own, as `JAX_NUM_CPU_DEVICES=2` and
`--mesh.replica=2` have it in a run. The versions take turns; the figures are medians, and a ratio
is that of neighbouring turns.
"""

import argparse
import json
import os
import statistics
import time

import jax
import numpy as np
import workload

from alignjax import config as configs
from alignjax import optim
from alignjax.data.batches import PackedBatch
from alignjax.models import attention, decoder
from alignjax.sharding import place_rows, use_mesh
from alignjax.stages import stage_of
from alignjax.step import init_state, train_step

ROW, ROWS, TURNS = workload.LENGTH, 8, 9
MODEL = workload.model("sft")


def batch(rng: np.random.Generator, median: float, sigma: float, together: int) -> PackedBatch:
    """Micro-batches of full rows, so many together; all tokens but documents' first are trained."""
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
    rows = PackedBatch(
        tokens=rng.integers(0, MODEL.vocab_size, segments.shape, np.int32),
        positions=positions,
        segments=segments,
        targets=targets,
        items=items.astype(np.int32),
        ref=np.zeros((ROWS, 1, places, 1), np.float32),
        margin=np.zeros((ROWS, 1, places), np.float32),
        weight=(items > 0).astype(np.float32),
        rank=(items > 0).astype(np.int32)[..., None],
    )
    return jax.tree.map(lambda array: array.reshape(-1, together, *array.shape[2:]), rows)


def by_jax(q_BTNGK, k_BSNK, v_BSNK, mask_BTS):
    """Dense attention as `jax.nn` has it."""
    q_BTHK = q_BTNGK.reshape(*q_BTNGK.shape[:2], -1, q_BTNGK.shape[-1])
    out = jax.nn.dot_product_attention(q_BTHK, k_BSNK, v_BSNK, mask=mask_BTS[:, None])
    return out.reshape(q_BTNGK.shape)


def step_with(block: int, dense, rows: PackedBatch):
    """A compiled training step whose attention goes in blocks of so many queries, and its state."""
    attention.BLOCK, attention._dense = block, dense
    jax.clear_caches()
    config = configs.SFT(compute=configs.Compute(dtype="float32", remat="none"))
    tx = optim.optimizer(config.optimizer, 100)
    state = init_state(decoder.init(MODEL, jax.random.key(0)), tx)
    static = {"stage": stage_of(config), "compute": config.compute, "tx": tx}
    micro_batches = np.int32(len(rows.tokens))
    lowered = train_step.lower(state, rows, micro_batches, np.int32(0), **static)
    return lowered.compile(), state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=os.cpu_count(), help="CPU devices")
    parser.add_argument("--rows-per-device", type=int, default=1, help="of a micro-batch")
    parser.add_argument(
        "--median", type=float, default=workload.MEDIAN, help="of the documents' tokens"
    )
    parser.add_argument("--sigma", type=float, default=workload.SIGMA, help="of their logarithm")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", options.devices)
    use_mesh(replica=options.devices)
    together = options.devices * options.rows_per_device
    if ROWS % together:
        parser.error(f"{ROWS} rows are no whole number of micro-batches of {together}.")
    drawn = batch(np.random.default_rng(0), options.median, options.sigma, together)
    rows, micro_batches = place_rows(drawn, together), np.int32(ROWS // together)
    block, dense = attention.BLOCK, attention._dense
    versions = {
        "jax.nn": step_with(ROW, by_jax, rows),
        "own dense": step_with(ROW, dense, rows),
        "blocks": step_with(block, dense, rows),
    }
    seconds: dict[str, list[float]] = {name: [] for name in versions}
    for turn in range(TURNS + 1):
        for name, (step, state) in versions.items():
            started = time.perf_counter()
            state, metrics = step(state, rows, micro_batches, np.int32(0))
            jax.block_until_ready(metrics)
            versions[name] = step, state
            if turn:  # the first warms up
                seconds[name].append(time.perf_counter() - started)
    found = {f"{name}, tokens/s": ROW * ROWS / statistics.median(seconds[name]) for name in seconds}
    for name in list(seconds)[:-1]:
        pairs = zip(seconds[name], seconds["blocks"], strict=True)
        found[f"blocks over {name}"] = statistics.median(full / blocks for full, blocks in pairs)
    if options.json:
        print(json.dumps(found))
    else:
        print("\n".join(f"{name:24} {value:10.2f}" for name, value in found.items()))


if __name__ == "__main__":
    main()
