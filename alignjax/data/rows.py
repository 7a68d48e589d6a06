"""A row's columns -> an `Example`: one side for SFT, (chosen, rejected) for a preference pair.

The columns are TRL's (`messages`; `prompt` and `completion`; `prompt`, `chosen`, `rejected`),
ShareGPT's (`conversations`) or Alpaca's (`instruction`, `input`, `output`), TRL's `text`, which is
all trained on as it is, or those of a set of responses (see `sets`). Where a row has those of
several, the first of this order counts.
"""

from dataclasses import dataclass

from alignjax.data import sets
from alignjax.data.columns import (
    LARGEST,
    Side,
    alpaca_prompt,
    label,
    listed,
    number,
    prompt_of,
    side_of,
    turns_of,
    with_system,
)
from alignjax.data.conversations import check_conversation, read_messages
from alignjax.data.formats import Place
from alignjax.errors import UserError
from alignjax.validate import check

_SFT = ("messages", "prompt", "completion", "conversations", "instruction", "output", "text")
_SCORES = ("score_chosen", "score_rejected")
_PAIR = ("chosen", "rejected", "prompt", "conversations", "instruction")


@dataclass(frozen=True)
class Example:
    sides: tuple[Side, ...]  # from the best to the worst
    ranks: tuple[int, ...]  # of the sides, from 1; those that none is better than share one
    place: Place
    row: dict


def sides_of(stage: str) -> int:
    """Sequences that an item has at least: one conversation, or the two of a pair."""
    return 1 if stage == "sft" else 2


def is_pair(row: dict) -> bool:
    """Whether a preference row is to be read as a pair, and not as a set of responses."""
    named = row.get("chosen") is not None or row.get("rejected") is not None
    return named or not sets.column_of(row)


def example(stage: str, row: dict, place: Place, strings: str) -> Example:
    """A row as an example of a stage, "sft", "rm" or "dpo". `strings` is "chat" or "plain".

    Raises UserError with the place and the fix.
    """
    for name in ("tools", "functions"):
        if row.get(name) and row[name] not in ("[]", "{}", "null"):
            raise UserError(
                f"{place}: `{name}` is not empty, and tool use is not supported; remove the column "
                "and the turns that call tools, or the row."
            )
    if stage == "sft":
        sides, ranks = (_sft(row, place, strings),), (1,)
    elif is_pair(row):
        sides, ranks = _pair(stage, row, place, strings), (1, 2)
    elif stage == "dpo":
        raise UserError(
            f"{place}: `{sets.column_of(row)}` is a set of responses, which rm trains on and dpo "
            "does not; give two of them as `chosen` and `rejected`, such as the best and the worst."
        )
    else:
        sides, ranks = sets.read_set(row, place, strings)
    return Example(tuple(_finished(side, row, place) for side in sides), ranks, place, row)


def _finished(side: Side, row: dict, place: Place) -> Side:
    """A side whose messages are as the template takes them, with what else its row says of it."""
    kwargs = row.get("chat_template_kwargs") or {}
    check(kwargs, dict, str(place), "chat_template_kwargs")
    if isinstance(side.answer, str):
        return side
    turns, begin = [*side.prompt, *side.answer], len(side.prompt)
    answers = [i for i in range(begin, len(turns)) if turns[i]["role"] == "assistant"]
    kept_out = tuple(i for i in answers if "train" in turns[i])
    if len(kept_out) == len(answers):
        raise UserError(
            f"{place}: `weight` or `train` of its messages keeps every answer out of training; "
            "remove the key, or the row."
        )
    turns = [{key: turn[key] for key in turn if key != "train"} for turn in turns]
    kwargs = {key: value for key, value in kwargs.items() if value is not None}  # Parquet's
    return Side(turns[:begin], turns[begin:], kept_out, kwargs)


def user_turns(example: Example) -> int:
    """User turns of an example's prompt; 0 where it is plain text, or all of a row is answer."""
    prompt = example.sides[0].prompt
    return 0 if isinstance(prompt, str) else sum(turn["role"] == "user" for turn in prompt)


def carried(stage: str, row: dict, place: Place) -> dict[str, float | str]:
    """The columns `margin`, `weight` and `source` of a row, those that hold something.

    For dpo, which chooses pairs by the margin and does not train on it, the margin may also be
    that of UltraFeedback's `score_chosen` over `score_rejected`.
    """
    found: dict[str, float | str] = {}
    for name in ("margin", "weight"):
        if row.get(name) is not None:
            found[name] = number(row[name], name, place, 0.0 if name == "weight" else -LARGEST)
    scores = [row.get(name) for name in _SCORES]
    if stage == "dpo" and "margin" not in found and None not in scores:
        better, worse = (number(row[name], name, place) for name in _SCORES)
        found["margin"] = number(better - worse, "score_chosen - score_rejected", place)
    if (source := label(row, "source", place)) is not None:
        found["source"] = source
    return found


# SFT


def _sft(row: dict, place: Place, strings: str) -> Side:
    held = {name for name, value in row.items() if value is not None}
    if "messages" in held:
        turns = read_messages(row["messages"], "messages", place)
        check_conversation(turns, "messages", place)
        return Side([], with_system(turns, row, place))
    if {"prompt", "completion"} <= held:
        prompt = prompt_of(row, place, strings)
        completion = turns_of(row["completion"], "completion", "assistant", strings, place)
        return side_of(prompt, completion, "completion", place)
    if "conversations" in held:
        turns = read_messages(row["conversations"], "conversations", place)
        check_conversation(turns, "conversations", place)
        return Side([], with_system(turns, row, place))
    if {"instruction", "output"} <= held:
        answer = turns_of(row["output"], "output", "assistant", strings, place)
        side = side_of(alpaca_prompt(row, place, strings), answer, "output", place)
        return Side([], [*side.prompt, *side.answer])  # data.train_on decides about old answers
    if "text" in held:
        check(row["text"], str, str(place), "text")
        return Side("", turns_of(row["text"], "text", "assistant", "plain", place))
    pair = {"chosen", "rejected"} <= held
    hint = " (a preference pair, where an SFT row has one answer)" if pair else ""
    raise UserError(
        f"{place}: an SFT row needs `messages`, or `prompt` and `completion`, or `conversations`, "
        f"or `instruction` and `output`, or `text`; it has {listed(row, _SFT)}{hint}."
    )


# Pairs


def _pair(stage: str, row: dict, place: Place, strings: str) -> tuple[Side, Side]:
    if row.get("chosen") is None or row.get("rejected") is None:
        among = "" if stage == "dpo" else " (or is a set: `responses`, and `scores` or `ranks`)"
        known = _PAIR if stage == "dpo" else (*_PAIR, *sets.COLUMNS)
        raise UserError(
            f"{place}: a preference row needs `chosen` and `rejected`{among}, and a prompt as "
            "`prompt`, `conversations` or `instruction` or as what both begin with; it has "
            f"{listed(row, known)}."
        )
    if isinstance(row["chosen"], str) != isinstance(row["rejected"], str):
        raise UserError(
            f"{place}: one of `chosen` and `rejected` is text and the other messages; make them "
            "alike."
        )
    chosen, rejected = (
        turns_of(row[name], name, "assistant", strings, place) for name in ("chosen", "rejected")
    )
    if chosen == rejected:
        raise UserError(
            f"{place}: `chosen` and `rejected` are the same, so the pair prefers nothing; remove "
            "the row."
        )
    whole = _is_whole(chosen) and _is_whole(rejected)
    if whole:
        chosen, rejected = (with_system(side, row, place) for side in (chosen, rejected))
    if whole and isinstance(row.get("prompt"), str):  # it repeats what both begin with
        prompt = None
    else:
        prompt = prompt_of(row, place, strings)
    if prompt is not None:
        if whole and isinstance(prompt, list):
            chosen, rejected = _without_prompt(prompt, chosen, rejected, place)
    elif whole:
        prompt, chosen, rejected = _split_conversations(chosen, rejected, place)
    elif isinstance(chosen, str):
        prompt, chosen, rejected = _split_text(chosen, rejected)
        prompt = with_system(prompt, row, place)
    else:
        raise UserError(
            f"{place}: there is no prompt: `chosen` and `rejected` are answers alone, and the row "
            f"has {listed(row, _PAIR)}; add a `prompt` column, or set data.strings=plain for "
            "strings that hold their prompt."
        )
    return side_of(prompt, chosen, "chosen", place), side_of(prompt, rejected, "rejected", place)


def _without_prompt(prompt: list[dict], chosen: list[dict], rejected: list[dict], place: Place):
    """The answers of whole conversations that begin with the prompt column's messages."""
    begins = [side[: len(prompt)] == prompt for side in (chosen, rejected)]
    if any(begins) and not all(begins):
        with_it, without = ("chosen", "rejected") if begins[0] else ("rejected", "chosen")
        raise UserError(
            f"{place}: `{with_it}` begins with the prompt and `{without}` does not; give both as "
            "whole conversations of one prompt, or both as the answer alone."
        )
    if not all(begins):
        raise UserError(
            f"{place}: `chosen` and `rejected` are whole conversations, and neither begins with "
            "the prompt; make them begin with it, or give the answers alone."
        )
    check_conversation(chosen, "chosen", place)
    check_conversation(rejected, "rejected", place)
    return chosen[len(prompt) :], rejected[len(prompt) :]


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
        raise UserError(
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
