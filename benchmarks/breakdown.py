"""Where the time of a compiled program goes, from what XLA's profiler saw on processors."""

import re
from collections import Counter
from pathlib import Path

from jax.profiler import ProfileData

_OPERATION = re.compile(r'\s+(?:ROOT )?%([\w.-]+) = .*op_name="([^"]*)" stack_frame_id=(\d+)')
_TABLE = re.compile(r"^(\d+) (.*)$")


def shares(traced: Path, program: str) -> dict[str, float]:
    """Share of the operations' time by the file that asked for them, the largest first.

    `traced` is what `jax.profiler.trace` wrote to, `program` the compiled program's text. A file is
    called by its stem, optax's by "optax", and "compiler" is what has no source, as copies are;
    matrix products are apart from the rest. A loop's time is that of the operations in it.
    """
    file_of = _files(program)
    spent: Counter[str] = Counter()
    for found in traced.rglob("*.xplane.pb"):
        for plane in ProfileData.from_file(str(found)).planes:
            for line in plane.lines:
                for name, own in _own_times(line.events).items():
                    spent[file_of.get(name, "compiler")] += own
    return {name: own / spent.total() for name, own in spent.most_common()}


def _own_times(events) -> Counter[str]:
    """Operation -> its nanoseconds on a thread, less those of operations within it."""
    spans = [
        (event.start_ns, -event.duration_ns, event.name)
        for event in events
        if any(name == "hlo_op" for name, _ in event.stats)
    ]
    own: Counter[str] = Counter()
    open_spans: list[tuple[float, str]] = []
    for start, negative, name in sorted(spans):
        while open_spans and start >= open_spans[-1][0]:
            open_spans.pop()
        if open_spans:
            own[open_spans[-1][1]] += negative
        own[name] -= negative
        open_spans.append((start - negative, name))
    return own


def _files(program: str) -> dict[str, str]:
    """Operation -> what its innermost source file is called, and whether it is a product."""
    tables: dict[str, dict[str, str]] = {}
    table, asked = {}, {}
    for line in program.splitlines():
        if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            table = tables.setdefault(line, {})
        elif entry := _TABLE.match(line):
            table[entry[1]] = entry[2]
        elif operation := _OPERATION.match(line):
            asked[operation[1]] = operation[2], operation[3]

    def file(frame: str) -> str:
        location = re.search(r"file_location_id=(\d+)", tables["StackFrames"][frame])[1]
        name = re.search(r"file_name_id=(\d+)", tables["FileLocations"][location])[1]
        path = Path(tables["FileNames"][name].strip('"'))
        return "optax" if "optax" in path.parts else path.stem

    return {
        name: file(frame) + (" products" if what.endswith("dot_general") else "")
        for name, (what, frame) in asked.items()
    }
