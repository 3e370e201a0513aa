"""Batches made ahead are those made in place, of the step they belong to; nothing is made too many, no thread stays."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train import TINY_PRESET, Witness, a_run, same, state_of, trained, write_squares

from knife import batches, spec
from knife.batches import Ahead, Batch, batch_of, checksums, made
from knife.errors import InputError, KnifeError
from knife.job import Job, Run, prepare
from knife.ranks import Team
from knife.resume import read_about, resume_path
from knife.tasks import Task
from knife.train import train as run_training


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offer a preset of tiny networks."""
    monkeypatch.setitem(spec.PRESETS, "tiny", TINY_PRESET)


@pytest.fixture
def squares(tmp_path: Path) -> Path:
    return write_squares(tmp_path / "squares")


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert threads() == []


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("knife-batches")]


def equal(one: Batch, other: Batch) -> bool:
    """Tell whether two batches are the same to the last bit."""
    assert len(one.bands) == len(other.bands)
    return (one.step, one.count) == (other.step, other.count) and all(
        (a.band, a.count) == (b.band, b.count) and all(map(torch.equal, a.tensors, b.tensors))
        for a, b in zip(one.bands, other.bands, strict=True)
    )


def recorded(monkeypatch: pytest.MonkeyPatch, before: Callable[[int], None] = lambda step: None) -> list[int]:
    """Note which steps' batches are made, after doing something."""
    real, steps = made, list[int]()

    def noting(step: int, job: Job) -> Batch:
        steps.append(step)
        before(step)
        return real(step, job)

    monkeypatch.setattr(batches, "made", noting)
    return steps


def until(done: Callable[[], bool]) -> None:
    ends = time.monotonic() + 20
    while not done():
        assert time.monotonic() < ends
        time.sleep(0.001)


# ------------------------------------------------------------------------------------------------------------- a batch


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("diffusion", {"batch": 7}), ("regress", {"batch": 8}), ("segment", {"judge": True}),
        ("classify", {"balance": True, "cap": 8}),
    ],
)  # fmt: skip
def test_what_is_made_ahead_is_what_is_made_in_place(squares: Path, kind: str, options: dict[str, Any]) -> None:
    job = prepare(a_run(squares, kind=kind, **options))
    with Ahead() as ahead:
        for step in range(8):
            assert ahead.checksums(step, job) == checksums(step, job)
            torch.manual_seed(step)  # as the training does, and networks draw
            torch.rand(3)
            assert equal(ahead.batch(step, job), made(step, job))


def test_making_a_batch_leaves_the_random_numbers_of_networks_alone(squares: Path) -> None:
    job = prepare(a_run(squares, kind="segment"))
    before = torch.get_rng_state()
    made(0, job)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_of_several_processes_is_that_of_one(squares: Path) -> None:
    job = prepare(a_run(squares, batch=8))
    parts, whole = [made(2, replace(job, team=Team(number, 3))) for number in range(3)], made(2, job)
    for band, rows in enumerate(whole.bands):
        assert [part.bands[band].count for part in parts] == [rows.count] * 3
        for place, tensor in enumerate(rows.tensors):
            together = torch.cat([part.bands[band].tensors[place] for part in parts])
            assert sorted(together.flatten().tolist()) == sorted(tensor.flatten().tolist())
            assert torch.equal(parts[1].bands[band].tensors[place], tensor[1::3])


def test_parts_of_a_batch_are_its_rows_in_their_order(squares: Path) -> None:
    (rows,) = made(0, prepare(a_run(squares, kind="diffusion", batch=7))).bands
    parts = [*rows.parts(3)]
    assert [len(part[0]) for part in parts] == [3, 3, 1]
    for place, tensor in enumerate(rows.tensors):
        assert torch.equal(torch.cat([part[place] for part in parts]), tensor)
    none = replace(rows, tensors=[tensor[:0] for tensor in rows.tensors])
    assert [*none.parts(3)] == []


# ----------------------------------------------------------------------------------------------------------- the thread


def test_the_next_batch_is_made_while_nobody_asks_and_none_beyond_it(
    squares: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, makers = prepare(a_run(squares, steps=3)), set[threading.Thread]()
    steps = recorded(monkeypatch, lambda step: makers.add(threading.current_thread()))
    with Ahead() as ahead:
        assert steps == []
        for step in range(3):
            ahead.batch(step, job)
            until(lambda step=step: len(steps) == min(step + 2, 3))
            time.sleep(0.02)
            assert steps == [*range(min(step + 2, 3))]
    assert len(makers) == 1
    assert threading.current_thread() not in makers


def test_torch_computes_alone_in_the_thread_and_elsewhere_as_before() -> None:
    """And so in threads that come later."""
    torch.set_num_threads(3)
    try:
        with Ahead() as ahead:
            assert ahead.thread.submit(torch.get_num_threads).result() == 1
            assert ahead.thread.submit(lambda: torch.randn(2**17).sum() and torch.get_num_threads()).result() == 1
            with ThreadPoolExecutor(1) as other:
                assert [torch.get_num_threads(), other.submit(torch.get_num_threads).result()] == [3, 3]
    finally:
        torch.set_num_threads(1)


def test_a_batch_is_made_anew_for_another_job(squares: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image is left out after the batch was made: that one is not taken. Smaller parts change nothing of it."""
    job = prepare(a_run(squares))
    drawn = batch_of(1, job.run, len(job.examples))
    changed = replace(job, without=frozenset(drawn[:1]))
    smaller = replace(changed, run=replace(job.run, accumulate=4))
    steps = recorded(monkeypatch)
    with Ahead() as ahead:
        ahead.batch(0, job)
        until(lambda: len(steps) == 2)
        found = ahead.batch(1, changed)
        assert found.count == 3
        assert equal(found, made(1, changed))
        until(lambda: steps == [0, 1, 1, 2])
        assert equal(ahead.batch(2, smaller), made(2, changed))
    assert steps in ([0, 1, 1, 2], [0, 1, 1, 2, 3])  # the last one has begun, or never does


def test_what_fails_does_so_where_it_is_asked_for_and_may_be_asked_again(
    squares: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, failures = prepare(a_run(squares)), [KeyError("torn")]

    def failing(step: int) -> None:
        if step == 1 and failures:
            raise failures.pop()

    steps = recorded(monkeypatch, failing)
    with Ahead() as ahead:
        ahead.batch(0, job)
        until(lambda: len(steps) == 2)
        assert ahead.checksums(1, job) == checksums(1, job)
        with pytest.raises(KeyError, match="torn"):
            ahead.batch(1, job)
        assert equal(ahead.batch(1, job), made(1, job))


def test_the_thread_ends_with_what_it_has_begun(squares: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed, ended = threading.Event(), []

    def slow(step: int) -> None:
        if step == 1:
            allowed.wait(20)
            ended.append(step)

    job, steps = prepare(a_run(squares)), recorded(monkeypatch, slow)
    with Ahead() as ahead:
        ahead.batch(0, job)
        until(lambda: len(steps) == 2)
        threading.Timer(0.05, allowed.set).start()
    assert ended == [1]
    assert threads() == []


# ----------------------------------------------------------------------------------------------------------- a training


def test_a_training_makes_each_batch_once_in_one_thread_and_none_beyond_its_last_step(
    squares: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, labelled = set[str](), set[str]()
    steps = recorded(monkeypatch, lambda step: names.add(threading.current_thread().name))
    real = Task.label

    def label(*arguments: Any) -> Any:
        labelled.add(threading.current_thread().name)
        return real(*arguments)

    run = a_run(squares, steps=5)
    trained(replace(run, steps=2))
    assert steps == [0, 1]
    monkeypatch.setattr(Task, "label", label)
    trained(run)
    assert steps == [0, 1, 2, 3, 4]
    assert names == {"knife-batches_0"}
    assert names < labelled  # the main thread looks at all labels before the first step
    assert threads() == []


def torn(step: int, at: int, errors: list[BaseException]) -> None:
    if step == at and errors:
        raise errors.pop(0)


@pytest.mark.parametrize("error", [InputError("torn"), OSError(5, "torn"), KeyboardInterrupt("torn")])
def test_what_the_thread_meets_is_raised_at_its_step(
    squares: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    whole, parts = a_run(squares, "whole", every=2), a_run(squares, "parts", every=2)
    trained(whole)
    witness = Witness()
    with monkeypatch.context() as patch:
        recorded(patch, lambda step: torn(step, 3, [error]))
        with pytest.raises(type(error), match="torn"):
            run_training(parts, witness)
    assert [step for step, _ in witness.steps] == [1, 2, 3]
    assert read_about(resume_path(parts))["step"] == 2
    assert threads() == []
    trained(parts)
    assert same(state_of(whole), state_of(parts))


def test_a_label_that_fails_in_the_thread_ends_the_run_by_its_name(
    squares: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, real = a_run(squares), Task.label
    job = prepare(run)
    doomed = job.cases[batch_of(2, run, len(job.cases))[0]].name
    shown = {job.cases[i].name for step in (0, 1) for i in batch_of(step, run, len(job.cases))}
    assert doomed not in shown

    def label(self: Task, case: Any, config: Any) -> Any:
        if case.name == doomed and threading.current_thread() is not threading.main_thread():
            raise InputError(f"{case.name}: has no label any more")
        return real(self, case, config)

    monkeypatch.setattr(Task, "label", label)
    witness = Witness()
    with pytest.raises(InputError, match=f"{doomed}: has no label any more"):
        run_training(run, witness)
    assert len(witness.steps) == 2


def test_memory_that_runs_out_in_the_thread_splits_the_batch_of_its_step(
    squares: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = (a_run(squares, name, "diffusion", batch=8) for name in ("whole", "parts"))
    told = trained(whole)
    errors: list[BaseException] = [MemoryError(), MemoryError()]
    recorded(monkeypatch, lambda step: torn(step, 3, errors))
    witness = trained(parts)
    words = [f"memory ran out: batches come in parts of {n}" for n in (4, 2)]
    assert read_about(resume_path(parts))["history"] == [{"step": 3, "what": one} for one in words]
    assert witness.steps[:3] == told.steps[:3]
    assert [loss for _, loss in witness.steps] == pytest.approx([loss for _, loss in told.steps], rel=1e-4)


@pytest.mark.parametrize("how", ["stopped", "interrupted", "refused"])
def test_no_thread_outlives_a_training(squares: Path, how: str) -> None:
    class Ending(Witness):
        def step(self, step: int, loss: float) -> None:
            super().step(step, loss)
            assert threads() == ["knife-batches_0"]
            if step == 3 and how != "stopped":
                raise KeyboardInterrupt if how == "interrupted" else KnifeError("enough")

    witness, run = Ending(), a_run(squares)
    try:
        assert run_training(run, witness, lambda: how == "stopped" and len(witness.steps) == 3) == 3
    except (KeyboardInterrupt, KnifeError):
        assert how != "stopped"
    assert len(witness.steps) == 3
    assert threads() == []


def test_a_finished_training_makes_nothing(squares: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run: Run = a_run(squares, steps=2)
    trained(run)
    steps = recorded(monkeypatch)
    trained(run)
    assert steps == []
