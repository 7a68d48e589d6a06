"""metrics.jsonl: one line a step, in the names users know."""

import json
from pathlib import Path


def cut_back(file: Path, step: int) -> None:
    """Drops the lines after a step, and a line cut short, so that a resumed run repeats none."""
    if not file.is_file():
        return
    kept = []
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n") or json.loads(line)["step"] > step:
            break
        kept.append(line)
    file.write_text("".join(kept), encoding="utf-8")


def append(file: Path, line: dict) -> None:
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(line) + "\n")


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
