"""One process a model at a time, to train, measure or import it, by a lock that is free as soon as its holder dies.

The lock is POSIX's (`lockf`), on one descriptor that is kept for life: no child inherits it, and the kernel frees it
however its holder dies. Its file says who that is. The kernel knows of the processes of its own machine alone, so on a
disk that several share, what a process of another one has left there counts as held. Where there is no `fcntl`
(Windows), nothing is locked.
"""

import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from knife.errors import DiskError, LockedError
from knife.files import make_folder, shown

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

HELD = (errno.EACCES, errno.EAGAIN)  # what lockf answers if another process has the lock
NONE = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # what it answers where there are no locks, as on NFS without lockd
MOST = 4096  # bytes that are read of what a holder says of itself


@contextmanager
def models_locked(*models: Path, steal: bool = False) -> Iterator[None]:
    """Hold the locks of models by their files: nobody else trains, measures or imports them meanwhile.

    Raises LockedError and DiskError as `locked` does.
    """
    with ExitStack() as held:
        for model in models:
            held.enter_context(locked(model.with_name(f".{model.stem}.lock"), shown(model), steal))
        yield


@contextmanager
def locked(path: Path, what: str, steal: bool = False) -> Iterator[None]:
    """Hold the lock of a file; in the end it is removed, and so are folders made for it if nothing lies in them.

    Args:
        path: the lock's file; it is made, and the folders above it.
        what: what is locked, in words.
        steal: take the lock though a process of another machine has left its name there.

    Raises:
        LockedError: if another process holds it.
        DiskError: if the file cannot be made, or the disk keeps no locks.
    """
    if fcntl is None:
        yield
        return
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        fd = taken(path, what, steal)
    except OSError as error:
        advice = (
            "such a disk keeps no locks: give another one, or mount it with them" if error.errno in NONE else "allow it"
        )
        raise DiskError(f"{shown(path)}: cannot be locked ({error.strerror or error}); {advice}.") from error
    mine = read(fd)
    try:
        yield
    finally:
        with suppress(OSError):
            if read(fd) == mine:  # else a process of another machine has taken it over
                os.unlink(path)  # before it is freed: nobody else holds it
        os.close(fd)
        with suppress(OSError):
            for folder in made:
                folder.rmdir()


def taken(path: Path, what: str, steal: bool) -> int:
    """Return the descriptor of a lock that is now this process's."""
    while True:
        make_folder(path.parent)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except FileNotFoundError:
            continue  # its last holder has removed the folder in between
        try:
            lock(fd, path, what)
            if is_at(fd, path):
                refuse_elsewhere(fd, path, what, steal)
                sign(fd)
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # its last holder has removed it in between


def lock(fd: int, path: Path, what: str) -> None:
    """Take a lock, or refuse at once."""
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in HELD:
            raise
        raise LockedError(f"{what} is in use by {spelled(read(fd))}; wait for it, or end it.") from None


def is_at(fd: int, path: Path) -> bool:
    """Tell whether a descriptor is that of the file at a path."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def refuse_elsewhere(fd: int, path: Path, what: str, steal: bool) -> None:
    """Refuse a lock that a process of another machine has not given back: it may well be at work."""
    holder = read(fd)
    if holder.get("host", socket.gethostname()) != socket.gethostname() and not steal:
        raise LockedError(
            f"{what} was begun by {spelled(holder)}, another machine; "
            f"if that process has ended, give --steal-lock, or remove {shown(path.name)}."
        )


def read(fd: int) -> dict[str, Any]:
    """Return what a lock's file says of its holder; what is torn says nothing."""
    try:
        holder = json.loads(os.pread(fd, MOST, 0))
    except (OSError, ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) else {}


def sign(fd: int) -> None:
    """Say in a lock's file who holds it."""
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    os.ftruncate(fd, 0)
    os.pwrite(fd, json.dumps(holder).encode(), 0)


def spelled(holder: dict[str, Any]) -> str:
    """Say who holds a lock."""
    if not holder:
        return "another process"
    told = [shown(str(holder.get(name, "?"))[:80]) for name in ("pid", "host", "since")]
    return "process {} on {}, since {}".format(*told)
