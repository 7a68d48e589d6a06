"""Runs of several processes on one machine: they train as one, stop as one and fail as one."""

import json
import re
import signal
import subprocess
import sys

import pytest
from conftest import tiny_config, write_model, write_pairs
from running import (
    arguments,
    environment,
    finish,
    launch,
    launch_several,
    slowly,
    start,
    untimed,
    wait_for,
)
from safetensors.numpy import load_file

PAIRS, HELD_OUT = 40, 12
SAMPLED = ("--samples.prompts=4", "--samples.max-tokens=8")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A tiny model and pairs, and runs on them that one process did on 2 and 4 devices."""
    root = tmp_path_factory.mktemp("processes")
    write_model(root / "model", tiny_config())
    write_pairs(root / "rows.jsonl", PAIRS, HELD_OUT)
    for devices in (2, 4):
        command = arguments(root, f"one-{devices}", *SAMPLED)
        launch(command, environment(root / f"cache-one-{devices}", devices))
    return root


def close(one: dict, other: dict) -> None:
    one, other = dict(one), dict(other)
    if one["step"] < 2:  # margins are rounding's alone, so their signs may differ
        one.pop("rewards/accuracies", None), other.pop("rewards/accuracies", None)
    assert one == pytest.approx(other, rel=2e-3, abs=2e-5)
    for name in ("loss", "eval_loss"):
        assert one.get(name, 0) == pytest.approx(other.get(name, 0), abs=1e-5)


def same_weights(one, other) -> bool:
    one, other = (load_file(run / "export/model.safetensors") for run in (one, other))
    return {n: a.tobytes() for n, a in one.items()} == {n: a.tobytes() for n, a in other.items()}


@pytest.fixture(scope="module")
def two(prepared):
    """A run of two processes of one device each, and what each of them printed."""
    command = arguments(prepared, "two", *SAMPLED)
    launch_several(command, environment(prepared / "cache-two"), 2, prepared / "logs-two")
    return prepared / "two", [log.read_text() for log in sorted((prepared / "logs-two").iterdir())]


def check_as_one(prepared, run, devices: int) -> None:
    lines, expected = untimed(run), untimed(prepared / f"one-{devices}")
    assert len(lines) == len(expected) == 21
    for one, other in zip(expected, lines, strict=True):
        close(one, other)


def test_two_processes_train_as_one_and_the_first_speaks(prepared, two):
    run, (printed, silent) = two
    check_as_one(prepared, run, 2)
    assert "held-out preference accuracy" in printed and "on 2 cpu device(s)" in printed
    assert "step 1/20" not in silent and "held-out" not in silent


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "devices"), [(2, 2), (4, 1)])
def test_several_processes_share_the_weights_too(prepared, tmp_path, processes, devices):
    name = f"several-{processes}"
    command = arguments(prepared, name, *SAMPLED, f"--mesh.tensor={devices}")
    env = environment(tmp_path / "cache", devices)
    launch_several(command, env, processes, tmp_path / "logs")
    check_as_one(prepared, prepared / name, 4)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_to_one_process_stops_all_after_one_step(prepared, two, tmp_path, number):
    name = f"stopped-{number.name}"
    command = arguments(prepared, name, *SAMPLED)
    env = environment(tmp_path / "cache")
    started = start(slowly(command), env, 2, tmp_path / "logs")
    wait_for(started[0], "step 4/20")
    started[1].process.send_signal(number)
    codes, outputs = finish(started)
    assert codes == [143, 143], "\n".join(outputs)
    told = re.search(r"stopped by a signal after step (\d+) of 20, which is saved in", outputs[0])
    step = int(told[1])
    assert 4 <= step < 20 and (prepared / name / "checkpoints" / str(step)).is_dir()
    assert "to go on:\n  python -m alignjax.train --config=" in outputs[0]
    if number == signal.SIGINT:
        return
    again = launch_several(command, env, 2, tmp_path / "logs")
    assert f"going on from step {step} of" in again
    assert untimed(prepared / name) == untimed(two[0])
    assert same_weights(prepared / name, two[0])


def test_ctrl_c_stops_a_run_of_one_process_after_its_step(prepared, tmp_path):
    command = arguments(prepared, "alone", *SAMPLED)
    env = environment(tmp_path / "cache", 2)
    started = start(slowly(command), env, 1, tmp_path / "logs")
    wait_for(started[0], "step 4/20")
    started[0].process.send_signal(signal.SIGINT)
    codes, outputs = finish(started)
    assert codes == [143] and "stopped by a signal after step" in outputs[0]
    launch(command, env)
    assert untimed(prepared / "alone") == untimed(prepared / "one-2")
    assert same_weights(prepared / "alone", prepared / "one-2")


def test_a_mistake_ends_all_processes_with_one_sentence(prepared, tmp_path):
    command = arguments(prepared, "refused", "--data.path=nowhere.jsonl")
    codes, outputs = finish(start(command, environment(tmp_path), 2, tmp_path / "logs"), 60)
    assert codes == [2, 2]
    assert "nowhere.jsonl" in outputs[0].strip().splitlines()[-1]
    assert "error" not in outputs[1] and "Traceback" not in "".join(outputs)


def test_a_second_run_in_the_directory_is_refused_on_every_process(prepared, tmp_path):
    command = arguments(prepared, "held", "--batch.epochs=50")
    first = start(slowly(command), environment(tmp_path / "cache"), 1, tmp_path / "logs")
    wait_for(first[0], "step 2/")
    codes, outputs = finish(start(command, environment(tmp_path), 2, tmp_path / "more"), 60)
    first[0].process.kill()
    finish(first)
    assert codes == [2, 2] and f"process {first[0].process.pid} on" in outputs[0]


PLAIN = """
import jax, json, sys
from alignjax import processes
from alignjax.sharding import local_rows, use_mesh
processes.join({})
use_mesh()
me = jax.process_index()
found = {"rows": local_rows(8).tolist(), "turn": processes.in_turn(lambda: me)}
found["first"] = processes.on_first(lambda: ["a", me])
found["array"] = processes.from_first(jax.numpy.arange(3.0) + me).tolist()
for name, wrong in (("in_turn", 1), ("on_first", 0)):
    def work():
        if me == wrong:
            raise ValueError(f"process {me} says no")
        return 0
    try:
        getattr(processes, name)(work)
    except ValueError as error:
        found[name] = str(error)
print("found", json.dumps(found))
"""


def test_processes_agree_and_read_their_own_rows(tmp_path):
    command = [sys.executable, "-c", PLAIN]
    codes, outputs = finish(start(command, environment(tmp_path, 2), 2, tmp_path / "logs"), 60)
    assert codes == [0, 0], "\n".join(outputs)
    found = [json.loads(re.search("found (.*)", text)[1]) for text in outputs]
    assert [f.pop("rows") for f in found] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [f.pop("turn") for f in found] == [0, 1]
    assert (
        found[0]
        == found[1]
        == {
            "first": ["a", 0],
            "array": [0.0, 1.0, 2.0],
            "in_turn": "process 1 says no",
            "on_first": "process 0 says no",
        }
    )


ALONE = """
import sys
from alignjax import command, processes
from alignjax.errors import UserError

def main():
    processes.join({})
    import jax
    if jax.process_index() == int(sys.argv[1]):
        raise UserError("a mistake that only one process sees.")
    processes.on_first(lambda: 0) if int(sys.argv[1]) else jax.numpy.zeros(1)
    processes.in_turn(lambda: 0)
    return 0

sys.exit(command.run(main))
"""


@pytest.mark.parametrize("alone", [0, 1])
def test_a_process_that_fails_alone_says_so_and_ends_at_once(tmp_path, alone):
    command = [sys.executable, "-c", ALONE, str(alone)]
    started = start(command, environment(tmp_path), 2, tmp_path / "logs")
    assert started[alone].process.wait(60) == 2
    for running in started:
        running.process.kill()
    said = finish(started)[1][alone]
    assert said.endswith(f"process {alone}: error: a mistake that only one process sees.\n")


def test_an_address_without_numbers_is_refused():
    code = "import os; os.environ['JAX_COORDINATOR_ADDRESS'] = 'x:1'\n"
    code += "os.environ['JAX_NUM_PROCESSES'] = 'two'\n"
    code += "from alignjax import processes\nprocesses.join({})"
    env = environment(".")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert "ValueError: JAX_NUM_PROCESSES='two': it must be a whole number." in done.stderr
