"""A resumed training is bit for bit the uninterrupted one, and whatever else differs or fails is refused in words."""

import csv
import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as Picture
from test_lock import holder as locked_elsewhere
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from trees import volume_

from knife import checkpoint, devices, files, resume, sheets, spec, train
from knife import data as data_module
from knife.balance import strata
from knife.batches import Batch, bands_of, batch_of, draw, made
from knife.checkpoint import describe, load_model, read_about, read_tensors, stored_models
from knife.devices import deterministic, precision
from knife.errors import (
    DiskError,
    DivergedError,
    InputError,
    MemoryShortError,
    ModelError,
    SettingsError,
    TaskError,
    UnreadableError,
)
from knife.job import BANDS, NETWORK, Example, Job, Run, is_judges, loss_of, prepare, seed_of, stacked
from knife.layouts import recognise, split_of, write_split
from knife.resume import State, digest, fill, follow, newest, path_before, resume_path, start, tensors_of
from knife.schedule import Schedule
from knife.sheets import measured
from knife.train import Budget
from knife.train import train as run_training
from knife.unet import Architecture

SQUARES = 24
TINY = Architecture(8, (1, 2), res_blocks=1, groups=4, pool="mean")
FAST = spec.Training(8, 4, 2e-3, 0.9)
TINY_PRESET = spec.Preset("tiny", (16, 16), None, TINY, TINY, TINY, {"diffusion": FAST, "task": FAST})


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offer a preset of tiny networks."""
    monkeypatch.setitem(spec.PRESETS, "tiny", TINY_PRESET)


def write_squares(root: Path, count: int = SQUARES) -> Path:
    """Write pictures of a square whose side is the value to learn, with masks; every sixth is set apart."""
    lines = ["image,mask,bulk,side,split"]
    (root / "images").mkdir(parents=True)
    for i in range(count):
        side = 2 + i % 9
        pixels, mask = np.full((16, 16), 120 if side > 5 else 20, np.uint8), np.zeros((16, 16), np.uint8)
        pixels[3 : 3 + side, 3 : 3 + side], mask[3 : 3 + side, 3 : 3 + side] = 200 + i, 255
        for name, array in ((f"images/{i:02d}.png", pixels), (f"images/{i:02d}_mask.png", mask)):
            Picture.fromarray(array).save(root / name)
        bulk, split = "large" if side > 5 else "small", "val" if i % 6 == 5 else "train"
        lines.append(f"images/{i:02d}.png,images/{i:02d}_mask.png,{bulk},{side},{split}")
    (root / "manifest.csv").write_text("\n".join(lines))
    return root


@pytest.fixture
def squares(tmp_path: Path) -> Path:
    return write_squares(tmp_path / "squares")


class Witness:
    """Remembers what a run told."""

    def __init__(self) -> None:
        self.loaded: list[tuple[int, int]] = []
        self.budgets: list[Budget] = []
        self.steps: list[tuple[int, float]] = []
        self.files: list[Path] = []
        self.warnings: list[str] = []

    def loading(self, done: int, total: int) -> None:
        self.loaded.append((done, total))

    def budget(self, budget: Budget) -> None:
        self.budgets.append(budget)

    def step(self, step: int, loss: float) -> None:
        self.steps.append((step, loss))

    def saved(self, path: Path) -> None:
        self.files.append(path)

    def warned(self, words: str) -> None:
        self.warnings.append(words)


def a_run(data: Path, models: str = "models", kind: str = "regress", **others: Any) -> Run:
    """Return a run of eight steps of the tiny preset, in float32 on every machine."""
    settings = {"steps": 8, "batch": 4, "lr": 2e-3, "ema": 0.9, "every": 100, "precision": "float32"} | others
    return Run(kind, data, data.parent / models, "squares", "tiny", **settings)


def trained(run: Run, stop: Callable[[], bool] = lambda: False) -> Witness:
    """Train, and return what was told."""
    witness = Witness()
    run_training(run, witness, stop)
    return witness


def state_of(run: Run) -> dict[str, Tensor]:
    """Return the weights, the averaged weights and Adam's moments that a run left behind."""
    return read_tensors(resume_path(run))


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# -------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("kind", ["diffusion", "segment"])
def test_a_resumed_run_equals_an_uninterrupted_one(squares: Path, kind: str) -> None:
    whole, parts = (a_run(squares, name, kind) for name in ("whole", "parts"))
    told = trained(whole)
    assert [step for step, _ in told.steps] == list(range(1, 9))
    first = trained(replace(parts, steps=3))
    second = trained(replace(parts, every=3))
    assert [*first.steps, *second.steps] == told.steps
    assert second.budgets[0].done == 3
    states = state_of(whole), state_of(parts)
    assert same(*states)
    assert {name.split(".")[0] for name in states[0]} == {"net", "ema", "adam", "usual", "losses"}
    assert {name.split(".")[2] for name in states[0] if name.startswith("adam.")} == {"step", "exp_avg", "exp_avg_sq"}
    models = [load_model(run.path).state_dict() for run in (whole, parts)]
    assert same(*models)
    assert all(torch.equal(models[0][name], states[0][f"ema.{name}"]) for name in models[0])


def test_a_model_that_another_run_made_is_never_overwritten(squares: Path) -> None:
    run = a_run(squares, "whole")
    trained(replace(run, steps=2))
    resume_path(run).unlink()
    before = run.path.read_bytes()
    for again in (replace(run, seed=run.seed + 1), run):
        with pytest.raises(SettingsError, match=r"a model is there, and no state to resume it from; move it away"):
            trained(again)
    assert run.path.read_bytes() == before


def test_a_stopped_run_saves_and_goes_on(squares: Path) -> None:
    whole, parts = a_run(squares, "whole"), a_run(squares, "parts")
    trained(whole)
    witness = Witness()
    reached = run_training(parts, witness, lambda: len(witness.steps) == 2)
    assert reached == 2
    assert read_about(resume_path(parts))["step"] == 2
    assert witness.files == [parts.path, parts.path.with_suffix(".png")]
    assert describe(parts.path).card.training["step"] == 2
    trained(parts)
    assert same(state_of(whole), state_of(parts))


def test_a_run_stopped_before_its_first_step_leaves_nothing(squares: Path) -> None:
    run = a_run(squares)
    assert run_training(run, Witness(), lambda: True) == 0
    assert [path.name for path in run.models.iterdir()] == [".prepared"]


def test_more_steps_may_follow(squares: Path) -> None:
    whole, parts = a_run(squares, "whole", steps=6), a_run(squares, "parts", steps=4)
    trained(whole)
    trained(parts)
    trained(replace(parts, steps=6, every=1, command="again"))
    assert same(state_of(whole), state_of(parts))


def test_a_finished_run_is_left_alone(squares: Path) -> None:
    run = a_run(squares, steps=2)
    trained(run)
    before = run.path.stat().st_mtime_ns
    again = trained(run)
    assert (again.steps, again.files, again.budgets[0].done) == ([], [], 2)
    assert run.path.stat().st_mtime_ns == before


def test_every_checkpoint_is_written_once(squares: Path) -> None:
    run = a_run(squares, steps=4, every=2)
    assert trained(run).files == [run.path, run.path.with_suffix(".png")] * 2
    with Picture.open(run.path.with_suffix(".png")) as sheet:
        assert sheet.format == "PNG"


@pytest.mark.parametrize("every", [2, 3])
def test_a_run_killed_between_state_and_model_writes_the_model_anew(
    squares: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    """The state of step 8 is there, the model still that of step 6."""
    whole, parts = a_run(squares, "whole", every=every), a_run(squares, "parts", every=every)
    trained(whole)
    save = train.save

    def killed(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        if about["training"]["step"] == 8:
            raise KeyboardInterrupt
        save(path, tensors, about)

    monkeypatch.setattr(train, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        trained(parts)
    assert describe(parts.path).card.training["step"] == 6
    assert read_about(resume_path(parts))["step"] == 8
    monkeypatch.setattr(train, "save", save)
    trained(parts)
    assert describe(parts.path).card.training["step"] == 8
    assert same(read_tensors(whole.path), read_tensors(parts.path))
    assert same(state_of(whole), state_of(parts))
    assert digest(whole) == digest(parts)


def test_networks_that_draw_on_their_own_resume_exactly(squares: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout and the statistics of a batch norm: a plugin may bring both."""

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(
                nn.BatchNorm2d(1), nn.Dropout(0.5), nn.Flatten(), nn.Linear(256, 8), nn.Dropout(0.5), nn.Linear(8, 1)
            )

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.layers(x)  # type: ignore[no-any-return]

    monkeypatch.setattr("knife.checkpoint.Card.build", lambda card: Noisy())
    whole, parts = a_run(squares, "whole"), a_run(squares, "parts")
    trained(whole)
    trained(replace(parts, steps=3))
    torch.manual_seed(1234)
    trained(parts)
    assert same(state_of(whole), state_of(parts))


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"lr": 1e-3}, "lr: 0.002 then, 0.001 now"),
        ({"batch": 8, "seed": 1}, "batch: 4 then, 8 now; seed: 0 then, 1 now"),
        ({"schedule": "cosine"}, "schedule: linear then, cosine now"),
        ({"label": "side"}, "label: None then, side now"),
        ({"balance": True, "cap": 9}, "balance: False then, True now; cap: None then, 9 now"),
        ({"min_brain": 0.5}, "min_brain: 0.0 then, 0.5 now"),
    ],
)
def test_changed_settings_are_refused_with_the_difference(squares: Path, changed: dict[str, Any], said: str) -> None:
    run = a_run(squares, steps=1)
    trained(run)
    before = resume_path(run).read_bytes()
    with pytest.raises(SettingsError) as refusal:
        trained(replace(run, **changed))
    assert f"({said})" in str(refusal.value)
    assert str(resume_path(run)) in str(refusal.value)
    assert resume_path(run).read_bytes() == before


def test_every_setting_is_either_free_or_must_be_the_same(tmp_path: Path) -> None:
    """Free are those that change nothing but how far, how, and with what words a training goes."""
    run = a_run(tmp_path)
    free = {
        "steps": 9, "every": 7, "device": "cuda:0", "accumulate": 2, "command": "knife", "tensorboard": True,
        "accept_data": True, "steal_lock": True, "deterministic": True, "skip_bad": True, "precision": "bfloat16",
        "models": tmp_path / "other", "data": tmp_path / "moved",  # the images are compared by their content
    }  # fmt: skip
    fixed = {
        "kind": "segment", "dataset": "other", "preset": "other", "batch": 8, "lr": 1.0, "ema": 0.5, "seed": 5,
        "schedule": "cosine", "label": "side", "layout": "flat", "slices": (1, 5), "crop": True, "mask_labels": (1, 4),
        "min_brain": 0.5, "nan": "fill=0", "synthetic": True, "balance": True, "cap": 3, "judge": True,
        "spare_judge": True,
    }  # fmt: skip
    assert {*free, *fixed} == {one.name for one in fields(Run)}
    for name, value in {**free, **fixed}.items():
        stored = json.loads(json.dumps(run.settings()))
        differences = resume.compare(stored, replace(run, **{name: value}).settings())
        assert [words.split(":")[0] for words in differences] == ([name] if name in fixed else [])


@pytest.mark.parametrize("kind", ["diffusion", "segment"])
def test_a_training_in_bfloat16_learns_as_in_float32_and_resumes_to_the_same_bits(squares: Path, kind: str) -> None:
    fine, coarse, halves = (
        a_run(squares, name, kind, steps=6, precision=precision)
        for name, precision in (("fine", "float32"), ("coarse", "bfloat16"), ("halves", "bfloat16"))
    )
    losses = [[loss for _, loss in trained(run).steps] for run in (fine, coarse)]
    assert losses[1] != losses[0]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert read_about(resume.resume_path(coarse))["environment"]["precision"] == "bfloat16"
    assert all(tensor.dtype == torch.float32 for tensor in read_tensors(coarse.path).values())
    for steps in (3, 6):
        trained(replace(halves, steps=steps))
    assert resume.digest(halves) == resume.digest(coarse)


def test_an_unknown_precision_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"--precision half: unknown; give one of auto, float32, bfloat16\."):
        a_run(tmp_path, precision="half")


@pytest.mark.parametrize("free", [{"every": 1}, {"accumulate": 2}, {"command": "again"}, {"skip_bad": True}])
def test_what_is_free_changes_no_bit(squares: Path, free: dict[str, Any]) -> None:
    """But parts of a batch add up otherwise."""
    whole, parts = a_run(squares, "whole"), a_run(squares, "parts", steps=4)
    trained(whole)
    trained(parts)
    trained(replace(parts, steps=8, **free))
    assert digest(whole) == digest(parts) or "accumulate" in free


def test_changed_data_are_refused_with_counts(squares: Path) -> None:
    run = a_run(squares, steps=1)
    trained(run)
    (squares / "images/00.png").write_bytes((squares / "images/01.png").read_bytes())
    lines = (squares / "manifest.csv").read_text().splitlines()
    added = [lines[2].replace("images/01.png", f"images/../images/0{i}.png") for i in (1, 2)]
    (squares / "manifest.csv").write_text("\n".join([*lines[:-3], *added, *lines[-1:]]))
    with pytest.raises(SettingsError, match=r"data: 2 images added, 2 removed, 1 changed since step 1"):
        trained(run)


def test_a_run_of_before_the_inventory_is_compared_by_its_fingerprint(squares: Path) -> None:
    """A state written by the first knife has no `files`, `skipped` or `seconds`."""
    run = a_run(squares, steps=1)
    trained(run)
    about = {k: v for k, v in read_about(resume_path(run)).items() if k in ("settings", "step")}
    checkpoint.save(resume_path(run), state_of(run), about)
    assert trained(replace(run, steps=2)).budgets[0].done == 1
    checkpoint.save(resume_path(run), state_of(run), about)
    (squares / "images/00.png").write_bytes((squares / "images/00.png").read_bytes() + b"\0")
    with pytest.raises(SettingsError, match="data: names, values or sizes"):
        trained(run)


def torn(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    return content[:-100] + bytes([content[-100] ^ 1]) + content[-99:]


@pytest.mark.parametrize("harm", [torn, flipped, lambda _: b"", lambda _: b"garbage" * 50])
def test_a_damaged_only_state_is_refused_by_name_and_kept(squares: Path, harm: Callable[[bytes], bytes]) -> None:
    run = a_run(squares, steps=1)
    trained(run)
    harmed = harm(resume_path(run).read_bytes())
    resume_path(run).write_bytes(harmed)
    with pytest.raises(DiskError) as refusal:
        trained(replace(run, steps=2))
    assert str(resume_path(run)) in str(refusal.value)
    assert refusal.value.exit_code == 4
    assert resume_path(run).read_bytes() == harmed


@pytest.mark.parametrize("harm", [torn, flipped, lambda _: b"", lambda _: b"garbage" * 50])
def test_a_damaged_state_gives_way_to_the_one_before(squares: Path, harm: Callable[[bytes], bytes]) -> None:
    """It is named once, and kept; from then on, two whole ones are kept again."""
    whole, parts = a_run(squares, "whole", every=2), a_run(squares, "parts", every=2)
    trained(whole)
    trained(replace(parts, steps=4))
    assert [read_about(path)["step"] for path in (resume_path(parts), path_before(parts))] == [4, 2]
    harmed = harm(resume_path(parts).read_bytes())
    resume_path(parts).write_bytes(harmed)
    witness = trained(parts)
    assert witness.budgets[0].done == 2
    (warning,) = witness.warnings
    assert warning.startswith(f"{resume_path(parts)}: not written by knife, or damaged")
    assert warning.endswith(f"the training goes on from {path_before(parts).name}, step 2.")
    assert parts.path.with_name("regress.damaged.resume.safetensors").read_bytes() == harmed
    assert [read_about(path)["step"] for path in (resume_path(parts), path_before(parts))] == [8, 6]
    assert digest(whole) == digest(parts)
    assert [stored.path for stored in stored_models(parts.models)] == [parts.path]


def test_a_state_that_is_gone_gives_way_to_the_one_before(squares: Path) -> None:
    """A crash between two renames leaves it so."""
    run = a_run(squares, steps=4, every=2)
    trained(run)
    resume_path(run).unlink()
    assert trained(run).budgets[0].done == 2
    assert read_about(resume_path(run))["step"] == 4


def test_no_whole_state_is_no_reason_to_begin_anew(squares: Path) -> None:
    run = a_run(squares, steps=4, every=2)
    trained(run)
    for path in (resume_path(run), path_before(run)):
        path.write_bytes(torn(path.read_bytes()))
    before = run.path.read_bytes()
    with pytest.raises(DiskError, match=r"No state of this training is whole: .* move .* away to begin anew"):
        trained(run)
    assert run.path.read_bytes() == before


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), MemoryError()])
def test_a_state_that_cannot_be_read_now_is_neither_set_aside_nor_passed_over(
    squares: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """The disk stumbles, or memory is short, at the newer state: nothing is believed of it, and nothing changes."""
    whole, parts = a_run(squares, "whole", every=2), a_run(squares, "parts", every=2)
    trained(whole)
    trained(replace(parts, steps=4))
    before, real = {path: path.read_bytes() for path in parts.path.parent.iterdir()}, checkpoint.safe_open

    def stumbling(path: Path, framework: str) -> Any:
        if path == resume_path(parts):
            raise error
        return real(path, framework)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "safe_open", stumbling)
        with pytest.raises((UnreadableError, MemoryShortError)) as refusal:
            trained(parts)
    assert refusal.value.exit_code == (4 if isinstance(error, OSError) else 5)
    assert {path: path.read_bytes() for path in parts.path.parent.iterdir()} == before
    trained(parts)
    assert digest(whole) == digest(parts)


def test_a_damaged_model_is_written_anew(squares: Path) -> None:
    run = a_run(squares, steps=4, every=2)
    trained(run)
    before = load_model(run.path).state_dict()
    run.path.write_bytes(flipped(run.path.read_bytes()))
    witness = trained(run)
    assert (witness.steps, witness.files[0]) == ([], run.path)
    assert same(before, load_model(run.path).state_dict())


def test_no_flipped_bit_and_no_cut_is_believed(squares: Path) -> None:
    """Of the newest state: whatever is done to it, the run goes on from it as it was, or from the one before."""
    run = a_run(squares, steps=2, every=1, kind="regress")
    trained(run)
    path, random = resume_path(run), torch.Generator().manual_seed(0)
    whole, tensors = path.read_bytes(), state_of(run)
    cuts = [whole[: len(whole) * i // 64] for i in range(64)] + [
        whole[:-64] + bytes(64),
        b"",
        path_before(run).read_bytes(),
    ]
    for place in torch.randint(0, 8 * len(whole), (100,), generator=random).tolist():
        bent = bytearray(whole)
        bent[place // 8] ^= 1 << place % 8
        cuts.append(bytes(bent))
    for content in cuts:
        path.write_bytes(content)
        found = newest(run, lambda words: None)
        assert found is not None
        assert found.about["step"] == 1 or same(dict(found.tensors), tensors)


# ----------------------------------------------------------------------------------------------- what changes meanwhile


def test_changed_data_are_taken_on_request_and_recorded(squares: Path) -> None:
    run = a_run(squares, steps=1)
    trained(run)
    (squares / "images/00.png").write_bytes((squares / "images/01.png").read_bytes())
    with pytest.raises(SettingsError, match="or --accept-dataset-change to go on"):
        trained(replace(run, steps=2))
    assert len(trained(replace(run, steps=2, accept_data=True)).steps) == 1
    what = "data: 0 images added, 0 removed, 1 changed since step 1"
    assert describe(run.path).card.training["history"] == [{"step": 1, "what": what}]
    assert len(trained(replace(run, steps=3)).steps) == 1  # these are its data now
    with pytest.raises(SettingsError, match="lr: ") as refusal:
        trained(replace(run, lr=1.0, accept_data=True))
    assert "--accept" not in str(refusal.value)


def test_answers_mean_after_a_change_of_images_what_they_meant_before(squares: Path) -> None:
    runs = [a_run(squares, steps=1, kind=kind) for kind in ("regress", "classify")]
    before = [trained(run) and describe(run.path).card.config for run in runs]
    table = squares / "manifest.csv"
    rows = list(csv.DictReader(table.read_text().splitlines()))
    rows[0] |= {"side": "900"}
    rows[1] |= {"bulk": "unheard-of"}
    table.write_text("\n".join([",".join(rows[0]), *(",".join(row.values()) for row in rows)]) + "\n")
    for run, config in zip(runs, before, strict=True):
        trained(replace(run, steps=2, accept_data=True))
        assert describe(run.path).card.config == config
        assert trained(replace(run, steps=3)).warnings == []
    job = prepare(runs[1], config=before[1])
    assert [why for why in job.skipped.values() if "unheard-of" in why]


@pytest.mark.parametrize(
    ("what", "now", "said"),
    [
        ("torch", "9.9", "torch: 2."),
        ("device", "cuda H100", "device: cpu "),
        ("processes", 2, "processes: 1 then"),
        ("threads", 99, "threads: "),
        ("kernels", "none", "kernels: "),
        ("accumulate", 9, "accumulate: 1 then"),
    ],
)
def test_other_versions_and_devices_are_said_and_recorded(
    squares: Path, monkeypatch: pytest.MonkeyPatch, what: str, now: Any, said: str
) -> None:
    run = a_run(squares, steps=1)
    trained(run)
    assert trained(replace(run, steps=2)).warnings == []
    real = resume.environment
    monkeypatch.setattr(resume, "environment", lambda job: {**real(job), what: now})
    (warning,) = trained(replace(run, steps=3)).warnings
    assert f"{now} now): no longer bit for bit" in warning
    (note,) = describe(run.path).card.training["history"]
    assert note["step"] == 2
    assert note["what"].startswith(said)


@pytest.mark.parametrize(
    "about",
    [{}, {"settings": []}, {"settings": None, "step": 1}, {"settings": {}, "step": 1}, "same but no step", "other net"],
)
def test_a_state_of_something_else_is_refused_by_name(squares: Path, about: Any) -> None:
    run = a_run(squares, steps=1)
    trained(run)
    known = read_about(resume_path(run))
    tensors = state_of(run)
    if about == "same but no step":
        about = {"settings": known["settings"]}
    elif about == "other net":
        about, tensors = known, {**tensors, "net.head.weight": torch.zeros(7)}
    checkpoint.save(resume_path(run), tensors, about)
    with pytest.raises(ModelError, match=r"regress\.resume\.safetensors"):
        trained(run)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"steps": 0}, "--steps 0"),
        ({"batch": 0}, "--batch-size 0"),
        ({"every": 0}, "--every 0"),
        ({"accumulate": 5}, "--accumulate 5"),
        ({"accumulate": 0}, "--accumulate 0"),
        ({"lr": 0.0}, "--lr 0"),
        ({"lr": float("nan")}, "--lr nan"),
        ({"ema": 1.0}, "--ema 1"),
        ({"seed": -1}, "--seed -1"),
        ({"seed": 2**64}, "--seed"),
        ({"slices": (5, 5)}, "--slices 5:5"),
        ({"slices": (-1, 5)}, "--slices -1:5"),
        ({"min_brain": 1.0}, "--min-brain 1"),
        ({"cap": 0}, "--cap 0"),
        ({"kind": "diffusion", "balance": True}, "--label, --balance, --cap: a diffusion model has no labels"),
        ({"kind": "diffusion", "cap": 3}, "--label, --balance, --cap: a diffusion model has no labels"),
        ({"kind": "diffusion", "label": "age"}, "--label, --balance, --cap: a diffusion model has no labels"),
        ({"kind": "diffusion", "judge": True}, "--judge: a diffusion model tells nothing of an image; give a task"),
        ({"judge": True, "spare_judge": True}, "--judge and --spare-judge: a judge learns from what others spare"),
        ({"dataset": "../elsewhere"}, "--dataset"),
        ({"dataset": ""}, "--dataset"),
        ({"dataset": ".."}, "--dataset"),
    ],
)
def test_impossible_values_are_refused(tmp_path: Path, values: dict[str, Any], said: str) -> None:
    run = a_run(tmp_path)
    with pytest.raises(SettingsError) as refusal:
        replace(run, **values)
    assert said in str(refusal.value)


def test_unusable_data_tasks_and_presets_are_refused_and_nothing_is_written(squares: Path) -> None:
    run = a_run(squares)
    for wrong, error in (
        (replace(run, data=squares / "gone"), InputError),
        (replace(run, kind="fly"), TaskError),
        (replace(run, preset="huge"), SettingsError),
        (replace(run, schedule="bent"), SettingsError),
        (replace(run, label="colour"), InputError),
    ):
        with pytest.raises(error):
            trained(wrong)
    assert not run.path.parent.exists()


def test_too_few_images_are_refused(tmp_path: Path) -> None:
    root = write_squares(tmp_path / "one", count=2)
    (root / "images/01.png").write_text("no picture")
    with pytest.raises(InputError, match=r"too few images to train on, 1 \(.*01\.png"):
        trained(a_run(root, kind="diffusion"))


def test_models_that_cannot_be_written_are_refused_before_the_first_step(squares: Path) -> None:
    run = a_run(squares)
    run.models.write_text("a file in the way")
    witness = Witness()
    with pytest.raises(DiskError, match="models is no folder that can be written to"):
        run_training(run, witness)
    assert not witness.steps


def test_a_disk_that_is_too_small_is_refused_before_the_first_step(
    squares: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2**18}))
    with pytest.raises(DiskError, match=r"has 0 MiB free, and checkpoints need 1"):
        trained(a_run(squares))


def filling(monkeypatch: pytest.MonkeyPatch, full: Callable[[], bool]) -> None:
    """Let the disk be full at times."""
    real = os.fsync

    def sync(descriptor: int) -> None:
        if full():
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(files.os, "fsync", sync)


def test_a_disk_that_fills_up_leaves_the_last_checkpoint(squares: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = a_run(squares, steps=2)
    trained(run)
    before = {path.name: path.read_bytes() for path in run.path.parent.iterdir()}
    filling(monkeypatch, lambda: True)
    with pytest.raises(DiskError, match="No space left on device") as refusal:
        trained(replace(run, steps=3))
    assert refusal.value.exit_code == 4
    assert {path.name: path.read_bytes() for path in run.path.parent.iterdir()} == before


def test_a_save_that_fails_is_tried_again(squares: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = a_run(squares, "whole"), a_run(squares, "parts", every=1)
    trained(whole)
    witness = Witness()
    filling(monkeypatch, lambda: len(witness.steps) in (2, 3, 5, 6))  # twice in a row
    run_training(parts, witness)
    of_log = [words for words in witness.warnings if "regress.log.jsonl:" in words]
    saves = [words for words in witness.warnings if words not in of_log]
    assert len(of_log) >= 1
    assert [words.split(":")[0] for words in saves] == [f"step {n} is not saved" for n in (2, 3, 5, 6)]
    assert all("No space left on device" in words for words in witness.warnings)
    assert digest(whole) == digest(parts)


def test_three_saves_in_a_row_that_fail_end_the_run(squares: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = a_run(squares, every=1)
    witness = Witness()
    filling(monkeypatch, lambda: len(witness.steps) >= 4)
    with pytest.raises(DiskError):
        run_training(run, witness)
    assert len(witness.steps) == 6
    assert len([words for words in witness.warnings if words.startswith("step")]) == 2
    assert read_about(resume_path(run))["step"] == 3


def test_a_second_training_of_a_model_is_refused_and_of_another_is_not(squares: Path) -> None:
    run = a_run(squares, steps=1)
    with locked_elsewhere(run.path.with_name(".regress.lock")):
        with pytest.raises(match=r"regress\.safetensors is in use by process \d+ on"):
            trained(run)
        trained(replace(run, kind="classify"))
    trained(run)
    assert not list(run.path.parent.glob("*.lock"))


def test_what_a_killed_run_had_begun_to_write_is_removed_in_time(squares: Path) -> None:
    run = a_run(squares, steps=1)
    run.path.parent.mkdir(parents=True)
    old, young = (run.path.with_name(f".knife-{name}.tmp") for name in ("old", "young"))
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    trained(run)
    assert (old.exists(), young.exists()) == (False, True)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_too_little_memory_for_single_images_is_refused(
    squares: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*arguments: object) -> float:
        raise error

    monkeypatch.setattr(train, "backward", fail)
    with pytest.raises(MemoryShortError, match=r"does not fit into memory; .*smaller --preset") as refusal:
        trained(a_run(squares, kind="regress", batch=12, accumulate=12))
    assert refusal.value.exit_code == 5


@pytest.mark.parametrize("when", ["at once", "later"])
@pytest.mark.parametrize("error", OUT_OF_MEMORY)
def test_too_little_memory_splits_the_batch_and_is_recorded(
    squares: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, when: str
) -> None:
    """A batch of 8 comes in parts of 2; the step that failed half way is as if it had not been tried."""
    whole, parts = a_run(squares, "whole", "diffusion", batch=8), a_run(squares, "parts", "diffusion", batch=8)
    trained(whole)
    real, calls = torch.autograd.backward, []

    def limited(loss: Tensor) -> None:
        calls.append(loss)
        real(loss)
        if len(calls) > (0 if when == "at once" else 5) and sizes[-1] > 2:
            raise error

    sizes: list[int] = []

    def loss_of_parts(kind: Any, schedule: Schedule) -> Any:
        loss = loss_of(kind, schedule)
        return lambda net, x, *others: sizes.append(len(x)) or loss(net, x, *others)

    monkeypatch.setattr(train, "loss_of", loss_of_parts)
    monkeypatch.setattr(torch.autograd, "backward", limited)
    witness = trained(parts)
    assert [step for step, _ in witness.steps] == list(range(1, 9))
    told = [f"memory ran out: batches come in parts of {n}" for n in (4, 2)]
    history = read_about(resume_path(parts))["history"]
    assert [one["what"] for one in history] == told
    assert [one["step"] for one in history] == [0 if when == "at once" else 3] * 2
    assert describe(parts.path).card.training["history"] == history
    assert len(witness.warnings) == 2
    mine, theirs = state_of(whole), state_of(parts)
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-3, atol=1e-5)


def test_other_failures_are_not_taken_for_memory(squares: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> float:
        raise RuntimeError("a bug")

    monkeypatch.setattr(train, "backward", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        trained(a_run(squares))


# ------------------------------------------------------------------------------------------ what goes bad on the way


def of_example(run: Run, name: str) -> tuple[Path, int]:
    """Return the file that holds the decoded image of a name, and where in it."""
    (index,) = run.models.glob(".prepared/*/index.json")
    place = [one["name"] for one in json.loads(index.read_text())["cases"]].index(name)
    return index.with_name("pixels.f32"), 4 * 16 * 16 * place


class Spoiler(Witness):
    """Flips a bit of a decoded image after some step, as a failing disk does."""

    def __init__(self, run: Run, step: int) -> None:
        super().__init__()
        self.run, self.at = run, step

    def step(self, step: int, loss: float) -> None:
        super().step(step, loss)
        if step == self.at:
            file, place = of_example(self.run, "images/03.png")
            content = bytearray(file.read_bytes())
            content[place + 99] ^= 1
            with file.open("r+b") as disk:
                disk.write(content)


def test_an_image_that_is_deleted_on_the_way_is_not_missed(squares: Path) -> None:
    """It was decoded before the first step; the next run refuses, and names it."""
    whole, parts = a_run(squares, "whole"), a_run(squares, "parts", steps=4)
    trained(whole)

    class Deleting(Witness):
        def step(self, step: int, loss: float) -> None:
            super().step(step, loss)
            (squares / "images/03.png").unlink(missing_ok=True)

    kept = (squares / "images/03.png").read_bytes()
    run_training(parts, Deleting())
    with pytest.raises(InputError, match=r"1 of 48 files are not there \(images/03\.png\)"):
        trained(replace(parts, steps=8))
    (squares / "images/03.png").write_bytes(kept)
    trained(replace(parts, steps=8))
    assert digest(whole) == digest(parts)


def test_an_image_that_goes_bad_on_the_way_ends_the_run_by_name(squares: Path) -> None:
    whole, parts = (a_run(squares, name, steps=20, every=5) for name in ("whole", "parts"))
    trained(whole)
    spoiler = Spoiler(parts, 8)
    with pytest.raises(InputError, match=r"images/03\.png: its decoded copy has changed.*\.prepared, .*--skip-bad"):
        run_training(parts, spoiler)
    assert 8 <= len(spoiler.steps) < 20
    with pytest.raises(InputError, match="prepared data set is damaged; remove the folder"):
        trained(parts)
    shutil.rmtree(parts.models / ".prepared")
    trained(parts)
    assert digest(whole) == digest(parts)


@pytest.mark.parametrize("kind", ["diffusion", "segment"])
def test_an_image_that_goes_bad_is_left_out_on_request_and_the_others_come_as_ever(squares: Path, kind: str) -> None:
    """One run does it in one go, the other is stopped after it, and resumes."""
    runs = [a_run(squares, name, kind, steps=20, every=5, skip_bad=True) for name in ("whole", "parts")]
    whole, first = Spoiler(runs[0], 8), Spoiler(runs[1], 8)
    run_training(runs[0], whole)
    run_training(runs[1], first, lambda: len(first.steps) == 15)
    shutil.rmtree(runs[1].models / ".prepared")
    second = trained(runs[1])
    assert [*first.steps, *second.steps] == whole.steps
    assert same(*map(state_of, runs))
    for warnings in (whole.warnings, first.warnings):
        (words,) = warnings
        assert words.startswith("images/03.png: its decoded copy has changed on the disk since step ")
    assert second.warnings == []
    training = describe(runs[1].path).card.training
    assert training["left_out"] == 1
    assert [one["what"] for one in training["history"]] == ["an image went bad and is left out"]
    assert "03.png" not in json.dumps(read_about(resume_path(runs[1])))  # no record tells names
    lines = [json.loads(line) for line in runs[0].path.with_suffix(".log.jsonl").read_text().splitlines()]
    assert [line.get("left_out") for line in lines] == [1]


def test_an_image_left_out_changes_no_draw_of_the_others(squares: Path) -> None:
    """Until it is drawn, the losses are those of a run in which it never went bad."""
    whole, parts = a_run(squares, "whole", steps=20), a_run(squares, "parts", steps=20, skip_bad=True)
    spoiler = Spoiler(parts, 8)
    run_training(parts, spoiler)
    step = describe(parts.path).card.training["history"][0]["step"]
    assert 8 <= step < 20
    assert spoiler.steps[:step] == trained(whole).steps[:step]


@pytest.mark.parametrize("kind", ["diffusion", "segment"])
def test_the_gradient_is_that_of_the_images_that_are_left(squares: Path, kind: str) -> None:
    job = prepare(a_run(squares, kind=kind))
    drawn = batch_of(0, job.run, len(job.examples))
    loss = loss_of(job.task, job.card.schedule)
    x0, labels = stacked([job.examples[i] for i in drawn])
    level, eps = draw(job.run, 0, x0, job.card.schedule.T)
    net, without = job.card.build(), replace(job, without=frozenset(drawn[1:2]))
    found = train.backward(net, made(0, without), without)
    gradients = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    rows = torch.tensor([0, 2, 3])
    value = loss(net, x0[rows], labels[rows], level[rows], eps[rows])
    value.backward()  # type: ignore[no-untyped-call]
    assert found == pytest.approx(value.item(), rel=1e-5)
    for mine, p in zip(gradients, [p for p in net.parameters() if p.grad is not None], strict=True):
        torch.testing.assert_close(mine, p.grad, rtol=1e-4, atol=1e-6)
    empty = replace(job, without=frozenset(drawn))
    assert math.isnan(train.backward(net, made(0, empty), empty))  # a step to be skipped


def test_an_image_that_the_disk_refused_once_is_a_change_when_it_is_read(
    squares: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, real = a_run(squares, steps=1), data_module.decoded

    def stumbling(path: Path, fill: float | None = None) -> Any:
        if path.name == "03.png":
            try:
                raise OSError(5, "Input/output error")
            except OSError as error:
                raise InputError(f"{path}: cannot be read") from error
        return real(path, fill)

    with monkeypatch.context() as patch:
        patch.setattr(data_module, "decoded", stumbling)
        assert trained(run).budgets[0].skipped == {"images/03.png": f"{squares / 'images/03.png'}: cannot be read"}
        trained(replace(run, steps=2))
    with pytest.raises(SettingsError, match="data: 0 images added, 0 removed, 1 changed since step 2"):
        trained(replace(run, steps=3))


# -------------------------------------------------------------------------------------------------------- the same bits


def settings_of_torch() -> tuple[Any, ...]:
    cuda = torch.backends.cuda
    return (
        torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark, os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(),
    )  # fmt: skip


def gradients_twice(job: Job) -> list[list[Tensor]]:
    """Return the gradients of the same step, taken twice in deterministic mode."""
    torch.manual_seed(0)
    net, found = job.card.build().to(job.run.device), []
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    with deterministic(True):
        for _ in range(2):
            net.zero_grad()
            train.backward(net, made(3, job), job)
            found.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    return found


@pytest.mark.parametrize("kind", ["diffusion", "regress", "classify", "segment"])
def test_a_step_has_the_same_gradients_twice(squares: Path, kind: str) -> None:
    one, two = gradients_twice(prepare(a_run(squares, kind=kind)))
    assert len(one) == len(two) > 10
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["diffusion", "regress", "classify", "segment"])
def test_a_step_has_the_same_gradients_twice_on_a_gpu(squares: Path, kind: str) -> None:
    one, two = gradients_twice(prepare(a_run(squares, kind=kind, device="cuda:0")))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    runs = [a_run(squares, name, kind, device="cuda:0", deterministic=True) for name in ("one", "two")]
    for run in runs:
        trained(run)
    assert digest(runs[0]) == digest(runs[1])


def test_deterministic_is_set_for_the_run_alone_and_recorded(squares: Path) -> None:
    run, before, seen = a_run(squares, steps=2, deterministic=True), settings_of_torch(), []

    class Looking(Witness):
        def step(self, step: int, loss: float) -> None:
            seen.append(settings_of_torch())

    run_training(run, Looking())
    assert seen == [(True, False, False, ":4096:8", False, False, True)] * 2
    assert settings_of_torch() == before
    assert describe(run.path).card.training["deterministic"] is True
    (warning,) = trained(replace(run, steps=3, deterministic=False)).warnings
    assert "deterministic: True then, False now): no longer bit for bit" in warning


def test_what_torch_computes_in_changing_order_is_refused_in_words(
    squares: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, before, real = a_run(squares, deterministic=True), settings_of_torch(), train.backward

    def changing(net: nn.Module, *others: Any) -> Tensor:
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))
        return real(net, *others)

    monkeypatch.setattr(train, "backward", changing)
    with pytest.raises(SettingsError, match=r"--deterministic: torch cannot compute this network so \(put_ does not"):
        trained(run)
    assert settings_of_torch() == before
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with deterministic(True):
        assert settings_of_torch()[3] == ":16:8"  # which does as well
    assert settings_of_torch()[3] == ":16:8"


# ----------------------------------------------------------------------------------------------------------- not finite


def break_loss(monkeypatch: pytest.MonkeyPatch, broken: Callable[[int], bool], value: float = float("nan")) -> None:
    """Let the loss of some steps be not finite; the copy that is timed does not count."""
    backward = train.backward

    def sometimes(net: nn.Module, batch: Batch, job: Job, usual: Tensor | None = None) -> Tensor:
        loss = backward(net, batch, job, usual)
        if broken(batch.step):
            for parameter in net.parameters():
                parameter.grad = torch.full_like(parameter, value)
            return loss if value == float("inf") else loss * value
        return loss

    monkeypatch.setattr(train, "backward", sometimes)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])  # inf: the loss is finite, its gradient is not
def test_a_step_that_is_not_finite_is_skipped_and_counted(
    squares: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    whole, parts = a_run(squares, "whole", every=2), a_run(squares, "parts")
    break_loss(monkeypatch, lambda step: step in (2, 3, 5), value)
    trained(whole)
    assert all(tensor.isfinite().all() for tensor in state_of(whole).values())
    assert state_of(whole)["adam.0.step"] == 5
    about = read_about(resume_path(whole))
    assert (about["step"], about["skipped"]) == (8, 3)
    assert describe(whole.path).card.training["skipped"] == 3
    trained(replace(parts, steps=4))
    trained(parts)
    assert same(state_of(whole), state_of(parts))


def test_ten_steps_in_a_row_that_are_not_finite_end_the_run(squares: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = a_run(squares, steps=40, every=2)
    break_loss(monkeypatch, lambda step: step >= 5)
    with pytest.raises(
        DivergedError, match=r"not finite in 10 steps in a row, up to step 15; give an --lr below 0\.002"
    ):
        trained(run)
    assert all(tensor.isfinite().all() for tensor in state_of(run).values())
    load_model(run.path)


def test_weights_that_are_not_finite_are_never_saved(squares: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = a_run(squares, steps=2)
    trained(run)
    before = run.path.read_bytes(), resume_path(run).read_bytes()
    step = train.train_step

    def spoiled(state: State, job: Job, **others: Any) -> float:
        loss = step(state, job, **others)
        with torch.no_grad():
            next(state.net.parameters()).view(-1)[0] = torch.inf
        return loss

    monkeypatch.setattr(train, "train_step", spoiled)
    with pytest.raises(DivergedError, match="weights are not finite after step 3"):
        trained(replace(run, steps=3))
    assert (run.path.read_bytes(), resume_path(run).read_bytes()) == before


# ------------------------------------------------------------------------------------------------------------- the step


@pytest.mark.parametrize("kind", ["diffusion", "regress", "classify", "segment"])
def test_the_loss_falls(squares: Path, kind: str) -> None:
    run = a_run(squares, kind=kind, steps=60, batch=8, lr=5e-3)
    losses = [loss for _, loss in trained(run).steps]
    assert sum(losses[-15:]) < 0.9 * sum(losses[:15])


@pytest.mark.parametrize("kind", ["diffusion", "regress", "segment"])
@pytest.mark.parametrize("accumulate", [2, 3, 7])
def test_parts_of_a_batch_add_up_to_the_batch(squares: Path, kind: str, accumulate: int) -> None:
    run = a_run(squares, kind=kind, batch=7)
    job = prepare(run)
    net = start(job, print).net.double()
    job = replace(job, examples=[(x.double(), y.double()) for x, y in job.examples])
    whole, parts = [], []
    for found, one in ((whole, job), (parts, replace(job, run=replace(run, accumulate=accumulate)))):
        net.zero_grad()
        usual = torch.linspace(0.1, 1, 10)
        found += [train.backward(net, made(3, one), one, usual), usual]
        found += [p.grad.clone() for p in net.parameters() if p.grad is not None]
    assert len(whole) == len(parts) > 10
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_every_band_of_levels_counts_by_its_usual_loss() -> None:
    usual = torch.zeros(10, dtype=torch.float64)
    assert train.weight_of(usual, 3) == 1
    usual[9], usual[5], usual[0] = 2.0, 0.5, 1e-9
    assert [train.weight_of(usual, band) for band in (9, 5, 0, 3)] == [0.5, 2.0, 50.0, 0.5]


def test_a_batch_falls_into_bands_by_its_levels(squares: Path) -> None:
    job = prepare(a_run(squares, batch=8))
    level = torch.tensor([900, 20, 480, 30, 950, 470, 40, 10])
    bands = bands_of(level, job)
    assert [band for band, _ in bands] == [0, 0, 4, 9]
    assert [sorted(level[rows].tolist()) for _, rows in bands] == [[10, 20], [30, 40], [470, 480], [900, 950]]
    judge = replace(job, run=replace(job.run, judge=True))
    assert [(band, rows.tolist()) for band, rows in bands_of(level, judge)] == [(0, [*range(8)])]


def test_the_usual_loss_is_kept_with_the_state(squares: Path) -> None:
    run = a_run(squares, steps=4)
    job = prepare(run)
    state = start(job, print)
    for _ in range(3):
        train.train_step(state, job)
    assert (state.usual > 0).any()
    assert torch.equal(tensors_of(state)["usual"], state.usual)
    fresh = start(job, print)
    about = {"step": 3}
    fill(fresh, about, tensors_of(state))
    assert torch.equal(fresh.usual, state.usual)


def plainly(run: Run) -> tuple[dict[str, Tensor], list[float]]:
    """Train as the formulas stand, one thing after the other, every loss read where it is made; return what is kept."""
    job = prepare(run)
    net, kept, losses = start(job, print).net, [0.0] * BANDS, []
    adam, loss = torch.optim.Adam(net.parameters(), lr=run.lr), loss_of(job.task, job.card.schedule)

    @torch.no_grad()
    def average(averaged: list[Tensor], current: list[Tensor], count: Tensor) -> None:
        n = int(count)
        torch._foreach_lerp_(averaged, current, 1 - min(run.ema, (1 + n) / (10 + n)))

    ema = AveragedModel(net, multi_avg_fn=average)
    for step in range(run.steps):
        x0, labels = stacked([job.examples[i] for i in batch_of(step, run, len(job.examples), job.strata)])
        level, eps = draw(run, step, x0, job.card.schedule.T)
        torch.manual_seed(seed_of(run.drawn_from, step, NETWORK))
        total = 0.0
        for band, places in bands_of(level, job):
            most, found = max(kept), 0.0
            weight = 1 / max(kept[band] or most, most / 100) if most else 1.0
            for part in filter(len, places.split(run.at_once)):
                x = x0[part].to(memory_format=torch.channels_last)
                with precision("cpu", run.precision):
                    value = loss(net, x, labels[part], level[part], eps[part]) * len(part) / len(x0)
                torch.autograd.backward(weight * value)
                found += value.item()
            total += found
            if len(places):
                size = abs(found) * len(x0) / len(places)
                kept[band] += (1 - train.USUAL if kept[band] else 1.0) * (size - kept[band])
        adam.step()
        adam.zero_grad()
        ema.update_parameters(net)
        losses.append(total)
    nets = {"net": net, "ema": ema.module}
    weights = {f"{name}.{key}": value for name, one in nets.items() for key, value in one.state_dict().items()}
    return {**weights, "usual": torch.tensor(kept, dtype=torch.float64)}, losses


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("diffusion", {}), ("diffusion", {"batch": 7, "accumulate": 3}), ("diffusion", {"precision": "bfloat16"}),
        ("regress", {}), ("regress", {"precision": "bfloat16"}), ("classify", {"balance": True, "cap": 8}),
        ("segment", {"batch": 7, "accumulate": 6}), ("segment", {"judge": True}),
    ],
)  # fmt: skip
def test_a_training_is_its_formulas_to_the_last_bit(squares: Path, kind: str, options: dict[str, Any]) -> None:
    """Whatever is made ahead, and stays on the device."""
    run = a_run(squares, kind=kind, **options)
    wanted, losses = plainly(run)
    assert [loss for _, loss in trained(run).steps] == losses
    found = state_of(run)
    assert {name for name in found if not name.startswith(("adam.", "losses"))} == wanted.keys()
    assert same({name: found[name] for name in wanted}, wanted)


@pytest.mark.parametrize("kind", ["diffusion", "regress", "classify", "segment"])
@pytest.mark.parametrize("accumulate", [1, 8])
def test_a_step_waits_once_for_a_gpu(
    squares: Path, monkeypatch: pytest.MonkeyPatch, meta_ops: str, kind: str, accumulate: int
) -> None:
    """On tensors that have no values whoever asks for one fails, as who asks a GPU for one waits."""
    job, asked = prepare(a_run(squares, kind=kind, batch=8, accumulate=accumulate, device=meta_ops)), list[int]()

    def told(*numbers: Tensor) -> list[float]:
        assert {number.device.type for number in numbers} == {"meta"}
        asked.append(len(numbers))
        return [1.0] * len(numbers)

    monkeypatch.setattr(train, "told", told)
    monkeypatch.setattr(train, "precision", lambda device, wanted: nullcontext())
    state = start(job, print)
    before = [p._version for net in (state.net, state.ema) for p in net.parameters()]
    for _ in range(3):
        assert train.train_step(state, job) == 1.0
    assert asked == [2] * 3
    assert all(p._version > n for p, n in zip([*state.net.parameters(), *state.ema.parameters()], before, strict=True))
    with pytest.raises(RuntimeError):
        devices.told(state.usual[0])


def test_what_a_device_tells_is_told_at_once() -> None:
    assert devices.told(torch.tensor(0.1, dtype=torch.float64), torch.tensor(torch.inf)) == [0.1, math.inf]
    assert math.isnan(devices.told(torch.tensor(math.nan))[0])


@pytest.mark.parametrize("fused", [(False, True), (True, False)])
def test_moments_of_a_fused_adam_go_on_in_another_and_back(squares: Path, fused: tuple[bool, bool]) -> None:
    """On a GPU it is fused, and counts its steps there; here both are on the CPU, where torch has it too."""
    job = prepare(a_run(squares))
    one, other, whole = (start(job, print) for _ in range(3))
    for state, wanted in ((one, fused[0]), (other, fused[1]), (whole, False)):
        state.optimizer = torch.optim.Adam(state.net.parameters(), lr=job.run.lr, fused=wanted)
    for _ in range(2):
        train.train_step(one, job)
    fill(other, {"step": 2}, tensors_of(one))
    assert [group["fused"] for group in other.optimizer.param_groups] == [fused[1]]
    for _ in range(2):
        train.train_step(other, job)
    for _ in range(4):
        train.train_step(whole, job)
    mine, theirs = tensors_of(other), tensors_of(whole)
    assert {name: tensor.dtype for name, tensor in mine.items()} == {n: tensor.dtype for n, tensor in theirs.items()}
    for name in mine.keys() - {"losses"}:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-3, atol=1e-5)
    assert mine["adam.0.step"] == 4


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["diffusion", "regress"])
def test_a_training_moves_to_a_gpu_and_back(squares: Path, kind: str) -> None:
    whole, parts = (a_run(squares, name, kind, steps=9) for name in ("whole", "parts"))
    told = [loss for _, loss in trained(whole).steps]
    found: list[float] = []
    for steps, device in ((3, "cpu"), (6, "cuda:0"), (9, "cpu")):
        found += [loss for _, loss in trained(replace(parts, steps=steps, device=device)).steps]
    assert found == pytest.approx(told, rel=0.02)
    assert state_of(parts)["adam.0.step"] == 9


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["diffusion", "regress", "classify", "segment"])
def test_a_step_on_a_gpu_waits_where_it_is_told(squares: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Torch itself raises if anything else waits; the first step copies what stays there."""
    job = prepare(a_run(squares, kind=kind, batch=8, device="cuda:0"))
    state, real = start(job, print), train.told
    train.train_step(state, job)

    def told(*numbers: Tensor) -> list[float]:
        torch.cuda.set_sync_debug_mode("default")
        try:
            return real(*numbers)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    monkeypatch.setattr(train, "told", told)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            train.train_step(state, job)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("count", "batch"), [(20, 4), (20, 7), (5, 12), (2, 1), (3, 3)])
def test_every_epoch_shows_each_image_once(tmp_path: Path, count: int, batch: int) -> None:
    run = a_run(tmp_path, batch=batch)
    seen = [i for step in range(3 * count) for i in batch_of(step, run, count)]
    epochs = [seen[i : i + count] for i in range(0, len(seen) - count + 1, count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert batch_of(5, run, count) == batch_of(5, run, count)


def test_balanced_batches_depend_on_seed_and_step_alone(tmp_path: Path) -> None:
    labels = [torch.tensor(int(i > 15)) for i in range(20)]
    run, kinds = a_run(tmp_path, batch=6), strata(labels)
    batches = [batch_of(step, run, 20, kinds) for step in range(10)]
    assert [batch_of(step, run, 20, kinds) for step in range(10)] == batches
    assert all(sum(int(labels[i]) for i in batch) == 3 for batch in batches)
    assert {i for batch in batches for i in batch} == {*range(20)}
    assert batch_of(4, replace(run, seed=1), 20, kinds) != batches[4]


def test_a_balanced_and_capped_run_resumes_exactly(squares: Path) -> None:
    whole, parts = (a_run(squares, name, "classify", balance=True, cap=8) for name in ("whole", "parts"))
    told = trained(whole)
    assert told.budgets[0].images == 16  # of 9 large and 11 small ones
    trained(replace(parts, steps=3))
    trained(parts)
    assert same(state_of(whole), state_of(parts))
    settings = describe(whole.path).card.training["settings"]
    assert (settings["balance"], settings["cap"]) == (True, 8)


def test_noise_levels_and_noise_depend_on_seed_and_step_alone(tmp_path: Path) -> None:
    run, x0 = a_run(tmp_path, kind="diffusion"), torch.zeros(4000, 1, 2, 2)
    level, eps = draw(run, 3, x0, 10)
    assert (int(level.min()), int(level.max())) == (1, 10)
    assert torch.bincount(level, minlength=11)[1:].float().std() < 40
    low, _ = draw(a_run(tmp_path, kind="regress"), 3, x0, 10)
    assert (int(low.min()), int(low.max())) == (1, 10)
    assert (low <= 6).float().mean() == pytest.approx(0.6 ** (1 / 1.5), abs=0.03)
    assert float(eps.std()) == pytest.approx(1, abs=0.02)
    assert torch.equal(draw(run, 3, x0, 10)[1], eps)
    assert not torch.equal(draw(run, 4, x0, 10)[1], eps)
    assert not torch.equal(draw(replace(run, seed=1), 3, x0, 10)[1], eps)


def test_a_task_sees_images_noised_to_every_level(squares: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = prepare(a_run(squares))
    assert job.task is not None
    seen: dict[str, Tensor] = {}

    class Net(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            seen.update(x=x, t=t)
            return x.flatten(1)[:, :1]

    x0, label = stacked(job.examples[:3])
    eps, level = torch.randn(x0.shape), torch.tensor([1, 500, 1000])
    loss = loss_of(job.task, Schedule())(Net(), x0, label, level, eps)
    ab = Schedule().alpha_bar[level].view(-1, 1, 1, 1)
    assert seen["t"].tolist() == [0, 499, 999]
    torch.testing.assert_close(seen["x"], (ab.sqrt() * x0 + (1 - ab).sqrt() * eps).float())
    torch.testing.assert_close(loss, F.mse_loss(seen["x"].flatten(1)[:, 0], label))


def test_the_average_forgets_the_random_start_and_then_decays(squares: Path) -> None:
    state = start(prepare(a_run(squares)), print)
    (own, *_), (averaged, *_) = state.net.parameters(), state.ema.parameters()
    values = []
    with torch.no_grad():
        for count, value in enumerate([2.0**i for i in range(11)]):
            own.fill_(value)
            follow(state.ema, state.net, count, 0.5)
            values.append(float(averaged.view(-1)[0]))
    expected = values[0]
    assert expected == 1.0
    for count, value in enumerate([2.0**i for i in range(1, 11)], start=1):
        decay = min(0.5, (1 + count) / (10 + count))
        expected = decay * expected + (1 - decay) * value
        assert values[count] == pytest.approx(expected, rel=1e-5)


def test_the_average_takes_over_what_is_no_weight_as_it_is() -> None:
    """The statistics of a batch norm are averages already, and count in whole numbers."""
    net, average = nn.BatchNorm2d(1), nn.BatchNorm2d(1)
    for count in range(3):
        net(torch.randn(4, 1, 8, 8))
        follow(average, net, count, 0.5)
        assert all(map(torch.equal, average.buffers(), net.buffers()))
    assert average.num_batches_tracked == 3


# ----------------------------------------------------------------------------------------------------------- the judge


def a_judge(data: Path, models: str = "models", kind: str = "regress", **others: Any) -> Run:
    return a_run(data, models, kind, judge=True, **others)


def keys(examples: Sequence[Example]) -> set[float]:
    """Tell the squares apart: each has another brightest pixel."""
    return {round(float(x.max()), 4) for x, _ in examples}


def test_a_judge_sees_clean_images_alone(squares: Path) -> None:
    run = a_judge(squares)
    job = prepare(run)
    seen: list[tuple[Tensor, Tensor]] = []

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            seen.append((x, t))
            return self.weight * x.flatten(1)[:, :1]

    net = Net()
    for step in range(3):
        train.backward(net, made(step, job), job)
    for step, (x, t) in enumerate(seen):
        shown = [job.examples[i][0] for i in batch_of(step, run, len(job.examples))]
        assert torch.equal(x, torch.stack(shown))
        assert not t.any()
    seen.clear()
    assert job.task is not None
    assert list(measured(job, job.task, net)) == ["error", "chance"]
    sheets.sheet_of(job, job.task, net)
    assert seen
    for x, t in seen:
        assert torch.equal(x, torch.stack([x0 for x0, _ in job.validation]))
        assert not t.any()


@pytest.mark.parametrize("kind", ["regress", "segment"])
def test_a_judge_is_another_network_than_the_guide_and_draws_otherwise(squares: Path, kind: str) -> None:
    judge, guide = a_judge(squares, kind=kind), a_run(squares, kind=kind)
    jobs = [prepare(run) for run in (judge, guide)]
    shapes = [{name: p.shape for name, p in start(job, print).net.named_parameters()} for job in jobs]
    assert shapes[0] != shapes[1]
    assert jobs[0].card.spec == jobs[1].card.spec.for_judge()
    assert [batch_of(step, judge, 20) for step in range(5)] != [batch_of(step, guide, 20) for step in range(5)]
    x0 = torch.zeros(4, 1, 2, 2)
    assert not torch.equal(draw(judge, 0, x0, 10)[1], draw(guide, 0, x0, 10)[1])
    assert a_judge(squares, seed=2**32 - 1).drawn_from < 2**32


@pytest.mark.parametrize("kind", ["regress", "segment"])
def test_the_first_weights_of_a_judge_are_its_own(squares: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """A plugin may bring a network of its own, whatever the spec says."""
    monkeypatch.setattr("knife.checkpoint.Card.build", lambda card: nn.Conv2d(1, 1, 3))
    runs = a_judge(squares, kind=kind), a_run(squares, kind=kind), a_judge(squares, kind=kind, seed=1)
    nets = [start(prepare(run), print).net for run in runs]
    assert len({float(next(net.parameters()).detach().sum()) for net in nets}) == 3


def test_a_judge_learns_from_half_and_others_may_spare_it(squares: Path) -> None:
    everyone, judges, spared = (
        prepare(a_run(squares, **options)) for options in ({}, {"judge": True}, {"spare_judge": True})
    )
    assert keys(judges.examples) | keys(spared.examples) == keys(everyone.examples)
    assert not keys(judges.examples) & keys(spared.examples)
    assert len(everyone.examples) == 20
    assert 5 <= len(judges.examples) <= 15
    assert len(judges.examples) + len(spared.examples) == 20
    values = [float(y) * judges.card.config["std"] + judges.card.config["mean"] for _, y in judges.examples]
    assert sum(values) / len(values) == pytest.approx(judges.card.config["mean"], abs=1e-4)
    diffusion = prepare(a_run(squares, kind="diffusion", spare_judge=True))
    assert keys(diffusion.examples) == keys(spared.examples)
    assert keys(judges.validation) == keys(everyone.validation)


def test_patients_are_halved_whole(patients: Path) -> None:
    jobs = [
        prepare(a_run(patients, kind="segment", slices=(2, 10), **{option: True}))
        for option in ("judge", "spare_judge")
    ]
    keys = [entry.key for entry in jobs[0].folder.split("train")]
    counts = [sum(is_judges(key) == judge for key in keys) for judge in (True, False)]
    assert (len(keys), len({*keys})) == (48, 6)
    assert [len(job.examples) for job in jobs] == counts
    assert min(counts) > 0


def test_about_half_of_all_patients_are_the_judges() -> None:
    mine = [is_judges(f"patient{i:04d}") for i in range(2000)]
    assert 900 < sum(mine) < 1100
    assert mine == [is_judges(f"patient{i:04d}") for i in range(2000)]
    splits = [split_of(f"patient{i:04d}") for i in range(2000)]
    of_test = [judge for judge, split in zip(mine, splits, strict=True) if split != "train"]
    assert 0.4 < sum(of_test) / len(of_test) < 0.6  # the hash is not that of the splits


def test_both_halves_decode_images_once(squares: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(a_judge(squares))
    read, real = [], data_module.load
    monkeypatch.setattr(data_module, "load", lambda entries, **more: read.append(len(entries)) or real(entries, **more))
    for options in ({}, {"spare_judge": True}):
        prepare(a_run(squares, **options))
    assert max(read) == 4  # those set apart


def test_a_half_of_too_few_is_refused(tmp_path: Path) -> None:
    root = write_squares(tmp_path / "squares", count=2)
    sizes = {judge: sum(is_judges(f"images/{i:02d}.png") == judge for i in range(2)) for judge in (True, False)}
    run = a_judge(root) if sizes[True] < 2 else a_run(root, spare_judge=True)
    words = "of the judge's half" if run.judge else "without the judge's half"
    with pytest.raises(InputError, match=f"too few images to train on, {sizes[run.judge]} {words}"):
        trained(run)


def test_a_judge_lies_beside_its_guide_and_touches_nothing_of_it(squares: Path) -> None:
    guide, judge = a_run(squares, steps=20), a_judge(squares, steps=20)
    trained(guide)
    before = {path.name: path.read_bytes() for path in guide.path.parent.iterdir()}
    assert len(before) == 4
    (budget,) = trained(judge).budgets
    after = {path.name: path.read_bytes() for path in guide.path.parent.iterdir()}
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {name.replace("regress.", "regress.judge.") for name in before}
    assert judge.path.name == "regress.judge.safetensors"
    assert (budget.half, budget.images < 20) == ("of the judge's half", True)
    card = describe(judge.path).card
    assert (card.judge, card.kind, card.training["settings"]["judge"]) == (True, "regress", True)
    assert list(card.guidance) == ["error", "chance"]
    assert load_model(judge.path)(torch.zeros(1, 1, 16, 16), torch.zeros(1)).shape == (1, 1)
    assert describe(guide.path).card.judge is False


def test_a_resumed_judge_equals_an_uninterrupted_one(squares: Path) -> None:
    whole, parts = (a_judge(squares, name, "classify", steps=4) for name in ("whole", "parts"))
    told = trained(whole)
    first = trained(replace(parts, steps=2))
    assert [*first.steps, *trained(parts).steps] == told.steps
    assert same(state_of(whole), state_of(parts))


def test_a_run_that_spares_the_judge_is_not_resumed_without(squares: Path) -> None:
    run = a_run(squares, steps=1)
    trained(run)
    with pytest.raises(SettingsError, match="spare_judge: False then, True now"):
        trained(replace(run, spare_judge=True))


@pytest.mark.parametrize("judge", [False, True])
def test_the_card_tells_the_mean_error_on_clean_images(squares: Path, judge: bool) -> None:
    run = a_run(squares, judge=judge, batch=3)  # the last batch of the four set apart is a smaller one
    trained(run)
    card, job = describe(run.path).card, prepare(run)
    x, labels = stacked(job.validation)
    found = load_model(run.path)(x, torch.zeros(len(x)))[:, 0]
    assert card.guidance["error"] == pytest.approx(float((found - labels).abs().mean()) * card.config["std"], rel=1e-4)
    chance = float((found - labels.roll(1)).abs().mean()) * card.config["std"]
    assert card.guidance["chance"] == pytest.approx(chance, rel=1e-4)
    assert ("gradient" in card.guidance) is not judge


def test_an_error_without_end_is_not_told(squares: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("knife.tasks.Task.error", lambda task, net, x, *more: torch.full((len(x),), torch.inf))
    run = a_run(squares, steps=1)
    trained(run)
    assert list(describe(run.path).card.guidance) == ["gradient"]


@pytest.mark.parametrize("judge", [False, True])
def test_a_task_without_an_error_has_a_card_and_a_sheet_too(
    squares: Path, monkeypatch: pytest.MonkeyPatch, judge: bool
) -> None:
    monkeypatch.setattr("knife.tasks.Task.error", lambda *arguments: None)
    drawn: list[list[float]] = []
    real = sheets.curve
    monkeypatch.setattr(sheets, "curve", lambda xs, ys, *names: drawn.append(list(ys)) or real(xs, ys, *names))
    run = a_run(squares, judge=judge, steps=1)
    trained(run)
    assert "error" not in describe(run.path).card.guidance
    with Picture.open(run.path.with_suffix(".png")) as sheet:
        assert sheet.format == "PNG"
    if judge:
        job = prepare(run)
        x, labels = stacked(job.validation)
        losses = (load_model(run.path)(x, torch.zeros(len(x)))[:, 0] - labels).square()
        assert drawn == [pytest.approx(sorted(losses.tolist()), rel=1e-4)]


def test_the_sheet_of_a_judge_shows_its_errors_from_best_to_worst(
    squares: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[list[float], list[float], str]] = []
    monkeypatch.setattr(
        sheets, "curve", lambda xs, ys, name, title: drawn.append((list(xs), list(ys), title)) or b"picture"
    )
    run = a_judge(squares)
    trained(run)
    ((xs, ys, title),) = drawn
    assert (xs, title) == ([1, 2, 3, 4], "judge of regress: error")
    assert ys == sorted(ys)
    assert sum(ys) / 4 == pytest.approx(describe(run.path).card.guidance["error"], rel=1e-5)


# -------------------------------------------------------------------------------------------------------- the record


def test_the_budget_says_what_will_be_done(squares: Path) -> None:
    (squares / "images/07.png").write_text("no picture")
    witness = trained(a_run(squares, steps=1))
    (budget,) = witness.budgets
    assert (budget.images, budget.layout, budget.done, budget.steps, budget.device) == (19, "manifest", 0, 1, "cpu")
    assert list(budget.skipped) == ["images/07.png"]
    assert budget.why == "manifest.csv with bulk, side"
    assert budget.validation == "4 images set apart"
    assert budget.config["label"] == "side"
    assert budget.seconds_a_step > 0
    assert budget.parameters == sum(p.numel() for p in load_model(a_run(squares).path).parameters())
    assert witness.loaded[-1] == (24, 24)
    assert witness.loaded == sorted(witness.loaded)


def test_without_images_set_apart_the_training_images_serve(squares: Path) -> None:
    manifest = squares / "manifest.csv"
    manifest.write_text(manifest.read_text().replace(",val", ",train"))
    assert "training images" in trained(a_run(squares, steps=1)).budgets[0].validation


def test_labels_that_only_validation_has_are_skipped(squares: Path) -> None:
    manifest = squares / "manifest.csv"
    lines = manifest.read_text().splitlines()
    lines[6] = lines[6].replace(",7,val", ",99,val")
    manifest.write_text("\n".join(lines))
    (budget,) = trained(a_run(squares, kind="classify", label="side", steps=1)).budgets
    assert budget.validation == "3 images set apart"
    assert "'99'" in budget.skipped["images/05.png"]


@pytest.mark.parametrize(("kind", "column"), [("regress", "side"), ("classify", "bulk"), ("segment", "mask")])
def test_one_missing_label_does_not_refuse_the_others(squares: Path, kind: str, column: str) -> None:
    lines = [line.split(",") for line in (squares / "manifest.csv").read_text().splitlines()]
    lines[1][lines[0].index(column)] = ""
    (squares / "manifest.csv").write_text("\n".join(map(",".join, lines)))
    (budget,) = trained(a_run(squares, kind=kind, steps=1)).budgets
    assert (budget.images, list(budget.skipped)) == (19, ["images/00.png"])
    assert budget.config["label"] == column


def test_the_card_tells_where_the_model_comes_from(squares: Path) -> None:
    run = a_run(squares, steps=2, command="knife train regress --data squares")
    trained(run)
    first = describe(run.path).card
    assert (first.kind, first.dataset, first.schedule) == ("regress", "squares", Schedule())
    assert first.spec.channels == ("grey",)
    assert (first.config["label"], first.config["low"], first.config["high"]) == ("side", 2, 10)
    assert first.guidance["gradient"] > 0
    record = first.training
    assert (record["step"], record["images"], record["layout"]) == (2, 20, "manifest")
    assert record["command"] == run.command
    assert record["settings"] == {**run.settings(), "data": record["settings"]["data"]}
    assert not {"command", "steps", "device"} & set(record["settings"])
    assert record["loss"] > 0
    assert record["torch"] == torch.__version__
    trained(replace(run, steps=4))
    assert describe(run.path).card.training["seconds"] > record["seconds"] > 0


@pytest.fixture
def patients(tmp_path: Path) -> Path:
    """Write volumes of twelve patients; the upper half of each is masked."""
    for i in range(12):
        for word in ("t1", "flair", "seg"):
            volume_(
                tmp_path / "heads" / f"p{i:02d}_{word}.nii.gz",
                level=1.0 if word == "seg" else i + 1.0,
                label=word == "seg",
            )
    write_split(recognise(tmp_path / "heads"), val=0.25, test=0.25)
    return tmp_path / "heads"


def test_the_card_tells_which_slices_of_whom_were_trained_on(patients: Path) -> None:
    run = a_run(patients, kind="classify", layout="sequences", slices=(2, 10), min_brain=0.1, steps=1)
    (budget,) = trained(run).budgets
    assert (budget.images, budget.validation) == (6 * 8, "24 images set apart")
    record = describe(run.path).card.training
    chosen = {name: record["settings"][name] for name in ("layout", "slices", "min_brain")}
    assert chosen == {"layout": "sequences", "slices": [2, 10], "min_brain": 0.1}
    assert record["split"] == hashlib.sha256((patients / "split.json").read_bytes()).hexdigest()
    assert trained(replace(run, steps=2)).budgets[0].done == 1
    with pytest.raises(SettingsError, match=r"slices: \[2, 10\] then, \[2, 9\] now; data: 0 images added, 6 removed"):
        trained(replace(run, slices=(2, 9)))


def test_balanced_slices_of_volumes_are_matched_by_height(patients: Path) -> None:
    for i in range(0, 12, 2):
        volume_(patients / f"p{i:02d}_seg.nii.gz", level=0.0, label=True)  # healthy
    job = prepare(a_run(patients, kind="classify", balance=True))
    assert job.strata is not None
    assert {*job.strata.tenths} <= {*range(10)}
    assert {job.strata.tenths[i] for i in job.strata.kept} == {5, 6, 7, 8, 9}  # no mask reaches below
    assert prepare(a_run(patients, kind="segment", balance=True)).strata.tenths[-1] == 0


def test_the_log_goes_on_where_the_state_does(squares: Path) -> None:
    run = a_run(squares, steps=45, every=1000)
    losses = [loss for _, loss in trained(run).steps]
    log = run.path.with_suffix(".log.jsonl")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines] == [20, 40]
    log.write_text(log.read_text() + json.dumps({"step": 60, "loss": 0.0}) + "\n")  # of a run that was killed
    losses += [loss for _, loss in trained(replace(run, steps=65)).steps]
    again = [json.loads(line) for line in log.read_text().splitlines()]
    assert again[:2] == lines
    assert [line["step"] for line in again] == [20, 40, 60]
    assert again[2]["loss"] == pytest.approx(sum(losses[40:60]) / 20, abs=1e-6)
    assert again[2]["images_per_second"] > 0
    whole = a_run(squares, "whole", steps=65, every=1000)
    trained(whole)
    assert digest(whole) == digest(run)
    log.write_text(log.read_text().replace('"loss": ', '"loss": 1'))
    assert digest(whole) != digest(run)


def test_skipped_steps_stand_in_the_log_and_not_in_its_mean(squares: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_loss(monkeypatch, lambda step: step in (3, 4))
    run = a_run(squares, steps=20)
    losses = [loss for step, loss in trained(run).steps if step not in (4, 5)]
    (line,) = [json.loads(line) for line in run.path.with_suffix(".log.jsonl").read_text().splitlines()]
    assert line["skipped"] == 2
    assert line["loss"] == pytest.approx(sum(losses) / 18, abs=1e-6)


def test_a_torn_log_does_not_stop_a_run(squares: Path) -> None:
    run = a_run(squares, steps=1)
    trained(run)
    run.path.with_suffix(".log.jsonl").write_text('{"step": 1}\n{"ste')
    assert trained(replace(run, steps=2)).steps


def test_tensorboard_is_asked_for_before_the_data_are_read(squares: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    witness = Witness()
    with pytest.raises(SettingsError, match=r"pip install 'knife-diffusion\[tensorboard\]'"):
        run_training(a_run(squares, tensorboard=True), witness)
    assert not witness.loaded


def test_tensorboard_gets_what_the_log_gets(squares: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[Any, ...]] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            told.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            told.append((name, step))

        def close(self) -> None:
            told.append(("closed",))

    fake = ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    run = a_run(squares, steps=20, tensorboard=True)
    trained(run)
    folder = str(run.path.parent / "tensorboard" / "regress")
    assert told == [(folder, 1), ("loss", 20), ("images_per_second", 20), ("closed",)]


def test_a_task_whose_labels_differ_in_shape_is_refused(squares: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("knife.tasks.Task.label", lambda task, case, config: torch.zeros(int(case.name[7:9])))
    with pytest.raises(TaskError, match=r"task regress: its hook label returned tensors of shapes \(0,\), \(1,\)"):
        trained(a_run(squares))


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["diffusion", "segment"])
def test_a_gpu_trains_and_resumes(squares: Path, kind: str) -> None:
    run = a_run(squares, kind=kind, steps=40, batch=8, lr=5e-3, device="cuda:0")
    losses = [loss for _, loss in trained(run).steps]
    more = trained(replace(run, steps=60))
    losses += [loss for _, loss in more.steps]
    assert more.budgets[0].done == 40
    assert sum(losses[-15:]) < 0.9 * sum(losses[:15])
    assert next(load_model(run.path).parameters()).device.type == "cpu"


def test_images_are_decoded_once_for_all_networks(squares: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second training of the same data, of another task, decodes none of them again; changed data are."""
    read, real = [], data_module.load
    monkeypatch.setattr(data_module, "load", lambda entries, **more: read.append(len(entries)) or real(entries, **more))
    run_training(a_run(squares, kind="regress", steps=1), Witness())
    before = max(read)
    read.clear()
    run_training(a_run(squares, kind="classify", steps=1), Witness())
    assert before > max(read, default=0)
