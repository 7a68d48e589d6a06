"""Converts a model: `python -m alignjax.convert --src=MODEL --dst=DIR [--to=hf|orbax]`.

Started on several processes, as training is, they share the work. Imports no jax: the command
parses its arguments before anything slow is imported.
"""

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from alignjax import command, validate
from alignjax import config as configs
from alignjax.errors import UserError


@dataclass(frozen=True)
class Convert:
    """Copies a model into another format, or another dtype."""

    src: str  # model directory, ORG/NAME, GGUF file, smollm2-135m-instruct, RUN_DIR[/checkpoints/N]
    dst: str  # the directory to write; it must not be there yet, or be empty
    to: Literal["hf", "orbax"] = "hf"  # orbax: config.json and weights/, an Orbax checkpoint
    dtype: Literal["source", "float32", "bfloat16", "float16"] = "source"  # source: each its own
    shard_bytes: configs.Bytes = 5_000_000_000  # hf: largest safetensors file, bytes
    check: bool = False  # compare logits of both afterwards, one by transformers; needs torch


def main() -> int:
    args = parse()
    check(args)
    from alignjax.progress import say

    say(f"converting {args.src}")
    from alignjax import processes

    processes.join_on_host(vars(args))
    return convert(args)


def parse(arguments: Sequence[str] | None = None) -> Convert:
    """The conversion that a command line asks for."""
    import tyro

    return tyro.cli(
        Convert,
        prog="python -m alignjax.convert",
        description="python -m alignjax.convert --src=MODEL --dst=DIR [--key=value ...]",
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.SuppressFixed),
    )


def check(args: Convert) -> None:
    from alignjax.files import check_absent

    validate.check(args, Convert, "")
    check_absent(args.dst, "--dst", [args.src])


def convert(args: Convert) -> int:
    """Reads a model and writes it, nothing of it changed but what the arguments ask for."""
    from jax import process_count

    from alignjax.files import check_space, location
    from alignjax.processes import in_turn
    from alignjax.progress import gigabytes, phase, say
    from alignjax.weights import orbax, orbax_write, safetensors
    from alignjax.weights.compare import check_transformers
    from alignjax.weights.fetch import open_model
    from alignjax.weights.source import check_tensors, open_together, size_of, watched

    if args.check:
        if process_count() > 1:
            raise UserError("--check: one process compares; start one alone, or leave it out.")
        check_transformers()
    with phase(f"opening {args.src}"):
        cache = configs.cache_dir(configs.SFT())
        source = open_together(lambda: open_model(args.src, cache, "--src"))
        check_tensors(source)
    size = size_of(source)
    target = location(args.dst)
    need = sum(safetensors.size_as(source, name, args.dtype) for name in source.tensors)
    in_turn(lambda: check_space(target, need, f"--dst={args.dst}"))
    started = time.monotonic()
    with phase("converting (GB)", math.ceil(size / 1e9)) as update:
        read = watched(source, update)
        if args.to == "hf":
            beside = orbax.run_card(source)
            safetensors.write_directory(read, target, args.dtype, args.shard_bytes, beside)
        else:
            orbax_write.write_model(read, target, args.dtype)
    seconds = time.monotonic() - started
    form = "a Hugging Face directory" if args.to == "hf" else "an Orbax model directory"
    kinds = {safetensors.stored_dtype(source, name, args.dtype).name for name in source.tensors}
    dtypes = " and ".join(sorted(kinds))
    say(
        f"wrote {args.dst}, {form}: {len(source.tensors)} tensors in {dtypes}, "
        f"{gigabytes(size)} read in {seconds:.1f} s ({size / 1e9 / seconds:.3f} GB/s)"
    )
    if args.check:
        _compare(args, source, open_together(lambda: open_model(args.dst, cache, "--dst")))
    return 0


# Largest mean KL divergence, nats a token, and largest difference, in standard deviations of all
# logits or rewards: rounding of float32 sums, or of weights to --dtype.
_MOST = {"source": (1e-5, 0.01), "other": (0.1, 1.0)}


def _compare(args: Convert, source, written) -> None:
    from alignjax.progress import phase, say
    from alignjax.weights.compare import compare

    with phase("checking"):
        found = compare(source, written)
    kl, spreads = _MOST["source" if args.dtype == "source" else "other"]
    if not ((found.kl or 0) <= kl and found.difference <= spreads * found.spread):
        raise UserError(f"--check: {args.dst} does not compute what {args.src} does: {found}.")
    say(f"checked: {found}")


if __name__ == "__main__":
    sys.exit(command.run(main))
