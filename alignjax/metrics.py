"""metrics.jsonl: one line a step, in the names users know; TensorBoard and wandb beside it."""

import errno
import importlib.util
import json
import math
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, NamedTuple, TypedDict

from alignjax import config as configs
from alignjax import validate
from alignjax.errors import UserError, printable
from alignjax.files import is_remote, naming, write_whole
from alignjax.processes import is_first

_FLUSH_SECONDS = 5  # between writes of TensorBoard's file


class _Line(TypedDict):
    step: Annotated[int, validate.Bound(0)]
    num_tokens: int
    tokens_per_second: Annotated[float, validate.Bound(above=0)]


class Log(NamedTuple):
    write: Callable[[dict], None]  # takes a line of metrics; an empty one is passed over
    flush: Callable[[], None]  # after it, the lines so far outlive the process


@contextmanager
def writing(directory: Path, config: configs.Training, step: int) -> Iterator[Log]:
    """Goes on behind the line of a step (-1: anew) in every log of a run directory.

    Processes other than the first write nothing.
    """
    if not is_first():
        yield Log(lambda line: None, lambda: None)
        return
    file = directory / "metrics.jsonl"
    cut_back(file, step)
    with _lines(file) as lines, _tensorboard(directory, step) as scalars:
        logs = [lines, scalars]
        if config.wandb:
            logs.append(_wandb(directory, config))

        def write(line: dict) -> None:
            line = {printable(name): value for name, value in line.items() if math.isfinite(value)}
            for log in logs if line else []:
                log.write(line)

        def flush() -> None:
            for log in logs:
                log.flush()

        yield Log(write, flush)


def check(config: configs.Training) -> None:
    """Raises UserError where a log that the run asks for cannot be written, or not gone on with."""
    read(configs.run_dir(config) / "metrics.jsonl")
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError(
            'wandb is not installed: pip install "alignjax[wandb]", or leave out --wandb.'
        )


def cut_back(file: Path, step: int) -> None:
    """Drops the lines after a step, and a line cut short, so that a resumed run repeats none."""
    if not file.is_file():
        return
    lines = zip(file.read_bytes().splitlines(keepends=True), read(file), strict=False)
    write_whole(file, b"".join(text for text, line in lines if line["step"] <= step))


def read(file: Path) -> list[dict]:
    """Return the lines of metrics.jsonl, but not a last one cut short; none where it is gone.

    Raises UserError, naming the line, where one is damaged or not of a run.
    """
    content, lines = file.read_bytes() if file.is_file() else b"", []
    for number, text in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), 1):
        try:
            lines.append(json.loads(text))
            validate.check(lines[-1], _Line, "")
            lines[-1]["step"]
        except (ValueError, KeyError, RecursionError):
            raise UserError(
                f"{file}:{number}: this is no line of metrics; mend or delete it, and the same "
                "command goes on."
            ) from None
    return lines


@contextmanager
def _lines(file: Path) -> Iterator[Log]:
    """Appends to metrics.jsonl; an object store, which cannot append, is written on `flush`."""
    if is_remote(file):
        lines = [file.read_text()] if file.exists() else []
        log = Log(
            lambda line: lines.append(json.dumps(line) + "\n"),
            lambda: write_whole(file, "".join(lines)),
        )
        yield log
        log.flush()
        return
    with file.open("ab", buffering=0) as out:  # nothing is held back that closing could fail on

        def write(line: dict) -> None:
            text = json.dumps(line).encode() + b"\n"
            with naming(file):
                if out.write(text) < len(text):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        yield Log(write, lambda: None)


@contextmanager
def _tensorboard(directory: Path, step: int) -> Iterator[Log]:
    """Scalars under `tensorboard/`; those after `step` are purged, as in metrics.jsonl.

    tensorboardX's own SummaryWriter writes from a thread, where nobody hears of a full disk, and
    its `scalar` changes names such as "margins/turns=2".
    """
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary
    from tensorboardX.record_writer import RecordWriter

    target = directory / "tensorboard"
    target.mkdir(parents=True, exist_ok=True)
    now = time.time_ns()  # a file of its own
    out = RecordWriter(os.fspath(target / f"events.out.tfevents.{now}.{socket.gethostname()}"))
    flushed = time.monotonic()

    def event(**fields) -> None:
        out.write(Event(**fields).SerializeToString())

    def write(line: dict) -> None:
        nonlocal flushed
        at = {"wall_time": time.time(), "step": line["step"]}
        with naming(target):
            for name, value in line.items():
                if name != "step":
                    drawn = Summary(value=[Summary.Value(tag=name, simple_value=value)])
                    event(**at, summary=drawn)
            if time.monotonic() - flushed > _FLUSH_SECONDS:
                out.flush()
                flushed = time.monotonic()

    def flush() -> None:
        with naming(target):
            out.flush()

    try:
        event(wall_time=time.time(), file_version="brain.Event:2")
        start = SessionLog(status=SessionLog.START)
        event(wall_time=time.time(), step=step + 1, session_log=start)
        yield Log(write, flush)
    finally:
        with suppress(OSError):  # what was saved is flushed; the rest is written again
            out.close()


def _wandb(directory: Path, config: configs.Training) -> Log:
    """A run of Weights & Biases that a resumed run goes on with; its settings are WANDB_*."""
    import wandb

    known = directory / "wandb_id"
    if not known.is_file():
        write_whole(known, uuid.uuid4().hex)
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "alignjax"),
        name=config.name,
        id=known.read_text(encoding="utf-8"),
        resume="allow",
        config=configs.to_dict(config),
    )
    return Log(lambda line: run.log(line, step=line["step"]), lambda: None)
