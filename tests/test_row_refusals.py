"""Columns that make no example: every refusal with its place and its fix."""

import pytest
from rowcases import EMPTY, PLACE, WHERE, assistant, refusal, said, system, user

from alignjax.data import rows

SFT_NEEDS = (
    "an SFT row needs `messages`, or `prompt` and `completion`, or `conversations`, or "
    "`instruction` and `output`, or `text`; it has "
)
PAIR_NEEDS = (
    "a preference row needs `chosen` and `rejected`, and a prompt as `prompt`, `conversations` or "
    "`instruction` or as what both begin with; it has "
)
NO_PROMPT = "there is no prompt: `chosen` and `rejected` are answers alone, and the row has "
ADD_PROMPT = (
    "; add a `prompt` column, or set data.strings=plain for strings that hold their prompt."
)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"words": "t", "id": 1}, SFT_NEEDS + "`words`, `id`."),
        ({"text": 1}, "text=1: it must be a string."),
        ({"text": " "}, "`text` is empty; fill it in, or remove the row."),
        ({}, SFT_NEEDS + "no columns."),
        ({"prompt": "q"}, SFT_NEEDS + "`prompt`."),
        ({"messages": None}, SFT_NEEDS + "`messages` (null)."),
        ({"mesages": []}, SFT_NEEDS + "`mesages` (did you mean `messages`?)."),
        (
            {"Prompt": "q", "completions": "a"},
            SFT_NEEDS
            + "`Prompt` (did you mean `prompt`?), `completions` (did you mean `completion`?).",
        ),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b"},
            SFT_NEEDS
            + "`prompt`, `chosen`, `rejected` (a preference pair, where an SFT row has one "
            "answer).",
        ),
        ({"messages": "q"}, "messages='q': it must be a list."),
        ({"conversations": {}}, "conversations={}: it must be a list."),
        (
            {"prompt": 5, "completion": "a"},
            "prompt=5: it must be a string or a list.",
        ),
        (
            {"prompt": "q", "completion": True},
            "completion=True: it must be a string or a list.",
        ),
        ({"prompt": " ", "completion": "a"}, "`prompt` is empty" + EMPTY),
        ({"prompt": [], "completion": "a"}, "`prompt` is empty" + EMPTY),
        ({"prompt": "q", "completion": ""}, "`completion` is empty" + EMPTY),
        ({"prompt": "q", "completion": []}, "`completion` is empty" + EMPTY),
        ({"instruction": "", "input": " ", "output": "a"}, "`instruction` is empty" + EMPTY),
        ({"instruction": "q", "output": "\n"}, "`output` is empty" + EMPTY),
        (
            {"instruction": ["q"], "output": "a"},
            "instruction=['q']: it must be a string or null.",
        ),
        (
            {"instruction": "q", "input": 5, "output": "a"},
            "input=5: it must be a string or null.",
        ),
        (
            {"instruction": "q", "output": "a", "history": ["a"]},
            "`history` must be a list of [question, answer] strings.",
        ),
        (
            {"instruction": "q", "output": "a", "history": [["a", None]]},
            "`history` must be a list of [question, answer] strings.",
        ),
        (
            {"conversations": [user("q"), assistant("a")], "system": ["s"]},
            "system=['s']: it must be a string or null.",
        ),
        (
            {"conversations": [system("t"), user("q"), assistant("a")], "system": "s"},
            "both the `system` column and the first message are system texts, and they differ; "
            "keep one.",
        ),
        (
            {"messages": [user("q"), assistant("a")], "tools": [{"name": "search"}]},
            "`tools` is not empty, and tool use is not supported; remove the column and the turns "
            "that call tools, or the row.",
        ),
        (
            {"messages": [user("q"), assistant("a")], "functions": '[{"name": "f"}]'},
            "`functions` is not empty, and tool use is not supported; remove the column and the "
            "turns that call tools, or the row.",
        ),
    ],
)
def test_sft_refusals(row, sentence):
    assert refusal(rows.example, "sft", row, PLACE, "chat") == f"{WHERE}: {sentence}"


def test_plain_refusals():
    row = {"instruction": "q", "output": "a"}
    assert refusal(rows.example, "sft", row, PLACE, "plain") == (
        f"{WHERE}: `instruction` is a turn of a chat, and data.strings=plain is for text as it is; "
        "set data.strings=chat, or give the text as `prompt`."
    )
    row = {"prompt": "q", "completion": [assistant("a")]}
    assert refusal(rows.example, "sft", row, PLACE, "plain") == (
        f"{WHERE}: the prompt and `completion` must both be text or both messages; make them "
        "alike, or set data.strings=chat."
    )
    row = {"prompt": "q", "completion": " "}
    assert refusal(rows.example, "sft", row, PLACE, "plain") == (
        f"{WHERE}: `completion` is empty; fill it in, or remove the row."
    )


@pytest.mark.parametrize(
    ("row", "strings", "sentence"),
    [
        ({"prompt": "q", "chosen": "a"}, "chat", PAIR_NEEDS + "`prompt`, `chosen`."),
        ({}, "chat", PAIR_NEEDS + "no columns."),
        (
            {"prompt": "q", "choosen": "a", "rejected": "b"},
            "chat",
            PAIR_NEEDS + "`prompt`, `choosen` (did you mean `chosen`?), `rejected`.",
        ),
        (
            {"prompt": "q", "chosen": None, "rejected": "b"},
            "plain",
            PAIR_NEEDS + "`prompt`, `chosen` (null), `rejected`.",
        ),
        (
            {"chosen": "a b", "rejected": "a c"},
            "chat",
            NO_PROMPT + "`chosen`, `rejected`" + ADD_PROMPT,
        ),
        (
            {"promt": "q", "chosen": [assistant("a")], "rejected": [assistant("b")]},
            "plain",
            NO_PROMPT + "`promt` (did you mean `prompt`?), `chosen`, `rejected`" + ADD_PROMPT,
        ),
        (
            {"prompt": "q", "chosen": "a", "rejected": [assistant("b")]},
            "chat",
            "one of `chosen` and `rejected` is text and the other messages; make them alike.",
        ),
        (
            {"prompt": "q", "chosen": [assistant("a")], "rejected": [assistant("b")]},
            "plain",
            "the prompt and `chosen` must both be text or both messages; make them alike, or set "
            "data.strings=chat.",
        ),
        (
            {"prompt": [user("q")], "chosen": "a", "rejected": "b"},
            "plain",
            "the prompt and `chosen` must both be text or both messages; make them alike, or set "
            "data.strings=chat.",
        ),
        ({"prompt": "q", "chosen": "a", "rejected": " "}, "chat", "`rejected` is empty" + EMPTY),
        ({"prompt": "q", "chosen": "", "rejected": ""}, "plain", "`chosen` is empty" + EMPTY),
        ({"prompt": "q", "chosen": [], "rejected": []}, "chat", "`chosen` is empty" + EMPTY),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "chat", "`prompt` is empty" + EMPTY),
        (
            {"prompt": "q", "chosen": 5, "rejected": 6},
            "chat",
            "chosen=5: it must be a string or a list.",
        ),
        (
            {"prompt": "q", "chosen": {"content": "a"}, "rejected": assistant("b")},
            "chat",
            "message 1 of `chosen` has no `role`; it has `content`.",
        ),
        (
            {"instruction": "q", "chosen": "a", "rejected": "b"},
            "plain",
            "`instruction` is a turn of a chat, and data.strings=plain is for text as it is; set "
            "data.strings=chat, or give the text as `prompt`.",
        ),
    ],
)
def test_pair_refusals(row, strings, sentence):
    assert refusal(rows.example, "dpo", row, PLACE, strings) == f"{WHERE}: {sentence}"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "a", "rejected": "a"},
        {"prompt": "q", "chosen": "a", "rejected": "a", "margin": 1.0},
        {"prompt": "q", "chosen": [assistant("a")], "rejected": said("gpt", "a")},
        {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("a")]},
        {"instruction": "q", "chosen": "a", "rejected": "a"},
    ],
)
@pytest.mark.parametrize("strings", ["chat", "plain"])
def test_identical_sides_are_refused(row, strings):
    assert refusal(rows.example, "dpo", row, PLACE, strings) == (
        f"{WHERE}: `chosen` and `rejected` are the same, so the pair prefers nothing; remove the "
        "row."
    )
