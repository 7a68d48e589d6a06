"""The training loop, the same for every stage."""

import math
import time
from collections.abc import Iterator
from dataclasses import replace

import jax
import numpy as np

from alignjax import checkpoint, evaluation, metrics, optim
from alignjax.data.batches import Batch
from alignjax.models.decoder import Decoder
from alignjax.progress import clock, phase, say
from alignjax.run import Baseline, Run
from alignjax.sharding import place
from alignjax.step import State, train_step


def fit(run: Run, state: State, first: int, base: Baseline, manager) -> State:
    """Trains from step `first` to the plan's end; logs, evaluates and saves on the way.

    Raises FloatingPointError, the last good state saved, where a loss or gradient is not finite.
    """
    config, log = run.config, run.directory / "metrics.jsonl"
    metrics.cut_back(log, first if first else -1)
    if not first and base.logps_held_out is not None:
        zero = evaluation.item_terms(
            run.stage, base.logps_held_out, base.ref_held_out, run.held_out
        )
        metrics.append(log, {"step": 0, "epoch": 0.0, **evaluation.means(zero)})
    total = len(run.steps)
    if first == total:
        return state

    tx = optim.optimizer(config.optimizer, total)
    rate = optim.schedule(config.optimizer, total)
    useful = run.steps.useful_tokens()
    seen = np.cumsum(useful)
    epoch = np.cumsum([len(run.steps.plan.step_items(i)) for i in range(total)]) / len(run.train)
    batches = replace(run.steps, ref=base.ref_train).read(first)
    static = {"stage": run.stage, "compute": config.compute, "tx": tx}
    batch = _next(batches)
    with phase("compiling the training step"):
        step_fn = train_step.lower(state, batch, np.int32(1), np.int32(0), **static).compile()

    pending, mark, marked = None, time.monotonic(), first
    started = time.monotonic()
    with phase("training", total) as update:
        for index in range(first, total):
            micro = np.int32(run.steps.micro_batches(index))
            state, now = step_fn(state, batch, micro, np.int32(index))
            batch = _next(batches) if index + 1 < total else None
            if pending:  # one step late: the device works on while the host reads
                _check(run, pending, state, manager)
                update(index, _note(pending[1]))
            pending = (index, now)
            done = index + 1
            due = done % config.log.every == 0 or done == total
            evaluating = bool(run.held_out) and (done % config.log.eval_every == 0 or done == total)
            saving = done % config.checkpoint.every == 0 or done == total
            if not (due or evaluating or saving):
                continue
            line = _check(run, pending, state, manager)
            seconds = time.monotonic() - mark
            line = {"step": done, "epoch": round(float(epoch[index]), 6)} | line
            line |= {
                "learning_rate": float(rate(index)),
                "num_tokens": int(seen[index]),
                "tokens_per_second": float(useful[marked:done].sum() / seconds),
            }
            spent = time.monotonic() - started
            eta = clock(spent / (done - first) * (total - done))
            say(_line(line, total, eta))
            update(done, _note(line))
            held_out = {}
            if evaluating:
                held_out = evaluate(run, state.model, done, base)
                say("  held out: " + _numbers(held_out))
            if jax.process_index() == 0:
                metrics.append(log, line | held_out)
            if saving:
                checkpoint.save(manager, state, done, config, held_out or None)
            mark, marked = time.monotonic(), done
    return state


def evaluate(run: Run, model: Decoder, step: int, base: Baseline) -> dict[str, float]:
    """Metrics on the held-out rows; their log-probs are kept in the run directory."""
    config = run.config
    with phase(f"evaluating at step {step}", len(run.held_out)) as update:
        logps = evaluation.score(
            model,
            run.held_out,
            config.batch.row_length,
            run.rows,
            config.compute,
            progress=update,
        )
    if jax.process_index() == 0:
        file = run.directory / "eval" / f"step-{step}.npy"
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, logps)
    terms = evaluation.item_terms(run.stage, logps, base.ref_held_out, run.held_out)
    return evaluation.means(terms)


def _next(batches: Iterator[Batch]) -> Batch:
    return place(next(batches), None, "batch")


def _check(run: Run, pending, state: State, manager) -> dict[str, float]:
    """Metrics of a step as numbers; stops the run where they are not finite."""
    index, values = pending
    values = {name: float(value) for name, value in values.items()}
    if math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"]):
        return values
    good = int(state.step)
    manager.wait_until_finished()
    if manager.latest_step() != good:
        checkpoint.save(manager, state, good, run.config, None)
        manager.wait_until_finished()
    ids = np.sort(run.steps.plan.step_items(index))
    config = run.config
    logps = evaluation.score(
        state.model, run.train, config.batch.row_length, run.rows, config.compute, ids
    )
    bad = ids[~np.isfinite(logps[ids]).all(1)]
    which = "of these are not finite" if len(bad) else "all look finite one by one; the step held"
    lines = ", ".join(str(run.train.lines[i]) for i in (bad if len(bad) else ids))
    raise FloatingPointError(
        f"step {index + 1}: loss {values['loss']}, grad_norm {values['grad_norm']}; the "
        f"{run.stage.unit} ({which}): lines {lines} of {run.train.file}. The weights after step "
        f"{good} are saved in {run.directory / 'checkpoints'}; mend the data or lower "
        "optimizer.learning_rate."
    )


def _line(line: dict, total: int, eta: str) -> str:
    return f"step {line['step']}/{total}  {_numbers(line)}  ETA {eta}"


_SHOWN = {
    "loss": "loss {:.4f}",
    "rewards/accuracies": "accuracy {:.3f}",
    "rewards/margins": "margin {:.4f}",
    "grad_norm": "grad norm {:.3f}",
    "learning_rate": "lr {:.2e}",
    "tokens_per_second": "{:.0f} tokens/s",
}


def _numbers(line: dict) -> str:
    line = {name.removeprefix("eval_"): value for name, value in line.items()}
    return "  ".join(text.format(line[name]) for name, text in _SHOWN.items() if name in line)


def _note(line: dict) -> str:
    accuracy = line.get("rewards/accuracies")
    more = "" if accuracy is None else f" accuracy {float(accuracy):.3f}"
    return f"loss {float(line['loss']):.4f}{more}"
