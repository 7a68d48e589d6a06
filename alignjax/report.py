"""What a run shows at its end: one table, and answers before and after."""

import resource
import sys

import numpy as np
from rich.table import Table
from rich.text import Text

from alignjax import divergence, evaluation, metrics
from alignjax.files import load_array
from alignjax.progress import console
from alignjax.run import Baseline, Run

_ROWS = {
    "rewards/accuracies": ("held-out preference accuracy", "{:.1%}", "{:+.1%}"),
    "rewards/margins": ("held-out margin", "{:.4f}", "{:+.4f}"),
    "loss": ("held-out loss", "{:.4f}", "{:+.4f}"),
}


def show(run: Run, base: Baseline, before: list[dict], after: list[dict], exported) -> None:
    """Prints the table of a finished run from what its directory holds."""
    steps = len(run.steps)
    held_out = f", {len(run.held_out)} {run.unit()} held out" if run.held_out else ""
    title = f"{run.config.name}: {steps} steps on {run.config.model.path}{held_out}"
    table = Table(title=title, title_justify="left")
    table.add_column("", overflow="fold")
    for name in ("step 0", f"step {steps}", "change [95 % interval]"):
        table.add_column(name, justify="right", overflow="fold")
    if run.held_out:
        shape = (len(run.held_out), run.held_out.sides)
        final = load_array(run.directory / "eval" / f"step-{steps}.npy", shape)
        start, end = (
            evaluation.item_terms(run.stage, logps, base.ref_held_out, run.held_out)
            for logps in (base.logps_held_out, final)
        )
        for name, (title, value, change) in _ROWS.items():
            if name in start:
                table.add_row(title, *_compared(start[name], end[name], value, change))
        if run.stage.unit == "pairs":
            longer = f"{evaluation.longer_wins(run.held_out):.1%}"
            table.add_row('accuracy of "the longer answer wins"', longer, longer, "")
    ruled = [answers for answers in zip(before, after, strict=True) if "rule" in answers[0]]
    if ruled:
        start, end = (
            (np.array([pair[side]["follows"] for pair in ruled], float), np.ones(len(ruled)))
            for side in (0, 1)
        )
        title = f"answers that follow the rule ({len(ruled)} sampled)"
        table.add_row(title, *_compared(start, end, "{:.1%}", "{:+.1%}"))
    if found := divergence.metrics(after):
        title = f"KL to the reference, nats an answer ({len(after)} sampled)"
        table.add_row(title, "", f"{found['samples/kl']:.4f}", "")
    for title, value in _facts(run):
        table.add_row(title, "", value, "")
    console.print(table)
    console.print(Text("export  ", "bold") + Text(f"{exported}\n"))
    for b, a in list(zip(before, after, strict=True))[: run.config.samples.show]:
        console.print(Text("prompt  ", "bold") + Text(b["prompt"]))
        console.print(Text("before  ", "bold") + Text(b["answer"]) + _mark(b))
        console.print(Text("after   ", "bold") + Text(a["answer"]) + _mark(a) + Text("\n"))


def _compared(start, end, value: str, change: str) -> tuple[str, str, str]:
    low, high = evaluation.paired_bootstrap(start, end)
    first, last = (evaluation.ratio(v.sum(), n.sum()) for v, n in (start, end))
    interval = f"{change.format(last - first)} [{change.format(low)}, {change.format(high)}]"
    return value.format(first), value.format(last), interval


def _facts(run: Run) -> list[tuple[str, str]]:
    lines = [
        line
        for line in metrics.read(run.directory / "metrics.jsonl")
        if "tokens_per_second" in line and "num_tokens" in line
    ]
    tokens = np.diff([0] + [line["num_tokens"] for line in lines])
    seconds = sum(n / line["tokens_per_second"] for n, line in zip(tokens, lines, strict=True))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak *= 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return [
        ("useful tokens a second in training", f"{tokens.sum() / max(seconds, 1e-9):.0f}"),
        ("tokens trained on", f"{tokens.sum()}"),
        ("peak memory of the process", f"{peak / 2**30:.2f} GiB"),
    ]


def _mark(line: dict) -> Text:
    if "follows" not in line:
        return Text("")
    return Text("  [follows]", "green") if line["follows"] else Text("  [does not follow]", "red")
