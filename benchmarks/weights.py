"""Time and memory of weights on their way in and out: `python benchmarks/weights.py [--json=FILE]`.

Makes a random Llama of bfloat16 in shards of 1 GB, and measures, each step in a process of its own:
`cat` and `cp` of its bytes, both conversions, loading it onto 8 devices that one CPU pretends to be
(fsdp 4 x tensor 2), and loading it onto the same mesh in 4 processes. Needs Linux, and about
15 GB of disk for the 1.6 billion parameters, twice as much memory for loading them.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEVICES, FSDP, TENSOR, PROCESSES = 8, 4, 2, 4


@dataclass(frozen=True)
class Settings:
    """Measures reading and writing of weights."""

    params: float = 1.6e9  # parameters, about; 1e8 for a quick look
    scratch: str = ""  # directory for the files, deleted at the end; empty: the system's
    rounds: int = 1  # how often everything is measured
    cold: bool = False  # leave files out of memory before each step that reads them; needs root
    json: str = ""  # file for the numbers


def main() -> None:
    import tyro

    settings = tyro.cli(Settings, config=(tyro.conf.FlagCreatePairsOff,))
    rows = []
    for number in range(settings.rounds):
        with tempfile.TemporaryDirectory(dir=settings.scratch or None) as scratch:
            found = measure(settings.params, Path(scratch), settings.cold)
        rows.append(found)
        print(f"round {number + 1}\n{table(found)}\n", flush=True)
    if len(rows) > 1:
        best = {}
        for name in rows[0]:
            tries = [row[name] for row in rows]
            most = (
                {"private": max(one["private"] for one in tries)} if "private" in tries[0] else {}
            )
            best[name] = min(tries, key=_work) | most
        print(f"of {len(rows)} rounds the least time and the most memory\n{table(best)}")
    if settings.json:
        Path(settings.json).write_text(json.dumps(rows, indent=2))


def measure(params: float, scratch: Path, cold: bool) -> dict[str, dict]:
    """Step -> seconds, and where it is measured private memory in bytes above the idle process."""
    model, orbax, back, copy = (scratch / name for name in ("model", "orbax", "back", "copy"))
    child("make", model, str(params))
    shards = sorted(str(file) for file in model.glob("*.safetensors"))
    size = sum(os.path.getsize(file) for file in shards)
    copy.mkdir()
    found = {}
    settle(model, cold)
    found["cat"] = timed(["cat", *shards])
    settle(model, cold)
    found["cp"] = timed(["cp", *shards, str(copy)])
    shutil.rmtree(copy)
    settle(model, cold)
    found["convert to orbax"] = child("convert", model, orbax, "orbax")
    settle(orbax, cold)
    found["convert back"] = child("convert", orbax, back, "hf")
    child("same", model, back)
    shutil.rmtree(orbax)
    shutil.rmtree(back)
    settle(model, cold)
    found["load, 1 process"] = child("load", model)
    settle(model, cold)
    for i, part in enumerate(children("load", model)):
        found[f"load, process {i} of {PROCESSES}"] = part
    for one in found.values():
        one["bytes"] = size
    return found


def settle(source: Path, cold: bool) -> None:
    """The same start for each step: nothing left to be written, and only its source in memory.

    The pause lets a virtual machine give back memory that nobody uses, since to ask for it again
    takes longer than to copy. Where this process may not empty the system's file cache, what
    earlier steps left stays there.
    """
    os.sync()
    drop = Path("/proc/sys/vm/drop_caches")
    if cold or os.access(drop, os.W_OK):
        drop.write_text("1")
    for file in [] if cold else [file for file in source.rglob("*") if file.is_file()]:
        subprocess.run(["cat", file], check=True, stdout=subprocess.DEVNULL)
    time.sleep(5)


def table(found: dict[str, dict]) -> str:
    """Times of `cat` and `cp` together: of all, and without the start, which imports jax."""
    size = found["cat"]["bytes"]
    floor = found["cat"]["seconds"] + found["cp"]["seconds"]
    lines = [
        f"{size / 1e9:.2f} GB in files",
        f"{'':24}{'s':>7}{'start s':>9}{'GB/s':>7}{'of cat+cp':>11}{'no start':>10}"
        f"{'private MB':>12}"
        f"{'beyond shards':>15}{'read':>8}{'KB/call':>9}",
    ]
    for name, one in found.items():
        work = _work(one)
        line = f"{name:24}{one['seconds']:7.2f}{one['seconds'] - work:9.2f}"
        line += f"{size / 1e9 / work:7.2f}{one['seconds'] / floor:11.2f}{work / floor:10.2f}"
        if "private" in one:
            line += f"{one['private'] / 1e6:12.0f}"
        if "shards" in one:
            line += f"{(one['private'] - one['shards']) / 1e6:15.0f}"
            line += f"{one['read'] / size:8.1%}{one['read'] / one['calls'] / 1e3:9.0f}"
        lines.append(line)
    return "\n".join(lines)


def _work(one: dict) -> float:
    return one.get("work_seconds", one["seconds"])


def timed(command: list[str]) -> dict:
    started = time.monotonic()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return {"seconds": time.monotonic() - started}


def child(step: str, *arguments, script: str = __file__) -> dict:
    """Runs a script's step in a process; its time with all that starting takes, and memory."""
    return _run([_command(step, *arguments, script=script)], [_environment(DEVICES)])[0]


def children(step: str, *arguments) -> list[dict]:
    """The same in several processes that share the mesh."""
    with socket.socket() as one:
        one.bind(("localhost", 0))
        port = one.getsockname()[1]
    environments = [
        _environment(DEVICES // PROCESSES)
        | {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": str(PROCESSES),
            "JAX_PROCESS_ID": str(i),
        }
        for i in range(PROCESSES)
    ]
    return _run([_command(step, *arguments)] * PROCESSES, environments)


def _command(step: str, *arguments, script: str = __file__) -> list[str]:
    return [sys.executable, script, "step", step, *map(str, arguments)]


def _environment(devices: int) -> dict[str, str]:
    flags = f"--xla_force_host_platform_device_count={devices}"
    return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


def _run(commands: list[list[str]], environments: list[dict]) -> list[dict]:
    with tempfile.TemporaryDirectory() as reports:
        started = time.monotonic()
        running = [
            subprocess.Popen(command, env=env | {"REPORT": f"{reports}/{i}"}, stdout=sys.stderr)
            for i, (command, env) in enumerate(zip(commands, environments, strict=True))
        ]
        peaks = [0] * len(running)
        watching = threading.Thread(target=_watch, args=(running, peaks))
        watching.start()
        codes = [one.wait() for one in running]
        seconds = time.monotonic() - started
        watching.join()
        assert not any(codes), codes
        found = [json.loads(Path(f"{reports}/{i}").read_text()) for i in range(len(running))]
    return [
        {"seconds": seconds, **one, "private": peak - one["idle"]}
        for one, peak in zip(found, peaks, strict=True)
    ]


def _watch(running: list[subprocess.Popen], peaks: list[int]) -> None:
    """Samples what each process holds in memory that no file stands behind."""
    while any(one.poll() is None for one in running):
        for i, one in enumerate(running):
            peaks[i] = max(peaks[i], private_bytes(one.pid))
        time.sleep(0.02)


def private_bytes(pid: int | str) -> int:
    """RssAnon of a process; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon")), 0)


# What the processes do.


def step(name: str, *arguments: str) -> None:
    work = {"make": make, "convert": convert, "same": same, "load": load}[name]
    from alignjax import convert as _  # noqa: F401
    from alignjax.weights import compare, fetch, orbax_write  # noqa: F401

    report = {"idle": private_bytes("self")}
    started = time.monotonic()
    report |= work(*arguments) or {}
    report["work_seconds"] = time.monotonic() - started
    Path(os.environ["REPORT"]).write_text(json.dumps(report))


def make(target: str, params: str) -> None:
    """Writes a model of random weights."""
    import ml_dtypes
    import numpy as np

    from alignjax.models.families import tensor_names
    from alignjax.models.shapes import is_stacked, leaf_shapes
    from alignjax.weights.safetensors import write_directory
    from alignjax.weights.source import Source, Stored, decoder_config

    hidden, vocab = (2048, 128256) if float(params) >= 1e9 else (512, 32000)
    layer = hidden * hidden * (2 + 2 / 4 + 3 * 4)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": max(1, round((float(params) - vocab * hidden) / layer)),
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 256,
        "head_dim": 64,
        "tie_word_embeddings": True,
    }
    path, kind = Path(target), np.dtype(ml_dtypes.bfloat16)
    source = Source(path, config, {}, None, path)
    for leaf, shape in leaf_shapes(decoder_config(source)).items():
        for name in tensor_names(leaf, config["num_hidden_layers"]):
            source.tensors[name] = Stored(shape[is_stacked(leaf) :], kind, path)
    rng = np.random.default_rng(0)

    def read(name: str, index: tuple[slice, ...]) -> np.ndarray:
        shape = source.tensors[name].shape
        rows = len(range(*index[0].indices(shape[0])))
        bits = np.frombuffer(rng.bytes(2 * rows * int(np.prod(shape[1:]))), np.uint16)
        return ((bits & 0x83FF) | 0x3800).view(kind).reshape(rows, *shape[1:])  # all are finite

    write_directory(Source(path, config, source.tensors, read, path), path, "source", 10**9)


def convert(source: str, target: str, to: str) -> None:
    """As the command does it."""
    from alignjax import convert as command

    sys.argv = ["convert", f"--src={source}", f"--dst={target}", f"--to={to}"]
    if to == "hf":
        sys.argv.append("--shard-bytes=1000000000")
    assert command.main() == 0


def same(one: str, other: str) -> None:
    """Refuses two models of which a byte or the config differs."""
    from alignjax.weights.safetensors import open_directory
    from alignjax.weights.source import row_blocks

    one, other = open_directory(Path(one)), open_directory(Path(other))
    assert one.config == other.config
    assert {n: t[:2] for n, t in one.tensors.items()} == {
        n: t[:2] for n, t in other.tensors.items()
    }
    for name, tensor in one.tensors.items():
        for index in row_blocks(tensor.shape, tensor.dtype.itemsize):
            assert one.read(name, index).tobytes() == other.read(name, index).tobytes(), name


def load(source: str) -> dict:
    """Loads onto the mesh; what the devices hold, and what was asked of files."""
    import jax

    from alignjax import processes
    from alignjax.sharding import use_mesh
    from alignjax.weights import source as weights
    from alignjax.weights import tensorfile
    from alignjax.weights.safetensors import open_directory

    processes.join()
    asked = []
    original = tensorfile.read_bytes

    def read_bytes(file, start, content):
        asked.append(len(content))
        return original(file, start, content)

    tensorfile.read_bytes = read_bytes
    use_mesh(1, FSDP, TENSOR)
    model = jax.block_until_ready(weights.load(open_directory(Path(source))))
    leaves = jax.tree.leaves(model)
    shards = sum(part.data.nbytes for leaf in leaves for part in leaf.addressable_shards)
    return {"shards": shards, "read": sum(asked), "calls": len(asked)}


if __name__ == "__main__":
    if sys.argv[1:2] == ["step"]:
        step(*sys.argv[2:])
    else:
        main()
