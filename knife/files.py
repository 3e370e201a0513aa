"""Files in general: open one that may be hostile, name it in a message, and write one so that no power cut halves it.

Every durable write of knife goes through `write_safely`; every image is opened with `regular` inside `refusing`.
"""

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from knife.errors import InputError

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


def write_safely(path: Path, data: bytes) -> None:
    """Put bytes at a path so that a crash or power loss leaves the old file, none, or the whole new one.

    Folders on the way are made. Raises OSError if the disk refuses; nothing is left behind then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".knife-{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # makes the new name itself survive a power loss
    finally:
        os.close(folder)


def room(folder: Path) -> int:
    """Return the free bytes where a folder is, or will be made.

    Raises OSError, naming the nearest folder that is there, if that cannot be written to.
    """
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(place))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "no folder that can be written to", str(there))
    return shutil.disk_usage(there).free
