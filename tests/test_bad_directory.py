"""A run directory or disk that a run cannot go on with: one sentence, and what was saved stays."""

import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import hf_config, tiny_config, write_model, write_pairs
from refusals import LAYERS, ended
from running import (
    arguments,
    environment,
    finish,
    launch,
    metrics_of,
    scripted,
    slowly,
    start,
    untimed,
    wait_for,
)

from alignjax import lock

pytestmark = pytest.mark.slow  # minutes

STEPS = ("--checkpoint.every=1", "--checkpoint.keep=9", "--log.eval-every=9")


@pytest.fixture
def run(monkeypatch, capsys, root):
    """Runs in a directory; gives the exit code, and what was said to stderr."""
    return partial(ended, monkeypatch, capsys, root)


@pytest.fixture(scope="module")
def whole(root):
    """The directory of a run to its end, 6 steps, which every test shares and none changes."""
    with pytest.MonkeyPatch.context() as patch:
        assert ended(patch, None, root, root / "whole", *STEPS) == (0, "")
    return root / "whole"


@pytest.fixture
def trained(whole, tmp_path):
    """A copy of it, from which the last step is taken away."""
    directory = Path(shutil.copytree(whole, tmp_path / "trained"))
    shutil.rmtree(directory / "checkpoints/6")
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(directory)): file.read_bytes()
        for file in directory.rglob("*")
        if file.is_file() and file.name != ".lock"
    }


def refused(run, directory: Path, *overrides: str) -> str:
    """The sentence by which a run is refused that then left all in its directory as it was."""
    before = contents(directory)
    code, said = run(directory, *STEPS, *overrides)
    assert code == 2 and said.startswith("error: ") and said.count("\n") == 1, (code, said)
    assert contents(directory) == before
    return said.removeprefix("error: ").removesuffix("\n")


def test_other_settings(run, trained):
    said = refused(run, trained, "--beta=0.2", "--optimizer.b2=0.9", "--log.every=2")
    assert said == (
        f"{trained}: this run is at step 5 under other settings: optimizer.b2 was 0.95, "
        "is 0.9; beta was 0.1, is 0.2; take them back, or choose another --run_dir."
    )


def test_another_length_whose_learning_rates_would_differ(run, trained):
    assert refused(run, trained, "--batch.epochs=3") == (
        f"{trained}: this run is at step 5 under other settings: batch.epochs was 2, is 3; take "
        "them back, or choose another --run_dir (a run can be made longer where "
        "optimizer.schedule is constant and optimizer.warmup_ratio 0)."
    )


def test_other_data(run, trained, tmp_path):
    write_pairs(tmp_path / "other.jsonl", 12, 4, seed=1)
    assert refused(run, trained, f"--data.path={tmp_path / 'other.jsonl'}") == (
        f"{trained}: it belongs to a run on other data; choose another --run_dir, or delete it."
    )


def test_another_model(run, trained, tmp_path):
    write_model(tmp_path / "wide", tiny_config(layers=LAYERS, mlp_size=128, rope_theta=777.0))
    assert refused(run, trained, f"--model.path={tmp_path / 'wide'}") == (
        f"{trained}: this run is at step 5 of another model than {tmp_path / 'wide'}: mlp_size was "
        "64, is 128; rope_theta was 500000.0, is 777.0; name that model again, or choose another "
        "--run_dir."
    )


def test_a_checkpoint_of_another_model(run, trained, tmp_path):
    """The directory says nothing of it: its checkpoints were copied from elsewhere."""
    wide = tiny_config(layers=LAYERS, mlp_size=128)
    write_model(tmp_path / "wide", wide)
    (trained / "model/config.json").write_text(json.dumps(hf_config(wide)))
    settings = json.loads((trained / "config.json").read_text())
    settings["model"]["path"] = str(tmp_path / "wide")
    (trained / "config.json").write_text(json.dumps(settings))
    assert refused(run, trained, f"--model.path={tmp_path / 'wide'}") == (
        f"{trained}/checkpoints/5: the checkpoint holds model.blocks.down with shape (1, 32, 64), "
        "but this run needs it with shape (1, 32, 128): the run directory belongs to another model "
        "or optimizer; choose another --run_dir, or delete it."
    )


def test_a_baseline_of_other_weights_is_made_again(run, whole, root, tmp_path):
    """A start that saved nothing, then a new model under the old name."""
    model = Path(shutil.copytree(root / "model", tmp_path / "model"))
    options = (*STEPS, f"--model.path={model}", "--batch.max-steps=1")
    assert run(tmp_path / "run", *options) == (0, "")
    shutil.rmtree(tmp_path / "run/checkpoints")
    write_model(model, tiny_config(layers=LAYERS, rope_theta=777.0), seed=1)
    assert run(tmp_path / "run", *options) == (0, "")
    first = metrics_of(tmp_path / "run")[1]
    assert first["step"] == 1 and first["loss"] == pytest.approx(math.log(2), abs=2e-6)
    assert json.loads((tmp_path / "run/model/config.json").read_text())["rope_theta"] == 777


def test_a_run_can_be_ended_where_it_stands(run, tmp_path):
    constant = ("--optimizer.schedule=constant", "--optimizer.warmup-ratio=0")
    assert run(tmp_path, *STEPS, *constant, "--batch.max-steps=3") == (0, "")
    shutil.rmtree(tmp_path / "checkpoints/3")
    (tmp_path / "eval/step-3.npy").unlink()
    lines = metrics_of(tmp_path)
    assert run(tmp_path, *STEPS, *constant, "--batch.max-steps=2") == (0, "")
    ended = metrics_of(tmp_path)
    assert [line["step"] for line in ended] == [0, 1, 2] and ended[:2] == lines[:2]
    assert set(ended[2]) == set(lines[3]) and ended[2]["loss"] == lines[2]["loss"]


def test_a_second_run(run, trained):
    with lock.held(trained):
        said = refused(run, trained)
    assert re.fullmatch(
        rf"{trained}: another run is writing here \(process {os.getpid()} on "
        rf"{socket.gethostname()}, since [^)]*\); stop that one, or choose another --run_dir\.",
        said,
    )


def cut_short(checkpoint: Path) -> None:
    for file in (checkpoint / "state").rglob("d/*"):  # which array lies where is left to Orbax
        file.write_bytes(file.read_bytes()[:100])


def saved_otherwise(checkpoint: Path) -> None:
    """Its arrays can be read and have the right shapes, but are not those that were saved."""
    shutil.rmtree(checkpoint / "state")
    shutil.copytree(checkpoint.with_name("1") / "state", checkpoint / "state")


@pytest.mark.parametrize("damage", [cut_short, saved_otherwise])
def test_a_checkpoint_that_is_damaged(root, whole, trained, damage):
    """The one before is taken, and what was damaged is kept beside it."""
    damaged = trained / "checkpoints/5"
    damage(damaged)
    before = contents(damaged)
    for source in (trained, damaged):
        args = ["--src", source, "--dst", trained / "converted"]
        command = [sys.executable, "-m", "alignjax.convert", *map(str, args)]
        done = launch(command, environment(root / "cache"), check=False)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert done.stderr.startswith(f"error: {damaged}/state: ")
        assert not (trained / "converted").exists()
    command, env = arguments(root, trained, *STEPS), environment(root / "cache", 8)
    done = launch(command, env)
    assert f"\n{damaged}: the checkpoint cannot be read (" in done.stdout
    assert f"going on from step 4 of {trained}\n" in done.stdout and not done.stderr
    (aside,) = (trained / "checkpoints").glob("5.damaged-*")
    assert contents(aside) == before
    assert untimed(trained) == untimed(whole)
    exported = "export/model.safetensors"
    assert (trained / exported).read_bytes() == (whole / exported).read_bytes()


def test_all_checkpoints_are_damaged(root, trained):
    for step in range(1, 5):
        shutil.rmtree(trained / f"checkpoints/{step}")
    cut_short(trained / "checkpoints/5")
    before = contents(trained)
    done = launch(arguments(root, trained, *STEPS), environment(root / "cache", 8), check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {trained}/checkpoints/5: the checkpoint cannot be read")
    assert done.stderr.endswith("; delete it, and the run starts again.\n")
    assert contents(trained) == before


@pytest.mark.parametrize("content", [None, b"", b"cut", b"[]"])
@pytest.mark.parametrize(
    "name", ["baseline/about.json", "baseline/ref_train.npy", "baseline/logps_held_out.npy"]
)
def test_a_baseline_that_is_damaged_is_made_again(run, whole, trained, name, content):
    before, file = contents(trained), trained / name
    file.write_bytes(content) if content is not None else file.unlink()
    assert run(trained, *STEPS) == (0, "")
    assert file.read_bytes() == before[name]
    assert untimed(trained) == untimed(whole)


def test_a_baseline_of_other_weights_is_refused(run, trained, root, tmp_path):
    write_model(tmp_path / "model", tiny_config(layers=LAYERS), seed=1)
    other = (*STEPS, f"--model.path={tmp_path / 'model'}")
    assert run(tmp_path / "other", *other, "--batch.max-steps=1") == (0, "")
    shutil.rmtree(trained / "baseline")
    assert "of other weights than" in refused(run, trained, *other)
    shutil.copytree(tmp_path / "other/baseline", trained / "baseline")
    assert refused(run, trained).startswith(f"{trained}/baseline: it is of other weights than")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"step": ', '{"step": "1"}', "{"])
def test_a_line_of_metrics_that_is_damaged(run, trained, text):
    file = trained / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*lines[:2], f"{text}\n", *lines[2:]]))
    assert refused(run, trained).startswith(f"{file}:3: this is no line of metrics; ")


@pytest.mark.parametrize("name", ["eval/step-6.npy", "metrics.jsonl"])
def test_a_run_at_its_end_evaluates_again_what_is_damaged(run, whole, tmp_path, name):
    ended = Path(shutil.copytree(whole, tmp_path / "ended"))
    (ended / name).unlink() if name.endswith("l") else (ended / name).write_bytes(b"x")
    assert run(ended, *STEPS) == (0, "")
    assert (ended / "eval/step-6.npy").read_bytes() == (whole / "eval/step-6.npy").read_bytes()


def test_what_a_user_puts_into_a_run_stays(run, whole, tmp_path):
    """The export is written again by a finished run, and a start under other settings clears."""
    ended = Path(shutil.copytree(whole, tmp_path / "ended"))
    names = ("export/quantized.gguf", "eval/notes.txt", "samples/mine/x", "baseline/y")
    for name in names:
        (ended / name).parent.mkdir(parents=True, exist_ok=True)
        (ended / name).write_text("precious")
    assert run(ended, *STEPS) == (0, "")
    shutil.rmtree(ended / "checkpoints")
    assert run(ended, *STEPS, "--beta=0.5") == (0, "")
    assert [(ended / name).read_text() for name in names] == ["precious"] * len(names)


def test_a_finished_run_is_of_the_model_that_it_started_from(run, whole, tmp_path):
    ended = Path(shutil.copytree(whole, tmp_path / "ended"))
    write_model(tmp_path / "other", tiny_config(layers=LAYERS), seed=7)
    said = refused(run, ended, f"--model.path={tmp_path / 'other'}")
    assert said == (
        f"{ended}: this run is at step 6 of other weights than those of {tmp_path / 'other'}; name "
        "the model that it started from, or choose another --run_dir."
    )


def test_a_directory_that_is_no_run_is_left_as_it_is(run, tmp_path):
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "mine").write_text("precious")
    before = sorted(tmp_path.rglob("*"))
    code, said = run(tmp_path)
    assert code == 2 and said.startswith(f"error: {tmp_path}/export: ") and said.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_an_export_may_be_a_link_to_a_larger_disk(run, whole, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/export").symlink_to(tmp_path / "disk")
    assert run(tmp_path / "run", *STEPS) == (0, "")
    assert (tmp_path / "run/export").is_symlink() and (tmp_path / "disk/config.json").is_file()


def test_a_directory_that_is_moved_while_a_run_goes_on(root, tmp_path):
    command = slowly(arguments(root, tmp_path / "run", "--checkpoint.every=2", "--batch.epochs=20"))
    (running,) = start(command, environment(root / "cache"), 1, tmp_path / "logs")
    wait_for(running, "step 3/")
    (tmp_path / "run").rename(tmp_path / "moved")
    codes, (said,) = finish([running])
    assert codes == [2] and f"error: {tmp_path}/run: it was moved" in said
    # No more lies in its place than what a save that was under way may have written.
    assert {file.name for file in (tmp_path / "run").glob("*")} <= {"checkpoints"}


def test_ctrl_c_while_a_checkpoint_is_restored(root, trained, tmp_path):
    script = (
        "import os, signal, sys, threading; from alignjax import checkpoint, command, train; "
        "restore = checkpoint.restore; checkpoint.restore = lambda *a: (threading.Timer("
        "0.02, os.kill, (os.getpid(), signal.SIGINT)).start(), [restore(*a) for _ in range(999)]); "
        "sys.exit(command.run(train.main))"
    )
    command = scripted(arguments(root, trained, *STEPS), script)
    done = launch(command, environment(root / "cache"), check=False)
    assert done.returncode == 130 and done.stderr.startswith("stopped: ")
    assert done.stderr.count("\n") == 1


def test_another_reference(run, root, tmp_path):
    """Its log-probs count, it has its own width, and a resumed run has the same."""
    sizes = tiny_config(layers=LAYERS, mlp_size=128)
    for name, seed in (("wide", 1), ("wider", 2)):
        write_model(tmp_path / name, sizes, seed=seed)
    options = (*STEPS, f"--reference.path={tmp_path / 'wide'}")
    assert run(tmp_path / "run", *options) == (0, "")
    data_logps = np.load(tmp_path / "run/baseline/ref_train.npy")
    as_policy = ("--batch.max-steps=1", f"--model.path={tmp_path / 'wide'}", "--batch.epochs=2")
    assert run(tmp_path / "policy", *STEPS, *as_policy) == (0, "")
    expected = np.load(tmp_path / "policy/baseline/ref_train.npy")
    real = ~np.isnan(expected)
    np.testing.assert_allclose(data_logps[real], expected[real], rtol=1e-5)
    lines = metrics_of(tmp_path / "run")
    assert abs(lines[0]["eval_loss"] - math.log(2)) > 1e-3
    assert abs(lines[1]["loss"] - math.log(2)) > 1e-3
    again = Path(shutil.copytree(tmp_path / "run", tmp_path / "again"))
    shutil.rmtree(again / "checkpoints/6")
    (again / "baseline/ref_train.npy").unlink()
    write_model(tmp_path / "wide", sizes, seed=2)
    assert "wide: it no longer holds the weights" in refused(run, again, *options)
    other = f"--reference.path={tmp_path / 'wider'}"
    assert "reference.path was " in refused(run, again, *STEPS, other)
    write_model(tmp_path / "wide", sizes, seed=1)
    assert run(again, *options) == (0, "")
    assert untimed(again) == untimed(tmp_path / "run")


@pytest.mark.parametrize("kind", ["reward", "tokens"])
def test_a_reference_that_does_not_belong(run, tmp_path, kind):
    write_model(tmp_path / "other", tiny_config(layers=LAYERS, scored=kind == "reward"))
    if kind == "tokens":
        file = tmp_path / "other/tokenizer.json"
        file.write_text(file.read_text().replace("<|im_start|>", "<|start|>"))
    code, said = run(tmp_path / "run", f"--reference.path={tmp_path / 'other'}")
    assert code == 2 and said.count("\n") == 1
    assert f"{tmp_path / 'other'}: " in said and "name a" in said


@pytest.fixture
def disk(tmp_path):
    """A file system of 1.5 MB, and a function that gives it another size."""
    at = tmp_path / "disk"
    at.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o"]
    if subprocess.run(
        [*mount, "size=1500k", "tmpfs", at], check=False, capture_output=True
    ).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield at, lambda size: subprocess.run([*mount, f"remount,size={size}", at], check=True)
    subprocess.run(["umount", "--lazy", at], check=True)


# Another program may take the space that was free before a save began.
FILLED = (
    "import sys; from alignjax import checkpoint, command, train; "
    "checkpoint._fits = lambda *_: True; sys.exit(command.run(train.main))"
)


@pytest.mark.parametrize("when", ["before", "during"])
def test_a_disk_that_is_full_while_saving(root, whole, disk, when):
    at, resize = disk
    directory = at / "run"
    command, env = arguments(root, directory, *STEPS), environment(root / "cache", 8)
    first = command if when == "before" else scripted(command, FILLED)
    done = launch(first, env, check=False)
    told = re.fullmatch(
        rf"error: {directory}/checkpoints: the disk is full: a checkpoint needs 1\.3 MB, "
        r"\d\.\d MB are free, and the checkpoint of step (\d) is whole; free some space, and the "
        r"same command goes on from there\.\n",
        done.stderr,
    )
    assert done.returncode == 2 and told, done.stderr
    assert 1 <= int(told[1]) < 6
    resize("100m")
    assert f"going on from step {told[1]} of" in launch(command, env).stdout
    assert untimed(directory) == untimed(whole)
    exported = "export/model.safetensors"
    assert (directory / exported).read_bytes() == (whole / exported).read_bytes()


def test_a_disk_that_is_full_while_tokenizing(run, disk, root, tmp_path):
    at, _ = disk
    write_pairs(tmp_path / "many.jsonl", 20_000)
    code, said = run(
        tmp_path / "run", f"--data.path={tmp_path / 'many.jsonl'}", f"--data.cache-dir={at}"
    )
    assert code == 2 and re.fullmatch(
        rf"error: {at}/tokens/[0-9a-f-]+: no space is left on the disk; free some, and the same "
        r"command goes on\.\n",
        said,
    ), said
    assert not list((at / "tokens").iterdir())
