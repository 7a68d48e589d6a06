"""The report of two checkpoints as it is printed."""

from rich.table import Table

from alignjax.extrapolation import delta
from alignjax.extrapolation.alphas import GROUPS
from alignjax.extrapolation.delta import Delta
from alignjax.extrapolation.pair import Pair, differences
from alignjax.progress import console, say

_LINES = 32  # of the table of layers; more layers share them


def show(pair: Pair, found: dict[str, Delta], dtype: str, report: str) -> None:
    """Prints the delta by module and by layer, and warnings."""
    groups = delta.by_group(pair, found)
    console.print(_modules(groups, report))
    console.print(_layers(delta.by_layer(pair, found)))
    for text in [*differences(pair), *delta.warnings(pair, groups, dtype)]:
        say(f"warning: {text}")


def _modules(groups: dict[str, Delta], report: str) -> Table:
    of = "all elements" if report == "whole" else f"up to {delta.SAMPLE:,} elements a tensor"
    table = Table(title=f"theta - theta_sft, from {of}", title_justify="left")
    table.add_column("module")
    for name in ("elements", "norm", "of theta's", "cosine to theta", "same", "below one ulp"):
        table.add_column(name, justify="right")
    for name, one in groups.items():
        if one.elements:
            table.add_row(
                name,
                f"{one.elements:,.0f}",
                f"{one.delta_delta**0.5:.4g}",
                f"{one.relative:.4%}",
                f"{one.cosine:+.4f}",
                f"{one.same / one.elements:.1%}",
                f"{one.below / one.elements:.1%}",
            )
    return table


def _layers(layers: list[dict[str, Delta]]) -> Table:
    names = [name for name in GROUPS if any(one[name].elements for one in layers)]
    title = "by layer: norm of each module's delta, of theta's; and all modules"
    table = Table(title=title, title_justify="left")
    for name in ("layer", *names, "norm", "of theta's", "cosine", "below one ulp"):
        table.add_column(name, justify="right")
    step = -(-len(layers) // _LINES)
    for first in range(0, len(layers), step):
        part = layers[first : first + step]
        sums = [sum((one[name] for one in part), Delta()) for name in names]
        whole = sum(sums, Delta())
        table.add_row(
            str(first) if len(part) == 1 else f"{first} to {first + len(part) - 1}",
            *(f"{one.relative:.4%}" for one in sums),
            f"{whole.delta_delta**0.5:.4g}",
            f"{whole.relative:.4%}",
            f"{whole.cosine:+.4f}",
            f"{whole.below / whole.elements:.1%}",
        )
    return table
