"""What data costs before training: tokenizing, and planning which rows make a step.

    python benchmarks/data.py FILE [FILE ...] [--model=smollm2-135m-instruct] [--lengths=10000000]

Tokenizing reads each file of rows to a fresh token cache (pairs where its first row has `chosen`,
else conversations), on one core, as two may share the units that compute, and the second time, as
the first one starts libraries. The items that fit a row of 2,048 tokens are packed, by 16 rows and
by 128 items a step.
Planning packs random lengths, as many as asked for, in a process of its own: pairs by steps of 64,
and single sequences by steps of 16 full rows of 2,048 tokens.
"""

import json
import multiprocessing
import os
import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

PLANS = {"64 pairs a step": {"pairs": 64}, "16 rows a step": {"rows": 16}}
MEDIAN, SIGMA, ROW = 300, 0.8, 2048  # tokens of an item, and of their logarithm; of a row


@dataclass(frozen=True)
class Settings:
    """Measures tokenizing and planning."""

    files: tyro.conf.Positional[tuple[str, ...]] = ()  # data to tokenize
    model: str = "smollm2-135m-instruct"  # whose tokenizer
    lengths: int = 10_000_000  # items to plan; 0: none
    json: str = ""  # file for the numbers


def main() -> None:
    settings = tyro.cli(Settings)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    found = {file: tokenizing(Path(file), settings.model) for file in settings.files}
    for file, one in found.items():
        print(
            f"{Path(file).name:32} {one['tokens']:>10,} tokens {one['rate'] / 1e6:6.2f}M/s a core, "
            f"{one['kept']:.1%} fit a row, fill {one['fill_rows']:.1%} by rows, "
            f"{one['fill_items']:.1%} by 128 a step"
        )
    if settings.lengths:
        context = multiprocessing.get_context("spawn")
        for name, batch in PLANS.items():
            with context.Pool(1) as pool:
                one = pool.apply(planning, (settings.lengths, batch))
            found[name] = one
            print(
                f"{name:32} {settings.lengths:>10,} lengths {one['seconds']:6.1f} s, "
                f"{one['bytes'] / 1e6:.0f} MB, fill {one['fill']:.1%}"
            )
    if settings.json:
        Path(settings.json).write_text(json.dumps(found, indent=2))


def tokenizing(file: Path, model: str) -> dict:
    """Tokens, and tokens a second of one core, from a file to a token cache."""
    from alignjax import config as configs
    from alignjax.data.chat import load_tokenizer
    from alignjax.data.formats import records
    from alignjax.data.tokens import token_set
    from alignjax.weights.fetch import open_model

    source = open_model(model, configs.cache_dir(configs.SFT()))
    tokenizer = load_tokenizer(source.tokenizer_dir)
    stage = "dpo" if "chosen" in next(iter(records(file)))[1] else "sft"
    data = configs.Data(path=str(file), max_length=1 << 20)
    for _ in range(2):
        with tempfile.TemporaryDirectory() as cache:
            started = time.process_time()
            where = (tokenizer, source.tokenizer_dir, Path(cache))
            tokens = token_set(data, stage, False, *where, _quiet)
            seconds = time.process_time() - started
            count, lengths = len(tokens.tokens), np.array(tokens.lengths())
    fit = lengths[lengths <= ROW]
    return {
        "tokens": count,
        "seconds": seconds,
        "rate": count / seconds,
        "kept": len(fit) / len(lengths),
        "fill_rows": _fill(fit, {"rows": 16}),
        "fill_items": _fill(fit, {"pairs": 128}),
    }


def _fill(lengths: np.ndarray, batch: dict) -> float:
    """Share of an epoch's rows that holds tokens, the last step's among them."""
    from alignjax.config import Batch
    from alignjax.data.packing import plan_training

    plan = plan_training(lengths, Batch(row_length=ROW, **batch), 0)
    return float(lengths.sum() / (plan.steps[-1] * ROW))


def _quiet(*_) -> None:
    pass


def planning(count: int, batch: dict) -> dict:
    """Seconds and peak memory of the plan of an epoch, beyond the process that has made lengths."""
    from alignjax.config import Batch
    from alignjax.data.packing import plan_training

    rng = np.random.default_rng(0)
    lengths = rng.lognormal(np.log(MEDIAN), SIGMA, count).clip(8, ROW).astype(np.int64)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    started = time.perf_counter()
    plan = plan_training(lengths, Batch(row_length=ROW, **batch), 0)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "seconds": seconds,
        "bytes": peak,
        "beyond_bytes": peak - before,
        "fill": float(lengths.sum() / (plan.steps[-1] * ROW)),
    }


if __name__ == "__main__":
    main()
