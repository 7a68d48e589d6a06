"""Messages of a conversation: their two notations, and the order their roles must have.

Both {"role", "content"} and ShareGPT's {"from", "value"} become {"role", "content"}. Numbers of
messages in sentences are counted from 1 in the row's own column.
"""

from collections.abc import Collection
from typing import Any

from alignjax.data.formats import Place, in_words
from alignjax.errors import UserError
from alignjax.validate import check

ROLES = ("system", "user", "assistant", "tool")
NAMES = {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "observation": "tool",
}  # other names of the roles, as ShareGPT's files have them
_CALLS = ("function_call", "tool_call")  # ShareGPT's turns that call a tool
_TRAINED = ("weight", "train", "train_detail")  # whether a message is trained on
_AFTER = {  # a role, or "" for none -> the roles that may follow
    "": ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool", "user"),
}


def is_answer(message: object) -> bool:
    """Whether a message, in either notation and perhaps malformed, is an assistant's."""
    if not isinstance(message, dict):
        return False
    role = message.get("role") or message.get("from")
    return role == "assistant" or (isinstance(role, str) and NAMES.get(role) == "assistant")


def read_messages(value: object, column: str, place: Place, kind: Any = list) -> list[dict]:
    """A column as messages with `role` and `content`. `kind` is what it may be, a list or more.

    Other keys that hold something stay, for the chat template, but for `weight` and `train`, which
    leave `train: False` in an assistant's message that is kept out of training.
    """
    check(value, kind, str(place), column)
    return [
        _message(message, f"message {number} of `{column}`", place)
        for number, message in enumerate(value, 1)
    ]


def _message(message: object, name: str, place: Place) -> dict:
    check(message, dict, str(place), name)
    # Parquet gives every message the keys of all, so a key counts only where it holds something.
    held = {key: value for key, value in message.items() if value is not None}
    sharegpt = "role" not in held and "content" not in held and bool({"from", "value"} & set(held))
    role_key, content_key = ("from", "value") if sharegpt else ("role", "content")
    if held.get("tool_calls") or held.get("function_call") or held.get(role_key) in _CALLS:
        raise UserError(
            f"{place}: {name} calls a tool, and tool use is not supported; remove the turns that "
            "call tools, or the row."
        )
    for key in (role_key, content_key):
        if key not in held:
            keys = ", ".join(f"`{in_words(k)}`" for k in held) or "no keys"
            raise UserError(f"{place}: {name} has no `{key}`; it has {keys}.")
        check(held[key], str, str(place), f"`{key}` of {name}")
    role = NAMES.get(held[role_key], held[role_key])
    if role not in ROLES:
        raise UserError(
            f"{place}: {name} has the role `{in_words(role)}`; there are {', '.join(ROLES)} (and "
            f"{_names()})."
        )
    rest = {key: held[key] for key in held if key not in (role_key, content_key, *_TRAINED)}
    result = {"role": role, "content": held[content_key]} | ({} if sharegpt else rest)
    if not _is_trained(held, name, place) and role == "assistant":
        result["train"] = False
    return result


def _is_trained(held: dict, name: str, place: Place) -> bool:
    """What OpenAI's `weight` and axolotl's `train` say of a message; True where it has neither."""
    for key in _TRAINED:
        if held.get(key, 1) not in (0, 1):  # nor false or true
            raise UserError(
                f"{place}: `{key}` of {name} is {in_words(str(held[key]))}; it must be 0 or 1, or "
                "false or true: a turn is trained on as a whole, or not."
            )
    return all(held.get(key, 1) for key in _TRAINED)


def _names() -> str:
    return ", ".join(f"{name} for {role}" for name, role in NAMES.items())


def check_conversation(turns: list[dict], column: str, place: Place) -> None:
    """A whole conversation: its roles in order, an answer in it, no turn empty."""
    _check_order(turns, column, place)
    if not any(turn["role"] == "assistant" for turn in turns):
        raise UserError(
            f"{place}: `{column}` has no assistant turn, so there is nothing to learn; add the "
            "answer, or remove the row."
        )
    _check_filled(turns, ("user", "assistant"), column, place)


def check_prompt(turns: list[dict], column: str, place: Place) -> None:
    """What comes before an answer: it ends with a user or tool turn. Old answers may be empty."""
    _check_order(turns, column, place)
    last = turns[-1]["role"] if turns else ""
    if last == "assistant":
        raise UserError(
            f"{place}: `{column}` ends with an assistant turn, and an answer follows it; move the "
            "turn to where the answer begins, or remove it."
        )
    if last not in ("user", "tool"):
        raise UserError(f"{place}: `{column}` has no user turn; add it, or remove the row.")
    _check_filled(turns, ("user",), column, place)


def check_answer(turns: list[dict], column: str, place: Place) -> None:
    """What follows a prompt: it begins with an assistant turn, and no turn is empty."""
    if not turns:
        raise UserError(
            f"{place}: `{column}` has nothing behind the prompt; add the answer, or remove the row."
        )
    if turns[0]["role"] != "assistant":
        raise UserError(
            f"{place}: `{column}` begins with a {turns[0]['role']} turn; an answer begins with an "
            "assistant turn."
        )
    _check_order(turns, column, place, last="user")
    _check_filled(turns, ("user", "assistant"), column, place)


def _check_order(turns: list[dict], column: str, place: Place, last: str = "") -> None:
    for number, turn in enumerate(turns, 1):
        role = turn["role"]
        if role == last != "tool":
            raise UserError(
                f"{place}: message {number} of `{column}` is a second {role} turn in a row; join "
                "the two, or remove one."
            )
        if role not in _AFTER[last]:
            raise UserError(
                f"{place}: message {number} of `{column}` has the role {role}; "
                f"{' or '.join(_AFTER[last])} comes {f'after {last}' if last else 'first'}."
            )
        last = role


def _check_filled(turns: list[dict], roles: Collection[str], column: str, place: Place) -> None:
    for number, turn in enumerate(turns, 1):
        if turn["role"] in roles and not turn["content"].strip():
            raise UserError(
                f"{place}: message {number} of `{column}`, of the role {turn['role']}, is empty; "
                "fill it in, or remove the row."
            )
