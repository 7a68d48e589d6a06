"""What became of the rows: one table at the start of a run."""

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from alignjax.config import Data
from alignjax.data import sources
from alignjax.data.tokens import TokenSet
from alignjax.files import remove_directory, write_whole
from alignjax.progress import console


def show_rows(
    data: Data,
    directory: Path | None,
    sets: dict[str, TokenSet],
    parts: Sequence[bool] = (False, True),
) -> None:
    """Prints rows read, kept and dropped by reason of each set, by what a user calls it.

    `parts` are the values of `held_out` that were read. Bad rows are listed in `directory`, or
    where there is none in the cache.
    """
    table = Table(title=f"rows of {sources.title(data, parts[0])}", title_justify="left")
    table.add_column("", overflow="fold")
    for name in sets:
        table.add_column(name, justify="right")
    for reason in dict.fromkeys(reason for part in sets.values() for reason in part.counts):
        counts = (part.counts.get(reason, 0) for part in sets.values())
        table.add_row(reason, *(f"{count:,}" for count in counts))
    tokens = (f"{len(part.tokens):,}" for part in sets.values())
    trained = (f"{int(part.trained.sum()):,}" for part in sets.values())
    table.add_row("tokens", *tokens)
    table.add_row("trained tokens", *trained)
    console.print(table)
    if unread := sources.unread(data, parts):
        console.print(f"not read, by their names: {', '.join(unread)}")
    for name, part in sets.items():
        if part.columns:
            console.print(f"{name}: with columns {', '.join(part.columns)}")
        if part.bad_rows_file:
            listing = _listing(directory, name) if directory else part.bad_rows_file
            console.print(f"bad rows of {name} are listed in {listing}")


def list_bad_rows(directory: Path, sets: dict[str, TokenSet]) -> None:
    """Writes what was skipped, and why, into `bad_rows/` of the run directory."""
    remove_directory(directory / "bad_rows")
    for name, part in sets.items():
        if part.bad_rows_file:
            write_whole(_listing(directory, name), part.bad_rows_file.read_bytes())


def _listing(directory: Path, name: str) -> Path:
    return directory / "bad_rows" / f"{name.replace(' ', '_')}.jsonl"
