from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, MRImageStorage, generate_uid

from knife import dicom, volume
from knife.errors import InputError
from knife.settings import Settings, Wish
from knife.translation import translate

ROWS, COLUMNS, DEPTH = 12, 10, 11
SPACING, GAP = (1.25, 0.75), 2.5  # between rows, between columns; between slices
AXIAL = (1, 0, 0, 0, 1, 0)
TILTED = (1, 0, 0, 0, np.cos(0.2), np.sin(0.2))


def voxels(seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 900, (DEPTH, ROWS, COLUMNS)).astype(np.uint16)


def write_series(folder: Path, data: np.ndarray, orientation=AXIAL, uid=None, suffix=".dcm", **tags) -> Path:
    """Write a series, its files named so that their order by name is not that in space."""
    folder.mkdir(parents=True, exist_ok=True)
    uid, normal = uid or generate_uid(), np.cross(orientation[:3], orientation[3:])
    for k, plane in enumerate(data):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, MRImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        one = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        one.PatientName, one.SeriesInstanceUID, one.SOPClassUID = "Doe^Jane", uid, MRImageStorage
        one.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
        one.Rows, one.Columns, one.SamplesPerPixel, one.PhotometricInterpretation = *plane.shape, 1, "MONOCHROME2"
        one.BitsAllocated = one.BitsStored = 16
        one.HighBit, one.PixelRepresentation = 15, 0
        one.PixelSpacing, one.ImageOrientationPatient = list(SPACING), [float(v) for v in orientation]
        one.ImagePositionPatient = [float(v) for v in np.array([-7.0, 4.0, 30.0]) + k * GAP * normal]
        one.PixelData = plane.tobytes()
        for tag, value in tags.items():
            setattr(one, tag, value)
        one.save_as(folder / f"im{(k * 7) % DEPTH:03d}{suffix}", enforce_file_format=True)
    return folder


def test_a_series_is_a_volume_in_the_right_place(tmp_path):
    data = voxels()
    stack = dicom.open_series(write_series(tmp_path / "s", data, TILTED))
    assert stack.pixels.shape == (1, DEPTH, ROWS, COLUMNS)
    # DICOM shows rows from anterior to posterior and columns from the patient's right to left, as knife does
    assert torch.equal(stack.pixels[0], torch.from_numpy(data.astype(np.float32)))
    volume.write(stack, tmp_path / "x.nii.gz")
    import nibabel as nib

    image = nib.load(tmp_path / "x.nii.gz")
    normal = np.cross(TILTED[:3], TILTED[3:])
    for k, i, j in [(0, 0, 0), (3, 5, 2), (10, 11, 9)]:  # slice, row, column
        lps = np.array([-7.0, 4.0, 30.0]) + k * GAP * normal
        lps = lps + i * SPACING[0] * np.array(TILTED[3:]) + j * SPACING[1] * np.array(TILTED[:3])
        place = np.linalg.inv(image.affine) @ [-lps[0], -lps[1], lps[2], 1]
        assert np.asarray(image.dataobj)[tuple(place[:3].round().astype(int))] == data[k, i, j]
        assert np.abs(place - place.round()).max() < 1e-4
    assert image.get_data_dtype() == np.int16
    assert b"Doe" not in (tmp_path / "x.nii.gz").read_bytes()


def test_intensities_are_rescaled(tmp_path):
    data = voxels()
    whole = dicom.open_series(write_series(tmp_path / "a", data, RescaleSlope=2, RescaleIntercept=-100))
    part = dicom.open_series(write_series(tmp_path / "b", data, RescaleSlope=0.5, RescaleIntercept=0))
    assert torch.equal(whole.pixels[0], torch.from_numpy(data * 2.0 - 100).float())
    assert torch.equal(part.pixels[0], torch.from_numpy(data * 0.5).float())
    assert (whole.files[0].dtype, part.files[0].dtype) == (np.int16, np.float32)


def shown_in(folder: Path) -> np.ndarray:
    return dicom.open_series(folder).pixels[0].numpy()


def test_where_more_is_darker_it_is_turned_over(tmp_path):
    data = voxels()
    data[:, :3] = 2**12 - 1  # black
    stack = dicom.open_series(write_series(tmp_path / "s", data, PhotometricInterpretation="MONOCHROME1"))
    assert np.array_equal(stack.pixels[0].numpy(), 2.0**12 - 1 - data)
    assert bool(stack.slice(4).background[:3].all())
    assert stack.files[0].dtype == np.int16
    scaled = {"PhotometricInterpretation": "MONOCHROME1", "RescaleSlope": 100.5, "RescaleIntercept": -7}
    assert np.allclose(shown_in(write_series(tmp_path / "t", data, **scaled)), (2.0**12 - 1 - data) * 100.5)


def test_padding_is_background(tmp_path):
    """In MR it is 0, whatever it was stored as; beside intensities below 0, as those of CT, it is the lowest."""
    data = voxels() + 5
    data[:, :, :4] = 60000
    frame = data == 60000
    stack = dicom.open_series(write_series(tmp_path / "mr", data, PixelPaddingValue=60000))
    assert np.array_equal(stack.pixels[0].numpy(), np.where(frame, 0, data))
    assert np.array_equal(stack.slice(4).background.numpy(), frame[4])
    assert float(stack.window[0, 1]) <= 905
    ct = write_series(tmp_path / "ct", data, PixelPaddingValue=60000, RescaleSlope=1, RescaleIntercept=-1000)
    assert np.array_equal(shown_in(ct), np.where(frame, data[~frame].min() - 1000.0, data - 1000.0))
    dark = write_series(tmp_path / "dark", data, PixelPaddingValue=60000, PhotometricInterpretation="MONOCHROME1")
    assert np.array_equal(shown_in(dark), np.where(frame, 0, data[~frame].max() - data.astype(float)))
    nothing = write_series(tmp_path / "nothing", data * 0 + 7, PixelPaddingValue=7)
    assert not shown_in(nothing).any()


def test_a_range_of_padding_and_signs_that_were_lost(tmp_path):
    data = voxels().astype(np.int16)
    data[:, 0], data[:, 1], data[:, 2] = -2000, -1995, -1990
    signed = {"PixelRepresentation": 1, "PixelPaddingValue": -2000, "PixelPaddingRangeLimit": -1995}
    told = write_series(tmp_path / "range", data, **signed)
    assert (shown_in(told)[:, :3] == -1990).all()
    for file in told.iterdir():
        one = pydicom.dcmread(file)
        del one["PixelPaddingValue"], one["PixelPaddingRangeLimit"]
        one.add_new("PixelPaddingValue", "US", 2**16 - 2000)  # as if there were no sign
        one.save_as(file)
    assert (shown_in(told)[:, 0] == -1995).all()
    assert (shown_in(told)[:, 1] == -1995).all()


def test_padding_without_a_type_in_the_file(tmp_path):
    data = voxels().astype(np.int16)
    data[:, 0] = -7
    folder = write_series(tmp_path / "s", data, PixelRepresentation=1, PixelPaddingValue=-7)
    for file in folder.iterdir():
        one = pydicom.dcmread(file)
        one.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
        pydicom.dcmwrite(file, one, implicit_vr=True, little_endian=True)
    assert (shown_in(folder)[:, 0] == 0).all()


def test_files_need_no_suffix_and_others_are_passed_over(tmp_path):
    folder = write_series(tmp_path / "s", voxels(), suffix="")
    (folder / "notes.txt").write_text("hello")
    (folder / "AAA first").write_text("read me")
    (folder / "DICOMDIR").write_bytes((folder / "im000").read_bytes())
    (folder / "preview.png").touch()
    (folder / "below").mkdir()
    assert len(dicom.series_files(folder)) == DEPTH
    assert dicom.open_series(folder).count == DEPTH
    for i in range(DEPTH):
        (folder / f"{i}.png").touch()
    assert dicom.series_files(folder) == []  # images, with some DICOM among them
    assert dicom.series_files(tmp_path) == []


def test_a_head_of_several_series(tmp_path):
    for i, name in enumerate(["FLAIR", "T1", "T2", "T1ce"]):
        write_series(tmp_path / "head" / name, voxels(i), uid=generate_uid())
    folders = dicom.case_of(tmp_path / "head")
    assert [folder.name for folder in folders] == ["T1", "T1ce", "T2", "FLAIR"]
    stack = dicom.open_case(folders)
    assert stack.channels == ("t1", "t1ce", "t2", "flair")
    assert torch.equal(stack.pixels[3, 4], torch.from_numpy(voxels(0)[4].astype(np.float32)))
    volume.write(stack, tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "FLAIR.nii.gz", "T1.nii.gz", "T1ce.nii.gz", "T2.nii.gz",
    ]  # fmt: skip


@pytest.mark.parametrize("place", ["flair", "head/FLAIR", "head/3 t2_flair axial"])
def test_a_single_series_has_the_channel_that_its_folder_names(tmp_path, place):
    write_series(tmp_path / place, voxels())
    for asked in {tmp_path / place, tmp_path / place.split("/")[0]}:
        assert dicom.open_case(dicom.case_of(asked)).channels == ("flair",)


def test_two_series_of_one_sequence_are_refused(tmp_path):
    for i, name in enumerate(["T1 early", "T1 late", "T2"]):
        write_series(tmp_path / "head" / name, voxels(i))
    with pytest.raises(InputError, match=r"T1 early and .*T1 late: two files of sequence t1"):
        dicom.case_of(tmp_path / "head")


def test_a_series_in_the_working_folder_has_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(write_series(tmp_path / "Jane", voxels()))
    assert [folder.name for folder in dicom.case_of(Path())] == ["Jane"]


def test_one_slice_of_a_head_of_dicom(tmp_path, models):
    for i, name in enumerate(["t1", "t1ce", "t2", "flair"]):
        write_series(tmp_path / "Jane" / name, voxels(i))
    few = Settings(noise_level=10, steps=2)
    translate(
        tmp_path / "Jane", Wish("regress", "0.3"), models=models, settings=few, out=tmp_path / "out", slices=(3, 4)
    )
    alone = tmp_path / "out" / "Jane_regress_0.3_slice3"
    assert sorted(file.name for file in alone.iterdir()) == [f"{n}.nii.gz" for n in ("flair", "t1", "t1ce", "t2")]


def test_translating_a_head_of_dicom(tmp_path, models):
    for i, name in enumerate(["t1", "t1ce", "t2", "flair"]):
        write_series(tmp_path / "Jane" / name, voxels(i))
    few = Settings(noise_level=10, steps=2)
    done = translate(
        tmp_path / "Jane", Wish("regress", "0.3"), models=models, settings=few, out=tmp_path / "out", slices=(3, 5)
    )
    assert [one.record["slice"] for one in done] == [3, 4]
    assert (tmp_path / "out" / "Jane_regress_0.3_slices3-4" / "flair.nii.gz").exists()
    assert not any(b"Doe" in file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file())


def drop_one(folder: Path) -> None:
    places = {pydicom.dcmread(file).ImagePositionPatient[2]: file for file in folder.iterdir()}
    places[sorted(places)[4]].unlink()


def retag(folder: Path, tag: str, value: object) -> None:
    file = sorted(folder.iterdir())[3]
    one = pydicom.dcmread(file)
    if value is None:
        del one[tag]
    else:
        setattr(one, tag, value)
    one.save_as(file)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (drop_one, "2.5 to 5 mm apart; one is missing or there twice"),
        (lambda f: retag(f, "ImagePositionPatient", None), "lacks ImagePositionPatient"),
        (lambda f: retag(f, "PixelSpacing", [9, 9]), "differ in PixelSpacing"),
        (lambda f: retag(f, "SeriesInstanceUID", generate_uid()), "2 DICOM series in one folder"),
        (lambda f: retag(f, "NumberOfFrames", 3), "several frames"),
        (lambda f: retag(f, "PhotometricInterpretation", "MONOCHROME1"), "differ in PhotometricInterpretation"),
        (lambda f: retag(f, "PhotometricInterpretation", "PALETTE COLOR"), "several frames or colours"),
        (lambda f: [file.unlink() for file in sorted(f.iterdir())[1:]], "1 DICOM files make no volume"),
        (lambda f: [file.write_bytes(file.read_bytes()[:400]) for file in f.iterdir()], "lacks .*PixelData"),
    ],
)  # fmt: skip
def test_what_is_no_whole_series_is_refused(tmp_path, damage, words):
    folder = write_series(tmp_path / "s", voxels())
    damage(folder)
    with pytest.raises(InputError, match=words):
        dicom.open_series(folder)


def test_without_pydicom_the_extra_is_named(tmp_path, monkeypatch):
    folder = write_series(tmp_path / "s", voxels())
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    with pytest.raises(InputError, match=r"pip install 'knife-diffusion\[dicom\]'"):
        dicom.open_series(folder)
