"""Which alpha each tensor has: one for all, or by module, layer and name. Imports no jax."""

import ast
import json
import math
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from alignjax.errors import UserError

GROUPS = {
    "attention": ("q", "k", "v", "o", "q_bias", "k_bias", "v_bias"),
    "mlp": ("gate", "up", "down"),
    "embeddings": ("embed", "head", "score"),
    "norms": ("attn_norm", "mlp_norm", "q_norm", "k_norm", "norm"),
}
_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
    ast.Mod: operator.mod,
    ast.FloorDiv: operator.floordiv,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_FUNCTIONS = {"min": min, "max": max, "abs": abs}


@dataclass(frozen=True)
class Rules:
    """Departures from one alpha for all. Each sees as `alpha` what those above it gave."""

    layers: str = ""  # a list of one number a layer, or an expression of alpha, layer and layers
    attention: str = ""  # of q, k, v, o and their biases; an expression, as "0.2" or "alpha / 2"
    mlp: str = ""  # of gate, up and down
    embeddings: str = ""  # of the embedding, the head and a reward model's score
    norms: str = ""  # of every norm's scale
    table: str = ""  # JSON, or a file of it: {"regex of a tensor's name": expression}; first wins


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
    for one in (part.strip() for part in text.split(",")):
        try:
            number = float(one)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise UserError(f"--alpha={text}: {one!r} is no number; write such as 0.3 or 0.1,0.2.")
        if number in found.values():
            raise UserError(f"--alpha={text}: {one} is there twice; name each alpha once.")
        found[one] = number
    return found


def loaded(rules: Rules) -> Rules:
    """The rules with the table's text, where it lies in a file."""
    if not rules.table or rules.table.lstrip().startswith("{"):
        return rules
    try:
        return replace(rules, table=Path(rules.table).read_text(encoding="utf-8"))
    except (OSError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(
            f"--alpha.table={rules.table}: the file cannot be read ({why}); write JSON, or name a "
            "file of it."
        ) from None


def of_tensors(rules: Rules, alpha: float, places: Mapping[str, Place]) -> dict[str, float]:
    """The alpha of each tensor by rules that are `loaded`.

    Raises UserError where a rule has no meaning, or no tensor.
    """
    layers = 1 + max(place.layer for place in places.values() if place.layer is not None)
    table = _table(rules.table, places)
    listed = _list(rules.layers, layers)
    found = {}
    for name, place in places.items():
        values = {"alpha": alpha, "layers": layers}
        if place.layer is not None:
            values["layer"] = place.layer
            if listed:
                values["alpha"] = listed[place.layer]
            elif rules.layers:
                values["alpha"] = _value(rules.layers, values, "--alpha.layers", name)
        if own := getattr(rules, place.group):
            values["alpha"] = _value(own, values, f"--alpha.{place.group}", name)
        for pattern, expression in table:
            if pattern.search(name):
                values["alpha"] = _value(expression, values, "--alpha.table", name)
                break
        found[name] = values["alpha"]
    return found


def _list(text: str, layers: int) -> list[float]:
    """The numbers of "0.1,0.2,..."; none where it is an expression."""
    try:
        numbers = [float(one) for one in text.split(",")]
    except ValueError:
        return []
    if len(numbers) == 1:
        return numbers * layers
    if len(numbers) != layers:
        raise UserError(
            f"--alpha.layers={text}: these are {len(numbers)} numbers, and the model has {layers} "
            "layers; give one number for each."
        )
    return numbers


def _table(text: str, names: Mapping[str, Place]) -> list[tuple[re.Pattern, str]]:
    if not text:
        return []
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"--alpha.table: this is not JSON ({error}).") from None
    if not isinstance(found, dict):
        raise UserError('--alpha.table: write an object, such as {"lm_head": 0}.')
    table = []
    for pattern, expression in found.items():
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise UserError(f"--alpha.table: {pattern!r} is no regex ({error}).") from None
        if not any(compiled.search(name) for name in names):
            raise UserError(
                f"--alpha.table: {pattern!r} matches no tensor; names are such as {min(names)}."
            )
        table.append((compiled, str(expression)))
    return table


def _value(expression: str, values: dict, key: str, tensor: str) -> float:
    """An expression's number: arithmetic, comparisons, `a if b else c`, min, max and abs."""
    try:
        found = _walk(ast.parse(expression.strip(), mode="eval").body, values)
        finite = not isinstance(found, bool | complex) and math.isfinite(found)
    except (SyntaxError, TypeError, ArithmeticError, ValueError, KeyError) as error:
        raise UserError(_unusable(key, expression, tensor, str(error))) from None
    if not finite:
        raise UserError(_unusable(key, expression, tensor, f"it gives {found}"))
    return float(found)


def _unusable(key: str, expression: str, tensor: str, why: str) -> str:
    return (
        f"{key}={expression}: it gives no alpha for {tensor} ({why}); write numbers, alpha, "
        "layers, in a layer also layer, + - * / // % **, comparisons, `a if b else c`, min, max "
        "and abs."
    )


def _walk(node: ast.expr, values: dict) -> float:
    match node:
        case ast.Constant(value=int() | float() as number):
            return number
        case ast.Name(id=name):
            if name not in values:
                raise UserError(f"there is no {name}")
            return values[name]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_walk(left, values), _walk(right, values))
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_walk(operand, values))
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_walk(left, values), _walk(right, values))
        case ast.IfExp(test=test, body=body, orelse=other):
            return _walk(body if _walk(test, values) else other, values)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
            return _FUNCTIONS[name](*(_walk(one, values) for one in args))
    raise UserError(f"{ast.unparse(node)!r} is not understood")
