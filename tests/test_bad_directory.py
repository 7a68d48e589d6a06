"""A run directory or disk that a run cannot go on with: one sentence, and what was saved stays."""

import json
import math
import os
import re
import shutil
import socket
import subprocess
from functools import partial
from pathlib import Path

import pytest
from conftest import hf_config, tiny_config, write_model, write_pairs
from refusals import LAYERS, ended
from running import arguments, environment, launch, metrics_of, scripted, untimed

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


def test_a_checkpoint_that_is_damaged(root, trained):
    damaged = trained / "checkpoints/5"
    files = [file for file in (damaged / "state").rglob("*") if "/d/" in str(file)]
    largest = max(files, key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    before = contents(trained)
    done = launch(arguments(root, trained, *STEPS), environment(root / "cache", 8), check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {damaged}: the checkpoint cannot be read (")
    assert done.stderr.endswith("; delete it, and the run goes on from step 4.\n")
    assert contents(trained) == before


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
        rf"error: {at}/tokens/[0-9a-f]+: no space is left on the disk; free some, and the same "
        r"command goes on\.\n",
        said,
    ), said
    assert not list((at / "tokens").iterdir())
