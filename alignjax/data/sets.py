"""A row with several responses to one prompt -> its sides from the best to the worst, with ranks.

The columns are a prompt, as pairs have it; `responses` or `completions`, a list of strings or of
messages; and `scores` (higher is better) or `ranks` (1 is the best), a number for each. In
UltraFeedback's layout each of `completions` holds its `response` and `overall_score`.
"""

from alignjax.data.columns import Side, listed, number, prompt_of, side_of, turns_of
from alignjax.data.formats import Place
from alignjax.errors import UserError
from alignjax.validate import check

COLUMNS = ("responses", "completions", "scores", "ranks", "prompt", "conversations", "instruction")


def column_of(row: dict) -> str:
    """The column that holds a row's responses, or ""."""
    return next((name for name in ("responses", "completions") if row.get(name) is not None), "")


def read_set(row: dict, place: Place, strings: str) -> tuple[tuple[Side, ...], tuple[int, ...]]:
    """The sides and ranks of a row. Responses of one score share a rank, in the row's order.

    Raises UserError with the place and the fix. Responses are named as in JSON: `responses[0]` is
    the first.
    """
    column = column_of(row)
    responses = row[column]
    check(responses, list, str(place), column)
    if len(responses) < 2:
        raise UserError(
            f"{place}: `{column}` has {len(responses)} of the 2 responses that a set needs at "
            "least; add more, or remove the row."
        )
    prompt = prompt_of(row, place, strings)
    if prompt is None:
        raise UserError(
            f"{place}: a set of responses needs a prompt as `prompt`, `conversations` or "
            f"`instruction`; the row has {listed(row, COLUMNS)}."
        )
    texts, numbers, name = _scored(row, column, place)
    names = [f"{column}[{i}]" for i in range(len(texts))]
    answers = [
        turns_of(text, own, "assistant", strings, place)
        for text, own in zip(texts, names, strict=True)
    ]
    sides = [
        side_of(prompt, answer, own, place) for answer, own in zip(answers, names, strict=True)
    ]
    _check_distinct(answers, numbers, names, name, place)
    levels = sorted(set(numbers), reverse=name != "ranks")
    ranks = [levels.index(value) + 1 for value in numbers]
    order = sorted(range(len(ranks)), key=ranks.__getitem__)
    return tuple(sides[i] for i in order), tuple(ranks[i] for i in order)


def _scored(row: dict, column: str, place: Place) -> tuple[list, list[float], str]:
    """The responses, a number for each, and what those are called: "scores", "ranks" or other."""
    responses = row[column]
    name = next((name for name in ("scores", "ranks") if row.get(name) is not None), "")
    ultrafeedback = all(isinstance(one, dict) and "response" in one for one in responses)
    if name:
        values = row[name]
        check(values, list, str(place), name)
        keys = [f"{name}[{i}]" for i in range(len(values))]
    elif ultrafeedback:
        name = "overall_score"
        values = [one.get(name) for one in responses]
        keys = [f"{column}[{i}].{name}" for i in range(len(values))]
    else:
        raise UserError(
            f"{place}: a set of responses needs `scores` (higher is better) or `ranks` (1 is the "
            f"best), a number for each; the row has {listed(row, COLUMNS)}."
        )
    if len(values) != len(responses):
        raise UserError(
            f"{place}: `{column}` has {len(responses)} responses and `{name}` {len(values)} "
            "numbers; give one for each."
        )
    numbers = [number(value, key, place) for value, key in zip(values, keys, strict=True)]
    _check_numbers(numbers, name, place)
    texts = [one["response"] for one in responses] if ultrafeedback else responses
    return texts, numbers, name


def _check_numbers(numbers: list[float], name: str, place: Place) -> None:
    if name == "ranks" and not all(value >= 1 and value % 1 == 0 for value in numbers):
        raise UserError(
            f"{place}: `ranks` must be whole numbers from 1, the best; give other numbers, of "
            "which a higher one is better, as `scores`."
        )
    if len(set(numbers)) == 1:
        raise UserError(
            f"{place}: all `{name}` are equal, so no response is preferred; remove the row."
        )


def _check_distinct(
    answers: list, numbers: list[float], names: list[str], name: str, place: Place
) -> None:
    """Refuses a response that stands there twice, as better than itself."""
    for i in range(len(answers)):
        for j in range(i):
            if answers[i] == answers[j] and numbers[i] != numbers[j]:
                raise UserError(
                    f"{place}: `{names[j]}` and `{names[i]}` are the same, and their `{name}` "
                    "differ; remove one of them."
                )
