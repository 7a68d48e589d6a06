"""A run's contents as one HTML file that loads nothing: well-formed, every text of it escaped."""

from collections.abc import Iterable
from html import escape

from alignjax.inspection.contents import Contents, Histogram, Row, Sequence, Token
from alignjax.inspection.first_batch import TITLE, FirstBatch
from alignjax.inspection.pieces import visible

_STYLE = """
:root { color-scheme: light dark; --line: #8885; --on: #9be29b; --on2: #7ed07e; --off: #8882;
  --off2: #8884; --ink: #123; --chosen: #2a9d4a; --rejected: #d04545; --one: #3b82c4 }
@media (prefers-color-scheme: dark) { :root { --on: #1d6b34; --on2: #2a8446; --ink: #eee } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 0.5rem 0 } td, th { padding: 0.1rem 0.8rem;
  border-bottom: 1px solid var(--line); text-align: right } td:first-child, th:first-child {
  text-align: left } h2 { margin-top: 2.5rem } .row { margin: 1.5rem 0 }
.sequence { border-left: 4px solid var(--one); margin: 0.6rem 0; padding: 0.1rem 0.8rem }
.chosen { border-color: var(--chosen) } .rejected { border-color: var(--rejected) }
.about { font-size: 0.85em; opacity: 0.8; overflow-wrap: anywhere }
pre { font: 13px/1.7 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  margin: 0.3rem 0 } .t { position: relative; background: var(--off); border-radius: 2px }
.t:nth-child(even) { background: var(--off2) } .t.on { background: var(--on); color: var(--ink) }
.t.on:nth-child(even) { background: var(--on2) } .t:hover { outline: 1px solid currentColor }
.t:hover::after { content: attr(data-about); position: absolute; left: 0; top: 1.6em; z-index: 1;
  white-space: pre; padding: 0.1rem 0.5rem; border-radius: 4px; background: #222; color: #fff }
.bars { display: flex; flex-wrap: wrap; gap: 2rem } svg { max-width: 100% } rect {
  fill: var(--one) } .chosen rect { fill: var(--chosen) } .rejected rect { fill: var(--rejected) }
text { font: 11px system-ui, sans-serif; fill: currentColor }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # a browser fetches nothing for it
BEGINS = "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'/>\n"
BEGINS += f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"/>'


def page(found: Contents, first: FirstBatch | None) -> str:
    """The whole file. It is XML as well, so that a parser can check it."""
    counts = [[what, *values] for what, values in found.counts.items()]
    parts = [
        BEGINS,
        f"<title>{_text(found.title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{_text(found.title)}</h1>",
        *(f"<p>{_text(line)}</p>" for line in found.lines),
        "<h2>Rows</h2>",
        _table(["", *found.sets], counts),
        *(f"<p class='about'>skipped: {_text(line)}</p>" for line in found.bad_rows),
        *_first(first),
        "<h2>Lengths</h2>",
        *map(_histogram, found.histograms),
        "<h2>Packed rows</h2>",
        f"<p><span class='t on'>{_text(found.marked)}</span> <span class='t'>not</span></p>",
        *(_row(row, found.marked) for row in found.rows),
        "<h2>The largest and the smallest example</h2>",
        *(_row(row, found.marked) for row in found.extremes),
        "</body></html>\n",
    ]
    return "\n".join(parts)


def _text(text: str) -> str:
    return escape(visible(text))


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = ["".join(f"<th>{_text(cell)}</th>" for cell in head)]
    lines += ["".join(f"<td>{_text(cell)}</td>" for cell in row) for row in rows]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _first(first: FirstBatch | None) -> list[str]:
    if not first:
        return []
    head, *lines = first.table()
    notes = (f"<p>{_text(note)}</p>" for note in first.notes)
    return [f"<h2>{TITLE}</h2>", _table(head, lines), *notes]


def _histogram(histogram: Histogram) -> str:
    most = max(int(counts.max()) for counts in histogram.counts.values())
    ranges = list(zip(histogram.edges, histogram.edges[1:], strict=False))
    charts = []
    for name, counts in histogram.counts.items():
        bars = [
            f"<text x='90' y='{18 * i + 13}' text-anchor='end'>{low} - {high - 1}</text>"
            f"<rect x='96' y='{18 * i + 3}' width='{260 * count / most:.1f}' height='13'/>"
            f"<text x='{100 + 260 * count / most:.1f}' y='{18 * i + 13}'>{count}</text>"
            for i, ((low, high), count) in enumerate(zip(ranges, counts, strict=True))
        ]
        size = f"width='420' height='{18 * len(bars) + 4}'"
        about = f"{name}: {histogram.middles[name]}"
        charts.append(
            f"<div class='{name}'><p class='about'>{_text(about)}</p>"
            f"<svg role='img' {size}>{''.join(bars)}</svg></div>"
        )
    return f"<h3>{_text(histogram.title)}</h3><div class='bars'>{''.join(charts)}</div>"


def _row(row: Row, marked: str) -> str:
    sequences = "".join(_sequence(sequence, marked) for sequence in row.sequences)
    return f"<div class='row'><h3>{_text(row.heading())}</h3>{sequences}</div>"


def _sequence(sequence: Sequence, marked: str) -> str:
    spans = "".join(_token(token, sequence.segment, marked) for token in sequence.tokens)
    return (
        f"<div class='sequence {sequence.side()}'>"
        f"<div class='about'>{_text(sequence.heading(marked))}</div><pre>{spans}</pre></div>"
    )


def _token(token: Token, segment: int, marked: str) -> str:
    state = marked if token.trained else f"not {marked}"
    about = f"id {token.id} · position {token.position} · segment {segment} · {state}"
    return (
        f"<span class='t{' on' * token.trained}' data-about='{about}'>{escape(token.text)}</span>"
    )
