"""What several processes do at the same time: read, and write one directory."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import jax

from alignjax.errors import UserError
from alignjax.files import is_remote, whole_directory
from alignjax.processes import in_turn, on_each, on_first

Result = TypeVar("Result")


def share(items: list) -> list:
    """The items of which this process takes care: every one that is its turn."""
    return items[jax.process_index() :: jax.process_count()]


def run_of(items: list) -> list:
    """The items of which this process takes care: as many as any other, one behind the other."""
    first, last = (
        len(items) * (jax.process_index() + number) // jax.process_count() for number in (0, 1)
    )
    return items[first:last]


def at_once(work: Callable[[], Result]) -> Result:
    """What `work` gives, done by every process at the same time.

    A mistake on any process is raised on all of them, so that none waits for one that has gone.
    """
    results: list[Result] = []
    on_each(lambda: results.append(work()))
    return results[0]


def check_alone(target: Path) -> None:
    """Raises UserError where several processes are to write one directory of an object store."""
    if is_remote(target) and jax.process_count() > 1:
        raise UserError(f"{target}: one process alone writes to an object store; start just one.")


@contextmanager
def shared_directory(target: Path, replace: Sequence[str]) -> Iterator[Path]:
    """`whole_directory` for all processes: each of them fills the same one.

    It takes its name when every process has ended the block. Work that can fail on one process
    alone belongs in `at_once`.
    """
    check_alone(target)
    with ExitStack() as stack:
        whole = partial(whole_directory, target, replace)
        yield Path(on_first(lambda: str(stack.enter_context(whole()))))
        in_turn(lambda: None)  # all have written
    on_first(lambda: None)  # it has its name
