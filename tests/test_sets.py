"""Rows with several responses: their sides from the best to the worst, and their ranks."""

import pytest
from rowcases import EMPTY, PLACE, WHERE, assistant, refusal, user

from alignjax.data import rows
from alignjax.data.columns import Side

TEXTS = ["a", "b", "c", "d"]


def read(row: dict, strings: str = "chat") -> tuple[list[Side], tuple[int, ...]]:
    example = rows.example("rm", row, PLACE, strings)
    assert (example.place, example.row) == (PLACE, row)
    return list(example.sides), example.ranks


def of(**columns) -> dict:
    return {"prompt": "q", "responses": TEXTS, "scores": [1, 3, 2, 3], **columns}


def sides(*texts: str) -> list[Side]:
    return [Side([user("q")], [assistant(text)]) for text in texts]


def test_the_best_comes_first_and_ties_share_a_rank():
    assert read(of()) == (sides("b", "d", "c", "a"), (1, 1, 2, 3))
    assert read(of(scores=None, ranks=[2, 7, 1, 2])) == (sides("c", "a", "d", "b"), (1, 2, 2, 3))


def test_other_names_and_kinds_of_the_columns():
    found = read(of())
    assert read(of(responses=None, completions=TEXTS)) == found
    assert read(of(prompt=None, instruction="q")) == found
    assert read(of(prompt=[user("q")], responses=[[assistant(t)] for t in TEXTS])) == found
    assert read(of(prompt=[user("q")], responses=[assistant(t) for t in TEXTS])) == found
    assert read(of(ranks=[1, 2, 3, 4])) == found  # scores count
    plain = [Side("q", text) for text in "bdca"]
    assert read(of(), "plain") == (plain, found[1])


def test_the_layout_of_ultrafeedback():
    completions = [
        {"model": "m", "response": text, "overall_score": score, "fine-grained_score": 1.0}
        for text, score in zip(TEXTS, (1.0, 8.5, 7.0, 8.5), strict=True)
    ]
    row = {"source": "flan", "instruction": "q", "models": ["m"] * 4, "completions": completions}
    assert read(row) == read(of())
    row["completions"] = [completions[0], {"response": "x", "overall_score": None}]
    assert refusal(read, row) == (
        f"{WHERE}: completions[1].overall_score=None: it must be a finite number."
    )


def test_a_pair_is_read_as_a_pair_where_it_is_one():
    row = of(chosen="a", rejected="b")
    assert read(row) == (sides("a", "b"), (1, 2))
    assert rows.example("dpo", row, PLACE, "chat").ranks == (1, 2)


NEEDS = "a set of responses needs "
BAD = {
    "no list": (of(responses="a"), "responses='a': it must be a list."),
    "one response": (
        of(responses=["a"]),
        "`responses` has 1 of the 2 responses that a set needs at least; add more, or remove the "
        "row.",
    ),
    "no prompt": (
        of(prompt=None),
        NEEDS + "a prompt as `prompt`, `conversations` or `instruction`; the row has `prompt` "
        "(null), `responses`, `scores`.",
    ),
    "no scores": (
        {"prompt": "q", "responses": TEXTS, "score": [1, 2, 3, 4]},
        NEEDS + "`scores` (higher is better) or `ranks` (1 is the best), a number for each; the "
        "row has `prompt`, `responses`, `score` (did you mean `scores`?).",
    ),
    "scores of text": (of(scores="1"), "scores='1': it must be a list."),
    "lengths that differ": (
        of(scores=[1, 2, 3]),
        "`responses` has 4 responses and `scores` 3 numbers; give one for each.",
    ),
    "a score of text": (
        of(scores=[1, "2", 3, 4]),
        "scores[1]='2': it must be a finite number.",
    ),
    "a score that is no number": (
        of(scores=[1, 2, float("nan"), 4]),
        "scores[2]=nan: it must be a finite number.",
    ),
    "equal scores": (
        of(scores=[2, 2.0, 2, 2]),
        "all `scores` are equal, so no response is preferred; remove the row.",
    ),
    "a rank of 0": (
        of(scores=None, ranks=[0, 1, 2, 3]),
        "`ranks` must be whole numbers from 1, the best; give other numbers, of which a higher "
        "one is better, as `scores`.",
    ),
    "equal responses": (
        of(responses=["a", "b", "a", "d"]),
        "`responses[0]` and `responses[2]` are the same, and their `scores` differ; remove one of "
        "them.",
    ),
    "an empty response": (of(responses=["a", " ", "c", "d"]), "`responses[1]` is empty" + EMPTY),
    "a response of null": (
        of(responses=["a", "b", None, "d"]),
        "responses[2]=None: it must be a string or a list.",
    ),
    "a response by the user": (
        of(responses=[[user("a")], *TEXTS[1:]]),
        "`responses[0]` begins with a user turn; an answer begins with an assistant turn.",
    ),
    "nothing of it": (
        {"prompt": "q", "response": TEXTS},
        "a preference row needs `chosen` and `rejected` (or is a set: `responses`, and `scores` "
        "or `ranks`), and a prompt as `prompt`, `conversations` or `instruction` or as what both "
        "begin with; it has `prompt`, `response` (did you mean `responses`?).",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_set(name):
    row, sentence = BAD[name]
    assert refusal(read, row) == f"{WHERE}: {sentence}"


def test_equal_responses_of_equal_scores_are_kept():
    assert read(of(responses=["a", "b", "c", "b"]))[0] == sides("b", "b", "c", "a")


def test_dpo_takes_no_sets():
    assert refusal(rows.example, "dpo", of(), PLACE, "chat") == (
        f"{WHERE}: `responses` is a set of responses, which rm trains on and dpo does not; give "
        "two of them as `chosen` and `rejected`, such as the best and the worst."
    )
