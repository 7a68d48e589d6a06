"""Which alpha each tensor has: one for all, or by module, layer and name. Imports no jax."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import translate
from pathlib import Path
from typing import Annotated, NamedTuple

from alignjax.errors import UserError
from alignjax.validate import Bound, check

Alpha = Annotated[float, Bound(-1000, 1000)]
GROUPS = {
    "attention": ("q", "k", "v", "o", "q_bias", "k_bias", "v_bias"),
    "mlp": ("gate", "up", "down"),
    "embeddings": ("embed", "head", "score"),
    "norms": ("attn_norm", "mlp_norm", "q_norm", "k_norm", "norm"),
}
_TABLE = 1 << 20  # bytes of a table's file


@dataclass(frozen=True)
class Rules:
    """Departures from one alpha for all; where several name a tensor, the last counts."""

    layers: str = ""  # a number, or one for each layer with commas between
    attention: str = ""  # a number, of q, k, v, o and their biases
    mlp: str = ""  # of gate, up and down
    embeddings: str = ""  # of the embedding, the head and a reward model's score
    norms: str = ""  # of every norm's scale
    table: str = ""  # JSON, or a file of it: {"part of a tensor's name, with *": alpha}; first wins


class Place(NamedTuple):
    """Where a tensor stands in the model."""

    leaf: str  # "blocks.q"
    layer: int | None  # from 0; None outside the layers

    @property
    def group(self) -> str:
        part = self.leaf.removeprefix("blocks.")
        return next(name for name, parts in GROUPS.items() if part in parts)


def typed(text: str) -> dict[str, float]:
    """The alphas of "0.1,0.2", each under the text that the user wrote."""
    found = {}
    for one, number in zip(text.split(","), _numbers(text, "--alpha"), strict=True):
        if number in found.values():
            raise UserError(f"--alpha={text}: {one.strip()} is there twice; name each alpha once.")
        found[one.strip()] = number
    return found


def _numbers(text: str, key: str) -> list[float]:
    try:
        found = [float(one) for one in text.split(",")]
    except ValueError:
        raise UserError(f"{key}={text[:60]}: write numbers, such as 0.3 or 0.1,0.2.") from None
    for number in found:
        check(number, Alpha, "", key)
    return found


def loaded(rules: Rules) -> Rules:
    """The rules, checked, with the table's text where it lies in a file."""
    from alignjax.files import read_json

    check(rules, Rules, "", "--alpha")
    if not rules.table or rules.table.lstrip().startswith("{"):
        return rules
    file = Path(rules.table)
    if file.is_file() and file.stat().st_size > _TABLE:
        raise UserError(f"--alpha.table={file}: it is larger than {_TABLE:,} bytes; shorten it.")
    return replace(rules, table=json.dumps(read_json(file, dict[str, Alpha])))


def of_tensors(rules: Rules, alpha: float, places: Mapping[str, Place]) -> dict[str, float]:
    """The alpha of each tensor by rules that are `loaded`.

    Raises UserError where a rule has no meaning, or no tensor.
    """
    layers = 1 + max(place.layer for place in places.values() if place.layer is not None)
    listed = _spread(rules.layers, "--alpha.layers", layers)
    groups = {name: _spread(getattr(rules, name), f"--alpha.{name}", 1) for name in GROUPS}
    table = _table(rules.table, places) if rules.table else []
    found = {}
    for name, place in places.items():
        own = listed[place.layer] if listed and place.layer is not None else alpha
        own = groups[place.group][0] if groups[place.group] else own
        found[name] = next((one for pattern, one in table if pattern.match(name)), own)
    return found


def _spread(text: str, key: str, count: int) -> list[float]:
    """So many numbers, of a text that holds them or one for all; none of an empty one."""
    found = _numbers(text, key) if text else []
    if len(found) not in (0, 1, count):
        raise UserError(f"{key}: these are {len(found)} numbers; give one, or {count} of them.")
    return found * count if len(found) == 1 else found


def _table(text: str, names: Mapping[str, Place]) -> list[tuple[re.Pattern, float]]:
    """What names are matched with, each with its alpha.

    `*`, `?` and `[...]` are as in names of files, which takes time in proportion to a name.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"--alpha.table: this is not JSON ({error}).") from None
    check(found, dict[str, Alpha], "--alpha.table")
    table = [(re.compile(translate(f"*{part}*")), alpha) for part, alpha in found.items()]
    for part, (pattern, _) in zip(found, table, strict=True):
        if not any(map(pattern.match, names)):
            raise UserError(
                f"--alpha.table: {part[:60]!r} matches no tensor; names are such as {min(names)}, "
                "and * stands for any text."
            )
    return table
