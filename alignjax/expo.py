"""Extrapolates weights: `python -m alignjax.expo --weak=SFT --strong=DPO --alpha=0.3 --out=DIR`.

ExPO, arXiv 2404.16792: theta + alpha (theta - theta_sft), where theta is the strong side. Started
on several processes, as training is, they share the work. Imports no jax: the command parses its
arguments before anything slow is imported.
"""

import gc
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

from alignjax import command, validate
from alignjax import config as configs
from alignjax.errors import UserError
from alignjax.extrapolation import alphas
from alignjax.extrapolation.alphas import Rules


@dataclass(frozen=True)
class Expo:
    """Writes strong + alpha (strong - weak)."""

    weak: str  # theta_sft, the model that training began with; named as --strong is
    strong: str  # theta: model directory, ORG/NAME, GGUF file, RUN_DIR[/checkpoints/N]
    alpha: str  # 0.3, or 0.1,0.2,0.3 for a model each; from -1, the weak side, to 0 it interpolates
    out: str = ""  # the directory to write; of several alphas it holds alpha_0.1, alpha_0.2, ...
    to: Literal["hf", "orbax"] = "hf"  # orbax: config.json and weights/, an Orbax checkpoint
    dtype: Literal["source", "float32", "bfloat16", "float16"] = "source"  # source: --strong's
    shard_bytes: configs.Bytes = 5_000_000_000  # hf: largest safetensors file, bytes
    common_rows: bool = False  # vocabularies of two sizes: extrapolate the rows that both have
    special_tokens: Literal["extrapolate", "keep"] = "extrapolate"  # keep: --strong's rows of them
    report: Literal["sample", "whole"] = "sample"  # what the report reads of both sides
    dry_run: bool = False  # show the report, and write nothing


def main() -> int:
    args, rules = parse()
    check(args)
    from alignjax.progress import say

    say(f"extrapolating {args.strong} from {args.weak}")
    gc.disable()  # jax's modules are no garbage
    try:
        from alignjax import processes
    finally:
        gc.enable()
    processes.join_on_host(vars(args) | vars(rules))
    return expo(args, rules)


def parse(arguments: Sequence[str] | None = None) -> tuple[Expo, Rules]:
    """What a command line asks for."""
    import tyro

    named = tyro.conf.arg
    return tyro.cli(
        tuple[Annotated[Expo, named(name="")], Annotated[Rules, named(name="alpha")]],
        prog="python -m alignjax.expo",
        description="python -m alignjax.expo --weak=MODEL --strong=MODEL --alpha=0.3 --out=DIR",
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.SuppressFixed),
    )


def check(args: Expo) -> None:
    from alignjax.files import check_absent

    validate.check(args, Expo, "")
    alphas.typed(args.alpha)
    if args.out:
        check_absent(args.out, "--out", [args.weak, args.strong])
    elif not args.dry_run:
        raise UserError("--out: name the directory to write, or give --dry-run.")


def expo(args: Expo, rules: Rules) -> int:
    """Shows how far the two sides lie apart, and writes a model for each alpha."""
    from alignjax.extrapolation import delta, terminal
    from alignjax.progress import phase

    rules = alphas.loaded(rules)
    pair = _open(args)
    by_alpha = {text: pair.alphas(rules, alpha) for text, alpha in alphas.typed(args.alpha).items()}
    with phase("comparing"):
        found = delta.measure(pair, args.dtype, args.report == "whole")
    terminal.show(pair, found, args.dtype, args.report)
    if args.dry_run:
        return 0
    return _write(args, rules, pair, by_alpha)


def _open(args: Expo):
    """Both sides, which fit together."""
    import numpy as np

    from alignjax.data.chat import load_tokenizer, special_ids
    from alignjax.extrapolation.pair import pair_of
    from alignjax.progress import phase
    from alignjax.weights.fetch import open_model
    from alignjax.weights.source import open_together

    cache = configs.cache_dir(configs.SFT())
    with phase(f"opening {args.strong} and {args.weak}"):
        strong = open_together(lambda: open_model(args.strong, cache, "--strong"))
        weak = open_together(lambda: open_model(args.weak, cache, "--weak"))
        kept = np.zeros(0, np.int64)
        if args.special_tokens == "keep":
            kept = np.array(special_ids(load_tokenizer(strong.tokenizer_dir, "")), np.int64)
        return pair_of(strong, weak, args.common_rows, kept)


def _write(args: Expo, rules: Rules, pair, by_alpha: dict[str, dict[str, float]]) -> int:
    """Writes all outputs in one pass over both sides."""
    import math

    import jax

    from alignjax.extrapolation import outputs
    from alignjax.files import check_space, location
    from alignjax.processes import in_turn, on_first
    from alignjax.progress import gigabytes, phase, say
    from alignjax.weights import layout, stream
    from alignjax.weights.together import at_once

    plan = stream.planned(
        layout.hugging_face(pair.strong, args.dtype, args.shard_bytes, stream.MOST)
        if args.to == "hf"
        else layout.orbax(pair.strong, args.dtype, stream.MOST),
        pair.order(),
    )
    places = {text: f"alpha_{text}" if len(by_alpha) > 1 else "." for text in by_alpha}
    settings = asdict(args) | {"rules": asdict(rules)}
    about = settings | {"processes": jax.process_count(), "kept": pair.kept.tolist()}
    about |= {side: outputs.fingerprint(getattr(pair, side)) for side in ("weak", "strong")}
    about |= {"alphas": list(by_alpha.values()), "parts": [len(plan.parts), stream.MOST]}
    target, size = location(args.out), sum(plan.sizes.values()) * len(by_alpha)
    written = stream.written(target)
    in_turn(lambda: check_space(target, size - written, f"--out={args.out}"))
    work = outputs.Work(pair, list(by_alpha.values()), args.dtype)
    started = time.monotonic()
    own = sum(part.size for part in stream.mine(plan.parts)) * len(by_alpha)
    with (
        phase("extrapolating (GB)", math.ceil(own / 1e9)) as update,
        stream.unfinished(target, about) as one,
    ):
        stream.begin(one, plan, list(places.values()), about)
        at_once(lambda: stream.fill(one, plan, list(places.values()), work, update))
        on_first(lambda: _end(plan, one.result, places, settings))
    seconds = time.monotonic() - started
    form = "Hugging Face" if args.to == "hf" else "Orbax model"
    count = len(by_alpha)
    say(
        f"wrote {args.out}, {count} {form} director{'ies' if count > 1 else 'y'}, "
        f"{gigabytes(size)} in {seconds:.1f} s ({size / 1e9 / seconds:.3f} GB/s)"
    )
    return 0


def _end(plan, result, places: dict[str, str], settings: dict) -> None:
    """Writes what lies beside the weights of each output."""
    from alignjax.extrapolation import outputs

    for text, place in places.items():
        plan.end(result / place, outputs.card(settings | {"alpha": text}, text))


if __name__ == "__main__":
    sys.exit(command.run(main))
