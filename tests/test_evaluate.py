"""Rows say what translations say, figures are those of the rows, and what failed or was skipped is told."""

import csv
import io
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import CHANNELS, awake
from trees import volume_

import knife.bootstrap
import knife.evaluate
from knife import cli
from knife.bootstrap import Figure, slope, spearman
from knife.calibrate import form_of
from knife.checkpoint import Card, describe, file_name, read_tensors, save
from knife.cli.words import listed_targets
from knife.errors import InputError, ModelError, SamplingError, SettingsError, TargetError
from knife.evaluate import (
    Ask,
    Evaluation,
    Sample,
    asks_of,
    evaluate,
    figures_of,
    likeliest,
    read,
    reading,
    response,
    rising,
    row_of,
    samples_of,
    score_of,
    set_apart,
    sorted_values,
    translated,
)
from knife.layouts import Entry, Folder, open_folder
from knife.outputs import Edit
from knife.phantom import write_dataset
from knife.settings import Settings, Wish
from knife.translation import translate

QUICK = Settings(noise_level=10, steps=2, tolerance=1e-3)
TESTED = [f"phantom_{i:05d}" for i in range(10, 15)]


@pytest.fixture(scope="module", autouse=True)
def few_resamples():
    """Draw fewer resamples, for speed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knife.bootstrap, "RESAMPLES", 100)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Write 16 phantoms, of which 5 test and none validates."""
    folder = tmp_path_factory.mktemp("data") / "phantoms"
    write_dataset(folder, 16, 32, 5)
    names = [f"phantom_{i:05d}" for i in range(16)]
    split = {"test": TESTED, "val": [], "train": [name for name in names if name not in TESTED]}
    (folder / "split.json").write_text(json.dumps(split))
    return folder


@pytest.fixture(scope="module")
def judged(models, tmp_path_factory) -> Path:
    """Store the brain models with judges of regress and classify, of other weights, beside them."""
    folder = tmp_path_factory.mktemp("judged")
    for file in (models / "brain").iterdir():
        (folder / "brain").mkdir(exist_ok=True)
        (folder / "brain" / file.name).write_bytes(file.read_bytes())
    torch.manual_seed(1)
    for kind in ("regress", "classify"):
        card = replace(describe(folder / "brain" / file_name(kind)).card, judge=True)
        save(folder / "brain" / file_name(kind, judge=True), awake(card.build()).state_dict(), card.to_json())
    return folder


@pytest.fixture(scope="module")
def found(judged, data, tmp_path_factory) -> tuple[Evaluation, list[tuple[int, int]]]:
    """Evaluate the regress task on all five test images, towards three sizes."""
    heard: list[tuple[int, int]] = []
    told = evaluate(
        "brain", data, "regress", ["0.2", "0.05", "0.3", "0.05"], out=tmp_path_factory.mktemp("out") / "new",
        models=judged, settings=QUICK, device="cpu", progress=lambda *steps: heard.append(steps),
    )  # fmt: skip
    return told, heard


def evaluated(data: Path, models: Path, tmp_path: Path, task: str, *targets: str, **options) -> Evaluation:
    settings = replace(QUICK, tolerance=None, strength=0.2)
    given = {"count": 2, "settings": settings, "device": "cpu", **options}
    return evaluate("brain", data, task, targets, out=tmp_path / "out", models=models, **given)


# ------------------------------------------------------------------------------------------------------------ the rows


def test_a_row_says_what_a_translation_says(found, judged, data):
    rows = found[0].rows
    assert [(row["target"], Path(row["image"]).name[:13]) for row in rows] == [
        (target, name) for target in ("0.2", "0.05", "0.3") for name in TESTED
    ]
    row = rows[6]
    file = data / row["image"]
    [one] = translate(file, Wish("regress", "0.05"), models=judged, dataset="brain", settings=QUICK, device="cpu")
    record, judge = one.record, one.record["judge"]
    assert row["patient"] == TESTED[1]
    told = {
        "wanted": 0.05,
        "guide_before": record["before"]["value"],
        "guide_after": record["after"]["value"],
        "guide_error": record["error"]["regress"],
        "guide_within": abs(record["after"]["value"] - 0.05) <= 0.005,
        "judge_before": judge["before"]["value"],
        "judge_after": judge["after"]["value"],
        "judge_error": judge["error"]["regress"],
        "changed": record["preservation"]["changed"],
        "ssim": record["preservation"]["ssim"],
        "reconstruction": record["reconstruction"],
        "effect": record["effect"],
        "drift: segment area": abs(
            record["others"]["after"]["segment area"] - record["others"]["before"]["segment area"]
        ),
        "reached": record["reached"],
        "decodes": len(record["attempts"]),
    }
    assert {name: row[name] for name in told} == pytest.approx(told, rel=1e-3, abs=1e-6)
    assert row["judge_after"] != pytest.approx(row["guide_after"], rel=1e-3)


def test_what_is_told_of_images(found, data):
    evaluation, heard = found
    about = evaluation.about
    assert (about["targets"], about["count"], about["patients"], about["judge"]) == (["0.2", "0.05", "0.3"], 5, 5, True)
    assert (about["split"], about["layout"], about["other_split"]) == ("test", "manifest", False)
    assert [model["kind"] for model in about["models"]] == ["diffusion", "regress", "regress"]
    assert all(len(model["sha256"]) == 64 for model in about["models"])
    assert about["settings"]["noise_level"] == 10
    assert heard[0][0] < heard[-1][0] == heard[-1][1]
    sizes = {
        row["image"]: float(row["size"]) for row in csv.DictReader((data / "manifest.csv").read_text().splitlines())
    }
    for image in evaluation.images:
        before = next(row["guide_before"] for row in evaluation.rows if row["image"] == image["image"])
        assert image["guide_own_error"] == pytest.approx(abs(before - sizes[image["image"]]), abs=1e-5)
        assert image["judge_own_error"] != pytest.approx(image["guide_own_error"], rel=1e-3)
        assert (image["label"], image["guide_own"]) == pytest.approx((sizes[image["image"]], before), rel=1e-5)


SAMPLE = Sample(Entry("a", (), group="p"), None, None)  # type: ignore[arg-type]


def ask(text: str) -> Ask:
    return Ask(SAMPLE, text, text, None)  # type: ignore[arg-type]


def test_a_class_flips_if_it_is_the_likeliest_and_was_not():
    seen = {"before": {"p(a)": 0.5, "p(b)": 0.3, "p(c)": 0.2}, "after": {"p(a)": 0.35, "p(b)": 0.4, "p(c)": 0.25}}
    row = reading("judge", ask("b"), {**seen, "error": {"classify": 0.6}})
    assert row == {"judge_before": 0.3, "judge_after": 0.4, "judge_error": 0.6, "judge_flipped": True}
    assert reading("judge", ask("c"), seen)["judge_flipped"] is False
    assert reading("judge", ask("a"), seen)["judge_flipped"] is None
    assert likeliest(seen["after"]) == "p(b)"


def test_a_number_is_within_a_tenth_of_the_wanted_one():
    def within(wanted: str, value: float) -> object:
        return reading("guide", ask(wanted), {"before": {"v": 0.0}, "after": {"v": value}}).get("guide_within")

    assert [within("50", 45.1), within("50", 55.1), within("-50", -54), within("0", 0), within("+", 50)] == [
        True, False, True, None, None,
    ]  # fmt: skip


def test_the_score_is_the_wanted_class_the_dice_or_the_only_number():
    assert score_of({"p(65)": 0.1, "p(x)": 0.9}, "65") == "p(65)"
    assert score_of({"area": 0.1, "dice": 0.9}, "mask.nii") == "dice"
    assert score_of({"value": 3.0}, "4") == "value"
    assert score_of({"one": 3.0, "two": 2.0}, "4") is None
    assert score_of({}, "4") is None
    assert reading("judge", ask("4"), {}) == {"judge_error": None}
    assert reading("guide", ask("4"), {"error": {"x": float("nan")}}) == {"guide_error": None}


def test_only_a_single_number_has_a_wanted_number():
    record = {"before": {"p(65)": 0.1}, "after": {"p(65)": 0.2, "p(20)": 0.8}, "preservation": {}, "seconds": 1.0}
    record["before"]["p(20)"] = 0.9
    assert row_of(ask("65"), SimpleNamespace(record=record))["wanted"] is None  # type: ignore[arg-type]
    record["before"], record["after"] = {"v": 0.1}, {"v": 0.2}
    assert row_of(ask("65"), SimpleNamespace(record=record))["wanted"] == 65.0  # type: ignore[arg-type]


def test_an_image_rises_if_each_number_wanted_more_came_out_larger():
    def rows(*points: tuple[float | None, float]) -> list[dict[str, object]]:
        return [{"wanted": wanted, "guide_after": after} for wanted, after in points]

    assert rising("guide", rows((3, 9), (1, 2), (2, 5))) is True
    assert rising("guide", rows((3, 9), (1, 2), (2, 2))) is False
    assert rising("guide", rows((1, 2))) is None
    assert rising("guide", rows((None, 2), (None, 3))) is None


# --------------------------------------------------------------------------------------------------------- the figures


def test_figures_are_those_of_the_rows(found):
    evaluation, _ = found
    rows, figures = evaluation.rows, evaluation.figures
    for who in ("guide", "judge"):
        pairs = np.array([(row["wanted"], row[f"{who}_after"]) for row in rows])
        errors = [row[f"{who}_error"] for row in rows]
        assert figures[f"{who}_spearman"].value == pytest.approx(spearman(pairs), rel=1e-5)
        assert figures[f"{who}_slope"].value == pytest.approx(slope(pairs), rel=1e-5)
        assert figures[f"{who}_error"].value == pytest.approx(np.mean(errors), rel=1e-5)
        assert figures[f"{who}_error_median"].value == pytest.approx(np.median(errors), rel=1e-5)
        assert figures[f"{who}_rising"].value == np.mean([image[f"{who}_rising"] for image in evaluation.images])
        assert figures[f"{who}_own_error"].rows == 5
        own = np.array([(image["label"], image[f"{who}_own"]) for image in evaluation.images])
        assert figures[f"{who}_own_slope"].value == pytest.approx(slope(own), rel=1e-5)
        assert figures[f"{who}_own_spearman"].value == pytest.approx(spearman(own), rel=1e-5)
        assert f"{who}_after_median" not in figures
    assert figures["reached"].value == pytest.approx(np.mean([row["reached"] for row in rows]))
    assert figures["changed"].low < figures["changed"].value < figures["changed"].high
    assert {"drift: segment area", "reconstruction", "seconds", "decodes"} <= set(figures)
    assert not {"wanted", "image", "guide_before", "judge_after"} & set(figures)


def test_each_target_has_figures_of_its_own(found):
    evaluation, _ = found
    assert [*evaluation.by_target] == ["0.2", "0.05", "0.3"]
    part = evaluation.by_target["0.05"]
    after = [row["judge_after"] for row in evaluation.rows if row["target"] == "0.05"]
    assert part["judge_after_median"] == pytest.approx(Figure(np.median(after), min(after), max(after), 5), rel=0.5)
    assert part["judge_after_median"].value == pytest.approx(np.median(after), rel=1e-5)
    assert "judge_slope" not in part


def test_images_of_a_patient_are_drawn_together():
    rows = [
        {"patient": name, "target": "1", "changed": value} for name, value in zip("aabb", (1, 1, 3, 3), strict=True)
    ]
    assert figures_of(rows, [], 0) == {"changed": Figure(2.0, 1.0, 3.0, 4)}
    assert figures_of(rows[:2], [], 0) == {"changed": Figure(1.0, None, None, 2)}


def test_rows_without_a_value_do_not_count():
    rows = [{"patient": str(i), "guide_flipped": told} for i, told in enumerate((True, None, True, False, None, True))]
    assert figures_of(rows, [], 0)["guide_flipped"][::3] == (0.75, 4)
    assert figures_of(rows[1:2], [], 0) == {}


# --------------------------------------------------------------------------------------------------- tasks of each form


def test_nothing_changes_outside_a_region(data, judged, tmp_path):
    found = evaluated(data, judged, tmp_path, "regress", "0.1", region="ellipse:50%,50%,6,5")
    assert found.about["region"] == "ellipse:50%,50%,6,5"
    for row in found.rows:
        assert row["changed_inside"] > 0
        assert row["changed_outside"] == 0


def test_a_region_may_be_found(data, judged, tmp_path):
    anywhere = evaluated(data, judged, tmp_path, "regress", "0.1")
    found = evaluated(data, judged, tmp_path, "regress", "0.1", region="auto")
    assert (anywhere.about["region"], found.about["region"]) == (None, "auto")
    assert "changed_outside" not in anywhere.rows[0]
    assert all(row["changed_outside"] == 0 for row in found.rows)


def test_masks_are_measured_by_their_dice(data, judged, tmp_path):
    found = evaluated(data, judged, tmp_path, "segment", "ellipse:50%,50%,6,5", "rectangle:40%,40%,30%,30%")
    dice = [1 - row["guide_error"] for row in found.rows]
    assert [row["guide_after"] for row in found.rows] == pytest.approx(dice, abs=2e-6)  # both are rounded to six digits
    assert all(row["wanted"] is None and "changed_outside" in row and "judge_after" not in row for row in found.rows)
    assert found.about["judge"] is False
    assert {"guide_after_median", "guide_error", "changed_outside", "guide_own_error"} <= set(found.figures)
    assert not [name for name in found.figures if name.startswith("judge") or name.endswith(("spearman", "rising"))]


def test_classes_are_measured_by_what_flips(data, judged, tmp_path):
    found = evaluated(data, judged, tmp_path, "classify", "healthy", "diseased")
    for who in ("guide", "judge"):
        for image in found.images:
            mine = [row for row in found.rows if row["image"] == image["image"]]
            assert [row[f"{who}_flipped"] for row in mine].count(None) == 1  # it had one of the two before
            assert sum(row[f"{who}_before"] for row in mine) == pytest.approx(1, abs=1e-5)
        assert found.figures[f"{who}_flipped"].rows == 2


def test_more_is_the_most_that_was_learnt(data, judged, tmp_path):
    found = evaluated(data, judged, tmp_path, "regress", "+")
    most = describe(judged / "brain" / "regress.safetensors").card.config["high"]
    assert {row["wanted"] for row in found.rows} == {None}
    for row in found.rows:
        assert row["guide_error"] == pytest.approx(abs(row["guide_after"] - most), rel=1e-4)
    assert found.figures["judge_after_median"].rows == 2
    json.loads(found.files.record.read_text())


def test_a_target_may_count_from_what_the_image_has(data, judged, tmp_path):
    found = evaluated(data, judged, tmp_path, "regress", "by:+10%")
    assert [row["wanted"] for row in found.rows] == pytest.approx(
        [1.1 * row["guide_before"] for row in found.rows], rel=1e-4
    )
    assert {row["target"] for row in found.rows} == {"by:+10%"}


# ----------------------------------------------------------------------------------------------------------- the files


def test_the_files_hold_it_all(found):
    evaluation, _ = found
    assert [file.name for file in evaluation.files] == ["evaluation.json", "evaluation.csv", "evaluation.png"]
    assert json.loads(evaluation.files.record.read_text()) == evaluation.to_json()
    rows = list(csv.DictReader(evaluation.files.table.read_text().splitlines()))
    assert [float(row["judge_after"]) for row in rows] == [row["judge_after"] for row in evaluation.rows]
    picture = PIL.Image.open(io.BytesIO(evaluation.files.picture.read_bytes()))
    assert picture.size == (3 * 480, 320)


def test_no_file_tells_where_data_and_masks_lie(data, judged, images, tmp_path):
    found = evaluated(data, judged, tmp_path, "segment", str(images / "mask.nii"))
    text = found.files.record.read_text()
    assert found.about["targets"] == ["mask.nii"]
    assert str(data.parent) not in text
    assert str(images) not in text


def test_curves_are_medians_over_targets_and_sorted_values(found):
    evaluation, _ = found
    line = response("judge", evaluation)
    assert [x for x, _ in line.points] == [0.05, 0.2, 0.3]
    assert line.points[0][1] == pytest.approx(evaluation.by_target["0.05"]["judge_after_median"].value, rel=1e-5)
    ends = sorted_values("x", [{"v": 3.0}, {"v": None}, {"v": 1.0}, {}], "v", 100).points
    assert (ends[0], ends[len(ends) // 2], ends[-1]) == ((0, 100), (50, 200), (100, 300))
    assert sorted_values("x", [{"v": None}], "v").points == []


def test_the_same_command_gives_the_same_figures(data, judged, tmp_path):
    first, again = (evaluated(data, judged, tmp_path, "regress", "0.1", seed=3).to_json() for _ in range(2))
    for told in (first, again):
        for part in (told["figures"], *told["by_target"].values(), *told["rows"]):
            del part["seconds"]
    assert first == again
    other = evaluated(data, judged, tmp_path, "regress", "0.1", seed=5)
    assert [image["image"] for image in other.images] != [image["image"] for image in first["images"]]


# -------------------------------------------------------------------------------------------- what cannot be evaluated


def test_an_image_that_cannot_be_used_is_told_and_another_one_taken(data, models):
    entries = open_folder(data).split("test")
    broken = replace(entries[0], files=(data / "manifest.csv",))
    form = form_of(describe(models / "brain" / "regress.safetensors").card)
    for seed in range(3):
        samples, skipped = read([broken, *entries[1:3]], form, 2, seed)
        assert [sample.entry for sample in samples] == entries[1:3]
        assert set(skipped) <= {broken.name}
    assert "manifest.csv" in read([broken, *entries[1:3]], form, 3, 0)[1][broken.name]
    with pytest.raises(InputError, match=r"none of 1 images can be used\. .*manifest.csv"):
        read([broken], form, 2, 0)


def test_slices_of_a_volume_are_read_from_it_at_once_and_keep_no_volume(tmp_path, models, monkeypatch):
    for level, name in enumerate(CHANNELS["brain"], 1):
        volume_(tmp_path / "bob" / f"bob_{name}.nii.gz", level=level)
    entries = open_folder(tmp_path).entries
    form = form_of(describe(models / "brain" / "regress.safetensors").card)
    opened = []
    volume_of = knife.evaluate.data.volume_of
    monkeypatch.setattr(knife.evaluate.data, "volume_of", lambda *what: opened.append(what) or volume_of(*what))
    found = list(samples_of(entries, form))
    assert len(opened) == 1
    assert "such a slice shows nothing" in found[0] or "brain covers" in found[0]
    image = found[3].image
    assert image.pixels.untyped_storage().nbytes() == 4 * 16 * 16 * 4
    assert torch.equal(image.pixels, volume_of(entries[3]).slice(3).pixels)
    assert {sample.entry.key for sample in found[1:]} == {entries[0].group}


def test_slices_of_one_patient_are_one_patient(tmp_path, models):
    for patient in ("ann", "bob"):
        for level, name in enumerate(CHANNELS["brain"], 1):
            volume_(tmp_path / "heads" / patient / f"{patient}_{name}.nii.gz", level=level)
    (tmp_path / "heads" / "split.json").write_text(json.dumps({"train": ["ann"], "val": [], "test": ["bob"]}))
    found = evaluated(tmp_path / "heads", models, tmp_path, "regress", "0.1", "0.2", count=3, slices=(4, 9))
    assert {row["image"][:3] for row in found.rows} == {"bob"}
    assert (len(found.images), found.about["patients"], found.about["count"]) == (3, 1, 3)
    assert {(one.low, one.high) for one in found.figures.values()} == {(None, None)}
    assert not any("own_error" in name for name in found.figures)  # nobody tells the sizes


class Sick:
    """Stands for a job whose run loses images."""

    lost: tuple[int, ...] = ()

    def __call__(self, job, batches, failed):
        edits = [edit for batch in batches for edit in batch]
        for i in self.lost:  # a batch is yielded once all of it is done
            failed(Path("x.nii"), SamplingError(f"lost {i}"))
        yield from (None if i in self.lost else i for i in range(len(edits)))


def test_what_fails_is_told_with_its_reason(monkeypatch):
    sick = Sick()
    monkeypatch.setattr(knife.evaluate, "run", sick)
    asks = [ask(str(i)) for i in range(4)]
    sick.lost, failed = (0, 2), []
    assert [one for _, one in translated(None, asks, failed)] == [1, 3]  # type: ignore[arg-type]
    assert failed == [{"image": "a", "target": str(i), "why": f"lost {i}"} for i in (0, 2)]
    sick.lost = (0, 1, 2, 3)
    with pytest.raises(SamplingError, match="lost 0"):
        list(translated(None, asks, []))  # type: ignore[arg-type]


def test_a_target_that_some_images_cannot_have_fails_there(monkeypatch):
    def asked(job, wishes, region, image):
        if image.bad or wishes[0].target == "nonsense":
            raise TargetError(f"--target {wishes[0].target}: vanishes")
        return image, [Edit(image, ())]

    monkeypatch.setattr(knife.evaluate, "asked", asked)
    monkeypatch.setattr(knife.evaluate, "absolute", lambda job, guide, target, image: target)
    job = SimpleNamespace(guides=[None])
    samples = [Sample(Entry(name, ()), SimpleNamespace(bad=name == "b"), None) for name in "abc"]
    asks, failed = asks_of(job, [Wish("t", "1")], None, samples)
    assert [one.sample.entry.name for one in asks] == ["a", "c"]
    assert failed == [{"image": "b", "target": "1", "why": "--target 1: vanishes"}]
    with pytest.raises(TargetError, match="nonsense"):
        asks_of(job, [Wish("t", "1"), Wish("t", "nonsense")], None, samples)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"targets": []}, SettingsError, "--targets: none given"),
        ({"targets": ["0.9"]}, TargetError, "--target 0.9: outside the values"),
        ({"split": "exam"}, SettingsError, "--split exam: no such split; give one of train, val, test"),
        ({"split": "val"}, InputError, r"no image is set apart as val \(train 11, val 0, test 5\); draw some by"),
        ({"count": 0}, SettingsError, "--count 0: give 1 or more"),
        ({"dataset": "nobody"}, ModelError, "no trained models in .* under the name nobody"),
        ({"settings": Settings(noise_level=51)}, SettingsError, "--noise-level 51"),
        ({"layout": "nonsense"}, SettingsError, "--layout nonsense"),
        ({"region": "nowhere.nii"}, InputError, "nowhere.nii: no such file"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(data, models, tmp_path, options, error, words):
    given = {"dataset": "brain", "targets": ["0.1"], "settings": QUICK, **options}
    dataset, targets = given.pop("dataset"), given.pop("targets")
    with pytest.raises(error, match=words):
        evaluate(dataset, data, "regress", targets, out=tmp_path / "out", models=models, device="cpu", **given)
    assert not (tmp_path / "out").exists()


def test_results_that_cannot_be_written_are_refused_first(data, models, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match=r"-o .*file/out"):
        evaluate("brain", data, "regress", ["0.1"], out=tmp_path / "file" / "out", models=models, settings=QUICK)


def test_a_folder_that_says_nothing_of_splits_has_a_test_split_by_name():
    folder = Folder(Path("x"), "flat", [Entry(str(i), ()) for i in range(200)])
    assert set_apart(folder, "test") == folder.split("test") != []


# ---------------------------------------------------------------------------------------------------- the command line


@pytest.fixture
def command(found, monkeypatch, capsys):
    """Run `knife evaluate` with what was measured in place of a measurement; returns what it asked for and said."""
    evaluation, _ = found

    def run(*arguments: str, result: Evaluation = evaluation):
        asked = {}
        monkeypatch.setattr(
            knife.evaluate, "evaluate", lambda *told, **options: asked.update(options, told=told) or result
        )
        monkeypatch.setattr(
            sys,
            "argv",
            ["knife", "evaluate", "brain", "--data", "d", "--task", "regress", "--targets", "1", *arguments],
        )
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 0
        return asked, capsys.readouterr()

    return run


def test_tables_files_and_doubts(command, found):
    evaluation, _ = found
    asked, said = command("--steps", "7", "--split", "val", "--seed", "9", "--slices", "3:5")
    assert asked["told"] == ("brain", Path("d"), "regress", ["1"])
    assert (asked["out"], asked["split"], asked["seed"]) == (Path("evaluated/brain_regress"), "val", 9)
    assert (asked["slices"], asked["settings"]) == ((3, 5), Settings(steps=7))
    knobs = "--region auto --tolerance 0.01 --solver ddim --batch-size 3 --precision bfloat16 --scale 2"
    asked, _ = command(*knobs.split(), "--allow-extrapolation", "--max-reconstruction", "0.2")
    walk = Settings(tolerance=0.01, solver="ddim", batch_size=3, precision="bfloat16", scale=2)
    assert asked["settings"] == replace(walk, extrapolate=True, max_reconstruction=0.2)
    assert asked["region"] == "auto"
    lines = said.out.splitlines()
    assert lines[0].startswith("regress: 5 images of 5 patients (test), 15 translations; models brain; noise level 10")
    assert lines[-3:] == [str(file) for file in evaluation.files]
    one = evaluation.figures["judge_slope"]
    assert f"{one.value:.3g} [{one.low:.3g}, {one.high:.3g}]" in next(line for line in lines if "judge_slope" in line)
    assert sum(line.startswith(("│ 0.2 ", "│ 0.05 ", "│ 0.3 ")) for line in lines) == 3
    assert said.err.splitlines() == ["Take care: 5 patients; that says little."]


def test_doubts(command, found):
    evaluation, _ = found
    about = {**evaluation.about, "judge": False, "other_split": True, "patients": 99}
    rows = [{name: value for name, value in row.items() if name != "reached"} for row in evaluation.rows]
    failed = [{"image": f"i{k}", "target": "1", "why": "blown up"} for k in range(9)]
    doubtful = replace(evaluation, about=about, rows=rows, failed=failed, skipped={"y": "y: broken."})
    words = " ".join(command(result=doubtful)[1].err.split())
    assert "have no judge of regress, so the guide alone speaks for itself" in words
    assert "`knife train regress --judge`" in words
    assert "another split.json, or to none, and may have seen these images" in words
    assert "no edit was adjusted until it was there" in words
    assert "9 translations failed: i0 to 1: blown up" in words
    assert words.count("blown up") == 5
    assert words.endswith("1 images could not be used: y: broken.")
    assert "that says little" not in words
    trained = replace(evaluation, about={**about, "judge": True, "split": "train"})
    assert "these are training images" in command(result=trained)[1].err


def test_json_is_the_record(command, found):
    assert json.loads(command("--json")[1].out) == found[0].to_json()


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("0.02,0.05,0.1", ["0.02", "0.05", "0.1"]),
        ("ellipse:50%,50%,15,12", ["ellipse:50%,50%,15,12"]),
        ("ellipse:1,2,3,4,rectangle:5,6,7,8", ["ellipse:1,2,3,4", "rectangle:5,6,7,8"]),
        ("ellipse:1,2,3,4;mask.nii,+", ["ellipse:1,2,3,4", "mask.nii", "+"]),
        ("by:+15%,by:-0.02,", ["by:+15%", "by:-0.02"]),
        ("", []),
    ],
)
def test_commas_separate_targets_but_not_the_numbers_of_a_shape(text, targets):
    assert listed_targets(text) == targets


def test_another_split_file_than_in_the_training_is_told(data, models, tmp_path):
    folder = tmp_path / "brain"
    folder.mkdir()
    for kind in ("diffusion", "regress"):
        stored = describe(models / "brain" / file_name(kind))
        card: Card = replace(stored.card, training={**stored.card.training, "split": "0" * 64})
        save(folder / file_name(kind), card.build().state_dict(), card.to_json())
    assert evaluated(data, tmp_path, tmp_path, "regress", "0.1", count=1).about["other_split"] is True


def test_a_judge_of_another_split_is_told(data, judged, tmp_path):
    shutil.copytree(judged / "brain", tmp_path / "brain")
    path = tmp_path / "brain" / file_name("regress", judge=True)
    card = describe(path).card
    save(path, read_tensors(path), replace(card, training={**card.training, "split": "0" * 64}).to_json())
    assert evaluated(data, judged, tmp_path, "regress", "0.1", count=1).about["other_split"] is False
    assert evaluated(data, tmp_path, tmp_path, "regress", "0.1", count=1).about["other_split"] is True
