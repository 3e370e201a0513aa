"""One process holds a lock, others hear who does, and it is free as soon as its holder is dead, however it died."""

import errno
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from knife import lock
from knife.errors import DiskError, LockedError
from knife.lock import locked, models_locked

pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # of forks where there are threads


@contextmanager
def holder(path: Path, grandchild: bool = False) -> Iterator[int]:
    """Let another process hold a lock; one of its own children may outlive it."""
    told, tell = os.pipe()
    child = os.fork()
    if not child:
        with locked(path, "it"):
            if grandchild and not os.fork():
                time.sleep(3)
                os._exit(0)
            os.write(tell, b"!")
            signal.pause()
        os._exit(0)
    assert os.read(told, 1) == b"!"
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(told)
        os.close(tell)


def elsewhere(work: Callable[[], None]) -> str:
    """Do a work in another process; return what it was refused with."""
    told, tell = os.pipe()
    child = os.fork()
    if not child:
        try:
            work()
        except DiskError as error:
            os.write(tell, f"{type(error).__name__}: {error}".encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(tell)
    with os.fdopen(told) as words:
        return words.read()


def try_it(path: Path, steal: bool = False) -> None:
    with locked(path, "the model", steal):
        pass


def test_the_second_is_told_who_is_first(tmp_path: Path) -> None:
    path = tmp_path / "a" / ".x.lock"
    with holder(path) as child:
        for steal in (False, True):  # what is at work is never stolen from
            with pytest.raises(LockedError) as refusal, locked(path, "the model", steal):
                pass
            said = f"the model is in use by process {child} on {socket.gethostname()}, since 20"
            assert str(refusal.value).startswith(said)
            assert refusal.value.exit_code == 4
        assert json.loads(path.read_text())["pid"] == child


def test_a_dead_holder_frees_it_though_its_children_live(tmp_path: Path) -> None:
    path = tmp_path / ".x.lock"
    with holder(path, grandchild=True):
        assert elsewhere(lambda: try_it(path)).startswith("LockedError")
    assert path.exists()
    assert elsewhere(lambda: try_it(path)) == ""


def test_in_the_end_nothing_is_left(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / ".x.lock"
    with locked(path, "it"):
        assert elsewhere(lambda: try_it(path)).startswith("LockedError: the model is in use by process ")
    assert not any(tmp_path.iterdir())
    with locked(path, "it"):
        (path.parent / "kept").touch()
    assert [one.name for one in path.parent.iterdir()] == ["kept"]


def test_what_another_machine_has_left_is_stolen_on_request_alone(tmp_path: Path) -> None:
    path = tmp_path / ".x.lock"
    path.write_text(json.dumps({"pid": 7, "host": "elsewhere\x1b", "since": "2026-01-01"}))
    with pytest.raises(LockedError, match=r"process 7 on elsewhere\\x1b, since 2026-01-01.*give --steal-lock"):
        try_it(path)
    assert path.exists()
    try_it(path, steal=True)
    assert not path.exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff", '{"pid": {}}', '{"host": null}'[:-3]])
def test_a_torn_note_of_a_dead_holder_does_no_harm(tmp_path: Path, text: str) -> None:
    (tmp_path / ".x.lock").write_text(text, encoding="latin-1")
    try_it(tmp_path / ".x.lock")


def test_a_lock_that_vanishes_while_it_is_taken_is_taken_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real, taken = tmp_path / ".x.lock", lock.lock, []

    def slow(fd: int, path: Path, what: str) -> None:
        real(fd, path, what)
        taken.append(fd)
        if len(taken) == 1:
            path.unlink()  # as its last holder does

    monkeypatch.setattr(lock, "lock", slow)
    with locked(path, "it"):
        assert path.exists()
        assert len(taken) == 2


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP])
def test_a_disk_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(lock.fcntl, "lockf", refuse)
    with pytest.raises(
        DiskError, match=r"\.x\.lock: cannot be locked \(.*such a disk keeps no locks: give ano"
    ) as refusal:
        try_it(tmp_path / ".x.lock")
    assert not isinstance(refusal.value, LockedError)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("kept")
    (tmp_path / ".x.lock").symlink_to("other")
    with pytest.raises(DiskError):
        try_it(tmp_path / ".x.lock")
    assert (tmp_path / "other").read_text() == "kept"


@pytest.mark.parametrize("above", ["", "more"])
def test_a_folder_that_is_a_link_to_nowhere_is_refused(tmp_path: Path, above: str) -> None:
    (tmp_path / "models").symlink_to("nowhere")
    with pytest.raises(DiskError, match=r"\.x\.lock: cannot be locked \(File exists\); allow it"):
        try_it(tmp_path / "models" / above / ".x.lock")


def test_who_was_stolen_from_leaves_the_lock_to_the_thief(tmp_path: Path) -> None:
    path = tmp_path / ".x.lock"
    thiefs = json.dumps({"pid": 7, "host": "elsewhere", "since": "2026-01-01"})
    with locked(path, "it"):
        path.write_text(thiefs)  # as a process of another machine does, which the kernel's lock does not stop
    assert path.read_text() == thiefs
    path.unlink()


def test_all_of_several_models_are_held_or_none(tmp_path: Path) -> None:
    models = [tmp_path / f"{name}.safetensors" for name in ("diffusion", "regress", "regress.judge")]
    with holder(tmp_path / ".regress.judge.lock") as child:
        with pytest.raises(LockedError) as refusal, models_locked(*models):
            pass
        assert str(refusal.value).startswith(f"{models[2]} is in use by process {child} on ")
        assert [path.name for path in tmp_path.iterdir()] == [".regress.judge.lock"]
    with models_locked(*models):
        assert len([*tmp_path.iterdir()]) == 3
    assert not [*tmp_path.iterdir()]


def test_without_fcntl_nothing_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "fcntl", None)
    with locked(tmp_path / "a" / ".x.lock", "it"):
        assert not (tmp_path / "a").exists()
