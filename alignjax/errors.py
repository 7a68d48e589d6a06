"""What a user can mend, in one sentence: mistakes in settings and files, and a disk's refusals."""

import errno
import re

# What a disk can refuse, and what a user can do about it.
DISK = {
    errno.ENOSPC: "no space is left on the disk; free some, and the same command goes on",
    errno.EDQUOT: "the disk quota is used up; free some, and the same command goes on",
    errno.EACCES: "permission is denied; name a place that this user may write to",
    errno.EEXIST: "this is a file, where a directory is needed; name another place",
    errno.EBUSY: "this is a mount point; name a directory in it",
    errno.ENAMETOOLONG: "this name is too long; name another place",
    errno.ENOTDIR: "this lies below a file; name another place",
    errno.EISDIR: "this is a directory, where a file is needed; name another place",
    errno.ELOOP: "this link leads to itself; name another place",
    errno.EFBIG: "a file may not be so large here; raise `ulimit -f`, or name another place",
    errno.EMFILE: "too many files are open; raise `ulimit -n`",
    errno.EROFS: "the file system is read-only; name a place that can be written to",
}
# What would command a terminal, turn its text round or not be encoded; line ends and tabs are kept.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(ValueError):
    """A mistake that a user can mend; its text is the whole sentence: place, problem and fix."""


class SharedError(UserError):
    """A mistake that every process has been told of, so that they end together."""


def sentence_of(error: BaseException) -> str:
    """Return what to tell a user of an error, or "" for one that is nobody's mistake but ours."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in DISK:
        return f"{error.filename or 'writing'}: {DISK[error.errno]}."
    return ""


def printable(text: str) -> str:
    """Return text for a terminal, its control characters written out: `\\x1b` for an escape."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
