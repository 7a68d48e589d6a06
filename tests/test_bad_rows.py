"""Rows that cannot be trained on: one sentence with the place and the fix, and nothing is left."""

import pytest
from refusals import GOOD, SKIP, pair, rows

pytestmark = pytest.mark.slow  # minutes

USER, ANSWER, OTHER = (
    {"role": role, "content": text}
    for role, text in (("user", "one"), ("assistant", "two"), ("assistant", "three"))
)

# What the second line of a file of pairs says -> what is said of it, behind the file's name.
PAIRS = {
    "malformed JSON": (
        '{"prompt": "one", "chosen": }',
        "this is not JSON (Expecting value at column 29)",
    ),
    "a line cut short": (
        '{"prompt": "one", "chosen": "tw',
        "this is not JSON (Unterminated string starting at at column 29)",
    ),
    "another encoding": (
        '{"prompt": "caf\xe9"}'.encode("latin-1"),
        "byte 16 of the line (0xe9) is not UTF-8; save the file as UTF-8",
    ),
    "no object": ("[1, 2]", "a row must be a JSON object, {...}"),
    "a missing column": (
        pair(rejected=...),
        "a preference row needs `chosen` and `rejected`, and a prompt as `prompt`, `conversations` "
        "or `instruction` or as what both begin with; it has `prompt`, `chosen`",
    ),
    "a misspelt column": (
        pair(rejected=..., Rejceted="x"),
        "a preference row needs `chosen` and `rejected`, and a prompt as `prompt`, `conversations` "
        "or `instruction` or as what both begin with; it has `prompt`, `chosen`, `Rejceted` (did "
        "you mean `rejected`?)",
    ),
    "no prompt": (
        pair(prompt=...),
        "there is no prompt: `chosen` and `rejected` are answers alone, and the row has `chosen`, "
        "`rejected`; add a `prompt` column, or set data.strings=plain for strings that hold their "
        "prompt",
    ),
    "an empty answer": (pair(chosen=" "), "`chosen` is empty; fill it in, or remove the row"),
    "an empty prompt": (pair(prompt=""), "`prompt` is empty; fill it in, or remove the row"),
    "identical answers": (
        pair(rejected="two"),
        "`chosen` and `rejected` are the same, so the pair prefers nothing; remove the row",
    ),
    "text and messages": (
        pair(chosen=[ANSWER]),
        "one of `chosen` and `rejected` is text and the other messages; make them alike",
    ),
    "different prompts": (
        pair(prompt=..., chosen=[USER, ANSWER], rejected=[{**USER, "content": "another"}, OTHER]),
        "`chosen` and `rejected` begin with different prompts; both sides of a pair answer one",
    ),
    "a prompt in one side only": (
        pair(prompt=[{**USER, "content": "x"}], chosen=[USER, ANSWER], rejected=[USER, OTHER]),
        "`chosen` and `rejected` are whole conversations, and neither begins with the prompt; make "
        "them begin with it, or give the answers alone",
    ),
    "a prompt that is answered": (
        pair(prompt=[USER, ANSWER]),
        "`prompt` ends with an assistant turn, and an answer follows it; move the turn to where "
        "the answer begins, or remove it",
    ),
    "an answer by the user": (
        pair(chosen=[USER], rejected=[ANSWER]),
        "`chosen` begins with a user turn; an answer begins with an assistant turn",
    ),
    "tools": (
        pair(tools=[{"name": "search"}]),
        "`tools` is not empty, and tool use is not supported; remove the column and the turns that "
        "call tools, or the row",
    ),
    "a margin of text": (pair(margin="2"), "margin='2': it must be a finite number"),
    "a margin that is no number": (
        '{"prompt": "one", "chosen": "two", "rejected": "three", "margin": NaN}',
        "margin=nan: it must be a finite number",
    ),
    "a weight beyond float32": (
        pair(weight=1e39),
        "weight=1e+39: it must be at least 0.0 and at most 3.4028234663852886e+38",
    ),
    "a negative weight": (
        pair(weight=-1),
        "weight=-1: it must be at least 0.0 and at most 3.4028234663852886e+38",
    ),
    "a source that is no text": (
        pair(source=True),
        "source=True: it must be a string or a whole number or null",
    ),
}

# The same of a file for SFT.
CONVERSATIONS = {
    "a pair": (
        GOOD,
        "an SFT row needs `messages`, or `prompt` and `completion`, or `conversations`, or "
        "`instruction` and `output`, or `text`; it has `prompt`, `chosen`, `rejected` (a "
        "preference pair, where an SFT row has one answer)",
    ),
    "messages of text": (
        {"messages": "hello"},
        "messages='hello': it must be a list",
    ),
    "a message of text": (
        {"messages": ["hello"]},
        "message 1 of `messages`='hello': it must be an object",
    ),
    "a message without content": (
        {"messages": [USER, {"role": "assistant", "text": "two"}]},
        "message 2 of `messages` has no `content`; it has `role`, `text`",
    ),
    "content in parts": (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}, ANSWER]},
        "`content` of message 1 of `messages`=[{'type': 'text'}]: it must be a string",
    ),
    "a call of a tool": (
        {"messages": [USER, {"role": "assistant", "tool_calls": [{"id": 1}], "content": ""}]},
        "message 2 of `messages` calls a tool, and tool use is not supported; remove the turns "
        "that call tools, or the row",
    ),
    "an unknown role": (
        {"messages": [USER, {"role": "bot", "content": "two"}]},
        "message 2 of `messages` has the role `bot`; there are system, user, assistant, tool (and "
        "human for user, gpt for assistant, model for assistant, chatgpt for assistant, "
        "observation for tool)",
    ),
    "two users in a row": (
        {"messages": [USER, USER, ANSWER]},
        "message 2 of `messages` is a second user turn in a row; join the two, or remove one",
    ),
    "the assistant first": (
        {"messages": [ANSWER, USER]},
        "message 1 of `messages` has the role assistant; system or user comes first",
    ),
    "a system turn in the middle": (
        {"messages": [USER, ANSWER, {"role": "system", "content": "x"}]},
        "message 3 of `messages` has the role system; user or tool comes after assistant",
    ),
    "no answer": (
        {"messages": [USER]},
        "`messages` has no assistant turn, so there is nothing to learn; add the answer, or remove "
        "the row",
    ),
    "an empty turn": (
        {"conversations": [{"from": "human", "value": "one"}, {"from": "gpt", "value": ""}]},
        "message 2 of `conversations`, of the role assistant, is empty; fill it in, or remove the "
        "row",
    ),
    "an empty instruction": (
        {"instruction": "", "input": "", "output": "two"},
        "`instruction` is empty; fill it in, or remove the row",
    ),
    "a history of something else": (
        {"instruction": "one", "output": "two", "history": ["x"]},
        "`history` must be a list of [question, answer] strings",
    ),
    "text and a message": (
        {"prompt": [USER], "completion": 5},
        "completion=5: it must be a string or a list",
    ),
}

SET = {"prompt": "one", "responses": ["two", "three"], "scores": [1, 2]}
# The same of a file for a reward model.
SETS = {
    "fewer scores than responses": (
        {**SET, "scores": [1]},
        "`responses` has 2 responses and `scores` 1 numbers; give one for each",
    ),
    "one response": (
        {**SET, "responses": ["two"], "scores": [1]},
        "`responses` has 1 of the 2 responses that a set needs at least; add more, or remove the "
        "row",
    ),
    "equal scores": (
        {**SET, "scores": [2, 2]},
        "all `scores` are equal, so no response is preferred; remove the row",
    ),
    "a score that is no number": (
        '{"prompt": "one", "responses": ["two", "three"], "scores": [1, NaN]}',
        "scores[1]=nan: it must be a finite number",
    ),
    "no scores": (
        {**SET, "scores": None},
        "a set of responses needs `scores` (higher is better) or `ranks` (1 is the best), a "
        "number for each; the row has `prompt`, `responses`, `scores` (null)",
    ),
}


@pytest.mark.parametrize("name", SETS)
def test_a_bad_set(root, refusal, name):
    bad, problem = SETS[name]
    file = rows(root, SET, bad, file="sets.jsonl")
    assert refusal(f"--data.path={file}", stage="rm") == f"{file}, line 2: {problem}{SKIP}"


def test_sets_are_not_for_dpo(root, refusal):
    file = rows(root, GOOD, SET, file="sets.jsonl")
    assert refusal(f"--data.path={file}") == (
        f"{file}, line 2: `responses` is a set of responses, which rm trains on and dpo does not; "
        f"give two of them as `chosen` and `rejected`, such as the best and the worst{SKIP}"
    )


@pytest.mark.parametrize("name", PAIRS)
def test_a_bad_pair(root, refusal, name):
    bad, problem = PAIRS[name]
    file = rows(root, GOOD, bad, file="pairs.jsonl")
    assert refusal(f"--data.path={file}") == f"{file}, line 2: {problem}{SKIP}"


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_a_bad_conversation(root, refusal, name):
    bad, problem = CONVERSATIONS[name]
    file = rows(root, {"messages": [USER, ANSWER]}, bad, file="conversations.jsonl")
    assert refusal(f"--data.path={file}", stage="sft") == f"{file}, line 2: {problem}{SKIP}"
