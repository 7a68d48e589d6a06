"""Columns of a row as prompts and answers, whatever the row is of."""

import difflib
from collections.abc import Collection
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Annotated

import numpy as np

from alignjax.data.conversations import check_answer, check_prompt, read_messages
from alignjax.data.formats import Place, in_words
from alignjax.errors import UserError
from alignjax.validate import Bound, check

LARGEST = float(np.finfo(np.float32).max)  # of a number that a row carries


@dataclass(frozen=True)
class Side:
    """One conversation. `answer` holds loss; `prompt` does not.

    Both are lists of messages, or plain text where the run asks for `data.strings=plain`.
    """

    prompt: list[dict] | str
    answer: list[dict] | str
    kept_out: tuple[int, ...] = ()  # turns of the answer that hold no loss, counted from the prompt
    template_kwargs: dict = field(default_factory=dict)  # what the chat template is given besides


def side_of(prompt, answer, column: str, place: Place) -> Side:
    """A prompt and its answer, checked: both text, or both messages in order."""
    if isinstance(prompt, str) != isinstance(answer, str):
        raise UserError(
            f"{place}: the prompt and `{column}` must both be text or both messages; make them "
            "alike, or set data.strings=chat."
        )
    if isinstance(answer, list):
        check_answer(answer, column, place)
    return Side(prompt, answer)


def prompt_of(row: dict, place: Place, strings: str) -> list[dict] | str | None:
    """The prompt that a column of its own holds, or None."""
    if row.get("prompt") is not None:
        return with_system(turns_of(row["prompt"], "prompt", "user", strings, place), row, place)
    if row.get("conversations") is not None:
        turns = read_messages(row["conversations"], "conversations", place)
        check_prompt(turns, "conversations", place)
        return with_system(turns, row, place)
    if row.get("instruction") is not None:
        return alpaca_prompt(row, place, strings)
    return None


def turns_of(value, column: str, role: str, strings: str, place: Place) -> list[dict] | str:
    """A prompt (role "user") or an answer as messages, or as it is where strings are plain."""
    if isinstance(value, str):
        if not value.strip() and (strings == "chat" or role == "assistant"):
            raise UserError(f"{place}: `{column}` is empty; fill it in, or remove the row.")
        return value if strings == "plain" else [{"role": role, "content": value}]
    listed = [value] if isinstance(value, dict) else value
    turns = read_messages(listed, column, place, str | list)
    if not turns:
        raise UserError(f"{place}: `{column}` is empty; fill it in, or remove the row.")
    if role == "user":
        check_prompt(turns, column, place)
    return turns


def with_system(turns: list[dict] | str, row: dict, place: Place) -> list[dict] | str:
    """A prompt, or a whole conversation, with the `system` column as its first message."""
    system = _text(row, "system", place)
    first = {"role": "system", "content": system}
    if not system or turns[:1] == [first]:
        return turns
    if isinstance(turns, str):
        raise UserError(
            f"{place}: `system` is a turn of a chat, and data.strings=plain is for text as it is; "
            "set data.strings=chat, or move the text into the prompt."
        )
    if turns[0]["role"] == "system":
        raise UserError(
            f"{place}: both the `system` column and the first message are system texts, and they "
            "differ; keep one."
        )
    return [first, *turns]


def alpaca_prompt(row: dict, place: Place, strings: str) -> list[dict]:
    """`instruction` and `input` as a user turn, behind the turns of `history`."""
    if strings == "plain":
        raise UserError(
            f"{place}: `instruction` is a turn of a chat, and data.strings=plain is for text as it "
            "is; set data.strings=chat, or give the text as `prompt`."
        )
    asked = [_text(row, "instruction", place), _text(row, "input", place)]
    question = "\n".join(text for text in asked if text)
    if not question:
        raise UserError(f"{place}: `instruction` is empty; fill it in, or remove the row.")
    turns = []
    history = row.get("history") or []
    pairs = isinstance(history, list) and all(
        isinstance(pair, list) and [type(text) for text in pair] == [str, str] for pair in history
    )
    if not pairs:
        raise UserError(f"{place}: `history` must be a list of [question, answer] strings.")
    for old_question, old_answer in history:
        turns.append({"role": "user", "content": old_question})
        turns.append({"role": "assistant", "content": old_answer})
    return with_system([*turns, {"role": "user", "content": question}], row, place)


def _text(row: dict, column: str, place: Place) -> str:
    """A string column; "" where it is absent, null or blank."""
    value = row.get(column)
    check(value, str | None, str(place), column)
    return value if value and value.strip() else ""


def listed(row: dict, expected: Collection[str]) -> str:
    """A row's columns for a sentence, with what a misspelt one may have meant."""
    missing = [name for name in expected if row.get(name) is None]
    return ", ".join(_column(name, row[name], missing) for name in row) or "no columns"


def _column(name: str, value, missing: list[str]) -> str:
    if value is None:
        return f"`{name}` (null)"
    near = difflib.get_close_matches(name.lower(), missing, 1, 0.8)
    name = in_words(name)
    return f"`{name}` (did you mean `{near[0]}`?)" if near else f"`{name}`"


def number(value: object, name: str, place: Place, least: float = -LARGEST) -> float:
    """A number that a row gives under a name."""
    value = float(value) if isinstance(value, Decimal) else value  # as databases export 0.5
    check(value, Annotated[float, Bound(least, LARGEST)], str(place), name)
    return float(value)


def label(row: dict, column: str, place: Place) -> str | None:
    """A name that a row has in a column, or None: text, or a whole number as its decimals."""
    check(row.get(column), str | int | None, str(place), column)
    return None if row.get(column) is None else str(row[column])
