"""Skill means what it says, the chosen level follows the curve, and cards change while weights do not."""

import io
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import PIL.Image
import pytest
import torch
from conftest import CONFIGS, SCHEDULE, SIZE, TINY
from test_lock import holder
from torch import Tensor, nn

import knife.calibrate
from knife import cli
from knife.calibrate import (
    Calibration,
    RoundTrip,
    Sight,
    Subject,
    calibrate,
    chosen,
    crossing,
    default_level,
    round_trip,
    set_apart,
    sight,
    split_otherwise,
    store,
)
from knife.checkpoint import Card, describe, digest, file_name, read_about, read_tensors, save
from knife.errors import DiskError, InputError, LockedError, ModelError, SamplingError, SettingsError, TaskError
from knife.layouts import Entry, Folder
from knife.phantom import write_dataset
from knife.schedule import Schedule
from knife.spec import ImageSpec
from knife.tasks import task

LINEAR = Schedule("linear", 1000)
SPEC = ImageSpec(("a",), SIZE, TINY, TINY)
LABELS = {
    "regress": torch.linspace(-1, 2, 12),
    "classify": torch.tensor([0, 1, 1] * 4),
    "segment": (torch.arange(12 * 256).view(12, 1, *SIZE) % 7 < 2).float(),
}


class Constant(nn.Module):
    """Answers the same, whatever it is shown."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.answer.expand(len(x), *self.answer.shape)


class Corner(nn.Module):
    """Reads the label off a corner, as far as noise lets it."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x[:, 0, 0, :1]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Write 24 phantoms, of which 10 validate, 8 test and 6 train."""
    folder = tmp_path_factory.mktemp("data") / "phantoms"
    write_dataset(folder, 24, 32, 5)
    names = [f"phantom_{i:05d}" for i in range(24)]
    split = {"val": names[:10], "test": names[10:18], "train": names[18:]}
    (folder / "split.json").write_text(json.dumps(split))
    return folder


@pytest.fixture(scope="module")
def measured(models, data, tmp_path_factory) -> tuple[Path, Calibration, list[tuple[int, int]]]:
    """Calibrate a copy of the brain models, a judge beside them: the folder, what was found, the progress."""
    folder, heard = tmp_path_factory.mktemp("calibrated"), list[tuple[int, int]]()
    shutil.copytree(models / "brain", folder / "brain")
    card = describe(folder / "brain" / "regress.safetensors").card
    judge = replace(card, judge=True)
    save(folder / "brain" / file_name("regress", judge=True), judge.build().state_dict(), judge.to_json())
    with pytest.MonkeyPatch.context() as patch:
        for name, few in {"LEVELS": 5, "ENCODED_TO": (0.2, 0.5), "WALKED_IN": (10, 20)}.items():
            patch.setattr(knife.calibrate, name, few)
        found = calibrate("brain", data, models=folder, device="cpu", progress=lambda *told: heard.append(told))
    return folder, found, heard


def looks(kind: str, net: nn.Module, labels: Tensor, x: Tensor) -> Sight:
    return sight(Card(kind, "toy", SPEC, SCHEDULE, CONFIGS[kind]), net, x, labels, lambda: None)


@pytest.mark.parametrize(
    ("splits", "otherwise"),
    [
        (({}, {}), False),
        (({"split": "a"}, {}), False),
        (({"split": "a"}, {"split": "b"}), True),
        (({"split": None},), True),
    ],
)
def test_models_that_kept_to_another_split_are_noticed(models, splits, otherwise):
    stored = describe(models / "brain" / "regress.safetensors")
    trained = [replace(stored, card=replace(stored.card, training=training)) for training in splits]
    assert split_otherwise(trained, SimpleNamespace(split_sha256="a")) is otherwise
    assert split_otherwise(trained[-1:], SimpleNamespace(split_sha256=None)) is (splits[-1].get("split") is not None)


# --------------------------------------------------------------------------------------------------------------- skill


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        ("regress", torch.tensor([0.3])),
        ("classify", torch.tensor([0.2, -1.0])),
        ("segment", torch.linspace(-1, 1, 256).view(1, *SIZE)),
    ],
)
def test_who_answers_without_looking_has_no_skill(kind, answer):
    seen = looks(kind, Constant(answer), LABELS[kind], torch.randn(12, 1, *SIZE))
    assert min(seen.error) > 0
    assert seen.skill == pytest.approx([0.0] * len(seen.levels), abs=1e-6)


def test_who_is_always_right_has_all_skill_until_noise_hides_what_there_is_to_see():
    x, labels = torch.zeros(12, 1, *SIZE), LABELS["regress"]
    x[:, 0, 0, 0] = labels
    seen = looks("regress", Corner(), labels, x)
    assert (seen.levels[0], seen.levels[-1], seen.images) == (0, 50, 12)
    assert (seen.error[0], seen.skill[0]) == (0, 1)
    gap = (labels - labels.roll(1)).abs().mean() * CONFIGS["regress"]["std"]
    assert seen.chance[0] == pytest.approx(float(gap))  # in the label's own unit
    assert seen.skill[len(seen.skill) // 2] > seen.skill[-1]
    assert abs(seen.skill[-1]) < 0.2


def test_labels_that_are_all_the_same_show_no_skill():
    seen = looks("regress", Corner(), torch.zeros(12), torch.zeros(12, 1, *SIZE))
    assert (seen.chance[0], seen.skill[0]) == (0, 0)


# ---------------------------------------------------------------------------------------------------------- the choice


def curve(*points: tuple[int, float]) -> Sight:
    return Sight([x for x, _ in points], [1 - y for _, y in points], [1.0] * len(points), 64)


def trip(*errors: float) -> RoundTrip:
    return RoundTrip({(200 * i, 50): error for i, error in enumerate(errors, 1)}, {}, 8)


@pytest.mark.parametrize(
    ("seen", "round_trip", "level", "window"),
    [
        (curve((0, 1), (500, 1), (600, 0), (1000, 0)), None, 525, 550),
        (curve((0, 0.4), (500, 0.4), (600, 0), (1000, 0)), trip(0.01, 0.01, 0.02), 525, 550),  # shares of what it has
        (curve((0, 1), (1000, 0)), None, 475, 500),  # not less noise than leaves a tenth
        (curve((0, 1), (1000, 0.8)), None, 600, 1000),  # nor more than leaves a fortieth
        (curve((0, 1), (500, 1), (600, 0), (1000, 0)), trip(0.01, 0.02, 0.04), 500, 550),  # and a faithful round trip
        (curve((0, 1), (500, 1), (600, 0), (1000, 0)), trip(0.1, 0.2, 0.3), 475, 550),
        (curve((0, 0.05), (1000, 0)), None, None, None),
    ],
)
def test_the_level_is_where_noise_hides_a_part_and_the_guide_still_sees(seen, round_trip, level, window):
    assert chosen(seen, LINEAR, round_trip) == {"noise_level": level, "guide_below": window}


def test_a_schedule_of_few_levels_has_levels_to_choose():
    choice = chosen(curve((0, 1), (4, 0)), Schedule("linear", 4), None)
    assert all(1 <= level <= 4 for level in choice.values())


def test_a_curve_is_crossed_between_its_points():
    assert crossing([0, 10, 20], [0, 1, 3], 2) == 15
    assert crossing([0, 10, 20], [0, 1, 0], 1) == 20
    assert crossing([5, 10], [3, 0], 2) == 5


@pytest.mark.parametrize("told", [None, "400", 0, 51, True, 3.0, [7]])
def test_a_level_that_is_none_is_not_taken_from_a_card(told):
    card = Card("regress", "toy", SPEC, SCHEDULE, calibration={"noise_level": told, "guide_below": told})
    assert default_level(card) is None
    assert default_level(replace(card, calibration=[])) is None
    assert default_level(replace(card, calibration={"noise_level": 50})) == 50


# ----------------------------------------------------------------------------------------------------------- the whole


def test_cards_tell_what_was_measured_and_nothing_else_changes(models, measured):
    folder, found, _ = measured
    for kind in ("diffusion", "regress", "classify", "segment"):
        before, after = (place / "brain" / f"{kind}.safetensors" for place in (models, folder))
        old, new = read_tensors(before), read_tensors(after)
        assert old.keys() == new.keys()
        assert all(torch.equal(old[name], new[name]) and old[name].dtype == new[name].dtype for name in old)
        then, now = read_about(before), read_about(after)
        changed = {"calibration", "sha256"} if kind != "classify" else set()
        assert {name for name in now if then[name] != now[name]} == changed
    for kind, seen in found.sights.items():
        card = describe(folder / "brain" / f"{kind}.safetensors").card
        told = card.calibration
        assert told["levels"] == [*seen.levels]
        assert told["error"] == pytest.approx([*seen.error], rel=1e-5)
        assert told["chance"] == pytest.approx([*seen.chance], rel=1e-5)
        assert (told["images"], told["split"]) == (10, "val")
        assert told["noise_level"] == default_level(card) == found.choices[kind]["noise_level"]


def test_the_round_trip_is_measured_by_level_and_by_steps(measured):
    folder, found, _ = measured
    trip = found.round_trip
    assert trip.images == 8
    assert [*trip.by_level] == [(10, 10), (25, 20)]  # in the usual steps, or as many as there are levels
    assert [*trip.by_steps] == [(50, 10), (50, 20)]
    assert all(error > 0 for error in (*trip.by_level.values(), *trip.by_steps.values()))
    told = describe(folder / "brain" / "diffusion.safetensors").card.calibration["reconstruction"]
    assert (told["noise_level"], told["steps"]) == ([10, 25, 50, 50], [10, 20, 10, 20])
    assert told["error"] == pytest.approx([*trip.by_level.values(), *trip.by_steps.values()], rel=1e-5)


def test_progress_ends_at_its_end(measured):
    _, _, heard = measured
    total = heard[-1][1]
    assert heard == [(done, total) for done in range(1, total + 1)]


def test_what_cannot_be_measured_is_left_out_and_a_judge_is_none_to_measure(measured):
    folder, found, _ = measured
    assert [*found.sights] == ["regress", "segment"]
    assert [*found.left_out] == ["classify"]
    assert "0 of 10 images have a label for classify" in found.left_out["classify"]
    judge = folder / "brain" / "regress.judge.safetensors"
    assert describe(judge).card.calibration == {}


def test_the_picture_lies_beside_the_models(measured):
    folder, found, _ = measured
    assert found.picture == folder / "brain" / "calibration.png"
    assert PIL.Image.open(io.BytesIO(found.picture.read_bytes())).size == (3 * 480, 320)


def test_the_same_images_are_measured_every_time(data, measured, monkeypatch):
    folder, found, _ = measured
    monkeypatch.setattr(knife.calibrate, "round_trip", lambda *_: found.round_trip)
    monkeypatch.setattr(knife.calibrate, "LEVELS", 5)
    again = calibrate("brain", data, models=folder, device="cpu")
    assert again.sights == found.sights


def entries(**counts: int) -> Folder:
    made = [Entry(f"{split}{i}", (), split=split) for split, count in counts.items() for i in range(count)]
    return Folder(Path("x"), "flat", made)


@pytest.mark.parametrize(
    ("counts", "split", "images"),
    [
        ({"train": 90, "val": 10, "test": 10}, "val", 10),
        ({"train": 90, "val": 2, "test": 10}, "test", 10),
        ({"train": 90, "val": 2, "test": 2}, "train", 20),
        ({"train": 3, "val": 5, "test": 1}, "val", 5),
    ],
)
def test_images_set_apart_come_first_if_there_are_enough(counts, split, images):
    name, chosen_ones = set_apart(entries(**counts), 20)
    assert name == split
    assert len({entry.name for entry in chosen_ones}) == images
    assert {entry.split for entry in chosen_ones} == {split}


# ------------------------------------------------------------------------------------------------------------- refusals


def test_what_cannot_be_calibrated_is_refused(models, data, images, tmp_path, monkeypatch):
    def refused(error, match, dataset="brain", folder=data, **options):
        with pytest.raises(error, match=match):
            calibrate(dataset, folder, **{"models": models, "device": "cpu", **options})

    refused(ModelError, "nobody: no such folder of models", dataset="nobody")
    refused(ModelError, "no such folder", dataset="../brain")
    refused(SettingsError, "--count 1", count=1)
    refused(InputError, "no-data", folder=tmp_path / "no-data")
    refused(
        InputError, "0 of 10 images can be measured on. .*4 channels, the others have 3", dataset="photo", folder=data
    )
    monkeypatch.setattr(knife.calibrate, "STARTER", models)
    refused(ModelError, "brain is shipped with knife, copy ", models=tmp_path)
    monkeypatch.setattr(knife.calibrate, "room", lambda folder: 1000)
    refused(DiskError, "MiB are free")


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # of forks where there are threads
def test_models_that_are_being_trained_or_cannot_be_written_are_not_calibrated(models, data, monkeypatch):
    with holder(models / "brain" / ".classify.lock") as child:
        with pytest.raises(LockedError, match=rf"classify\.safetensors is in use by process {child} on ") as refusal:
            calibrate("brain", data, models=models, device="cpu")
        assert refusal.value.exit_code == 4
    (models / "brain" / ".classify.lock").unlink()  # by which a killed holder is known

    def refuse(folder):
        raise PermissionError(13, "no folder that can be written to", str(folder))

    monkeypatch.setattr(knife.calibrate, "room", refuse)
    with pytest.raises(DiskError, match="brain: cannot be written to; copy the models, and give --models"):
        calibrate("brain", data, models=models, device="cpu")


def test_images_without_labels_are_refused(models, images, tmp_path):
    for i in range(3):
        shutil.copy(images / "slice.nii", tmp_path / f"a{i}.nii")
    with pytest.raises(InputError, match=r"images have a label for classify\. a.*: has no class"):
        calibrate("brain", tmp_path, models=models, device="cpu", layout="flat")


def test_a_task_that_does_not_tell_its_error_is_refused(models, data, monkeypatch):
    silent = {kind: replace(task(kind), hooks=("guide",)) for kind in CONFIGS}
    monkeypatch.setattr(knife.calibrate, "task", silent.get)
    with pytest.raises(TaskError, match="task classify: cannot be measured, its plugin has no hook error"):
        calibrate("brain", data, models=models, device="cpu")


def test_a_diffusion_model_that_blows_up_is_refused():
    card = Card("diffusion", "toy", SPEC, SCHEDULE)
    with pytest.raises(SamplingError, match="encoding to level 10 and decoding blows images up"):
        round_trip(card, Constant(torch.full((1, *SIZE), torch.inf)), torch.zeros(2, 1, *SIZE), lambda: None)


def test_a_model_that_changed_meanwhile_keeps_its_own_card(models, tmp_path):
    path = tmp_path / "regress.safetensors"
    shutil.copy(models / "brain" / "regress.safetensors", path)
    one = Subject(describe(path), digest(path), torch.zeros(2))
    store(one, {"noise_level": 20})
    assert default_level(describe(path).card) == 20
    with pytest.raises(ModelError, match="has changed since it was measured"):
        store(one, {"noise_level": 30})
    assert default_level(describe(path).card) == 20


# ---------------------------------------------------------------------------------------------------- the command line


@pytest.fixture
def command(measured, data, monkeypatch, capsys):
    """Run `knife calibrate` with what was measured in place of a measurement."""
    folder, found, _ = measured

    def run(*arguments: str, result: Calibration = found):
        monkeypatch.setattr(knife.calibrate, "calibrate", lambda *_, **options: result)
        monkeypatch.setattr(
            sys, "argv", ["knife", "calibrate", "brain", "--data", str(data), "--models", str(folder), *arguments]
        )
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 0
        return capsys.readouterr()

    return run


def test_a_table_for_each_task_and_what_to_doubt(command, measured):
    _, found, _ = measured
    said = command()
    lines = said.out.splitlines()
    assert "regress, 10 images (val):" in lines
    assert "round trip without guidance, 8 images (val):" in lines
    assert lines[-1] == str(found.picture)
    assert sum(line.startswith("│ 50 ") for line in lines) == 4  # of regress, segment, and two round trips
    assert "left out classify: " in said.err
    assert "another split.json" not in said.err
    assert "another split.json, or to none, and may have seen" in command(result=replace(found, other_split=True)).err
    assert "regress was measured on 10 images; that says little" in said.err
    knowing = replace(found, choices={kind: {"noise_level": 20, "guide_below": 25} for kind in found.choices})
    assert "regress: default noise level 20; sees enough below 25." in command(result=knowing).out


def test_guides_that_know_nothing_and_training_images_are_doubted(command, measured):
    _, found, _ = measured
    blind = Sight([0, 50], [0.5, 0.5], [0.5, 0.5], 64)
    same = Sight([0, 50], [0.0, 0.0], [0.0, 0.0], 64)
    nothing = {"noise_level": None, "guide_below": None}
    worse = Calibration(
        "train", {"regress": blind, "segment": same}, {"regress": nothing, "segment": nothing}, None, {}, found.picture
    )
    said = " ".join(command(result=worse).err.split())
    assert "training images were measured on" in said
    assert "regress knows nothing of such images: of the error of guessing it makes 100% on clean ones" in said
    assert "all of these images have the same label for segment" in said


def test_json_holds_all_of_it(command, measured):
    _, found, _ = measured
    told = json.loads(command("--json").out)
    assert told["split"] == "val"
    assert told["tasks"]["segment"]["skill"] == pytest.approx(found.sights["segment"].skill)
    assert told["tasks"]["regress"]["noise_level"] == found.choices["regress"]["noise_level"]
    assert told["diffusion"]["images"] == 8
    assert [*told["left_out"]] == ["classify"]
