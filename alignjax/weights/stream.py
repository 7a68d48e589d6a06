"""Writing directories part by part, from where an earlier try was killed, each whole or not there.

What is not finished lies in a directory beside the target, `.NAME.unfinished`: `result`, which
takes the target's name at the end; `about.json`, which says of what; and for each process the
number of its parts that are written. A process that was killed has written what it noted, as long
as the machine still runs; so the note names the machine's start. As with `cp`, the system brings
to the disk when it likes what a process has written and ended.
"""

import json
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from alignjax import lock
from alignjax.errors import UserError
from alignjax.files import is_remote, led_to, naming, read_json, whole_directory, write_whole
from alignjax.processes import first_holds, is_first, on_first
from alignjax.weights.disk import Writer
from alignjax.weights.layout import Layout, Part, write_part
from alignjax.weights.together import at_once, check_alone

WORKERS = 4  # threads: on two cores two compute while others read and wait for the disk
MOST = 1 << 21  # bytes of a part: two of it and a few of the arithmetic's pieces fit into a cache
# glibc returns what threads let go of beyond twice the largest block that was ever let go of, and
# asking for it again for each part took a third of the system's time. 32 MiB is the most it heeds.
_KEPT = (1 << 25) - (1 << 16)
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class Unfinished(NamedTuple):
    """A directory that is being filled."""

    result: Path
    notes: Path  # where processes note how far they are
    goes_on: bool  # from what an earlier try left


def planned(layout: Layout, order: dict[str, int]) -> Layout:
    """The layout with its parts in the order in which to write them: by their tensors' places."""
    parts = sorted(layout.parts, key=lambda part: order.get(part.name, len(order)))
    return replace(layout, parts=parts)


def written(target: Path) -> int:
    """Bytes on the disk that an earlier try left."""
    if is_remote(target):
        return 0
    size = 0
    for file in _place(target).rglob("*"):
        with suppress(FileNotFoundError):  # another run ends there just now
            size += 512 * file.stat().st_blocks if file.is_file() else 0
    return size


def mine(parts: list[Part]) -> list[Part]:
    """The parts that fall to this process: a run of them, of about as many bytes as any other."""
    ends = np.cumsum([part.size for part in parts])
    owner = (ends - 1) * jax.process_count() // ends[-1]
    return [part for part, one in zip(parts, owner, strict=True) if one == jax.process_index()]


def fill(
    unfinished: Unfinished,
    layout: Layout,
    directories: list[str],
    work: Callable[[Part], list[np.ndarray]],
    update: Callable[[int, str], None],
) -> None:
    """Writes this process's parts into each of the directories within the result.

    `work(part)` gives an array for each of them, and is called by several threads; `update` is
    told what this process has written: whole GB, and GB and GB/s as text.
    """
    parts = mine(layout.parts)
    note = _Note(unfinished.notes)
    done = min(note.read(), len(parts)) if unfinished.goes_on else 0
    before = size = sum(part.size for part in parts[:done]) * len(directories)
    started = time.monotonic()
    np.empty(_KEPT, np.uint8)  # let go of at once; see there
    broken: list[BaseException] = []
    writer = Writer()

    def write(part: Part) -> None:
        if broken:
            raise broken[0]  # so that nothing behind it counts as written
        try:
            for name, content in zip(directories, work(part), strict=True):
                write_part(unfinished.result / name, layout, part, content, writer)
        except BaseException as error:
            broken.append(error)
            raise

    with ThreadPoolExecutor(WORKERS) as pool:
        for number, part in enumerate(_in_order(pool, write, parts[done:]), done + 1):
            note.write(number)
            size += part.size * len(directories)
            rate = (size - before) / 1e9 / max(time.monotonic() - started, 1e-3)
            update(int(size / 1e9), f"{size / 1e9:.2f} GB, {rate:.2f} GB/s")


def _in_order(pool: ThreadPoolExecutor, write, parts: list[Part]) -> Iterator[Part]:
    """The parts as they are done, of which few are begun ahead."""
    waiting = deque()
    for part in parts:
        waiting.append((part, pool.submit(write, part)))
        if len(waiting) > 2 * WORKERS:
            first, future = waiting.popleft()
            future.result()
            yield first
    for first, future in waiting:
        future.result()
        yield first


class _Note:
    """How many parts this process has written, in a file."""

    def __init__(self, directory: Path):
        self.file = directory / f"done-{jax.process_index()}"
        self.boot = _BOOT.read_text().strip() if _BOOT.is_file() else ""

    def read(self) -> int:
        words = self.file.read_text().split() if self.file.is_file() else []
        return int(words[1]) if len(words) == 2 and words[0] == self.boot else 0

    def write(self, number: int) -> None:
        """One short write, which a kill leaves done or undone."""
        with self.file.open("r+b" if self.file.exists() else "xb", buffering=0) as opened:
            opened.write(f"{self.boot} {number:12d}\n".encode())


@contextmanager
def unfinished(target: Path, about: dict) -> Iterator[Unfinished]:
    """A directory to fill, on all processes; it takes its name when the block ends well.

    What a killed process left of the same work (`about`, of JSON's values) is gone on with.
    Mistakes leave nothing. On an object store it begins anew, and one process alone may write.
    """
    check_alone(target)
    if is_remote(target):
        with whole_directory(target) as at, tempfile.TemporaryDirectory() as notes:
            yield Unfinished(at, Path(notes), False)
        return
    target = led_to(target)
    place = _place(target)
    with first_holds(lambda: lock.held(place, "--out")):
        goes_on = on_first(lambda: _left(place, about))
        try:
            with naming(target):
                yield Unfinished(place / "result", place, goes_on)
            on_first(lambda: _finish(place, target))
        except (ValueError, OSError):
            if is_first():
                shutil.rmtree(place, ignore_errors=True)
            raise


def _place(target: Path) -> Path:
    target = led_to(target)
    return target.with_name(f".{target.name}.unfinished")


def begin(one: Unfinished, layout: Layout, directories: list[str], about: dict) -> None:
    """Makes what has to be there before the parts; later tries find it."""
    if one.goes_on:
        return
    for name in directories:
        on_first(lambda name=name: (one.result / name).mkdir(parents=True, exist_ok=True))
        at_once(lambda name=name: layout.begin(one.result / name))
    on_first(lambda: write_whole(one.notes / "about.json", json.dumps(about)))


def _left(place: Path, about: dict) -> bool:
    """Whether the same work was begun; what was left of other work goes."""
    inside = [path for path in place.iterdir() if path.name != ".lock"]
    for path in inside:
        if path.name not in ("about.json", "result") and not path.name.startswith("done-"):
            raise UserError(f"{path}: --out is made there first, and this is not of it; move it.")
    with suppress(UserError):  # where about.json is damaged, the work starts over
        then, now = read_json(place / "about.json"), json.loads(json.dumps(about))
        if then == now and (place / "result").is_dir():
            return True
    for path in inside:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return False


def _finish(place: Path, target: Path) -> None:
    (place / "result").rename(target)
    shutil.rmtree(place)
