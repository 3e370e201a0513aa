"""Splits go by patient: drawn by name, told by the folder, or written down in split.json."""

import hashlib
import json
import signal
import sys
from pathlib import Path

import pytest
from trees import names, picture, table

from knife import cli
from knife.errors import InputError, SettingsError
from knife.layouts import SPLIT_FILE, Entry, Folder, open_folder, recognise, split_of, write_split


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


def test_a_patient_follows_the_images_that_the_folder_tells_of() -> None:
    trained = next(name for name in map(str, range(1000)) if split_of(name) == "train")
    images = [Entry("a", (), group=trained), Entry("b", (), group=trained, split="test"), Entry("c", (), split="train")]
    folder = Folder(Path(), "manifest", images)
    assert [names(folder.split(name)) for name in ("train", "val", "test")] == [["c"], [], ["a", "b"]]


def test_few_patients_are_all_trained_on() -> None:
    unlucky = next(name for name in map(str, range(1000)) if split_of(name) == "test")
    folder = Folder(Path(), "flat", [Entry("a", (), group=unlucky), Entry("b", (), split="val")])
    assert names(folder.split("train")) == ["a"]
    assert names(folder.split("val")) == ["b"]


# ---------------------------------------------------------------------------------------------------------- split.json


@pytest.fixture
def patients(tmp_path: Path) -> Path:
    """Write forty patients of two slices with masks."""
    for i in range(40):
        for name in ("a", "a_mask", "b", "b_mask"):
            picture(tmp_path / f"p{i:02d}" / f"{name}.png", 255)
    return tmp_path


def split(root: Path, **shares: float) -> dict[str, list[str]]:
    """Write split.json and return what it says."""
    written = write_split(recognise(root), **shares)
    told = json.loads((root / SPLIT_FILE).read_text())
    assert {name: told[name] for name in written} == written
    return written


def test_a_split_goes_by_patient_and_is_used(patients: Path) -> None:
    told = split(patients, val=0.1, test=0.25)
    assert {name: len(keys) for name, keys in told.items()} == {"train": 26, "val": 4, "test": 10}
    assert told["train"] != [f"p{i:02d}" for i in range(26)]
    folder = open_folder(patients)
    for name, keys in told.items():
        assert sorted({entry.group for entry in folder.split(name)}) == keys
        assert len(folder.split(name)) == 2 * len(keys)
    assert folder.split_sha256 == hashlib.sha256((patients / SPLIT_FILE).read_bytes()).hexdigest()


def test_a_split_depends_on_its_arguments_alone(patients: Path) -> None:
    first = split(patients)
    content = (patients / SPLIT_FILE).read_bytes()
    assert split(patients) == first
    assert (patients / SPLIT_FILE).read_bytes() == content
    assert split(patients, seed=1) != first
    assert [len(keys) for keys in split(patients, val=0, test=0).values()] == [40, 0, 0]


def test_images_are_split_where_no_patients_are_known(tmp_path: Path) -> None:
    for i in range(10):
        picture(tmp_path / f"{i}.png")
    told = split(tmp_path, val=0.2, test=0.0)
    assert [len(keys) for keys in told.values()] == [8, 2, 0]
    assert json.loads((tmp_path / SPLIT_FILE).read_text())["by"] == "image"
    assert names(open_folder(tmp_path).split("val")) == told["val"]


def test_a_small_share_is_one_patient_at_least(tmp_path: Path) -> None:
    for i in range(3):
        picture(tmp_path / f"{i}.png")
    assert [len(keys) for keys in split(tmp_path).values()] == [1, 1, 1]
    (tmp_path / "2.png").unlink()
    with pytest.raises(SettingsError, match=r"--val 0.05 --test 0.05: 2 in all leave none to train on"):
        split(tmp_path)


def test_what_the_folder_tells_stays(tmp_path: Path) -> None:
    for i in range(20):
        picture(tmp_path / ("test" if i < 5 else "train") / f"{i:02d}.png")
    told = split(tmp_path, val=0.1)
    assert told["test"] == [f"test/{i:02d}.png" for i in range(5)]
    assert [len(told[name]) for name in ("train", "val")] == [13, 2]


def test_a_patient_in_two_splits_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        picture(tmp_path / f"{name}.png")
    table(tmp_path, "image,group,split", "a.png,p1,train", "b.png,p1,test")
    with pytest.raises(InputError, match=r"p1 is in train and test \(b.png\); keep a patient in one split"):
        write_split(recognise(tmp_path))


@pytest.mark.parametrize("shares", [{"val": -0.1}, {"val": 0.5, "test": 0.5}, {"test": 1.0}, {"val": float("nan")}])
def test_impossible_shares_are_refused(patients: Path, shares: dict[str, float]) -> None:
    with pytest.raises(SettingsError, match="give shares of 0 or more, together less than 1"):
        split(patients, **shares)
    assert not (patients / SPLIT_FILE).exists()


def test_a_patient_that_split_json_does_not_know_is_refused(patients: Path) -> None:
    split(patients)
    picture(patients / "p98" / "a.png")
    picture(patients / "p99" / "a.png")
    with pytest.raises(InputError, match=r"does not say where p98 belongs .*1 other.*run `knife data split .*` again"):
        open_folder(patients)
    split(patients)
    assert len(open_folder(patients).entries) == 82
    (patients / "p98" / "a.png").unlink()  # one who is gone does no harm
    assert len(open_folder(patients).entries) == 81


def test_a_patient_who_stands_twice_in_split_json_is_refused(patients: Path) -> None:
    told = split(patients)
    told["test"].append(told["train"][0])
    (patients / SPLIT_FILE).write_text(json.dumps(told))
    with pytest.raises(InputError, match=rf"split.json: {told['train'][0]} stands in it twice"):
        open_folder(patients)


@pytest.mark.parametrize("content", ["{", "[]", '{"train": []}', '{"train": [[]], "val": [], "test": []}', "\xff"])
def test_a_damaged_split_json_is_refused(patients: Path, content: str) -> None:
    (patients / SPLIT_FILE).write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=r"split.json: (does not list train, val and test|cannot be read)"):
        open_folder(patients)


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run the command line in this process; return its exit code."""
    monkeypatch.setattr(signal, "signal", lambda number, handler: signal.getsignal(number))
    monkeypatch.setattr(sys, "argv", ["knife", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def test_the_command(patients: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(monkeypatch, "data", "split", patients, "--val", "0.1", "--test", "0.2", "--seed", 3) == 0
    said = capsys.readouterr()
    assert said.out == f"{patients / SPLIT_FILE}\n"
    assert "80 images (pairs: x_mask beside x; 40 folders as patients); 28 train, 4 val, 8 test." in said.err
    assert command(monkeypatch, "data", "split", patients, "--layout", "bids") == 2
    assert "not laid out as bids (no images in sub-*/anat)" in capsys.readouterr().err
