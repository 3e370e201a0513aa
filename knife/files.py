"""Files in general: open one that may be hostile, name it in a message, and write one so that no power cut halves it.

Every durable write of knife goes through `write_safely`; every image is opened with `regular` inside `refusing`.
"""

import errno
import hashlib
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from knife.errors import InputError

TEMPORARY = ".knife-"  # how the names of unfinished files begin
STALE = 3600  # seconds after which nobody is writing an unfinished file any more
MARK = "synthetic: knife"  # what every image that knife writes says of itself


def shown(path: Path | str) -> str:
    """Spell a path so that it fits on one line: control characters and undecodable bytes are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(path))


@contextmanager
def refusing(path: Path, what: str) -> Iterator[None]:
    """Turn whatever reading raises into an InputError that names the file and `what` it should have been."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{shown(path)}: no such file; check the name.") from None
    except MemoryError as error:
        raise InputError(f"{shown(path)}: needs more memory than there is; give a smaller file.") from error
    except Exception as error:  # nibabel, pillow, zlib and numpy raise more than a dozen classes on damaged files
        lines = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()
        reason = " ".join(lines)[:160].rstrip(" .")
        raise InputError(f"{shown(path)}: cannot be read as {what} ({reason}); save or copy it anew.") from error


@contextmanager
def regular(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file for reading; a FIFO, device or socket is refused without waiting on it.

    Raises InputError if it is none or empty, OSError if it cannot be opened.
    """
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{shown(path)}: no regular file; give an image file.")
        if not status.st_size:
            raise InputError(f"{shown(path)}: the file is empty; copy it anew.")
        yield file


def write_safely(path: Path, data: bytes, before: Path | None = None) -> None:
    """Put bytes at a path so that a crash or power loss leaves the old file, none, or the whole new one.

    Once it returns, no crash takes the new file away. Folders on the way are made.

    Args:
        path: where they go.
        data: the bytes.
        before: where the old file goes, if it shall be kept; a crash may leave nothing at `path` then, and it there.

    Raises OSError if the disk refuses; what was at `path` is there then, or at `before`.
    """
    make_folder(path.parent)
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}.tmp")
    try:
        with descriptor(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)) as fd:
            write_all(fd, data)
            os.fsync(fd)
        if before is not None:
            with suppress(FileNotFoundError):
                os.replace(path, before)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    sync(path.parent)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal; raises OSError if it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_all(fd: int, data: bytes) -> None:
    """Write bytes, however few of them the system takes at a time."""
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]


@contextmanager
def descriptor(path: Path, flags: int) -> Iterator[int]:
    """Open a file or folder for system calls."""
    fd = os.open(path, flags, 0o666)  # less what the umask says
    try:
        yield fd
    finally:
        os.close(fd)


def sync(folder: Path) -> None:
    """Make the names in a folder survive a power loss, as far as the system lets folders be opened."""
    if os.name == "posix":
        with descriptor(folder, os.O_RDONLY) as fd:
            os.fsync(fd)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it so that they survive a power loss."""
    if os.path.isdir(folder):
        return
    make_folder(folder.parent)
    try:
        os.mkdir(folder)
    except FileExistsError:  # another process was quicker, unless a link leads nowhere
        if os.path.islink(folder):
            raise
    sync(folder.parent)


def remove_left_behind(folder: Path) -> None:
    """Remove what `write_safely` had not finished in a folder when its process was killed, an hour ago or longer."""
    for left in folder.glob(f"{TEMPORARY}*.tmp"):
        with suppress(OSError):
            if time.time() - os.stat(left).st_mtime > STALE:
                os.unlink(left)


def room(folder: Path) -> int:
    """Return the free bytes where a folder is, or will be made.

    Raises OSError, naming what is there, if it cannot be written to; NotADirectoryError if it is no folder at all.
    """
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(place))
    if not there.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "no folder that can be written to", str(there))
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "no folder that can be written to", str(there))
    return shutil.disk_usage(there).free
