"""A disk that loses power: it notes what is done to it, and lists all that may lie on it after a crash.

What was not synced may be there, half there, zeros, or not there: of a file its bytes, of a folder any of the changes
to its names, in any combination. It stands in for the module `os` in `knife.files`. `Failing` is the real one, whose
n-th call fails.
"""

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE_CALLS = ("open", "write", "fsync", "replace", "unlink", "mkdir", "close")


@dataclass(eq=False)
class Node:
    """A file, or a folder if it has names."""

    folder: bool = False
    kept: bytes = b""  # what a crash cannot take away
    data: bytes = b""
    names: dict[str, "Node"] = field(default_factory=dict)  # of a folder, those that a crash cannot take away
    pending: list[dict[str, "Node | None"]] = field(default_factory=list)  # changes to them that it can

    def now(self) -> dict[str, "Node"]:
        return named(self.names, self.pending)


def named(names: dict[str, Node], changes: Sequence[dict[str, Node | None]]) -> dict[str, Node]:
    """Return names after some changes, each of which happens whole."""
    told: dict[str, Node | None] = dict(names)
    for change in changes:
        told |= change
    return {name: node for name, node in told.items() if node is not None}


class Disk:
    """The part of `os` that writes files, on a disk of its own; `states` holds what each call leaves to chance."""

    name, path = "posix", os.path
    O_WRONLY, O_RDONLY, O_CREAT, O_EXCL, O_TRUNC = os.O_WRONLY, os.O_RDONLY, os.O_CREAT, os.O_EXCL, os.O_TRUNC

    def __init__(self) -> None:
        self.root, self.opened = Node(folder=True), dict[int, Node]()
        self.path = type("path", (), {"isdir": self.isdir})  # type: ignore[assignment]
        self.crashes: list[list[dict[str, bytes]]] = [self.states()]

    def done(self) -> None:
        """Note what a crash after this call may leave."""
        self.crashes.append(self.states())

    def place(self, path: Path) -> tuple[Node, str]:
        """Return the folder of a path, and its name there."""
        node = self.root
        for part in path.parts[1:-1]:
            if part not in node.now():
                raise FileNotFoundError(2, "no such folder", str(path))
            node = node.now()[part]
        return node, path.name

    def find(self, path: Path) -> Node:
        folder, name = self.place(path)
        node = folder.now().get(name) if name else self.root
        if node is None:
            raise FileNotFoundError(2, "no such file", str(path))
        return node

    def isdir(self, path: Path) -> bool:
        try:
            return self.find(path).folder
        except FileNotFoundError:
            return False

    def open(self, path: Path, flags: int, mode: int = 0o777) -> int:
        folder, name = self.place(path)
        there = folder.now()
        if name and name not in there and flags & os.O_CREAT:
            folder.pending.append({name: Node()})
        elif flags & os.O_EXCL:
            raise FileExistsError(17, "is there", str(path))
        node = self.find(path)
        if flags & os.O_TRUNC:
            node.data = b""
        self.opened[len(self.opened) + 3] = node
        self.done()
        return len(self.opened) + 2

    def write(self, fd: int, data: Any) -> int:
        self.opened[fd].data += bytes(data)
        self.done()
        return len(data)

    def fsync(self, fd: int) -> None:
        node = self.opened[fd]
        node.kept, node.names, node.pending = node.data, node.now(), []
        self.done()

    def close(self, fd: int) -> None:
        pass

    def mkdir(self, path: Path) -> None:
        folder, name = self.place(path)
        folder.pending.append({name: Node(folder=True)})
        self.done()

    def unlink(self, path: Path) -> None:
        self.find(path)
        folder, name = self.place(path)
        folder.pending.append({name: None})
        self.done()

    def replace(self, source: Path, target: Path) -> None:
        node, (folder, name) = self.find(source), self.place(target)
        assert folder is self.place(source)[0], "across folders"
        folder.pending.append({source.name: None, name: node})
        self.done()

    def states(self) -> list[dict[str, bytes]]:
        """Return all that may lie on the disk after a crash now: for each case, path -> bytes."""
        found = {tuple(sorted(case.items())) for case in cases(self.root, "")}
        return [dict(case) for case in found]


def cases(node: Node, path: str) -> Iterator[dict[str, bytes]]:
    """Yield what may be left of a file or folder."""
    if not node.folder:
        half, zeros = node.data[: len(node.data) // 2], b"\0" * len(node.data)
        yield from ({path: data} for data in {node.kept, node.data, *(() if node.kept == node.data else (half, zeros))})
        return
    choices = [*itertools.product((True, False), repeat=len(node.pending))]
    for chosen in choices:
        names = named(node.names, [*itertools.compress(node.pending, chosen)])
        parts = [[*cases(inner, f"{path}/{name}")] for name, inner in names.items()]
        for combination in itertools.product(*parts):
            yield {name: data for part in combination for name, data in part.items()}


class Failing:
    """The module `os`, of whose calls that touch files the n-th fails (and all after it, if `ever`).

    how: an errno; "short", for a write that takes but a part; "before" or "after", for a process that ends there.
    """

    def __init__(self, n: int, how: int | str, ever: bool = False) -> None:
        self.n, self.how, self.ever, self.count = n, how, ever, 0
        self.failed: object = None  # what the call that failed was about: a path, or a file descriptor

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        return (lambda *given: self.call(real, name, *given)) if name in FILE_CALLS else real

    def call(self, real: Any, name: str, *given: Any) -> Any:
        self.count += 1
        if self.count != self.n and not (self.ever and self.count > self.n):
            return real(*given)
        if self.how == "short":
            return real(given[0], given[1][: max(1, len(given[1]) // 3)]) if name == "write" else real(*given)
        if isinstance(self.how, int):
            if name == "close":
                real(*given)  # as Linux does
            self.failed = given[0]
            raise OSError(self.how, os.strerror(self.how))
        if self.how == "after":
            real(*given)
        os._exit(9)

    @property
    def reached(self) -> bool:
        return self.count >= self.n
