"""Rows of a file -> conversations, in TRL's column conventions.

A row becomes an `Example`: one side for SFT, (chosen, rejected) for a preference pair.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Side:
    """One conversation. `answer` holds loss; `prompt` does not.

    Both are lists of messages, or plain text where the run asks for `data.strings=plain`.
    """

    prompt: list[dict] | str
    answer: list[dict] | str


@dataclass(frozen=True)
class Example:
    sides: tuple[Side, ...]
    line: int  # in the file, counted from 1
    row: dict


def read_jsonl(path: Path) -> list[tuple[int, dict]]:
    """Rows of a JSON-lines file with their line numbers; blank lines are passed over."""
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; set data.path to a JSONL file.")
    rows = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise ValueError(f"{path}, line {number}: this is not JSON ({error}).") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: a row must be a JSON object, {{...}}.")
            rows.append((number, row))
    if not rows:
        raise ValueError(f"{path}: the file holds no rows.")
    return rows


def in_split(rows: list[tuple[int, dict]], split: str, held_out: bool, fraction: float):
    """Rows of a split: by their `split` column, else by a hash of the prompt.

    A row without the column is training data, unless its prompt's hash falls in the held-out
    `fraction`; all sides of one prompt fall together.
    """
    if any("split" in row for _, row in rows):
        return [(line, row) for line, row in rows if row.get("split") == split]
    return [(line, row) for line, row in rows if (_hash01(row) < fraction) == held_out]


def _hash01(row: dict) -> float:
    """A number in [0, 1) that the row's prompt decides."""
    prompt = row.get("prompt") or row.get("messages") or row.get("chosen")
    if isinstance(prompt, list):
        asked = [m for m in prompt if not (isinstance(m, dict) and m.get("role") == "assistant")]
        prompt = asked[:2]
    elif "prompt" not in row and isinstance(prompt, str):
        prompt = os.path.commonprefix([prompt, str(row.get("rejected"))])
    digest = hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def sft_example(line: int, row: dict, strings: str, where: str) -> Example:
    """`messages`, or `prompt` and `completion` (strings or lists of messages)."""
    if "messages" in row:
        side = Side([], _messages(row["messages"], "messages", where))
    elif "prompt" in row and "completion" in row:
        side = Side(
            _turns(row["prompt"], "prompt", "user", strings, where),
            _turns(row["completion"], "completion", "assistant", strings, where),
        )
    else:
        raise ValueError(
            f"{where}: an SFT row needs `messages`, or `prompt` and `completion`; it has "
            f"{_columns(row)}."
        )
    _check_answer(side, where)
    return Example((side,), line, row)


def pair_example(line: int, row: dict, strings: str, where: str) -> Example:
    """`chosen` and `rejected`, with `prompt` or with the prompt as their common beginning."""
    if "chosen" not in row or "rejected" not in row:
        raise ValueError(
            f"{where}: a preference row needs `chosen` and `rejected` (and `prompt`); it has "
            f"{_columns(row)}."
        )
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    for name in ("chosen", "rejected"):
        if not isinstance(row[name], str):
            _messages(row[name], name, where)
    lists = isinstance(chosen, list) and isinstance(rejected, list)
    whole = lists and chosen[:1] == rejected[:1] and chosen[:1] and _opens(chosen[0])
    if prompt is None or (isinstance(prompt, str) and whole):
        prompt, chosen, rejected = _common_prompt(chosen, rejected, strings, where)
    elif isinstance(prompt, list) and whole and prompt and chosen[: len(prompt)] == prompt:
        if rejected[: len(prompt)] != prompt:
            raise ValueError(f"{where}: `chosen` begins with `prompt` and `rejected` does not.")
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    prompt = _turns(prompt, "prompt", "user", strings, where)
    sides = tuple(
        Side(prompt, _turns(answer, name, "assistant", strings, where))
        for answer, name in ((chosen, "chosen"), (rejected, "rejected"))
    )
    for side in sides:
        _check_answer(side, where)
    return Example(sides, line, row)


def _opens(message: dict) -> bool:
    """Whether a conversation can begin with this message; an answer alone begins with another."""
    return message["role"] != "assistant"


def _common_prompt(chosen, rejected, strings: str, where: str):
    """Splits off what both sides begin with: whole messages, or text up to a word's start."""
    if isinstance(chosen, list) != isinstance(rejected, list):
        raise ValueError(f"{where}: `chosen` and `rejected` must both be lists or both strings.")
    shorter = min(len(chosen), len(rejected))
    same = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter)
    if isinstance(chosen, str):
        if strings == "chat":
            raise ValueError(
                f"{where}: string `chosen` and `rejected` need a `prompt` column; for text that "
                "holds its prompt set data.strings=plain."
            )
        while same and not chosen[same - 1].isspace():
            same -= 1
    elif same == shorter and same:
        same -= 1
    return chosen[:same], chosen[same:], rejected[same:]


def _turns(value, column: str, role: str, strings: str, where: str):
    """A column as messages, or as it is where strings are plain text."""
    if isinstance(value, str):
        return value if strings == "plain" else [{"role": role, "content": value}]
    return _messages(value, column, where)


def _messages(value, column: str, where: str) -> list[dict]:
    if not isinstance(value, list):
        raise ValueError(f"{where}: `{column}` must be a string or a list of messages.")
    for message in value:
        if (
            not isinstance(message, dict)
            or message.get("role") not in ROLES
            or not isinstance(message.get("content"), str)
        ):
            raise ValueError(
                f"{where}: every message of `{column}` needs a `role` ({', '.join(ROLES)}) and a "
                f"string `content`; this one is {json.dumps(message)[:80]}."
            )
    return value


def _check_answer(side: Side, where: str) -> None:
    if isinstance(side.prompt, str) != isinstance(side.answer, str):
        raise ValueError(f"{where}: the prompt and its answers must all be text or all messages.")
    answers = (
        [side.answer]
        if isinstance(side.answer, str)
        else [m["content"] for m in side.answer if m["role"] == "assistant"]
    )
    if not answers or not all(answer.strip() for answer in answers):
        raise ValueError(f"{where}: an answer is empty; remove the row or fill it in.")


def _columns(row: dict) -> str:
    return ", ".join(f"`{name}`" for name in row) or "no columns"
