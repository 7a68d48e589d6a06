"""Every knob of a run as frozen dataclasses, and loading a run's config by name.

Imports no jax: a command parses its arguments before anything slow is imported. The comment behind
a field is its help text.
"""

import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

Options = TypeVar("Options")


@dataclass(frozen=True)
class Model:
    path: str = ""  # ORG/NAME of a hub, model directory, GGUF file, or smollm2-135m-instruct
    chat_template: str = ""  # in place of the model's own: a name in alignjax/templates, or a file


@dataclass(frozen=True)
class Compute:
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of activations, matmuls and weight traffic
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"  # of gradients summed over devices
    remat: Literal["none", "dots", "full"] = "full"  # what a layer recomputes in the backward pass
    vocab_chunk: int = 4096  # vocabulary entries whose logits exist at one time
    attention: Literal["auto", "blocks", "splash", "triton"] = "auto"  # TPU splash, GPU triton


@dataclass(frozen=True)
class Mesh:
    replica: int = 1  # devices that hold copies of the weights (data parallel across slices)
    fsdp: int = -1  # devices that share the weights and split the batch; -1: all that are left
    tensor: int = 1  # devices that split heads, MLP and vocabulary


@dataclass(frozen=True)
class Data:
    path: str = ""  # training rows: file, glob, dataset directory or ORG/NAME; commas between many
    eval_path: str = ""  # held-out rows, named in the same way; empty: data.path
    split: str = "train"  # rows to train on, by the dataset's splits or the rows' `split` column
    eval_split: str = "test"  # held-out rows, likewise
    eval_fraction: float = 0.0  # share of prompts held out, by hash, where no `split` column is
    strings: Literal["chat", "plain"] = "chat"  # string columns: turns of a chat, or text as it is
    train_on: Literal["all", "last"] = "all"  # assistant turns of an answer that carry loss
    max_length: int = 1024  # tokens a sequence may have
    overlong: Literal["drop", "truncate", "split"] = "drop"  # sft: longer ones (pairs are dropped)
    on_bad_row: Literal["stop", "skip"] = "stop"  # skip: go on, and list them in RUN_DIR/bad_rows
    cache_dir: str = ""  # token and reference caches; empty: $ALIGNJAX_CACHE or ~/.cache/alignjax


@dataclass(frozen=True)
class Batch:
    pairs: int = 0  # preference pairs a step, packed within the step (rm, dpo)
    sequences: int = 0  # sequences a step, packed within the step (sft)
    rows: int = 0  # full rows a step, packed over the whole epoch
    row_length: int = 2048  # tokens a packed row
    rows_per_device: int = 1  # rows of a micro-batch on each data-parallel device
    epochs: int = 1  # passes over the data
    max_steps: int = 0  # stop, and end the schedule, after so many steps; 0: when the epochs end


@dataclass(frozen=True)
class Optimizer:
    learning_rate: float = 5e-7  # peak
    schedule: Literal["cosine", "linear", "constant"] = "linear"  # after the warm-up
    warmup_ratio: float = 0.1  # share of the steps over which the rate rises from 0
    final_ratio: float = 0.0  # rate at the end, as a share of the peak
    b1: float = 0.9  # decay of AdamW's first moment
    b2: float = 0.95  # decay of AdamW's second moment
    eps: float = 1e-8  # AdamW's denominator
    weight_decay: float = 0.0  # decoupled; matrices only
    clip_norm: float = 1.0  # global gradient norm above which gradients are scaled down


@dataclass(frozen=True)
class Checkpoint:
    every: int = 100  # steps between saves; the last step, and one cut short, is always saved
    keep: int = 2  # latest checkpoints kept
    best: str = ""  # a metric and its better end, e.g. "eval_rewards/accuracies:max": kept as well


@dataclass(frozen=True)
class Log:
    every: int = 1  # steps between lines of metrics.jsonl
    eval_every: int = 100  # steps between evaluations; step 0 and the last are always evaluated


@dataclass(frozen=True)
class Samples:
    prompts: int = 0  # held-out prompts answered before and after training; 0: none
    show: int = 3  # of those, printed at the end
    max_tokens: int = 96  # longest answer, in tokens
    temperature: float = 0.7  # 0: greedy
    batch: int = 64  # prompts answered at one time on each data-parallel device


@dataclass(frozen=True)
class Export:
    dtype: Literal["source", "float32", "bfloat16", "float16"] = "source"  # GGUF's source: float32
    shard_bytes: int = 5_000_000_000  # largest safetensors file, bytes


@dataclass(frozen=True)
class Training:
    """What the runs of every stage have."""

    name: str = ""  # run name
    run_dir: str = ""  # everything the run writes, here or on gs://; empty: runs/NAME
    wandb: bool = False  # log to Weights & Biases as well (its package is needed, WANDB_* apply)
    seed: int = 0  # of the shuffle and of sampled answers
    model: Model = field(default_factory=Model)
    compute: Compute = field(default_factory=Compute)
    mesh: Mesh = field(default_factory=Mesh)
    data: Data = field(default_factory=Data)
    batch: Batch = field(default_factory=Batch)
    optimizer: Optimizer = field(default_factory=Optimizer)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    log: Log = field(default_factory=Log)
    samples: Samples = field(default_factory=Samples)
    export: Export = field(default_factory=Export)


@dataclass(frozen=True)
class SFT(Training):
    """Supervised finetuning on conversations."""

    name: str = "sft"  # run name


@dataclass(frozen=True)
class RM(Training):
    """A reward model from pairs, by the Bradley-Terry model (arXiv 2203.02155, equation 1)."""

    name: str = "rm"  # run name
    centering: float = 0.0  # weight of the mean of (chosen + rejected)^2, which draws rewards to 0


@dataclass(frozen=True)
class DPO(Training):
    """Direct preference optimization on pairs (arXiv 2305.18290)."""

    name: str = "dpo"  # run name
    beta: float = 0.1  # strength of the pull towards the reference
    label_smoothing: float = 0.0  # probability that a preference is flipped (conservative DPO)


def config_dir() -> Path:
    """Where named configs lie: in the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def names() -> dict[str, str]:
    """Named configs, each with the first line of its docstring."""
    found = {}
    for file in sorted(config_dir().glob("[!_]*.py")):
        first = file.read_text(encoding="utf-8").lstrip().removeprefix('"""').split("\n", 1)[0]
        found[file.stem] = first.rstrip('"').strip()
    return found


def load(name: str) -> Training:
    """The `config` of configs/NAME.py, or of the Python file at a path.

    Raises ValueError for a name that does not exist, or a file that holds no config.
    """
    file = Path(name) if name.endswith(".py") else config_dir() / f"{name}.py"
    if not file.is_file():
        raise ValueError(
            f"--config={name}: there is no {file}; give a path ending in .py or one of: "
            f"{', '.join(names())}."
        )
    module_spec = importlib.util.spec_from_file_location(f"alignjax_config_{file.stem}", file)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    config = vars(module).get("config")
    if not isinstance(config, Training):
        raise ValueError(
            f"{file}: set `config` to an SFT(...), RM(...) or DPO(...) of alignjax.config."
        )
    return config


@dataclass(frozen=True)
class NoOptions:
    """Of a command that takes a config and nothing else."""


def parse(command: str, arguments: Sequence[str] | None = None) -> Training:
    """The config that command-line arguments name, with their typed overrides applied."""
    return parse_with(NoOptions(), command, arguments)[1]


def parse_with(
    options: Options, command: str, arguments: Sequence[str] | None = None
) -> tuple[Options, Training]:
    """As `parse`, for a command with options of its own beside the config's keys.

    `options` is a frozen dataclass that holds their defaults; none may be named as a key is.
    """
    import tyro

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name, rest = _take_config(arguments)
    config = DPO() if name is None else load(name)
    _check_names(rest, config, options)
    listing = "Configs:\n" + "\n".join(f"  {key}: {line}" for key, line in names().items())
    usage = f"python -m {command} --config=NAME|PATH [--a.b=value ...]"
    if name is None and not {"-h", "--help"} & set(rest):
        raise ValueError(f"which run? {usage}\n{listing}")
    about = f"{usage}\n\n{listing}\n\n"
    about += "Keys of a dpo run:" if name is None else f"Keys and defaults of {name}:"
    unnamed = tyro.conf.arg(name="")  # no prefix before the names of its fields
    return tyro.cli(
        tuple[Annotated[type(options), unnamed], Annotated[type(config), unnamed]],
        prog=f"python -m {command}",
        description=about,
        default=(options, config),
        args=rest,
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.SuppressFixed),
    )


def _check_names(arguments: list[str], config: Training, options) -> None:
    """Refuses an override of a key that does not exist, with the keys that do."""
    keys = set(flat(to_dict(options) | to_dict(config)))
    for argument in arguments:
        key = argument.partition("=")[0].removeprefix("--").replace("-", "_")
        if argument.startswith("--") and key not in keys and key != "help":
            section = key.partition(".")[0]
            near = [k for k in keys if k.startswith(f"{section}.")] or [
                k.partition(".")[0] + ".*" if "." in k else k for k in keys
            ]
            raise ValueError(
                f"--{key}: there is no such key; there are {', '.join(sorted(set(near)))}."
            )


def flat(nested: dict, prefix: str = "") -> dict[str, object]:
    """Every key of `to_dict(config)`, dotted, with its value."""
    found = {}
    for name, value in nested.items():
        key = prefix + name
        found |= flat(value, f"{key}.") if isinstance(value, dict) else {key: value}
    return found


def _take_config(arguments: list[str]) -> tuple[str | None, list[str]]:
    """Splits `--config=NAME` or `--config NAME` from the other arguments."""
    name, rest, pending = None, [], False
    for argument in arguments:
        if pending:
            name, pending = argument, False
        elif argument == "--config":
            pending = True
        elif argument.startswith("--config="):
            name = argument.removeprefix("--config=")
        else:
            rest.append(argument)
    return name, rest


_ANY = float("inf")
# What a number may be: the least and the most.
_BOUNDS = {
    "seed": (0, 2**32 - 1),
    "beta": (0, _ANY),
    "label_smoothing": (0, 0.5),
    "centering": (0, _ANY),
    "compute.vocab_chunk": (1, _ANY),
    "batch.pairs": (0, _ANY),
    "batch.sequences": (0, _ANY),
    "batch.rows": (0, _ANY),
    "batch.row_length": (1, _ANY),
    "batch.rows_per_device": (1, _ANY),
    "batch.epochs": (1, _ANY),
    "batch.max_steps": (0, _ANY),
    "optimizer.learning_rate": (0, _ANY),
    "optimizer.warmup_ratio": (0, 1),
    "optimizer.final_ratio": (0, 1),
    "optimizer.b1": (0, 1),
    "optimizer.b2": (0, 1),
    "optimizer.eps": (0, _ANY),
    "optimizer.weight_decay": (0, _ANY),
    "optimizer.clip_norm": (0, _ANY),
    "checkpoint.every": (1, _ANY),
    "checkpoint.keep": (1, _ANY),
    "log.every": (1, _ANY),
    "log.eval_every": (1, _ANY),
    "samples.prompts": (0, _ANY),
    "samples.show": (0, _ANY),
    "samples.max_tokens": (1, _ANY),
    "samples.temperature": (0, _ANY),
    "samples.batch": (1, _ANY),
    "export.shard_bytes": (1, _ANY),
}


def check(config: Training) -> None:
    """Refuses values that cannot work together, before anything is loaded."""
    values = flat(to_dict(config))
    for key, (low, high) in _BOUNDS.items():
        value = values.get(key, low)
        if not low <= value <= high:
            most = "" if high == _ANY else f" and at most {high:g}"
            raise ValueError(f"{key}={value}: it must be at least {low:g}{most}.")
    batch = config.batch
    own = "sequences" if isinstance(config, SFT) else "pairs"
    other = "sequences" if own == "pairs" else "pairs"
    if getattr(batch, other):
        raise ValueError(f"batch.{other} is not for this stage; use batch.{own} or batch.rows.")
    if bool(getattr(batch, own)) == bool(batch.rows):
        raise ValueError(f"set exactly one of batch.{own} and batch.rows to more than 0.")
    if isinstance(config, RM) and config.samples.prompts:
        raise ValueError("samples.prompts is not for this stage: a reward model gives no answers.")
    if not config.model.path:
        raise ValueError("model.path is empty: name a model directory, ORG/NAME or GGUF file.")
    if not config.data.path:
        raise ValueError("data.path is empty: name files, a dataset directory or ORG/NAME.")
    if config.data.max_length < 2:
        raise ValueError(
            f"data.max_length={config.data.max_length}: it must be at least 2, for a token and "
            "what comes before it."
        )
    if not 0 <= config.data.eval_fraction < 1:
        raise ValueError(
            f"data.eval_fraction={config.data.eval_fraction}: it must be at least 0 and below 1."
        )
    sides = 2 if own == "pairs" else 1  # both sides of a pair lie in one row
    if config.data.max_length * sides > batch.row_length:
        raise ValueError(
            f"data.max_length={config.data.max_length} does not fit {sides} to a row of "
            f"batch.row_length={batch.row_length}: make it {batch.row_length // sides} or less."
        )


def to_dict(config) -> dict:
    """A config as nested plain values, for config.json."""
    return {
        item.name: to_dict(value) if is_dataclass(value) else value
        for item in fields(config)
        for value in [getattr(config, item.name)]
    }


def run_dir(config: Training) -> Path:
    from alignjax.files import location

    return location(config.run_dir or f"runs/{config.name}")


def cache_dir(config: Training) -> Path:
    """Where downloads, tokens and reference log-probs are kept between runs."""
    default = os.environ.get("ALIGNJAX_CACHE") or Path.home() / ".cache" / "alignjax"
    return Path(config.data.cache_dir or default).expanduser()
