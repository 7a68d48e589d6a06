"""The command as a user runs it, on a tiny model: resumed, misused, diverging."""

import json
import re
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_config, write_model, write_pairs
from running import arguments, environment, launch, metrics_of, slowly, untimed
from safetensors.numpy import load_file

PAIRS, HELD_OUT, PER_STEP = 40, 12, 4
STEPS = 2 * PAIRS // PER_STEP


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A tiny model and pairs, and a whole run on them."""
    root = tmp_path_factory.mktemp("train")
    write_model(root / "model", tiny_config())
    write_pairs(root / "rows.jsonl", PAIRS, HELD_OUT)
    command = arguments(root, "whole", "--samples.prompts=4", "--samples.max-tokens=8")
    (root / "whole.log").write_text(launch(command, environment(root / "cache")).stdout)
    return root


def test_a_run_leaves_what_it_promises(prepared):
    run = prepared / "whole"
    lines = metrics_of(run)
    assert [line["step"] for line in lines] == list(range(STEPS + 1))
    assert lines[0]["eval_loss"] == pytest.approx(np.log(2), abs=2e-6)
    assert lines[1]["loss"] == pytest.approx(np.log(2), abs=2e-6)
    assert abs(lines[2]["loss"] - np.log(2)) > 1e-4
    names = "loss grad_norm learning_rate epoch num_tokens tokens_per_second data_wait".split()
    names += [f"rewards/{n}" for n in ("chosen", "rejected", "margins", "accuracies")]
    names += ["logps/chosen", "logps/rejected"]
    assert all(set(names) <= set(line) for line in lines[1:])
    assert [line["step"] for line in lines if "eval_rewards/accuracies" in line] == [0, 10, 20]
    assert lines[-1]["eval_rewards/margins"] > 0 and lines[-1]["eval_loss"] < np.log(2)
    assert lines[-1]["epoch"] == 2.0
    assert all(0 <= line["data_wait"] < 1 for line in lines[1:])
    last = lines[-1]
    assert last["rewards/margins"] == pytest.approx(
        last["rewards/chosen"] - last["rewards/rejected"], abs=1e-6
    )
    assert json.loads((run / "config.json").read_text())["beta"] == 0.1
    kept = sorted(p.name for p in (run / "checkpoints").iterdir() if p.name.isdigit())
    assert kept == ["18", "20"]
    for step in (0, STEPS):
        assert len(json.loads((run / f"samples/step-{step}.json").read_text())) == 4


def test_the_screen_says_what_is_trained_and_what_came_of_it(prepared):
    text = (prepared / "whole.log").read_text()
    assert "dpo: 40 pairs to train on, 12 held out" in text
    assert "a step: 4.0 pairs" in text and "20 steps, 2.00 epochs" in text and "fill" in text
    for phrase in ("loading weights", "compiling", "step 20/20", "ETA", "held-out preference"):
        assert phrase in text
    assert str(prepared / "whole" / "export") in text


def test_killed_and_started_again_ends_with_the_same_bits(prepared):
    command = arguments(prepared, "killed", "--samples.prompts=4", "--samples.max-tokens=8")
    env = environment(prepared / "cache")
    endless = slowly(command, until=prepared / "never")
    with subprocess.Popen(endless, env=env, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("step 8/"):
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    again = launch(command, env).stdout
    assert "going on from step" in again and "step 1/20" not in again
    whole, killed = prepared / "whole", prepared / "killed"
    assert untimed(killed) == untimed(whole)
    expected, got = (load_file(run / "export/model.safetensors") for run in (whole, killed))
    assert set(expected) == set(got)
    for name, array in expected.items():
        assert array.tobytes() == got[name].tobytes(), name


def test_a_finished_run_reports_again_and_trains_nothing(prepared):
    before = metrics_of(prepared / "whole")
    command = arguments(prepared, "whole", "--samples.prompts=4", "--samples.max-tokens=8")
    text = launch(command, environment(prepared / "cache")).stdout
    assert "held-out preference" in text and "compiling" not in text and "step 20/20" not in text
    assert metrics_of(prepared / "whole") == before


def test_eight_devices_train_as_one(prepared):
    command = arguments(prepared, "eight", "--mesh.tensor=2")
    launch(command, environment(prepared / "cache8", 8))
    for one, many in zip(untimed(prepared / "whole"), untimed(prepared / "eight"), strict=True):
        if one["step"] < 2:  # margins are rounding's alone, so their signs may differ
            one.pop("rewards/accuracies", None), many.pop("rewards/accuracies", None)
        assert one == pytest.approx(many, rel=2e-3, abs=2e-5)


@pytest.fixture(scope="module")
def conversations(prepared) -> tuple[Path, str]:
    """An SFT run on the chosen sides and two bad rows; its directory, and what it printed."""
    overrides = ("--data.train-on=last", "--checkpoint.best=eval_loss:max", "--checkpoint.keep=1")
    overrides += ("--log.eval-every=3", "--checkpoint.every=7", "--data.on-bad-row=skip")
    overrides += ("--samples.prompts=2", "--samples.max-tokens=4")
    rows = [json.loads(line) for line in (prepared / "rows.jsonl").read_text().splitlines()]
    with (prepared / "sft.jsonl").open("w") as out:
        for row in rows:
            asked = {"role": "user", "content": row["prompt"]}
            told = {"role": "assistant", "content": row["chosen"]}
            row = {"messages": [asked, told], "split": row["split"]}
            out.write(json.dumps(row) + "\n")
        out.write('{"messages": [], "split": "train"}\n{"messages"\n')
    more = (f"--data.path={prepared / 'sft.jsonl'}", *overrides)
    command = arguments(prepared, "sft-run", *more, stage="sft")
    return prepared / "sft-run", launch(command, environment(prepared / "cache")).stdout


def test_sft_lowers_the_held_out_loss_and_keeps_the_best(conversations):
    run, text = conversations
    lines = metrics_of(run)
    assert lines[-1]["eval_loss"] < lines[0]["eval_loss"]
    saved = {line["step"]: line["eval_loss"] for line in lines[1:] if "eval_loss" in line}
    highest = max(saved, key=saved.get)  # "best" by the end that the last step is not
    names = {p.name for p in (run / "checkpoints").iterdir() if p.name.isdigit()}
    assert names == {str(highest), str(STEPS)} and highest != STEPS
    assert "held-out loss" in text and text.count("before  ") == 2


def test_bad_rows_that_are_passed_over_are_counted_and_listed(prepared, conversations):
    run, text = conversations
    table = {}
    for line in text.splitlines():
        if line.startswith("│") and line.count("│") == 4:
            reason, training, held_out = (cell.strip() for cell in line.strip("│").split("│"))
            table[reason] = training, held_out
    assert table["read"] == (str(PAIRS + 2), str(HELD_OUT))
    assert table["in other splits"] == (str(HELD_OUT), str(PAIRS + 2))
    assert table["bad rows, skipped"] == ("2", "0")
    assert table["kept"] == (str(PAIRS), str(HELD_OUT))
    listing = run / "bad_rows/training.jsonl"
    assert f"bad rows of training are listed in {listing}" in text
    file, first = prepared / "sft.jsonl", PAIRS + HELD_OUT + 1
    assert [json.loads(line) for line in listing.read_text().splitlines()] == [
        {
            "place": f"{file}, line {first}",
            "problem": "`messages` has no assistant turn, so there is nothing to learn; add the "
            "answer, or remove the row.",
        },
        {
            "place": f"{file}, line {first + 1}",
            "problem": "this is not JSON (Expecting ':' delimiter at column 12).",
        },
    ]


def test_a_mistake_is_one_sentence(prepared):
    command = arguments(prepared, "refused", "--data.path=none.jsonl")
    done = launch(command, environment(prepared / "cache"), check=False)
    sentence = "error: data.path=none.jsonl: there is no such file or directory.\n"
    assert (done.returncode, done.stderr) == (2, sentence)


def test_weights_that_are_not_finite_stop_the_run_and_name_the_rows(prepared):
    """An overflowing learning rate: the last good state is saved, later steps change nothing."""
    overrides = ["--optimizer.learning-rate=1e6", "--optimizer.weight-decay=1e6"]
    overrides += ["--optimizer.warmup-ratio=0"]
    env = environment(prepared / "cache")
    done = launch(arguments(prepared, "diverged", *overrides), env, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    message = done.stderr.strip().splitlines()[-1]
    stopped = re.match(r"stopped: step (\d): loss .*nan", message)
    assert stopped
    assert f"{prepared / 'rows.jsonl'}, line " in message
    names = [p.name for p in (prepared / "diverged/checkpoints").iterdir() if p.name.isdigit()]
    assert names == [str(int(stopped[1]) - 1)]


def test_waiting_for_data_is_told_as_a_share_of_the_time(prepared):
    command = arguments(prepared, "waited", "--batch.max-steps=4", "--log.every=1")
    launch(slowly(command), environment(prepared / "cache"))
    lines = metrics_of(prepared / "waited")
    tokens = np.diff([line.get("num_tokens", 0) for line in lines])
    seconds = tokens / [line["tokens_per_second"] for line in lines[1:]]
    waited = seconds * [line["data_wait"] for line in lines[1:]]
    assert waited.sum() > 0.299  # a batch is fetched behind each step but the last
    assert (waited < seconds).all()
