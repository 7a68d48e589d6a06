"""Training steps here and in other libraries, by turns: the ratio of useful tokens a second.

    python benchmarks/peers/compare.py --stage dpo --trl PYTHON --tunix PYTHON [--json]

Each PYTHON is that of an environment made from trl.txt or tunix.txt; the one that runs this file
has alignjax. In every turn each library runs once, in a process of its own, on the same items in
another order; a ratio is that of two runs of one turn, and the median over turns is told. Arguments
for a peer's script follow its PYTHON: --trl "PYTHON --batch 8".
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

PEERS = Path(__file__).resolve().parent
ROOT = PEERS.parents[1]
SCRIPTS = {"trl": PEERS / "with_trl.py", "tunix": PEERS / "with_tunix.py"}


def measured(command: list[str]) -> dict:
    """What a script measured; raises RuntimeError with the end of what it said where it fails."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def commands(options, turn: int) -> dict[str, list[str]]:
    """Name -> what runs it in a turn."""
    more = ["--stage", options.stage, "--seed", str(turn), "--json"]
    ours = [sys.executable, str(PEERS.parent / "train_step.py"), *shlex.split(options.ours), *more]
    found = {"alignjax": ours}
    for name, script in SCRIPTS.items():
        if asked := getattr(options, name):
            python, *own = shlex.split(asked)
            found[name] = [python, str(script), *own, *more]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", choices=["sft", "rm", "dpo"], required=True)
    parser.add_argument("--trl", default="", help="PYTHON, and arguments for with_trl.py")
    parser.add_argument("--tunix", default="", help="PYTHON, and arguments for with_tunix.py")
    parser.add_argument("--ours", default="", help="arguments for train_step.py")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = str(ROOT)  # alignjax of this checkout
    runs: dict[str, list[dict]] = {}
    for turn in range(options.turns):
        for name, command in commands(options, turn).items():
            runs.setdefault(name, []).append(measured(command))
            said = f"{name} {runs[name][-1]['tokens_per_second']:.0f} tokens/s"
            print(f"turn {turn + 1}: {said}", file=sys.stderr, flush=True)
    assert len({run["parameters"] for own in runs.values() for run in own}) == 1
    rates = {name: [run["tokens_per_second"] for run in own] for name, own in runs.items()}
    ratios = {
        name: [a / b for a, b in zip(rates["alignjax"], rates[name], strict=True)]
        for name in rates
        if name != "alignjax"
    }
    if options.json:
        median = {name: statistics.median(own) for name, own in ratios.items()}
        print(json.dumps({"stage": options.stage, "ratio": median, "runs": runs}))
        return
    for name, own in rates.items():
        print(
            f"{runs[name][0]['library']:20} {statistics.median(own):8.0f} tokens/s, {options.stage}"
        )
    for name, own in ratios.items():
        spread = f"{min(own):.2f} to {max(own):.2f}"
        print(f"alignjax over {name:6} {statistics.median(own):8.2f}  ({spread})")


if __name__ == "__main__":
    main()
