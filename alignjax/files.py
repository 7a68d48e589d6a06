"""Files and directories that appear only when they are whole, on a disk or in a bucket."""

import io
import json
import math
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

from alignjax import validate
from alignjax.errors import UserError, sentence_of
from alignjax.progress import gigabytes


def is_remote(path) -> bool:
    """Whether a path is an object store's, such as gs://bucket/run."""
    return "://" in os.fspath(path)


def location(path: str) -> Path:
    """A path to work with: the disk's as it is, an object store's through etils.

    Paths of both kinds have the methods of `pathlib.Path`; an object store writes a file whole or
    not at all, has no directories to rename, and cannot append.
    """
    if not is_remote(path):
        try:
            return Path(path).expanduser()
        except RuntimeError:
            raise UserError(
                f"{path}: there is no home directory for ~; set HOME, or name it whole."
            ) from None
    from etils import epath

    try:
        return epath.Path(path)
    except KeyError:
        raise UserError(f"{path}: no such object store is known; use gs:// or s3://.") from None


def make_directory(path: Path) -> None:
    """Make a directory to write into, and those above it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        said = f"{path}: this directory cannot be made ({error.strerror}); name another place."
        raise UserError(sentence_of(error) or said) from None


def led_to(path: Path) -> Path:
    """Return where a path leads, all links followed, so that writing replaces no link."""
    return path if is_remote(path) else Path(os.path.realpath(path))


def check_own(file: Path, begins: str) -> None:
    """Refuse to overwrite a file that does not begin as what this command writes."""
    if file.is_dir():
        raise UserError(f"{file}: this is a directory, where a file is needed; name another place.")
    if not file.exists():
        return
    with file.open("rb") as there:
        if there.read(len(begins.encode())) != begins.encode():
            raise UserError(f"{file}: it is there and not by this command; name another place.")


def remove_files(directory: Path, *patterns: str) -> None:
    """Delete the files of a directory that match, and nothing else."""
    for pattern in patterns:
        for file in list(directory.glob(pattern)):
            file.unlink(missing_ok=True)


def check_absent(path: str, key: str, sources: Sequence[str]) -> None:
    """Refuses a directory to be written that is there, unless it is empty; `key` is the user's."""
    target = location(path)
    if not target.exists():
        return
    if led_to(target) in (led_to(Path(source)) for source in sources):
        raise UserError(f"{key}={path}: it is the source; name another directory.")
    if not target.is_dir() or any(target.iterdir()):
        raise UserError(f"{key}={path}: it is there already; delete it, or name another one.")


def check_space(target: Path, need: int, said: str) -> None:
    """Refuses, before anything is written, a disk that has too little room for `need` bytes."""
    if is_remote(target):
        return
    parent = led_to(target).parent
    there = next(path for path in (parent, *parent.parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < need:
        raise UserError(
            f"{said}: it needs {gigabytes(need)}, and {gigabytes(free)} are free; free some space, "
            "or name another disk."
        )


@contextmanager
def naming(target: Path) -> Iterator[None]:
    """Puts a file's name into an OSError that has none: a write to an open file does not say it."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or os.fspath(target)
        raise


@contextmanager
def whole_directory(target: Path, replace: Sequence[str] = ()) -> Iterator[Path]:
    """A directory to fill; it takes its name when the block ends well.

    A target that is there by then stays, since another process has made the same one, unless
    `replace` gives patterns of the names that are ours in it. The others stay in the new one.
    """
    if is_remote(target):
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch)
            _copy_up(Path(scratch), target)
        return
    target = led_to(target)
    make_directory(target.parent)
    _remove_abandoned(target, replace)
    partial = _partial(target)
    partial.mkdir()
    try:
        with naming(target):
            yield partial
        if replace and target.exists():
            older = partial.with_suffix(".older")
            target.rename(older)
            partial.rename(target)
            _bring_back(older, target, replace)
        else:
            try:
                partial.rename(target)
            except OSError:
                if not target.is_dir():
                    raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_whole(target: Path, content: str | bytes) -> None:
    """Writes a file in one step: readers see the old one or the new one."""
    if isinstance(content, str):
        content = content.encode()
    target = led_to(target)
    make_directory(target.parent)
    if is_remote(target):
        target.write_bytes(content)
        return
    _remove_abandoned(target)
    partial = _partial(target)
    try:
        with naming(target):
            partial.write_bytes(content)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def read_json(file: Path, kind: Any = dict) -> Any:
    """Return what a JSON file holds, which has to be of the type `kind` (see `validate.check`).

    Raises UserError, naming the file, where it cannot be read, is damaged, or holds anything else.
    """
    if not file.is_file():  # nor a pipe or a device, which may have no end
        raise UserError(f"{file}: there is no such file; copy or fetch it again.")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: this is not JSON ({error}); copy or fetch it again.") from None
    except OSError as error:
        raise UserError(f"{file}: it cannot be read ({error.strerror}).") from None
    if kind is dict and not isinstance(found, dict):
        raise UserError(f"{file}: it holds no JSON object; copy or fetch it again.")
    validate.check(found, kind, str(file))
    return found


def save_array(target: Path, array: np.ndarray) -> None:
    """Writes a .npy file in one step."""
    content = io.BytesIO()
    np.save(content, array)
    write_whole(target, content.getvalue())


def load_array(file: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """Return what `save_array` wrote, float32; None if it is gone, damaged or of another shape."""
    head, kind = io.BytesIO(), {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(head, kind)
    head = head.getvalue()
    content = file.read_bytes() if file.is_file() else b""
    if not content.startswith(head) or len(content) != len(head) + 4 * math.prod(shape):
        return None
    return np.frombuffer(content, np.float32, offset=len(head)).reshape(shape).copy()


def _partial(target: Path) -> Path:
    return target.with_name(f".{target.name}.{socket.gethostname()}.{os.getpid()}.partial")


def _bring_back(older: Path, target: Path, replace: Sequence[str]) -> None:
    """Moves what is not ours from the directory that was replaced, and deletes the rest of it."""
    if not target.exists():  # killed in between
        older.rename(target)
        return
    for left in list(older.iterdir()):
        if not any(fnmatch(left.name, own) for own in replace):
            left.rename(target / left.name)
        else:
            left.unlink() if not left.is_dir() else shutil.rmtree(left)
    older.rmdir()


def _remove_abandoned(target: Path, replace: Sequence[str] = ()) -> None:
    """Deletes what a killed process of this host left of an earlier try, if it is ours."""
    start = f".{target.name}.{socket.gethostname()}."
    for left in target.parent.iterdir():
        pid, _, kind = left.name.removeprefix(start).partition(".")
        if not left.name.startswith(start) or kind not in ("partial", "older"):
            continue
        if not pid.isdecimal() or _runs(int(pid)):
            continue
        if kind == "older" and left.is_dir():
            _bring_back(left, target, replace)
        else:  # another process may be deleting it as well
            left.unlink(missing_ok=True) if left.is_file() else shutil.rmtree(left, True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()


def _copy_up(source: Path, target: Path) -> None:
    """Copies a directory to an object store, its config.json last: without it, it is no model."""
    files = [file for file in sorted(source.rglob("*")) if file.is_file()]
    for file in sorted(files, key=lambda file: file.name == "config.json"):
        goal = target / file.relative_to(source).as_posix()
        goal.parent.mkdir(parents=True, exist_ok=True)
        with file.open("rb") as there, goal.open("wb") as here:
            shutil.copyfileobj(there, here)
