"""No crash, power loss or failing call takes a committed state away; weaker protocols than ours are caught at it."""

import errno
import inspect
import json
import os
import resource
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import pytest
import torch
from crashes import Disk, Failing

from knife import checkpoint, files, resume
from knife.checkpoint import read_about, save
from knife.errors import DiskError
from knife.job import Run
from knife.resume import newest, path_before, resume_path, set_aside

SAVES = 4
MUTANTS = {  # what is left out -> the line of knife/files.py, and what stands there instead
    "sync of the file": ("            os.fsync(fd)\n        if before", "        if before"),
    "sync of the folder": ("        raise\n    sync(path.parent)", "        raise"),
    "sync of new folders": ("            raise\n    sync(folder.parent)", "            raise"),
    "a temporary file": ("        os.replace(temporary, path)\n", ""),
    "keeping the old one": ("os.replace(path, before)", "os.unlink(path)"),
    "syncing before renaming": (
        "            os.fsync(fd)\n        if before is not None:\n            with suppress(FileNotFoundError):\n"
        "                os.replace(path, before)\n        os.replace(temporary, path)\n",
        "            os.replace(temporary, path)\n            os.fsync(fd)\n",
    ),
}


def mutant(old: str, new: str, in_place: bool = False) -> ModuleType:
    """Return knife/files.py with one thing changed."""
    source = inspect.getsource(files)
    assert source.count(old) == 1
    source = source.replace(old, new)
    if in_place:
        source = source.replace(
            '    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}.tmp")', "    temporary = path"
        )
        source = source.replace("os.O_CREAT | os.O_EXCL", "os.O_CREAT | os.O_TRUNC")
    module = ModuleType("mutant")
    exec(compile(source, "mutant", "exec"), module.__dict__)
    return module


def a_run(models: Path) -> Run:
    return Run("regress", Path("data"), models, "set", "small-64", steps=9, batch=1, lr=1.0, ema=0.0)


def put(run: Run, step: int) -> None:
    """Commit a tiny state."""
    save(resume_path(run), {"x": torch.full((3,), float(step))}, {"step": step}, path_before(run))


def recovered(run: Run) -> int:
    """Return the step a run would go on from, 0 for a fresh one, and -1 if it would be refused."""
    try:
        found = newest(run, lambda words: None)
    except DiskError:
        return -1
    return int(found.about["step"]) if found else 0


def lay(state: dict[str, bytes], root: Path) -> Run:
    """Put what a crash left into a folder."""
    for path in root.rglob("*.safetensors"):
        path.unlink()
    for name, data in state.items():
        path = root / name.removeprefix("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return a_run(root / "disk")


def crash_states(
    monkeypatch: pytest.MonkeyPatch, root: Path, module: ModuleType = files, damaged: bool = False
) -> tuple[int, int]:
    """Return in how many states a crash during some saves may leave the disk, and how many of these are bad.

    Good is one that goes on from the last committed state, or from the one that was being written.

    damaged: begin with a newest state that has been found damaged.
    """
    disk, run, tried, bad = Disk(), a_run(Path("/disk")), 0, 0
    with monkeypatch.context() as patch:
        for place in (files, module, resume):
            patch.setattr(place, "os", disk)
        patch.setattr(checkpoint, "files", module)
        if damaged:
            put(run, 1)
            put(run, 2)
            disk.find(resume_path(run)).kept = disk.find(resume_path(run)).data = b"rotten"
            disk.crashes.clear()
            set_aside(resume_path(run), run)
        committed = [(1, len(disk.crashes))] if damaged else [(0, len(disk.crashes))]
        for step in range(3 if damaged else 1, SAVES + 1):
            put(run, step)
            committed.append((step, len(disk.crashes)))
    for number, states in enumerate(disk.crashes):
        safe = max([step for step, when in committed if when <= number], default=committed[0][0])
        coming = min([step for step, when in committed if when > number], default=SAVES)
        for state in states:
            tried += 1
            bad += recovered(lay(state, root)) not in (safe, coming)
    return tried, bad


def test_no_crash_loses_a_committed_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried, bad = crash_states(monkeypatch, tmp_path)
    print(json.dumps({"crash states": tried, "bad": bad}))
    assert tried > 100
    assert bad == 0


def test_no_crash_loses_the_last_whole_state_beside_a_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried, bad = crash_states(monkeypatch, tmp_path, damaged=True)
    assert tried > 40
    assert bad == 0


@pytest.mark.parametrize("what", MUTANTS)
def test_weaker_protocols_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    tried, bad = crash_states(monkeypatch, tmp_path, mutant(*MUTANTS[what], in_place=what == "a temporary file"))
    print(json.dumps({"without": what, "crash states": tried, "bad": bad}))
    assert bad > 0


# ------------------------------------------------------------------------------------------------------- failing calls


def in_child(work: Callable[[], None]) -> int:
    """Do a work in a child process; return what it ends with."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # as below
def test_a_file_that_may_not_grow_so_far_leaves_the_state_before(tmp_path: Path) -> None:
    """The system's own limit, as quotas have it: the write is cut short, and then refused (EFBIG)."""
    run = a_run(tmp_path)
    put(run, 1)

    def too_large() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            save(resume_path(run), {"x": torch.zeros(9999)}, {"step": 2}, path_before(run))
        except DiskError as error:
            os._exit(4 if "File too large" in str(error) else 1)

    assert in_child(too_large) == 4
    assert recovered(run) == 1
    assert [path.name for path in run.path.parent.iterdir()] == [resume_path(run).name]


@pytest.mark.filterwarnings(
    "ignore:This process:DeprecationWarning"
)  # of forks where there are threads, which all wait
@pytest.mark.parametrize("how", [errno.ENOSPC, errno.EIO, errno.EDQUOT, "short", "before", "after"])
@pytest.mark.parametrize("ever", [False, True])
def test_whichever_call_fails_a_whole_state_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: int | str, ever: bool
) -> None:
    """The n-th call fails while the second and third state are written, for every n until none does."""
    for n in range(1, 99):
        run, failing = a_run(tmp_path / str(n)), Failing(n, how, ever)
        put(run, 1)
        with monkeypatch.context() as patch:
            patch.setattr(files, "os", failing)

            def two_more(run: Run = run) -> None:
                for step in (2, 3):
                    with suppress(DiskError):
                        put(run, step)

            died = in_child(two_more) == 9 if how in ("before", "after") else two_more()
        assert recovered(run) in ((1, 2, 3) if died or how != "short" else (3,))
        left = [path.name for path in run.path.parent.iterdir() if path.name.endswith(".tmp")]
        assert died or ever or not left
        put(run, 4)  # the disk is mended
        assert recovered(run) == 4
        assert all(read_about(path)["step"] <= 4 for path in run.path.parent.glob("*.safetensors"))
        if not died and not failing.reached:
            break
    assert 10 < n < 40
