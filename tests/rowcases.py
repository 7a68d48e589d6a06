"""Messages and rows in short, the examples they make, and the sentence that refuses one."""

import pytest

from alignjax.data import rows
from alignjax.data.columns import Side
from alignjax.data.formats import Place

PLACE = Place("f.jsonl", 7, "line")
WHERE = "f.jsonl, line 7"
EMPTY = "; fill it in, or remove the row."


def system(text: str) -> dict:
    return {"role": "system", "content": text}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def tool(text: str) -> dict:
    return {"role": "tool", "content": text}


def said(role: str, text: str) -> dict:
    """A message of ShareGPT's."""
    return {"from": role, "value": text}


def sft(row: dict, strings: str = "chat") -> Side:
    example = rows.example("sft", row, PLACE, strings)
    assert (example.place, example.row, len(example.sides)) == (PLACE, row, 1)
    return example.sides[0]


def pair(row: dict, strings: str = "chat") -> tuple[Side, Side]:
    example = rows.example("dpo", row, PLACE, strings)
    assert (example.place, example.row) == (PLACE, row)
    chosen, rejected = example.sides
    return chosen, rejected


def refusal(make, *arguments) -> str:
    with pytest.raises(ValueError) as caught:
        make(*arguments)
    return str(caught.value)
