"""Everything a run needs before its first step: model source, tokens, plan, reference."""

import json
import math
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path

import jax
import numpy as np
import optax

from alignjax import companions, evaluation, lock, optim, reference
from alignjax import config as configs
from alignjax.data import sources
from alignjax.data.batches import PackedSteps, packed_steps
from alignjax.data.chat import load_tokenizer, special_ids
from alignjax.data.mixture import epoch_items
from alignjax.data.packing import plan_training
from alignjax.data.summary import list_bad_rows, show_rows
from alignjax.data.tokens import token_set
from alignjax.data.tokenset import TokenSet
from alignjax.errors import UserError
from alignjax.files import read_json, remove_files, whole_directory, write_whole
from alignjax.models.decoder import Decoder
from alignjax.processes import check_same, in_turn, is_first, on_first
from alignjax.progress import phase, say
from alignjax.resume import check_length, check_model, check_settings, record
from alignjax.reward_source import reward_source
from alignjax.sharding import axis_size, check_divides, local_rows
from alignjax.stages import Stage, stage_of
from alignjax.weights.card import model_card, read_settings
from alignjax.weights.fetch import open_model
from alignjax.weights.loading import load
from alignjax.weights.safetensors import save_companions
from alignjax.weights.source import Source, decoder_config, open_together, size_of, watched


@dataclass(frozen=True)
class Run:
    """A run as it was planned; nothing here changes while it trains."""

    config: configs.Training
    stage: Stage
    directory: Path
    source: Source
    reference: Source  # another one only where reference.path names it
    tokenizer: object
    train: TokenSet
    held_out: TokenSet  # empty where no row is held out
    epoch_items: np.ndarray  # int64 [m], what each epoch trains on
    steps: PackedSteps
    rows: int  # of a micro-batch

    def sets(self) -> dict[str, TokenSet]:
        """The data by what a user calls them."""
        return {"training": self.train, "held out": self.held_out}

    def unit(self) -> str:
        """What a user calls the items: "sequences", "pairs", or "sets" where some are larger."""
        larger = max(part.sides for part in self.sets().values()) > 2
        return "sets" if larger else self.stage.unit

    def eos_ids(self) -> list[int]:
        """Every token that ends an answer."""
        return companions.eos_ids(self.source, self.tokenizer)

    def optimizer(self) -> optax.GradientTransformation:
        words = None
        if isinstance(self.config, configs.SFT) and self.config.learned_words == "special":
            words = special_ids(self.tokenizer)
        return optim.optimizer(self.config.optimizer, len(self.steps), words)

    def companions(self) -> dict[str, str]:
        """Files beside the weights that are not the source's, name -> text."""
        template = self.config.model.chat_template
        return companions.of_trained(self.source, self.tokenizer, template)

    def beside_export(self) -> dict[str, str]:
        """The same and the model card."""
        scored = decoder_config(self.source).scored
        return {"README.md": model_card(configs.to_dict(self.config), scored)} | self.companions()


_ARRAYS = ("ref_train", "ref_held_out", "logps_held_out")  # of a baseline
_STARTED = "started.txt"
_ABOUT = "about.json"  # written with them: what they belong to


@dataclass(frozen=True)
class Baseline:
    """What is known of the model before training, kept in the run directory for a resumed run."""

    weights: str  # the model's fingerprint
    reference: str  # the reference's
    ref_train: np.ndarray | None  # float32 [items, S]
    ref_held_out: np.ndarray | None
    logps_held_out: np.ndarray | None  # or rewards, of the model before its first step

    def start(self) -> dict[str, str]:
        """What each checkpoint says of the weights that the run began with."""
        return {"weights": self.weights, "reference": self.reference}


def prepare(config: configs.Training, step: int) -> Run:
    """Plans the run as `planned` does, and readies its directory.

    `step` is where the run directory stands. A directory in which nothing is saved yet is begun
    anew where the settings have changed; otherwise ValueError says what differs.
    """
    directory = configs.run_dir(config)
    on_first(lambda: check_settings(config, directory, step))
    run = planned(config)
    plan, lengths = run.steps.plan, run.train.lengths()
    on_first(lambda: check_length(config, directory, step, plan, lengths, run.epoch_items))
    if not step:
        on_first(lambda: _begin(run))
    else:
        on_first(lambda: check_model(directory, step, run.source))
    for line in described(run):
        say(line)
    return run


def planned(config: configs.Training, weights: bool = True) -> Run:
    """Opens the model, tokenizes, and plans every step; prints what became of the rows.

    Writes caches alone, and nothing into the run directory. Without `weights` the model is opened
    as far as its config and tokenizer go.
    """
    stage, cache = stage_of(config), configs.cache_dir(config)
    on_first(lambda: sources.check(config.data))  # before the model, which may be fetched
    with phase(f"opening {config.model.path}"):
        source = open_together(lambda: open_model(config.model.path, cache, weights=weights))
        started = datetime.fromisoformat(on_first(lambda: _started(configs.run_dir(config))))
        tokenizer = load_tokenizer(source.tokenizer_dir, config.model.chat_template, started)
        if stage.name == "rm":
            source = reward_source(source, tokenizer)
        else:
            _check_speaks(source)
        check_divides(decoder_config(source).dimensions())
        other = source
        if isinstance(config, configs.DPO) and (path := config.reference.path):
            other = in_turn(lambda: open_model(path, cache, "reference.path", weights))
            _check_speaks(other)
            check_divides(decoder_config(other).dimensions())
            if load_tokenizer(other.tokenizer_dir).get_vocab() != tokenizer.get_vocab():
                raise UserError(
                    f"reference.path={path}: its tokenizer has other tokens than that of "
                    f"{source.path}; name a model with the same tokenizer."
                )

    def tokenized(held_out: bool) -> TokenSet:
        with phase("tokenizing " + ("held-out rows" if held_out else "training rows")) as update:
            return token_set(
                config.data, stage.name, held_out, tokenizer, source.tokenizer_dir, cache, update
            )

    train, held_out = (in_turn(partial(tokenized, held_out)) for held_out in (False, True))
    sets = {"training": train, "held out": held_out}
    check_same({f"the tokens, {name}": part.key for name, part in sets.items()})
    show_rows(config.data, sets)
    for model in (source, other):
        check_vocabulary(model, tokenizer, sets)
    check_sets(sets, config.batch.row_length)
    if not len(train):
        raise UserError(
            f"{config.data.path}: no row is left to train on; the table above says where they went."
        )
    if held_out.counts["read"] and not len(held_out):
        raise UserError(
            f"{config.data.eval_path or config.data.path}: no row is left to evaluate on; the "
            "table above says where they went."
        )
    if config.checkpoint.best and not len(held_out):
        raise UserError(
            f"checkpoint.best={config.checkpoint.best!r}: no row is held out, so there is nothing "
            "to measure; set data.eval_path or data.eval_fraction."
        )
    epoch = epoch_items(train, config.data, config.seed)
    if not len(epoch):
        raise UserError(f"data.weights={config.data.weights} leaves no row to train on.")
    plan = plan_training(train.lengths(), config.batch, config.seed, epoch)
    rows = config.batch.rows_per_device * axis_size("batch")
    return Run(
        config,
        stage,
        configs.run_dir(config),
        source,
        other,
        tokenizer,
        train,
        held_out,
        epoch,
        packed_steps(train, plan, rows, local=local_rows(rows)),
        rows,
    )


def _started(directory: Path) -> str:
    """Return the time at which a run began, whose date its chat template writes ever after."""
    file = directory / _STARTED
    if not file.is_file():
        return datetime.now().isoformat()
    try:
        return datetime.fromisoformat(file.read_text()).isoformat()
    except ValueError:
        said = f"write the time at which the run began into it, as {datetime.now().isoformat()}."
        raise UserError(f"{file}: it holds no time; {said}") from None


def _check_speaks(source: Source) -> None:
    if decoder_config(source).scored:
        raise UserError(
            f"{source.path}: this is a reward model, which has no head that gives words; name a "
            "language model."
        )


def check_vocabulary(source: Source, tokenizer, sets: dict[str, TokenSet]) -> None:
    """Refuses tokens that the embedding has no row for: they would be trained as others."""
    vocab = decoder_config(source).vocab_size
    worst = max(part.largest_token for part in sets.values())
    if worst >= vocab:
        raise UserError(
            f"{source.path}: the tokenizer gives token {worst} "
            f"({tokenizer.convert_ids_to_tokens(worst)!r}), but the embedding has {vocab} rows; "
            "use the tokenizer that belongs to the model, or resize the embedding."
        )


def check_sets(sets: dict[str, TokenSet], row_length: int) -> None:
    """Refuses a set that is longer than a row: its loss needs its rewards on one device."""
    for data in sets.values():
        lengths = data.lengths()
        if not len(lengths) or lengths.max() <= row_length:
            continue
        item = int(lengths.argmax())
        count = data.starts[item + 1] - data.starts[item]
        raise UserError(
            f"{data.place(item)}: its {count} responses have {lengths[item]} tokens, and a set "
            f"lies in one row, of batch.row_length={row_length}: make that {lengths[item]} or "
            "more, or set data.max_responses."
        )


def _begin(run: Run) -> None:
    """Records what is trained; clears what a start under other settings left."""
    config, directory = run.config, run.directory
    there = (directory / "config.json").is_file()
    if there and read_settings(directory) != configs.to_dict(config):
        written = ("baseline/*.npy", "baseline/about.json", "samples/*.json")
        written += ("eval/step-*.npy", "tensorboard/events.out.tfevents.*")
        remove_files(directory, *written)
    record(config, directory)
    write_whole(directory / _STARTED, run.tokenizer.started.isoformat())
    list_bad_rows(directory, run.sets())
    save_companions(run.source, directory / "model", run.companions())


def described(run: Run) -> list[str]:
    """What is trained and what a step holds, in lines for a user."""
    steps, plan, config = run.steps, run.steps.plan, run.config
    useful = steps.useful_tokens()
    rows = np.diff(plan.steps)
    fill = useful.sum() / (rows.sum() * plan.row_length)
    items = [len(plan.step_items(i)) for i in range(len(plan))]
    epochs = sum(items) / len(run.epoch_items)
    drawn = "" if len(run.epoch_items) == len(run.train) else f" (of {len(run.train)})"
    return [
        f"{run.stage.name}: {len(run.epoch_items)} {run.unit()} to train on{drawn}, "
        f"{len(run.held_out)} held out",
        f"a step: {np.mean(items):.1f} {run.unit()}, {rows.mean():.1f} rows of "
        f"{plan.row_length}, {useful.mean():.0f} tokens, fill {fill:.1%}; {len(plan)} steps, "
        f"{epochs:.2f} epochs, {config.compute.dtype} on {jax.device_count()} "
        f"{jax.devices()[0].platform} device(s)",
        *_left_out(run),
    ]


def _left_out(run: Run) -> list[str]:
    """Of which labels of held-out pairs no metrics are logged, because there are too many."""
    most, lines = evaluation.LOGGED_LABELS, []
    for kind, own in evaluation.labels(run.held_out).items():
        count = len(evaluation.logged_labels(own))
        if run.stage.unit == "pairs" and count > most:
            lines.append(
                f"held out: metrics by {kind} are logged for {most} of {count}, those with the "
                "most pairs"
            )
    return lines


def load_shown(source: Source) -> Decoder:
    """A source's weights on the mesh; shows how far it is."""
    size = math.ceil(size_of(source) / jax.process_count() / 1e9)
    with phase("loading weights (GB)", size) as update:
        return jax.block_until_ready(load(watched(source, update)))


def load_reference(run: Run, start: dict[str, str]) -> tuple[Decoder, str]:
    """Load the reference, and return it with its fingerprint.

    Raises UserError where `start` has another one.
    """
    model = load_shown(run.reference)
    weights = reference.fingerprint(model)
    if start.get("reference", weights) != weights:
        raise UserError(
            f"{run.reference.path}: it no longer holds the weights that are this run's reference; "
            "bring them back, and the same command goes on."
        )
    return model, weights


def baseline(run: Run, model: Decoder, weights: str, start: dict[str, str]) -> Baseline:
    """Scores the model before training, as it is scored later, and keeps the result.

    `weights` is the model's fingerprint; `start` is what a checkpoint of this run says of it.
    """
    config, policy, ref_weights = run.config, model, weights
    ref_train = ref_held_out = logps = None
    score_args = (config.batch.row_length, run.rows, config.compute)
    if run.reference is not run.source:
        model, ref_weights = load_reference(run, start)
    if run.stage.needs_reference:
        cache = configs.cache_dir(config)
        planned = np.unique(run.steps.plan.items)
        with phase("reference log-probs, training", len(planned)) as update:
            ref_train = reference.reference_logps(
                model, ref_weights, run.train, *score_args, cache, planned, update
            )
        if run.held_out:
            with phase("reference log-probs, held out", len(run.held_out)) as update:
                ref_held_out = reference.reference_logps(
                    model, ref_weights, run.held_out, *score_args, cache, None, update
                )
    if ref_weights == weights:
        logps = ref_held_out  # before its first step the policy is the reference
    del model
    if run.held_out and logps is None:
        with phase("scoring held-out rows", len(run.held_out)) as update:
            logps = evaluation.score(
                policy, run.held_out, *score_args, progress=update, scores=run.stage.scores
            )
    found = Baseline(weights, ref_weights, ref_train, ref_held_out, logps)
    on_first(lambda: lock.check_place(run.directory))
    if is_first():
        with whole_directory(_baseline_dir(run), ("*.npy", _ABOUT)) as partial:
            for name in _ARRAYS:
                if (array := getattr(found, name)) is not None:
                    np.save(partial / f"{name}.npy", array)
            about = {"tokens": _token_keys(run)} | found.start()
            (partial / _ABOUT).write_text(json.dumps(about))
    return found


def is_complete(run: Run, base: Baseline | None) -> bool:
    """Whether a baseline has all that the run needs; a longer run may need more of it."""
    if base is None or not run.stage.needs_reference:
        return base is not None
    return not np.isnan(base.ref_train[np.unique(run.steps.plan.items)]).any()


def stored_baseline(run: Run, start: dict[str, str]) -> Baseline | None:
    """The baseline that an earlier start of this run kept, or None where it is not whole.

    Raises UserError where it is of other data, or of other weights than the checkpoint's `start`.
    """
    directory = _baseline_dir(run)

    def read() -> dict | None:
        try:
            about = read_json(directory / _ABOUT)
        except UserError:
            return None  # the caller computes it again
        if about.get("tokens") != _token_keys(run):
            raise UserError(
                f"{run.directory}: it belongs to a run on other data; choose another --run_dir, or "
                "delete it."
            )
        if any(about.get(key) != value for key, value in start.items()):
            raise UserError(
                f"{directory}: it is of other weights than this run began with; delete it, and it "
                "is made again."
            )
        return about

    if (about := on_first(read)) is None:
        return None
    arrays, compared = [], run.stage.needs_reference
    for name, data in zip(_ARRAYS, (run.train, run.held_out, run.held_out), strict=True):
        shape = (len(data), data.sides)
        arrays.append(reference.stored_array(directory / f"{name}.npy", shape))
        needed = data and (compared or name == "logps_held_out")
        if needed and arrays[-1] is None:
            return None
    return Baseline(about.get("weights", ""), about.get("reference", ""), *arrays)


def _baseline_dir(run: Run) -> Path:
    return run.directory / "baseline"


def _token_keys(run: Run) -> list:
    return [run.train.key, run.held_out.key if run.held_out else None]
