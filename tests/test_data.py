"""Every layout is recognised for what it is, patients stay whole, and what is odd is said, not swallowed."""

import os
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image as Picture

from knife import data
from knife.data import Entry, Folder, case_of, channels_of, fingerprint, inventory, load, open_folder, split_of
from knife.errors import InputError

SIZE, RANGE = (16, 16), (-1.0, 1.0)


def picture(path: Path, value: int = 200, mode: str = "L", side: int = 16) -> Path:
    """Write a dark picture with a bright square."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((side, side), 10, np.uint8)
    pixels[4:9, 4:9] = value
    Picture.fromarray(pixels).convert(mode).save(path)
    return path


def slice_(path: Path, level: float = 1.0, label: bool = False) -> Path:
    """Write a NIfTI slice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).random((16, 16, 1), np.float32) * level
    if label:
        pixels = (pixels > 0.9).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(pixels, np.eye(4)), path)
    return path


def table(root: Path, *lines: str) -> Path:
    """Write a manifest."""
    (root / "manifest.csv").write_text("\n".join(lines) + "\n")
    return root


def names(entries: list[Entry]) -> list[str]:
    return [entry.name for entry in entries]


# ------------------------------------------------------------------------------------------------------------- layouts


def test_manifest(tmp_path: Path) -> None:
    for name in ("a", "b"):
        picture(tmp_path / "x" / f"{name}.png")
    picture(tmp_path / "m.png", 255)
    picture(tmp_path / "not_listed.png")
    table(tmp_path, "image,mask,age,group,split", "x/b.png,m.png,31,p1,training", "x/a.png,,,p2,VAL")
    folder = open_folder(tmp_path)
    assert folder.layout == "manifest"
    assert "age" in folder.why
    a, b = folder.entries
    assert (a.name, a.mask, a.values, a.group, a.split) == ("x/a.png", None, {}, "p2", "val")
    assert (b.mask, b.values, b.split) == (tmp_path / "m.png", {"age": "31"}, "train")
    assert names(folder.split("train")) == ["x/b.png"]


def test_manifest_of_several_files_an_image(tmp_path: Path) -> None:
    for sequence in ("t2", "t1"):
        slice_(tmp_path / f"p_{sequence}.nii.gz")
    table(tmp_path, "image,channels", "p_t1.nii.gz;p_t2.nii.gz,one;two")
    (entry,) = open_folder(tmp_path).entries
    assert len(entry.files) == 2
    assert channels_of([entry]) == ("one", "two")
    assert case_of(entry, SIZE, RANGE, ("one", "two")).pixels.shape == (2, 16, 16)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["image,age", "gone1.png,1", "gone2.png,2", "a.png,3"], "2 of 3 files are not there (gone1.png, gone2.png)"),
        (["image", *[f"gone{i}.png" for i in range(9)]], "(gone0.png, gone1.png, gone2.png, ...)"),
        (["image,mask", "a.png,gone.png"], "gone.png"),
        (["picture,age", "a.png,1"], "no column named image (found: picture, age)"),
        (["image,age"], "has no rows"),
        (["image,age", "a.png,1,2"], "line 2"),
        (["image,age", "a.png,1", "", ",2"], "line 4"),
        (["image,split", "a.png,practice"], "'practice'"),
        (["image", "../a.png"], "outside"),
        (["image", "/etc/hostname"], "outside"),
        (["image,mask", "a.png,../../b.png"], "outside"),
    ],
)
def test_a_wrong_manifest_is_refused_by_what_is_wrong(tmp_path: Path, lines: list[str], said: str) -> None:
    root = tmp_path / "data"
    picture(root / "a.png")
    picture(tmp_path / "a.png")
    with pytest.raises(InputError, match=r"manifest\.csv") as refusal:
        open_folder(table(root, *lines))
    assert said in str(refusal.value)


def test_a_manifest_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.csv").write_bytes(b"image\n\xff\xfe\x80.png\n")
    with pytest.raises(InputError, match=r"manifest\.csv: cannot be read as a table"):
        open_folder(tmp_path)


@pytest.mark.parametrize("ending", ["nii", "nii.gz"])
def test_sequences_as_the_paper_has_them(tmp_path: Path, ending: str) -> None:
    """Two slices of one patient, each in a folder of its own."""
    for number in ("080", "081"):
        for sequence in ("t1", "t1ce", "t2", "flair", "seg"):
            name = f"brats_train_001_{sequence}_{number}_w.{ending}"
            slice_(tmp_path / "training" / f"0000{number}" / name, label=sequence == "seg")
    folder = open_folder(tmp_path)
    assert folder.layout == "sequences"
    assert folder.why == "files named t1, t1ce, t2, flair; 1 patients"
    assert [entry.group for entry in folder.entries] == ["brats_train_001"] * 2
    first = folder.entries[0]
    assert [data.sequence_of(file).name for file in first.files] == ["t1", "t1ce", "t2", "flair"]
    assert first.mask is not None
    assert first.mask.name == f"brats_train_001_seg_080_w.{ending}"
    assert channels_of(folder.entries) == ("t1", "t1ce", "t2", "flair")
    case = case_of(first, SIZE, RANGE, ("t1", "t1ce", "t2", "flair"))
    assert case.pixels.shape == (4, 16, 16)
    assert case.mask is not None
    assert set(case.mask.unique().tolist()) == {0.0, 1.0}


def test_sequences_of_other_spelling_and_number(tmp_path: Path) -> None:
    """BraTS 2023 spells otherwise; a case that lacks what most have, and a stray file, are named."""
    for patient in ("00001", "00002", "00003"):
        for sequence in ("t1n", "t2f", "seg"):
            slice_(tmp_path / f"BraTS-GLI-{patient}" / f"BraTS-GLI-{patient}-{sequence}.nii.gz")
    (tmp_path / "BraTS-GLI-00003" / "BraTS-GLI-00003-t2f.nii.gz").unlink()
    slice_(tmp_path / "mean.nii.gz")
    folder = open_folder(tmp_path)
    assert channels_of(folder.entries) == ("t1", "flair")
    assert [entry.group for entry in folder.entries] == ["BraTS-GLI-00001", "BraTS-GLI-00002"]
    assert sorted(folder.skipped.values()) == [
        "BraTS-GLI-00003/BraTS-GLI-00003: lacks flair",
        "mean.nii.gz: its name tells no sequence",
    ]


def test_slices_with_the_number_first_belong_to_their_folder(tmp_path: Path) -> None:
    for patient in ("p1", "p2"):
        for number in range(3):
            for sequence in ("t1", "t2"):
                slice_(tmp_path / patient / f"{patient}_{number}_{sequence}.nii")
    assert {entry.group for entry in open_folder(tmp_path).entries} == {"p1", "p2"}


def test_utkface(tmp_path: Path) -> None:
    for name in ("26_0_2_20170104.jpg.chip.jpg", "8_1_0_20170105.JPG", "110_1_4_2016.jpg", "61_3_20170109.jpg"):
        picture(tmp_path / name)
    folder = open_folder(tmp_path)
    assert folder.layout == "utkface"
    first = folder.entries[1]
    assert first.values == {"gender": "male", "age": "26", "race": "2"}
    assert next(iter(first.values)) == "gender"  # so that a classifier takes it, and not the ages
    assert list(folder.skipped.values()) == ["61_3_20170109.jpg: its name is not age_gender_race_stamp"]


def test_masks_beside_images_in_folders_of_patients(tmp_path: Path) -> None:
    for patient in ("TCGA_1", "TCGA_2"):
        for number in range(2):
            picture(tmp_path / patient / f"{patient}.v1_{number}.png")
            picture(tmp_path / patient / f"{patient}.v1_{number}_mask.png", 255)
    picture(tmp_path / "TCGA_2" / "lone_mask.png")
    picture(tmp_path / "TCGA_2" / "unmasked.png")
    folder = open_folder(tmp_path)
    assert folder.layout == "masked"
    assert folder.why == "x_mask beside x; 2 folders as patients"
    by_name = {entry.name: entry for entry in folder.entries}
    assert len(by_name) == 5
    assert by_name["TCGA_1/TCGA_1.v1_1.png"].mask == tmp_path / "TCGA_1/TCGA_1.v1_1_mask.png"
    assert by_name["TCGA_1/TCGA_1.v1_1.png"].group == "TCGA_1"
    assert by_name["TCGA_2/unmasked.png"].mask is None
    assert list(folder.skipped) == ["TCGA_2/lone_mask.png"]


@pytest.mark.parametrize("mask", ["b_mask.png", "b.png", "b_seg.png"])
def test_images_beside_masks(tmp_path: Path, mask: str) -> None:
    for name in ("a.png", "b.jpg"):
        picture(tmp_path / "images" / name)
    picture(tmp_path / "masks" / mask)
    picture(tmp_path / "preview.png")
    folder = open_folder(tmp_path)
    assert folder.layout == "masked"
    assert [(e.name, e.mask, e.group) for e in folder.entries] == [
        ("images/a.png", None, ""),
        ("images/b.jpg", tmp_path / "masks" / mask, ""),
    ]
    assert list(folder.skipped) == ["preview.png"]


def test_images_beside_masks_in_folders_of_splits(tmp_path: Path) -> None:
    for split in ("train", "val"):
        picture(tmp_path / "images" / split / "a.png")
        picture(tmp_path / "masks" / split / "a.png")
    folder = open_folder(tmp_path)
    assert names(folder.split("val")) == ["images/val/a.png"]
    assert folder.entries[0].mask == tmp_path / "masks/train/a.png"


def test_one_folder_a_class(tmp_path: Path) -> None:
    for name in ("cat/1.png", "cat/2.png", "dog/1.png"):
        picture(tmp_path / name)
    folder = open_folder(tmp_path)
    assert folder.layout == "folders"
    assert [entry.values for entry in folder.entries] == [{"class": "cat"}, {"class": "cat"}, {"class": "dog"}]


def test_folders_named_by_numbers_are_ages_in_train_and_test(tmp_path: Path) -> None:
    for name in ("train/001/a.png", "train/042/b.png", "test/042/a.png", "test/100/c.png"):
        picture(tmp_path / name)
    folder = open_folder(tmp_path)
    assert folder.layout == "folders"
    assert "train/" in folder.why
    assert [(e.name, e.values, e.split) for e in folder.entries] == [
        ("test/042/a.png", {"age": "042"}, "test"),
        ("test/100/c.png", {"age": "100"}, "test"),
        ("train/001/a.png", {"age": "001"}, "train"),
        ("train/042/b.png", {"age": "042"}, "train"),
    ]


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    for name in ("train/1.png", "plane/1.png"):
        picture(tmp_path / name)
    assert {entry.values["class"] for entry in open_folder(tmp_path).entries} == {"train", "plane"}


def test_flat(tmp_path: Path) -> None:
    for name in ("a.png", "B.PNG", "c.Jpeg", "deep/er/d.tif"):
        picture(tmp_path / name)
    slice_(tmp_path / "e.NII.GZ".lower())
    (tmp_path / "notes.txt").write_text("no image")
    folder = open_folder(tmp_path)
    assert folder.layout == "flat"
    assert names(folder.entries) == ["B.PNG", "a.png", "c.Jpeg", "deep/er/d.tif", "e.nii.gz"]
    assert folder.why


def test_the_missing_and_the_empty_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        open_folder(tmp_path / "gone")
    with pytest.raises(InputError, match="no such folder"):
        open_folder(picture(tmp_path / "a" / "a.png"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no images"):
        open_folder(tmp_path / "empty")


# -------------------------------------------------------------------------------------------------------- odd trees


def test_hidden_files_and_folders_named_like_images_are_left_out(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "._b.png")
    picture(tmp_path / ".cache" / "c.png")
    (tmp_path / "folder.png").mkdir()
    assert names(open_folder(tmp_path).entries) == ["a.png"]


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    picture(tmp_path / "elsewhere" / "a.png")
    root = tmp_path / "data"
    root.mkdir()
    (root / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "elsewhere" / "back").symlink_to(root, target_is_directory=True)
    (root / "self").symlink_to(root, target_is_directory=True)
    (root / "dangling.png").symlink_to(tmp_path / "gone.png")
    folder = open_folder(root)
    assert names(folder.entries) == ["dangling.png", "linked/a.png"]
    loaded = load(folder.entries, SIZE, RANGE, ("grey",))
    assert list(loaded.skipped) == ["dangling.png"]
    assert len(fingerprint(folder.entries)) == 16
    assert len(inventory(folder.entries)) == 2


def test_a_fifo_does_not_hang(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.png")
    entries = open_folder(tmp_path).entries
    assert "no regular file" in load(entries, SIZE, RANGE, ("grey",)).skipped["b.png"]
    assert len(inventory(entries)) == 2


def test_names_that_are_no_text(tmp_path: Path) -> None:
    odd = os.fsdecode(b"\xff\xfe.png")
    picture(tmp_path / "a.png").rename(tmp_path / odd)
    folder = open_folder(tmp_path)
    assert len(folder.split("train")) == 1
    assert len(fingerprint(folder.entries)) == 16


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_that_cannot_be_listed_is_refused(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "shut").mkdir(mode=0)
    with pytest.raises(InputError, match="shut"):
        open_folder(tmp_path)


def test_an_error_of_listing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"x: cannot be listed \(Permission denied\)"):
        data.refuse_folder(PermissionError(13, "Permission denied", str(tmp_path / "x")))


# -------------------------------------------------------------------------------------------------------------- splits


def test_no_patient_falls_into_two_splits() -> None:
    entries = [Entry(f"p{i % 100}/{i}.png", (), group=f"p{i % 100}") for i in range(1000)]
    folder = Folder(Path(), "flat", entries)
    splits = {name: {entry.group for entry in folder.split(name)} for name in ("train", "val", "test")}
    assert sum(map(len, splits.values())) == 100
    assert not (splits["train"] & splits["val"] | splits["train"] & splits["test"] | splits["val"] & splits["test"])
    assert sum(len(folder.split(name)) for name in splits) == 1000


def test_splits_are_fair_and_depend_on_the_name_alone() -> None:
    found = [split_of(f"patient {i}") for i in range(4000)]
    assert found.count("train") / 4000 == pytest.approx(0.9, abs=0.02)
    assert found.count("val") / 4000 == pytest.approx(0.05, abs=0.02)
    assert [split_of(patient) for patient in ("p0", "p30", "p1")] == ["train", "val", "test"]  # as it ever was


def test_few_patients_are_all_trained_on() -> None:
    unlucky = next(name for name in map(str, range(1000)) if split_of(name) == "test")
    folder = Folder(Path(), "flat", [Entry("a", (), group=unlucky), Entry("b", (), split="val")])
    assert names(folder.split("train")) == ["a"]
    assert names(folder.split("val")) == ["b"]


# ------------------------------------------------------------------------------------------------------------- loading


def test_what_cannot_be_used_is_skipped_with_its_reason(tmp_path: Path) -> None:
    for i in range(4):
        picture(tmp_path / f"good{i}.png")
    picture(tmp_path / "colour.png", mode="RGB")
    picture(tmp_path / "constant.png", value=10)
    (tmp_path / "torn.png").write_bytes((tmp_path / "good0.png").read_bytes()[:50])
    (tmp_path / "text.jpg").write_text("no picture at all")
    entries = open_folder(tmp_path).entries
    loaded = load(entries, SIZE, RANGE, channels_of(entries))
    assert [case.name for case in loaded.cases] == [f"good{i}.png" for i in range(4)]
    assert set(loaded.skipped) == {"colour.png", "constant.png", "torn.png", "text.jpg"}
    assert loaded.skipped["colour.png"] == "colour.png: 3 channels, the others have 1 (grey)."
    assert "constant" in loaded.skipped["constant.png"]


def test_most_of_the_images_decide_on_the_channels(tmp_path: Path) -> None:
    picture(tmp_path / "a_first.png", mode="L")
    for i in range(30):
        picture(tmp_path / f"b{i:02d}.png", mode="RGB")
    assert channels_of(open_folder(tmp_path).entries) == ("r", "g", "b")


def test_sequences_are_not_mixed_up(tmp_path: Path) -> None:
    entry = Entry("a", (slice_(tmp_path / "a_t2.nii"),))
    assert case_of(entry, SIZE, RANGE, ("0",)).pixels.shape == (1, 16, 16)
    with pytest.raises(InputError, match=r"its channels are t2, the others have t1\."):
        case_of(entry, SIZE, RANGE, ("t1",))


def test_channel_names_must_be_as_many_as_channels(tmp_path: Path) -> None:
    entry = Entry("a.png", (picture(tmp_path / "a.png"),), channels=("t1", "t2"))
    with pytest.raises(InputError, match=r"2 channels are named \(t1, t2\), the image has 1"):
        channels_of([entry])


def test_no_readable_image_is_refused_with_a_reason(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(InputError, match=r"no image could be read; the last reason was: .*a\.png"):
        channels_of(open_folder(tmp_path).entries)


def test_a_mask_is_brought_onto_the_grid_of_its_image(tmp_path: Path) -> None:
    entry = Entry("a", (picture(tmp_path / "a.png", side=32),), picture(tmp_path / "m.png", 255, side=32))
    Picture.fromarray(np.kron(np.eye(2, dtype=np.uint8), np.full((16, 16), 255, np.uint8))).save(tmp_path / "m.png")
    case = case_of(entry, SIZE, RANGE, ("grey",))
    assert case.mask is not None
    assert torch.equal(case.mask, torch.eye(2).kron(torch.ones(8, 8))[None])
    picture(tmp_path / "m.png", 255, side=16)
    assert "mask is 16 x 16" in load([entry], SIZE, RANGE, ("grey",)).skipped["a"]


def test_the_same_name_twice_is_two_entries(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    table(tmp_path, "image,age", "a.png,1", "a.png,2")
    entries = open_folder(tmp_path).entries
    assert [case.values["age"] for case in load(entries, SIZE, RANGE, ("grey",)).cases] == ["1", "2"]


def test_progress_is_told_sparsely_to_the_end(tmp_path: Path) -> None:
    entries = [Entry(str(i), (tmp_path / "gone.png",)) for i in range(950)]
    heard: list[int] = []
    assert len(load(entries, SIZE, RANGE, ("grey",), heard.append).skipped) == 950
    assert heard == sorted(set(heard))
    assert heard[-1] == 950
    assert 50 <= len(heard) <= 110


def test_more_images_than_memory_are_refused_before_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [Entry("a", (tmp_path / "gone.png",), mask=tmp_path / "gone.png")] * 1024
    need = 1024 * (4 + 1) * 256 * 256 * 4
    monkeypatch.setattr(data, "available_memory", lambda: int(need / 0.79))
    assert len(load(entries, (256, 256), RANGE, ("t1", "t1ce", "t2", "flair")).skipped) == 1
    monkeypatch.setattr(data, "available_memory", lambda: int(need / 0.81))
    with pytest.raises(InputError, match=r"1024 images of 4 x 256 x 256 pixels need 1\.2 GiB of memory, and 1\.5 GiB"):
        load(entries, (256, 256), RANGE, ("t1", "t1ce", "t2", "flair"))


def test_free_memory_is_known_here() -> None:
    free = data.available_memory()
    assert free is None or free > 2**20


# --------------------------------------------------------------------------------------------------------- fingerprint


def test_fingerprints_tell_changed_data(tmp_path: Path) -> None:
    for i in range(3):
        picture(tmp_path / f"{i}.png", 100 + i)
        picture(tmp_path / f"{i}_mask.png", 255)

    def both() -> tuple[str, dict[str, str]]:
        entries = open_folder(tmp_path).entries
        return fingerprint(entries), inventory(entries)

    before = both()
    assert both() == before
    same_size = bytearray((tmp_path / "1.png").read_bytes())
    same_size[-20] ^= 1
    (tmp_path / "1.png").write_bytes(same_size)
    after = both()
    assert after[0] == before[0]
    assert sum(after[1][name] != before[1][name] for name in before[1]) == 1
    picture(tmp_path / "1.png", 101)
    assert both() == before
    picture(tmp_path / "2_mask.png", 255, side=32)
    assert both()[0] != before[0]
    assert both()[1] != before[1]
    picture(tmp_path / "2_mask.png", 255)
    (tmp_path / "0.png").unlink()
    assert both()[1].keys() < before[1].keys()
    assert both()[0] != before[0]


def test_fingerprints_tell_changed_values(tmp_path: Path) -> None:
    entry = Entry("a", (picture(tmp_path / "a.png"),), values={"age": "1"})
    other = Entry("a", entry.files, values={"age": "2"})
    assert fingerprint([entry]) != fingerprint([other])
    assert inventory([entry]) != inventory([other])


def test_fingerprints_do_not_depend_on_where_the_folder_lies(tmp_path: Path) -> None:
    folders = [open_folder(picture(tmp_path / name / "a.png").parent) for name in ("one", "two")]
    assert fingerprint(folders[0].entries) == fingerprint(folders[1].entries)
    assert inventory(folders[0].entries) == inventory(folders[1].entries)
