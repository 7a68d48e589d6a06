"""The processes of a run: joining them, and doing things on one before the others."""

import atexit
import contextlib
import itertools
import json
import os
import re
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

from alignjax import __version__
from alignjax.errors import SharedError, UserError, printable, sentence_of
from alignjax.progress import only_first_process, say

Result = TypeVar("Result")

_turns = itertools.count()
state = distributed.global_state  # jax has no public name for it
_BEAT, _MISSED = 2, 20  # seconds between heartbeats; missed ones after which a process is gone
NEWS = _BEAT * (_MISSED + 3)  # seconds until a process knows of one that is gone
_PATIENCE, _PATIENCE_HERE = 300, 40  # seconds in which all have to join, and on one machine
_BY_HOST = ("data.cache_dir", "run_dir")  # settings that may differ from process to process

# Variables by which a launcher says how many processes it started (SLURM_NTASKS, which a shell of
# salloc has as well, says how many it may).
_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
# Variables that only a job of several hosts has.
_CLUSTERS = ("MEGASCALE_COORDINATOR_ADDRESS", "JOB_COMPLETION_INDEX", "CLOUD_TPU_TASK_ID")


def join(settings: dict[str, Any]) -> None:
    """Join the other processes of the run, where the environment names any.

    Named by hand: JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID. Slurm,
    Open MPI, Kubernetes and TPU pods are found by jax. Alone, nothing is done.

    Raises UserError where the variables make no sense, and on every process where `settings`
    (dotted key -> value) differ. From here on a process that ends alone, or dies, ends the others.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS", "")
    count, index = _number("JAX_NUM_PROCESSES", 1), _number("JAX_PROCESS_ID", 0)
    launched = _is_launched()
    if (address or (count or 1) > 1) and not launched:
        port = re.fullmatch(r".*[^:/]:(\d{1,5})", address)
        if None in (count, index, port) or index >= count or not 0 < int(port[1]) < 1 << 16:
            raise UserError(
                f"JAX_COORDINATOR_ADDRESS={address!r}, JAX_NUM_PROCESSES={count}, JAX_PROCESS_ID="
                f"{index}: set HOST:PORT, the number of processes, and 0, 1 ... for each of them."
            )
    if address or launched:
        _initialize(address, count, index)
    try:
        jax.process_count()
    except (RuntimeError, AssertionError) as error:  # the second where a plugin is missing
        asked, why = os.environ.get("JAX_PLATFORMS", ""), str(error) or "no such one"
        raise UserError(f"jax cannot start with JAX_PLATFORMS={asked!r}: {why}") from None
    about = {"alignjax": __version__, "jax": jax.__version__}
    check_same(about | {key: settings[key] for key in settings if key not in _BY_HOST})


def _number(name: str, least: int) -> int | None:
    """A variable's number, None where it is not set."""
    value = os.environ.get(name) or None
    if value and (not re.fullmatch("[0-9]{1,9}", value) or int(value) < least):
        raise UserError(f"{name}={value!r}: it must be a whole number, at least {least}.")
    return int(value) if value else None


def _is_launched() -> bool:
    """Whether a launcher that jax knows started several processes."""
    several = any((_number(name, 1) or 1) > 1 for name in _COUNTS)
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "").count(",")
    if several or hosts or any(name in os.environ for name in _CLUSTERS):
        return True
    if jax.config.jax_platforms == "cpu":
        return False
    from jax._src.clusters.cloud_tpu_cluster import GceTpuCluster  # a TPU VM's metadata say it

    with contextlib.suppress(ImportError, OSError):
        return GceTpuCluster.is_env_present() and GceTpuCluster.get_process_count() > 1
    return False


def _initialize(address: str, count: int | None, index: int | None) -> None:
    """Start jax's service of several processes, and what watches over them."""
    here = re.match(r"localhost:|127\.|\[::1\]:", address)
    patience = _PATIENCE_HERE if here else _PATIENCE
    other = f"process {1 - index}" if count == 2 and index is not None else "a process"
    signals, written = os.pipe()
    os.set_blocking(written, False)
    signal.set_wakeup_fd(written)  # `_watch` hears of signals while the main thread waits in C++
    joined = threading.Event()
    watch = threading.Thread(target=_watch, args=(joined, other, patience, signals), daemon=True)
    watch.start()
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
    try:
        # Its own end of patience is an abort: `_watch` comes before.
        jax.distributed.initialize(address or None, count, index, initialization_timeout=900)
    except (ValueError, RuntimeError, KeyError) as error:
        raise UserError(
            f"the processes cannot join each other ({error}); set JAX_COORDINATOR_ADDRESS, "
            "JAX_NUM_PROCESSES and JAX_PROCESS_ID."
        ) from None
    signal.signal(signal.SIGTERM, end_at_once)
    joined.set()

    @atexit.register
    def part() -> None:
        jax.distributed.shutdown()  # the processes wait for each other
        os.write(written, b"\0")
        watch.join()  # Python's end aborts on a thread that is in C++


def end_at_once(number, frame) -> None:
    """SIGTERM but while training: `_watch` ends the process, whatever the main thread does."""


def _watch(joined: threading.Event, other: str, patience: int, signals: int) -> None:
    """Give signs of life, and end this process where another one gives none, or has ended alone."""
    for left in range(patience, 0, -60):
        if joined.wait(min(left, 60)):
            break
        say(f"waiting for {other} to join")
    else:
        _end(f"{other} has not joined within {patience} s; see its log, and start all again.")
    client = state.client
    seen = {f"alignjax/alive/{one}": ("", 0) for one in range(state.num_processes)}
    for beat in itertools.count():
        try:
            mine = f"alignjax/alive/{state.process_id}"
            client.key_value_set(mine, str(beat), allow_overwrite=True)
            alive = client.key_value_dir_get("alignjax/alive")
            ended = dict(client.key_value_dir_get("alignjax/ended"))
        except jax.errors.JaxRuntimeError:
            return  # the processes part
        seen |= {key: (sign, beat) for key, sign in alive if seen[key][0] != sign}
        gone = [key.rpartition("/")[2] for key, (_, last) in seen.items() if beat - last > _MISSED]
        ended.pop(f"alignjax/ended/{state.process_id}", None)
        if ended:
            _end("" if state.process_id else "; ".join(ended.values()))
        if gone:
            text = f"process {', '.join(gone)} is gone, killed or cut off; see its log."
            leave(text)
            _end("" if state.process_id and "0" not in gone else text)
        heard = select.select([signals], [], [], _BEAT)[0]
        if heard and signal.SIGTERM in os.read(signals, 64):
            if signal.getsignal(signal.SIGTERM) is end_at_once:
                leave("it was ended by SIGTERM")
                os._exit(128 + signal.SIGTERM)


def _end(text: str) -> None:
    if text:
        print(printable(f"error: {text}"), file=sys.stderr, flush=True)
    os._exit(2)


def leave(text: str) -> None:
    """Before this process ends alone, tell the others why; they end, the first one last."""
    if not state.client:
        return
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        said = f"process {state.process_id} has ended: {text}"
        state.client.key_value_set(f"alignjax/ended/{state.process_id}", said)
        time.sleep(0 if state.process_id else 2 * _BEAT)  # its end would abort the others


def agree_to_stop(step: int, wanted: bool) -> bool:
    """Whether all processes stop training after `step`, which is the next but one after a request.

    Call it once after each step is dispatched. Each process has read the step before then, which
    all had to take part in: so none asks for a step here before a request for it was made.
    """
    if wanted:
        key = f"alignjax/stop/{state.process_id}"
        state.client.key_value_set(key, str(step + 2), allow_overwrite=True)
    return any(step >= int(at) for _, at in state.client.key_value_dir_get("alignjax/stop"))


def check_same(values: dict[str, Any]) -> None:
    """Raise UserError, on all processes, for a value that is not the same on all of them."""
    first, *others = on_each(lambda: values)
    for process, other in enumerate(others, 1):
        for key in first | other:
            mine, its = first.get(key), other.get(key)
            if mine != its:
                raise SharedError(
                    f"{key}={mine!r} in process 0, but {its!r} in process {process}: start all "
                    "processes with the same command, on the same files."
                )


def join_on_host(settings: dict[str, Any]) -> None:
    """`join` for work on files, whose weights never go to an accelerator; the first one speaks."""
    jax.config.update("jax_platforms", "cpu")
    join(settings)
    only_first_process(jax.process_index())


def is_first() -> bool:
    """Whether this process writes what a run writes once."""
    return jax.process_index() == 0


def in_turn(work: Callable[[], Result]) -> Result:
    """What `work` gives, done by the first process alone before the others do it.

    Others find the files that the first one made, where they share a disk. A mistake on any
    process is raised on all of them, so that none waits for one that has gone.
    """
    results: list[Result] = []
    on_first(lambda: results.append(work()))
    on_each(lambda: None if results else results.append(work()))
    return results[0]


def on_first(work: Callable[[], Result]) -> Result:
    """What `work` gives on the first process, told to all as JSON; a mistake reaches all."""
    if jax.process_count() == 1:
        return work()
    key = f"alignjax/{next(_turns)}"
    if is_first():
        _tell(key, work)
    return _told(key)


def on_each(work: Callable[[], Result]) -> list[Result]:
    """What `work` gives on every process, done at the same time and told to all as JSON."""
    if jax.process_count() == 1:
        return [work()]
    key = f"alignjax/{next(_turns)}"
    _tell(f"{key}/{jax.process_index()}", work)
    return [_told(f"{key}/{process}") for process in range(jax.process_count())]


def _tell(key: str, work: Callable[[], Any]) -> None:
    """Tell all processes what `work` gives, or the mistake it meets."""
    try:
        told = work(), None
    except (ValueError, OSError) as error:
        if not (problem := sentence_of(error)):
            raise
        told = None, problem
    state.client.key_value_set(key, json.dumps(told))


def _told(key: str) -> Any:
    """What a process tells under a key, however long it takes; Ctrl-C is heard each second."""
    while True:
        try:
            result, problem = json.loads(state.client.blocking_key_value_get(key, 1000))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            continue
        if problem is not None:
            raise SharedError(problem)
        return result


def from_first(array: np.ndarray) -> np.ndarray:
    """The first process's array, on every process."""
    if jax.process_count() == 1:
        return array
    shape = tuple(on_first(lambda: array.shape))
    mine = array if is_first() else np.zeros(shape, array.dtype)
    return np.array(multihost_utils.broadcast_one_to_all(mine))


@contextmanager
def first_holds(opened: Callable[[], AbstractContextManager]) -> Iterator[None]:
    """Enters what `opened` gives on the first process for the block; its mistake reaches all."""
    with contextlib.ExitStack() as stack:
        on_first(lambda: stack.enter_context(opened()))
        yield
