"""Killed, signalled, on failing disks, with nobody who listens: a short run of benchmarks/endurance.py, and more."""

import itertools
import os
import pty
import random
import shutil
import signal
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import knife.outputs
from knife import cli, resume, spec
from knife.checkpoint import describe, read_tensors
from knife.cli import terminal, training
from knife.errors import DiskError
from knife.job import Run
from knife.resume import digest, log_path, resume_path
from knife.train import Unwatched, train
from knife.translation import translations

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import endurance

pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # of forks where there are threads


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offer a preset of tiny networks."""
    monkeypatch.setitem(spec.PRESETS, "tiny", endurance.PRESET)
    monkeypatch.setattr(resume, "LOG_EVERY", 2)


@pytest.mark.slow
def test_killed_trainings_lose_nothing_and_end_as_if_never_killed(tmp_path: Path) -> None:
    counts = endurance.kill_trainings(tmp_path, 100, random.Random(0))
    assert counts["kills"] >= 100
    assert counts["ended"] > 0
    assert (counts["lost"], counts["mismatched"], counts["refused"]) == (0, 0, 0)


def test_signalled_trainings_save_and_say_so(tmp_path: Path) -> None:
    counts = endurance.signal_trainings(tmp_path, 6, random.Random(0))
    assert counts["signals"] >= 6
    assert (counts["mismatched"], counts["wrong_code"], counts["still_locked"]) == (0, 0, 0)


@pytest.mark.slow
def test_trainings_on_failing_disks_end_well_when_these_are_mended(tmp_path: Path) -> None:
    counts = endurance.fail_calls(tmp_path, 61)
    assert counts["calls"] >= 10
    assert counts["crashed"] > 0
    assert (counts["mismatched"], counts["other"]) == (0, 0)


def test_killed_translations_do_everything_once(tmp_path: Path) -> None:
    counts = endurance.kill_translations(tmp_path, 24, 8, random.Random(0))
    assert counts["kills"] > 3
    assert (counts["missing"], counts["torn"], counts["done_twice"]) == (0, 0, 0)


# ---------------------------------------------------------------------------------------------- what need not disturb


def by_command(run: Run, *streams: int) -> int:
    """Train by the command line in a child with these as stdout and stderr; return its exit code."""
    number = os.fork()
    if not number:
        for place, stream in enumerate(streams, 1):
            os.dup2(stream, place)
        for name, place in {"stdout": 1, "stderr": 2}.items():
            setattr(sys, name, os.fdopen(place, "w"))
        terminal.words, terminal.results = terminal.Words(stderr=True), terminal.Console()
        code = 1
        try:
            endurance.commanded(run)
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def gone() -> int:
    """Return the end of a pipe to which nobody listens."""
    listening, told = os.pipe()
    os.close(listening)
    return told


def narrow() -> int:
    """Return a terminal of 20 columns, to which a thread listens."""
    listening, told = pty.openpty()
    termios.tcsetwinsize(told, (10, 20))

    def listen() -> None:
        with suppress(OSError):
            while os.read(listening, 4096):
                pass

    threading.Thread(target=listen, daemon=True).start()
    return told


def full() -> int:
    return os.open("/dev/full", os.O_WRONLY)


@pytest.mark.parametrize("stream", [gone, narrow, full])
def test_a_training_does_not_mind_who_listens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: Callable[[], int]
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    whole, heard = (endurance.tiny_run(tmp_path, name) for name in ("whole", "heard"))
    endurance.finished(whole)
    code = by_command(heard, stream(), stream())
    assert digest(heard) == digest(whole)
    assert describe(heard.path).card.training["step"] == heard.steps
    assert code == (4 if stream is full else 0)  # all is done, but nobody can know


def test_a_training_does_not_mind_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, jumping = (endurance.tiny_run(tmp_path, name) for name in ("whole", "jumping"))
    endurance.finished(whole)
    years, real = itertools.cycle((0.0, 1e9, -1e9)), time.time
    monkeypatch.setattr(time, "time", lambda: real() + next(years))
    endurance.finished(jumping)
    assert digest(jumping) == digest(whole)


def test_a_training_does_not_mind_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    """It says so once, and is saved as ever."""
    whole, mute = (endurance.tiny_run(tmp_path, name) for name in ("whole", "mute"))
    endurance.finished(whole)
    log_path(mute).mkdir(parents=True)
    said: list[str] = []

    class Hearing(Unwatched):
        def warned(self, words: str) -> None:
            said.append(words)

    assert train(mute, Hearing()) == mute.steps
    (words,) = said
    assert words.endswith("regress.log.jsonl: cannot be written (Is a directory); make room, or allow it. "
                          "The training goes on without a log.")  # fmt: skip
    mine, theirs = (read_tensors(resume_path(run)) for run in (mute, whole))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_a_log_that_could_not_be_written_once_is_written_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = (endurance.tiny_run(tmp_path, name) for name in ("whole", "parts"))
    endurance.finished(whole)
    real, tried = resume.write_safely, list[Path]()

    def failing(path: Path, data: bytes) -> None:
        tried.append(path)
        if len(tried) == 2:
            raise DiskError("full")
        real(path, data)

    monkeypatch.setattr(resume, "write_safely", failing)
    endurance.finished(parts)
    assert tried == [log_path(parts)] * 3
    assert digest(parts) == digest(whole)


# -------------------------------------------------------------------------------------------------------------- signals


def test_a_signal_before_the_command_listens_or_after_is_an_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    handlers: dict[int, Any] = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)

    def interrupted() -> None:
        raise KeyboardInterrupt  # out of what typer does before it listens

    def terminated() -> None:
        handlers[signal.SIGTERM](signal.SIGTERM, None)

    for app, code in ((interrupted, 130), (terminated, 143)):
        monkeypatch.setattr(cli, "app", app)
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == code
        assert handlers == {signal.SIGINT: signal.SIG_DFL, signal.SIGTERM: signal.SIG_DFL}


def test_a_second_signal_does_what_it_always_did() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with training.interruptible() as caught:
            os.kill(os.getpid(), signal.SIGTERM)
            assert (caught, heard) == ([signal.SIGTERM], [])
            os.kill(os.getpid(), signal.SIGTERM)
            assert (caught, heard) == ([signal.SIGTERM], [signal.SIGTERM])
        os.kill(os.getpid(), signal.SIGTERM)
        assert len(heard) == 2
    finally:
        signal.signal(signal.SIGTERM, before)


# -------------------------------------------------------------------------------------------------------- translations


def test_results_whose_folder_is_removed_meanwhile_are_made_by_the_same_command(tmp_path: Path) -> None:
    """The others go on, or are refused if they were being written; nobody takes what is gone for done."""
    endurance.store_models(tmp_path / "models")
    for i in range(3):
        endurance.write_nifti(tmp_path / "in" / f"{i}.nii", endurance.phantom(i, size=16).pixels)

    def translated(out: Path) -> Iterator[Any]:
        settings = replace(endurance.QUICK, batch_size=1)
        wish = endurance.Wish("regress", "0.3")
        return translations([tmp_path / "in"], wish, out=out, models=tmp_path / "models", settings=settings)

    whole, out = tmp_path / "whole", tmp_path / "out"
    assert len([*translated(whole)]) == 3
    coming = translated(out)
    next(coming)
    shutil.rmtree(out, ignore_errors=True)
    with suppress(DiskError):
        assert len([*coming]) == 2
    wanted = endurance.results_of(whole)
    assert endurance.results_of(out).keys() < wanted.keys()
    assert len([*translated(out)]) == 3
    assert endurance.results_of(out) == wanted


def test_a_result_that_is_removed_before_it_is_hashed_is_refused_as_what_the_disk_did(tmp_path, monkeypatch) -> None:
    endurance.store_models(tmp_path / "models")
    endurance.write_nifti(tmp_path / "in.nii", endurance.phantom(0, size=16).pixels)
    written = knife.outputs.sha256_of

    def removed(path: Path) -> str:
        path.unlink()
        return written(path)

    monkeypatch.setattr(knife.outputs, "sha256_of", removed)
    wish = endurance.Wish("regress", "0.3")
    coming = translations(
        tmp_path / "in.nii", wish, out=tmp_path / "out", models=tmp_path / "models", settings=endurance.QUICK
    )
    with pytest.raises(DiskError, match=r"-o .*out: cannot be written to"):
        next(coming)
