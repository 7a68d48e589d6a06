"""The processes of a run: joining them, and doing things on one before the others."""

import contextlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from alignjax.errors import SharedError, UserError, sentence_of
from alignjax.progress import only_first_process

Result = TypeVar("Result")

_turns = itertools.count()
_PATIENCE_MS = 24 * 3600 * 1000  # tokenizing on the first process may take hours

# Variables by which a launcher says how many processes it started.
_COUNTS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
# Variables that only a job of several hosts has.
_CLUSTERS = ("MEGASCALE_COORDINATOR_ADDRESS", "JOB_COMPLETION_INDEX", "CLOUD_TPU_TASK_ID")


def join() -> None:
    """Joins the other processes of the run, where the environment names any.

    Named by hand: JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID. Slurm,
    Open MPI, Kubernetes and TPU pods are found by jax. Alone, nothing is done.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if address:
        numbers = {}
        for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
            value = os.environ.get(name, "")
            if value and not value.isdigit():
                raise UserError(f"{name}={value!r}: it must be a whole number.")
            numbers[name] = int(value) if value else None
        jax.distributed.initialize(address, *numbers.values())
        return
    several = any(int(os.environ.get(name, 1)) > 1 for name in _COUNTS)
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "").count(",")
    if several or hosts or any(name in os.environ for name in _CLUSTERS):
        jax.distributed.initialize()


def join_on_host() -> None:
    """`join` for work on files, whose weights never go to an accelerator; the first one speaks."""
    jax.config.update("jax_platforms", "cpu")
    join()
    only_first_process(jax.process_index())


def is_first() -> bool:
    """Whether this process writes what a run writes once."""
    return jax.process_index() == 0


def in_turn(work: Callable[[], Result]) -> Result:
    """What `work` gives, done by the first process alone before the others do it.

    Others find the files that the first one made, where they share a disk. A mistake on any
    process is raised on all of them, so that none waits for one that has gone.
    """
    if jax.process_count() == 1:
        return work()
    client = _client()
    key = f"alignjax/{next(_turns)}"

    def told(process: int) -> str | None:
        return json.loads(client.blocking_key_value_get(f"{key}/{process}", _PATIENCE_MS))

    result, problem = None, None if is_first() else told(0)
    if problem is None:
        try:
            result = work()
        except (ValueError, OSError) as error:
            problem = sentence_of(error)
            if not problem:
                raise
    client.key_value_set(f"{key}/{jax.process_index()}", json.dumps(problem))
    problems = [told(process) for process in range(jax.process_count())]
    for problem in problems:
        if problem is not None:
            raise SharedError(problem)
    return result


def on_first(work: Callable[[], Result]) -> Result:
    """What `work` gives on the first process, told to all as JSON; a mistake reaches all."""
    if jax.process_count() == 1:
        return work()
    client = _client()
    key = f"alignjax/{next(_turns)}"
    if is_first():
        client.key_value_set(key, json.dumps(_outcome(work)))
    return _result(json.loads(client.blocking_key_value_get(key, _PATIENCE_MS)))


def on_each(work: Callable[[], Result]) -> list[Result]:
    """What `work` gives on every process, done at the same time and told to all as JSON."""
    if jax.process_count() == 1:
        return [work()]
    client = _client()
    key = f"alignjax/{next(_turns)}"
    client.key_value_set(f"{key}/{jax.process_index()}", json.dumps(_outcome(work)))
    found = [
        json.loads(client.blocking_key_value_get(f"{key}/{process}", _PATIENCE_MS))
        for process in range(jax.process_count())
    ]
    return [_result(told) for told in found]


def _client():
    """What the processes tell each other through; imported here, since Orbax is slow to import."""
    from orbax.checkpoint import multihost

    return multihost.get_jax_distributed_client()


def _outcome(work: Callable[[], Result]) -> dict:
    """What `work` gives, or the mistake it meets, as JSON holds it."""
    try:
        return {"result": work()}
    except (ValueError, OSError) as error:
        problem = sentence_of(error)
        if not problem:
            raise
        return {"problem": problem}


def _result(told: dict):
    """What an `_outcome` holds; its mistake is raised."""
    if "problem" in told:
        raise SharedError(told["problem"])
    return told["result"]


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
    if not is_first():
        on_first(lambda: None)
        yield
        return
    with contextlib.ExitStack() as stack:
        on_first(lambda: stack.enter_context(opened()))
        yield
