"""Rows of every format as examples, and what they carry."""

import re

import pytest
from conftest import SHARED_DATA
from rowcases import PLACE, WHERE, assistant, pair, refusal, said, sft, system, tool, user

from alignjax.config import Data
from alignjax.data import rows, sources
from alignjax.data.columns import Side

QA = (Side([user("q")], [assistant("a")]), Side([user("q")], [assistant("b")]))


# SFT


def test_messages():
    turns = [system("s"), user("q"), assistant("a"), user("r"), assistant("b")]
    assert sft({"messages": turns}) == sft({"messages": turns}, "plain") == Side([], turns)


def test_messages_with_tool_turns_and_a_last_question():
    turns = [user("q"), assistant("a"), tool("t"), tool("t"), assistant("b"), tool(""), user("r")]
    assert sft({"messages": turns}) == Side([], turns)


def test_prompt_and_completion_as_strings():
    row = {"prompt": "q", "completion": "a"}
    assert sft(row) == Side([user("q")], [assistant("a")])
    assert sft(row, "plain") == Side("q", "a")
    assert sft({"prompt": "", "completion": "a"}, "plain") == Side("", "a")


def test_prompt_and_completion_as_lists():
    row = {"prompt": [system("s"), user("q")], "completion": [assistant("a")]}
    assert sft(row) == sft(row, "plain") == Side([system("s"), user("q")], [assistant("a")])


def test_string_prompt_with_a_list_completion():
    row = {"prompt": "q", "completion": [assistant("a")]}
    assert sft(row) == Side([user("q")], [assistant("a")])


def test_one_message_in_place_of_a_list():
    assert sft({"prompt": user("q"), "completion": assistant("a")}) == QA[0]


def test_sharegpt_conversation():
    turns = [said("human", "q"), said("gpt", "a"), said("human", "r"), said("gpt", "b")]
    want = [user("q"), assistant("a"), user("r"), assistant("b")]
    assert sft({"conversations": turns}) == Side([], want)
    assert sft({"conversations": want}) == Side([], want)
    first = said("system", "s")
    assert sft({"conversations": [first, *turns]}) == Side([], [system("s"), *want])
    assert sft({"conversations": turns, "system": "s"}) == Side([], [system("s"), *want])
    both = {"conversations": [first, *turns], "system": "s"}
    assert sft(both) == Side([], [system("s"), *want])
    for nothing in ("", " ", None):
        assert sft({"conversations": turns, "system": nothing}) == Side([], want)


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("human", "user"),
        ("user", "user"),
        ("gpt", "assistant"),
        ("assistant", "assistant"),
        ("model", "assistant"),
        ("chatgpt", "assistant"),
        ("tool", "tool"),
        ("observation", "tool"),
    ],
)
def test_names_of_roles(name, role):
    before = {"user": [], "assistant": [user("q")], "tool": [user("q"), assistant("a")]}[role]
    after = [assistant("z")] if role != "assistant" else []
    for turn in (said(name, "t"), {"role": name, "content": "t"}):
        side = sft({"conversations": [*before, turn, *after]})
        assert side.answer == [*before, {"role": role, "content": "t"}, *after]


def test_keys_that_parquet_fills_with_null_are_dropped_and_others_stay():
    turn = {"role": "assistant", "content": "a", "tool_calls": None, "from": None, "name": "Eve"}
    want = {"role": "assistant", "content": "a", "name": "Eve"}
    assert sft({"messages": [user("q"), turn]}) == Side([], [user("q"), want])
    turn = {"role": None, "content": None, "from": "gpt", "value": "a", "weight": 1}
    assert sft({"conversations": [said("human", "q"), turn]}) == Side(
        [], [user("q"), assistant("a")]
    )
    row = {"messages": None, "prompt": "q", "completion": "a", "tools": None, "functions": []}
    assert sft(row) == sft(row | {"tools": "[]"}) == QA[0]


def test_alpaca():
    row = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
    assert sft(row) == Side([], [user("Add.\n1 and 2"), assistant("3")])
    for nothing in ("", None):
        want = Side([], [user("Add."), assistant("3")])
        assert sft(row | {"input": nothing, "history": nothing, "system": nothing}) == want
    old = [["q", "a"], ["r", "b"]]
    want = [system("s"), user("q"), assistant("a"), user("r"), assistant("b")]
    assert sft(row | {"history": old, "system": "s"}) == Side(
        [], [*want, user("Add.\n1 and 2"), assistant("3")]
    )


def test_first_format_counts():
    row = {
        "instruction": "i",
        "output": "o",
        "conversations": [said("human", "h"), said("gpt", "g")],
    }
    assert sft(row) == Side([], [user("h"), assistant("g")])
    row |= {"prompt": "p", "completion": "c"}
    assert sft(row) == Side([user("p")], [assistant("c")])
    assert sft(row | {"messages": [user("m"), assistant("n")]}) == Side(
        [], [user("m"), assistant("n")]
    )


# Pairs


def test_pair_of_strings_with_a_prompt():
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert pair(row) == QA
    assert pair(row, "plain") == (Side("q", "a"), Side("q", "b"))


def test_pair_of_lists_with_a_prompt_list():
    prompt = [system("s"), user("q"), assistant("a"), user("r")]
    row = {"prompt": prompt, "chosen": [assistant("c")], "rejected": [assistant("d")]}
    assert pair(row) == (Side(prompt, [assistant("c")]), Side(prompt, [assistant("d")]))


def test_pair_of_strings_with_a_prompt_list():
    assert pair({"prompt": [user("q")], "chosen": "a", "rejected": "b"}) == QA


def test_pair_of_single_messages():
    row = {"chosen": assistant("a"), "rejected": said("gpt", "b")}
    assert pair(row | {"prompt": "q"}) == pair(row | {"prompt": [user("q")]}) == QA


def test_old_answer_of_a_prompt_may_be_empty():
    prompt = [user("q"), assistant(""), user("r")]
    chosen, _ = pair({"prompt": prompt, "chosen": "a", "rejected": "b"})
    assert chosen == Side(prompt, [assistant("a")])


@pytest.mark.parametrize(
    "sides",
    [
        {"chosen": said("gpt", "a"), "rejected": said("gpt", "b")},
        {"chosen": assistant("a"), "rejected": assistant("b")},
        {"chosen": [said("gpt", "a")], "rejected": [said("gpt", "b")]},
        {"chosen": "a", "rejected": "b"},
        {
            "chosen": [said("human", "q"), said("gpt", "a")],
            "rejected": [said("human", "q"), said("gpt", "b")],
        },
    ],
)
def test_sharegpt_pair(sides):
    assert pair({"conversations": [said("human", "q")]} | sides) == QA


def test_sharegpt_pair_with_a_system_column():
    row = {"conversations": [said("human", "q")], "system": "s", "chosen": "a", "rejected": "b"}
    want = [system("s"), user("q")]
    assert pair(row) == (Side(want, [assistant("a")]), Side(want, [assistant("b")]))


def test_alpaca_pair():
    row = {"instruction": "q", "input": "", "chosen": "a", "rejected": "b"}
    assert pair(row) == QA
    chosen, _ = pair(row | {"input": "i", "history": [["o", "p"]], "system": "s"})
    assert chosen.prompt == [system("s"), user("o"), assistant("p"), user("q\ni")]


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


@pytest.mark.parametrize(
    "rejected",
    [
        [user("q"), assistant("a")],  # one side begins the other
        [user("q"), assistant("a"), user("R"), assistant("b")],  # apart in a later question
        [user("q"), assistant("a"), tool("t"), assistant("b")],
    ],
)
def test_implicit_prompt_ends_where_both_sides_answer(rejected):
    chosen = [user("q"), assistant("a"), user("r"), assistant("b")]
    assert pair({"chosen": chosen, "rejected": rejected}) == (
        Side([user("q")], chosen[1:]),
        Side([user("q")], rejected[1:]),
    )


def test_prompt_string_with_whole_conversations():
    # As in UltraFeedback binarized: `prompt` repeats what both conversations begin with.
    prompt = [system("s"), user("q")]
    row = {"chosen": [*prompt, assistant("a")], "rejected": [*prompt, assistant("b")]}
    sides = (Side(prompt, [assistant("a")]), Side(prompt, [assistant("b")]))
    for given in ("q", "", prompt, None):
        assert pair(row | {"prompt": given}) == pair(row | {"prompt": given}, "plain") == sides
    assert pair(row | {"messages": row["chosen"]}) == sides


def test_prompt_string_is_kept_where_the_answers_begin_alike():
    # Answers of several turns may share their first one; it is no prompt.
    chosen = [assistant("a"), user("r"), assistant("b")]
    rejected = [assistant("a"), user("r"), assistant("c")]
    assert pair({"prompt": "q", "chosen": chosen, "rejected": rejected}) == (
        Side([user("q")], chosen),
        Side([user("q")], rejected),
    )


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


# What rows carry


def test_carried_columns():
    row = {"margin": 2, "weight": 0.5, "source": "people", "prompt": "q"}
    found = rows.carried("rm", row, PLACE)
    assert found == {"margin": 2.0, "weight": 0.5, "source": "people"}
    assert type(found["margin"]) is float
    found = rows.carried("rm", {"margin": -1.5, "weight": 0}, PLACE)
    assert found == {"margin": -1.5, "weight": 0.0}
    assert rows.carried("rm", {"margin": None, "weight": None, "source": None}, PLACE) == {}
    assert rows.carried("rm", {}, PLACE) == {}


@pytest.mark.parametrize("strings", ["chat", "plain"])
def test_a_text_is_all_answer(strings):
    (side,) = rows.example("sft", {"text": "a b", "id": 1}, PLACE, strings).sides
    assert (side.prompt, side.answer) == ("", "a b")


def test_two_scores_are_a_margin_for_dpo_which_chooses_by_it_alone():
    row = {"score_chosen": 8.5, "score_rejected": 6}
    assert rows.carried("dpo", row, PLACE) == {"margin": 2.5}
    assert rows.carried("dpo", row | {"margin": 1}, PLACE) == {"margin": 1.0}
    assert rows.carried("dpo", {"score_chosen": 8.5}, PLACE) == {}
    assert rows.carried("rm", row, PLACE) == {}
    with pytest.raises(ValueError, match="score_chosen"):
        rows.carried("dpo", row | {"score_chosen": "good"}, PLACE)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"margin": "0.5"}, "margin='0.5': it must be a finite number."),
        ({"margin": True}, "margin=True: it must be a finite number."),
        ({"margin": float("nan")}, "margin=nan: it must be a finite number."),
        ({"weight": float("inf")}, "weight=inf: it must be a finite number."),
        ({"margin": 10**400}, "margin=a number of over 300 digits: it must be a finite number."),
        ({"weight": [1]}, "weight=[1]: it must be a finite number."),
        (
            {"weight": -0.5},
            "weight=-0.5: it must be at least 0.0 and at most 3.4028234663852886e+38.",
        ),
        ({"source": 3.5}, "source=3.5: it must be a string or a whole number or null."),
    ],
)
def test_carried_refusals(row, sentence):
    assert refusal(rows.carried, "rm", row, PLACE) == f"{WHERE}: {sentence}"


# What else rows say


@pytest.mark.parametrize("no", [{"weight": 0}, {"weight": 0.0}, {"train": False}])
@pytest.mark.parametrize("yes", [{"weight": 1}, {"train": True}, {"weight": None}, {}])
def test_turns_that_rows_keep_out_of_training(no, yes):
    turns = [user("q") | no, assistant("a") | no, user("r") | yes, assistant("b") | yes]
    plain = [user("q"), assistant("a"), user("r"), assistant("b")]
    assert sft({"messages": turns}) == Side([], plain, (1,))
    assert sft({"prompt": turns[:3], "completion": turns[3:]}) == Side(plain[:3], plain[3:])
    said_so = [said("human", "q"), said("gpt", "a") | no, said("human", "r"), said("gpt", "b")]
    assert sft({"conversations": said_so}) == Side([], plain, (1,))


@pytest.mark.parametrize(
    ("key", "value"), [("weight", 0.5), ("weight", "0"), ("train", "no"), ("train_detail", [{}])]
)
def test_a_weight_of_a_turn_is_all_or_nothing(key, value):
    row = {"messages": [user("q"), assistant("a") | {key: value}]}
    sentence = refusal(rows.example, "sft", row, PLACE, "chat")
    assert sentence.startswith(f"{WHERE}: `{key}` of message 2 of `messages` ")
    row = {"messages": [user("q"), assistant("a") | {"weight": 0}]}
    assert "every answer" in refusal(rows.example, "sft", row, PLACE, "chat")


TURN = [system("s"), user("q")]


@pytest.mark.parametrize(
    ("stage", "row", "prompt"),
    [
        ("sft", {"messages": [user("q"), assistant("a")]}, []),
        ("sft", {"prompt": "q", "completion": "a"}, TURN),
        ("sft", {"prompt": TURN, "completion": "a"}, TURN),
        ("dpo", {"prompt": "q", "chosen": "a", "rejected": "b"}, TURN),
        (
            "dpo",
            {
                "prompt": "q",
                "chosen": [user("q"), assistant("a")],
                "rejected": [user("q"), assistant("b")],
            },
            TURN,
        ),
        (
            "dpo",
            {
                "prompt": [user("q")],
                "chosen": [user("q"), assistant("a")],
                "rejected": [*TURN, assistant("b")],
            },
            TURN,
        ),
        ("rm", {"prompt": "q", "responses": ["a", "b"], "scores": [2, 1]}, TURN),
        ("rm", {"prompt": [user("q")], "completions": ["a", "b"], "ranks": [1, 2]}, TURN),
    ],
)
def test_a_system_column_is_the_first_turn(stage, row, prompt):
    best = rows.example(stage, row | {"system": "s"}, PLACE, "chat").sides[0]
    assert best == Side(prompt, [assistant("a")] if prompt else [*TURN, assistant("a")])


@pytest.mark.parametrize(
    ("strings", "row"),
    [
        ("chat", {"prompt": [system("t"), user("q")], "chosen": "a", "rejected": "b"}),
        ("plain", {"prompt": "q", "chosen": "a", "rejected": "b"}),
        ("plain", {"chosen": "q a", "rejected": "q b"}),
    ],
)
def test_a_system_column_that_has_no_place_is_refused(strings, row):
    sentence = refusal(rows.example, "dpo", row | {"system": "s"}, PLACE, strings)
    assert sentence.startswith(f"{WHERE}: ") and "`system`" in sentence


def test_template_kwargs_of_a_row():
    row = {"prompt": "q", "completion": "a"}
    given = {"enable_thinking": False, "of_another_row": None}  # as Parquet has it
    assert sft(row | {"chat_template_kwargs": given}).template_kwargs == {"enable_thinking": False}
    assert sft(row | {"chat_template_kwargs": None}).template_kwargs == {}
    row |= {"chat_template_kwargs": "x"}
    assert "chat_template_kwargs='x'" in refusal(rows.example, "sft", row, PLACE, "chat")


def test_names_of_a_user_stay_on_one_line():
    for row in (
        {"a\n{x}": 1},
        {"messages": [{"a\n{x}": 1}]},
        {"messages": [user("q") | {"role": "a\n{x}"}]},
    ):
        sentence = refusal(rows.example, "sft", row, PLACE, "chat")
        assert "`a\\n{x}`" in sentence and "\n" not in sentence


# Real files


@pytest.mark.parametrize(
    ("name", "stage", "count"),
    [
        ("ultrafeedback_sample", "dpo", 1193),
        ("hh_rlhf_sample", "dpo", 2500),
        ("alpaca_eval_prefs", "dpo", 3889),
        ("dolly_sft_sample", "sft", 2981),
    ],
)
def test_no_row_of_the_real_files_is_refused(name, stage, count):
    file = SHARED_DATA / f"{name}.jsonl"
    if not file.is_file():
        pytest.skip(f"there is no {file}")
    found = 0
    for row in sources.read(Data(path=str(file)), False):
        example = rows.example(stage, row.values, row.place, "chat")
        assert all(turn["content"] for side in example.sides for turn in side.answer)
        found += 1
    assert found == count
