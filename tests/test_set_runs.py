"""Reward models trained and measured on sets of responses, as a user does it."""

import json
import random

import numpy as np
import pytest
from refusals import ended, refused, rows
from safetensors.numpy import load_file

from alignjax import command, evaluate
from alignjax import config as configs
from alignjax.inspection import contents as shown
from alignjax.run import planned

WORDS = "red green blue one two three four five sun moon sea sky".split()


def set_rows(count: int, held_out: int) -> list[dict]:
    rng = random.Random(0)

    def text() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, 6)))

    found = []
    for i in range(count + held_out):
        responses = list(dict.fromkeys(text() for _ in range(rng.randint(2, 5))))
        responses += [] if len(responses) > 1 else ["none"]
        scores = [len(response) + 0.5 for response in responses]
        scores[0] += scores[0] == scores[1]
        row = {"prompt": f"q{i} {text()}", "responses": responses, "scores": scores}
        found.append(row | {"split": "train" if i < count else "test", "source": "ab"[i % 2]})
    return found


@pytest.fixture(scope="module")
def data(root) -> str:
    return rows(root, *set_rows(24, 6), file="sets.jsonl")


STEPS = ("--batch.row-length=512", "--optimizer.schedule=constant", "--optimizer.warmup-ratio=0")


@pytest.fixture(scope="module")
def trained(root, data):
    """The directory of a run of 8 steps, which no test changes."""
    more = (f"--data.path={data}", *STEPS, "--batch.max-steps=8", "--log.eval-every=4")
    with pytest.MonkeyPatch.context() as patch:
        assert ended(patch, None, root, root / "sets", *more, stage="rm") == (0, "")
    return root / "sets"


def lines(directory) -> list[dict]:
    found = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    for line in found:
        line.pop("tokens_per_second", None), line.pop("data_wait", None)
    return found


def test_it_starts_at_ln_2_and_learns(trained):
    found = lines(trained)
    assert found[0]["eval_loss"] == pytest.approx(np.log(2))
    assert found[0]["eval_rewards/accuracies"] == 0.5
    assert found[8]["eval_loss"] < found[4]["eval_loss"] < np.log(2)


def test_stopped_and_gone_on_with_it_ends_with_the_same_bits(trained, root, data, monkeypatch):
    more = (f"--data.path={data}", *STEPS, "--log.eval-every=4")
    for steps in (3, 8):  # 3 steps end within an epoch of 6
        last = f"--batch.max-steps={steps}"
        assert ended(monkeypatch, None, root, root / "again", *more, last, stage="rm") == (0, "")
    whole, again = lines(trained), lines(root / "again")
    assert again[3].pop("eval_loss") and "eval_loss" not in whole[3]  # each end is evaluated
    again[3] = {name: v for name, v in again[3].items() if not name.startswith("eval_")}
    assert again == whole
    files = [load_file(run / "export/model.safetensors") for run in (trained, root / "again")]
    for name, array in files[0].items():
        assert array.tobytes() == files[1][name].tobytes(), name


def test_an_evaluation_counts_every_pair_of_the_sets(trained, root, data, monkeypatch, capsys):
    file, out = root / "rm_eval.py", root / "found"
    file.write_text("from alignjax.config import RMEval\nconfig = RMEval()\n")
    arguments = [f"--config={file}", f"--model.path={trained / 'export'}", f"--out={out}"]
    arguments += [f"--data.path={data}", "--data.max-length=128", "--batch.row-length=640"]
    monkeypatch.setenv("ALIGNJAX_CACHE", str(root / "cache"))
    monkeypatch.setattr("sys.argv", ["evaluate", *arguments, "--compute.dtype=float32"])
    assert command.run(evaluate.main) == 0
    found = [json.loads(line) for line in (out / "sets.jsonl").read_text().splitlines()]
    assert not (out / "pairs.jsonl").exists()
    held_out = [row for row in set_rows(24, 6) if row["split"] == "test"]
    credit, length = [], []
    for line, row in zip(found, held_out, strict=True):
        assert len(line["rewards"]) == len(line["tokens"]) == len(row["responses"])
        assert line["ranks"] == sorted(line["ranks"])
        for i, rank in enumerate(line["ranks"]):
            for j, other in enumerate(line["ranks"]):
                if rank < other:
                    credit.append(line["rewards"][i] > line["rewards"][j])
                    length.append(np.sign(line["tokens"][i] - line["tokens"][j]) / 2 + 0.5)
    measured = json.loads((out / "results.json").read_text())
    every = measured["all"]
    assert (every["pairs"], every["sets"], every["ties"]) == (len(credit), 6, 0)
    assert every["accuracy"] == pytest.approx(np.mean(credit))
    assert every["accuracy"] == pytest.approx(lines(trained)[-1]["eval_rewards/accuracies"])
    assert every["longer_wins"] == pytest.approx(np.mean(length))
    assert sum(part["pairs"] for part in measured["by_source"].values()) == len(credit)
    assert sum(part["sets"] for part in measured["by_source"].values()) == 6
    said = " ".join(capsys.readouterr().out.split())
    assert "these are the pairs of 6 sets, and an interval counts each set once" in said


def test_what_is_shown_of_sets(root, data, tmp_path):
    found = shown.contents(planned(config_of(root, data, tmp_path)), 99)
    names = {}
    for row in found.rows[:1]:
        for one in row.sequences:
            kind, _, rest = one.name.partition(", ")
            names.setdefault((kind, one.place), []).append(rest)
    by_line = {f"{data}, line {i}": row for i, row in enumerate(set_rows(24, 6), 1)}
    for (_, place), rest in names.items():
        scores = sorted(by_line[place]["scores"], reverse=True)
        ranks = [sorted(set(scores), reverse=True).index(score) + 1 for score in scores]
        count = len(scores)
        assert rest == [f"response {i} of {count} (rank {rank})" for i, rank in enumerate(ranks, 1)]
    counts = [len(row["responses"]) for row in set_rows(24, 0)]
    assert [list(one.counts) for one in found.histograms] == [["responses"]] * 2
    assert found.histograms[0].counts["responses"].sum() == sum(counts)
    said = "\n".join(found.lines)
    assert "rm: 24 sets to train on, 6 held out" in said and "a step: 4.0 sets" in said
    assert f"a set has 2 to 5 responses, {np.mean(counts):.1f} on average" in said


def config_of(root, data, tmp_path) -> configs.RM:
    from running import arguments

    more = (f"--data.path={data}", *STEPS, f"--data.cache-dir={tmp_path}", "--batch.epochs=1")
    return configs.parse("alignjax.inspect", arguments(root, "shown", *more, stage="rm")[3:])


def test_a_set_longer_than_a_row(root, data, monkeypatch, capsys, tmp_path):
    five = [f"{word} " * 12 for word in WORDS[:5]]
    row = {"prompt": "q", "responses": five, "scores": [1, 2, 3, 4, 5]}
    row["split"] = "train"
    file = rows(root, *set_rows(4, 0), row, file="long.jsonl")
    more = (f"--data.path={file}", "--batch.epochs=1")
    said = refused(monkeypatch, capsys, root, tmp_path / "run", *more, stage="rm")
    length = said.partition("responses have ")[2].partition(" tokens")[0]
    assert int(length) > 256 and said == (
        f"{file}, line 5: its 5 responses have {length} tokens, and a set lies in one row, of "
        f"batch.row_length=256: make that {length} or more, or set data.max_responses."
    )
    more += ("--data.max-responses=2", "--batch.max-steps=1")
    assert ended(monkeypatch, capsys, root, tmp_path / "run", *more, stage="rm") == (0, "")
