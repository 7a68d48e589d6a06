"""Answers to held-out prompts, before and after training, and how far they show it has gone."""

import json
from pathlib import Path
from typing import TypedDict

import numpy as np

from alignjax import divergence
from alignjax.data.chat import render
from alignjax.data.columns import Side
from alignjax.data.rows import Example
from alignjax.data.tokens import examples
from alignjax.errors import UserError
from alignjax.files import read_json, write_whole
from alignjax.generation.native import generate
from alignjax.models.decoder import Decoder
from alignjax.processes import is_first, on_first
from alignjax.progress import phase, say
from alignjax.rules import follows, is_rule
from alignjax.run import Run


class _Answer(TypedDict):
    prompt: str
    answer: str
    follows: bool
    log_ratio: float
    tokens: int


class _Prompt(TypedDict):
    """A held-out prompt to answer, as the run directory keeps it."""

    prompt: str  # its last message
    ids: list[int]  # of all of it, with the answer's header
    rule: list[str]  # name and value of what an answer has to follow, or nothing


def stored(run: Run, step: int) -> list[dict] | None:
    """The answers that an earlier start of this run kept, [] where none are asked for, or None.

    Those that are damaged are made again.
    """
    if not run.config.samples.prompts:
        return []

    def read() -> list[dict] | None:
        try:
            found = read_json(_file(run, step), list[_Answer])
        except UserError:
            return None
        return found if all({"prompt", "answer"} <= one.keys() for one in found) else None

    return on_first(read)


def sample(run: Run, model: Decoder, step: int, weights: str) -> list[dict]:
    """Answers `samples.prompts` held-out prompts; kept in the run directory.

    Each is {prompt, answer} and, where the row names a rule, whether the answer follows it. With
    samples.kl it also has its log-ratio to the reference, in nats, and its tokens, but for step 0,
    where they are equal. `weights` is the fingerprint of the reference.
    """
    wanted = run.config.samples
    if not wanted.prompts:
        return []
    found = on_first(lambda: _prompts(run))
    if not found:
        if wanted.kl:
            say("samples.kl: no held-out row has a conversation to answer, so none is measured")
        return []
    encoded = [prompt["ids"] for prompt in found]
    ends = run.eos_ids()
    with phase(f"answers at step {step}", len(found)) as update:
        ids = generate(
            model,
            encoded,
            ends,
            wanted.max_tokens,
            wanted.temperature,
            run.config.seed,
            wanted.batch,
            run.config.compute,
            update,
            keep_end=True,
        )
    result = []
    for prompt, answer in zip(found, ids, strict=True):
        shown = answer[:-1] if answer[-1] in ends else answer
        text = run.tokenizer.decode(shown, skip_special_tokens=True)
        line = {"prompt": prompt["prompt"], "answer": text}
        if prompt["rule"]:
            rule, value = prompt["rule"]
            line |= {"rule": rule, "follows": follows(rule, value, text)}
        result.append(line)
    if wanted.kl and step:
        ratios = divergence.from_reference(run, model, weights, encoded, ids)
        for line, ratio, answer in zip(result, ratios, ids, strict=True):
            line |= {"log_ratio": float(ratio), "tokens": len(answer)}
    if is_first():
        write_whole(_file(run, step), json.dumps(result, indent=1, ensure_ascii=False))
    return result


def _prompts(run: Run) -> list[_Prompt]:
    """As many held-out prompts as samples.prompts says, kept since the run's start.

    The data may be others by now, or gone.
    """
    file = run.directory / "samples" / "prompts.json"
    if file.is_file():
        return read_json(file, list[_Prompt])
    kept = {run.held_out.place(i) for i in range(len(run.held_out))} if run.held_out else set()
    found = [
        (example, prompt)
        for example in examples(run.config.data, run.stage.name, held_out=True)
        if str(example.place) in kept and (prompt := _prompt(example.sides[0]))
    ]
    count = min(run.config.samples.prompts, len(found))
    chosen = np.sort(np.random.default_rng(run.config.seed).permutation(len(found))[:count])
    prompts = [_rendered(run, *found[i]) for i in chosen]
    write_whole(file, json.dumps(prompts, indent=1, ensure_ascii=False))
    return prompts


def _rendered(run: Run, example: Example, turns: list[dict]) -> _Prompt:
    variables = example.sides[0].template_kwargs
    text = render(run.tokenizer, turns, True, str(example.place), variables)
    ids = run.tokenizer.encode(text, add_special_tokens=False)
    rule = [example.row.get("rule"), example.row.get("rule_value")]
    return {"prompt": turns[-1]["content"], "ids": ids, "rule": rule if is_rule(*rule) else []}


def _file(run: Run, step: int) -> Path:
    return run.directory / "samples" / f"step-{step}.json"


def _prompt(side: Side) -> list[dict]:
    """The messages before a conversation's first trained answer; none for plain text."""
    if isinstance(side.answer, str):
        return []
    first = next(i for i, message in enumerate(side.answer) if message["role"] == "assistant")
    return [*side.prompt, *side.answer[:first]]
