"""Several processes train as one: the same losses and weights, one writes, one that dies ends the others in words."""

import multiprocessing
import os
import signal
import socket
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train import TINY_PRESET, Witness, a_run, state_of, write_squares

from knife import ranks, spec
from knife.checkpoint import describe, read_about
from knife.errors import KnifeError
from knife.job import Run
from knife.ranks import ALONE, Team, leads, own_device
from knife.resume import resume_path
from knife.train import train as run_training


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offer a preset of tiny networks."""
    monkeypatch.setitem(spec.PRESETS, "tiny", TINY_PRESET)


@pytest.fixture
def squares(tmp_path: Path) -> Path:
    return write_squares(tmp_path / "squares")


def together(work: Callable[[int], Any], count: int = 2, seconds: float = 60) -> list[Any]:
    """Do a work in several processes, as torchrun starts them; return what each returned, or why it was refused."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe() for _ in range(count)]

    def one(number: int) -> None:
        places = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "MASTER_PORT": port}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in places.items()}}
        try:
            told = work(number)
        except KnifeError as error:
            told = f"{type(error).__name__}: {error}"
        except BaseException:
            told = traceback.format_exc()
        pipes[number][1].send(told)
        os._exit(0)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks where there are threads, which all wait here
        processes = [context.Process(target=one, args=(number,)) for number in range(count)]
        for process in processes:
            process.start()
    told = []
    for (pipe, _), process in zip(pipes, processes, strict=True):
        wait([pipe, process.sentinel], seconds)
        told.append(pipe.recv() if pipe.poll() else "silent")
    for process in processes:
        process.kill()
        process.join()
    return told


def steps_of(run: Run, stop: Callable[[], bool] = lambda: False) -> list[tuple[int, float]]:
    witness = Witness()
    run_training(run, witness, stop)
    return witness.steps


def losses_of(run: Run, heard: list[tuple[int, float]]) -> list[float]:
    """Return the loss of each step: what the first process heard."""
    assert [step for step, _ in heard] == [*range(1, run.steps + 1)]
    return [loss for _, loss in heard]


@pytest.mark.parametrize(
    ("kind", "options", "count"),
    [
        ("diffusion", {}, 2), ("regress", {"batch": 8}, 2), ("regress", {"balance": True, "accumulate": 4}, 3),
        ("segment", {"judge": True}, 2),
    ],
)  # fmt: skip
def test_several_processes_walk_as_one_does(squares, kind, options, count):
    """Two with half of a batch each have the losses of one with all of it; usual losses of its bands too."""
    one, several = (a_run(squares, models, kind, steps=5, **options) for models in ("one", "several"))
    alone = losses_of(one, steps_of(one))
    first, *others = together(lambda number: steps_of(several), count)
    assert others == [[]] * (count - 1)  # they tell nothing
    assert losses_of(several, first) == pytest.approx(alone, rel=1e-6)
    mine, theirs = state_of(one), state_of(several)
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-3, atol=1e-5)
    assert describe(several.path).card.training["processes"] == count


def test_each_process_takes_its_rows_of_the_batch():
    rows = torch.arange(7)
    parts = [Team(number, 3).part(rows) for number in range(3)]
    assert [part.tolist() for part in parts] == [[0, 3, 6], [1, 4], [2, 5]]
    assert torch.equal(ALONE.part(rows), rows)


def test_a_stopped_training_resumes_and_all_processes_stop_with_one(squares):
    whole, halves = a_run(squares, "whole"), a_run(squares, "halves")

    def stopped(number: int) -> int:
        asked = iter([False, False, number == 1])  # only the second is told to
        return run_training(halves, Witness(), lambda: next(asked))

    first = together(lambda number: steps_of(whole))[0]
    assert together(stopped) == [2, 2]
    rest = together(lambda number: steps_of(halves))[0]
    assert rest == first[2:]
    mine, theirs = state_of(whole), state_of(halves)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_one_that_is_killed_ends_the_others_in_words(squares):
    run = a_run(squares, every=2)

    def doomed(number: int) -> int:
        asked = iter(range(99))

        def stop() -> bool:
            if number == 1 and next(asked) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return False

        return run_training(run, Witness(), stop)

    told, silent = together(doomed)
    assert silent == "silent"
    assert told.startswith("DeviceError: torchrun: another process of this training has ended or does not answer")
    assert told.endswith("The same command resumes.")
    assert resume_path(run).exists()
    assert [step for step, _ in together(lambda number: steps_of(run))[0]] == [3, 4, 5, 6, 7, 8]


def test_one_that_hangs_ends_the_others_in_words(squares, monkeypatch):
    monkeypatch.setattr(ranks, "HANGS", 3.0)
    monkeypatch.setattr(ranks, "STEPS", 0)
    run = a_run(squares, every=2)

    def hanging(number: int) -> int:
        asked = iter(range(99))

        def stop() -> bool:
            if number == 1 and next(asked) == 3:
                os.kill(os.getpid(), signal.SIGSTOP)
            return False

        return run_training(run, Witness(), stop)

    told, _ = together(hanging, 2, 20)
    assert told.startswith("DeviceError: torchrun: another process of this training has ended or does not answer")
    assert read_about(resume_path(run))["step"] == 2


def test_a_refusal_of_the_first_is_told_and_ends_the_others(squares):
    (squares / "manifest.csv").write_text("nonsense")
    first, other = together(lambda number: steps_of(a_run(squares)))
    assert "another process" not in first
    assert other.startswith("DeviceError: torchrun: another process")


def test_more_processes_than_images_in_a_batch_are_refused(squares):
    told = together(lambda number: steps_of(a_run(squares, batch=2)), 3)
    assert told == ["SettingsError: --batch-size 2: 3 processes share a batch; give one image each."] * 3


def test_each_has_a_gpu_of_its_own(monkeypatch):
    assert own_device("auto") == "auto"
    for name, value in {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    assert own_device("auto") == "auto"
    monkeypatch.setattr(ranks.torch.cuda, "is_available", lambda: True)
    assert [own_device(text) for text in ("auto", "cuda", "cuda:0", "cpu")] == ["cuda:1", "cuda:1", "cuda:0", "cpu"]
    assert not leads()
    monkeypatch.delenv("RANK")
    assert leads()
