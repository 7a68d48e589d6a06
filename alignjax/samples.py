"""Answers to held-out prompts, before and after training."""

import json
from pathlib import Path

import numpy as np

from alignjax.data.chat import render
from alignjax.data.columns import Side
from alignjax.data.tokens import examples
from alignjax.files import write_whole
from alignjax.generation.native import generate
from alignjax.models.decoder import Decoder
from alignjax.processes import is_first, on_first
from alignjax.progress import phase
from alignjax.rules import RULES, follows
from alignjax.run import Run


def stored(run: Run, step: int) -> list[dict] | None:
    """The answers that an earlier start of this run kept, [] where none are asked for, or None."""
    if not run.config.samples.prompts:
        return []
    file = _file(run, step)
    return on_first(lambda: json.loads(file.read_text("utf-8")) if file.is_file() else None)


def sample(run: Run, model: Decoder, step: int) -> list[dict]:
    """Answers `samples.prompts` held-out prompts; kept in the run directory.

    Each is {prompt, answer} and, where the row names a rule, whether the answer follows it.
    """
    wanted = run.config.samples
    if not wanted.prompts:
        return []
    kept = {run.held_out.place(i) for i in range(len(run.held_out))} if run.held_out else set()
    found = [
        (example, prompt)
        for example in examples(run.config.data, run.stage.name, held_out=True)
        if str(example.place) in kept and (prompt := _prompt(example.sides[0]))
    ]
    if not found:
        return []
    count = min(wanted.prompts, len(found))
    chosen = np.sort(np.random.default_rng(run.config.seed).permutation(len(found))[:count])
    found = [found[i] for i in chosen]
    prompts = [render(run.tokenizer, prompt, generate=True) for _, prompt in found]
    with phase(f"answers at step {step}", len(prompts)) as update:
        ids = generate(
            model,
            [run.tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts],
            run.eos_ids(),
            wanted.max_tokens,
            wanted.temperature,
            run.config.seed,
            wanted.batch,
            run.config.compute,
            update,
        )
    result = []
    for (example, prompt), answer in zip(found, ids, strict=True):
        text = run.tokenizer.decode(answer, skip_special_tokens=True)
        line = {"prompt": prompt[-1]["content"], "answer": text}
        row = example.row
        if row.get("rule") in RULES and isinstance(row.get("rule_value"), str):
            line |= {"rule": row["rule"], "follows": follows(row["rule"], row["rule_value"], text)}
        result.append(line)
    if is_first():
        write_whole(_file(run, step), json.dumps(result, indent=1, ensure_ascii=False))
    return result


def _file(run: Run, step: int) -> Path:
    return run.directory / "samples" / f"step-{step}.json"


def _prompt(side: Side) -> list[dict]:
    """The messages before a conversation's first trained answer; none for plain text."""
    if isinstance(side.answer, str):
        return []
    first = next(i for i, message in enumerate(side.answer) if message["role"] == "assistant")
    return [*side.prompt, *side.answer[:first]]
