"""Scores of a whole data set, and what is read off them.

n items, S sides of an item.
"""

from collections.abc import Callable

import numpy as np

from alignjax import preferences
from alignjax.config import Compute
from alignjax.data.batches import packed_steps
from alignjax.data.packing import plan_scoring
from alignjax.data.tokenset import TokenSet
from alignjax.logps import sequence_logps
from alignjax.models.decoder import Decoder
from alignjax.sharding import local_rows, place_rows, to_host
from alignjax.stages import Facts, Scoring, Stage
from alignjax.step import score_step

LOGGED_LABELS = 16  # of a kind, such as sources, that have metrics of their own
_BY_LABEL = ("rewards/accuracies", "rewards/margins")


def score(
    model: Decoder,
    data: TokenSet,
    row_length: int,
    rows: int,
    compute: Compute,
    ids: np.ndarray | None = None,
    progress: Callable[[int], None] = lambda done: None,
    scores: Scoring = sequence_logps,
    known: np.ndarray | None = None,
) -> np.ndarray:
    """Log-probs or rewards of every sequence, float32 [n, S]; NaN for items not in `ids`.

    Items are looked up by their number, so the result does not depend on how they were packed.
    `progress` is called with the items done. `known` is the result of an interrupted call: it
    is filled, and batches whose items it has are not scored again.
    """
    result = np.full((len(data), data.sides), np.nan, np.float32) if known is None else known
    plan = plan_scoring(data.lengths(), row_length, rows, ids)
    missing = [np.isnan(result[plan.step_items(step)]).any() for step in range(len(plan))]
    first = missing.index(True) if any(missing) else len(plan)
    if first == len(plan):
        return result
    done = int(plan.rows[plan.steps[first]])
    steps = packed_steps(data, plan, rows, local=local_rows(rows))
    for step, batch in enumerate(steps.read(first), first):
        found = score_step(model, place_rows(batch, rows), scores=scores, compute=compute)
        items = steps.items(step)
        real = items > 0
        result[items[real] - 1] = to_host(found)[real]
        done += int(real.sum())
        progress(done)
    return result


def item_terms(stage: Stage, scores: np.ndarray, ref: np.ndarray, data: TokenSet):
    """Every metric of every item: name -> (values, counts), float64 [n]."""
    tokens = data.trained_counts().astype(np.float32)
    rate = 1.0
    if stage.sft_term:
        rate = data.weight.sum() / ((data.weight * tokens[:, 0]).sum() or 1.0)
    facts = Facts(ref, tokens, data.margin, data.weight, data.by_item(data.ranks))
    parts = []
    for start in range(0, max(1, len(data)), 1024):  # a set of 64 has 2,016 pairs
        some = slice(start, start + 1024)
        own = Facts(*(None if fact is None else fact[some] for fact in facts[:-1]), rate)
        parts.append(stage.terms(scores[some], own))
    return {
        name: tuple(
            np.concatenate([np.asarray(part[name][i], np.float64) for part in parts])
            for i in range(2)
        )
        for name in parts[0]
    }


def means(terms) -> dict[str, float]:
    """Metrics of the whole set, with `eval_` in front."""
    return {
        f"eval_{name}": float(ratio(values.sum(), counts.sum()))
        for name, (values, counts) in terms.items()
    }


def ratio(sums, counts):
    """Means of sums; 0 where no item, or none of a weight above 0, counts."""
    return sums / np.where(counts == 0, 1.0, counts)


def labels(data: TokenSet) -> dict[str, np.ndarray]:
    """What items are told apart by: the label of each, [n], by kind.

    "source" is what the row names, or "", and "turns" the user turns of the prompt, 0 of plain
    text.
    """
    return {"source": np.array(data.sources, object)[data.source], "turns": np.asarray(data.turns)}


def logged_labels(own: np.ndarray) -> list:
    """Labels of a kind, of each item [n], those of most items first.

    Without that of rows that name none, and one that all items have, which tells nothing new.
    """
    found, counts = np.unique(own, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return [found[i] for i in order if str(found[i]) and counts[i] < len(own)]


def logged(stage: Stage, scores: np.ndarray, ref: np.ndarray, data: TokenSet) -> dict[str, float]:
    """What a run logs of its held-out items: `means`, of a reward model also min, mean and max.

    Of pairs it has accuracy, margin and those again by source and by user turns, as in
    "eval_rewards/margins/turns=2", for the LOGGED_LABELS labels of each kind that most items have.
    """
    terms = item_terms(stage, scores, ref, data)
    real = data.trained_counts() > 0

    def spread(own: np.ndarray) -> dict[str, float]:
        if stage.name != "rm":
            return {}
        found = preferences.spread(scores[real & own[:, None]])
        return {f"eval_rewards/{name}": value for name, value in found.items()}

    found = means(terms) | spread(np.ones(len(data), bool))
    compared = {name: terms[name] for name in _BY_LABEL if name in terms}
    for kind, labels_n in labels(data).items() if compared else ():
        for label in logged_labels(labels_n)[:LOGGED_LABELS]:
            own = labels_n == label
            part = {name: (top[own], bottom[own]) for name, (top, bottom) in compared.items()}
            more = means(part) | spread(own)
            found |= {f"{name}/{kind}={label}": value for name, value in more.items()}
    return found


def paired_bootstrap(before, after, seed: int = 0, draws: int = 10_000) -> tuple[float, float]:
    """95 % interval of (mean after - mean before), items drawn with replacement in pairs.

    `before` and `after` are (values, counts) of the same items.
    """
    rng = np.random.default_rng(seed)
    n = len(before[0])
    differences = []
    for start in range(0, draws, 1000):
        picks = rng.integers(0, n, (min(1000, draws - start), n))
        mean_before, mean_after = (
            ratio(values[picks].sum(1), counts[picks].sum(1)) for values, counts in (before, after)
        )
        differences.append(mean_after - mean_before)
    low, high = np.percentile(np.concatenate(differences), [2.5, 97.5])
    return float(low), float(high)


def longer_wins(data: TokenSet) -> float:
    """Accuracy of "the longer answer is better" on pairs, in trained tokens; ties count half."""
    tokens, right, count = data.trained_counts(), 0.0, 0
    for items, better, worse in data.pairs():
        credit = preferences.credit(tokens[items, better] - tokens[items, worse])
        right, count = right + credit.sum(), count + len(credit)
    return float(right / count)
