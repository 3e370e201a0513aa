"""Every layout is recognised for what it is, patients stay whole, and what is odd is said, not swallowed."""

import json
import os
from pathlib import Path

import pytest
from trees import names, picture, slice_, table, volume_

from knife import layouts
from knife.cli.words import slice_range
from knife.data import Form, case_of, channels_of, fingerprint, inventory, load
from knife.errors import InputError, SettingsError
from knife.image import sequence_of
from knife.layouts import LAYOUTS, all_layouts, open_folder

SIZE, RANGE = (16, 16), (-1.0, 1.0)
SERIES = ("t1", "t1ce", "t2", "flair", "seg")


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


def test_manifest_in_other_formats(tmp_path: Path) -> None:
    for name in ("a", "b"):
        slice_(tmp_path / f"{name}_t1.nii")
        slice_(tmp_path / f"{name}_t2.nii")
    rows = [{"image": ["a_t1.nii", "a_t2.nii"], "age": 31, "group": None}, {"image": "b_t1.nii", "split": "test"}]
    (tmp_path / "manifest.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    a, b = open_folder(tmp_path).entries
    assert ([file.name for file in a.files], a.values, a.group) == (["a_t1.nii", "a_t2.nii"], {"age": "31"}, "")
    assert (b.split, b.values) == ("test", {})
    (tmp_path / "manifest.jsonl").unlink()
    (tmp_path / "manifest.tsv").write_text("image\tname\na_t1.nii\tSmith, Ann\n")
    folder = open_folder(tmp_path)
    assert (folder.layout, folder.why) == ("manifest", "manifest.tsv with name")
    assert folder.entries[0].values == {"name": "Smith, Ann"}
    (tmp_path / "manifest.csv").write_text("image\na_t1.nii\n")
    with pytest.raises(InputError, match=r"manifest.csv: manifest.tsv lies beside it"):
        open_folder(tmp_path)


@pytest.mark.parametrize("line", ["[1]", '{"image": {"a": 1}}', "{", "[" * 100_000])
def test_lines_that_are_no_rows_are_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "manifest.jsonl").write_text(line)
    with pytest.raises(InputError, match=r"manifest.jsonl: cannot be read as a table .*save it as JSONL"):
        open_folder(tmp_path)


def test_manifest_of_several_files_an_image(tmp_path: Path) -> None:
    for sequence in ("t2", "t1"):
        slice_(tmp_path / f"p_{sequence}.nii.gz")
    table(tmp_path, "image,channels", "p_t1.nii.gz;p_t2.nii.gz,one;two")
    (entry,) = open_folder(tmp_path).entries
    assert len(entry.files) == 2
    assert channels_of([entry]) == ("one", "two")
    assert case_of(entry, Form(("one", "two"), SIZE, RANGE)).pixels.shape == (2, 16, 16)


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
    with pytest.raises(InputError, match=r"manifest\.csv: cannot be read \(.*UTF-8"):
        open_folder(tmp_path)


@pytest.mark.parametrize("ending", ["nii", "nii.gz"])
def test_sequences_as_the_paper_has_them(tmp_path: Path, ending: str) -> None:
    """Two slices of one patient, each in a folder of its own."""
    for number in ("080", "081"):
        for sequence in ("t1", "t1ce", "t2", "flair", "seg"):
            name = f"brats_train_001_{sequence}_{number}_w.{ending}"
            slice_(tmp_path / "training" / f"0000{number}" / name, label=sequence == "seg")
    folder = open_folder(tmp_path)
    assert folder.layout == "brats-slices"
    assert folder.why == "slices of BraTS: files named t1, t1ce, t2, flair; 1 patient"
    assert [entry.group for entry in folder.entries] == ["brats_train_001"] * 2
    first = folder.entries[0]
    assert [sequence_of(file).name for file in first.files] == ["t1", "t1ce", "t2", "flair"]
    assert first.mask is not None
    assert first.mask.name == f"brats_train_001_seg_080_w.{ending}"
    assert channels_of(folder.entries) == ("t1", "t1ce", "t2", "flair")
    case = case_of(first, Form(("t1", "t1ce", "t2", "flair"), SIZE, RANGE))
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
    assert folder.layout == "brats2023"
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


def case_of_names(folder: Path, pattern: str, words: tuple[str, ...] = SERIES) -> None:
    """Write a slice for each sequence of a case."""
    for word in words:
        slice_(folder / pattern.format(word), label=word == "seg")


def test_sequences_of_no_published_set(tmp_path: Path) -> None:
    for patient in ("anna", "bert"):
        case_of_names(tmp_path / patient, f"{patient}_{{}}.nii")
    folder = open_folder(tmp_path)
    assert folder.layout == "sequences"
    assert [(e.group, e.mask is not None) for e in folder.entries] == [("anna", True), ("bert", True)]


def patients_in(*patterns: str) -> set[tuple[str, str]]:
    """Return the name of each case of sequences and its patient; {p} stands for three of them, {v} for two visits."""
    root = Path("/data")
    names_ = {x.format(p=p, v=v, s=s) for x in patterns for p in "123" for v in "12" for s in ("t1", "flair", "seg")}
    found = layouts.sequences(root, [root / f"{name}.nii.gz" for name in sorted(names_)])
    assert isinstance(found, layouts.Found)
    assert not found.skipped
    return {(entry.name, entry.group) for entry in found.entries}


@pytest.mark.parametrize(
    ("pattern", "patients"),
    [
        ("p{p}/visit{v}_{s}", {"p1", "p2", "p3"}),
        ("p{p}/brain_{s}", {"p1", "p2", "p3"}),
        ("p{p}/scan_{v}_{s}", {"p1", "p2", "p3"}),
        ("p{p}/{s}", {"p1", "p2", "p3"}),
        ("p{p}/{s}_08{v}", {"p1", "p2", "p3"}),
        ("p{p}/v{v}/{s}", {"p1", "p2", "p3"}),
        ("p{p}/202{p}-0{v}/x_{s}", {"p1", "p2", "p3"}),
        ("p{p}/202{p}-0{v}/202{p}-0{v}_{s}", {"p1", "p2", "p3"}),
        ("p{p}/ses-{v}/p{p}_ses-{v}_{s}", {"p1", "p2", "p3"}),
        ("data/p{p}/scan{v}/{s}", {"p1", "p2", "p3"}),
        ("train/p{p}/visit{v}/{s}", {"p1", "p2", "p3"}),
        ("visit{v}/p{p}_{s}", {"p1", "p2", "p3"}),
        ("visit{v}/p{p}/{s}", {"p1", "p2", "p3"}),
        ("one/v{v}/{s}", {"one"}),
        ("{s}_00{p}", {"001", "002", "003"}),
        ("p{p}_{s}", {"p1", "p2", "p3"}),
        ("p{p}_visit{v}_{s}", {"p1", "p2", "p3"}),
        ("sub-{p}_ses-{v}_{s}", {"sub-1", "sub-2", "sub-3"}),
        ("scan_{p}_{s}", {"scan_1", "scan_2", "scan_3"}),
        ("visit{p}/{s}", {"visit1", "visit2", "visit3"}),
        ("p{p}_{s}_08{v}", {"p1", "p2", "p3"}),
        ("training/00{p}{v}/mine_{p}_{s}_08{v}_w", {"mine_1", "mine_2", "mine_3"}),
        ("HGG/x{p}/x{p}_{s}", {"x1", "x2", "x3"}),
        ("folder{p}/x{v}{p}_{s}", {"folder1", "folder2", "folder3"}),
    ],
)
def test_patients_of_sequences_stay_whole(pattern: str, patients: set[str]) -> None:
    """A case whose name tells a person must be his, and every person's cases are one group."""
    told = patients_in(pattern)
    assert {group for _, group in told} == patients
    assert all(group[-1] in name for name, group in told)


def test_cases_beside_folders_of_patients_are_told_by_name() -> None:
    assert {group for _, group in patients_in("p{p}/brain_{s}", "anna_{s}")} == {"p1", "p2", "p3", "anna"}


def test_visits_of_a_patient_are_in_one_split(tmp_path: Path) -> None:
    for patient in range(30):
        for visit in (1, 2):
            case_of_names(tmp_path / f"p{patient:02}", f"visit{visit}_{{}}.nii", ("t1", "seg"))
    folder = open_folder(tmp_path)
    assert folder.why == "files named t1; 30 patients"
    places = [{entry.name[:3] for entry in folder.split(split)} for split in ("train", "val", "test")]
    assert all(places)
    assert sum(map(len, places)) == 30


def test_brats_2018_to_2020_and_the_odd_mask(tmp_path: Path) -> None:
    case_of_names(tmp_path / "HGG" / "Brats18_TCIA02_117_1", "Brats18_TCIA02_117_1_{}.nii.gz")
    case_of_names(tmp_path / "BraTS20_Training_354", "BraTS20_Training_354_{}.nii")
    case_of_names(tmp_path / "BraTS20_Training_355", "BraTS20_Training_355_{}.nii", SERIES[:4])
    odd = slice_(tmp_path / "BraTS20_Training_355" / "W39_1998.09.19_Segm.nii", label=True)
    folder = open_folder(tmp_path)
    assert (folder.layout, folder.skipped) == ("brats2020", {})
    assert [e.group for e in folder.entries] == ["BraTS20_Training_354", "BraTS20_Training_355", "Brats18_TCIA02_117_1"]
    assert folder.entries[1].mask == odd
    assert all(entry.mask for entry in folder.entries)
    assert folder.entries[0].channels == SERIES[:4]


def test_brats_2021_and_a_stranger_in_it(tmp_path: Path) -> None:
    for number in ("00000", "00002"):
        case_of_names(tmp_path / f"BraTS2021_{number}", f"BraTS2021_{number}_{{}}.nii.gz")
    case_of_names(tmp_path / "mine", "mine_{}.nii.gz", ("t1", "t2"))
    folder = open_folder(tmp_path)
    assert folder.layout == "brats2021"
    assert [entry.group for entry in folder.entries] == ["BraTS2021_00000", "BraTS2021_00002"]
    assert folder.skipped["mine/mine_t1.nii.gz"] == "mine/mine_t1.nii.gz: its name is not one of BraTS 2021"


def test_brats_2023_keeps_both_visits_of_a_patient_together(tmp_path: Path) -> None:
    for case in ("BraTS-GLI-00005-000", "BraTS-GLI-00005-001", "BraTS-MEN-00007-000"):
        case_of_names(tmp_path / case, f"{case}-{{}}.nii.gz", ("t1n", "t1c", "t2w", "t2f", "seg"))
    folder = open_folder(tmp_path)
    assert folder.layout == "brats2023"
    assert [entry.group for entry in folder.entries] == ["BraTS-GLI-00005", "BraTS-GLI-00005", "BraTS-MEN-00007"]
    assert [sequence_of(file).name for file in folder.entries[0].files] == list(SERIES[:4])


def nnunet_tree(root: Path, channels: dict[str, str] | list[str], key: str = "channel_names") -> None:
    """Write two training cases of two channels, one of them with a mask, and a test case."""
    for case in ("imagesTr/a", "imagesTr/b", "imagesTs/c"):
        for number in range(2):
            slice_(root / f"{case}_000{number}.nii.gz", level=number + 1)
    slice_(root / "labelsTr" / "a.nii.gz", label=True)
    (root / "dataset.json").write_text(json.dumps({key: channels, "file_ending": ".nii.gz"}))


@pytest.mark.parametrize("key", ["channel_names", "modality"])
def test_nnunet_maps_channels_by_name(tmp_path: Path, key: str) -> None:
    nnunet_tree(tmp_path, {"0": "FLAIR", "1": "T1Gd"}, key)
    slice_(tmp_path / "imagesTr" / "d_0000.nii.gz")
    folder = open_folder(tmp_path)
    assert (folder.layout, folder.why) == ("nnunet", "dataset.json with the channels t1ce, flair; no patients known")
    assert [(e.name, e.split, e.mask is not None) for e in folder.entries] == [
        ("imagesTr/a", "", True),
        ("imagesTr/b", "", False),
        ("imagesTs/c", "test", False),
    ]
    assert folder.entries[0].channels == ("t1ce", "flair")
    assert [file.name for file in folder.entries[0].files] == ["a_0001.nii.gz", "a_0000.nii.gz"]
    assert folder.skipped == {"imagesTr/d": "imagesTr/d: lacks t1ce"}


def test_nnunet_of_one_file_a_case(tmp_path: Path) -> None:
    slice_(tmp_path / "imagesTr" / "a.nii.gz")
    (tmp_path / "dataset.json").write_text('{"modality": {"0": "CT"}}')
    folder = open_folder(tmp_path)
    assert (folder.layout, folder.entries[0].channels) == ("nnunet", ("ct",))


@pytest.mark.parametrize(
    ("cases", "patients", "known"),
    [
        (("BraTS-GLI-00001-000", "BraTS-GLI-00001-001", "BraTS-GLI-00002-000"), 2, "2 patients"),
        (("patient001_frame01", "patient001_frame12", "patient002_frame01"), 2, "2 patients"),
        (("sub-01_ses-01", "sub-01_ses-02"), 1, "1 patient"),
        (("BraTS2021_00000_080", "BraTS2021_00000_081"), 1, "1 patient"),
        (("BraTS20_Training_001_080", "BraTS20_Training_001_081"), 1, "1 patient"),
        (("BRATS_001", "BRATS_002"), 0, "no patients known"),
    ],
)
def test_nnunet_tells_patients_by_published_names(
    tmp_path: Path, cases: tuple[str, ...], patients: int, known: str
) -> None:
    for case in cases:
        slice_(tmp_path / "imagesTr" / f"{case}_0000.nii.gz")
    (tmp_path / "dataset.json").write_text('{"channel_names": {"0": "T1"}}')
    folder = open_folder(tmp_path)
    assert len({entry.group for entry in folder.entries} - {""}) == patients
    assert folder.why == f"dataset.json with the channels t1; {known}"


def test_nnunet_of_one_picture_of_all_channels_a_case(tmp_path: Path) -> None:
    for case in ("a", "b"):
        picture(tmp_path / "imagesTr" / f"{case}_0000.png", mode="RGB")
        picture(tmp_path / "labelsTr" / f"{case}.png", 1)
    (tmp_path / "dataset.json").write_text('{"channel_names": {"0": "R", "1": "G", "2": "B"}, "file_ending": ".png"}')
    folder = open_folder(tmp_path)
    assert (folder.layout, folder.skipped) == ("nnunet", {})
    assert [(e.name, len(e.files), e.channels) for e in folder.entries] == [
        ("imagesTr/a", 1, ("r", "g", "b")),
        ("imagesTr/b", 1, ("r", "g", "b")),
    ]
    assert folder.entries[0].mask == tmp_path / "labelsTr" / "a.png"
    assert case_of(folder.entries[0], Form(("r", "g", "b"), SIZE, RANGE)).pixels.shape == (3, 16, 16)
    picture(tmp_path / "imagesTr" / "c_0000.png")
    picture(tmp_path / "imagesTr" / "c_0001.png")
    picture(tmp_path / "imagesTr" / "c_0002.png")
    folder = open_folder(tmp_path)
    assert (names(folder.entries), folder.skipped["imagesTr/a"]) == (["imagesTr/c"], "imagesTr/a: lacks g, b")


def test_volumes_of_which_the_first_channel_is_there_alone_lack_the_others(tmp_path: Path) -> None:
    slice_(tmp_path / "imagesTr" / "a_0000.nii.gz")
    (tmp_path / "dataset.json").write_text('{"channel_names": {"0": "T1", "1": "FLAIR"}}')
    with pytest.raises(InputError, match="imagesTr/a: lacks flair"):
        open_folder(tmp_path, "nnunet")


@pytest.mark.parametrize("content", ['{"labels": [1]}', "[1]", "{", '{"channel_names": ["CT"]}'])
def test_a_dataset_json_of_something_else(tmp_path: Path, content: str) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "dataset.json").write_text(content)
    assert open_folder(tmp_path).layout == "flat"
    with pytest.raises(InputError, match=r"not laid out as nnunet \(dataset.json names no channels"):
        open_folder(tmp_path, "nnunet")


def test_bids_with_participants(tmp_path: Path) -> None:
    for subject in ("sub-01", "sub-02"):
        for session in ("ses-1", "ses-2"):
            slice_(tmp_path / subject / session / "anat" / f"{subject}_{session}_T1w.nii.gz")
        slice_(tmp_path / subject / "func" / f"{subject}_task-rest_bold.nii.gz")
    slice_(tmp_path / "sub-02" / "ses-1" / "anat" / "sub-02_ses-1_PDw.nii.gz")
    slice_(tmp_path / "derivatives" / "sub-01" / "anat" / "sub-01_T1w.nii.gz")
    (tmp_path / "participants.tsv").write_text("participant_id\tage\tsex\nsub-01\t31\tF\n02\tn/a\tM\n")
    folder = open_folder(tmp_path)
    assert folder.layout == "bids"
    assert "participants.tsv with age, sex" in folder.why
    assert [(e.group, e.values, e.channels) for e in folder.entries[1:3]] == [
        ("sub-01", {"age": "31", "sex": "F"}, ("t1",)),
        ("sub-02", {"sex": "M"}, ("t1",)),
    ]
    assert len(folder.entries) == 4
    assert list(folder.skipped) == ["sub-02/ses-1/anat/sub-02_ses-1_PDw.nii.gz"]


def celeba_tree(root: Path, suffix: str) -> None:
    """Write three of CelebA's images and its lists, as published (.txt) or as a copy in CSV has them."""
    rows = [("000001.jpg", "-1", "1"), ("000002.jpg", "1", "-1"), ("000004.jpg", "1", "1")]
    head = ["Bald", "Smiling"] if suffix == ".txt" else ["image_id", "Bald", "Smiling"]
    split = " " if suffix == ".txt" else ","
    lines = [*(["3"] if suffix == ".txt" else []), *(split.join(row) for row in (head, *rows))]
    (root / f"list_attr_celeba{suffix}").write_text("\n".join(lines) + "\n")
    places = ["000001.jpg 0", "000002.jpg 2"] if suffix == ".txt" else ["image_id,partition", "000002.jpg,2"]
    (root / f"list_eval_partition{suffix}").write_text("\n".join(places))
    for number in (1, 2, 3):
        picture(root / "img_align_celeba" / f"00000{number}.jpg")


@pytest.mark.parametrize("suffix", [".csv", ".txt"])
def test_celeba(tmp_path: Path, suffix: str) -> None:
    celeba_tree(tmp_path, suffix)
    (tmp_path / "identity_CelebA.txt").write_text("000001.jpg 2880\n000002.jpg 2937\n")
    folder = open_folder(tmp_path)
    assert (folder.layout, folder.why) == ("celeba", "list_attr_celeba with 2 attributes")
    first, second = folder.entries
    assert first.values == {"Bald": "no", "Smiling": "yes"}
    assert (second.values, second.group, second.split) == ({"Bald": "yes", "Smiling": "no"}, "2937", "test")
    assert list(folder.skipped) == ["img_align_celeba/000003.jpg"]


def test_lists_that_are_no_text_are_refused(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    (tmp_path / "list_attr_celeba.txt").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(InputError, match=r"list_attr_celeba.txt: cannot be read"):
        open_folder(tmp_path)


def test_a_list_whose_head_is_cut_off_is_refused(tmp_path: Path) -> None:
    picture(tmp_path / "a.jpg")
    (tmp_path / "list_attr_celeba.csv").write_text("image_id,Bald\na.jpg,1,-1,1\n")
    with pytest.raises(InputError, match="list_attr_celeba names 2 attributes, its lines 3"):
        open_folder(tmp_path)


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
    assert folder.layout == "pairs"
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
    assert folder.layout == "pairs"
    assert [(e.name, e.mask, e.group) for e in folder.entries] == [
        ("images/a.png", None, ""),
        ("images/b.jpg", tmp_path / "masks" / mask, ""),
    ]
    assert list(folder.skipped) == ["preview.png"]


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("images/1.png", "labels/1.png"),
        ("Images/1.png", "Masks/1.png"),
        ("imgs/1.png", "gt/1.png"),
        ("images/1.png", "annotations/1_gt.png"),
        ("images/ISIC_1.jpg", "masks/ISIC_1_segmentation.png"),
        ("image/1.png", "mask/1.png"),
        ("data/images/1.png", "data/segmentations/1.png"),
        ("1.png", "1_Segmentation.png"),
        ("1.png", "1_gt.png"),
    ],
)
def test_folders_and_endings_of_masks(tmp_path: Path, image: str, mask: str) -> None:
    for name in (image, image.replace("1.", "2.")):
        picture(tmp_path / name)
    picture(tmp_path / mask)
    folder = open_folder(tmp_path)
    assert (folder.layout, folder.skipped) == ("pairs", {})
    assert folder.why.endswith("no patients known")
    assert [entry.mask for entry in folder.entries] == [tmp_path / mask, None]


def test_images_beside_masks_in_a_folder_for_each_patient(tmp_path: Path) -> None:
    for patient in ("p1", "p2"):
        picture(tmp_path / patient / "images" / "a.png")
        picture(tmp_path / patient / "masks" / "a.png")
    folder = open_folder(tmp_path)
    assert folder.why == "images/ beside masks/; 2 folders as patients"
    assert [(entry.group, entry.mask) for entry in folder.entries] == [
        (patient, tmp_path / patient / "masks" / "a.png") for patient in ("p1", "p2")
    ]


def test_frames_of_a_patient_in_pairs_stay_together(tmp_path: Path) -> None:
    for name in ("patient001_frame01", "patient001_frame12"):
        picture(tmp_path / "images" / f"{name}.png")
        picture(tmp_path / "labels" / f"{name}.png")
    assert {entry.group for entry in open_folder(tmp_path).entries} == {"patient001"}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("images/a.png", "labels/b.png"),
        ("imgs/a.png", "MASKS/b.png"),
        ("photos/a.png", "gt/b.png"),
        ("photos/a.png", "annotations/b.png"),
        ("deep/JPEGImages/a.png", "deep/SegmentationClass/a.png"),
        ("train_images/a.png", "train_masks/b.png"),
        ("image/a.png", "mask/b.png"),
        ("set_Input/a.png", "set_GroundTruth/b.png"),
    ],
)
def test_masks_are_never_learnt_as_images(tmp_path: Path, one: str, other: str) -> None:
    """Folders that look like masks are no class, and no images either, unless the user says so."""
    for name in (one, other):
        picture(tmp_path / name)
    told = f"{Path(other).parent.name}/ look like images beside masks, .*images/ or imgs/ beside masks/, labels/, gt/"
    with pytest.raises(InputError, match=f"--data .*{told}.*manifest.csv; --layout flat takes all for images"):
        open_folder(tmp_path)
    assert len(open_folder(tmp_path, "flat").entries) == 2
    if "deep" not in one:
        with pytest.raises(InputError, match=rf"not laid out as classes \(.*{told}"):
            open_folder(tmp_path, "classes")


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "dataset.json is missing"), ("{}", r"dataset.json names no channels \(channel_names or modality\)")],
)
def test_a_set_for_nnunet_without_its_channels_is_refused(tmp_path: Path, content: str | None, said: str) -> None:
    slice_(tmp_path / "imagesTr" / "a_0000.nii.gz")
    slice_(tmp_path / "labelsTr" / "a.nii.gz", label=True)
    if content:
        (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(InputError, match=f"folders named imagesTr/, labelsTr/ look like a set for nnU-Net, but {said}"):
        open_folder(tmp_path)


def test_images_is_no_class_and_mask_may_be_one(tmp_path: Path) -> None:
    for name in ("images/a.png", "photos/b.png"):
        picture(tmp_path / "one" / name)
    assert open_folder(tmp_path / "one").layout == "flat"
    for name in ("mask/a.png", "no mask/b.png"):
        picture(tmp_path / "two" / name)
    assert open_folder(tmp_path / "two").layout == "classes"


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
    assert folder.layout == "classes"
    assert [entry.values for entry in folder.entries] == [{"class": "cat"}, {"class": "cat"}, {"class": "dog"}]


def test_folders_named_by_numbers_are_ages_in_train_and_test(tmp_path: Path) -> None:
    for name in ("train/001/a.png", "train/042/b.png", "test/042/a.png", "test/100/c.png"):
        picture(tmp_path / name)
    folder = open_folder(tmp_path)
    assert folder.layout == "ages"
    assert "train/" in folder.why
    assert [(e.name, e.values, e.split) for e in folder.entries] == [
        ("test/042/a.png", {"age": "042"}, "test"),
        ("test/100/c.png", {"age": "100"}, "test"),
        ("train/001/a.png", {"age": "001"}, "train"),
        ("train/042/b.png", {"age": "042"}, "train"),
    ]


def test_ages_stay_ages_beside_a_folder_that_looks_like_masks(tmp_path: Path) -> None:
    for name in ("20/a.png", "30/b.png", "labels/x.png"):
        picture(tmp_path / name)
    folder = open_folder(tmp_path)
    assert (folder.layout, names(folder.entries)) == ("ages", ["20/a.png", "30/b.png"])
    assert list(folder.skipped) == ["labels/x.png"]


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


# ------------------------------------------------------------------------------------------------------------ standing


def test_every_layout_has_a_test() -> None:
    text = Path(__file__).read_text()
    assert [name for name in all_layouts() if f'"{name}"' not in text] == []


def test_a_layout_may_be_forced(tmp_path: Path) -> None:
    for name in ("1/26_0_2_20170104.jpg", "2/8_1_0_20170105.jpg", "stray.jpg"):
        picture(tmp_path / name)
    assert open_folder(tmp_path).layout == "utkface"
    for layout, values in {"ages": {"age": "1"}, "classes": {"class": "1"}, "flat": {}}.items():
        folder = open_folder(tmp_path, layout)
        assert (folder.layout, folder.entries[0].values) == (layout, values)
    assert open_folder(tmp_path, "ages").skipped == {
        "stray.jpg": "stray.jpg: lies in no folder that is named by its age"
    }


def test_a_forced_layout_holds_in_folders_of_splits_too(tmp_path: Path) -> None:
    for name in ("train/0/a.png", "train/1/a.png", "test/0/a.png", "test/1/a.png"):
        picture(tmp_path / name)
    assert open_folder(tmp_path).entries[0].values == {"age": "0"}
    assert open_folder(tmp_path, "classes").entries[0].values == {"class": "0"}


@pytest.mark.parametrize("layout", [name for name in all_layouts() if name != "flat"])
def test_a_forced_layout_that_finds_nothing_says_why(tmp_path: Path, layout: str) -> None:
    picture(tmp_path / "a.png")
    with pytest.raises(InputError, match=rf"--data .*: not laid out as {layout} \(.*\w+.*\); give another --layout"):
        open_folder(tmp_path, layout)


def test_an_unknown_layout_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"--layout brats: no such layout; give one of manifest, brats2020, .*flat"):
        open_folder(tmp_path, "brats")


def test_two_layouts_of_equal_standing_are_refused_until_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "list_attr_celeba.csv").write_text("image_id,Bald,Smiling\n26_0_2_2017.jpg,1,-1\n")
    picture(tmp_path / "26_0_2_2017.jpg")
    with pytest.raises(
        InputError, match=r"celeba \(.*\) or utkface \(.*\); say which by --layout celeba or --layout utk"
    ):
        open_folder(tmp_path)
    assert open_folder(tmp_path, "utkface").entries[0].values["age"] == "26"
    table(tmp_path, "image,age", "26_0_2_2017.jpg,99")
    assert open_folder(tmp_path).entries[0].values == {"age": "99"}


def test_what_most_of_the_images_fit_stands_above_what_all_of_them_fit(tmp_path: Path) -> None:
    for name in ("26_0_2_20170104.jpg", "8_1_0_20170105.jpg", "a.jpg"):
        picture(tmp_path / name)
    assert open_folder(tmp_path).layout == "utkface"
    picture(tmp_path / "b.jpg")
    assert open_folder(tmp_path).layout == "flat"


def test_flat_and_the_manifest_stand_alone() -> None:
    assert list(LAYOUTS[0]) == ["manifest"]
    assert list(LAYOUTS[-1]) == ["flat"]


# ------------------------------------------------------------------------------------------------------------- volumes


@pytest.fixture
def patients(tmp_path: Path) -> Path:
    """Write two patients of twelve slices, as BraTS 2021 lays them out."""
    for number in ("00000", "00001"):
        for word in SERIES:
            name = f"BraTS2021_{number}_{word}.nii.gz"
            volume_(tmp_path / f"BraTS2021_{number}" / name, label=word == "seg")
    return tmp_path


def test_a_volume_stands_for_its_slices(patients: Path) -> None:
    folder = open_folder(patients)
    assert folder.why.endswith("2 patients; 2 volumes, slices all")
    assert len(folder.entries) == 24
    last = folder.entries[-1]
    assert (last.name, last.group) == ("BraTS2021_00001/BraTS2021_00001:011", "BraTS2021_00001")
    assert (last.slice, last.height) == (11, 11 / 12)
    assert len(last.files) == 4


def test_a_range_of_slices(patients: Path) -> None:
    folder = open_folder(patients, slices=(8, 129))
    assert [entry.slice for entry in folder.entries] == [8, 9, 10, 11] * 2
    assert folder.why.endswith("2 volumes, slices 8:129")
    with pytest.raises(InputError, match=r"--slices 12:20: no volume in .* has such slices"):
        open_folder(patients, slices=(12, 20))
    volume_(patients / "BraTS2021_00002" / "BraTS2021_00002_t1.nii.gz", depth=9)
    for word in SERIES[1:]:
        volume_(patients / "BraTS2021_00002" / f"BraTS2021_00002_{word}.nii.gz", depth=9)
    skipped = open_folder(patients, slices=(10, 12)).skipped
    assert list(skipped.values()) == ["BraTS2021_00002/BraTS2021_00002: has 9 slices, none of --slices 10:12"]


@pytest.mark.parametrize("text", ["80", "a:b", "1:2:3", "80-129", ""])
def test_slices_that_are_no_range_are_refused(text: str) -> None:
    assert slice_range("80:129") == (80, 129)
    assert slice_range(None) is None
    with pytest.raises(SettingsError, match=f"--slices {text}: give the first slice and the last"):
        slice_range(text)


def test_slices_of_no_volume_are_refused(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    with pytest.raises(SettingsError, match=r"--slices 1:2: .* holds no volumes"):
        open_folder(tmp_path, slices=(1, 2))


def test_a_damaged_volume_is_left_to_the_reader(tmp_path: Path) -> None:
    (tmp_path / "a.nii.gz").write_bytes(b"no volume")
    volume_(tmp_path / "b.nii.gz")
    folder = open_folder(tmp_path, slices=(3, 5))
    assert names(folder.entries) == ["a.nii.gz", "b.nii.gz:003", "b.nii.gz:004"]
    assert {entry.group for entry in folder.entries[1:]} == {"b.nii.gz"}
    assert list(load(folder.entries, Form(("0",), SIZE, RANGE)).skipped) == ["a.nii.gz"]


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
    loaded = load(folder.entries, Form(("grey",), SIZE, RANGE))
    assert list(loaded.skipped) == ["dangling.png"]
    assert len(fingerprint(folder.entries)) == 16
    assert len(inventory(folder.entries)) == 2


def test_a_fifo_does_not_hang(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.png")
    entries = open_folder(tmp_path).entries
    assert "no regular file" in load(entries, Form(("grey",), SIZE, RANGE)).skipped["b.png"]
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
        layouts.refuse_folder(PermissionError(13, "Permission denied", str(tmp_path / "x")))
