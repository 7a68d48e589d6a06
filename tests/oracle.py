"""Random rows, and by tokens written down by hand what must become of them."""

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from conftest import write_tokenizer

from alignjax.config import Batch as BatchConfig
from alignjax.config import Data
from alignjax.data.batches import PackedBatch, PackedSteps, packed_steps
from alignjax.data.packing import plan_training
from alignjax.data.tokens import token_set
from alignjax.data.tokenset import TokenSet

ROWS = 40  # of a data set

# What a text's tokens are, by hand: a token for each byte and each special token

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
END = SPECIAL.index("<|im_end|>")  # ends a turn, and plain text


def byte_names() -> dict[int, str]:
    """The letter by which GPT-2's tokenizer calls each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + n) for n, b in enumerate(others)}


def write_byte_tokenizer(directory: Path) -> Path:
    """conftest's tokenizer, with a token for every byte: byte b is token 3 + b."""
    write_tokenizer(directory)
    file = directory / "tokenizer.json"
    stored = json.loads(file.read_text(encoding="utf-8"))
    vocab = {name: len(SPECIAL) + byte for byte, name in byte_names().items()}
    stored["model"]["vocab"] = {name: i for i, name in enumerate(SPECIAL)} | vocab
    file.write_text(json.dumps(stored), encoding="utf-8")
    return directory


def spell(text: str) -> list[tuple[int, int]]:
    """Tokens of a text, each with the number of characters through its end."""
    found, at = [], 0
    for part in re.split("(" + "|".join(map(re.escape, SPECIAL)) + ")", text):
        if part in SPECIAL:
            at += len(part)
            found.append((SPECIAL.index(part), at))
            continue
        for letter in part:
            at += 1
            found += [(len(SPECIAL) + byte, at) for byte in letter.encode()]
    return found


class Sequence(NamedTuple):
    ids: list[int]
    trained: list[int]  # places of the trained tokens; the first is never one


def chat_sequence(prompt: list[dict], answer: list[dict], train_on: str) -> Sequence:
    """ChatML: an answer's own bytes and <|im_end|> are trained."""
    turns = [*prompt, *answer]
    answers = [i for i in range(len(prompt), len(turns)) if turns[i]["role"] == "assistant"]
    ids, trained = [], []
    for i, turn in enumerate(turns):
        ids += [1] + [len(SPECIAL) + byte for byte in f"{turn['role']}\n".encode()]
        words = [token for token, _ in spell(turn["content"] + "<|im_end|>")]
        if i in (answers[-1:] if train_on == "last" else answers):
            trained += range(len(ids), len(ids) + len(words))
        ids += [*words, len(SPECIAL) + ord("\n")]
    return Sequence(ids, list(range(1, len(ids))) if train_on == "everything" else trained)


def plain_sequence(prompt: str, answer: str, train_on: str = "all") -> Sequence:
    """What ends behind the prompt is trained, through one end token."""
    spelt = spell(prompt + answer)
    if spelt[-1][0] != END:
        spelt.append((END, len(prompt + answer) + 1))
    begin = -1 if train_on == "everything" else len(prompt)
    trained = [i for i, (_, end) in enumerate(spelt) if end > begin and i > 0]
    return Sequence([token for token, _ in spelt], trained)


# Random rows


class Case(NamedTuple):
    """A row, with the sequences of its sides by hand."""

    row: dict
    sides: list[Sequence]


class Texts(NamedTuple):
    """A source of contents: joined from a pool of texts, some of them long."""

    rng: random.Random
    pool: list[str]

    def some(self) -> str:
        text = "".join(self.rng.choices(self.pool, k=self.rng.randint(1, 3)))
        text *= self.rng.choice([1, 1, 1, 2, 9])
        return text if text.strip() else text + "x"

    def conversation(self) -> list[dict]:
        """Perhaps a system text, then one to four questions; it ends with an answer."""
        turns = [{"role": "system", "content": self.rng.choice(self.pool)}]
        turns *= self.rng.random() < 0.3
        for _ in range(self.rng.choice([1, 1, 2, 4])):
            turns += [
                {"role": "user", "content": self.some()},
                {"role": "assistant", "content": self.some()},
            ]
            if self.rng.random() < 0.1:
                turns += [
                    {"role": "tool", "content": self.rng.choice(self.pool)},
                    {"role": "assistant", "content": self.some()},
                ]
        return turns


def sft_case(texts: Texts, strings: str, train_on: str) -> Case:
    kind = texts.rng.choice(["messages", "lists", "strings", "text"])
    if kind == "text":
        row = {"text": texts.some()}
        return Case(row, [plain_sequence("", row["text"], train_on)])
    turns = texts.conversation()
    if kind == "messages":
        turns += [{"role": "user", "content": texts.some()}] * (texts.rng.random() < 0.2)
        return Case({"messages": turns}, [chat_sequence([], turns, train_on)])
    if kind == "lists":
        cut = texts.rng.choice([i for i, t in enumerate(turns) if t["role"] == "assistant"])
        row = {"prompt": turns[:cut], "completion": turns[cut:]}
        return Case(row, [chat_sequence(turns[:cut], turns[cut:], train_on)])
    row = {"prompt": texts.some(), "completion": texts.some()}
    return Case(row, [from_strings(row["prompt"], row["completion"], strings, train_on)])


def from_strings(prompt: str, answer: str, strings: str, train_on: str) -> Sequence:
    if strings == "plain":
        return plain_sequence(prompt, answer, train_on)
    question = {"role": "user", "content": prompt}
    return chat_sequence([question], [{"role": "assistant", "content": answer}], train_on)


def pair_case(texts: Texts, strings: str, train_on: str) -> Case:
    kind = texts.rng.choice(["strings", "lists", "whole"])
    if kind == "strings":
        row = {"prompt": texts.some(), "chosen": texts.some(), "rejected": texts.some()}
        answers = (row["chosen"], row["rejected"])
        return Case(row, [from_strings(row["prompt"], a, strings, train_on) for a in answers])
    prompt = texts.conversation()[:-1]
    more = texts.conversation()
    more = [{"role": "assistant", "content": texts.some()}, *more[more[0]["role"] == "system" :]]
    chosen = texts.rng.choice([more[:1], more])
    rejected = [{"role": "assistant", "content": texts.some()}, *chosen[1:]]
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    if kind == "whole":
        row = {"chosen": [*prompt, *chosen], "rejected": [*prompt, *rejected]}
    return Case(row, [chat_sequence(prompt, answer, train_on) for answer in (chosen, rejected)])


# What must become of them


def expected_items(case: Case, data: Data) -> list[list[Sequence]]:
    """The items of a row: one, none, or the pieces of a long conversation."""
    limit, sides = data.max_length, case.sides
    if not any(side.trained for side in sides):
        return []  # a text of one token, behind which no other is to be told
    if len(sides) == 2 and sides[0].ids == sides[1].ids:
        return []
    if all(len(side.ids) <= limit for side in sides):
        return [sides]
    if len(sides) == 2 or data.overlong == "drop":
        return []
    ids, trained = sides[0]
    if data.overlong == "truncate":
        within = [place for place in trained if place < limit]
        return [[Sequence(ids[:limit], within)]] if within else []
    # Piece n begins at n (limit - 1), with a token that is the one before's last.
    pieces: dict[int, list[int]] = {}
    for place in trained:
        number = (place - 1) // (limit - 1)
        pieces.setdefault(number, []).append(place - number * (limit - 1))
    return [
        [Sequence(ids[n * (limit - 1) :][:limit], places)] for n, places in sorted(pieces.items())
    ]


def check_row(row: PackedBatch, items: list[list[Sequence]]) -> list[int]:
    """Compares a packed row with the items it says it has; returns their numbers."""
    found, targets, at, segment = [], [], 0, 0
    for number in row.items[row.items > 0].tolist():
        found.append(number - 1)
        for ids, trained in items[number - 1]:
            here = slice(at, at + len(ids))
            segment += 1
            assert row.tokens[here].tolist() == ids
            assert row.positions[here].tolist() == list(range(len(ids)))
            # A token sees what has its segment: all of its own sequence, and nothing else.
            assert np.flatnonzero(row.segments == segment).tolist() == list(range(at, here.stop))
            targets += [at + place for place in trained]
            at = here.stop
    assert sorted(row.targets[row.targets > 0].tolist()) == targets
    assert not row.segments[at:].any()
    assert len(row.tokens) >= at
    return found


def check_steps(steps: PackedSteps, items: list[list[Sequence]], epochs: int) -> None:
    """Every item is read back once an epoch, whole, and with it every trained token."""
    seen: Counter[int] = Counter()
    targets = 0
    for step in range(len(steps)):
        batch = steps[step]
        targets += int(np.count_nonzero(batch.targets))
        for micro in range(batch.tokens.shape[0]):
            for row in range(batch.tokens.shape[1]):
                seen.update(check_row(PackedBatch(*(array[micro, row] for array in batch)), items))
    assert seen == dict.fromkeys(range(len(items)), epochs)
    assert targets == epochs * sum(len(side.trained) for item in items for side in item)


def run(stage: str, drawn: dict, directory: Path, tokenizer, tokenizer_dir: Path):
    """Writes the rows, makes batches of them, and returns those with the items by hand."""
    rng = random.Random(drawn["seed"])
    texts = Texts(rng, drawn["pool"])
    make = pair_case if stage == "dpo" else sft_case
    cases = [make(texts, drawn["strings"], drawn["train_on"]) for _ in range(ROWS)]
    for case in cases:
        case.row.update({"source": rng.choice("ab")} if rng.random() < 0.5 else {})
        case.row.update({"margin": rng.randint(-4, 4) / 4} if rng.random() < 0.5 else {})
    names = []
    for number in range(drawn["files"]):
        own = cases[number * ROWS // drawn["files"] : (number + 1) * ROWS // drawn["files"]]
        names.append(directory / f"{number}.jsonl")
        names[-1].write_text("".join(json.dumps(case.row) + "\n" for case in own))
    data = Data(
        path=",".join(map(str, names)),
        on_bad_row="skip",
        max_length=drawn["max_length"] * (3 if stage == "dpo" else 1),  # long pairs are dropped
        **{key: drawn[key] for key in ("strings", "train_on", "overlong")},
    )
    found = token_set(data, stage, False, tokenizer, tokenizer_dir, directory)
    of_rows = [expected_items(case, data) for case in cases]
    check_rows(found, cases, of_rows)
    items = [item for own in of_rows for item in own]
    if not items:
        return None, items
    field = {"items": "pairs" if stage == "dpo" else "sequences", "rows": "rows"}[drawn["mode"]]
    config = BatchConfig(
        **{field: drawn["per_step"]},
        row_length=found.sides * data.max_length + drawn["room"],
        epochs=drawn["epochs"],
    )
    plan = plan_training(found.lengths(), config, drawn["seed"])
    return packed_steps(found, plan, drawn["rows"]), items


def check_rows(found: TokenSet, cases: list[Case], of_rows: list[list]) -> None:
    """What items carry is their rows', and the counts add up."""
    of_items = [case.row for case, items in zip(cases, of_rows, strict=True) for _ in items]
    assert [found.sources[i] for i in found.source] == [row.get("source", "") for row in of_items]
    assert found.margin.tolist() == [row.get("margin", 0.0) for row in of_items]
    places = [found.place(item).rpartition(", line ") for item in range(len(found))]
    for row, (file, _, line) in zip(of_items, places, strict=True):
        assert json.loads(Path(file).read_text().split("\n")[int(line) - 1]) == row
    counts = dict(found.counts)
    assert counts.pop("read") == ROWS
    assert counts.pop("kept") == sum(bool(items) for items in of_rows)
    gone = [number for why, number in counts.items() if why.endswith(("dropped", "skipped"))]
    assert sum(gone) == sum(not items for items in of_rows)
