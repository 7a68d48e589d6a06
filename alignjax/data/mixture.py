"""Which items an epoch holds: each part of the data by its weight, and a selection among all."""

import numpy as np

from alignjax.config import Data
from alignjax.data.packing import MOST_ITEMS
from alignjax.data.sources import path_names
from alignjax.data.tokenset import TokenSet
from alignjax.errors import UserError

# Random streams of their own: NumPy takes [seed, n, 0] for an epoch's [seed, n].
_DRAW, _CHOICE = 1, 2
_MOST_WEIGHT = 1000


def epoch_items(data: TokenSet, config: Data, seed: int) -> np.ndarray:
    """Items of every epoch, int64 [m] in the data's order; one of a weight above 1 several times.

    They depend on the data, `config` and `seed` alone. A smaller `max_pairs` chosen at random is
    part of a larger one. Raises UserError for weights that do not fit the path's names, and for a
    selection by a column that the data do not have.
    """
    weights = _weights(config)
    if weights is None:
        pool = np.arange(len(data))
    else:
        counts = np.bincount(data.part, minlength=len(weights))
        if (total := counts @ weights) > MOST_ITEMS:
            raise UserError(
                f"data.weights={config.weights}: an epoch would have {total:,.0f} items, over "
                f"{MOST_ITEMS:,}: lower them."
            )
        parts = [_drawn(data, part, weight, seed) for part, weight in enumerate(weights)]
        pool = np.sort(np.concatenate(parts))
    if not config.max_pairs or config.max_pairs >= len(pool):
        return pool
    return np.sort(_ranked(pool, data, config, seed)[: config.max_pairs])


def _weights(config: Data) -> list[float] | None:
    """The weight of each name of the path; None where all count once."""
    if not config.weights:
        return None
    names = path_names(config.path)
    try:
        found = [float(weight) for weight in config.weights.split(",")]
    except ValueError:
        found = []
    if len(found) != len(names) or not all(0 <= weight <= _MOST_WEIGHT for weight in found):
        raise UserError(
            f"data.weights={config.weights}: give a number from 0 to {_MOST_WEIGHT} for each name "
            f"of data.path ({len(names)} here), with commas between."
        )
    return found


def _drawn(data: TokenSet, part: int, weight: float, seed: int) -> np.ndarray:
    """Items of a part: all as often as the weight is whole, and a share of them once more."""
    items = np.flatnonzero(data.part == part)
    whole = int(weight)
    share = round((weight - whole) * len(items))
    more = np.random.default_rng([seed, part, _DRAW]).permutation(items)[:share]
    return np.concatenate([np.tile(items, whole), more])


def _ranked(pool: np.ndarray, data: TokenSet, config: Data, seed: int) -> np.ndarray:
    """The pool, those to be chosen first."""
    if config.select == "random":
        return np.random.default_rng([seed, 0, _CHOICE]).permutation(pool)
    if config.select == "score_gap":
        if "margin" not in data.columns:
            raise UserError(
                "data.select=score_gap: no row has a `margin`, by which the chosen answer's score "
                "is above the rejected one's (for dpo also `score_chosen` and `score_rejected`); "
                "add that column, or choose another selection."
            )
        return pool[np.argsort(-data.margin[pool], kind="stable")]
    sign = {"shortest": 1, "longest": -1}[config.select]
    return pool[np.argsort(sign * data.trained_counts()[pool, 0], kind="stable")]
