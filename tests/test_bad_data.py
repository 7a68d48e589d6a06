"""Data that cannot be trained on: one sentence with the place and the fix, and nothing is left."""

import gzip
import json

import pytest
from refusals import rows

pytestmark = pytest.mark.slow  # minutes

GOOD = {"prompt": "one", "chosen": "two", "rejected": "three"}
SKIP = " (--data.on_bad_row=skip goes on without such rows)."
USER, ANSWER, OTHER = (
    {"role": role, "content": text}
    for role, text in (("user", "one"), ("assistant", "two"), ("assistant", "three"))
)


def pair(**changes) -> dict:
    return {name: value for name, value in {**GOOD, **changes}.items() if value is not ...}


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
    "no object": ("[1, 2]", "a row must be a JSON object, {...}, not a list"),
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
    "a margin of text": (pair(margin="2"), "`margin` must be a number, not a string"),
    "a margin that is no number": (
        '{"prompt": "one", "chosen": "two", "rejected": "three", "margin": NaN}',
        "`margin` is nan; it must be a finite number, of float32",
    ),
    "a weight beyond float32": (
        pair(weight=1e39),
        "`weight` is 1e+39; it must be a finite number, of float32",
    ),
    "a negative weight": (
        pair(weight=-1),
        "`weight` is -1; it must be 0 or more (swap `chosen` and `rejected` to turn a pair round)",
    ),
    "a source that is no text": (pair(source=3), "`source` must be a string, not a number"),
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
        "`messages` must be a list of messages, not a string",
    ),
    "a message of text": (
        {"messages": ["hello"]},
        "message 1 of `messages` must be an object with `role` and `content`, not a string",
    ),
    "a message without content": (
        {"messages": [USER, {"role": "assistant", "text": "two"}]},
        "message 2 of `messages` has no `content`; it has `role`, `text`",
    ),
    "content in parts": (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}, ANSWER]},
        "`content` of message 1 of `messages` must be a string, not a list",
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
        "`completion` must be a string or a list of messages, not a number",
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
        "`scores[1]` is nan; it must be a finite number, of float32",
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


def one_row(**columns) -> bytes:
    return json.dumps(pair(**columns)).encode() + b"\n"


# A file's name and bytes -> what is said of it as a whole.
FILES = {
    "empty": ("empty.jsonl", b"", "the file holds no rows."),
    "an unknown suffix": (
        "rows.csv",
        b"prompt,chosen,rejected\n",
        "the suffix is none of .jsonl, .ndjson, .json, .parquet, .arrow, .feather, each also with "
        ".gz behind it; convert or rename the file.",
    ),
    "UTF-16": (
        "wide.jsonl",
        one_row().decode().encode("utf-16"),
        "the text is UTF-16; save it as UTF-8.",
    ),
    "one list": (
        "list.jsonl",
        b"[" + one_row() + b"]",
        "the file is one JSON list; rename it to end in .json.",
    ),
    "rows over several lines": (
        "pretty.jsonl",
        json.dumps(GOOD, indent=2).encode(),
        "a row goes over several lines; write a row a line, or one list of rows into a .json file.",
    ),
    "compressed": (
        "packed.jsonl",
        gzip.compress(one_row()),
        "the content is gzip; rename the file to end in .gz.",
    ),
    "compressed and cut short": (
        "short.jsonl.gz",
        gzip.compress(one_row() * 1000)[:-20],
        "this is no whole gzip file (Compressed file ended before the end-of-stream marker was "
        "reached); get it again.",
    ),
    "not compressed": (
        "plain.jsonl.gz",
        one_row(),
        "this is no whole gzip file (Not a gzipped file (b'{\"')); get it again.",
    ),
    "a pointer": (
        "pointer.parquet",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "this is a Git LFS pointer, not the data; run `git lfs pull` beside it.",
    ),
    "Parquet by another name": (
        "named.jsonl",
        b"PAR1....PAR1",
        "the content is Parquet; rename the file to end in .parquet.",
    ),
    "Parquet cut short": (
        "short.parquet",
        b"PAR1 and then nothing",
        "this is no whole Parquet file (Parquet magic bytes not found in footer. Either the file "
        "is corrupted or this is not a parquet file); get it again.",
    ),
    "a split that no row has": (
        "splits.jsonl",
        one_row(split="train_sft") + one_row(split="test_sft"),
        "there is no split train; there are test_sft, train_sft: set data.split.",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file(root, refusal, name):
    file, content, problem = FILES[name]
    (root / file).write_bytes(content)
    assert refusal(f"--data.path={root / file}") == f"{root / file}: {problem}"


def test_json_that_ends_too_early_names_the_line(root, refusal):
    (root / "list.json").write_text('[\n{"prompt": "one"},\n')
    assert refusal(f"--data.path={root / 'list.json'}") == (
        f"{root / 'list.json'}, line 3: this is not JSON (Expecting value at column 1)."
    )


def test_rows_with_and_without_a_split(root, refusal):
    file = rows(root, pair(split="train"), GOOD, file="uneven.jsonl")
    assert refusal(f"--data.path={file}") == (
        f"{file}, line 2: the row has no `split`, and the first row ({file}, line 1) has one; give "
        f"every row one, or none{SKIP}"
    )


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("nowhere.jsonl", "there is no such file or directory."),
        ("nowhere/*.jsonl", "no file matches."),
    ],
)
def test_a_path_that_leads_nowhere(refusal, path, problem):
    assert refusal(f"--data.path={path}") == f"data.path={path}: {problem}"


def test_names_that_are_too_long_together_for_one(refusal):
    names = [f"{letter * 200}.jsonl" for letter in "abc"]
    assert refusal(f"--data.path={','.join(names)}") == (
        f"data.path={names[0]}: there is no such file or directory."
    )


def test_a_directory_without_data(root, refusal):
    (root / "bare").mkdir()
    assert refusal(f"--data.path={root / 'bare'}") == (
        f"{root / 'bare'}: the directory holds no data files (.jsonl, .ndjson, .json, .parquet, "
        ".arrow, .feather, or those with .gz), nor does its data/; name the files, such as "
        f"'{root / 'bare'}/*/*.parquet'."
    )


def test_a_saved_dataset_that_is_damaged(root, refusal):
    (root / "saved").mkdir()
    (root / "saved/state.json").write_text("{}")
    assert refusal(f"--data.path={root / 'saved'}") == (
        f"{root / 'saved/state.json'}: the saved dataset is damaged ('_data_files'); save it again."
    )


def test_a_split_that_is_empty_after_filtering(root, refusal):
    file = rows(root, pair(split="train"), pair(split="test"), file="long.jsonl")
    assert refusal(f"--data.path={file}", "--data.max-length=8") == (
        f"{file}: no row is left to train on; the table above says where they went."
    )


def test_held_out_rows_that_are_all_dropped(root, refusal):
    long = rows(root, pair(prompt="word " * 100), file="test.jsonl")
    file = rows(root, GOOD, file="train.jsonl")
    assert refusal(f"--data.path={file}", f"--data.eval-path={long}") == (
        f"{long}: no row is left to evaluate on; the table above says where they went."
    )
    held = pair(prompt="word " * 100, split="test")
    file = rows(root, pair(split="train"), held, file="both.jsonl")
    assert refusal(f"--data.path={file}") == (
        f"{file}: no row is left to evaluate on; the table above says where they went."
    )


TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"
TEMPLATES = {
    "leaves the answers out": (
        "{% for m in messages if m['role'] == 'user' %}" + TEMPLATE.partition("%}")[2],
        "no token of it is trained, because the chat template leaves its answer out, or joins it "
        "into one token with the text around it; change the row, or name another "
        "--model.chat_template",
    ),
    "refuses": (
        "{{ raise_exception('no system turn') }}",
        "the chat template refuses this row (no system turn)",
    ),
    "trims": (
        TEMPLATE.replace("['content']", "['content'] | trim"),
        "`chosen` and `rejected` have the same tokens, so neither is preferred; remove the row, or "
        "change one of them",
    ),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_template_that(root, refusal, name):
    template, problem = TEMPLATES[name]
    (root / "template.jinja").write_text(template)
    file = rows(root, pair(rejected="two "), file="templates.jsonl")
    said = refusal(f"--data.path={file}", f"--model.chat-template={root / 'template.jinja'}")
    assert said == f"{file}, line 1: {problem}{SKIP}"
