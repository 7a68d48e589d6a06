"""What is done to a row whose sequences are longer than they may be."""

from collections.abc import Iterator

import numpy as np

from alignjax.config import Data
from alignjax.data.chat import Encoded


def with_prompt_cut(
    sequences: list[Encoded], data: Data, bos: int | None
) -> tuple[list[Encoded], str]:
    """The sides of a pair that is too long with the start of its prompt cut off, and what was done.

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


def fit(
    sequences: list[Encoded], max_length: int, overlong: str
) -> tuple[list[list[Encoded]], str]:
    """The items of a row, each within `max_length`, and what was done to the row for it."""
    if all(len(ids) <= max_length for ids, _ in sequences):
        return [sequences], ""
    longer = f"longer than {max_length} tokens"
    if overlong == "drop" or len(sequences) == 2:
        return [], f"{longer}, dropped"
    ids, mask = sequences[0]
    if overlong == "split":
        return [[piece] for piece in _pieces(ids, mask, max_length)], f"{longer}, split"
    if not mask[:max_length].any():
        return [], "no trained token after truncation, dropped"
    return [[(ids[:max_length], mask[:max_length])]], f"{longer}, truncated"


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
