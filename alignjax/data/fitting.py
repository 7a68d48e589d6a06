"""What is wrong with a row's sequences, and what is done where they are too long, or too many."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from alignjax.config import Data
from alignjax.data import rows
from alignjax.data.chat import Encoded


class Item(NamedTuple):
    """What is trained on as a whole: a conversation, a pair, or a set."""

    sequences: list[Encoded]  # from the best to the worst
    ranks: tuple[int, ...]  # of the sequences, from 1


def problem_of(sequences: list[Encoded], example: rows.Example, stage: str) -> str:
    """What is wrong with the tokens of a row, if anything is; an evaluation takes ties."""
    place, best = example.place, {}
    for _, mask in sequences:
        mask[0] = False  # nothing comes before a first token, so nothing can predict it
        if not mask.any():
            return (
                f"{place}: no token of it is trained, because the chat template leaves its answer "
                "out, or joins it into one token with the text around it; change the row, or name "
                "another --model.chat_template."
            )
    for (ids, _), rank in zip(sequences, example.ranks, strict=True):
        if stage == "evaluation":
            break
        if best.setdefault(ids.tobytes(), rank) == rank:
            continue
        if rows.is_pair(example.row):
            return (
                f"{place}: `chosen` and `rejected` have the same tokens, so neither is preferred; "
                "remove the row, or change one of them."
            )
        return (
            f"{place}: two of its responses have the same tokens, and one is scored higher; remove "
            "one of them, or the row."
        )
    return ""


def with_prompt_cut(
    sequences: list[Encoded], data: Data, bos: int | None
) -> tuple[list[Encoded], str]:
    """The sides of a row that is too long with the start of its prompt cut off, and what was done.

    A first token that begins every text stays.
    """
    budget = data.max_prompt_length
    if not budget or all(len(ids) <= data.max_length for ids, _ in sequences):
        return sequences, ""
    found = []
    for ids, mask in sequences:
        prompt = int(mask.argmax())
        first = int(ids[0] == bos)
        kept = np.r_[:first, max(first, prompt - budget + first) : len(ids)]
        found.append((ids[kept], mask[kept]))
    if len(found[0][0]) == len(sequences[0][0]):
        return sequences, ""
    return found, f"prompt cut to {budget} tokens"


def fit(item: Item, max_length: int, overlong: str) -> tuple[list[Item], str]:
    """The items that a row's makes, within `max_length`, and what was done to the row for it."""
    if all(len(ids) <= max_length for ids, _ in item.sequences):
        return [item], ""
    longer = f"longer than {max_length} tokens"
    if len(item.sequences) > 1:
        kept = [i for i, (ids, _) in enumerate(item.sequences) if len(ids) <= max_length]
        less = _chosen(item, kept)
        if len(set(less.ranks)) > 1:
            return [less], f"responses {longer}, left out"
        return [], f"{longer}, dropped"
    if overlong == "drop":
        return [], f"{longer}, dropped"
    ids, mask = item.sequences[0]
    if overlong == "split":
        pieces = _pieces(ids, mask, max_length)
        return [Item([piece], item.ranks) for piece in pieces], f"{longer}, split"
    assert overlong == "truncate"
    if not mask[:max_length].any():
        return [], "no trained token after truncation, dropped"
    cut = (ids[:max_length], mask[:max_length])
    return [Item([cut], item.ranks)], f"{longer}, truncated"


def thinned(item: Item, most: int) -> tuple[Item, str]:
    """A set of more than `most` responses (0: any number) with so many, and what was done.

    Its best, its worst, and what lies evenly between in the order of the ranks.
    """
    count = len(item.sequences)
    if not most or count <= most:
        return item, ""
    picks = np.linspace(0, count - 1, most).round().astype(int)
    return _chosen(item, picks.tolist()), f"cut to {most} responses"


def _chosen(item: Item, picks: list[int]) -> Item:
    return Item([item.sequences[i] for i in picks], tuple(item.ranks[i] for i in picks))


def _pieces(ids: np.ndarray, mask: np.ndarray, max_length: int) -> Iterator[Encoded]:
    """Pieces of a long sequence that hold trained tokens, each of them in one piece.

    A piece begins with the last token of the one before, which predicts its second.
    """
    assert max_length > 1
    for start in range(0, len(ids) - 1, max_length - 1):
        piece = mask[start : start + max_length].copy()
        piece[0] = False
        if piece.any():
            yield ids[start : start + max_length], piece
