"""Runs of several processes on one machine: they train as one, stop as one and fail as one."""

import json
import random
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest
from conftest import tiny_config, write_model, write_pairs
from jax._src.clusters import cloud_tpu_cluster
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

from alignjax import processes
from alignjax.errors import UserError

pytestmark = pytest.mark.slow  # minutes

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


@pytest.mark.parametrize(("processes", "devices"), [(2, 2), (4, 1)])
def test_several_processes_share_the_weights_too(prepared, tmp_path, processes, devices):
    name = f"several-{processes}"
    command = arguments(prepared, name, *SAMPLED, f"--mesh.tensor={devices}")
    env = environment(tmp_path / "cache", devices)
    launch_several(command, env, processes, tmp_path / "logs")
    check_as_one(prepared, prepared / name, 4)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_process_stops_all_after_one_step(prepared, two, tmp_path, number):
    name = f"stopped-{number.name}"
    command = arguments(prepared, name, *SAMPLED)
    env = environment(tmp_path / "cache")
    started = start(slowly(command, tmp_path / "go"), env, 2, tmp_path / "logs")
    wait_for(started[0], "step 4/20")
    started[1].process.send_signal(number)
    (tmp_path / "go").touch()
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
    started = start(slowly(command, tmp_path / "go"), env, 1, tmp_path / "logs")
    wait_for(started[0], "step 4/20")
    started[0].process.send_signal(signal.SIGINT)
    (tmp_path / "go").touch()
    codes, outputs = finish(started)
    assert codes == [143] and "stopped by a signal after step" in outputs[0]
    assert "stopping after the step begun last; a second signal ends at once\n" in outputs[0]
    launch(command, env)
    assert untimed(prepared / "alone") == untimed(prepared / "one-2")
    assert same_weights(prepared / "alone", prepared / "one-2")


def test_a_mistake_ends_all_processes_with_one_sentence(prepared, tmp_path):
    command = arguments(prepared, "refused", "--data.path=nowhere.jsonl")
    codes, outputs = finish(start(command, environment(tmp_path), 2, tmp_path / "logs"))
    assert codes == [2, 2]
    assert "nowhere.jsonl" in outputs[0].strip().splitlines()[-1]
    assert "error" not in outputs[1] and "Traceback" not in "".join(outputs)


def test_a_second_run_in_the_directory_is_refused_on_every_process(prepared, tmp_path):
    command = arguments(prepared, "held", "--batch.epochs=50")
    endless = slowly(command, tmp_path / "never")
    first = start(endless, environment(tmp_path / "cache"), 1, tmp_path / "logs")
    wait_for(first[0], "step 2/")
    codes, outputs = finish(start(command, environment(tmp_path), 2, tmp_path / "more"))
    first[0].process.kill()
    finish(first)
    assert codes == [2, 2] and f"process {first[0].process.pid} on" in outputs[0]


PLAIN = """
import jax, json, sys
from alignjax import processes
from alignjax.errors import UserError
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
            raise UserError(f"process {me} says no")
        return 0
    try:
        getattr(processes, name)(work)
    except ValueError as error:
        found[name] = str(error)
print("found", json.dumps(found))
"""


def test_processes_agree_and_read_their_own_rows(tmp_path):
    command = [sys.executable, "-c", PLAIN]
    codes, outputs = finish(start(command, environment(tmp_path, 2), 2, tmp_path / "logs"))
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


# One of two processes does something alone, while the other waits for it.
SCENE = """
import errno, os, signal, sys, time
from alignjax import command, processes
from alignjax.errors import UserError

def main():
    mine = os.environ["JAX_PROCESS_ID"] == sys.argv[1]
    processes._MISSED = 3
    processes.join({"seed": int(mine), "run_dir": mine} if sys.argv[2] == "other" else {})
    import jax
    from jax.experimental import multihost_utils
    if mine:
        {
            "mistake": lambda: (_ for _ in ()).throw(UserError("a mistake that only one sees.")),
            "full": lambda: (_ for _ in ()).throw(OSError(errno.ENOSPC, "", "out/model")),
            "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
            "stopped": lambda: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(600)),
        }[sys.argv[2]]()
    if sys.argv[3] == "gathering":
        multihost_utils.process_allgather(jax.numpy.ones(2))
    processes.in_turn(lambda: 0)
    return 0

sys.exit(command.run(main))
"""
MISTAKE, FULL = "error: a mistake that only one sees.", "error: out/model: no space is left"


@pytest.mark.parametrize(
    ("alone", "what", "waits", "code", "sentence"),
    [
        (0, "mistake", "telling", 2, MISTAKE),
        (1, "mistake", "telling", 2, MISTAKE),
        (0, "full", "gathering", 2, FULL),
        (1, "full", "gathering", 2, FULL),
        (1, "killed", "telling", -signal.SIGKILL, "process 1 is gone"),
        (1, "killed", "gathering", -signal.SIGKILL, "process 1 is gone"),
        (0, "stopped", "telling", 143, ""),
        (1, "stopped", "telling", 143, "process 1 has ended: it was ended by SIGTERM"),
        (1, "other", "telling", 2, "seed=0 in process 0, but 1 in process 1"),
    ],
)
def test_what_one_process_meets_ends_all_with_a_sentence(
    tmp_path, alone, what, waits, code, sentence
):
    command = [sys.executable, "-c", SCENE, str(alone), what, waits]
    codes, outputs = finish(start(command, environment(tmp_path), 2, tmp_path / "logs"))
    assert codes[alone] == code and codes[1 - alone] == 2, "\n".join(outputs)
    assert sentence in outputs[0] and "Traceback" not in "".join(outputs)
    assert "Check failure" not in "".join(outputs)


MODELS = """
import sys
from pathlib import Path
from alignjax import command, processes
from alignjax.weights.fetch import open_model
from alignjax.weights.source import open_together

def main():
    processes.join({})
    import jax
    for model in sys.argv[1:]:
        own = Path(model) / str(jax.process_index())
        open_together(lambda: open_model(str(own if own.is_dir() else model), Path(model)))
        print("opened", Path(model).name)

sys.exit(command.run(main))
"""


def test_other_weights_of_the_same_shapes_on_one_process_end_all(tmp_path):
    write_model(tmp_path / "one", tiny_config())
    for process in (0, 1):
        write_model(tmp_path / "two" / str(process), tiny_config(), seed=process)
    command = [sys.executable, "-c", MODELS, str(tmp_path / "one"), str(tmp_path / "two")]
    codes, outputs = finish(start(command, environment(tmp_path), 2, tmp_path / "logs"))
    assert codes == [2, 2] and all("opened one" in text for text in outputs)
    assert "in process 0, but" in outputs[0] and "Traceback" not in "".join(outputs)


def test_a_process_that_never_joins_is_named(tmp_path):
    code = "from alignjax import processes\nprocesses._PATIENCE_HERE = 2\nprocesses.join({})"
    (first, second) = start(
        [
            sys.executable,
            "-c",
            f"import os, time\nif os.environ['JAX_PROCESS_ID'] == '1': time.sleep(600)\n{code}",
        ],
        environment(tmp_path),
        2,
        tmp_path / "logs",
    )
    assert first.process.wait(600) == 2
    second.process.kill()
    assert "error: process 1 has not joined" in finish([first, second])[1][0]


NAMED = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (("x:1", "two", "0"), "JAX_NUM_PROCESSES='two'"),
        (("x:1", "0", "0"), "JAX_NUM_PROCESSES='0'"),
        (("x:1", "2", "-1"), "JAX_PROCESS_ID='-1'"),
        (("x:1", "2", ""), "JAX_PROCESS_ID=None"),
        (("x:1", "2", "2"), "JAX_PROCESS_ID=2"),
        (("x:1", "", "0"), "JAX_NUM_PROCESSES=None"),
        (("", "2", "0"), "JAX_COORDINATOR_ADDRESS=''"),
        (("x", "2", "0"), "JAX_COORDINATOR_ADDRESS='x'"),
        (("x:", "2", "0"), "JAX_COORDINATOR_ADDRESS='x:'"),
        (("http://x:99999", "2", "0"), "99999"),
    ],
)
def test_variables_that_make_no_sense_are_refused_by_name(monkeypatch, values, names):
    for name, value in zip(NAMED, values, strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as refusal:
        processes.join({})
    assert names in str(refusal.value)


@pytest.mark.parametrize(
    ("values", "joins"),
    [
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, False),  # a shell of salloc
        ({"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}, True),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a"}, False),
    ],
)
def test_a_launcher_of_several_processes_is_asked(monkeypatch, values, joins):
    asked = []
    monkeypatch.setattr(processes, "_initialize", lambda *named: asked.append(named))
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    processes.join({})
    assert asked == [("", None, None)] * joins


@pytest.mark.parametrize(("hosts", "joins"), [(["10.0.0.1"], False), (["10.0.0.1", "b"], True)])
def test_a_pod_of_plain_tpu_vms_is_asked_by_its_metadata(monkeypatch, hosts, joins):
    said = {"agent-worker-number": "1", "worker-network-endpoints": ",".join(hosts), "tpu-env": ""}
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: (said[key], 200))
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    asked, platforms = [], jax.config.jax_platforms
    monkeypatch.setattr(processes, "_initialize", lambda *named: asked.append(named))
    try:
        for kind, expected in (("tpu,cpu", joins), ("cpu", False)):
            jax.config.update("jax_platforms", kind)
            processes.join({})
            assert asked == [("", None, None)] * expected
            asked.clear()
    finally:
        jax.config.update("jax_platforms", platforms)


def test_a_platform_that_is_not_there_is_one_sentence(tmp_path):
    code = "import sys; from alignjax import command, processes\n"
    code += "sys.exit(command.run(lambda: processes.join({})))"
    env = environment(tmp_path) | {"JAX_PLATFORMS": "cuda"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    said = re.fullmatch("error: jax cannot start with JAX_PLATFORMS='cuda': (.+)\n", done.stderr)
    assert done.returncode == 2 and said[1].strip()


@pytest.mark.parametrize("seed", range(20))
def test_all_processes_stop_after_the_same_step(monkeypatch, seed):
    """However far one is ahead: its step needs the one before to be dispatched by the others."""
    told, rng = {}, random.Random(seed)
    client = SimpleNamespace(
        key_value_set=lambda key, value, allow_overwrite: told.update({key: value}),
        key_value_dir_get=lambda directory: list(told.items()),
    )
    monkeypatch.setattr(processes.state, "client", client)
    at, ends, asking, wanted = [0, 0], [None, None], rng.randrange(2), rng.randrange(1, 6)
    for me in rng.choices([0, 1], k=200):
        if ends[me] is None and at[me] <= at[1 - me] + 1:
            at[me] += 1
            if processes.agree_to_stop(at[me], me == asking and at[me] == wanted):
                ends[me] = at[me]
    assert ends == [wanted + 2] * 2
