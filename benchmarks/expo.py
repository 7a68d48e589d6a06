"""Time and memory of `alignjax.expo`: `python benchmarks/expo.py [--peers=PYTHON] [--json=FILE]`.

For each size it makes two random Llamas of bfloat16 in shards of 1 GB and measures, each in a
process of its own and with both models in the system's cache: `cat` of both and `cp` of one, which
are the floor, or `cat` and three times `cp`; what is shown before anything is written; one alpha;
three alphas in one pass. Each is timed to the end of its process, when much of what it wrote may
still be in memory, and to the end of a `sync` after it, when the disk has it.

What a `cp` takes depends on whether the system has memory at hand for the copy: on a virtual
machine 3 GB took 0.75 s where the cache had been emptied just before, and 7 s where the machine had
to ask its host for the memory. So the cache is left as it is, `cp` is timed before, between and
after the others, and the floor is given as the range that it was in.

`--peers` names the Python of an environment made from peers/mergekit.txt, and measures mergekit and
the paper's own route next to them, how many elements each rounds wrongly, and how far mergekit's
float32 results differ. Needs Linux, and 40 GB of disk for 3e9.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from weights import ROOT, child, private_bytes, timed

ALPHA, ALPHAS = "0.3", "0.1,0.2,0.3"
SAMPLE = 1 << 21  # elements of a tensor that are compared, at most


@dataclass(frozen=True)
class Settings:
    """Measures extrapolation."""

    params: tuple[float, ...] = (0.56e9, 1.57e9, 3e9)  # parameters, about
    peers: str = ""  # Python with mergekit, torch and transformers; empty: not measured
    scratch: str = ""  # directory for the files, deleted at the end; empty: the system's
    rounds: int = 1  # how often everything is measured; the least times count, of cp the range
    json: str = ""  # file for the numbers


def main() -> None:
    import tyro

    settings = tyro.cli(Settings, config=(tyro.conf.FlagCreatePairsOff,))
    rows = []
    for params in settings.params:
        with tempfile.TemporaryDirectory(dir=settings.scratch or None) as scratch:
            found = measure(params, settings, Path(scratch))
        rows.append(found)
        print(table(found), flush=True)
    if settings.json:
        Path(settings.json).write_text(json.dumps(rows, indent=2))


def measure(params: float, settings: Settings, scratch: Path) -> dict[str, dict | list[dict]]:
    """Step -> what `watched` says of it, each time; and under "size", of how much."""
    weak, strong, out = (scratch / name for name in ("weak", "strong", "out"))
    child("make", weak, str(params), script=__file__)
    child("near", weak, strong, script=__file__)
    sides, one = (weak, strong), sorted(map(str, strong.glob("*.safetensors")))
    files = [*map(str, sorted(weak.glob("*.safetensors"))), *one]
    size = sum(os.path.getsize(file) for file in one)
    ours = [sys.executable, "-m", "alignjax.expo", f"--weak={weak}", f"--strong={strong}"]
    ours += [f"--out={out}", "--shard-bytes=1000000000"]
    copy = ["sh", "-c", 'mkdir -p "$0" && exec cp "$@"', str(out), *one, str(out)]
    steps = [
        ("cat both", ["sh", "-c", 'exec cat "$@" > /dev/null', "cat", *files]),
        ("cp one", copy),
        ("alignjax, report", [*ours, f"--alpha={ALPHA}", "--dry-run"]),
        ("alignjax, 1 alpha", [*ours, f"--alpha={ALPHA}"]),
        ("cp one", copy),
        ("alignjax, 3 alphas", [*ours, f"--alpha={ALPHAS}"]),
        ("cp one", copy),
    ]
    if settings.peers:
        recipe = scratch / "recipe.yml"
        recipe.write_text(json.dumps(mergekit(weak, strong, "bfloat16")))
        steps.append(("mergekit", _mergekit(settings.peers, recipe, out)))
        peer = str(Path(__file__).parent / "peers/with_transformers.py")
        route = [settings.peers, peer, str(weak), str(strong), ALPHA, str(out)]
        steps.append(("the paper's route", route))
    found: dict = {"size": {"bytes": size, "params": params}}
    for _ in range(settings.rounds):
        for name, command in steps:
            _warm(files)
            now = watched(command)
            if (out / "config.json").is_file():  # one model, and no copy of the files alone
                now["misrounded"] = child("misrounded", *sides, out, script=__file__)["share"]
            print(name, now, flush=True)
            found.setdefault(name, []).append(now)
            shutil.rmtree(out, ignore_errors=True)
    if settings.peers:
        found["size"]["agreement"] = agreement(settings.peers, ours, sides, out, scratch)
    return found


def mergekit(weak: Path, strong: Path, dtype: str) -> dict:
    """Its recipe of theta_sft + (1 + alpha) (theta - theta_sft)."""
    weight = 1 + float(ALPHA)
    return {
        "merge_method": "task_arithmetic",
        "base_model": str(weak),
        "models": [{"model": str(strong), "parameters": {"weight": weight}}],
        "dtype": dtype,
    }


def _mergekit(python: str, recipe: Path, out: Path) -> list[str]:
    command = str(Path(python).with_name("mergekit-yaml"))
    return [command, str(recipe), str(out), "--lazy-unpickle", "--out-shard-size", "1B"]


def agreement(python: str, ours: list[str], sides: tuple, out: Path, scratch: Path) -> float:
    """Largest difference from mergekit's float32 results, in 2^-22 max(|theta|, |theta_sft|)."""
    recipe, theirs = scratch / "recipe32.yml", scratch / "theirs"
    recipe.write_text(json.dumps(mergekit(*sides, "float32")))
    watched(_mergekit(python, recipe, theirs))
    watched([*ours, f"--alpha={ALPHA}", "--dtype=float32"])
    return child("agree", *sides, out, theirs, script=__file__)["largest"]


def _warm(files: list[str]) -> None:
    """Nothing is left to be written, both models are in memory, and the system has had a rest."""
    os.sync()
    timed(["cat", *files])
    time.sleep(5)


def watched(command: list[str]) -> dict:
    """Runs a command; seconds to its end and to the end of a sync, of processors, and memory.

    Memory is the most private memory that the process held.
    """
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    started, peak, before = time.monotonic(), 0, os.times()
    with tempfile.TemporaryFile() as log:
        running = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        while running.poll() is None:
            peak = max(peak, private_bytes(running.pid))
            time.sleep(0.02)
        seconds = time.monotonic() - started
        if running.returncode:
            log.seek(0)
            raise SystemExit(f"{command}: {log.read().decode()}")
    after = os.times()
    os.sync()
    on_disk = time.monotonic() - started
    used = sum(getattr(after, n) - getattr(before, n) for n in ("children_user", "children_system"))
    return {"seconds": seconds, "on disk": on_disk, "cpu": used, "private": peak}


def _floors(found: dict, kind: str, copies: int) -> list[float]:
    """Seconds of `cat` and of so many `cp`, for each `cp` that was timed."""
    cat = min(one["seconds"] for one in found["cat both"])
    return [cat + copies * one[kind] for one in found["cp one"]]


def table(found: dict[str, dict | list[dict]]) -> str:
    """The least times, by the largest floor and by the least; the most memory.

    Of what the floor is made, the longest times stand in place of that.
    """
    size = found["size"]["bytes"]
    lines = [
        f"{size / 2e9:.2f} billion parameters, {size / 1e9:.2f} GB each side",
        f"{'':20}{'s':>8}{'of floor':>14}{'on disk s':>11}{'of floor':>14}{'CPU s':>8}"
        f"{'private MB':>12}{'misrounded':>12}",
    ]
    for name, rounds in found.items():
        if name == "size":
            continue
        line = f"{name:20}"
        for kind, width in (("seconds", 8), ("on disk", 11)):
            times = [one[kind] for one in rounds]
            floors = _floors(found, kind, 3 if "3 alphas" in name else 1)
            by = f"{min(times) / max(floors):.2f} to {min(times) / min(floors):.2f}"
            if name in ("cat both", "cp one"):
                by = f"to {max(times):.2f} s"
            line += f"{min(times):{width}.2f}{by:>14}"
        line += f"{min(one['cpu'] for one in rounds):8.2f}"
        line += f"{max(one['private'] for one in rounds) / 1e6:12.0f}"
        wrong = [one["misrounded"] for one in rounds if "misrounded" in one]
        lines.append(line + (f"{max(wrong):12.5%}" if wrong else ""))
    if "agreement" in found["size"]:
        lines.append(
            "largest difference from mergekit in float32, of the first "
            f"{SAMPLE:,} elements of a tensor: {found['size']['agreement']:.3f} x 2^-22 "
            "max(|theta|, |theta_sft|)"
        )
    return "\n".join(lines) + "\n"


# What the processes do.


def step(name: str, *arguments: str) -> None:
    from weights import make

    work = {"make": make, "near": near, "misrounded": misrounded, "agree": agree}[name]
    report = {"idle": 0} | (work(*arguments) or {})
    Path(os.environ["REPORT"]).write_text(json.dumps(report))


def near(weak: str, strong: str) -> None:
    """A second model, which differs by up to 2^-15 from the first one's weights, 2^-15 to 2^-8."""
    from dataclasses import replace

    import numpy as np

    from alignjax.weights.safetensors import open_directory, write_directory

    source, rng = open_directory(Path(weak)), np.random.default_rng(1)

    def read(name: str, index: tuple) -> np.ndarray:
        part = source.read(name, index)
        noise = np.frombuffer(rng.bytes(part.size), np.int8).reshape(part.shape)
        return (part.astype(np.float32) + np.float32(2**-22) * noise).astype(part.dtype)

    write_directory(replace(source, read=read), Path(strong), "source", 10**9)


def _read(directories: list[str]):
    """The same slices of several models, as float64."""
    import numpy as np

    from alignjax.weights.safetensors import open_directory

    sides = [open_directory(Path(one)) for one in directories]
    for name, stored in sides[0].tensors.items():
        rows = max(SAMPLE // (np.prod(stored.shape[1:], dtype=int) or 1), 1)
        index = (
            slice(0, min(int(rows), stored.shape[0])),
            *(slice(None) for _ in stored.shape[1:]),
        )
        yield [side.read(name, index).astype(np.float64) for side in sides]


def misrounded(*directories: str) -> dict:
    """Share of elements that are not the float64 result rounded once to bfloat16, ties to even."""
    import numpy as np

    wrong = count = 0
    for weak, strong, found in _read(list(directories)):
        mantissa, exponent = np.frexp(strong + float(ALPHA) * (strong - weak))
        expected = np.ldexp(np.rint(np.ldexp(mantissa, 8)), exponent - 8)
        wrong += np.count_nonzero(found != expected)
        count += found.size
    return {"share": wrong / count}


def agree(*directories: str) -> dict:
    import numpy as np

    largest = 0.0
    for weak, strong, ours, theirs in _read(list(directories)):
        scale = 2.0**-22 * np.maximum(np.abs(strong), np.abs(weak))
        largest = max(largest, float(np.max(np.abs(ours - theirs) / scale)))
    return {"largest": largest}


if __name__ == "__main__":
    if sys.argv[1:2] == ["step"]:
        step(*sys.argv[2:])
    else:
        main()
