"""Kills runs at random moments and checks that they end as runs never disturbed.

    python tests/chaos.py --kills 40

Every stage, in one process and in two. A run is killed (SIGKILL) after a random time, at a random
step, or when a file is half written; then started again, perhaps killed again, and at last left to
its end. Weights, optimizer state and metrics must be those of a run that was left alone, bit for
bit.
"""

import argparse
import logging
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from conftest import tiny_config, write_model, write_pairs
from running import Running, arguments, environment, finish, start, untimed

PAIRS, HELD_OUT = 60, 8
STEPS = 2 * PAIRS // 4  # of a run
KINDS = [(stage, processes) for processes in (1, 2) for stage in ("sft", "rm", "dpo")]
FEW = [("sft", 1), ("dpo", 2), ("dpo", 1), ("rm", 2)]  # where there are not kills for all
TRACES = {
    "a checkpoint": "run/checkpoints/*tmp*",
    "the token cache": "cache/tokens/.*.partial",
    "the reference cache": "cache/reference/.*.partial",
    "the baseline": "run/.baseline.*.partial",
    "the export": "run/.export.*.partial",
}


def main(kills: int, seed: int, root: Path) -> int:
    """Kills runs `kills` times over the kinds in turn; gives how many runs ended otherwise."""
    rng = random.Random(seed)
    write_model(root / "model", tiny_config())
    write_pairs(root / "rows.jsonl", PAIRS, HELD_OUT)
    kinds = KINDS if kills >= len(KINDS) else FEW[:kills]
    wrong = 0
    for i, (stage, processes) in enumerate(kinds):
        name = f"{stage}-{processes}"
        whole, seconds = undisturbed(root / name, root, stage, processes)
        left, trial = len(range(i, kills, len(kinds))), 0
        while left:
            trial += 1
            at = root / name / f"trial-{trial}"
            done = killed(at, root, stage, processes, min(left, rng.randint(1, 3)), seconds, rng)
            left -= done
            differs = differences(whole, at / "run") if done else ["the run was never killed"]
            wrong += bool(done and differs)
            state = "; ".join(differs) or "bit-identical"
            print(f"{stage}, {processes} process(es): {done} kills, {state}", flush=True)
            if not differs:
                shutil.rmtree(at)
    print(f"{kills} kills, {wrong} runs differ", flush=True)
    return wrong


def command(at: Path, root: Path, stage: str) -> list[str]:
    """A run whose rows, model and config are shared, and whose directory and cache are `at`'s."""
    more = [f"--run-dir={at / 'run'}"]
    if stage != "rm":
        more += ["--samples.prompts=2", "--samples.max-tokens=4"]
    if stage == "sft":
        more += [f"--data.path={root / 'sft.jsonl'}"]
        write_sft(root)
    return arguments(root, "unused", *more, stage=stage)


def write_sft(root: Path) -> None:
    """The chosen side of every pair as a row of prompt and completion."""
    text = (root / "rows.jsonl").read_text()
    (root / "sft.jsonl").write_text(text.replace('"chosen"', '"completion"'))


def undisturbed(at: Path, root: Path, stage: str, processes: int) -> tuple[Path, float]:
    started = time.monotonic()
    codes, outputs = finish(begin(at, root, stage, processes))
    assert codes == [0] * processes, "\n".join(outputs)
    return at / "run", time.monotonic() - started


def begin(at: Path, root: Path, stage: str, processes: int) -> list[Running]:
    return start(command(at, root, stage), environment(at / "cache"), processes, at / "logs")


def killed(
    at: Path, root: Path, stage: str, processes: int, kills: int, seconds: float, rng: random.Random
) -> int:
    """Starts a run until it was killed so often and came to its end; gives the kills."""
    done = 0
    while True:
        run = begin(at, root, stage, processes)
        if done < kills and wait(run, *pick(at, seconds, rng), rng):
            for running in rng.sample(run, len(run)):
                running.process.kill()
                time.sleep(0.3 * rng.random())
            finish(run)
            done += 1
            continue
        codes, outputs = finish(run)
        if any(codes):
            raise AssertionError("\n".join(outputs))
        return done


def pick(at: Path, seconds: float, rng: random.Random):
    """When to kill: ("step", number), ("file", glob) or ("time", seconds)."""
    kind = rng.choices(["step", "file", "time"], [5, 3, 2])[0]
    if kind == "step":
        return kind, rng.randrange(1, STEPS)
    if kind == "file":
        return kind, (at, TRACES[rng.choice(sorted(TRACES))])
    return kind, rng.uniform(0, seconds)


def wait(run: list[Running], kind: str, value, rng: random.Random) -> bool:
    """Returns at the moment: True, or False where the run ended before it."""
    started = time.monotonic()
    while run[0].process.poll() is None:
        if kind == "time" and time.monotonic() - started > value:
            return True
        if kind == "file" and any(value[0].glob(value[1])):
            return True
        if kind == "step" and f"\nstep {value}/" in run[0].log.read_text():
            time.sleep(0.2 * rng.random())
            return run[0].process.poll() is None
        time.sleep(0.001)
    return False


def differences(whole: Path, run: Path) -> list[str]:
    """What is not equal in two run directories: metrics, exported weights, the saved state."""
    found = []
    if untimed(whole) != untimed(run):
        found.append("metrics differ")
    if len(untimed(run)) != STEPS + 1:
        found.append("a step is missing or twice")
    weights = [(at / "export/model.safetensors").read_bytes() for at in (whole, run)]
    if weights[0] != weights[1]:
        found.append("weights differ")
    states = [saved_state(at / f"checkpoints/{STEPS}/state") for at in (whole, run)]
    if set(states[0]) != set(states[1]):
        found.append("the states have other leaves")
    else:
        for name, leaf in states[0].items():
            if leaf.tobytes() != states[1][name].tobytes():
                found.append(f"{name} differs")
    return found


def saved_state(directory: Path) -> dict[str, np.ndarray]:
    """Every array of a saved state by name, whatever devices it was saved on."""
    import orbax.checkpoint as ocp

    logging.getLogger("absl").setLevel(logging.ERROR)
    with ocp.PyTreeCheckpointer() as checkpointer:
        names = checkpointer.metadata(directory.absolute()).item_metadata.tree
        whole = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
        return checkpointer.restore(directory.absolute(), restore_args=whole)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--dir", type=Path, help="keep everything here; else in a scratch directory"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        sys.exit(main(options.kills, options.seed, options.dir or Path(scratch)) > 0)
