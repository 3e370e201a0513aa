"""Labels are made when they are drawn: all are looked at before the first step, and none is kept in memory."""

import json
import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from knife_plugins import pixelwise, regress
from PIL import Image as Picture
from test_train import TINY_PRESET, Witness, a_run, of_example, trained, write_squares
from torch import Tensor

from knife import spec, train
from knife.checkpoint import describe
from knife.data import Case
from knife.errors import InputError, TaskError
from knife.job import Run, prepare
from knife.resume import digest
from knife.tasks import Task, task
from knife.train import train as run_training

COUNT, APART = 48, 8  # pictures in all, and those set apart
EPOCH = COUNT - APART  # pictures that are drawn until each was drawn once


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offer a preset of tiny networks."""
    monkeypatch.setitem(spec.PRESETS, "tiny", TINY_PRESET)


@pytest.fixture
def squares(tmp_path: Path) -> Path:
    """Write squares of several sizes: what is around them is not the background."""
    root = write_squares(tmp_path / "squares", COUNT)
    for file in root.glob("images/??.png"):
        with Picture.open(file) as picture:
            picture.putpixel((0, 0), 0)
            picture.save(file)
    return root


def sized(data: Path, models: str = "models", **options: Any) -> Run:
    """Return a run whose labels are maps."""
    return a_run(data, models, label=regress.PIXELS, **options)


class Made:
    """Counts the labels that are made, and the most that there are at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.most, self.living, self.real = 0, 0, weakref.WeakSet[Tensor](), pixelwise.maps_of
        monkeypatch.setattr(regress, "maps_of", self.label)

    def label(self, case: Case) -> Tensor:
        maps = self.real(case)
        self.living.add(maps)
        self.count, self.most = self.count + 1, max(self.most, len(self.living))
        return maps


@pytest.mark.parametrize("options", [{}, {"balance": True}, {"cap": 4}])
def test_no_more_labels_are_held_than_a_batch_and_the_images_set_apart(
    squares: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    made = Made(monkeypatch)
    job = prepare(sized(squares, **options))
    assert made.count >= COUNT
    assert len(made.living) <= APART
    assert made.most <= APART + 2
    assert job.examples[3][1].shape == (2, 16, 16)
    made.most = 0
    run = sized(squares, **options)
    del job  # and with it the labels of the images set apart
    trained(run)
    assert made.most <= APART + run.batch + 2


def test_labels_made_when_drawn_train_as_those_that_are_kept(squares: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lazy, kept, parts = (sized(squares, name, steps=12) for name in ("lazy", "kept", "parts"))
    trained(lazy)
    trained(replace(parts, steps=5))
    trained(parts)
    made, real = Made(monkeypatch), train.prepare

    def keeping(*arguments: Any) -> Any:
        job = real(*arguments)
        return replace(job, examples=list(job.examples))

    monkeypatch.setattr(train, "prepare", keeping)
    trained(kept)
    assert made.most >= COUNT - APART
    assert digest(lazy) == digest(kept) == digest(parts)


def test_all_labels_are_looked_at_before_the_first_step(squares: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = task("regress").label

    def spoilt(known: Task, case: Case, config: Mapping[str, Any]) -> Tensor:
        return real(case, config) * (torch.nan if case.name == "images/20.png" else 1)

    monkeypatch.setattr(Task, "label", spoilt)
    with pytest.raises(
        TaskError, match=r"regress: its hook label returned a tensor .*, not all finite; .*images/20\.png"
    ):
        prepare(a_run(squares))
    with pytest.raises(TaskError, match=r"label returned a tensor .*, not all finite; .*images/20\.png"):
        prepare(sized(squares))


def test_labels_of_different_types_are_refused(squares: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Task, "label", lambda known, case, config: torch.tensor(1 if case.name == "images/20.png" else 0.5)
    )
    with pytest.raises(TaskError, match="its hook label returned tensors of types float32, int64; it must return one"):
        prepare(a_run(squares))


def test_a_case_without_label_is_skipped_before_the_first_step(squares: Path) -> None:
    manifest = squares / "manifest.csv"
    manifest.write_text(manifest.read_text().replace("images/20.png,images/20_mask.png,small,4", "images/20.png,,,"))
    job = prepare(sized(squares))
    assert job.skipped["images/20.png"].endswith("has no mask, though others have one.")
    assert "images/20.png" not in [case.name for case in job.cases]
    assert len(job.examples) == len(job.cases) == COUNT - APART - 1


class Scratch(Witness):
    """Flips a bit of a decoded image, or of its mask, once every image was drawn; remembers what is told."""

    def __init__(self, run: Run, file: str) -> None:
        super().__init__()
        self.run, self.file = run, file

    def step(self, step: int, loss: float) -> None:
        super().step(step, loss)
        if step * self.run.batch == EPOCH:
            pixels, place = of_example(self.run, "images/03.png")
            with pixels.with_name(self.file).open("r+b") as disk:
                disk.seek(place + 99)
                (byte,) = disk.read(1)
                disk.seek(place + 99)
                disk.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("file", ["pixels.f32", "masks.f32"])
def test_an_image_that_goes_bad_is_noticed_by_what_its_label_is_made_of(squares: Path, file: str) -> None:
    run = sized(squares, steps=2 * EPOCH // 4)
    with pytest.raises(InputError, match=r"images/03\.png: its decoded copy has changed on the disk"):
        run_training(run, Scratch(run, file))


@pytest.mark.parametrize("batch", [1, 4])
def test_no_label_is_made_of_an_image_that_is_left_out(
    squares: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    run = sized(squares, steps=3 * EPOCH // batch, batch=batch, skip_bad=True)
    scratch, real, good = Scratch(run, "masks.f32"), task("regress").label, dict[str, Tensor]()

    def wary(known: Task, case: Case, config: Mapping[str, Any]) -> Tensor:
        if not torch.equal(good.setdefault(case.name, case.mask.clone()), case.mask):
            raise InputError(f"{case.name}: cannot be labelled any more.")
        return real(case, config)

    monkeypatch.setattr(Task, "label", wary)
    run_training(run, scratch)
    assert len(scratch.warnings) == 1
    assert len(scratch.steps) == run.steps
    assert describe(run.path).card.training["left_out"] == 1
    assert "left_out" in json.loads(run.path.with_suffix(".log.jsonl").read_text().splitlines()[-1])
