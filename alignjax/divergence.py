"""How far a policy has gone from its reference: KL divergence on answers of the policy's own.

KL(pi || ref) is the mean of log pi(y|x) - log ref(y|x) over prompts x and answers y that pi draws.
It is estimated by the plain mean over answers drawn at temperature 1, which is unbiased, so for a
small divergence it may fall below 0. An answer ends with its end token, which counts, or after
samples.max_tokens tokens; the divergence is that of answers so cut.
"""

import numpy as np

from alignjax.config import Compute
from alignjax.data.tokenset import TokenSet, in_memory
from alignjax.evaluation import score
from alignjax.models.decoder import Decoder
from alignjax.progress import phase
from alignjax.run import Run, load_reference


def from_reference(
    run: Run, policy: Decoder, weights: str, prompts: list[list[int]], answers: list[list[int]]
) -> np.ndarray:
    """Log-ratio of each answer to the weights that training started from, nats, float64 [n].

    Those are not in memory while a run trains: they are read from disk, scored, and given up
    again. Until then they take 4 bytes a parameter, as a step's gradients do. Raises UserError
    where they are others than `weights`, a fingerprint.
    """
    data = with_prompts(prompts, answers)
    length = -(-max(run.config.batch.row_length, int(data.lengths().max())) // 128) * 128
    with phase(f"log-probs of {len(data)} answers"):
        pi = log_probs(policy, data, length, run.rows, run.config.compute)
    reference, _ = load_reference(run, {"reference": weights})
    with phase(f"log-probs of {len(data)} answers under the reference"):
        return pi - log_probs(reference, data, length, run.rows, run.config.compute)


def with_prompts(prompts: list[list[int]], answers: list[list[int]]) -> TokenSet:
    """Answers behind their prompts; only the answers' tokens count."""
    parts = [part for pair in zip(prompts, answers, strict=True) for part in pair]
    lengths = np.array([len(part) for part in parts])
    return in_memory(
        tokens=np.concatenate(parts).astype(np.int32),
        trained=np.repeat(np.arange(len(parts)) % 2 == 1, lengths),
        offsets=np.cumsum([0, *lengths.reshape(-1, 2).sum(1)]),
    )


def log_probs(
    model: Decoder, data: TokenSet, row_length: int, rows: int, compute: Compute
) -> np.ndarray:
    """Summed log-probs of each answer's tokens, nats, float64 [n]."""
    return np.float64(score(model, data, row_length, rows, compute)[:, 0])


def metrics(answers: list[dict]) -> dict[str, float]:
    """What a run logs of answers that carry a `log_ratio` and their `tokens`; else nothing.

    `samples/kl` is the mean of the log-ratios, nats an answer; `samples/kl_per_token` is their sum
    over all tokens.
    """
    ratios = [answer["log_ratio"] for answer in answers if "log_ratio" in answer]
    if not ratios:
        return {}
    tokens = sum(answer["tokens"] for answer in answers)
    return {
        "samples/kl": float(np.mean(ratios)),
        "samples/kl_per_token": float(np.sum(ratios) / tokens),
    }
