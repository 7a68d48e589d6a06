"""Two checkpoints of one tiny model, of which one lies near the other."""

from pathlib import Path

import numpy as np
from conftest import tiny_config, write_model
from safetensors.numpy import load_file, save_file

from alignjax import checkpoint, optim
from alignjax import expo as command
from alignjax.config import SFT, Optimizer
from alignjax.step import init_state
from alignjax.weights.loading import load
from alignjax.weights.safetensors import open_directory, save_companions

Q = "model.layers.1.self_attn.q_proj.weight"
UP = "model.layers.2.mlp.up_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tensors_of(directory: Path) -> dict[str, np.ndarray]:
    return {n: a for file in directory.glob("*.safetensors") for n, a in load_file(file).items()}


def bytes_in(directory: Path) -> dict[str, tuple]:
    found = tensors_of(directory)
    return {name: (one.dtype, one.shape, one.tobytes()) for name, one in found.items()}


def change(directory: Path, work) -> None:
    """Replaces every tensor by what `work(name, array)` gives, in the dtype that it had."""
    for file in directory.glob("*.safetensors"):
        changed = {name: work(name, one).astype(one.dtype) for name, one in load_file(file).items()}
        save_file(changed, file, metadata={"format": "pt"})


def write_pair(root: Path, c=None, dtype="float32", size: float = 1e-3, files: int = 2) -> None:
    """`weak` and `strong`, which differs from it by random numbers of a standard deviation."""
    c, rng = c or tiny_config(tied=False), np.random.default_rng(5)
    for name in ("weak", "strong"):
        write_model(root / name, c, dtype=np.dtype(dtype), files=files)
    change(root / "strong", lambda _, one: one + (size * rng.standard_normal(one.shape)))


def run(root: Path, *arguments: str, alpha: str = "0.3") -> Path:
    """Extrapolates `root`'s pair, unless the arguments name others; gives the output."""
    named = {one.partition("=")[0] for one in arguments}
    defaults = {"--weak": root / "weak", "--strong": root / "strong", "--out": root / "out"}
    line = [f"{key}={value}" for key, value in defaults.items() if key not in named]
    args, rules = command.parse([*line, f"--alpha={alpha}", *arguments])
    command.check(args)
    assert command.expo(args, rules) == 0
    return Path(args.out)


def expected(root: Path, alpha: float, dtype="float32") -> dict[str, tuple]:
    """What `run` should write, by numpy, in the strong side's dtype or another."""
    strong, weak = tensors_of(root / "strong"), tensors_of(root / "weak")
    found = {}
    for name, theta in strong.items():
        wide = theta.astype(np.float32)
        moved = wide + np.float32(alpha) * (wide - weak[name].astype(np.float32))
        found[name] = np.dtype(dtype), moved.shape, moved.astype(dtype).tobytes()
    return found


def rounded_once(numbers: np.ndarray) -> np.ndarray:
    """float64 to bfloat16's numbers in one step, ties to even; none is subnormal or too large."""
    mantissa, exponent = np.frexp(numbers)
    return np.ldexp(np.rint(np.ldexp(mantissa, 8)), exponent - 8)


def random_pair(rng, size: int, kind) -> tuple[np.ndarray, np.ndarray]:
    theta = rng.standard_normal(size) * 0.02
    return theta.astype(np.float32).astype(kind), (theta + 5e-4 * rng.standard_normal(size)).astype(
        np.float32
    ).astype(kind)


def save_run(root: Path, side: str) -> Path:
    """A run's checkpoint of a side, saved from the mesh in use."""
    source, place = open_directory(root / side), root / f"{side}-run"
    manager = checkpoint.open_manager(SFT(run_dir=str(place)))
    state = init_state(load(source), optim.optimizer(Optimizer(), 10))
    checkpoint.save(manager, state, 5, SFT(), None)
    manager.wait_until_finished()
    manager.close()
    save_companions(source, place / "model")
    return place
