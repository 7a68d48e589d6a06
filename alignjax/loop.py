"""The training loop, the same for every stage."""

import errno
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from alignjax import checkpoint, divergence, evaluation, lock, metrics, optim, samples
from alignjax.data.batches import PackedBatch
from alignjax.files import load_array, save_array
from alignjax.models.decoder import Decoder
from alignjax.processes import is_first, on_first
from alignjax.progress import clock, phase, say
from alignjax.run import Baseline, Run
from alignjax.sharding import place_rows
from alignjax.step import State, finite, train_step
from alignjax.stopping import asked_to_stop


def fit(run: Run, state: State, first: int, base: Baseline, manager) -> tuple[State, int]:
    """Trains from step `first` to the plan's end, or to a signal; gives the last step taken.

    Logs, evaluates and saves on the way. Raises FloatingPointError, the last good state saved,
    where a loss or gradient is not finite.
    """
    total = len(run.steps)
    if first == total:
        _check_state(run, state, first, manager)
        _finish_here(run, state, first, base)
        return state, first
    try:
        with metrics.writing(run.directory, run.config, first if first else -1) as log:
            if not first and base.logps_held_out is not None:
                zero = evaluation.logged(
                    run.stage, base.logps_held_out, base.ref_held_out, run.held_out
                )
                log.write({"step": 0, "epoch": 0.0, **zero})
            return _steps(run, state, first, base, manager, log)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            checkpoint.wait(manager, state)  # a save that filled the disk says what it needs
        raise


def _finish_here(run: Run, state: State, last: int, base: Baseline) -> None:
    """Evaluates where a run was made to end at a step that was saved but not evaluated."""
    file = _scores_file(run, last)
    shape = (len(run.held_out), run.held_out.sides)
    if run.held_out and on_first(lambda: load_array(file, shape) is None):
        held_out = evaluate(run, state.result(), last, base)
        lines = metrics.read(run.directory / "metrics.jsonl") if is_first() else []
        known = next((line for line in lines if line["step"] == last), {"step": last})
        with metrics.writing(run.directory, run.config, last - 1) as log:
            log.write(known | held_out)


def _steps(
    run: Run, state: State, first: int, base: Baseline, manager, log: metrics.Log
) -> tuple[State, int]:
    config, total = run.config, len(run.steps)
    rate = optim.schedule(config.optimizer, total)
    useful = run.steps.useful_tokens()
    seen = np.cumsum(useful)
    items = [len(run.steps.plan.step_items(i)) for i in range(total)]
    epoch = np.cumsum(items) / len(run.epoch_items)
    batches = replace(run.steps, ref=base.ref_train).read(first)
    static = {"stage": run.stage, "compute": config.compute, "tx": run.optimizer()}
    static["ema_decay"] = config.optimizer.ema_decay
    batch = _next(batches, run.rows)
    with phase("compiling the training step"):
        step_fn = train_step.lower(state, batch, np.int32(1), np.int32(0), **static).compile()

    pending = None  # a step whose metrics the host has not read
    mark, marked, waited = time.monotonic(), first, 0.0

    def finish() -> dict:
        """Reads the pending step's metrics, shows them, and gives the line for the logs."""
        nonlocal mark, marked, waited
        done = pending[0] + 1
        line = _check(run, base, pending, state, manager)
        if not _is_due(run, done):
            update(done, _note(line))
            return {}
        now = time.monotonic()
        line = {"step": done, "epoch": round(float(epoch[done - 1]), 6)} | line
        line |= {
            "learning_rate": float(rate(done - 1)),
            "num_tokens": int(seen[done - 1]),
            "tokens_per_second": float(useful[marked:done].sum() / (now - mark)),
            "data_wait": waited / (now - mark),
        }
        mark, marked, waited = now, done, 0.0
        spent = now - started
        say(_line(line, total, clock(spent / (done - first) * (total - done))))
        update(done, _note(line))
        return line

    started = time.monotonic()
    with phase("training", total) as update, asked_to_stop() as asked:
        for index in range(first, total):
            micro = np.int32(run.steps.micro_batches(index))
            state, now = step_fn(state, batch, micro, np.int32(index))
            done = index + 1
            if done < total:
                before = time.monotonic()
                batch = _next(batches, run.rows)
                waited += time.monotonic() - before
            if pending:  # one step late: the device works on while the host reads
                log.write(finish())
            pending = (index, now)
            stopping = asked(done)
            evaluating = _evaluates(run, done)
            saving = stopping or done % config.checkpoint.every == 0 or done == total
            saving = saving or (evaluating and bool(config.checkpoint.best))
            if not (evaluating or saving):
                continue
            on_first(lambda: lock.check_place(run.directory))
            line, pending = finish(), None
            _check_state(run, state, done, manager)
            held_out = {}
            if evaluating:
                held_out = evaluate(run, state.result(), done, base)
                say("  held out: " + _numbers(held_out))
            log.write(line | held_out)
            if saving:
                log.flush()
                finite = held_out and all(map(math.isfinite, held_out.values()))
                measured = held_out if finite else None
                checkpoint.save(manager, state, done, config, measured, base.start())
            mark, marked, waited = time.monotonic(), done, 0.0
            if stopping:
                break
    return state, done


def _evaluates(run: Run, done: int) -> bool:
    every = run.config.log.eval_every
    return bool(run.held_out) and (done % every == 0 or done == len(run.steps))


def _is_due(run: Run, done: int) -> bool:
    """Whether a step has a line of its own: a matter of its number, not of when a run stopped."""
    every = run.config.log.every
    return done % every == 0 or done == len(run.steps) or _evaluates(run, done)


def evaluate(run: Run, model: Decoder, step: int, base: Baseline) -> dict[str, float]:
    """Metrics on the held-out rows; their log-probs are kept in the run directory.

    With samples.kl those of answers to their prompts are among them.
    """
    config = run.config
    with phase(f"evaluating at step {step}", len(run.held_out)) as update:
        logps = evaluation.score(
            model,
            run.held_out,
            config.batch.row_length,
            run.rows,
            config.compute,
            progress=update,
            scores=run.stage.scores,
        )
    if is_first():
        save_array(_scores_file(run, step), logps)
    found = evaluation.logged(run.stage, logps, base.ref_held_out, run.held_out)
    if config.samples.kl:
        found |= divergence.metrics(samples.sample(run, model, step, base.reference))
    return found


def _scores_file(run: Run, step: int) -> Path:
    return run.directory / "eval" / f"step-{step}.npy"


def _next(batches: Iterator[PackedBatch], rows: int) -> PackedBatch:
    return place_rows(next(batches), rows)


def _check(run: Run, base: Baseline, pending, state: State, manager) -> dict[str, float]:
    """Metrics of a step as numbers; stops the run where they are not finite."""
    index, values = pending
    values = {name: float(value) for name, value in values.items()}
    if math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"]):
        return values
    good = int(state.step)
    _check_state(run, state, good, manager)
    checkpoint.wait(manager, state)
    if manager.latest_step() != good:
        checkpoint.save(manager, state, good, run.config, None, base.start())
        checkpoint.wait(manager, state)
    ids = np.sort(run.steps.plan.step_items(index))
    config = run.config
    logps = evaluation.score(
        state.model,
        run.train,
        config.batch.row_length,
        run.rows,
        config.compute,
        ids,
        scores=run.stage.scores,
    )
    bad = ids[~np.isfinite(logps[ids]).all(1)]
    which = "of these are not finite" if len(bad) else "all look finite one by one; the step held"
    places = ", ".join(run.train.place(i) for i in (bad if len(bad) else ids))
    raise FloatingPointError(
        f"step {index + 1}: loss {values['loss']}, grad_norm {values['grad_norm']}; the "
        f"{run.unit()} ({which}): {places}. The weights after step {good} are saved in "
        f"{run.directory / 'checkpoints'}; mend the data or lower optimizer.learning_rate."
    )


def _check_state(run: Run, state: State, step: int, manager) -> None:
    """Stop the run where a weight or moment is not finite, naming the last good step."""
    if bool(finite(state)):
        return
    checkpoint.wait(manager, state)
    good = max((one for one in manager.all_steps() if one < step), default=None)
    saved = f"those of step {good} are, and are saved in {run.directory / 'checkpoints'}"
    raise FloatingPointError(
        f"the weights after step {step}, or their moments, are not finite; "
        f"{saved if good else 'no step is saved'}; lower optimizer.learning_rate."
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
