"""Writing pieces of files, past the system's cache where the disk is quick.

To copy a piece into the cache, the system has to find memory for it, and on a virtual machine to
ask its host for that: measured with ext4 on one, 3 GB took the processor between 0.8 and 4.5 s,
and straight to the disk (O_DIRECT) 1.2 s, of which the processor worked for 0.2.
"""

import errno
import os
import threading
import time
from pathlib import Path

import numpy as np

from alignjax.weights.tensorfile import WRITE, aligned

_BLOCK = 4096  # bytes, in which a disk is written; of memory, too
_TRIED = 1 << 26  # bytes after which it is known how quick the disk is
_QUICK = 5e8  # bytes a second; a slower disk is better left to the system, which writes behind
_UNABLE = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTBLK)  # what file systems say without O_DIRECT


class Writer:
    """Writes to places of files, for several threads; goes past the cache if that is quick."""

    def __init__(self):
        self.direct = hasattr(os, "O_DIRECT")
        self._own = threading.local()  # a thread's memory that begins with a block
        self._counting, self._writing = threading.Lock(), 0
        self._size, self._seconds = 0, 0.0  # that the disk took, shared among those who waited

    def write(self, file: Path, opened: int, content: np.ndarray, start: int) -> None:
        """Puts bytes into a file, which is also opened for writing, from its byte `start`."""
        first = -start % _BLOCK
        last = first + (len(content) - first) // _BLOCK * _BLOCK
        blocks = content[first:last]
        if not self.direct or len(blocks) < WRITE or not self._past(file, blocks, start + first):
            through(opened, content, start)
            return
        through(opened, content[:first], start)
        through(opened, content[last:], start + last)

    def _past(self, file: Path, content: np.ndarray, start: int) -> bool:
        """Writes whole blocks; False if that cannot be."""
        blocks = self._memory(len(content))
        np.copyto(blocks, content)
        with self._counting:
            self._writing += 1
            sharing, began = self._writing, time.monotonic()
        try:
            _put(file, blocks, start)
        except OSError as error:
            if error.errno not in _UNABLE:
                raise
            self.direct = False
            return False
        finally:
            with self._counting:
                self._writing -= 1
                self._size += len(blocks)
                self._seconds += (time.monotonic() - began) / sharing
        if self._size >= _TRIED and self._size < _QUICK * self._seconds:
            self.direct = False
        return True

    def _memory(self, size: int) -> np.ndarray:
        """A thread's own memory of so many bytes, which the next call gives again."""
        room = getattr(self._own, "room", None)
        if room is None or len(room) < size:
            room = self._own.room = aligned(size, _BLOCK)
        return room[:size]


def _put(file: Path, blocks: np.ndarray, start: int) -> None:
    opened, done = os.open(file, os.O_WRONLY | os.O_DIRECT), 0
    try:
        while done < len(blocks):
            done += os.pwrite(opened, blocks[done:], start + done)
    finally:
        os.close(opened)


def through(opened: int, content: np.ndarray, start: int) -> None:
    """Puts bytes into an open file by way of the system's cache."""
    while len(content):
        count = os.pwrite(opened, content[:WRITE], start)
        content, start = content[count:], start + count
