"""Reads damaged files of rows in a process of its own: `python damage.py KIND COUNT DIRECTORY`.

Each must give rows or a UserError. It ends badly at another exception, and prints the seed before
each try, so that a crash tells it as well.
"""

import gzip
import json
import random
import struct
import sys
from pathlib import Path

import pyarrow as pa
from datafiles import arrow, dump, feather_bytes, jsonl, parquet_bytes, saved_splits

from alignjax.config import Data
from alignjax.data import rows, sources
from alignjax.errors import UserError

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
ROWS = [
    {"prompt": f"why {i}?", "chosen": TURNS[1:], "rejected": [{**TURNS[1], "content": "bé"}]}
    | {"margin": i / 2, "scores": [1.0, i], "messages": TURNS, "source": "x", "other": [i]}
    for i in range(40)
]
# Values of the wrong type, from JSON's shallowest to its deepest.
VALUES = [None, True, -1, 0.5, 1e400, 10**30, "", "\n{}%[red]", [], {}, [[]], [None], {"role": 1}]
VALUES += [[{}], {"from": "human"}, [{"role": "user", "content": None}], ["a", 1], "\ud800"]


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


def good(kind: str) -> bytes:
    if kind == "saved":
        return b""
    makers = {
        "jsonl": lambda: jsonl(ROWS),
        "jsonl.gz": lambda: gzip.compress(jsonl(ROWS)),
        "json": lambda: dump(ROWS, 1).encode(),
        "parquet": lambda: parquet_bytes(ROWS, 15),
        "arrow": lambda: arrow(ROWS, pa.ipc.new_stream, 15),
        "arrow.gz": lambda: gzip.compress(arrow(ROWS, pa.ipc.new_file, 15)),
        "feather": lambda: feather_bytes(ROWS),
    }
    return makers[kind]()


def spoilt(content: bytes, draw: random.Random) -> bytes:
    """Bytes with some flipped, cut off, doubled or overwritten by numbers that lengths may be."""
    found = bytearray(content)
    for _ in range(draw.choice([1, 1, 3, 10])):
        at = draw.randrange(len(found) or 1)
        match draw.randrange(5):
            case 0 if found:
                found[at] ^= 1 << draw.randrange(8)
            case 1:
                del found[at : at + draw.choice([1, 8, 100, len(found)])]
            case 2:
                found[at:at] = found[at : at + draw.choice([1, 8, 100])]
            case 3:
                number = draw.choice([-1, 0, 1, 64, 2**16, 2**31 - 1, -(2**31)])
                found[at & ~3 : (at & ~3) + 4] = struct.pack("<i", number)
            case _:
                found[at : at + 8] = draw.randbytes(8)
    return bytes(found)


def damaged(content: bytes, kind: str, draw: random.Random) -> bytes:
    """A file's content spoilt, and of one in gzip what is packed, every other time."""
    if kind.endswith(".gz") and draw.random() < 0.5:
        return gzip.compress(spoilt(gzip.decompress(content), draw))
    return spoilt(content, draw)


def mistyped(draw: random.Random) -> bytes:
    """JSON lines in which some values are of another type."""
    names = [*ROWS[0], "text", "split", "system", "weight", "history", "instruction", "rule"]
    changed = []
    for row in draw.sample(ROWS, 5):
        value = draw.choice([*VALUES, nested(draw.choice([5, 300, 900, 3000]))])
        named = {name: value for name in draw.sample(names, draw.choice([1, 2]))}
        head = json.dumps(row)[:-1] if draw.random() < 0.8 else '{"id": 1'
        changed.append(f"{head}, {dumped(named)[1:]}")
    return "\n".join(changed).encode("utf-8", "replace")


def dumped(values: dict) -> str:
    return "{" + ", ".join(f'"{k}": {deep(v)}' for k, v in values.items()) + "}"


def deep(value) -> str:
    """JSON of a value that may be nested more deeply than json.dumps goes."""
    depth = 0
    while isinstance(value, list) and len(value) == 1:
        value, depth = value[0], depth + 1
    return "[" * depth + json.dumps(value) + "]" * depth


def read(path: Path, stage: str, strings: str) -> int:
    count = 0
    for held_out in (False, True):
        data = Data(path=str(path), eval_fraction=0.5, max_row_bytes=2000)
        sources.described(data, held_out)
        for row in sources.read(data, held_out):
            count += 1
            assert row.values is None or not row.problem
            if row.problem:
                assert row.problem.startswith(str(row.place)) and "\n" not in row.problem
                continue
            try:
                rows.example(stage, row.values, row.place, strings)
                rows.carried(stage, row.values, row.place)
            except UserError:
                pass
    return count


def main(kind: str, count: int, directory: Path) -> None:
    content = b"" if kind == "types" else good(kind)
    path = directory / f"rows.{'jsonl' if kind == 'types' else kind}"
    if kind == "saved":
        saved_splits(directory / "rows.saved", train=["a", "b"], test=["c"])
    refused = 0
    for seed in range(count):
        print(kind, seed, flush=True)
        draw = random.Random(f"{kind} {seed}")
        if kind == "saved":
            file = draw.choice([f for f in sorted(path.rglob("*")) if f.is_file()])
            before = file.read_bytes()
            file.write_bytes(spoilt(before, draw))
        else:
            path.write_bytes(mistyped(draw) if kind == "types" else damaged(content, kind, draw))
        try:
            read(path, draw.choice(["sft", "rm", "dpo"]), draw.choice(["chat", "plain"]))
        except UserError as error:
            assert str(directory) in str(error), error
            refused += 1
        if kind == "saved":
            file.write_bytes(before)
    print(f"{refused} of {count} refused")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
