"""A run's contents on the terminal: colour where it takes colour, brackets where it does not."""

from itertools import groupby

from rich.table import Table
from rich.text import Text

from alignjax.inspection.contents import Contents, Histogram, Row, Sequence
from alignjax.inspection.first_batch import TITLE, FirstBatch
from alignjax.inspection.pieces import visible
from alignjax.progress import console

BAR = 40  # columns of the longest bar
_TRAINED, _PLAIN = "bold green", "dim"
_SIDES = {"chosen": "green", "rejected": "red"}


def show(found: Contents, first: FirstBatch | None) -> None:
    """Prints everything but the table of rows, which planning has printed."""
    for line in found.bad_rows:
        console.print(Text(f"skipped  {visible(line)}"))
    for line in found.lines:
        console.print(Text(line))
    for histogram in found.histograms:
        console.print(_histogram(histogram))
    brackets = not console.color_system or console.no_color
    console.print(_legend(found.marked, brackets))
    for row in [*found.rows, *found.extremes]:
        _show_row(row, found.marked, brackets)
    if first:
        console.print(_first_table(first))
        for note in first.notes:
            console.print(Text(note))


def _legend(marked: str, brackets: bool) -> Text:
    if brackets:
        return Text(f"in ⟦brackets⟧: {marked}")
    return Text("in this colour: ") + Text(marked, _TRAINED) + Text("; like this: not", _PLAIN)


def _first_table(first: FirstBatch) -> Table:
    table = Table(title=TITLE, title_justify="left")
    head, *lines = first.table()
    for name in head:
        table.add_column(name, justify="right" if name else "left")
    for line in lines:
        table.add_row(*line)
    return table


def _histogram(histogram: Histogram) -> Table:
    table = Table(title=histogram.title, title_justify="left")
    table.add_column("", justify="right")
    for name in histogram.counts:
        table.add_column(f"{name}: {histogram.middles[name]}")
    width = BAR // len(histogram.counts)
    most = max(int(counts.max()) for counts in histogram.counts.values())
    for i, (low, high) in enumerate(zip(histogram.edges, histogram.edges[1:], strict=False)):
        bars = []
        for name, counts in histogram.counts.items():
            bar = "█" * -(-int(counts[i]) * width // most)
            bars.append(Text(bar, _SIDES.get(name, "green")) + Text(f" {counts[i]:,}", ""))
        table.add_row(f"{low} - {high - 1}", *bars)
    return table


def _show_row(row: Row, marked: str, brackets: bool) -> None:
    console.print()
    console.rule(Text(row.heading(), "bold"), align="left")
    for sequence in row.sequences:
        colour = _SIDES.get(sequence.side(), "cyan")
        console.print(Text("▌", colour) + Text(sequence.heading(marked), "bold"))
        console.print(_body(sequence, brackets))


def _body(sequence: Sequence, brackets: bool) -> Text:
    body = Text()
    for trained, tokens in groupby(sequence.tokens, lambda token: token.trained):
        text = "".join(token.text for token in tokens)
        if brackets:
            body.append(f"⟦{text}⟧" if trained else text)
        else:
            body.append(text, _TRAINED if trained else _PLAIN)
    return body
