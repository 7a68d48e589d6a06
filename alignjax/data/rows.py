"""A row's columns -> an `Example`: one side for SFT, (chosen, rejected) for a preference pair.

The columns are TRL's (`messages`; `prompt` and `completion`; `prompt`, `chosen`, `rejected`),
ShareGPT's (`conversations`) or Alpaca's (`instruction`, `input`, `output`). Where a row has those
of several, the first of this order counts.
"""

import difflib
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from alignjax.data.conversations import (
    check_answer,
    check_conversation,
    check_prompt,
    read_messages,
)
from alignjax.data.formats import Place, type_name

_SFT = ("messages", "prompt", "completion", "conversations", "instruction", "output")
_PAIR = ("chosen", "rejected", "prompt", "conversations", "instruction")
_LARGEST = float(np.finfo(np.float32).max)  # of a number that a row carries


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
    place: Place
    row: dict


def sides_of(stage: str) -> int:
    """Sequences of an item: one conversation, or the two of a pair."""
    return 1 if stage == "sft" else 2


def example(stage: str, row: dict, place: Place, strings: str) -> Example:
    """A row as an example of a stage, "sft", "rm" or "dpo". `strings` is "chat" or "plain".

    Raises ValueError with the place and the fix.
    """
    for name in ("tools", "functions"):
        if row.get(name) and row[name] not in ("[]", "{}", "null"):
            raise ValueError(
                f"{place}: `{name}` is not empty, and tool use is not supported; remove the column "
                "and the turns that call tools, or the row."
            )
    sides = _pair(row, place, strings) if sides_of(stage) == 2 else (_sft(row, place, strings),)
    return Example(sides, place, row)


def user_turns(example: Example) -> int:
    """User turns of an example's prompt; 0 where it is plain text, or all of a row is answer."""
    prompt = example.sides[0].prompt
    return 0 if isinstance(prompt, str) else sum(turn["role"] == "user" for turn in prompt)


def carried(row: dict, place: Place) -> dict[str, float | str]:
    """The columns `margin`, `weight` and `source` of a row, those that hold something."""
    found: dict[str, float | str] = {}
    for name in ("margin", "weight"):
        value = row.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{place}: `{name}` must be a number, not {type_name(value)}.")
        if not abs(value) <= _LARGEST:  # NaN is not either
            raise ValueError(
                f"{place}: `{name}` is {value}; it must be a finite number, of float32."
            )
        found[name] = float(value)
    if found.get("weight", 0.0) < 0:
        raise ValueError(
            f"{place}: `weight` is {row['weight']}; it must be 0 or more (swap `chosen` and "
            "`rejected` to turn a pair round)."
        )
    source = row.get("source")
    if source is not None:
        if not isinstance(source, str):
            raise ValueError(f"{place}: `source` must be a string, not {type_name(source)}.")
        found["source"] = source
    return found


# SFT


def _sft(row: dict, place: Place, strings: str) -> Side:
    held = {name for name, value in row.items() if value is not None}
    if "messages" in held:
        turns = read_messages(row["messages"], "messages", place)
        check_conversation(turns, "messages", place)
        return Side([], turns)
    if {"prompt", "completion"} <= held:
        prompt = _turns(row["prompt"], "prompt", "user", strings, place)
        completion = _turns(row["completion"], "completion", "assistant", strings, place)
        return _side(prompt, completion, "completion", place)
    if "conversations" in held:
        turns = read_messages(row["conversations"], "conversations", place)
        check_conversation(turns, "conversations", place)
        return Side([], _with_system(turns, row, place))
    if {"instruction", "output"} <= held:
        answer = _turns(row["output"], "output", "assistant", strings, place)
        side = _side(_alpaca_prompt(row, place, strings), answer, "output", place)
        return Side([], [*side.prompt, *side.answer])  # data.train_on decides about old answers
    pair = {"chosen", "rejected"} <= held
    hint = " (a preference pair, where an SFT row has one answer)" if pair else ""
    raise ValueError(
        f"{place}: an SFT row needs `messages`, or `prompt` and `completion`, or `conversations`, "
        f"or `instruction` and `output`; it has {_columns(row, _SFT)}{hint}."
    )


def _side(prompt, answer, column: str, place: Place) -> Side:
    """A prompt and its answer, checked: both text, or both messages in order."""
    if isinstance(prompt, str) != isinstance(answer, str):
        raise ValueError(
            f"{place}: the prompt and `{column}` must both be text or both messages; make them "
            "alike, or set data.strings=chat."
        )
    if isinstance(answer, list):
        check_answer(answer, column, place)
    return Side(prompt, answer)


# Pairs


def _pair(row: dict, place: Place, strings: str) -> tuple[Side, Side]:
    if row.get("chosen") is None or row.get("rejected") is None:
        raise ValueError(
            f"{place}: a preference row needs `chosen` and `rejected`, and a prompt as `prompt`, "
            "`conversations` or `instruction` or as what both begin with; it has "
            f"{_columns(row, _PAIR)}."
        )
    if isinstance(row["chosen"], str) != isinstance(row["rejected"], str):
        raise ValueError(
            f"{place}: one of `chosen` and `rejected` is text and the other messages; make them "
            "alike."
        )
    chosen, rejected = (
        _turns(row[name], name, "assistant", strings, place) for name in ("chosen", "rejected")
    )
    if chosen == rejected:
        raise ValueError(
            f"{place}: `chosen` and `rejected` are the same, so the pair prefers nothing; remove "
            "the row."
        )
    whole = _is_whole(chosen) and _is_whole(rejected)
    if whole and isinstance(row.get("prompt"), str):  # it repeats what both begin with
        prompt = None
    else:
        prompt = _prompt(row, place, strings)
    if prompt is not None:
        if whole and isinstance(prompt, list):
            chosen, rejected = _without_prompt(prompt, chosen, rejected, place)
    elif whole:
        prompt, chosen, rejected = _split_conversations(chosen, rejected, place)
    elif isinstance(chosen, str):
        prompt, chosen, rejected = _split_text(chosen, rejected)
    else:
        raise ValueError(
            f"{place}: there is no prompt: `chosen` and `rejected` are answers alone, and the row "
            f"has {_columns(row, _PAIR)}; add a `prompt` column, or set data.strings=plain for "
            "strings that hold their prompt."
        )
    return _side(prompt, chosen, "chosen", place), _side(prompt, rejected, "rejected", place)


def _without_prompt(prompt: list[dict], chosen: list[dict], rejected: list[dict], place: Place):
    """The answers of whole conversations that begin with the prompt column's messages."""
    begins = [side[: len(prompt)] == prompt for side in (chosen, rejected)]
    if any(begins) and not all(begins):
        with_it, without = ("chosen", "rejected") if begins[0] else ("rejected", "chosen")
        raise ValueError(
            f"{place}: `{with_it}` begins with the prompt and `{without}` does not; give both as "
            "whole conversations of one prompt, or both as the answer alone."
        )
    if not all(begins):
        raise ValueError(
            f"{place}: `chosen` and `rejected` are whole conversations, and neither begins with "
            "the prompt; make them begin with it, or give the answers alone."
        )
    check_conversation(chosen, "chosen", place)
    check_conversation(rejected, "rejected", place)
    return chosen[len(prompt) :], rejected[len(prompt) :]


def _prompt(row: dict, place: Place, strings: str) -> list[dict] | str | None:
    """The prompt that a column of its own holds, or None."""
    if row.get("prompt") is not None:
        return _turns(row["prompt"], "prompt", "user", strings, place)
    if row.get("conversations") is not None:
        turns = read_messages(row["conversations"], "conversations", place)
        check_prompt(turns, "conversations", place)
        return _with_system(turns, row, place)
    if row.get("instruction") is not None:
        return _alpaca_prompt(row, place, strings)
    return None


def _is_whole(answer: list[dict] | str) -> bool:
    """Whether a side holds its prompt as well: an answer alone begins with the assistant."""
    return isinstance(answer, list) and bool(answer) and answer[0]["role"] in ("system", "user")


def _split_conversations(chosen: list[dict], rejected: list[dict], place: Place):
    """Splits off the messages that both sides begin with, up to an answer."""
    check_conversation(chosen, "chosen", place)
    check_conversation(rejected, "rejected", place)
    shorter = min(len(chosen), len(rejected))
    same = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter - 1)
    while same and {chosen[same]["role"], rejected[same]["role"]} != {"assistant"}:
        same -= 1
    if not same:
        raise ValueError(
            f"{place}: `chosen` and `rejected` begin with different prompts; both sides of a pair "
            "answer one."
        )
    return chosen[:same], chosen[same:], rejected[same:]


def _split_text(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Splits off the text that both sides begin with, up to a word's start."""
    shorter = min(len(chosen), len(rejected))
    same = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter)
    while same and not chosen[same - 1].isspace():
        same -= 1
    return chosen[:same], chosen[same:], rejected[same:]


# Columns


def _turns(value, column: str, role: str, strings: str, place: Place) -> list[dict] | str:
    """A prompt (role "user") or an answer as messages, or as it is where strings are plain."""
    if isinstance(value, str):
        if not value.strip() and (strings == "chat" or role == "assistant"):
            raise ValueError(f"{place}: `{column}` is empty; fill it in, or remove the row.")
        return value if strings == "plain" else [{"role": role, "content": value}]
    listed = [value] if isinstance(value, dict) else value
    turns = read_messages(listed, column, place, also="a string or ")
    if not turns:
        raise ValueError(f"{place}: `{column}` is empty; fill it in, or remove the row.")
    if role == "user":
        check_prompt(turns, column, place)
    return turns


def _with_system(turns: list[dict], row: dict, place: Place) -> list[dict]:
    """ShareGPT's and Alpaca's `system` column as the first message."""
    system = _text(row, "system", place)
    first = {"role": "system", "content": system}
    if not system or turns[0] == first:
        return turns
    if turns[0]["role"] == "system":
        raise ValueError(
            f"{place}: both the `system` column and the first message are system texts, and they "
            "differ; keep one."
        )
    return [first, *turns]


def _alpaca_prompt(row: dict, place: Place, strings: str) -> list[dict]:
    """`instruction` and `input` as a user turn, behind the turns of `history`."""
    if strings == "plain":
        raise ValueError(
            f"{place}: `instruction` is a turn of a chat, and data.strings=plain is for text as it "
            "is; set data.strings=chat, or give the text as `prompt`."
        )
    asked = [_text(row, "instruction", place), _text(row, "input", place)]
    question = "\n".join(text for text in asked if text)
    if not question:
        raise ValueError(f"{place}: `instruction` is empty; fill it in, or remove the row.")
    turns = []
    history = row.get("history") or []
    pairs = isinstance(history, list) and all(
        isinstance(pair, list) and [type(text) for text in pair] == [str, str] for pair in history
    )
    if not pairs:
        raise ValueError(f"{place}: `history` must be a list of [question, answer] strings.")
    for old_question, old_answer in history:
        turns.append({"role": "user", "content": old_question})
        turns.append({"role": "assistant", "content": old_answer})
    return _with_system([*turns, {"role": "user", "content": question}], row, place)


def _text(row: dict, column: str, place: Place) -> str:
    """A string column; "" where it is absent, null or blank."""
    value = row.get(column)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{place}: `{column}` must be a string, not {type_name(value)}.")
    return value if value and value.strip() else ""


def _columns(row: dict, expected: Collection[str]) -> str:
    """A row's columns for a sentence, with what a misspelt one may have meant."""
    missing = [name for name in expected if row.get(name) is None]
    return ", ".join(_column(name, row[name], missing) for name in row) or "no columns"


def _column(name: str, value, missing: list[str]) -> str:
    if value is None:
        return f"`{name}` (null)"
    near = difflib.get_close_matches(name.lower(), missing, 1, 0.8)
    return f"`{name}` (did you mean `{near[0]}`?)" if near else f"`{name}`"
