"""Running `alignjax.train` in this process on what it must refuse, and checking how it ends."""

import json
from pathlib import Path

from conftest import tiny_config, write_model, write_pairs
from running import arguments

from alignjax import command, train

LAYERS = 1  # of the model, for speed


def prepare(root: Path) -> Path:
    """A tiny model in `model/` and pairs in `rows.jsonl`, which a run accepts."""
    write_model(root / "model", tiny_config(layers=LAYERS))
    write_pairs(root / "rows.jsonl", 12, 4)
    return root


def ended(
    monkeypatch, capsys, root: Path, run: Path, *overrides: str, stage: str = "dpo"
) -> tuple[int, str]:
    """Exit code of a run in directory `run`, and what it said to stderr."""
    monkeypatch.delenv("ALIGNJAX_TRACEBACK", raising=False)
    monkeypatch.setenv("ALIGNJAX_CACHE", str(root / "cache"))
    monkeypatch.setattr("sys.argv", arguments(root, run, *overrides, stage=stage)[2:])
    if capsys:
        capsys.readouterr()
    code = command.run(train.main)
    return code, capsys.readouterr().err if capsys else ""


def refused(monkeypatch, capsys, root: Path, run: Path, *overrides: str, stage: str = "dpo") -> str:
    """The sentence, without its "error: ", by which a run is refused that then left nothing."""
    code, said = ended(monkeypatch, capsys, root, run, *overrides, stage=stage)
    assert code == 2 and said.startswith("error: ") and said.endswith(".\n"), (code, said)
    assert said.count("\n") == 1
    assert not half_written(run, root / "cache")
    return said.removeprefix("error: ").removesuffix("\n")


def half_written(*directories: Path) -> list[Path]:
    """Files that a refused run should not have left in its directory and its cache."""
    left = [file for directory in directories for file in directory.rglob("*")]
    whole = {file.parent for file in left if file.name == "meta.json"}  # of a token cache
    return [
        file
        for file in left
        if file.is_file() and file.name != ".lock" and file.parent not in whole
    ]


def rows(root: Path, *values: dict | str | bytes, file: str = "rows.jsonl") -> str:
    """Writes lines, objects as JSON, and gives the file's path."""
    lines = [json.dumps(value) if isinstance(value, dict) else value for value in values]
    lines = [line.encode() if isinstance(line, str) else line for line in lines]
    (root / file).write_bytes(b"".join(line + b"\n" for line in lines))
    return str(root / file)


GOOD = {"prompt": "one", "chosen": "two", "rejected": "three"}
SKIP = " (--data.on_bad_row=skip goes on without such rows)."


def pair(**changes) -> dict:
    """A good row with columns changed, or left out where the value is `...`."""
    return {name: value for name, value in {**GOOD, **changes}.items() if value is not ...}
