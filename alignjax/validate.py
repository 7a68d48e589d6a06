"""The one door for values from outside: settings, and what JSON files and metadata hold.

What is allowed is said by a type. Imports nothing slow.
"""

import math
import reprlib
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from alignjax.errors import UserError


class Bound(NamedTuple):
    """What a number may be: `least` and `most` are allowed, `above` and `below` are not."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def allows(self, number: float) -> bool:
        return (
            (self.least is None or number >= self.least)
            and (self.most is None or number <= self.most)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        names = {"at least": self.least, "above": self.above}
        names |= {"at most": self.most, "below": self.below}
        return " and ".join(f"{name} {n}" for name, n in names.items() if n is not None)


class _Problem(NamedTuple):
    key: str  # where in the value, such as "rope_scaling.factor"; "" for the value itself
    value: object
    wanted: str


def check(value: object, kind: Any, where: str, key: str = "") -> None:
    """Raise UserError, naming the key, unless `value` is of the type `kind`.

    `where` names the file (or is empty), `key` the value in it. Types may be None, bool, int, float
    (a whole number counts; it must be finite), str, Literal, list, tuple, dict and unions of them,
    dataclasses, TypedDicts (whose keys may be absent, and others present), and
    Annotated[..., Bound(...)]. Subclasses such as NumPy's numbers do not count.
    """
    if problem := _problem(value, kind, key):
        shown = _shown(problem.value)
        said = f"{problem.key}={shown}" if problem.key else shown
        where = f"{where}: " if where else ""
        raise UserError(f"{where}{said}: it must be {problem.wanted}.")


def _shown(value: object) -> str:
    """A value as Python writes it, at most 60 characters of it, however deep or long it is."""
    if type(value) is int and abs(value) >= 1 << 1023:
        return "a number of over 300 digits"
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother = 2, 60, 60
    shown = short.repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _problem(value: object, kind: Any, key: str) -> _Problem | None:
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return None
    if origin is Annotated:
        bounds = [bound for bound in inner[1:] if isinstance(bound, Bound)]
        wrong = [
            bound for bound in bounds if type(value) in (int, float) and not bound.allows(value)
        ]
        worse = _Problem(key, value, str(wrong[0])) if wrong else None
        return _problem(value, inner[0], key) or worse
    if origin in (Union, types.UnionType):
        problems = [_problem(value, one, key) for one in inner]
        if None in problems:
            return None
        deeper = [problem for problem in problems if problem.key != key]  # the one meant
        return deeper[0] if deeper else _Problem(key, value, _wanted(kind))
    if not _is_of(value, kind, origin, inner):
        return _Problem(key, value, _wanted(kind))
    return next(filter(None, (_problem(*part) for part in _parts(value, kind, key))), None)


def _is_of(value: object, kind: Any, origin: Any, inner: tuple) -> bool:
    """Whether a value is of a type, apart from the values within it."""
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in inner)
    if kind is float:
        return _is_number(value) and math.isfinite(value)
    if is_typeddict(kind):
        return type(value) is dict and all(type(name) is str for name in value)
    if kind is None:
        return value is None
    return isinstance(value, kind) if is_dataclass(kind) else type(value) is (origin or kind)


def _is_number(value: object) -> bool:
    """Whether it is an int or a float; no float is larger than the largest int that is allowed."""
    return type(value) is float or (type(value) is int and abs(value) < 1 << 1023)


def _parts(value: Any, kind: Any, key: str):
    """The values within a value, each with its type and key."""
    dot, inner = f"{key}." if key else "", get_args(kind)
    if is_dataclass(kind):
        hints = get_type_hints(type(value), include_extras=True)
        for item in fields(value):
            yield getattr(value, item.name), hints[item.name], dot + item.name
    elif is_typeddict(kind):
        for name, own in get_type_hints(kind, include_extras=True).items():
            if name in value:
                yield value[name], own, dot + name
    elif isinstance(value, Mapping) and inner:
        for name, one in value.items():
            yield name, inner[0], key
            yield one, inner[1], f"{dot}{name}"
    elif isinstance(value, list | tuple) and inner:
        for i, one in enumerate(value):
            yield one, inner[0], f"{key}[{i}]"


def _wanted(kind: Any) -> str:
    """What a type allows, for the end of a sentence."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return f"{_wanted(inner[0])} {inner[1]}"
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if origin in (Union, types.UnionType):
        return " or ".join(map(_wanted, inner))
    names = {None: "null", type(None): "null", bool: "true or false", int: "a whole number"}
    names |= {float: "a finite number", str: "a string", list: "a list", tuple: "a tuple"}
    if (origin or kind) in names:
        return names[origin or kind]
    return f"{kind.__name__}(...)" if is_dataclass(kind) else "an object"
