"""Every knob of a run as frozen dataclasses, and loading a run's config by name.

Imports no jax: a command parses its arguments before anything slow is imported. The comment behind
a field is its help text.
"""

import argparse
import os
import runpy
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from alignjax.errors import UserError
from alignjax.validate import Bound, check

Options = TypeVar("Options")

_MOST = 2**31 - 1  # of a count
Count = Annotated[int, Bound(0, _MOST)]
Positive = Annotated[int, Bound(1, _MOST)]
Length = Annotated[int, Bound(1, 2**20)]  # tokens
Few = Annotated[int, Bound(1, 2**16)]
Large = Annotated[float, Bound(0, 1e6)]
Share = Annotated[float, Bound(0, 1)]
Flip = Annotated[float, Bound(0, 0.5)]  # a probability
Bytes = Annotated[int, Bound(1, 2**63 - 1)]
Left = Annotated[int, Bound(-1, _MOST)]  # -1: what is left
Part = Annotated[float, Bound(0, below=1)]  # less than all


@dataclass(frozen=True)
class Model:
    path: str = ""  # ORG/NAME of a hub, model directory, GGUF file, or smollm2-135m-instruct
    chat_template: str = ""  # in place of the model's own: a name in alignjax/templates, or a file


@dataclass(frozen=True)
class Compute:
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of activations, matmuls and weight traffic
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"  # of gradients summed over devices
    remat: Literal["none", "dots", "full", "offload"] = "full"  # what the backward pass makes again
    vocab_chunk: Positive = 4096  # vocabulary entries whose logits exist at one time
    attention: Literal["auto", "blocks", "splash", "triton"] = "auto"  # TPU splash, GPU triton


@dataclass(frozen=True)
class Mesh:
    replica: Positive = 1  # devices that hold copies of the weights (data parallel across slices)
    fsdp: Left = -1  # devices that share the weights and split the batch; -1: all that are left
    tensor: Positive = 1  # devices that split heads, MLP and vocabulary


@dataclass(frozen=True)
class Data:
    path: str = ""  # training rows: file, glob, dataset directory or ORG/NAME; commas between many
    eval_path: str = ""  # held-out rows, named in the same way; empty: data.path
    split: str = "train"  # rows to train on, by the dataset's splits or the rows' `split` column
    eval_split: str = "test"  # held-out rows, likewise
    eval_fraction: Part = 0.0  # share of prompts held out, by hash, where no `split` column is
    strings: Literal["chat", "plain"] = "chat"  # string columns: turns of a chat, or text as it is
    train_on: Literal["all", "last", "everything"] = "all"  # turns of an answer, or (sft) all text
    max_length: Annotated[int, Bound(2, 2**20)] = 1024  # tokens a sequence may have
    max_prompt_length: Count = 0  # of a pair (or set) too long, cut from the left; 0: it is dropped
    weights: str = ""  # of data.path's names, as "1,0.1": 0.1 keeps a tenth, 2 takes all twice
    max_responses: Count = 0  # rm: of a set, its best, its worst and some between; 0: all
    max_pairs: Count = 0  # pairs (rm: or sets) chosen to train on; 0: all
    select: Literal["random", "longest", "shortest", "score_gap"] = "random"  # which, for max_pairs
    overlong: Literal["drop", "truncate", "split"] = "drop"  # sft: longer ones (pairs are dropped)
    max_row_bytes: Annotated[int, Bound(2, _MOST)] = 8_000_000  # a larger row is a bad one
    on_bad_row: Literal["stop", "skip"] = "stop"  # skip: go on, and list them in RUN_DIR/bad_rows
    cache_dir: str = ""  # token and reference caches; empty: $ALIGNJAX_CACHE or ~/.cache/alignjax


@dataclass(frozen=True)
class Batch:
    pairs: Count = 0  # preference pairs (rm: or sets) a step, packed within the step (rm, dpo)
    sequences: Count = 0  # sequences a step, packed within the step (sft)
    rows: Count = 0  # full rows a step, packed over the whole epoch
    row_length: Length = 2048  # tokens a packed row
    rows_per_device: Few = 1  # rows of a micro-batch on each data-parallel device
    epochs: Annotated[int, Bound(1, 10**6)] = 1  # passes over the data
    max_steps: Count = 0  # last step, where the schedule ends too; 0: when the epochs end


@dataclass(frozen=True)
class Optimizer:
    rule: Literal["adamw", "adafactor", "lion"] = "adamw"  # adafactor: memory of the weights alone
    learning_rate: Large = 5e-7  # peak
    schedule: Literal["cosine", "linear", "constant"] = "linear"  # after the warm-up
    warmup_ratio: Share = 0.1  # share of the steps over which the rate rises from 0
    final_ratio: Share = 0.0  # rate at the end, as a share of the peak
    b1: Part = 0.9  # decay of AdamW's first moment; of Lion's step
    b2: Part = 0.95  # decay of AdamW's second moment; of Lion's moment
    moment_dtype: Literal["float32", "bfloat16"] = "float32"  # of AdamW's first moment, and Lion's
    eps: Annotated[float, Bound(most=1, above=0)] = 1e-8  # AdamW's denominator
    weight_decay: Large = 0.0  # decoupled; matrices only
    clip_norm: Large = 1.0  # global gradient norm above which gradients are scaled down
    ema_decay: Part = 0.0  # of an average of the weights, which is then the result; 0: none


@dataclass(frozen=True)
class Checkpoint:
    every: Positive = 100  # steps between saves; the last step, and one cut short, is always saved
    keep: Positive = 2  # latest checkpoints kept
    best: str = ""  # a metric and its better end, e.g. "eval_rewards/accuracies:max": kept as well


@dataclass(frozen=True)
class Log:
    every: Positive = 1  # steps between lines of metrics.jsonl
    eval_every: Positive = 100  # steps between evaluations, besides one at step 0 and at the end


@dataclass(frozen=True)
class Samples:
    prompts: Count = 0  # held-out prompts answered before and after training; 0: none
    show: Count = 3  # of those, printed at the end
    max_tokens: Length = 96  # longest answer, in tokens
    temperature: Large = 0.7  # 0: greedy
    batch: Positive = 64  # prompts answered at one time on each data-parallel device
    kl: bool = False  # dpo: answer at each evaluation, and measure KL to the reference, read again


@dataclass(frozen=True)
class Export:
    dtype: Literal["source", "float32", "bfloat16", "float16"] = "source"  # GGUF's source: float32
    shard_bytes: Bytes = 5_000_000_000  # largest safetensors file, bytes


@dataclass(frozen=True)
class Training:
    """What the runs of every stage have."""

    name: str = ""  # run name
    run_dir: str = ""  # everything the run writes, here or on gs://; empty: runs/NAME
    wandb: bool = False  # log to Weights & Biases as well (its package is needed, WANDB_* apply)
    seed: Annotated[int, Bound(0, 2**32 - 1)] = 0  # of the shuffle and of sampled answers
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
    learned_words: Literal["all", "special"] = "all"  # rows of the embedding that learn


@dataclass(frozen=True)
class RM(Training):
    """A reward model from pairs or sets, by Bradley and Terry (arXiv 2203.02155, equation 1)."""

    name: str = "rm"  # run name
    centering: Large = 0.0  # weight of the mean of (chosen + rejected)^2, which draws rewards to 0


@dataclass(frozen=True)
class Reference:
    path: str = ""  # model that the policy is held to, named as model.path is; empty: model.path


@dataclass(frozen=True)
class DPO(Training):
    """Direct preference optimization on pairs (arXiv 2305.18290)."""

    name: str = "dpo"  # run name
    beta: Large = 0.1  # strength of the pull towards the reference
    loss: Literal["sigmoid", "robust", "hinge", "ipo", "simpo"] = "sigmoid"  # of a pair
    label_smoothing: Flip = 0.0  # probability that a preference is wrong (conservative DPO)
    margin: Large = 0.0  # by which the chosen reward should be ahead (SimPO's gamma)
    sft_weight: Large = 0.0  # of the chosen sides' loss a token, added to that of pairs
    reference: Reference = field(default_factory=Reference)


@dataclass(frozen=True)
class Rows:
    row_length: Length = 2048  # tokens a packed row
    rows_per_device: Few = 4  # rows scored at one time on each data-parallel device


@dataclass(frozen=True)
class RMEval:
    """How often a reward model prefers the better side of held-out pairs, those of sets too."""

    name: str = "rm_eval"  # what its tables are called
    out: str = ""  # directory for results.json and pairs.jsonl, here or on gs://; empty: none
    model: Model = field(default_factory=Model)
    compute: Compute = field(default_factory=Compute)
    mesh: Mesh = field(default_factory=Mesh)
    data: Data = field(default_factory=Data)
    batch: Rows = field(default_factory=Rows)


# Each command, and the configs it takes; the last is the one whose keys a bare --help lists.
COMMANDS = {
    "alignjax.train": (SFT, RM, DPO),
    "alignjax.inspect": (SFT, RM, DPO),
    "alignjax.evaluate": (RMEval,),
}


def config_dir() -> Path:
    """Where named configs lie: in the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def names(command: str = "alignjax.train") -> dict[str, str]:
    """Named configs of a command, each with a line that says what it is."""
    kinds = COMMANDS[command]
    return {name: line for name, (line, config) in _named().items() if isinstance(config, kinds)}


def load(name: str, command: str = "alignjax.train") -> Training | RMEval:
    """The named config of configs/, or the `config` of the Python file at a path.

    Raises UserError for a name that does not exist, or a file that holds no config of the command.
    """
    if name.endswith(".py") and Path(name).is_file():
        config = _run(Path(name)).get("config")
    elif name in (named := _named()):
        config = named[name][1]
    else:
        raise UserError(
            f"--config={name}: there is no such config or file; give a path ending in .py or one "
            f"of: {', '.join(names(command))}."
        )
    if type(config) in COMMANDS[command]:
        check(config, type(config), name)
        return config
    wanted = " or ".join(f"{kind.__name__}(...)" for kind in COMMANDS[command])
    for other, kinds in COMMANDS.items():
        if type(config) in kinds:
            raise UserError(
                f"{name}: its config is for python -m {other}; {command} takes {wanted}."
            )
    raise UserError(f"{name}: set `config` to {wanted} of alignjax.config.")


def _run(file: Path) -> dict:
    """Run a config file and return its names. Raises UserError, with the line, where it fails."""
    try:
        return runpy.run_path(str(file))
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [at.lineno for at in frames if at.filename == str(file)]
        lines += [error.lineno] if isinstance(error, SyntaxError) else []
        place = f"{file}, line {lines[-1]}" if lines and lines[-1] else f"{file}"
        why = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise UserError(f"{place}: this config does not run ({why}); mend the file.") from None


def _named() -> dict[str, tuple[str, Training | RMEval]]:
    """Name -> (line, config): each file's `config` by the file's name, or its table `configs`."""
    found = {}
    for file in sorted(config_dir().glob("[!_]*.py")):
        values = _run(file)
        line = (values["__doc__"] or "").partition("\n")[0]
        found |= values.get("configs", {file.stem: (line, values.get("config"))})
    return found


@dataclass(frozen=True)
class NoOptions:
    """Of a command that takes a config and nothing else."""


def parse(command: str, arguments: Sequence[str] | None = None) -> Training | RMEval:
    """The config that command-line arguments name, with their typed overrides applied."""
    return parse_with(NoOptions(), command, arguments)[1]


def parse_with(
    options: Options, command: str, arguments: Sequence[str] | None = None
) -> tuple[Options, Training | RMEval]:
    """As `parse`, for a command with options of its own beside the config's keys.

    `options` is a frozen dataclass that holds their defaults; none may be named as a key is.
    """
    import tyro

    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name, rest = _take_config(arguments)
    config = COMMANDS[command][-1]() if name is None else load(name, command)
    _check_names(rest, config, options)
    listing = "Configs:\n" + "\n".join(f"  {key}: {line}" for key, line in names(command).items())
    usage = f"python -m {command} --config=NAME|PATH [--a.b=value ...]"
    if name is None and not {"-h", "--help"} & set(rest):
        raise UserError(f"which run? {usage}\n{listing}")
    about = f"{usage}\n\n{listing}\n\n"
    about += f"Keys of a {config.name} run:" if name is None else f"Keys and defaults of {name}:"
    unnamed = tyro.conf.arg(name="")  # no prefix before the names of its fields
    return tyro.cli(
        tuple[Annotated[type(options), unnamed], Annotated[type(config), unnamed]],
        prog=f"python -m {command}",
        description=about,
        default=(options, config),
        args=rest,
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.SuppressFixed),
    )


def _check_names(arguments: list[str], config: Training | RMEval, options) -> None:
    """Refuses an override of a key that does not exist, with the keys that do."""
    keys = set(flat(to_dict(options) | to_dict(config)))
    for argument in arguments:
        key = argument.partition("=")[0].removeprefix("--").replace("-", "_")
        if argument.startswith("--") and key not in keys and key != "help":
            section = key.partition(".")[0]
            near = [k for k in keys if k.startswith(f"{section}.")] or [
                k.partition(".")[0] + ".*" if "." in k else k for k in keys
            ]
            raise UserError(
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
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", nargs="?")
    found, rest = parser.parse_known_args(arguments)
    return found.config, rest


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


def cache_dir(config: Training | RMEval) -> Path:
    """Where downloads, tokens and reference log-probs are kept between runs."""
    from alignjax.files import location

    path = config.data.cache_dir or os.environ.get("ALIGNJAX_CACHE") or "~/.cache/alignjax"
    if "://" in path:
        raise UserError(f"data.cache_dir={path}: caches lie on a disk; name a directory of one.")
    return location(path)
