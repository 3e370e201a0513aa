"""What cannot be read is skipped with its reason, volumes are opened once, and other data are told from these."""

import errno
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image as Picture
from trees import picture, slice_, table, volume_

from knife import data, volume
from knife.data import Form, case_of, channels_of, fingerprint, inventory, load
from knife.errors import InputError
from knife.layouts import Entry, open_folder

SIZE, RANGE = (16, 16), (-1.0, 1.0)


# ------------------------------------------------------------------------------------------------------------- loading


def test_what_cannot_be_used_is_skipped_with_its_reason(tmp_path: Path) -> None:
    for i in range(4):
        picture(tmp_path / f"good{i}.png")
    picture(tmp_path / "colour.png", mode="RGB")
    picture(tmp_path / "constant.png", value=10)
    (tmp_path / "torn.png").write_bytes((tmp_path / "good0.png").read_bytes()[:50])
    (tmp_path / "text.jpg").write_text("no picture at all")
    entries = open_folder(tmp_path).entries
    loaded = load(entries, Form(channels_of(entries), SIZE, RANGE))
    assert [case.name for case in loaded.cases] == [f"good{i}.png" for i in range(4)]
    assert set(loaded.skipped) == {"colour.png", "constant.png", "torn.png", "text.jpg"}
    assert loaded.skipped["colour.png"] == "colour.png: 3 channels, the others have 1 (grey)."
    assert "constant" in loaded.skipped["constant.png"]


def test_what_the_system_refuses_may_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("good.png", "gone.png", "sick.png"):
        picture(tmp_path / name)
    good = (tmp_path / "good.png").read_bytes()
    (tmp_path / "torn.png").write_bytes(good[:50])
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.tif").write_text("no picture at all")
    whole = volume_(tmp_path / "whole.nii.gz", depth=3).read_bytes()
    (tmp_path / "torn.nii.gz").write_bytes(whole[:-9])
    entries = open_folder(tmp_path, layout="flat").entries
    (tmp_path / "gone.png").unlink()
    real = os.open

    def stumble(path: Path, *rest: int) -> int:
        if Path(path).name == "sick.png":
            raise OSError(errno.EIO, "Input/output error")
        return real(path, *rest)

    monkeypatch.setattr(os, "open", stumble)
    loaded = load(entries, Form(("grey",), SIZE, RANGE))
    assert loaded.passing == {"gone.png", "sick.png"}
    assert {"torn.png", "empty.png", "text.tif"} < set(loaded.skipped)
    assert any(name.startswith("torn.nii.gz") for name in loaded.skipped)


def test_most_of_the_images_decide_on_the_channels(tmp_path: Path) -> None:
    picture(tmp_path / "a_first.png", mode="L")
    for i in range(30):
        picture(tmp_path / f"b{i:02d}.png", mode="RGB")
    assert channels_of(open_folder(tmp_path).entries) == ("r", "g", "b")


def test_sequences_are_not_mixed_up(tmp_path: Path) -> None:
    entry = Entry("a", (slice_(tmp_path / "a_t2.nii"),))
    assert case_of(entry, Form(("0",), SIZE, RANGE)).pixels.shape == (1, 16, 16)
    with pytest.raises(InputError, match=r"its channels are t2, the others have t1\."):
        case_of(entry, Form(("t1",), SIZE, RANGE))


def test_channel_names_must_be_as_many_as_channels(tmp_path: Path) -> None:
    entry = Entry("a.png", (picture(tmp_path / "a.png"),), channels=("t1", "t2"))
    with pytest.raises(InputError, match=r"2 channels are named \(t1, t2\), the image has 1"):
        channels_of([entry])


def test_channel_names_follow_their_files(tmp_path: Path) -> None:
    files = tuple(slice_(tmp_path / f"a_{word}.nii") for word in ("flair", "t1"))
    entry = Entry("a", files, channels=("late", "early"))
    assert channels_of([entry]) == data.image_of(entry).channels == ("late", "early")


def test_sequences_come_in_their_own_order(tmp_path: Path) -> None:
    files = tuple(slice_(tmp_path / f"a_{i}.nii", level=i + 1) for i in range(2))
    entry = Entry("a", files, channels=("flair", "t1"))
    assert channels_of([entry]) == ("t1", "flair")
    assert data.image_of(entry).source.paths == files[::-1]
    volumes = tuple(volume_(tmp_path / f"b_{i}.nii", level=i + 1) for i in range(2))
    entry = Entry("b:003", volumes, channels=("flair", "t1"), slice=3)
    assert channels_of([entry]) == data.image_of(entry).channels == ("t1", "flair")
    assert data.image_of(entry).pixels[:, 8, 8].tolist() == [2 * 4, 4]


def test_slices_of_several_files_whose_names_tell_no_sequence(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text('{"channel_names": {"0": "CT", "1": "PET"}}')
    for i in range(2):
        slice_(tmp_path / "imagesTr" / f"a_000{i}.nii.gz", level=i + 1)
    slice_(tmp_path / "labelsTr" / "a.nii.gz", label=True)
    entries = open_folder(tmp_path).entries
    loaded = load(entries, Form(channels_of(entries), SIZE, RANGE))
    assert (loaded.skipped, channels_of(entries)) == ({}, ("ct", "pet"))
    image = data.image_of(entries[0])
    torch.testing.assert_close(image.pixels[1], image.pixels[0] * 2)
    assert loaded.cases[0].mask is not None


def test_a_channel_may_be_empty_and_an_image_may_not(tmp_path: Path) -> None:
    files = slice_(tmp_path / "a_0.nii"), slice_(tmp_path / "a_1.nii", level=0)
    assert data.image_of(Entry("a", files, channels=("ct", "pet"))).pixels[1].max() == 0
    with pytest.raises(InputError, match="a constant image shows nothing"):
        data.image_of(Entry("a", (files[1], files[1]), channels=("ct", "pet")))


def test_pictures_are_not_joined(tmp_path: Path) -> None:
    files = picture(tmp_path / "a_0.png"), picture(tmp_path / "a_1.png")
    with pytest.raises(InputError, match=r"a_0.png: only NIfTI files of one channel can be joined"):
        data.image_of(Entry("a", files, channels=("dapi", "gfp")))


@pytest.mark.parametrize("channels", [("ct",), ("ct", "ct"), ("ct", "pet", "mr")])
def test_each_of_several_files_must_have_a_name(tmp_path: Path, channels: tuple[str, ...]) -> None:
    files = slice_(tmp_path / "a_0.nii"), slice_(tmp_path / "a_1.nii")
    with pytest.raises(InputError, match=r"a: 2 files, named ct.*; give each a name of its own"):
        data.image_of(Entry("a", files, channels=channels))


def test_no_readable_image_is_refused_with_a_reason(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(InputError, match=r"no image could be read; the last reason was: .*a\.png"):
        channels_of(open_folder(tmp_path).entries)


def test_a_mask_is_brought_onto_the_grid_of_its_image(tmp_path: Path) -> None:
    entry = Entry("a", (picture(tmp_path / "a.png", side=32),), picture(tmp_path / "m.png", 255, side=32))
    Picture.fromarray(np.kron(np.eye(2, dtype=np.uint8), np.full((16, 16), 255, np.uint8))).save(tmp_path / "m.png")
    case = case_of(entry, Form(("grey",), SIZE, RANGE))
    assert case.mask is not None
    assert torch.equal(case.mask, torch.eye(2).kron(torch.ones(8, 8))[None])
    dot = np.zeros((32, 32), np.uint8)
    dot[8, 8] = 255  # a quarter of a pixel of the grid
    Picture.fromarray(dot).save(tmp_path / "m.png")
    said = load([entry], Form(("grey",), SIZE, RANGE)).skipped["a"]
    assert "outlines (1 pixels) vanishes on the model's grid of 16 x 16" in said
    Picture.fromarray(np.zeros_like(dot)).save(tmp_path / "m.png")
    case = case_of(entry, Form(("grey",), SIZE, RANGE))
    assert case.mask is not None
    assert not case.mask.any()
    picture(tmp_path / "m.png", 255, side=16)
    assert "mask is 16 x 16" in load([entry], Form(("grey",), SIZE, RANGE)).skipped["a"]


# ------------------------------------------------------------------------------------------------------------- volumes


@pytest.fixture
def patients(tmp_path: Path) -> Path:
    """Write two patients of twelve slices: two sequences and a mask that begins at slice 6."""
    for patient in ("ann", "bob"):
        for word in ("t1", "flair"):
            volume_(tmp_path / f"{patient}_{word}.nii.gz", level=2.0 if word == "t1" else 1.0)
        volume_(tmp_path / f"{patient}_seg.nii.gz", label=True)
    return tmp_path


def test_slices_of_volumes_with_their_masks(patients: Path) -> None:
    entries = open_folder(patients).entries
    assert channels_of(entries) == ("t1", "flair")
    loaded = load(entries, Form(("t1", "flair"), SIZE, RANGE))
    assert [case.name for case in loaded.cases] == [f"{p}:{k:03d}" for p in ("ann", "bob") for k in range(1, 12)]
    assert loaded.skipped.keys() == {"ann:000", "bob:000"}  # nothing to be seen there
    assert "shows nothing" in loaded.skipped["ann:000"]
    first, last = loaded.cases[0], loaded.cases[10]
    assert (first.pixels.shape, float(last.pixels.max())) == ((2, 16, 16), 1.0)
    assert float(first.pixels.max()) == pytest.approx(2 / 12 * 2 - 1, abs=0.05)  # of the volume's range, not its own
    assert first.mask is not None
    assert last.mask is not None
    assert (float(first.mask.sum()), float(last.mask.sum())) == (0, 64)


def test_a_volume_is_opened_once(patients: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def counting(path: Path, *rest: float | None) -> volume.Volume:
        opened.append(path.name)
        return kept(path, *rest)

    kept = volume.open_volume
    monkeypatch.setattr(data.volume, "open_volume", counting)
    entries = open_folder(patients).entries
    loaded = load([*entries[::2], *entries[1::2]], Form(("t1", "flair"), SIZE, RANGE))
    assert sorted(opened) == ["ann_flair.nii.gz", "ann_t1.nii.gz", "bob_flair.nii.gz", "bob_t1.nii.gz"]
    assert len(loaded.cases) == 22


def test_slices_that_show_too_little_brain_are_skipped(patients: Path) -> None:
    entries = open_folder(patients, slices=(0, 3)).entries  # their brain covers 0, 0.25, 0.25
    skipped = load(entries, Form(("t1", "flair"), SIZE, RANGE, min_brain=0.26)).skipped
    assert len(skipped) == 6
    assert skipped["bob:002"] == "bob:002: brain covers 0.25 of the image, less than --min-brain 0.26."
    assert len(load(entries, Form(("t1", "flair"), SIZE, RANGE, min_brain=0.24)).cases) == 4


def test_a_damaged_volume_skips_all_of_its_slices(patients: Path) -> None:
    entries = open_folder(patients, slices=(4, 6)).entries
    whole = (patients / "bob_flair.nii.gz").read_bytes()
    (patients / "bob_flair.nii.gz").write_bytes(whole[:-20])
    heard: list[int] = []
    loaded = load(entries, Form(("t1", "flair"), SIZE, RANGE), heard.append)
    assert [case.name for case in loaded.cases] == ["ann:004", "ann:005"]
    assert all("bob_flair.nii.gz" in loaded.skipped[f"bob:00{k}"] for k in (4, 5))
    assert heard == [2, 4]


def test_files_whose_names_tell_no_sequence_are_joined_as_the_entry_names_them(tmp_path: Path) -> None:
    files = tuple(volume_(tmp_path / f"a_000{i}.nii.gz", level=i + 1) for i in (1, 0))
    entry = Entry("a", files, channels=("t1", "flair"), slice=3)
    case = case_of(entry, Form(("t1", "flair"), SIZE, RANGE))
    assert case.pixels.shape == (2, 16, 16)
    assert data.image_of(entry).pixels[:, 8, 8].tolist() == [2 * 4, 4]


def test_the_inventory_reads_a_volume_once(patients: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries, read = open_folder(patients).entries, []
    monkeypatch.setattr(data, "content", lambda path: read.append(path) or "hash")
    assert len(inventory(entries)) == 24
    assert len(read) == len(set(read)) == 6


# ------------------------------------------------------------------------------------------------------------- loading


def test_the_same_name_twice_is_two_entries(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    table(tmp_path, "image,age", "a.png,1", "a.png,2")
    entries = open_folder(tmp_path).entries
    assert [case.values["age"] for case in load(entries, Form(("grey",), SIZE, RANGE)).cases] == ["1", "2"]


def test_progress_is_told_sparsely_to_the_end(tmp_path: Path) -> None:
    entries = [Entry(str(i), (tmp_path / "gone.png",)) for i in range(950)]
    heard: list[int] = []
    assert len(load(entries, Form(("grey",), SIZE, RANGE), heard.append).skipped) == 950
    assert heard == sorted(set(heard))
    assert heard[-1] == 950
    assert 50 <= len(heard) <= 110


def test_more_images_than_memory_are_refused_before_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [Entry("a", (tmp_path / "gone.png",), mask=tmp_path / "gone.png")] * 1024
    need = 1024 * (4 + 1) * 256 * 256 * 4
    monkeypatch.setattr(data, "available_memory", lambda: int(need / 0.79))
    assert len(load(entries, Form(("t1", "t1ce", "t2", "flair"), (256, 256), RANGE)).skipped) == 1
    monkeypatch.setattr(data, "available_memory", lambda: int(need / 0.81))
    with pytest.raises(InputError, match=r"1024 images of 4 x 256 x 256 pixels need 1\.2 GiB of memory, and 1\.5 GiB"):
        load(entries, Form(("t1", "t1ce", "t2", "flair"), (256, 256), RANGE))


def test_free_memory_is_known_here() -> None:
    free = data.available_memory()
    assert free is None or free > 2**20


def test_free_memory_is_what_the_system_tells_or_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {"text": "MemTotal: 9 kB\nMemAvailable:    7 kB\n", "SC_AVPHYS_PAGES": 3, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(Path, "read_text", lambda path, encoding: told["text"])
    monkeypatch.setattr(data.os, "sysconf", lambda name: told[name])
    assert data.available_memory() == 7 * 1024
    told["text"] = "MemTotal: 9 kB\n"  # of a system that tells no more
    assert data.available_memory() == 3 * 4096
    monkeypatch.delattr(data.os, "sysconf")
    assert data.available_memory() is None


def test_what_cannot_be_read_has_no_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_bytes(b"x")
    assert len(data.content(tmp_path / "x")) == 64
    assert data.content(tmp_path) == data.content(tmp_path / "gone") == ""

    def broken(path: Path) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "read_bytes", broken)
    assert data.content(tmp_path / "x") == ""


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


def test_the_inventory_tells_channels_that_changed_places(tmp_path: Path) -> None:
    files = tuple(slice_(tmp_path / f"a_{i}.nii", level=i + 1) for i in range(2))
    one, other = (Entry("a", files, channels=names) for names in (("t1", "t2"), ("t2", "t1")))
    assert data.image_of(one).channels == data.image_of(other).channels
    assert inventory([one]) != inventory([other])
    assert inventory([Entry("a", files, channels=("t1", "t1"))])  # which cannot be read, and is told so elsewhere


def test_fingerprints_do_not_depend_on_where_the_folder_lies(tmp_path: Path) -> None:
    folders = [open_folder(picture(tmp_path / name / "a.png").parent) for name in ("one", "two")]
    assert fingerprint(folders[0].entries) == fingerprint(folders[1].entries)
    assert inventory(folders[0].entries) == inventory(folders[1].entries)


@pytest.mark.parametrize(("labels", "wanted"), [((), {1, 2, 4}), ((4,), {4}), ((1, 4), {1, 4}), ((3,), set())])
def test_the_labels_of_a_mask_are_merged_or_chosen(tmp_path: Path, labels: tuple[int, ...], wanted: set[int]) -> None:
    rng = np.random.default_rng(0)
    image, mask = rng.integers(1, 900, (16, 16, 9)), rng.choice([0, 1, 2, 4], (16, 16, 9))
    for name, values in (("x_t1", image), ("x_seg", mask)):
        nib.save(nib.Nifti1Image(values.astype(np.int16), np.diag([-1.0, -1, 1, 1])), tmp_path / f"{name}.nii.gz")
    entry = Entry("x", (tmp_path / "x_t1.nii.gz",), tmp_path / "x_seg.nii.gz", slice=4)
    case = case_of(entry, Form(("t1",), (16, 16), RANGE, labels=labels))
    assert torch.equal(case.mask[0].T > 0, torch.from_numpy(np.isin(mask[..., 4], [*wanted])))
