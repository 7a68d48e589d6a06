"""Columns of a row as prompts and answers, whatever the row is of."""

import difflib
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np

from alignjax.data.conversations import check_answer, check_prompt, read_messages
from alignjax.data.formats import Place, type_name
from alignjax.errors import UserError

_LARGEST = float(np.finfo(np.float32).max)  # of a number that a row carries


@dataclass(frozen=True)
class Side:
    """One conversation. `answer` holds loss; `prompt` does not.

    Both are lists of messages, or plain text where the run asks for `data.strings=plain`.
    """

    prompt: list[dict] | str
    answer: list[dict] | str
    template_kwargs: dict = field(default_factory=dict)  # more variables for the chat template


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
        return turns_of(row["prompt"], "prompt", "user", strings, place)
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
    turns = read_messages(listed, column, place, also="a string or ")
    if not turns:
        raise UserError(f"{place}: `{column}` is empty; fill it in, or remove the row.")
    if role == "user":
        check_prompt(turns, column, place)
    return turns


def with_system(turns: list[dict], row: dict, place: Place) -> list[dict]:
    """ShareGPT's and Alpaca's `system` column as the first message."""
    system = _text(row, "system", place)
    first = {"role": "system", "content": system}
    if not system or turns[0] == first:
        return turns
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
    if value is not None and not isinstance(value, str):
        raise UserError(f"{place}: `{column}` must be a string, not {type_name(value)}.")
    return value if value and value.strip() else ""


def listed(row: dict, expected: Collection[str]) -> str:
    """A row's columns for a sentence, with what a misspelt one may have meant."""
    missing = [name for name in expected if row.get(name) is None]
    return ", ".join(_column(name, row[name], missing) for name in row) or "no columns"


def _column(name: str, value, missing: list[str]) -> str:
    if value is None:
        return f"`{name}` (null)"
    near = difflib.get_close_matches(name.lower(), missing, 1, 0.8)
    return f"`{name}` (did you mean `{near[0]}`?)" if near else f"`{name}`"


def number(value: object, name: str, place: Place) -> float:
    """A number that a row gives under a name."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{place}: `{name}` must be a number, not {type_name(value)}.")
    if not abs(value) <= _LARGEST:  # NaN is not either
        raise UserError(f"{place}: `{name}` is {value}; it must be a finite number, of float32.")
    return float(value)
