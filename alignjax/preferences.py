"""How far a scorer of answers agrees with people's preferences; numpy alone.

n pairs. A margin is the score of the chosen side less that of the rejected one. Pairs of different
items are taken as independent of each other.
"""

from typing import NamedTuple

import numpy as np

_Z = 1.959964  # standard deviations that hold 95 % of a normal distribution


class Bin(NamedTuple):
    """Pairs whose confidence is from `low` to below `high`, or to 1 in the last."""

    low: float
    high: float
    pairs: int
    confidence: float  # mean
    accuracy: float


def credit(margins: np.ndarray) -> np.ndarray:
    """1 where the chosen side is ahead, 0 where it is behind, 0.5 for a tie; float64 [n]."""
    return 0.5 * (np.sign(margins) + 1)


def wilson(accuracy: float, count: int) -> tuple[float, float]:
    """95 % score interval of a share of `count` pairs (Wilson, 1927, JASA 22).

    Where ties count as half it is a little too wide, since a half varies less than 0 and 1 do.
    """
    shrink = 1 + _Z**2 / count
    middle = (accuracy + _Z**2 / (2 * count)) / shrink
    spread = accuracy * (1 - accuracy) / count + _Z**2 / (4 * count**2)
    half = _Z * float(np.sqrt(spread)) / shrink
    return max(0.0, middle - half), min(1.0, middle + half)


def calibration(margins: np.ndarray, bins: int = 10) -> tuple[list[Bin], float]:
    """Bins of equal width that hold pairs, and the expected calibration error.

    The confidence of a pair is the Bradley-Terry probability of the side that is ahead,
    sigmoid(|margin|), from 0.5 to 1. The error is the mean over pairs of |accuracy - confidence| of
    their bin (Guo et al., arXiv 1706.04599, equation 3).
    """
    confidence = 1 / (1 + np.exp(-np.abs(np.asarray(margins, np.float64))))
    right = credit(margins)
    edges = np.linspace(0.5, 1, bins + 1)
    own = np.digitize(confidence, edges[1:-1])
    found = [
        Bin(
            float(edges[i]),
            float(edges[i + 1]),
            int((own == i).sum()),
            float(confidence[own == i].mean()),
            float(right[own == i].mean()),
        )
        for i in np.unique(own)
    ]
    gaps = sum(one.pairs * abs(one.accuracy - one.confidence) for one in found)
    return found, gaps / len(right)


def agreement(margins: np.ndarray, longer: np.ndarray, items: np.ndarray) -> dict:
    """What is told of pairs, as JSON holds it.

    `longer` is by how many tokens the chosen answer is the longer one, and `items` which pair or
    set of responses a pair is of, both [n]. Intervals are those of so many items: the pairs of a
    set are not independent, and at worst all of them are right or wrong together.
    """
    found = {"pairs": len(margins), "ties": int((margins == 0).sum())}
    count = len(np.unique(items))
    if count < len(items):
        found["sets"] = count
    for name, by in (("accuracy", margins), ("longer_wins", longer)):
        share = float(credit(by).mean())
        found |= {name: share, f"{name}_interval": list(wilson(share, count))}
    return found | {"margin": float(np.mean(margins, dtype=np.float64))}


def spread(rewards: np.ndarray) -> dict[str, float]:
    """The least, mean and largest of rewards, as JSON holds them."""
    mean = rewards.mean(dtype=np.float64)
    return {"min": float(rewards.min()), "mean": float(mean), "max": float(rewards.max())}


def agreement_by(
    labels: np.ndarray, margins: np.ndarray, longer: np.ndarray, items: np.ndarray
) -> dict[str, dict]:
    """`agreement` of the pairs of each label, [n], in the order of the labels."""
    return {
        str(label): agreement(*(array[labels == label] for array in (margins, longer, items)))
        for label in np.unique(labels)
    }
