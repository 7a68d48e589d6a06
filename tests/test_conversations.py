"""Conversations that make no example: every refusal with its place and its fix."""

import pytest
from rowcases import EMPTY, PLACE, WHERE, assistant, refusal, said, system, tool, user

from alignjax.data import rows


@pytest.mark.parametrize(
    ("turns", "sentence"),
    [
        (
            ["q"],
            "message 1 of `messages`='q': it must be an object.",
        ),
        (
            [user("q"), None],
            "message 2 of `messages`=None: it must be an object.",
        ),
        ([{"content": "q"}], "message 1 of `messages` has no `role`; it has `content`."),
        ([{"rolle": "user"}], "message 1 of `messages` has no `role`; it has `rolle`."),
        ([{}], "message 1 of `messages` has no `role`; it has no keys."),
        (
            [user("q"), {"role": "assistant", "content": None}],
            "message 2 of `messages` has no `content`; it has `role`.",
        ),
        ([{"from": "human"}], "message 1 of `messages` has no `value`; it has `from`."),
        ([{"value": "q"}], "message 1 of `messages` has no `from`; it has `value`."),
        (
            [user("q"), {"role": "assistant", "content": [{"type": "text"}]}],
            "`content` of message 2 of `messages`=[{'type': 'text'}]: it must be a string.",
        ),
        (
            [{"role": 5, "content": "q"}],
            "`role` of message 1 of `messages`=5: it must be a string.",
        ),
        (
            [user("q"), {"role": "bot", "content": "a"}],
            "message 2 of `messages` has the role `bot`; there are system, user, assistant, tool "
            "(and human for user, gpt for assistant, model for assistant, chatgpt for assistant, "
            "observation for tool).",
        ),
        (
            [user("q"), {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}],
            "message 2 of `messages` calls a tool, and tool use is not supported; remove the turns "
            "that call tools, or the row.",
        ),
        (
            [said("human", "q"), said("function_call", "{}")],
            "message 2 of `messages` calls a tool, and tool use is not supported; remove the turns "
            "that call tools, or the row.",
        ),
        (
            [],
            "`messages` has no assistant turn, so there is nothing to learn; add the answer, or "
            "remove the row.",
        ),
        (
            [system("s"), user("q")],
            "`messages` has no assistant turn, so there is nothing to learn; add the answer, or "
            "remove the row.",
        ),
        (
            [user("q"), user("r"), assistant("a")],
            "message 2 of `messages` is a second user turn in a row; join the two, or remove one.",
        ),
        (
            [user("q"), assistant("a"), assistant("b")],
            "message 3 of `messages` is a second assistant turn in a row; join the two, or remove "
            "one.",
        ),
        (
            [system("s"), system("t"), user("q")],
            "message 2 of `messages` is a second system turn in a row; join the two, or remove "
            "one.",
        ),
        (
            [assistant("a"), user("q")],
            "message 1 of `messages` has the role assistant; system or user comes first.",
        ),
        (
            [system("s"), assistant("a")],
            "message 2 of `messages` has the role assistant; user comes after system.",
        ),
        (
            [user("q"), assistant("a"), system("s")],
            "message 3 of `messages` has the role system; user or tool comes after assistant.",
        ),
        (
            [user("q"), tool("t"), assistant("a")],
            "message 2 of `messages` has the role tool; assistant comes after user.",
        ),
        (
            [user(" "), assistant("a")],
            "message 1 of `messages`, of the role user, is empty" + EMPTY,
        ),
        (
            [user("q"), assistant("a"), user("r"), assistant(" \n")],
            "message 4 of `messages`, of the role assistant, is empty" + EMPTY,
        ),
    ],
)
def test_conversation_refusals(turns, sentence):
    assert (
        refusal(rows.example, "sft", {"messages": turns}, PLACE, "chat") == f"{WHERE}: {sentence}"
    )


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "sentence"),
    [
        (
            [user("q"), assistant("a")],
            [assistant("b")],
            [assistant("c")],
            "`prompt` ends with an assistant turn, and an answer follows it; move the turn to "
            "where the answer begins, or remove it.",
        ),
        (
            [system("s")],
            [assistant("b")],
            [assistant("c")],
            "`prompt` has no user turn; add it, or remove the row.",
        ),
        (
            [user("q"), assistant("a"), user("")],
            [assistant("b")],
            [assistant("c")],
            "message 3 of `prompt`, of the role user, is empty" + EMPTY,
        ),
        (
            [user("q")],
            [assistant("b")],
            [user("r"), assistant("c")],
            "`rejected` begins with a user turn; an answer begins with an assistant turn.",
        ),
        (
            [user("q")],
            [assistant("b"), assistant("c")],
            [assistant("c")],
            "message 2 of `chosen` is a second assistant turn in a row; join the two, or remove "
            "one.",
        ),
        (
            [user("q")],
            [assistant("b"), user("r"), assistant("")],
            [assistant("c")],
            "message 3 of `chosen`, of the role assistant, is empty" + EMPTY,
        ),
        (
            [user("q")],
            [user("q"), assistant("b")],
            [user("Q"), assistant("c")],
            "`chosen` begins with the prompt and `rejected` does not; give both as whole "
            "conversations of one prompt, or both as the answer alone.",
        ),
        (
            [user("q"), assistant("a"), user("r")],
            [user("q"), assistant("A"), user("r"), assistant("b")],
            [user("q"), assistant("a"), user("r"), assistant("c")],
            "`rejected` begins with the prompt and `chosen` does not; give both as whole "
            "conversations of one prompt, or both as the answer alone.",
        ),
        (
            [user("q")],
            [user("p"), assistant("b")],
            [user("p"), assistant("c")],
            "`chosen` and `rejected` are whole conversations, and neither begins with the prompt; "
            "make them begin with it, or give the answers alone.",
        ),
        (
            [user("q")],
            [user("q"), assistant("b")],
            [user("q"), assistant("b"), user("r"), user("s")],
            "message 4 of `rejected` is a second user turn in a row; join the two, or remove one.",
        ),
        (
            [user("q"), assistant("a"), user("r")],
            [user("q"), assistant("a"), user("r")],
            [user("q"), assistant("a"), user("r"), assistant("c")],
            "`chosen` has nothing behind the prompt; add the answer, or remove the row.",
        ),
        (
            None,
            [user("q"), assistant("b")],
            [user("r"), assistant("c")],
            "`chosen` and `rejected` begin with different prompts; both sides of a pair answer "
            "one.",
        ),
        (
            None,
            [user("q"), assistant("b")],
            [user("q")],
            "`rejected` has no assistant turn, so there is nothing to learn; add the answer, or "
            "remove the row.",
        ),
        (
            None,
            [user("q"), assistant("b")],
            [user("q"), user("r"), assistant("c")],
            "message 2 of `rejected` is a second user turn in a row; join the two, or remove one.",
        ),
    ],
)
def test_pair_conversation_refusals(prompt, chosen, rejected, sentence):
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    assert refusal(rows.example, "dpo", row, PLACE, "chat") == f"{WHERE}: {sentence}"


def test_sharegpt_prompt_must_end_with_a_question():
    turns = [said("human", "q"), said("gpt", "a")]
    row = {"conversations": turns, "chosen": said("gpt", "b"), "rejected": said("gpt", "c")}
    assert refusal(rows.example, "dpo", row, PLACE, "chat") == (
        f"{WHERE}: `conversations` ends with an assistant turn, and an answer follows it; move the "
        "turn to where the answer begins, or remove it."
    )


def test_completion_must_begin_with_the_assistant():
    row = {"prompt": "q", "completion": [user("r"), assistant("a")]}
    assert refusal(rows.example, "sft", row, PLACE, "chat") == (
        f"{WHERE}: `completion` begins with a user turn; an answer begins with an assistant turn."
    )
