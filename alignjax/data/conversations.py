"""Messages of a conversation: their two notations, and the order their roles must have.

Both {"role", "content"} and ShareGPT's {"from", "value"} become {"role", "content"}. Numbers of
messages in sentences are counted from 1 in the row's own column.
"""

from collections.abc import Collection

from alignjax.data.formats import Place, type_name
from alignjax.errors import UserError

ROLES = ("system", "user", "assistant", "tool")
NAMES = {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "observation": "tool",
}  # other names of the roles, as ShareGPT's files have them
_CALLS = ("function_call", "tool_call")  # ShareGPT's turns that call a tool
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


def read_messages(value: object, column: str, place: Place, also: str = "") -> list[dict]:
    """A column as messages with `role` and `content`. `also` names what else it could have been.

    Other keys that hold something stay, for the chat template.
    """
    if not isinstance(value, list):
        raise UserError(
            f"{place}: `{column}` must be {also}a list of messages, not {type_name(value)}."
        )
    return [
        _message(message, f"message {number} of `{column}`", place)
        for number, message in enumerate(value, 1)
    ]


def _message(message: object, name: str, place: Place) -> dict:
    if not isinstance(message, dict):
        raise UserError(
            f"{place}: {name} must be an object with `role` and `content`, not "
            f"{type_name(message)}."
        )
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
            keys = ", ".join(f"`{k}`" for k in held) or "no keys"
            raise UserError(f"{place}: {name} has no `{key}`; it has {keys}.")
        if not isinstance(held[key], str):
            raise UserError(
                f"{place}: `{key}` of {name} must be a string, not {type_name(held[key])}."
            )
    role = NAMES.get(held[role_key], held[role_key])
    if role not in ROLES:
        raise UserError(
            f"{place}: {name} has the role `{role}`; there are {', '.join(ROLES)} (and {_names()})."
        )
    rest = {key: held[key] for key in held if key not in (role_key, content_key)}
    return {"role": role, "content": held[content_key]} | ({} if sharegpt else rest)


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
