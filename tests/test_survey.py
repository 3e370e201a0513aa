"""What `knife data check` finds: what a folder holds, and each thing that may be wrong with it, by name."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image as Picture
from trees import picture, slice_, table, volume_

from knife import cli, survey
from knife.image import read, write
from knife.layouts import SPLIT_FILE


def check(root: Path, **options: Any) -> dict[str, Any]:
    """Check a folder; the report must be JSON as it stands."""
    report = survey.survey(root, **options)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    return report


def problems(root: Path, **options: Any) -> dict[str, list[str]]:
    """Return what is wrong with a folder, without the folder's own name."""
    told = check(root, **options)["problems"]
    return {kind: [sentence.replace(f"{root}/", "") for sentence in sentences] for kind, sentences in told.items()}


def pictures(root: Path, count: int = 4) -> Path:
    """Write pictures that all differ."""
    for i in range(count):
        picture(root / f"{i}.png", value=100 + i)
    return root


# ------------------------------------------------------------------------------------------------------- what it holds


def test_what_a_folder_holds(tmp_path: Path) -> None:
    for i in range(6):
        picture(tmp_path / str(20 + 10 * (i % 3)) / f"{i}.png", value=100 + i, side=16 if i else 24)
    heard: list[tuple[int, int]] = []
    report = check(tmp_path, progress=lambda *told: heard.append(told))
    assert heard == [(i, 6) for i in range(1, 7)]
    assert (report["layout"], report["images"], report["volumes"], report["patients"]) == ("ages", 6, 0, 0)
    assert report["why"] == "3 folders, each named by its images' age"
    assert list(report["shapes"].items()) == [("16 x 16", 5), ("24 x 24", 1)]
    assert report["stored"] == {".png uint8": 6}
    assert report["splits"]["told_by"] == "names"
    assert sum(report["splits"][name]["images"] for name in ("train", "val", "test")) == 6
    assert report["notes"] == ["Images are of 2 different shapes; a training resizes each on its own."]
    assert report["problems"] == {}


def test_intensities_of_every_pixel_where_there_are_few(tmp_path: Path) -> None:
    ramp = np.arange(200, dtype=np.uint8).reshape(10, 20)
    Picture.fromarray(np.stack([ramp, ramp // 2, ramp * 0 + 7], axis=2)).save(tmp_path / "a.png")
    report = check(tmp_path)
    assert not report["sampled"]
    assert report["channels"]["r"] == {
        "images": 1, "min": 0, "max": 199, "zeros": pytest.approx(1 / 200),
        "percentiles": {"0.5": pytest.approx(1.99), "50.0": 100, "99.5": pytest.approx(198.01)},
    }  # fmt: skip
    assert (report["channels"]["g"]["min"], report["channels"]["g"]["max"]) == (0, 99)
    assert report["notes"] == ["a.png: shows nothing in b."]


def test_intensities_of_a_sample_where_there_are_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "SAMPLE", 4 * 128)
    told = check(pictures(tmp_path))
    assert told["sampled"]
    grey = told["channels"]["grey"]
    assert (grey["min"], grey["max"]) == (10, 103)  # of all pixels
    assert grey["percentiles"]["50.0"] == 10
    assert 100 <= grey["percentiles"]["99.5"] <= 103
    assert check(tmp_path) == told  # the same sample again


def test_types_as_they_are_stored(tmp_path: Path) -> None:
    pictures(tmp_path, 2)
    Picture.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 9).save(tmp_path / "deep.tif")
    Picture.fromarray(np.arange(1024, dtype=np.uint8).reshape(16, 16, 4)).save(tmp_path / "clear.png")
    nibabel.save(nibabel.Nifti1Image(np.arange(256, dtype=np.int16).reshape(16, 16, 1), np.eye(4)), tmp_path / "n.nii")
    assert check(tmp_path)["stored"] == {
        ".png uint8": 2, ".png uint8 with alpha": 1, ".tif uint16": 1, ".nii int16": 1,
    }  # fmt: skip


def test_histograms_of_labels(tmp_path: Path) -> None:
    pictures(tmp_path, 20)
    rows = [f"{i}.png,{5 * i},{'no' if i % 4 else 'yes'},{i % 2}" for i in range(20)]
    labels = check(table(tmp_path, "image,age,ill,eye", *rows))["labels"]
    assert labels["ill"] == {"kind": "words", "images": 20, "counts": {"no": 15, "yes": 5}}
    age = labels["age"]
    assert (age["kind"], age["min"], age["median"], age["max"], age["counts"]) == ("numbers", 0, 47.5, 95, None)
    assert [part["count"] for part in age["bins"]] == [2] * 10
    assert (age["bins"][0]["from"], age["bins"][-1]["to"]) == (0, 95)
    assert labels["eye"]["counts"] == {"0": 10, "1": 10}


def test_masks_and_their_sizes(tmp_path: Path) -> None:
    pictures(tmp_path, 3)
    empty = np.zeros((16, 16), np.uint8)
    Picture.fromarray(empty).save(tmp_path / "1_mask.png")
    empty[4, 4:6] = 255
    Picture.fromarray(empty).save(tmp_path / "0_mask.png")
    masks = check(tmp_path)["masks"]
    assert (masks["with"], masks["without"], masks["empty"], masks["labels"]) == (2, 1, 1, {"255": 1})
    assert masks["sizes"]["min"] == masks["sizes"]["max"] == pytest.approx(2 / 25)  # of the 25 pixels that are bright
    assert sum(part["count"] for part in masks["sizes"]["bins"]) == 1


@pytest.fixture
def patients(tmp_path: Path) -> Path:
    """Write two patients of twelve slices of two sequences, the lowest empty, with masks."""
    for i, patient in enumerate(("ann", "bob")):
        for word in ("t1", "flair"):
            volume_(tmp_path / f"{patient}_{word}.nii.gz", level=i + (2.0 if word == "t1" else 4.0))
        volume_(tmp_path / f"{patient}_seg.nii.gz", label=True)
    return tmp_path


def test_volumes(patients: Path) -> None:
    report = check(patients)
    assert (report["images"], report["volumes"], report["patients"]) == (24, 2, 2)
    assert report["shapes"] == {"16 x 16, 12 slices": 2}
    assert report["stored"] == {".nii.gz float32": 4}
    assert {name: (told["images"], told["max"]) for name, told in report["channels"].items()} == {
        "t1": (24, 36), "flair": (24, 60),
    }  # fmt: skip
    assert report["channels"]["t1"]["zeros"] == pytest.approx(1 - 11 * 64 / (12 * 256))
    masks = report["masks"]
    assert (masks["with"], masks["empty"], masks["labels"]) == (24, 12, {"1": 2})
    assert masks["sizes"]["median"] == 1
    assert report["notes"] == ["2 of 24 slices show nothing; a training leaves them out."]
    assert report["problems"] == {}


def test_slices_of_volumes(patients: Path) -> None:
    report = check(patients, slices=(2, 4))
    assert (report["images"], report["volumes"], report["notes"]) == (4, 2, [])
    assert (report["channels"]["t1"]["min"], report["channels"]["t1"]["max"]) == (0, 3 * 4)
    assert report["masks"]["empty"] == 4
    assert report["problems"]["labels"] == [
        "ann and all others with a mask: the mask is empty; there is nothing to learn from."
    ]


# ------------------------------------------------------------------------------------------------------- what is wrong


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    pictures(tmp_path)
    (tmp_path / "torn.png").write_bytes((tmp_path / "0.png").read_bytes()[:50])
    picture(tmp_path / "grey.png", value=10)
    report = check(tmp_path)
    assert (report["images"], report["readable"]) == (6, 5)
    assert list(report["problems"]) == ["unreadable", "constant"]
    assert "torn.png: cannot be read as a picture" in report["problems"]["unreadable"][0]
    assert report["problems"]["constant"] == ["grey.png: every pixel is the same; it shows nothing."]


def test_a_volume_that_cannot_be_read_is_one_problem(patients: Path) -> None:
    (patients / "bob_flair.nii.gz").write_bytes((patients / "bob_flair.nii.gz").read_bytes()[:-20])
    report = check(patients)
    assert (report["readable"], len(report["problems"]["unreadable"])) == (12, 1)
    assert "bob_flair.nii.gz" in report["problems"]["unreadable"][0]


def test_images_of_other_channels_than_most(tmp_path: Path) -> None:
    pictures(tmp_path)
    picture(tmp_path / "colour.png", mode="RGB")
    assert problems(tmp_path) == {"channels": ["colour.png: 3 channels, the others have 1 (grey)."]}


def test_sequences_under_other_names(tmp_path: Path) -> None:
    files = [slice_(tmp_path / f"{i}.nii", level=i + 1).name for i in range(3)]
    table(tmp_path, "image,channels", *(f"{file},{name}" for file, name in zip(files, ("t1", "t2", "t1"), strict=True)))
    assert problems(tmp_path) == {"channels": ["1.nii: its channels are t2, the others have t1."]}


def test_masks_on_another_grid(patients: Path) -> None:
    volume_(patients / "bob_seg.nii.gz", depth=11, label=True)
    (told,) = problems(patients)["masks"]
    assert "bob_seg.nii.gz and bob_t1.nii.gz: 16 x 16 x 11 and 16 x 16 x 12 voxels" in told


def test_masks_of_another_shape(tmp_path: Path) -> None:
    pictures(tmp_path)
    picture(tmp_path / "0_mask.png", 255)
    picture(tmp_path / "1_mask.png", 255, side=8)
    (told,) = problems(tmp_path)["masks"]
    assert told.startswith("1_mask.png: the mask is 8 x 8, but 1.png is 16 x 16")


def test_masks_with_blurred_edges_are_worth_a_note(tmp_path: Path) -> None:
    pictures(tmp_path, 1)
    Picture.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(tmp_path / "0_mask.png")
    assert check(tmp_path)["notes"] == ["0.png: its mask has 255 labels; any above 0 counts, blurred edges too."]


def test_duplicates(tmp_path: Path) -> None:
    pictures(tmp_path)
    (tmp_path / "again.png").write_bytes((tmp_path / "1.png").read_bytes())
    Picture.open(tmp_path / "2.png").save(tmp_path / "other.tif")
    for name in ("black.png", "black_too.png"):
        picture(tmp_path / name, value=10)  # images that show nothing are no duplicates
    assert problems(tmp_path)["duplicates"] == [
        "1.png, again.png: the same image.",
        "2.png, other.tif: the same pixels in different files.",
    ]


def test_duplicates_whose_labels_differ(tmp_path: Path) -> None:
    pictures(tmp_path)
    (tmp_path / "3.png").write_bytes((tmp_path / "0.png").read_bytes())
    table(tmp_path, "image,age", *(f"{i}.png,{20 + i}" for i in range(4)))
    assert problems(tmp_path)["duplicates"] == ["0.png, 3.png: the same image, but age is 20 and 23."]


def test_one_file_for_two_channels_or_patients(patients: Path) -> None:
    (patients / "ann_flair.nii.gz").write_bytes((patients / "ann_t1.nii.gz").read_bytes())
    same = "the same bytes, in files of different channels or images."
    assert problems(patients) == {"duplicates": [f"ann_t1.nii.gz, ann_flair.nii.gz: {same}"]}
    (patients / "ann_flair.nii.gz").write_bytes((patients / "bob_flair.nii.gz").read_bytes())
    assert problems(patients) == {"duplicates": [f"ann_flair.nii.gz, bob_flair.nii.gz: {same}"]}


def test_an_image_in_two_splits(tmp_path: Path) -> None:
    for name, value in (("train/a", 90), ("train/b", 91), ("test/c", 90)):
        picture(tmp_path / f"{name}.png", value)
    assert problems(tmp_path) == {
        "splits": ["test/c.png (test), train/a.png (train): the same image in more than one split."]
    }


def test_a_patient_in_two_splits(tmp_path: Path) -> None:
    pictures(tmp_path)
    table(tmp_path, "image,group,split", "0.png,ann,train", "1.png,bob,train", "2.png,ann,test", "3.png,cyd,val")
    assert problems(tmp_path) == {"splits": ["ann: in train (0.png) and in test (2.png)."]}


def test_a_split_json_of_other_images(tmp_path: Path) -> None:
    pictures(tmp_path)
    told = {"train": ["0.png", "1.png", "gone.png"], "val": ["2.png"], "test": ["3.png"]}
    (tmp_path / SPLIT_FILE).write_text(json.dumps(told))
    report = check(tmp_path)
    assert report["problems"]["splits"] == [f"{tmp_path / SPLIT_FILE}: names gone.png, which is not there."]
    assert [report["splits"][name]["images"] for name in ("train", "val", "test")] == [2, 1, 1]
    assert report["splits"]["told_by"] == SPLIT_FILE


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"train": ["0.png"], "val": [], "test": []}', "does not say where 1.png belongs"),
        ('{"train": ["0.png", "0.png"], "val": [], "test": []}', "0.png stands in it twice"),
        ("[", "does not list train, val and test"),
        ('{"train": 1}', "does not list train, val and test"),
    ],
)
def test_a_split_json_that_training_would_refuse(tmp_path: Path, content: str, words: str) -> None:
    (pictures(tmp_path) / SPLIT_FILE).write_text(content)
    report = check(tmp_path)
    assert words in report["problems"]["splits"][-1]
    assert report["splits"]["told_by"] == "names"


def test_missing_odd_and_constant_labels(tmp_path: Path) -> None:
    pictures(tmp_path)
    rows = ("0.png,20,left,yes", "1.png,30,left,no", "2.png,,left,no", "3.png,old,left,yes")
    assert problems(table(tmp_path, "image,age,eye,ill", *rows)) == {
        "labels": [
            "2.png: has no age.",
            "3.png: age is old, and no number.",
            "0.png and all others with a value: eye is left; there is nothing to learn from.",
        ]
    }


def test_images_that_have_no_place_in_the_layout(tmp_path: Path) -> None:
    pictures(tmp_path)
    for name in ("0_mask", "lone_mask"):
        picture(tmp_path / f"{name}.png", 255)
    assert problems(tmp_path) == {"left out": ["lone_mask.png: belongs to no image"]}


def test_hostile_names_and_what_is_no_file(tmp_path: Path) -> None:
    pictures(tmp_path)
    picture(tmp_path / os.fsdecode(b"\xff[red]\n.png"), value=200)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    told = check(tmp_path)["problems"]
    assert told.keys() == {"unreadable"}
    assert [sentence.split("/")[-1] for sentence in told["unreadable"]] == [
        "gone.png: no such file; check the name.",
        "pipe.png: no regular file; give an image file.",
    ]


def test_names_that_differ_in_capitals(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 90)
    picture(tmp_path / "A.PNG", 91)
    assert problems(tmp_path) == {
        "names": ["A.PNG, a.png: differ in capital letters alone; macOS and Windows take them for one file."]
    }


def test_images_that_knife_made(tmp_path: Path) -> None:
    pictures(tmp_path)
    write(read(tmp_path / "0.png"), tmp_path / "made.tif")
    (tmp_path / "0.png").unlink()
    assert problems(tmp_path) == {"synthetic": ["made.tif: marked as made by knife; train on images of your own."]}


# --------------------------------------------------------------------------------------------------------- the command


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run the command line in this process; return its exit code."""
    monkeypatch.setattr(signal, "signal", lambda number, handler: signal.getsignal(number))
    monkeypatch.setattr(sys, "argv", ["knife", "data", "check", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def test_the_command_on_a_good_folder(
    patients: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, patients, "--slices", "6:12") == 0
    said = capsys.readouterr()
    for words in (
        "sequences (files named t1, flair; 2 patients; 2 volumes, slices 6:12)",
        "12, slices of 2 volumes",
        "4 of .nii.gz float32",
        "12, 0 of them empty; values above 0: 2 of 1",
        "relative size of the mask",
        "No problems found.",
    ):
        assert words in said.out
    assert "checked 2/2" in said.err


def test_the_command_on_a_bad_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures(tmp_path)
    for i in range(12):
        (tmp_path / f"torn{i:02d}.png").write_text("no picture")
    assert command(monkeypatch, tmp_path) == 1
    out = capsys.readouterr().out
    assert "16; 12 cannot be read" in out
    lines = out.splitlines()
    first = lines.index("Problem, unreadable (12):") + 1
    assert [line.split("/")[-1].split(":")[0] for line in lines[first : first + 10]] == [
        f"torn{i:02d}.png" for i in range(10)
    ]
    assert lines[first + 10] == "  and 2 more; --json has them all."
    assert command(monkeypatch, tmp_path, "--json") == 1
    assert len(json.loads(capsys.readouterr().out)["problems"]["unreadable"]) == 12
    assert command(monkeypatch, tmp_path, "--layout", "bids") == 2
