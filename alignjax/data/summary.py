"""What became of the rows: one table at the start of a run."""

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from alignjax.config import Data
from alignjax.data import sources
from alignjax.data.tokenset import TokenSet
from alignjax.files import remove_files, write_whole
from alignjax.progress import console


def count_rows(sets: dict[str, TokenSet]) -> dict[str, list[str]]:
    """Rows read, kept and dropped by reason, and tokens: what is counted -> of each set."""
    reasons = dict.fromkeys(reason for part in sets.values() for reason in part.counts)
    counts = {reason: [part.counts.get(reason, 0) for part in sets.values()] for reason in reasons}
    counts["tokens"] = [len(part.tokens) for part in sets.values()]
    counts["trained tokens"] = [int(part.trained.sum()) for part in sets.values()]
    return {what: [f"{count:,}" for count in of_sets] for what, of_sets in counts.items()}


def show_rows(data: Data, sets: dict[str, TokenSet], parts: Sequence[bool] = (False, True)) -> None:
    """Prints what `count_rows` says of each set, by what a user calls the set.

    `parts` are the values of `held_out` that were read.
    """
    table = Table(title=f"rows of {sources.title(data, parts[0])}", title_justify="left")
    table.add_column("", overflow="fold")
    for name in sets:
        table.add_column(name, justify="right")
    for what, counts in count_rows(sets).items():
        table.add_row(what, *counts)
    console.print(table)
    if unread := sources.unread(data, parts):
        console.print(f"not read, by their names: {', '.join(unread)}")
    for name, part in sets.items():
        if part.columns:
            console.print(f"{name}: with columns {', '.join(part.columns)}")


def list_bad_rows(directory: Path, sets: dict[str, TokenSet]) -> None:
    """Writes what was skipped, and why, into `bad_rows/` of the run directory, and says where."""
    remove_files(directory / "bad_rows", "training.jsonl", "held_out.jsonl")
    for name, part in sets.items():
        if part.bad_rows_file:
            listing = directory / "bad_rows" / f"{name.replace(' ', '_')}.jsonl"
            write_whole(listing, part.bad_rows_file.read_bytes())
            console.print(f"bad rows of {name} are listed in {listing}")
