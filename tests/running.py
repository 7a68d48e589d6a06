"""Starting `alignjax.train` as a user does, in one process or several, and reading what it left."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

# What depends on the clock: all else is equal in a run that was killed and resumed.
TIME_FIELDS = ("tokens_per_second", "data_wait")
ROOT = Path(__file__).resolve().parents[1]


def environment(cache: Path, devices: int = 1) -> dict[str, str]:
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    more = {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), "ALIGNJAX_CACHE": str(cache)}
    return {**os.environ, **more, "JAX_PLATFORMS": "cpu"}


def arguments(root: Path, run: str, *overrides: str, stage: str = "dpo") -> list[str]:
    """A run of 4 items a step on `root/model` and `root/rows.jsonl`, in float32."""
    config = root / f"{stage}.py"
    if not config.is_file():
        name = stage.upper()
        config.write_text(f"from alignjax.config import {name}\nconfig = {name}()\n")
    unit = "sequences" if stage == "sft" else "pairs"
    return [
        *(sys.executable, "-m", "alignjax.train", f"--config={config}"),
        *(f"--run-dir={root / run}", f"--model.path={root / 'model'}"),
        *(f"--data.path={root / 'rows.jsonl'}", "--data.max-length=128"),
        *(f"--batch.{unit}=4", "--batch.row-length=256", "--batch.epochs=2"),
        *("--compute.dtype=float32", "--optimizer.learning-rate=1e-3"),
        *("--checkpoint.every=3", "--log.eval-every=10", *overrides),
    ]


# Training in which each batch comes a tenth of a second late, and from the 11th on none before a
# file is there.
_LATE = """
import os, sys, time
from alignjax import command, loop, train

following, asked = loop._next, []

def late(*arguments):
    asked.append(1)
    time.sleep(0.1)
    while len(asked) > 10 and not os.path.exists({until!r}):
        time.sleep(0.01)
    return following(*arguments)

loop._next = late
sys.exit(command.run(train.main))
"""


def scripted(command: list[str], script: str) -> list[str]:
    """A command of `python -m module ...` with a script in place of the module."""
    return [command[0], "-c", script, *command[3:]]


def slowly(command: list[str], until: Path | str = "/") -> list[str]:
    """The same run, which whoever is to meet it at work finds at step 9 until a file is there."""
    return scripted(command, _LATE.format(until=str(until)))


class Running(NamedTuple):
    process: subprocess.Popen
    log: Path


def start(command: list[str], env: dict[str, str], processes: int, logs: Path) -> list[Running]:
    """Starts a run; its processes find each other on this machine, and each has a log."""
    logs.mkdir(parents=True, exist_ok=True)
    port, first = _free_port(), len(list(logs.iterdir()))
    started = []
    for process in range(processes):
        more = {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": str(processes),
            "JAX_PROCESS_ID": str(process),
        }
        log = logs / f"{first + process}.log"
        with log.open("w") as out:
            running = subprocess.Popen(
                command,
                env={**env, **more} if processes > 1 else env,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        started.append(Running(running, log))
    return started


def finish(started: list[Running], timeout: float = 600) -> tuple[list[int], list[str]]:
    """Exit codes and outputs of all processes, which are killed where they outlast the time."""
    end = time.monotonic() + timeout
    try:
        for running in started:
            running.process.wait(max(0, end - time.monotonic()))
    finally:
        for running in started:
            running.process.kill()
            running.process.wait()
    return [r.process.returncode for r in started], [r.log.read_text() for r in started]


def launch(
    command: list[str], env: dict[str, str], check: bool = True
) -> subprocess.CompletedProcess:
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def launch_several(command: list[str], env: dict[str, str], processes: int, logs: Path) -> str:
    """Runs to the end in several processes; gives what the first one printed."""
    codes, outputs = finish(start(command, env, processes, logs))
    assert codes == [0] * processes, "\n".join(outputs)
    return outputs[0]


def wait_for(running: Running, text: str, timeout: float = 600) -> None:
    """Returns once a process has printed a text."""
    end = time.monotonic() + timeout
    while text not in running.log.read_text():
        assert running.process.poll() is None and time.monotonic() < end, running.log.read_text()
        time.sleep(0.01)


def metrics_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def untimed(run: Path) -> list[dict]:
    """The lines of metrics.jsonl without what depends on the clock."""
    return [
        {name: value for name, value in line.items() if name not in TIME_FIELDS}
        for line in metrics_of(run)
    ]


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]
