"""What a compiled program sends between devices, read from XLA's text of it.

XLA writes the text if a function is compiled with `DUMP` among its compiler options. A transfer
inside a loop counts as often as the loop turns, one inside a fusion or an asynchronous pair once.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from alignjax.errors import UserError

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")
WIDTHS = {"pred": 8, "bf16": 16}  # bits of the types whose names do not end in them


class Transfer(NamedTuple):
    """One array that a program sends: whole, as it is gathered to or reduced from."""

    kind: str  # one of KINDS
    dtype: str  # by XLA's name: f32, bf16, s32 ...
    shape: tuple[int, ...]  # of the whole array; of what each device sends for a permute
    group: int  # devices that share it
    times: int  # runs of it each step; a loop of unknown length counts once
    source: str  # the operation in Python that it comes from, as JAX names it

    @property
    def received(self) -> float:
        """Bytes that a device receives in all runs."""
        rest = (self.group - 1) / self.group
        share = {"collective-permute": 1, "all-reduce": 2 * rest}.get(self.kind, rest)
        return share * self.times * math.prod(self.shape) * _bits(self.dtype) / 8


class _Instruction(NamedTuple):
    name: str
    arrays: list[tuple[str, tuple[int, ...]]]  # of its result
    opcode: str
    operands: list[str]
    rest: str  # operands as text, and attributes
    root: bool


Computation = dict[str, _Instruction]


def dump_options(directory: Path) -> dict[str, str | bool]:
    """Compiler options with which XLA writes what `dumped` reads."""
    return {"xla_dump_to": str(directory), "xla_dump_hlo_as_text": True}


def dumped(directory: Path, function: str) -> str:
    """The optimised program of a jitted function, as XLA wrote it to an empty directory."""
    files = sorted(directory.glob(f"*.jit_{function}.*after_optimizations.txt"))
    if len(files) != 1:
        raise UserError(
            f"{directory} holds {len(files)} optimised programs of {function}: compile it once, "
            "with dump_options of an empty directory."
        )
    return files[0].read_text()


def transfers(program: str) -> list[Transfer]:
    """Every array that a program sends between devices, in no order."""
    computations, entry = _parse(program)
    if entry is None:
        raise UserError("this is no program: it has no ENTRY; give XLA's text of a whole module.")
    found = list(_walk(computations, entry, 1, False))
    if not found:
        raise UserError("the program sends nothing between devices: compile it for several.")
    return found


_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_CALLS = re.compile(
    r"\b(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
    r"|\b(?:branch_computations|called_computations)=\{([^}]*)\}"
)


def _parse(program: str) -> tuple[dict[str, Computation], str | None]:
    """Instructions of each computation, and which computation is the program."""
    computations, entry, current = {}, None, {}
    for line in program.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif " = " in line and line.startswith(" "):
            one = _instruction(line)
            current[one.name] = one
    return computations, entry


def _instruction(line: str) -> _Instruction:
    """Reads `  [ROOT] %name = TYPE opcode(operands), attributes`; a TYPE may be a tuple."""
    head, _, tail = line.strip().partition(" = ")
    end = _closing(tail) if tail.startswith("(") else tail.index(" ")
    opcode, _, rest = tail[end:].strip().partition("(")
    arrays = [
        (dtype, tuple(int(size) for size in sizes.split(",") if size))
        for dtype, sizes in _ARRAY.findall(tail[:end])
    ]
    name = head.removeprefix("ROOT ").removeprefix("%")
    operands = re.findall(r"%([\w.\-#]+)", rest[: _closing("(" + rest) - 1])
    return _Instruction(name, arrays, opcode, operands, rest, head.startswith("ROOT "))


def _closing(text: str) -> int:
    """Behind the bracket that closes the first one."""
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return i + 1
    raise UserError(f"brackets do not close in {text[:80]!r}: the program's text is cut off.")


def _walk(
    computations: dict[str, Computation], name: str, times: int, scatters: bool, source: str = ""
) -> Iterator[Transfer]:
    """Transfers of a computation that runs so many times, and of all that it calls.

    On TPU a reduce-scatter is an all-reduce in a fusion that keeps a part of it, `scatters`.
    """
    for one in computations[name].values():
        named = re.search(r'op_name="([^"]*)"', one.rest)
        here = named[1] if named else source  # a fusion's name is that of its nameless parts
        kind = one.opcode.removesuffix("-start")
        if kind in KINDS:
            kind = "reduce-scatter" if scatters and kind == "all-reduce" else kind
            group = _group(one)
            for dtype, shape in _arrays(one, group):
                yield Transfer(kind, dtype, shape, group, times, here)
        turns = _trip_count(computations, name, one) if one.opcode == "while" else 1
        for single, several in _CALLS.findall(one.rest):
            for callee in (single or several).replace("%", "").split(","):
                inner = scatters or "all-reduce-scatter" in callee
                yield from _walk(computations, callee.strip(), times * turns, inner, here)


def _arrays(one: _Instruction, group: int) -> list[tuple[str, tuple[int, ...]]]:
    """The whole arrays that a collective gathers or reduces."""
    if one.opcode == "reduce-scatter":  # its results are parts
        (cut,) = re.findall(r"dimensions=\{(\d+)\}", one.rest)
        return [
            (dtype, tuple(size * (group if i == int(cut) else 1) for i, size in enumerate(shape)))
            for dtype, shape in one.arrays
        ]
    if one.opcode in ("all-gather-start", "collective-permute-start"):
        arrays = [array for array in one.arrays if array != ("u32", ())]
        return arrays[len(arrays) // 2 :]  # results stand behind operands
    return one.arrays


def _group(one: _Instruction) -> int:
    """Devices that take part together, from any of the ways in which XLA writes them."""
    if "source_target_pairs=" in one.rest:
        return 2
    if each := re.search(r"replica_groups=\{\{([\d,]*)\}", one.rest):
        return len(each[1].split(","))
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", one.rest):
        return int(iota[1])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", one.rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])  # 'axis', or a part 'axis':(1)2
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    attributes = one.rest[_closing("(" + one.rest) :].strip(", ")
    raise UserError(f"{one.name}: the reader knows no device groups like {attributes[:160]!r}.")


def _trip_count(computations: dict[str, Computation], name: str, loop: _Instruction) -> int:
    """Turns of a loop that counts up to a constant; 1 where the program itself computes the end.

    XLA says it on some platforms; on others it is (end - start) / step of the loop's counter.
    """
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(known[1])
    condition, body = (
        computations[re.search(rf"\b{key}=%?([\w.\-]+)", loop.rest)[1]]
        for key in ("condition", "body")
    )
    test = _root(condition)
    counter, end = (_origin(condition, operand) for operand in test.operands)
    if test.opcode != "compare" or "direction=LT" not in test.rest or end.opcode != "constant":
        return 1
    place = int(re.search(r"index=(\d+)", counter.rest)[1])
    start = _origin(computations[name], f"{loop.operands[0]}#{place}")
    step = _origin(body, _root(body).operands[place])
    numbers = [_origin(body, operand) for operand in step.operands]
    steps = [_integer(one) for one in numbers if one.opcode == "constant"]
    if step.opcode != "add" or len(steps) != 1 or start.opcode != "constant":
        raise UserError(f"{loop.name}: the reader does not see how this loop counts.")
    return -(-(_integer(end) - _integer(start)) // steps[0])


def _root(computation: Computation) -> _Instruction:
    (root,) = (one for one in computation.values() if one.root)
    return root


def _origin(computation: Computation, name: str) -> _Instruction:
    """The instruction behind copies; `tuple#2` is one that takes a part of a tuple."""
    whole, _, place = name.rpartition("#")
    if whole:
        made = _origin(computation, whole)
        if made.opcode == "tuple":
            return _origin(computation, made.operands[int(place)])
        return _Instruction(name, [], "get-tuple-element", [whole], f"index={place}", False)
    one = computation[name]
    if one.opcode in ("copy", "bitcast", "copy-start", "copy-done"):
        return _origin(computation, one.operands[0])
    return one


def _integer(constant: _Instruction) -> int:
    return int(constant.rest.partition(")")[0])


def _bits(dtype: str) -> int:
    return WIDTHS.get(dtype) or int(re.search(r"\d+", dtype)[0])
