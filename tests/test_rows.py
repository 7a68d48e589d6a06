"""Rows of every TRL format as examples; every refusal with its place and its fix; the splits."""

import json
import re

import pytest

from alignjax.data import rows
from alignjax.data.rows import Side

WHERE = "f.jsonl, line 7"


def system(text: str) -> dict:
    return {"role": "system", "content": text}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def sft(row: dict, strings: str = "chat") -> Side:
    example = rows.sft_example(7, row, strings, WHERE)
    assert (example.line, example.row, len(example.sides)) == (7, row, 1)
    return example.sides[0]


def pair(row: dict, strings: str = "chat") -> tuple[Side, Side]:
    example = rows.pair_example(7, row, strings, WHERE)
    assert (example.line, example.row) == (7, row)
    chosen, rejected = example.sides
    return chosen, rejected


def refusal(make, *arguments) -> str:
    with pytest.raises(ValueError) as caught:
        make(*arguments)
    return str(caught.value)


# SFT


def test_messages():
    turns = [system("s"), user("q"), assistant("a"), user("r"), assistant("b")]
    assert sft({"messages": turns}) == Side([], turns)


def test_prompt_and_completion_as_strings():
    row = {"prompt": "q", "completion": "a"}
    assert sft(row) == Side([user("q")], [assistant("a")])
    assert sft(row, "plain") == Side("q", "a")


def test_prompt_and_completion_as_lists():
    row = {"prompt": [system("s"), user("q")], "completion": [assistant("a")]}
    assert sft(row) == sft(row, "plain") == Side([system("s"), user("q")], [assistant("a")])


def test_string_prompt_with_a_list_completion():
    row = {"prompt": "q", "completion": [assistant("a")]}
    assert sft(row) == Side([user("q")], [assistant("a")])


# Pairs


def test_pair_of_strings_with_a_prompt():
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert pair(row) == (Side([user("q")], [assistant("a")]), Side([user("q")], [assistant("b")]))
    assert pair(row, "plain") == (Side("q", "a"), Side("q", "b"))


def test_pair_of_lists_with_a_prompt_list():
    prompt = [system("s"), user("q"), assistant("a"), user("r")]
    row = {"prompt": prompt, "chosen": [assistant("c")], "rejected": [assistant("d")]}
    assert pair(row) == (Side(prompt, [assistant("c")]), Side(prompt, [assistant("d")]))


def test_pair_of_strings_with_a_prompt_list():
    row = {"prompt": [user("q")], "chosen": "a", "rejected": "b"}
    assert pair(row) == (Side([user("q")], [assistant("a")]), Side([user("q")], [assistant("b")]))


def test_implicit_prompt_of_a_multi_turn_conversation_with_system():
    prompt = [system("s"), user("q"), assistant("a"), user("r")]
    row = {"chosen": [*prompt, assistant("c")], "rejected": [*prompt, assistant("d")]}
    assert pair(row) == (Side(prompt, [assistant("c")]), Side(prompt, [assistant("d")]))


def test_implicit_prompt_where_the_answers_have_several_turns():
    chosen = [user("q"), assistant("a"), user("r"), assistant("b")]
    rejected = [user("q"), assistant("z")]
    assert pair({"chosen": chosen, "rejected": rejected}) == (
        Side([user("q")], chosen[1:]),
        Side([user("q")], rejected[1:]),
    )


def test_implicit_prompt_of_identical_conversations_leaves_their_last_turn():
    turns = [user("q"), assistant("a")]
    side = Side(turns[:1], turns[1:])
    assert pair({"chosen": turns, "rejected": list(turns)}) == (side, side)


def test_prompt_string_with_whole_conversations():
    # As in UltraFeedback binarized: `prompt` repeats what both conversations begin with.
    prompt = [system("s"), user("q")]
    row = {"chosen": [*prompt, assistant("a")], "rejected": [*prompt, assistant("b")]}
    sides = (Side(prompt, [assistant("a")]), Side(prompt, [assistant("b")]))
    assert pair(row | {"prompt": "q"}) == sides
    assert pair(row | {"prompt": prompt}) == sides
    assert pair(row | {"prompt": None}) == sides


def test_prompt_string_is_kept_where_the_answers_begin_alike():
    # Answers of several turns may share their first one; it is no prompt.
    chosen = [assistant("a"), user("r"), assistant("b")]
    rejected = [assistant("a"), user("r"), assistant("c")]
    for side, answer in zip(
        pair({"prompt": "q", "chosen": chosen, "rejected": rejected}),
        (chosen, rejected),
        strict=True,
    ):
        assert [*side.prompt, *side.answer] == [user("q"), *answer]


def test_whole_conversations_keep_every_turn_of_their_own():
    # Only `chosen` begins with the whole prompt: nothing of `rejected` may be lost.
    prompt = [user("q"), assistant("a"), user("r")]
    other = [user("q"), assistant("A"), user("r"), assistant("d")]
    row = {"prompt": prompt, "chosen": [*prompt, assistant("c")], "rejected": other}
    try:
        _, rejected = pair(row)
    except ValueError as error:
        assert str(error).startswith(WHERE)
    else:
        assert [*rejected.prompt, *rejected.answer] == other


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("the sky is blue", "the sky is green"),
        ("the sky is blue", "the sky is blueish"),  # apart within a word
        ("the sky is", "the sky is green and wide"),  # one begins the other
        ("Q: why?\nA: so", "Q: why?\nA: no"),
        ("one", "two"),  # nothing in common
    ],
)
def test_implicit_prompt_of_plain_strings(chosen, rejected):
    first, second = pair({"chosen": chosen, "rejected": rejected}, "plain")
    assert first.prompt == second.prompt
    assert (first.prompt + first.answer, second.prompt + second.answer) == (chosen, rejected)
    words = list(zip(re.findall(r"\s*\S+", chosen), re.findall(r"\s*\S+", rejected), strict=False))
    same = next((i for i, (a, b) in enumerate(words) if a != b), len(words) - 1)
    assert first.prompt.split() == chosen.split()[:same]  # whole words, as many as there are
    assert first.answer.split() == chosen.split()[same:]


# Refusals


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (
            {"text": "t", "id": 1},
            "an SFT row needs `messages`, or `prompt` and `completion`; it has `text`, `id`.",
        ),
        ({}, "an SFT row needs `messages`, or `prompt` and `completion`; it has no columns."),
        (
            {"prompt": "q"},
            "an SFT row needs `messages`, or `prompt` and `completion`; it has `prompt`.",
        ),
        ({"messages": "q"}, "`messages` must be a string or a list of messages."),
        ({"messages": None}, "`messages` must be a string or a list of messages."),
        (
            {"prompt": 5, "completion": "a"},
            "`prompt` must be a string or a list of messages.",
        ),
        (
            {"messages": [user("q"), {"role": "bot", "content": "a"}]},
            "every message of `messages` needs a `role` (system, user, assistant, tool) and a "
            'string `content`; this one is {"role": "bot", "content": "a"}.',
        ),
        (
            {"messages": [user("q"), {"role": "assistant", "content": None}]},
            "every message of `messages` needs a `role` (system, user, assistant, tool) and a "
            'string `content`; this one is {"role": "assistant", "content": null}.',
        ),
        (
            {"messages": ["q" * 100]},
            "every message of `messages` needs a `role` (system, user, assistant, tool) and a "
            f'string `content`; this one is "{"q" * 79}.',
        ),
        ({"messages": []}, "an answer is empty; remove the row or fill it in."),
        ({"messages": [user("q")]}, "an answer is empty; remove the row or fill it in."),
        (
            {"messages": [user("q"), assistant("a"), user("r"), assistant(" \n")]},
            "an answer is empty; remove the row or fill it in.",
        ),
        (
            {"prompt": "q", "completion": ""},
            "an answer is empty; remove the row or fill it in.",
        ),
    ],
)
def test_sft_refusals(row, sentence):
    assert refusal(rows.sft_example, 7, row, "chat", WHERE) == f"{WHERE}: {sentence}"


@pytest.mark.parametrize(
    ("row", "strings", "sentence"),
    [
        (
            {"prompt": "q", "chosen": "a"},
            "chat",
            "a preference row needs `chosen` and `rejected` (and `prompt`); it has "
            "`prompt`, `chosen`.",
        ),
        (
            {},
            "chat",
            "a preference row needs `chosen` and `rejected` (and `prompt`); it has no columns.",
        ),
        (
            {"chosen": "a b", "rejected": "a c"},
            "chat",
            "string `chosen` and `rejected` need a `prompt` column; for text that holds its "
            "prompt set data.strings=plain.",
        ),
        (
            {"chosen": "a", "rejected": [user("q"), assistant("b")]},
            "plain",
            "`chosen` and `rejected` must both be lists or both strings.",
        ),
        (
            {"prompt": "q", "chosen": [assistant("a")], "rejected": [assistant("b")]},
            "plain",
            "the prompt and its answers must all be text or all messages.",
        ),
        (
            {"prompt": "q", "chosen": "a", "rejected": " "},
            "chat",
            "an answer is empty; remove the row or fill it in.",
        ),
        (
            {"prompt": "q", "chosen": "", "rejected": "b"},
            "plain",
            "an answer is empty; remove the row or fill it in.",
        ),
        (
            {"chosen": [user("q"), assistant("a")], "rejected": [user("q")]},
            "chat",
            "an answer is empty; remove the row or fill it in.",
        ),
        (
            {"prompt": "q", "chosen": None, "rejected": "b"},
            "chat",
            "`chosen` must be a string or a list of messages.",
        ),
        (
            {"prompt": "q", "chosen": "a", "rejected": {"content": "b"}},
            "chat",
            "`rejected` must be a string or a list of messages.",
        ),
        (
            {"prompt": [{"from": "human"}], "chosen": "a", "rejected": "b"},
            "chat",
            "every message of `prompt` needs a `role` (system, user, assistant, tool) and a "
            'string `content`; this one is {"from": "human"}.',
        ),
    ],
)
def test_pair_refusals(row, strings, sentence):
    assert refusal(rows.pair_example, 7, row, strings, WHERE) == f"{WHERE}: {sentence}"


@pytest.mark.parametrize("chosen", [None, 5, {"content": "a"}])
def test_pair_without_prompt_refuses_answers_of_another_type(chosen):
    row = {"chosen": chosen, "rejected": chosen}
    assert refusal(rows.pair_example, 7, row, "chat", WHERE).startswith(f"{WHERE}: `chosen` ")


# Files


def test_read_jsonl_counts_lines_from_1_and_passes_over_blank_ones(tmp_path):
    file = tmp_path / "d.jsonl"
    # U+2028 ends a line for str.splitlines, not in JSON lines.
    file.write_text('{"a": 1}\n\n  \n{"a": "x\u2028y"}\r\n{"a": 3}', encoding="utf-8")
    assert rows.read_jsonl(file) == [(1, {"a": 1}), (4, {"a": "x\u2028y"}), (5, {"a": 3})]


def test_read_jsonl_refusals(tmp_path):
    file = tmp_path / "d.jsonl"
    assert refusal(rows.read_jsonl, file) == (
        f"{file}: there is no such file; set data.path to a JSONL file."
    )
    file.write_text("\n \n")
    assert refusal(rows.read_jsonl, file) == f"{file}: the file holds no rows."
    file.write_text('{"a": 1}\n\n{"a": ]\n')
    assert refusal(rows.read_jsonl, file) == (
        f"{file}, line 3: this is not JSON (Expecting value: line 1 column 7 (char 6))."
    )
    file.write_text('{"a": 1}\n[1]\n')
    assert refusal(rows.read_jsonl, file) == (
        f"{file}, line 2: a row must be a JSON object, {{...}}."
    )
    file.write_bytes(b'{"a": 1}\n{"a": "\xe9"}\n')
    assert refusal(rows.read_jsonl, file) == (
        f"{file}, line 2: this is not JSON ('utf-8' codec can't decode byte 0xe9 in position 7: "
        "invalid continuation byte)."
    )


# Splits


def both_splits(data: list[dict], fraction: float, split=("train", "test")):
    numbered = list(enumerate(data, 1))
    train = rows.in_split(numbered, split[0], False, fraction)
    held_out = rows.in_split(numbered, split[1], True, fraction)
    return train, held_out


def test_split_column_decides():
    data = [{"prompt": str(i), "split": ("train", "test", "other")[i % 3]} for i in range(9)]
    train, held_out = both_splits(data, 0.5)
    assert [line for line, _ in train] == [1, 4, 7]
    assert [line for line, _ in held_out] == [2, 5, 8]
    assert all(row is data[line - 1] for line, row in train + held_out)
    _, other = both_splits(data, 0.5, ("train", "other"))
    assert [line for line, _ in other] == [3, 6, 9]


def test_row_without_a_split_belongs_to_none_where_others_have_one():
    train, held_out = both_splits([{"prompt": "a", "split": "train"}, {"prompt": "b"}], 0.5)
    assert [line for line, _ in train + held_out] == [1]


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.3, 1.0])
def test_hashed_split_is_disjoint_complete_and_of_the_right_size(fraction):
    data = [{"prompt": f"question {i}"} for i in range(4000)]
    train, held_out = both_splits(data, fraction)
    assert sorted(line for line, _ in train + held_out) == list(range(1, 4001))
    spread = 4 * (fraction * (1 - fraction) * 4000) ** 0.5  # four standard deviations
    assert abs(len(held_out) - 4000 * fraction) <= spread


@pytest.mark.parametrize(
    "make",
    [
        lambda prompt, i: {"prompt": prompt, "chosen": f"a{i}", "rejected": f"b{i}"},
        lambda prompt, i: {"prompt": [user(prompt)], "chosen": f"a{i}", "rejected": "b"},
        lambda prompt, i: {"messages": [system("s"), user(prompt), assistant(f"a{i}")]},
        lambda prompt, i: {"messages": [user(prompt), assistant(f"a{i}")]},
        lambda prompt, i: {
            "chosen": [user(prompt), assistant(f"a{i}")],
            "rejected": [user(prompt), assistant(f"b{i}")],
        },
    ],
)
def test_rows_of_one_prompt_fall_together(make):
    data = [make(f"question {i // 3}", i) for i in range(600)]
    train, held_out = both_splits(data, 0.3)
    sides = [{(line - 1) // 3 for line, _ in part} for part in (train, held_out)]
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == 200
    assert 30 <= len(sides[1]) <= 90  # 60 expected, standard deviation 6.5


def test_hashed_split_is_the_same_in_every_process_and_order():
    data = [{"prompt": f"question {i}"} for i in range(40)]
    held_out = [row["prompt"] for _, row in both_splits(data, 0.2)[1]]
    backwards = [row["prompt"] for _, row in both_splits(data[::-1], 0.2)[1]]
    assert backwards == held_out[::-1]
    # Those where the first 8 bytes of sha256('"question I"') are below 2^64 / 5.
    assert held_out == [f"question {i}" for i in (15, 19, 21, 22, 36, 39)]


@pytest.mark.parametrize(
    "row", [{"messages": ["q"]}, {"prompt": ["q"]}, {"chosen": [3], "rejected": [4]}]
)
def test_malformed_row_survives_the_split_to_be_refused_with_its_place(row):
    data = [(1, json.loads(json.dumps(row)))]
    kept = rows.in_split(data, "train", False, 0.5) + rows.in_split(data, "test", True, 0.5)
    assert kept == data
