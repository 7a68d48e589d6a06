"""Measuring a reward model as a user does: rewards, accuracies of subsets, and refusals."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import SHARED_DATA, mesh, tiny_config, write_model
from refusals import rows
from running import environment, launch_several
from safetensors.numpy import save_file

from alignjax import command, evaluate
from alignjax.config import Compute
from alignjax.data.chat import load_tokenizer
from alignjax.models.decoder import hidden_states
from alignjax.sharding import place
from alignjax.weights.loading import load
from alignjax.weights.safetensors import open_directory

TALK = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hi"},
    {"role": "user", "content": "why?"},
]
PAIRS = [
    {"prompt": "one", "chosen": "red moon", "rejected": "sun", "source": "people"},
    {"prompt": "two", "chosen": "sea", "rejected": "a green sky", "source": "people"},
    {"prompt": "three", "chosen": "four", "rejected": "five", "source": "model"},
    {"prompt": TALK, "chosen": "so it is", "rejected": "no", "source": "model"},
    {"prompt": TALK, "chosen": "yes it is", "rejected": "because it is so"},
    {"prompt": "six", "chosen": "seven eight nine", "rejected": "ten", "source": "people"},
]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A directory with a random reward model, a language model, and pairs of uneven lengths."""
    home = tmp_path_factory.mktemp("home")
    write_model(home / "reward", tiny_config(layers=1, scored=True), seed=3)
    write_model(home / "words", tiny_config(layers=1))
    rows(home, *PAIRS)
    (home / "rm_eval.py").write_text(
        "from alignjax.config import RMEval\nconfig = RMEval(name='tiny')\n"
    )
    return home


def arguments(home: Path) -> list[str]:
    """An evaluation of the reward model on all pairs, in float32."""
    return [
        *(f"--config={home / 'rm_eval.py'}", f"--model.path={home / 'reward'}"),
        *(f"--data.eval-path={home / 'rows.jsonl'}", "--data.max-length=128"),
        *("--batch.row-length=256", "--compute.dtype=float32"),
    ]


@pytest.fixture
def ended(monkeypatch, capsys, home):
    """Runs an evaluation of the pairs; gives its exit code, and what it said to each stream."""

    def run(*overrides: str) -> tuple[int, str, str]:
        monkeypatch.delenv("ALIGNJAX_TRACEBACK", raising=False)
        monkeypatch.setenv("ALIGNJAX_CACHE", str(home / "cache"))
        monkeypatch.setattr("sys.argv", ["evaluate", *arguments(home), *overrides])
        capsys.readouterr()
        return command.run(evaluate.main), *capsys.readouterr()

    return run


def read(directory: Path) -> tuple[dict, list[dict]]:
    lines = (directory / "pairs.jsonl").read_text().splitlines()
    return json.loads((directory / "results.json").read_text()), [json.loads(one) for one in lines]


@pytest.fixture(scope="module")
def rewards_alone(home) -> np.ndarray:
    """Rewards of each side in a row of its own, on one device; [pairs, 2]."""
    mesh()
    model = load(open_directory(home / "reward"))
    tokenizer = load_tokenizer(home / "reward")
    head = np.asarray(model.score)[0]
    hidden = jax.jit(lambda *row: hidden_states(model, *row, Compute(dtype="float32")))

    def reward(pair: dict, side: str) -> float:
        asked = pair["prompt"]
        turns = [{"role": "user", "content": asked}] if isinstance(asked, str) else list(asked)
        turns.append({"role": "assistant", "content": pair[side]})
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        ids = tokenizer.encode(text, add_special_tokens=False)
        tokens = np.array([ids + [0] * (128 - len(ids))], np.int32)
        where = np.arange(128, dtype=np.int32)[None]
        own = place((tokens, where, (where < len(ids)).astype(np.int32)), "batch", None)
        return float(np.asarray(hidden(*own))[0, len(ids) - 1] @ head)

    return np.array([[reward(pair, side) for side in ("chosen", "rejected")] for pair in PAIRS])


def test_rewards_are_those_of_each_answer_alone(ended, rewards_alone, tmp_path):
    code, _, said = ended(f"--out={tmp_path / 'found'}")
    assert (code, said) == (0, "")
    results, pairs = read(tmp_path / "found")
    got = np.array([[pair["chosen"], pair["rejected"]] for pair in pairs])
    expected = rewards_alone
    assert np.abs(expected).min() > 1e-3
    np.testing.assert_allclose(got, expected, atol=1e-5)
    margins = expected[:, 0] - expected[:, 1]
    whole = results["all"]
    assert (whole["pairs"], whole["ties"]) == (6, 0)
    assert whole["accuracy"] == pytest.approx((margins > 0).mean())
    assert 0 < whole["accuracy"] < 1
    assert whole["margin"] == pytest.approx(margins.mean(), abs=1e-5)
    for side, name in enumerate(("chosen", "rejected")):
        own = expected[:, side]
        spread = {"min": own.min(), "mean": own.mean(), "max": own.max()}
        assert results["rewards"][name] == pytest.approx(spread, abs=1e-5)
    counted = [one["pairs"] for one in results["calibration"]["bins"]]
    assert sum(counted) == 6
    for name, own in (("people", [0, 1, 5]), ("model", [2, 3]), ("", [4])):
        part = results["by_source"][name]
        assert part["pairs"] == len(own)
        assert part["accuracy"] == pytest.approx((margins[own] > 0).mean())
        assert part["margin"] == pytest.approx(margins[own].mean(), abs=1e-5)
    for name, own in (("1", [0, 1, 2, 5]), ("2", [3, 4])):
        assert results["by_user_turns"][name]["margin"] == pytest.approx(
            margins[own].mean(), abs=1e-5
        )


def test_the_longer_answer_wins_by_hand(ended, home, tmp_path):
    """A letter is a token, and each answer ends with one token more."""
    ended(f"--out={tmp_path}")
    results, pairs = read(tmp_path)
    lengths = [(pair["chosen_tokens"], pair["rejected_tokens"]) for pair in pairs]
    assert lengths == [(9, 4), (4, 12), (5, 5), (9, 3), (10, 17), (17, 4)]
    assert results["all"]["longer_wins"] == pytest.approx(3.5 / 6)
    shares = {name: part["longer_wins"] for name, part in results["by_source"].items()}
    assert shares == pytest.approx({"": 0, "model": 0.75, "people": 2 / 3})
    assert results["by_user_turns"]["2"]["longer_wins"] == 0.5
    assert [pair["user_turns"] for pair in pairs] == [1, 1, 1, 2, 2, 1]
    assert pairs[3]["place"] == f"{home / 'rows.jsonl'}, line 4"
    assert results["config"]["model"]["path"] == str(home / "reward")


def test_what_is_shown(ended):
    code, shown, _ = ended()
    found = [" ".join(line.replace("│", " ").split()) for line in shown.splitlines()]
    titles = ("all 6", "no source 1", "source model 2", "source people 3")
    for title in (*titles, "prompt of 1 user turn 4", "prompt of 2 user turns 2"):
        assert sum(line.startswith(f"{title} ") for line in found) == 1, title
    (whole,) = (line for line in found if line.startswith("all 6"))
    assert "58.3% [24.1%, 86.1%]" in whole
    assert sum("calibration: expected error" in line for line in found) == 1


def test_another_mesh_changes_no_reward(ended, rewards_alone, tmp_path):
    more = ("--mesh.replica=2", "--mesh.fsdp=2", "--mesh.tensor=2", "--batch.rows-per-device=1")
    assert ended(*more, f"--out={tmp_path}")[0] == 0
    got = [[pair["chosen"], pair["rejected"]] for pair in read(tmp_path)[1]]
    np.testing.assert_allclose(got, rewards_alone, atol=1e-5)


def test_two_processes_write_what_one_does(home, rewards_alone, tmp_path):
    line = [sys.executable, "-m", "alignjax.evaluate", *arguments(home), f"--out={tmp_path / 'a'}"]
    shown = launch_several(line, environment(home / "cache"), 2, tmp_path / "logs")
    assert shown.count("calibration: expected error") == 1
    got = [[pair["chosen"], pair["rejected"]] for pair in read(tmp_path / "a")[1]]
    np.testing.assert_allclose(got, rewards_alone, atol=1e-5)
    assert "calibration" not in (tmp_path / "logs/1.log").read_text()


def test_the_rows_are_those_that_training_holds_out(ended, tmp_path):
    own = ("test", "train", "test", "train", "train", "train")
    split = [pair | {"split": name} for pair, name in zip(PAIRS, own, strict=True)]
    path = rows(tmp_path, *split)
    assert ended("--data.eval-path=", f"--data.path={path}", f"--out={tmp_path}")[0] == 0
    results, pairs = read(tmp_path)
    assert [pair["place"] for pair in pairs] == [f"{path}, line 1", f"{path}, line 3"]
    assert results["rows"] == {"read": 2, "in other splits": 4, "kept": 2}


def test_a_second_evaluation_replaces_the_first_and_nothing_else(ended, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for _ in range(2):
        assert ended(f"--out={tmp_path}")[0] == 0
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["notes.txt", "pairs.jsonl", "results.json"]
    for name in names[1:]:
        (tmp_path / name).write_text('{"prompt": "mine"}\n')
        code, _, said = ended(f"--out={tmp_path}")
        assert code == 2 and said.startswith(f"error: {tmp_path / name}: ")
        assert (tmp_path / name).read_text() == '{"prompt": "mine"}\n'
        (tmp_path / name).unlink()


def test_refusals(ended, home, tmp_path):
    file = home / "rows.jsonl"

    def sentence(*overrides: str) -> str:
        code, _, said = ended(*overrides, f"--out={tmp_path / 'out'}")
        assert code == 2 and said.startswith("error: ") and said.count("\n") == 1
        assert not (tmp_path / "out").exists()
        return said.removeprefix("error: ").removesuffix("\n")

    assert sentence(f"--model.path={home / 'words'}") == (
        f"{home / 'words'}: this is a language model, as SFT and DPO make them, which has no score "
        "head; name a reward model, such as the export of an rm run."
    )
    assert sentence("--data.eval-path=nowhere", "--model.path=org/none") == (
        "data.eval_path=nowhere: there is no such file or directory."
    )
    assert sentence("--data.max-length=4") == (
        f"{file}: no row is left to evaluate on; the table above says where they went."
    )
    assert sentence("--data.eval-path=", f"--data.path={file}") == (
        f"{file}: no row of it is held out; set --data.eval_split or --data.eval_fraction as in "
        "training, or name it as --data.eval_path to take all of its rows."
    )
    assert sentence("--batch.pairs=4") == (
        "--batch.pairs: there is no such key; there are batch.row_length, batch.rows_per_device."
    )
    assert sentence("--config=dpo_smollm2").endswith(
        "dpo_smollm2: its config is for python -m alignjax.train; alignjax.evaluate takes "
        "RMEval(...)."
    )


def test_a_reward_that_is_not_finite_is_refused_with_its_place(ended, home, tmp_path):
    tensors = write_model(tmp_path / "huge", tiny_config(layers=1, scored=True))
    tensors["score.weight"] = np.full_like(tensors["score.weight"], 3e38)
    save_file(tensors, tmp_path / "huge" / "model.safetensors", metadata={"format": "pt"})
    code, _, said = ended(f"--model.path={tmp_path / 'huge'}", f"--out={tmp_path / 'out'}")
    place = f"error: {home / 'rows.jsonl'}, line "
    assert code == 2 and said.startswith(place) and said.count("\n") == 1
    assert "a reward of this pair is not finite ([" in said
    assert not list((tmp_path / "out").iterdir())


def test_a_pair_whose_sides_become_the_same_tokens_is_a_tie(ended, home, tmp_path):
    template = (home / "reward/chat_template.jinja").read_text()
    (tmp_path / "t.jinja").write_text(template.replace("['content']", "['content'] | trim"))
    same = {"prompt": TALK, "chosen": "no", "rejected": " no", "source": "model"}
    file = rows(home, *PAIRS[:3], same, same, file="ties.jsonl")
    more = (f"--model.chat-template={tmp_path / 't.jinja'}", f"--out={tmp_path / 'ties'}")
    code, shown, _ = ended(f"--data.eval-path={file}", *more)
    assert code == 0 and "which count as ties: 2" in shown
    results, pairs = read(tmp_path / "ties")
    assert results["same_tokens"] == 2 and results["rows"]["kept"] == 5
    assert [pair["chosen"] == pair["rejected"] for pair in pairs] == [False] * 3 + [True] * 2
    right = sum(pair["chosen"] > pair["rejected"] for pair in pairs)
    assert results["all"]["accuracy"] == (right + 1) / 5


def test_a_file_in_the_place_of_the_directory_is_refused_before_scoring(ended, home):
    code, shown, said = ended(f"--out={home / 'rows.jsonl'}")
    assert (code, said) == (
        2,
        f"error: {home / 'rows.jsonl'}: this is a file, where a directory is needed; name another "
        "place.\n",
    )
    assert "scoring" not in shown


def test_real_pairs(ended, tmp_path):
    """The baseline is right as often as characters say, of which the tokenizer knows ASCII's."""
    file = SHARED_DATA / "ultrafeedback_sample.jsonl"
    if not file.is_file():
        pytest.skip("the sample of UltraFeedback is not here")
    more = ("--data.eval-path=", f"--data.path={file}", "--data.max-length=512")
    code, _, said = ended(*more, "--batch.row-length=1024", f"--out={tmp_path}")
    assert (code, said) == (0, "")
    results, pairs = read(tmp_path)
    lines = file.read_text(encoding="utf-8").split("\n")
    ahead = []
    for pair in pairs:
        row = json.loads(lines[int(pair["place"].rpartition(" ")[2]) - 1])
        assert row["split"] == "test"
        sizes = [len(row[side].encode("ascii", "ignore")) for side in ("chosen", "rejected")]
        ahead.append(np.sign(sizes[0] - sizes[1]))
    assert len(ahead) > 10
    assert results["all"]["longer_wins"] == pytest.approx((np.mean(ahead) + 1) / 2)
