"""Measures a reward model on held-out pairs: `python -m alignjax.evaluate --config=rm_eval`.

Started on several processes, as training is, they share the work. Imports no jax: the command
parses its arguments before anything slow is imported.
"""

import json
import sys

from alignjax import checks, command
from alignjax import config as configs
from alignjax.errors import UserError

# What it writes, and how that begins.
_WRITTEN = {"results.json": '{\n  "config": {', "pairs.jsonl": '{"place": "'}
_WRITTEN["sets.jsonl"] = _WRITTEN["pairs.jsonl"]


def main() -> int:
    config = configs.parse("alignjax.evaluate")
    checks.check_evaluation(config)
    return evaluate(config)


def evaluate(config: configs.RMEval) -> int:
    """Scores the rows that training would hold out, and shows and writes what was found."""
    from alignjax.progress import say

    say(f"starting {config.name}")
    import jax
    import numpy as np

    from alignjax import evaluation, processes
    from alignjax.config import RM
    from alignjax.progress import only_first_process, phase
    from alignjax.run import load_shown
    from alignjax.sharding import axis_size, use_mesh
    from alignjax.stages import stage_of

    processes.join(configs.flat(configs.to_dict(config)))
    only_first_process(jax.process_index())
    use_mesh(config.mesh.replica, config.mesh.fsdp, config.mesh.tensor)
    source, data = _prepare(config)
    if config.out:
        processes.on_first(lambda: _check_out(config.out))
    model = load_shown(source)
    with phase("scoring", len(data)) as update:
        rewards = evaluation.score(
            model,
            data,
            config.batch.row_length,
            config.batch.rows_per_device * axis_size("batch"),
            config.compute,
            progress=update,
            scores=stage_of(RM()).scores,
        )
    bad = np.flatnonzero(~np.isfinite(rewards).all(1))
    if len(bad):
        what = "pair" if data.sides == 2 else "set"
        raise UserError(
            f"{data.place(bad[0])}: a reward of this {what} is not finite "
            f"({rewards[bad[0]].tolist()}); set --compute.dtype=float32, or name a model whose "
            "weights are sound."
        )
    if processes.is_first():
        rewards = np.take_along_axis(rewards, same_tokens(data), axis=1)
        found = results(data, rewards)
        show(config, found)
        if config.out:
            _write(config, data, rewards, found)
    return 0


def _check_out(out: str) -> None:
    """Make the directory; refuse to overwrite what no evaluation wrote."""
    from alignjax.files import check_own, location, make_directory

    make_directory(location(out))
    for name, begins in _WRITTEN.items():
        check_own(location(out) / name, begins)


def _prepare(config: configs.RMEval):
    """The reward model's source and the tokens of the pairs; refuses what cannot be measured."""
    from alignjax.data import sources
    from alignjax.data.chat import load_tokenizer
    from alignjax.data.summary import show_rows
    from alignjax.data.tokens import token_set
    from alignjax.processes import check_same, in_turn, on_first
    from alignjax.progress import phase, say
    from alignjax.run import check_sets, check_vocabulary
    from alignjax.sharding import check_divides
    from alignjax.weights.fetch import open_model
    from alignjax.weights.source import decoder_config, open_together

    cache = configs.cache_dir(config)
    on_first(lambda: sources.check(config.data, (True,)))  # before the model may be fetched
    with phase(f"opening {config.model.path}"):
        source = open_together(lambda: open_model(config.model.path, cache))
        tokenizer = load_tokenizer(source.tokenizer_dir, config.model.chat_template)
        if not decoder_config(source).scored:
            raise UserError(
                f"{source.path}: this is a language model, as SFT and DPO make them, which has no "
                "score head; name a reward model, such as the export of an rm run."
            )
        check_divides(decoder_config(source).dimensions())
    with phase("tokenizing held-out rows") as update:
        data = in_turn(
            lambda: token_set(
                config.data, "evaluation", True, tokenizer, source.tokenizer_dir, cache, update
            )
        )
    sets = {"held out": data}
    check_same({"the tokens, held out": data.key})
    show_rows(config.data, sets, parts=(True,))
    if data.bad_rows_file:
        say(f"bad rows are listed in {data.bad_rows_file}")
    title = sources.title(config.data, True)
    if not data.counts["read"]:
        raise UserError(
            f"{title}: no row of it is held out; set --data.eval_split or --data.eval_fraction as "
            "in training, or name it as --data.eval_path to take all of its rows."
        )
    if not len(data):
        raise UserError(
            f"{title}: no row is left to evaluate on; the table above says where they went."
        )
    check_vocabulary(source, tokenizer, sets)
    check_sets(sets, config.batch.row_length)
    return source, data


def same_tokens(data):
    """The first side of an item with the same tokens as each side, int64 [items, S]."""
    import numpy as np

    found = np.tile(np.arange(data.sides), (len(data), 1))
    for item, first in enumerate(data.starts[:-1]):
        seen = {}
        for side in range(data.starts[item + 1] - first):
            start, end = data.offsets[first + side :][:2]
            found[item, side] = seen.setdefault(data.tokens[start:end].tobytes(), side)
    return found


def results(data, rewards) -> dict:
    """Everything that is measured, as results.json holds it; `rewards` is float32 [items, S].

    A set counts with each of its pairs, and an interval counts it once.
    """
    import numpy as np

    from alignjax import evaluation, preferences

    items, *sides = (np.concatenate(parts) for parts in zip(*data.pairs(), strict=True))
    chosen, rejected = (rewards[items, side].astype(np.float64) for side in sides)
    margins, tokens = chosen - rejected, data.trained_counts()
    longer = tokens[items, sides[0]] - tokens[items, sides[1]]
    bins, error = preferences.calibration(margins)
    labels = evaluation.labels(data)
    same = same_tokens(data)
    return {
        "rows": data.counts,
        "same_tokens": int((same[items, sides[0]] == same[items, sides[1]]).sum()),
        "all": preferences.agreement(margins, longer, items),
        "rewards": {
            name: preferences.spread(side)
            for name, side in (("chosen", chosen), ("rejected", rejected))
        },
        "by_source": preferences.agreement_by(labels["source"][items], margins, longer, items),
        "by_user_turns": preferences.agreement_by(labels["turns"][items], margins, longer, items),
        "calibration": {"error": error, "bins": [one._asdict() for one in bins]},
    }


def show(config: configs.RMEval, found: dict) -> None:
    """Prints the accuracies and the calibration; a subset that is all pairs is left out."""
    from rich.table import Table

    from alignjax.progress import console

    table = Table(title=f"{config.name}: {config.model.path}", title_justify="left")
    table.add_column("held-out pairs", overflow="fold")
    for name in ("pairs", "accuracy [95 %]", "longer wins [95 %]", "mean margin"):
        table.add_column(name, justify="right", overflow="fold")
    subsets = {"all": found["all"]}
    if len(found["by_source"]) > 1:
        named = found["by_source"].items()
        subsets |= {f"source {name}" if name else "no source": part for name, part in named}
    if len(found["by_user_turns"]) > 1:
        subsets |= {_turns(int(n)): part for n, part in found["by_user_turns"].items()}
    for title, part in subsets.items():
        shares = (_share(part, name) for name in ("accuracy", "longer_wins"))
        table.add_row(title, f"{part['pairs']:,}", *shares, f"{part['margin']:.4f}")
    console.print(table)
    if sets := found["all"].get("sets"):
        console.print(f"these are the pairs of {sets:,} sets, and an interval counts each set once")
    if same := found["same_tokens"]:
        console.print(f"pairs whose sides have the same tokens, which count as ties: {same:,}")
    for name, side in found["rewards"].items():
        spread = ", ".join(f"{what} {value:.4f}" for what, value in side.items())
        console.print(f"rewards of {name} answers: {spread}")
    calibration = found["calibration"]
    title = f"calibration: expected error {calibration['error']:.1%}"
    table = Table(title=title, title_justify="left")
    for name in ("confidence", "pairs", "mean confidence", "accuracy"):
        table.add_column(name, justify="right")
    for one in calibration["bins"]:
        means = (f"{one[name]:.1%}" for name in ("confidence", "accuracy"))
        table.add_row(f"{one['low']:.0%} to {one['high']:.0%}", f"{one['pairs']:,}", *means)
    console.print(table)


def _turns(count: int) -> str:
    if not count:
        return "prompt of plain text"
    return f"prompt of {count} user turn{'s' if count > 1 else ''}"


def _share(part: dict, name: str) -> str:
    low, high = part[f"{name}_interval"]
    return f"{part[name]:.1%} [{low:.1%}, {high:.1%}]"


def _write(config: configs.RMEval, data, rewards, found: dict) -> None:
    """Writes a line for each item, of pairs.jsonl or sets.jsonl, and then results.json."""
    from alignjax.files import location, write_whole
    from alignjax.progress import say

    directory = location(config.out)
    lengths, ranks = data.trained_counts(), data.by_item(data.ranks)
    name = "pairs.jsonl" if data.sides == 2 else "sets.jsonl"
    lines = []
    for i in range(len(data)):
        line = {"place": data.place(i), "source": data.sources[data.source[i]]}
        line |= {"user_turns": int(data.turns[i])}
        if data.sides == 2:
            for side, which in enumerate(("chosen", "rejected")):
                line |= {which: float(rewards[i, side]), f"{which}_tokens": int(lengths[i, side])}
        else:  # from the best to the worst
            own = ranks[i] > 0
            line |= {"ranks": ranks[i][own].tolist(), "rewards": rewards[i][own].tolist()}
            line |= {"tokens": lengths[i][own].tolist()}
        lines.append(json.dumps(line) + "\n")
    write_whole(directory / name, "".join(lines))
    whole = {"config": configs.to_dict(config)} | found
    write_whole(directory / "results.json", json.dumps(whole, indent=2) + "\n")
    say(f"written: {directory}/results.json, {directory}/{name}")


if __name__ == "__main__":
    sys.exit(command.run(main))
