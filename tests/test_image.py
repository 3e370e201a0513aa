"""Files in, files out: nothing changes that the model did not change, and nothing but InputError for a bad file."""

import gzip
import io
import os
import random
import resource
import socket
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import PIL.Image
import pytest
import torch
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from PIL import ImageCms

from knife import image as module
from knife.errors import InputError, SettingsError
from knife.image import (
    MARK,
    Image,
    is_image,
    output_name,
    read,
    read_mask,
    sequence_files,
    sequence_of,
    write,
)
from knife.nifti import GEOMETRY

RANGE = (-1.0, 1.0)
# Oblique, flipped, anisotropic: what an identity would hide
UGLY = np.array([[-0.83, 0.21, 0.4, 71.3], [0.17, 1.1, -0.3, -55.5], [0.09, 0.35, 2.9, 12.25], [0, 0, 0, 1]])


def slice_of(shape: tuple[int, ...] = (12, 9), seed: int = 0, high: int = 900) -> np.ndarray:
    """Return whole numbers with a rim of background."""
    values = np.random.default_rng(seed).integers(1, high, shape)
    values[:2] = 0
    return values


def save(path: Path, values: np.ndarray, affine: np.ndarray | None = None, kind: type = nib.Nifti1Image) -> Path:
    nib.save(kind(values, np.diag([-1.0, -1, 1, 1]) if affine is None else affine, dtype=values.dtype), path)
    return path


def header_of(path: Path) -> Any:
    """Return the header as it lies in the file, which nibabel's loader would tidy up."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    kind = nib.Nifti2Header if struct.unpack("<i", data[:4])[0] == 540 else nib.Nifti1Header
    return kind(data[: kind.sizeof_hdr], check=False)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Compare bit for bit: -0.0 is not 0.0."""
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


# --------------------------------------------------------------------------------------------------------------- NIfTI


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize(
    "dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int32", "int64", "float32", "float64"]
)
def test_nifti_round_trip(tmp_path: Path, dtype: str, kind: type, suffix: str) -> None:
    values = slice_of(high=100).astype(dtype)
    image = read(save(tmp_path / f"in{suffix}", values, UGLY, kind))
    same_image = image.plus(torch.zeros(1, 64, 64), RANGE)
    assert same(same_image.pixels, image.pixels)
    write(same_image, tmp_path / f"out{suffix}")
    out = nib.load(tmp_path / f"out{suffix}")
    assert type(out) is kind
    assert out.get_data_dtype() == ("float32" if dtype == "float64" else dtype)
    assert np.array_equal(np.asarray(out.dataobj), values)
    assert np.array_equal(out.affine, nib.load(tmp_path / f"in{suffix}").affine)


@pytest.mark.parametrize(
    "shape",
    [(7, 5), (7, 5, 1), (7, 5, 1, 1), (7, 5, 1, 4), (7, 5, 4), (1, 7, 5), (7, 1, 5), (1, 7, 5, 3), (7, 5, 1, 1, 3)],
)
def test_every_shape_of_a_slice_comes_back(tmp_path: Path, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(1).normal(size=shape).astype("float32")
    image = read(save(tmp_path / "in.nii", values, UGLY))
    channels = {4: 4, 3: 3}.get(shape[-1], 1) if len(shape) > 2 else 1
    assert sorted(image.pixels.shape) == sorted((channels, 5, 7))
    assert image.channels == tuple(map(str, range(channels)))
    write(image, tmp_path / "out.nii")
    assert nib.load(tmp_path / "out.nii").shape == shape
    assert np.array_equal(np.asarray(nib.load(tmp_path / "out.nii").dataobj), values)


@pytest.mark.parametrize("order", ["<", ">"])
def test_geometry_fields_come_back_bit_for_bit(tmp_path: Path, order: str) -> None:
    ugly = nib.Nifti1Image(slice_of((7, 5, 1, 2)).astype("int16"), UGLY)
    ugly.set_sform(UGLY + 0.01, code=4)
    ugly.set_qform(UGLY * [[1.7], [1.7], [1.7], [1]], code=2, strip_shears=True)
    header = ugly.header.as_byteswapped(order)
    header.set_xyzt_units("micron", "msec")
    header.set_dim_info(1, 0, 2)
    header["pixdim"][0], header["pixdim"][4:] = 0, [2.5, 0, -3, np.nan]  # odd, and common
    data = np.asarray(ugly.dataobj).astype(f"{order}i2")
    header["vox_offset"] = 352
    (tmp_path / "in.nii").write_bytes(header.binaryblock + bytes(4) + data.tobytes("F"))
    image = read(tmp_path / "in.nii")
    write(image.plus(torch.full((2, 8, 8), 0.1), RANGE), tmp_path / "out.nii.gz")
    out = header_of(tmp_path / "out.nii.gz")
    for field in GEOMETRY:
        want = header[field].astype(header[field].dtype.newbyteorder("="))
        assert out[field].tobytes() == want.tobytes(), field
    assert (out["scl_slope"], out["scl_inter"]) == (1, 0)


@pytest.mark.parametrize("codes", ["RAS", "LAS", "LPS", "RPS", "ARS", "PLS", "ALS", "PRS"])
def test_copies_stored_in_other_orientations_read_the_same(tmp_path: Path, codes: str) -> None:
    values, oblique = slice_of((9, 6, 1)), UGLY @ np.diag([-1, 1, 1, 1])  # close to RAS
    turn = ornt_transform(io_orientation(oblique), axcodes2ornt(codes))
    turned, affine = apply_orientation(values, turn), oblique @ inv_ornt_aff(turn, values.shape)
    # Spelt out, beside the code: first row anterior, first column the patient's right
    want = torch.from_numpy(values[::-1, ::-1, 0].T.copy()).float()[None]
    image = read(save(tmp_path / "in.nii", turned.astype("int16"), affine))
    assert torch.equal(image.pixels, want)
    write(image, tmp_path / "out.nii")
    assert np.array_equal(np.asarray(nib.load(tmp_path / "out.nii").dataobj), turned)
    mask = read_mask(save(tmp_path / "mask.nii", (values > 400).astype("uint8"), oblique), image)
    assert torch.equal(mask, (want > 400).float())


def test_slices_along_other_axes_stand_upright(tmp_path: Path) -> None:
    for shape, axes in (((1, 4, 5), "sagittal"), ((4, 1, 5), "coronal")):
        values = np.arange(20.0).reshape(shape)
        image = read(save(tmp_path / "x.nii", values, np.eye(4)))
        plane = values.reshape(4, 5).T[::-1, ::-1]  # superior at the top; anterior, or the patient's right, at the left
        assert np.array_equal(image.pixels[0].numpy(), plane), axes


def test_slope_and_intercept(tmp_path: Path) -> None:
    values = slice_of().astype("int16")
    stored = nib.Nifti1Image(values, UGLY)
    header = stored.header.copy()
    header["scl_slope"], header["scl_inter"], header["vox_offset"] = 0.5, -3, 352
    (tmp_path / "in.nii").write_bytes(header.binaryblock + bytes(4) + values.tobytes("F"))
    image = read(tmp_path / "in.nii")
    assert sorted(image.pixels.unique().tolist()) == sorted(set((values * 0.5 - 3).ravel().tolist()))
    write(image, tmp_path / "out.nii")
    out = nib.load(tmp_path / "out.nii")
    assert out.get_data_dtype() == "float32"
    assert np.array_equal(np.asarray(out.dataobj), values * 0.5 - 3)


def test_dtypes(tmp_path: Path) -> None:
    folder = case(tmp_path / "case")
    image = read(folder)
    changed = image.plus(torch.full((4, 9, 12), 0.3), RANGE)
    write(changed, tmp_path / "same")
    write(changed, tmp_path / "float", dtype="float32")
    write(changed, tmp_path / "one.nii", dtype="float32")
    for name in (path.name for path in image.source.paths):
        files = [nib.load(tmp_path / folder / name) for folder in ("same", "float")]
        assert [file.get_data_dtype() for file in files] == ["int16", "float32"]
        assert np.array_equal(*(np.asarray(file.dataobj) for file in files))
        assert np.array_equal(files[0].affine, files[1].affine)
    assert nib.load(tmp_path / "one.nii").get_data_dtype() == "float32"
    beyond = image.like(image.pixels + 40000)
    write(beyond, tmp_path / "beyond")  # more than an int16 holds
    assert same(read(tmp_path / "beyond").pixels, beyond.pixels)
    with pytest.raises(SettingsError, match="--dtype int8: give same or float32"):
        write(image, tmp_path / "o.nii", dtype="int8")
    assert not (tmp_path / "o.nii").exists()


def test_integers_beyond_float32_are_not_taken_for_exact(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.int32).reshape(3, 4, 1)
    values[0, 0, 0] = 2**24 + 1
    nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / "i.nii")
    write(read(tmp_path / "i.nii"), tmp_path / "o.nii")
    assert nib.load(tmp_path / "o.nii").get_data_dtype() == np.float32


def test_the_output_tells_nothing_of_the_patient(tmp_path: Path) -> None:
    canary = b"Jane Doe 1970"
    image = nib.Nifti1Image(slice_of().astype("int16"), UGLY)
    image.header["descrip"] = image.header["db_name"] = image.header["aux_file"] = canary
    image.header["intent_name"] = canary
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", canary * 3))
    nib.save(image, tmp_path / "in.nii")
    assert (tmp_path / "in.nii").read_bytes().count(canary) >= 6
    source = read(tmp_path / "in.nii")
    write(source, tmp_path / "out.nii")
    write(source, tmp_path / "plain.nii", synthetic=False)
    assert canary not in (tmp_path / "out.nii").read_bytes()
    assert header_of(tmp_path / "out.nii")["descrip"] == MARK.encode()
    assert header_of(tmp_path / "out.nii")["intent_name"] == b"synthetic"
    assert not source.source.synthetic
    assert read(tmp_path / "out.nii").source.synthetic
    assert not read(tmp_path / "plain.nii").source.synthetic


def test_windows(tmp_path: Path) -> None:
    mr, unit = slice_of((50, 40), high=5000), np.random.default_rng(2).uniform(size=(50, 40))
    mr[10, :20] = -7  # what resampling leaves
    top = float(np.percentile(mr[mr > 0], 99.5))
    ct = np.random.default_rng(3).normal(0, 400, (50, 40)).round()
    for values, window in (
        (mr, (0, top)),
        (unit, (0, 1)),
        (unit * 0.06, (0, 1)),
        (unit * 0.003, (0, np.percentile(unit * 0.003, 99.5))),  # diffusion in mm2/s
        (ct, (np.percentile(ct[ct != 0], 0.5), np.percentile(ct[ct > 0], 99.5))),
    ):
        image = read(save(tmp_path / "x.nii", values.astype("float32")))
        assert image.window[0].tolist() == pytest.approx(window, rel=1e-6)
    x = read(save(tmp_path / "x.nii", mr.astype("int16"))).normalised(None, RANGE)
    assert x.dtype == torch.float32
    assert (x.min().item(), x.max().item()) == RANGE
    whole = read(save(tmp_path / "x.nii", mr.astype("int16")))
    assert torch.allclose((x + 1) / 2 * top, whole.pixels.clamp(0, top), atol=1e-3)


def test_zero_is_background_in_mr_and_water_in_ct(tmp_path: Path) -> None:
    mr = read(save(tmp_path / "mr.nii", slice_of((20, 20)).astype("int16")))
    changed = mr.plus(torch.full((1, 20, 20), 0.5), RANGE)
    assert mr.background.sum() == 40
    assert torch.equal(changed.pixels == 0, mr.pixels == 0)
    assert (changed.pixels != mr.pixels)[0][~mr.background].all()
    ct = np.random.default_rng(3).integers(-1000, 1500, (40, 40))
    ct[5, 5] = 0
    assert not read(save(tmp_path / "ct.nii", ct.astype("int16"))).background.any()


# -------------------------------------------------------------------------------------------------------- several files


def case(folder: Path, words: tuple[str, ...] = ("flair", "t2", "seg", "t1", "t1ce"), **odd: np.ndarray) -> Path:
    folder.mkdir()
    for i, word in enumerate(words):
        save(folder / f"BraTS_001_{word}.nii.gz", slice_of(seed=i).astype("int16"), odd.get(word, UGLY))
    return folder


@pytest.mark.parametrize("words", [("flair", "t2", "seg", "t1", "t1ce"), ("t2f", "t2w", "seg", "t1n", "t1c")])
def test_a_case_of_four_files(tmp_path: Path, words: tuple[str, ...]) -> None:
    folder = case(tmp_path / "case", words)
    image = read(folder)
    assert image.channels == ("t1", "t1ce", "t2", "flair")
    alone = [read(path) for path in image.source.paths]
    assert torch.equal(image.pixels, torch.cat([one.pixels for one in alone]))
    assert [one.channels for one in alone] == [("t1",), ("t1ce",), ("t2",), ("flair",)]
    assert same(read([str(p) for p in reversed(image.source.paths)]).pixels, image.pixels)
    assert output_name(image.source.paths) == ("BraTS_001", "")
    changed = image.plus(torch.full((4, 9, 12), 0.3), RANGE)
    write(changed, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(p.name for p in image.source.paths)
    assert same(read(tmp_path / "out").pixels, changed.pixels)
    write(changed, tmp_path / "one.nii")
    one = nib.load(tmp_path / "one.nii")
    assert (one.shape, one.get_data_dtype()) == ((12, 9, 1, 4), "int16")
    assert same(read(tmp_path / "one.nii").pixels, changed.pixels)


def test_each_of_four_files_keeps_its_own_geometry(tmp_path: Path) -> None:
    (tmp_path / "case").mkdir()
    left_handed = UGLY @ np.diag([-1.0, 1, 1, 1])
    for i, word in enumerate(("t1", "t1ce", "t2", "flair")):
        image = nib.Nifti1Image(slice_of((13, 9, 1), seed=i).astype(("int16", "uint8", "float32", "int32")[i]), None)
        image.set_sform(left_handed + i * 1e-5, code=i + 1)
        image.set_qform(left_handed * 1.5, code=4 - i, strip_shears=True)
        image.header.set_xyzt_units(("mm", "micron", "meter", "unknown")[i])
        nib.save(image, tmp_path / "case" / f"{word}.nii.gz")
    image = read(tmp_path / "case")
    delta = torch.zeros(4, 16, 16)
    delta[:, :8] = 0.2
    changed = image.plus(delta, RANGE)
    write(changed, tmp_path / "out")
    write(changed, tmp_path / "one.nii")
    for path in image.source.paths:
        was, now = header_of(path), header_of(tmp_path / "out" / path.name)
        assert all(was[field].tobytes() == now[field].tobytes() for field in GEOMETRY)
        assert was["dim"].tobytes() == now["dim"].tobytes()
        voxels = [np.asarray(nib.load(p).dataobj) for p in (path, tmp_path / "out" / path.name)]
        differ = (voxels[0] != voxels[1])[..., 0]
        assert 0.2 < differ.mean() < 0.6
        assert not differ[:, :3].any()  # the lower rows as displayed, which nothing was added to
    one = header_of(tmp_path / "one.nii")
    assert all(one[field].tobytes() == header_of(image.source.paths[0])[field].tobytes() for field in GEOMETRY)


def test_files_that_do_not_belong_together(tmp_path: Path) -> None:
    moved = UGLY.copy()
    moved[0, 3] += 0.01
    folder = case(tmp_path / "moved", t2=moved)
    with pytest.raises(InputError, match=r"BraTS_001_t2\.nii\.gz and .*BraTS_001_t1\.nii\.gz: their affines"):
        read(folder)
    nearly = UGLY.copy()
    nearly[0, 3] += 0.0005
    assert read(case(tmp_path / "nearly", t2=nearly)).pixels.shape[0] == 4
    save(folder / "BraTS_001_t2.nii.gz", slice_of((12, 8)).astype("int16"), UGLY)
    with pytest.raises(InputError, match=r"t2\.nii\.gz and .*t1\.nii\.gz: .*12.* and .* pixels"):
        read(folder)
    save(folder / "BraTS_002_t1.nii", slice_of().astype("int16"), UGLY)
    with pytest.raises(InputError, match=r"001_t1\.nii\.gz and .*002_t1\.nii: two files of sequence t1"):
        read(folder)
    with pytest.raises(InputError, match=r"x\.nii: its name tells no sequence"):
        read([tmp_path / "x.nii", tmp_path / "y_t1.nii"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: a folder without NIfTI files"):
        read(tmp_path / "empty")
    with pytest.raises(InputError, match="no image file"):
        read([])


def test_names() -> None:
    told = {
        "BraTS20_Training_001_t1ce.nii": ("t1ce", "t1ce"), "BraTS-GLI-00000-000-t2f.nii.gz": ("flair", "t2f"),
        "brats_train_001_t1_080_w.nii.gz": ("t1", "t1"), "sub-01_space-T1w_FLAIR.nii.gz": ("flair", "FLAIR"),
        "W39_1998.09.19_Segm.nii": ("seg", "Segm"), "x_t1_seg.nii.gz": ("seg", "seg"), "T2w.nii": ("t2", "T2w"),
    }  # fmt: skip
    assert {name: sequence_of(name) for name in told} == told
    assert sequence_of("start1_flairs.nii") is None
    assert [is_image(n) for n in ("a.nii.gz", "a.NII", "b.JPeG", "c.txt", ".x.png", "._a.nii", "gz")] == [True] * 3 + [
        False
    ] * 4


def test_output_names(tmp_path: Path) -> None:
    picture = np.arange(48, dtype="uint8").reshape(4, 4, 3)
    for name, want in {"x.nii.gz": ("x", ".nii.gz"), "a.b.nii": ("a.b", ".nii"), "P.JPG": ("P", ".JPG")}.items():
        path = tmp_path / name
        PIL.Image.fromarray(picture).save(path) if "JPG" in name else save(path, slice_of().astype("int16"))
        assert output_name(read(path).source.paths) == want
    folder = tmp_path / "case7"
    folder.mkdir()
    for word in ("t1", "flair"):
        save(folder / f"{word}.nii", slice_of().astype("int16"))
    assert list(sequence_files(folder)) == ["t1", "flair"]
    assert output_name(read(folder).source.paths) == ("case7", "")


# ------------------------------------------------------------------------------------------------------------ pictures


def noise(*shape: int, dtype: str = "uint8") -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256 if dtype == "uint8" else 65536, shape).astype(dtype)


PICTURES = [
    *[(suffix, mode) for suffix in (".png", ".tif", ".tiff") for mode in ("L", "LA", "RGB", "RGBA", "I;16")],
    (".tif", "F"), (".bmp", "L"), (".bmp", "RGB"), (".webp", "RGB"), (".webp", "RGBA"),
]  # fmt: skip
BANDS = {"L": (), "LA": (2,), "RGB": (3,), "RGBA": (4,), "I;16": (), "F": ()}


def array_for(mode: str) -> np.ndarray:
    if mode == "F":
        return np.random.default_rng(0).normal(0, 50, (11, 7)).astype("float32")
    return noise(11, 7, *BANDS[mode], dtype="uint16" if mode == "I;16" else "uint8")


@pytest.mark.parametrize(("top", "end"), [(4095, 4095), (4096, 65535), (300, 4095)])
def test_pictures_of_twelve_bits_fill_the_range(tmp_path: Path, top: int, end: int) -> None:
    array = np.arange(400, dtype="uint16").reshape(20, 20).clip(0, top)
    array[3, 3] = top
    PIL.Image.fromarray(array).save(tmp_path / "x.png")
    image = read(tmp_path / "x.png")
    assert image.window.tolist() == [[0, end]]
    assert image.source.limits.tolist() == [[0, 65535]]
    write(image.plus(torch.zeros(1, 16, 16), RANGE), tmp_path / "out.png")
    assert np.array_equal(np.asarray(PIL.Image.open(tmp_path / "out.png")), array)


@pytest.mark.parametrize(("suffix", "mode"), PICTURES)
def test_pictures_round_trip(tmp_path: Path, suffix: str, mode: str) -> None:
    array, options = array_for(mode), {"lossless": True, "exact": True} if suffix == ".webp" else {}
    PIL.Image.fromarray(array).save(tmp_path / f"in{suffix}", **options)
    image = read(tmp_path / f"in{suffix}")
    colour = mode.startswith("RGB")
    assert image.channels == (("r", "g", "b") if colour else ("grey",))
    assert np.array_equal(image.pixels.numpy().transpose(1, 2, 0), np.atleast_3d(array)[..., : 3 if colour else 1])
    if mode != "F":
        assert image.window.tolist() == [[0, 65535 if mode == "I;16" else 255]] * len(image.pixels)
    write(image.plus(torch.zeros(len(image.pixels), 16, 16), RANGE), tmp_path / f"out{suffix}")
    with PIL.Image.open(tmp_path / f"out{suffix}") as out:
        assert out.mode == mode
        assert np.array_equal(np.asarray(out), array)
    assert read(tmp_path / f"out{suffix}").source.synthetic == (suffix != ".bmp")
    write(image, tmp_path / f"plain{suffix}", synthetic=False)
    assert not read(tmp_path / f"plain{suffix}").source.synthetic


def test_jpeg_in_jpeg_out(tmp_path: Path) -> None:
    ramp = np.add.outer(np.arange(40), np.arange(30)).astype("uint8")
    PIL.Image.fromarray(np.stack([ramp, ramp[::-1], 255 - ramp], 2)).save(tmp_path / "in.jpg", comment=b"Jane Doe")
    image = read(tmp_path / "in.jpg")
    write(image, tmp_path / "out.jpg")
    assert (read(tmp_path / "out.jpg").pixels - image.pixels).abs().mean() < 1
    assert b"Jane" not in (tmp_path / "out.jpg").read_bytes()
    with PIL.Image.open(tmp_path / "out.jpg") as out:
        assert out.info["comment"] == MARK.encode()
    write(image, tmp_path / "exact.png")
    assert same(read(tmp_path / "exact.png").pixels, image.pixels)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
def test_turned_photographs_stand_upright_and_lose_their_metadata(tmp_path: Path, suffix: str) -> None:
    block = np.kron(noise(3, 2, 3), np.ones((8, 8, 1), "uint8"))
    exif = PIL.Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Jane Doe"
    exif.get_ifd(0x8825)[1] = "N"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    lossless = {"lossless": True} if suffix == ".webp" else {}
    stored = PIL.Image.fromarray(np.rot90(block).copy())
    stored.save(tmp_path / f"in{suffix}", exif=exif, icc_profile=profile, dpi=(300, 150), **lossless)
    image = read(tmp_path / f"in{suffix}")
    assert image.pixels.shape == (3, 24, 16)
    assert np.abs(image.pixels.numpy().transpose(1, 2, 0) - block).mean() < (25 if suffix == ".jpg" else 0.01)
    write(image, tmp_path / f"out{suffix}")
    with PIL.Image.open(tmp_path / f"out{suffix}") as out:
        assert set(out.getexif()).isdisjoint({0x0112, 0x010F, 0x8825}) or out.getexif().get(0x0112) == 1
        assert out.info["icc_profile"] == profile
        if suffix != ".webp":
            assert out.info["dpi"] == pytest.approx((300, 150), abs=0.1)
    assert b"Jane" not in (tmp_path / f"out{suffix}").read_bytes()


def test_modes_are_converted_on_purpose(tmp_path: Path) -> None:
    rgb = PIL.Image.fromarray(noise(6, 5, 3))
    palette = rgb.quantize(8)
    palette.save(tmp_path / "p.png")
    assert np.array_equal(
        read(tmp_path / "p.png").pixels.numpy().transpose(1, 2, 0), np.asarray(palette.convert("RGB"))
    )
    palette.save(tmp_path / "pt.png", transparency=3)
    seen = read(tmp_path / "pt.png")
    write(seen, tmp_path / "pt_out.png")
    with PIL.Image.open(tmp_path / "pt_out.png") as out:
        assert out.mode == "RGBA"
        assert np.array_equal(np.asarray(out)[..., 3] == 0, np.asarray(palette) == 3)
    bits = PIL.Image.fromarray(noise(6, 5) > 99)
    bits.save(tmp_path / "bits.png")
    assert np.array_equal(read(tmp_path / "bits.png").pixels[0].numpy(), np.asarray(bits) * 255)
    rgb.convert("CMYK").save(tmp_path / "cmyk.tif", icc_profile=b"of the inks")
    assert torch.equal(read(tmp_path / "cmyk.tif").pixels.byte(), torch.from_numpy(noise(6, 5, 3)).movedim(2, 0))
    assert "icc_profile" not in read(tmp_path / "cmyk.tif").source.kind.options
    big = noise(6, 5, dtype="uint16")
    PIL.Image.frombytes("I;16B", (5, 6), big.astype(">u2").tobytes()).save(tmp_path / "big.tif")
    assert np.array_equal(read(tmp_path / "big.tif").pixels[0].numpy(), big)


DEEP = [(suffix, bands) for suffix in (".png", ".tif") for bands in (3, 4)]


def deep(suffix: str, array: np.ndarray, big: bool = False) -> bytes:
    """Return a file of 16-bit colours, spelt out beside the code under test: no filter, two strips."""
    rows, columns, bands = array.shape
    if suffix == ".png":
        lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
        start = png(b"IHDR", struct.pack(">IIBBBBB", columns, rows, 16, {3: 2, 4: 6}[bands], 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + start + png(b"IDAT", zlib.compress(lines)) + png(b"IEND", b"")
    order, split = ">" if big else "<", rows // 2 + 1
    strips = [part.astype(f"{order}u2").tobytes() for part in (array[:split], array[split:])]
    tags = {256: columns, 257: rows, 259: 1, 262: 2, 277: bands, 278: split} | ({338: 2} if bands == 4 else {})
    at = 8 + 2 + 12 * (len(tags) + 3) + 4
    lists = {
        258: (3, [16] * bands),
        273: (4, [at + 100, at + 100 + len(strips[0])]),
        279: (4, [len(x) for x in strips]),
    }
    entries, beside = {tag: struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags.items()}, b""
    for tag, (kind, values) in lists.items():
        entries[tag] = struct.pack(f"{order}HHII", tag, kind, len(values), at + len(beside))
        beside += struct.pack(f"{order}{len(values)}{'H' if kind == 3 else 'I'}", *values)
    head = struct.pack(f"{order}2sHIH", b"MM" if big else b"II", 42, 8, len(entries))
    return (
        head
        + b"".join(entries[tag] for tag in sorted(entries))
        + bytes(4)
        + beside.ljust(100, b"\0")
        + b"".join(strips)
    )


@pytest.mark.parametrize(("suffix", "bands"), DEEP)
@pytest.mark.parametrize("target", [".png", ".tiff"])
def test_colours_of_16_bits_are_exact(tmp_path: Path, suffix: str, bands: int, target: str) -> None:
    array = noise(11, 7, bands, dtype="uint16")
    (tmp_path / f"in{suffix}").write_bytes(deep(suffix, array))
    image = read(tmp_path / f"in{suffix}")
    assert np.array_equal(image.pixels.numpy().transpose(1, 2, 0), array[..., :3])
    assert image.window.tolist() == [[0, 65535]] * 3
    write(image.plus(torch.zeros(3, 16, 16), RANGE), tmp_path / f"out{target}")
    again = read(tmp_path / f"out{target}")
    assert same(again.pixels, image.pixels)
    assert again.source.synthetic
    if bands == 4:
        assert np.array_equal(again.source.kind.alpha, array[..., 3])
    with PIL.Image.open(tmp_path / f"out{target}") as out:  # another reader, though of the high bytes alone
        assert np.array_equal(np.asarray(out), array >> 8)
    changed = image.plus(torch.full((3, 11, 7), 1e-4), RANGE)
    assert (changed.pixels - image.pixels).max() == 3  # of 65535
    write(changed, tmp_path / f"changed{target}", synthetic=False)
    assert same(read(tmp_path / f"changed{target}").pixels, changed.pixels)
    assert not read(tmp_path / f"changed{target}").source.synthetic
    for other in (".jpg", ".bmp", ".webp"):
        with pytest.raises(InputError, match=r"cannot hold pixels of mode RGBA?;16; name the output \.png or \.tif"):
            write(image, tmp_path / f"o{other}")


def test_16_bit_colours_of_other_programs(tmp_path: Path) -> None:
    array = noise(40, 7, 3, dtype="uint16")
    (tmp_path / "big.tif").write_bytes(deep(".tif", array, big=True))
    assert np.array_equal(read(tmp_path / "big.tif").pixels.numpy().transpose(1, 2, 0), array)
    turned = PIL.Image.Exif()
    turned[0x0112] = 6
    chunk = png(b"eXIf", turned.tobytes()[6:]) + png(b"pHYs", struct.pack(">IIB", 11811, 5906, 1))
    data = deep(".png", array)
    (tmp_path / "turned.png").write_bytes(data[:33] + chunk + data[33:])
    image = read(tmp_path / "turned.png")
    assert np.array_equal(image.pixels.numpy().transpose(1, 2, 0), np.rot90(array, -1))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image.source.kind.options["icc_profile"] = profile
    for target in ("out.png", "out.tif"):
        write(image, tmp_path / target)
        with PIL.Image.open(tmp_path / target) as out:
            assert out.info["icc_profile"] == profile
            assert out.info["dpi"] == pytest.approx((300, 150), abs=0.1)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_truncated_16_bit_colours(tmp_path: Path, suffix: str) -> None:
    data, path = deep(suffix, noise(11, 7, 3, dtype="uint16")), tmp_path / f"cut{suffix}"
    for size in range(1, len(data), 17):
        path.write_bytes(data[:size])
        image = attempt(path)
        assert image is None or np.array_equal(image.pixels.numpy().transpose(1, 2, 0), noise(11, 7, 3, dtype="uint16"))


def test_16_bit_colours_that_would_be_lost(tmp_path: Path) -> None:
    data, path = deep(".png", noise(6, 5, 3, dtype="uint16")), tmp_path / "x.png"
    path.write_bytes(data[:33] + png(b"tRNS", bytes(6)) + data[33:])
    refused(path, "16 bits a colour would be lost")
    data, path = deep(".tif", noise(6, 5, 3, dtype="uint16")), tmp_path / "x.tif"
    planes_apart = data.replace(struct.pack("<HHII", 262, 4, 1, 2), struct.pack("<HHII", 284, 4, 1, 2))
    path.write_bytes(planes_apart)
    refused(path)
    path.write_bytes(data.replace(struct.pack("<HHII", 262, 4, 1, 2), struct.pack("<HHII", 262, 4, 1, 8)))  # L*a*b*
    refused(path)
    PIL.Image.fromarray(noise(6, 5, dtype="uint16")).save(tmp_path / "grey.png", transparency=7)
    refused(tmp_path / "grey.png", "16-bit grey with a transparent value")


# ----------------------------------------------------------------------------------------------------- the model's grid


@pytest.mark.parametrize("make", ["nifti", "picture"])
@pytest.mark.parametrize("size", [(64, 64), (24, 24), (32, 48), (37, 23), (16, 8), (40, 40)])
def test_change_reaches_only_its_place(tmp_path: Path, make: str, size: tuple[int, int]) -> None:
    values = noise(37, 23)
    if make == "nifti":
        image = read(save(tmp_path / "x.nii", values.astype("int16").T[::-1, ::-1], np.eye(4)))
    else:
        PIL.Image.fromarray(values).save(tmp_path / "x.png")
        image = read(tmp_path / "x.png")
    assert image.normalised(size, RANGE).shape == (1, *size)
    assert same(image.plus(torch.zeros(1, *size), RANGE).pixels, image.pixels)
    top, left, height, width = image._placed(size)
    delta = torch.zeros(1, *size)
    delta[:, top + height // 2 :] = 0.5
    changed = image.plus(delta, RANGE)
    touched = (changed.pixels != image.pixels)[0]
    step = -(-37 // height)
    assert not touched[: 37 * (height // 2) // height - 2 * step].any()
    assert touched[37 * (height // 2) // height + 2 * step :].float().mean() > 0.6  # the others are at the ends
    outside = torch.ones(size, dtype=torch.bool)
    outside[top : top + height, left : left + width] = False
    assert same(image.plus(outside[None].float(), RANGE).pixels, image.pixels)


def test_change_is_exact_in_the_files_own_units(tmp_path: Path) -> None:
    values = slice_of((20, 30), high=4000).astype("float32") + 0.25
    image = read(save(tmp_path / "x.nii", values, np.eye(4)))
    delta = torch.randn(1, 30, 20, generator=torch.Generator().manual_seed(0)) * 0.1
    changed = image.plus(delta, RANGE).pixels.double()
    gain = (image.window[0, 1] - image.window[0, 0]).double() / 2
    want = (image.pixels.double() + delta.double() * gain).clamp(min=min(0.25, image.window[0, 0].item()))
    assert torch.equal(changed.float(), want.float())
    above = image.pixels > image.window[0, 1]
    assert above.any()
    assert torch.equal(changed.float()[above], want.float()[above])  # clipped for the model, not in the file
    whole = read(save(tmp_path / "y.nii", values.astype("uint16"), np.eye(4)))
    rounded = whole.plus(delta, RANGE).pixels
    assert torch.equal(rounded, rounded.round())
    assert whole.plus(delta * 1e6, RANGE).pixels.aminmax() == (0, 65535)


def test_negative_zero_and_unit_range_stay(tmp_path: Path) -> None:
    values = np.random.default_rng(0).uniform(size=(8, 8)).astype("float32")
    values[3, 3] = -0.0
    image = read(save(tmp_path / "x.nii", values))
    assert same(image.plus(torch.zeros(1, 8, 8), RANGE).pixels, image.pixels)
    assert image.pixels.signbit().any()
    wide = image.plus(torch.full((1, 8, 8), 1.5), (0.0, 1.0))
    assert wide.pixels.max() == 1
    write(wide, tmp_path / "y.nii")
    assert read(tmp_path / "y.nii").window.tolist() == [[0, 1]]


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (33, 97), (64, 64)])
def test_cropping_fills_the_grid_and_what_is_cut_off_stays(tmp_path: Path, shape: tuple[int, int]) -> None:
    """Every pixel of the grid shows the image; a change comes back in place, and nothing beyond the crop changes."""
    ramp = np.linspace(20, 200, shape[0] * shape[1]).reshape(shape)
    PIL.Image.fromarray(ramp.round().astype(np.uint8)).save(tmp_path / "x.png")
    image = replace(read(tmp_path / "x.png"), crop=True)
    x = image.normalised((32, 32), (-1.0, 1.0))
    assert x.shape == (1, 32, 32)
    assert x.min() > -1  # no padding
    scale = max(32 / shape[0], 32 / shape[1])
    changed = image.plus(torch.ones(1, 32, 32), (-1.0, 1.0)).pixels != image.pixels
    rows, columns = (np.arange(n) for n in shape)
    inside = [abs((i + 0.5 - n / 2) * scale) < 16 for i, n in ((rows, shape[0]), (columns, shape[1]))]
    wanted = torch.from_numpy(inside[0][:, None] & inside[1][None])
    assert int((changed[0] != wanted).sum()) <= 2 * max(shape)  # a row or column at the border
    assert changed[0][shape[0] // 2, shape[1] // 2]
    if shape != (64, 64):
        assert not changed[0][0, 0]


def test_a_slice_slightly_larger_than_the_grid_is_only_cut(tmp_path: Path) -> None:
    data = np.random.default_rng(0).integers(1, 900, (34, 36)).astype(np.int16)
    image = replace(read(save(tmp_path / "x.nii", data)), crop=True)
    assert torch.equal(image.on_grid(image.pixels, (32, 32)), image.pixels[:, 2:34, 1:33])


def test_nearly_full_slices_are_padded_and_photographs_resized(tmp_path: Path) -> None:
    values = np.random.default_rng(0).uniform(size=(240, 240)).astype("float32")
    image = read(save(tmp_path / "x.nii", values, np.diag([-1.0, -1, 1, 1])))
    x = image.normalised((256, 256), (0.0, 1.0))
    assert same(x[:, 8:248, 8:248], image.pixels)
    assert x[:, :8].abs().max() == 0
    assert same(image.from_grid(x), image.pixels)
    PIL.Image.fromarray(noise(60, 60)).save(tmp_path / "x.png")
    assert (read(tmp_path / "x.png").normalised((64, 64), RANGE)[0, 0] > -1).any()
    PIL.Image.fromarray(noise(2, 4000)).save(tmp_path / "strip.png")
    assert read(tmp_path / "strip.png").normalised((64, 64), RANGE).shape == (1, 64, 64)


def test_like_carries_maps_of_other_channels(tmp_path: Path) -> None:
    image = read(case(tmp_path / "case"))
    difference = torch.randn(1, *image.pixels.shape[1:])
    write(image.like(difference), tmp_path / "map.nii.gz")
    out = nib.load(tmp_path / "map.nii.gz")
    assert (out.shape, out.get_data_dtype()) == ((12, 9), "float32")
    assert same(read(tmp_path / "map.nii.gz").pixels, difference)
    assert same(image.like(image.pixels * 2).pixels, image.pixels * 2)
    with pytest.raises(ValueError, match="the image is"):
        image.like(torch.zeros(4, 3, 3))


# --------------------------------------------------------------------------------------------------------------- masks


def test_masks(tmp_path: Path) -> None:
    image = read(save(tmp_path / "x.nii", slice_of().astype("int16"), np.eye(4)))
    labels = np.zeros((12, 9))
    assert read_mask(save(tmp_path / "empty.nii", labels, np.eye(4)), image).sum() == 0
    labels[2, 3], labels[7, 8] = 4, 1
    mask = read_mask(save(tmp_path / "m.nii", labels, np.eye(4)), image)
    assert mask.shape == (1, 9, 12)
    assert mask.nonzero().tolist() == [[0, 0, 4], [0, 5, 9]]
    drawn = PIL.Image.fromarray((mask[0].numpy() * 255).astype("uint8"))
    drawn.save(tmp_path / "m.png")
    assert torch.equal(read_mask(tmp_path / "m.png", image), mask)
    with pytest.raises(InputError, match=r"m2\.nii: the mask is 8 x 12, but .*x\.nii is 9 x 12"):
        read_mask(save(tmp_path / "m2.nii", labels[:, 1:], np.eye(4)), image)
    with pytest.raises(InputError, match=r"m3\.nii and .*x\.nii: their affines differ by 1"):
        read_mask(save(tmp_path / "m3.nii", labels, np.diag([1.0, 1, 1, 1]) + np.eye(4, k=3)), image)
    drawn.save(tmp_path / "m.jpg")
    with pytest.raises(InputError, match=r"m\.jpg: JPEG blurs"):
        read_mask(tmp_path / "m.jpg", image)
    with pytest.raises(InputError, match=r"m\.nii: a NIfTI mask, but"):
        read_mask(tmp_path / "m.nii", read(image_of_size(tmp_path / "p.png", 9, 12)))
    with pytest.raises(InputError, match=r"m4\.nii: a mask of 2 channels"):
        read_mask(save(tmp_path / "m4.nii", np.stack([labels, labels], 2), np.eye(4)), image)
    with pytest.raises(InputError, match="missing"):
        read_mask(tmp_path / "missing.nii", image)


def image_of_size(path: Path, rows: int, columns: int) -> Path:
    PIL.Image.fromarray(noise(rows, columns)).save(path)
    return path


# ------------------------------------------------------------------------------------------------------------- writing


def test_an_input_is_never_overwritten(tmp_path: Path) -> None:
    folder = case(tmp_path / "case")
    image = read(folder)
    before = {p: p.read_bytes() for p in folder.iterdir()}
    os.link(image.source.paths[0], tmp_path / "link.nii.gz")
    for target in (folder, image.source.paths[2], tmp_path / "link.nii.gz", tmp_path / "case" / ".." / "case"):
        with pytest.raises(InputError, match="inputs are never overwritten"):
            write(image, target)
    assert {p: p.read_bytes() for p in folder.iterdir()} == before


def test_formats_that_cannot_hold_the_image(tmp_path: Path) -> None:
    slice_, deep, clear = tmp_path / "x.nii", tmp_path / "deep.png", tmp_path / "clear.png"
    save(slice_, slice_of().astype("int16"))
    PIL.Image.fromarray(noise(5, 5, dtype="uint16")).save(deep)
    PIL.Image.fromarray(noise(5, 5, 4)).save(clear)
    for source, target in (
        (slice_, "o.png"),
        (slice_, "o"),
        (deep, "o.jpg"),
        (clear, "o.jpg"),
        (clear, "o.nii"),
        (clear, "o.gif"),
    ):
        with pytest.raises(InputError, match=rf"{target}: "):
            write(read(source), tmp_path / target)
    image = read(slice_)
    with pytest.raises(InputError, match="not all finite"):
        write(image.like(image.pixels * torch.nan), tmp_path / "o.nii")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clear.png", "deep.png", "x.nii"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = read(image_of_size(tmp_path / "in.png", 6, 6))
    write(image, tmp_path / "out.png")
    before = (tmp_path / "out.png").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for call in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(f"os.{call}", full)
            with pytest.raises(OSError, match="No space"):
                write(image.like(image.pixels.flip(1)), tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.png", "out.png"]


# ----------------------------------------------------------------------------------------------------------- bad input


def refused(path: Path, said: str = "") -> str:
    """Assert that reading is refused with one sentence that names the file, and return it."""
    with pytest.raises(InputError) as caught:
        read(path)
    message = str(caught.value)
    assert path.name in message
    assert said in message
    assert "\n" not in message
    assert message.endswith(".")
    return message


def attempt(path: Path) -> Image | None:
    """Read, or be refused by a sentence that names the file; any other exception is a failure."""
    try:
        return read(path)
    except InputError as error:
        return None if path.name in str(error) else pytest.fail(str(error))


def test_unusable_paths(tmp_path: Path) -> None:
    refused(tmp_path / "missing.nii", "no such file")
    (tmp_path / "zero.png").touch()
    refused(tmp_path / "zero.png", "empty")
    os.mkfifo(tmp_path / "pipe.nii")
    refused(tmp_path / "pipe.nii", "no regular file")
    (tmp_path / "folder.png").mkdir()
    refused(tmp_path / "folder.png", "a folder")
    (tmp_path / "loop.png").symlink_to("loop.png")
    refused(tmp_path / "loop.png")
    (tmp_path / "zero.nii").symlink_to("/dev/zero")
    refused(tmp_path / "zero.nii", "no regular file")
    with socket.socket(socket.AF_UNIX) as plug:
        plug.bind(str(tmp_path / "plug.tif"))
        refused(tmp_path / "plug.tif")
    (tmp_path / "x.dcm").write_bytes(b"x")
    refused(tmp_path / "x.dcm", ".nii.gz")
    refused(tmp_path / ("n" * 300 + ".png"))
    with pytest.raises(InputError, match=r"a\\nb\.png"):
        read(tmp_path / "a\nb.png")
    with pytest.raises(InputError, match=r"a\\x00b\.png"):
        read(tmp_path / "a\0b.png")


@pytest.mark.parametrize(
    "name",
    [
        b"-x",
        b"[red]",
        b"--help",
        b"a b;$(x)'\"",
        b"\x1b[31m",
        b"\xff\xfe",
        b"..x",
        "ünï".encode(),
        b"n" * 248,
        b"%s{0}",
    ],
)
@pytest.mark.parametrize("suffix", [b".png", b".nii.gz"])
def test_hostile_names_are_names(tmp_path: Path, name: bytes, suffix: bytes) -> None:
    path = tmp_path / os.fsdecode(name + suffix)
    if suffix == b".png":
        PIL.Image.fromarray(noise(5, 6)).save(tmp_path / "x.png")
        (tmp_path / "x.png").rename(path)
    else:
        save(tmp_path / "x.nii.gz", slice_of().astype("int16")).rename(path)
    image = read(path)
    assert output_name(image.source.paths) == (os.fsdecode(name), suffix.decode())
    write(image, tmp_path / "out" / path.name)
    assert same(read(tmp_path / "out" / path.name).pixels, image.pixels)
    path.write_bytes(b"damaged")
    with pytest.raises(InputError) as caught:
        read(path)
    assert str(caught.value).isprintable()


def test_links_are_followed_to_files_alone(tmp_path: Path) -> None:
    (tmp_path / "dangling.png").symlink_to("nowhere.png")
    refused(tmp_path / "dangling.png", "no such file")
    (tmp_path / "far").mkdir()
    image_of_size(tmp_path / "far" / "x.png", 6, 6)
    (tmp_path / "link.png").symlink_to("far/x.png")
    image = read(tmp_path / "link.png")
    for target in (tmp_path / "link.png", tmp_path / "far" / "x.png"):
        with pytest.raises(InputError, match="inputs are never overwritten"):
            write(image, target)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_files_without_permission(tmp_path: Path) -> None:
    image_of_size(tmp_path / "x.png", 6, 6).chmod(0)
    refused(tmp_path / "x.png", "Permission denied")


def test_bombs_take_no_memory(tmp_path: Path) -> None:
    good = save(tmp_path / "good.nii", slice_of().astype("int16")).read_bytes()
    (tmp_path / "bomb.nii.gz").write_bytes(gzip.compress(good + bytes(2**28)))
    (tmp_path / "bomb.png").write_bytes(header_png(11000, 11000))
    (tmp_path / "deep.png").write_bytes(header_png(11000, 11000, 16, 2))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name in ("bomb.nii.gz", "bomb.png", "deep.png"):
        refused(tmp_path / name)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB


def edited(**fields: Any) -> Callable[[bytes], bytes]:
    """Return an editor of a NIfTI-1 file's header fields."""

    def edit(data: bytes) -> bytes:
        header = nib.Nifti1Header(data[:348], check=False)
        for field, value in fields.items():
            header[field] = value
        return bytes(header.binaryblock) + data[348:]

    return edit


NAN, DIM = float("nan"), [3, 12, 9, 1, 1, 1, 1, 1]
BAD_NIFTI: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "truncated": (lambda d: d[:-1], "ends after"),
    "header only": (lambda d: d[:348], "ends after"),
    "half a header": (lambda d: d[:100], "no NIfTI header"),
    "text": (lambda d: b"hello world\n" * 50, "no NIfTI header"),
    "zeros": (lambda d: bytes(1000), "no NIfTI header"),
    "sizeof_hdr": (edited(sizeof_hdr=7), "no NIfTI header"),
    "pair": (edited(magic=b"ni1"), "single-file"),
    "analyze": (edited(magic=b""), "single-file"),
    "dim 0": (edited(dim=[3, 12, 0, 1, 1, 1, 1, 1]), "shape"),
    "dim -1": (edited(dim=[3, 12, -9, 1, 1, 1, 1, 1]), "shape"),
    "rank 0": (edited(dim=[0, *DIM[1:]]), "shape"),
    "rank 1": (edited(dim=[1, *DIM[1:]]), "shape"),
    "huge": (edited(dim=[4, 30000, 30000, 1, 9, 1, 1, 1]), "declares more than"),
    "volume": (edited(dim=[3, 12, 9, 155, 1, 1, 1, 1]), "give one slice [X, Y], [X, Y, 1] or [X, Y, 1, C]"),
    "volume of channels": (edited(dim=[4, 12, 9, 5, 4, 1, 1, 1]), "give one slice"),
    "two more axes": (edited(dim=[5, 12, 9, 1, 4, 4, 1, 1]), "give one slice"),
    "rgb": (edited(datatype=128, bitpix=24), "RGB"),
    "complex": (edited(datatype=32, bitpix=64), "complex"),
    "float128": (edited(datatype=1536, bitpix=128), "float128"),
    "unknown type": (edited(datatype=77), "x.nii"),
    "pixdim": (edited(pixdim=[1, NAN, 1, 1, 0, 0, 0, 0]), "voxel size"),
    "sform": (edited(srow_x=[NAN, 0, 0, 0]), "affine"),
    "singular": (edited(srow_x=[0, 0, 0, 0]), "affine"),
    "huge affine": (edited(srow_x=[1e30, 0, 0, 0]), "affine"),
    "parallel": (edited(srow_x=[1, 1, 0, 0], srow_y=[1, 1, 0, 0]), "affine"),
    "quaternion": (edited(sform_code=0, qform_code=1, quatern_b=5), "x.nii"),
    "offset": (edited(vox_offset=1e9), "byte"),
    "offset inside": (edited(vox_offset=100), "byte"),
    "offset NaN": (edited(vox_offset=NAN), "x.nii"),
    "slope": (edited(scl_slope=1e38), "beyond float32"),
    "intercept": (edited(scl_slope=1, scl_inter=NAN), "x.nii"),
}


@pytest.mark.parametrize("what", BAD_NIFTI)
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_malformed_nifti(tmp_path: Path, what: str, suffix: str) -> None:
    edit, said = BAD_NIFTI[what]
    good = save(tmp_path / "good.nii", slice_of((12, 9, 1)).astype("int16"), UGLY).read_bytes()
    data = edit(good)
    path = tmp_path / f"x.nii{suffix[4:]}"
    path.write_bytes(gzip.compress(data) if suffix == ".nii.gz" else data)
    refused(path, said)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_voxels_that_are_no_numbers(tmp_path: Path, value: float) -> None:
    values = slice_of().astype("float64")
    values[3, 4] = value
    refused(save(tmp_path / "x.nii", values), "1 voxels are NaN")


def test_constant_images(tmp_path: Path) -> None:
    refused(save(tmp_path / "x.nii", np.full((5, 5), 3, "int16")), "every pixel is 3")
    refused(save(tmp_path / "zero.nii.gz", np.zeros((5, 5, 1, 4), "float32")), "every pixel is 0, 0, 0, 0")
    PIL.Image.new("RGB", (5, 5), "red").save(tmp_path / "red.png")
    refused(tmp_path / "red.png", "every pixel is 255, 0, 0")


def test_flipped_bits_of_a_gz_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.nii.gz"
    good = gzip.compress(save(tmp_path / "good.nii", slice_of((6, 5)).astype("uint8"), UGLY).read_bytes(), mtime=0)
    path.write_bytes(good)
    want = read(path).pixels
    silent = 0
    for at in range(10 * 8, len(good) * 8, 3):  # behind the header of gzip, whose time and system may say anything
        data = bytearray(good)
        data[at // 8] ^= 1 << at % 8
        path.write_bytes(data)
        image = attempt(path)
        silent += image is not None and not torch.equal(image.pixels, want)
    assert silent == 0


def test_a_damaged_checksum_far_behind_the_voxels_is_noticed(tmp_path: Path) -> None:
    path = save(tmp_path / "x.nii.gz", noise(500, 400))  # more than any reader looks ahead
    data = bytearray(path.read_bytes())
    assert len(data) > 2**17
    for at in (len(data) // 2, -8):
        damaged = data.copy()
        damaged[at] ^= 4
        path.write_bytes(damaged)
        refused(path)


def test_gz_bombs(tmp_path: Path) -> None:
    good = save(tmp_path / "good.nii", slice_of().astype("int16")).read_bytes()
    path = tmp_path / "bomb.nii.gz"
    path.write_bytes(gzip.compress(good + bytes(2**26)))
    refused(path, "holds far more")
    path.write_bytes(gzip.compress(edited(dim=[4, 32767, 32767, 1, 7, 1, 1, 1])(good) + bytes(2**22)))
    refused(path, "declares more than")
    path.write_bytes(gzip.compress(good + bytes(99)))  # padding is no bomb
    assert read(path).pixels.shape == (1, 9, 12)


def png(chunk: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + chunk + data + struct.pack(">I", zlib.crc32(chunk + data))


def header_png(width: int, height: int, depth: int = 8, colour: int = 0) -> bytes:
    """Return a PNG of a few bytes that declares any size."""
    start = png(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + start + png(b"IDAT", zlib.compress(bytes(99))) + png(b"IEND", b"")


def test_bad_pictures(tmp_path: Path) -> None:
    frames = [PIL.Image.fromarray(noise(5, 5)), PIL.Image.fromarray(noise(5, 5)[::-1].copy())]
    for suffix in (".tif", ".png", ".webp"):
        frames[0].save(tmp_path / f"several{suffix}", save_all=True, append_images=frames[1:])
        refused(tmp_path / f"several{suffix}", "several pictures")
    for side in (8200, 10000, 12000, 30000):
        (tmp_path / "bomb.png").write_bytes(header_png(side, side))
        refused(tmp_path / "bomb.png", "pixels")
    (tmp_path / "deep.png").write_bytes(header_png(2, 2, depth=16, colour=4))
    refused(tmp_path / "deep.png", "16 bits a colour")
    (tmp_path / "short.png").write_bytes(header_png(8, 2_000_000))
    refused(tmp_path / "short.png", "says 8 x 2000000 pixels, more than 69 bytes can hold")
    even = PIL.Image.new("1", (6000, 6000))
    even.putpixel((0, 0), 1)
    even.save(tmp_path / "even.png", optimize=True)
    assert read(tmp_path / "even.png").pixels.shape == (1, 6000, 6000)  # the least that a picture can be
    frames[0].convert("I").save(tmp_path / "i32.tif")
    refused(tmp_path / "i32.tif", "mode I")
    PIL.Image.fromarray(np.array([[1, np.nan]], "float32")).save(tmp_path / "nan.tif")
    refused(tmp_path / "nan.tif", "NaN")
    frames[0].save(tmp_path / "gif.png", format="GIF")
    refused(tmp_path / "gif.png", "not a PNG, JPEG")
    frames[0].save(tmp_path / "eps.png", format="EPS")
    refused(tmp_path / "eps.png", "not a PNG, JPEG")
    (tmp_path / "text.png").write_text("hello")
    refused(tmp_path / "text.png", "not a PNG, JPEG")
    (tmp_path / "text.nii.gz").write_text("hello")
    refused(tmp_path / "text.nii.gz", "no NIfTI header")


@pytest.mark.parametrize(("suffix", "mode"), [*PICTURES, (".jpg", "RGB"), (".jpg", "L")])
def test_truncated_pictures(tmp_path: Path, suffix: str, mode: str) -> None:
    stored = io.BytesIO()
    PIL.Image.fromarray(array_for(mode)).save(stored, format=module.FORMATS[suffix])
    data = stored.getvalue()
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(data)
    pixels = read(path).pixels
    for size in range(1, len(data), max(1, len(data) // 40)):
        path.write_bytes(data[:size])
        image = attempt(path)
        assert image is None or torch.equal(image.pixels, pixels)  # only what no pixel needs was cut off


def test_flipped_bits_of_a_png_are_noticed(tmp_path: Path) -> None:
    stored = io.BytesIO()
    PIL.Image.fromarray(noise(4, 4)).save(stored, format="PNG")
    good, path, silent = stored.getvalue(), tmp_path / "x.png", 0
    for at in range(0, len(good) * 8, 3):
        data = bytearray(good)
        data[at // 8] ^= 1 << at % 8
        path.write_bytes(data)
        image = attempt(path)
        silent += image is not None and not np.array_equal(image.pixels[0].numpy(), noise(4, 4))
    assert silent == 0


@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz", "two.nii", "x.png", "x.tif", "x.jpg", "x.webp", "x.bmp"])
def test_random_damage_is_refused_or_read(tmp_path: Path, name: str) -> None:
    path, chance = tmp_path / name, random.Random(name)
    if ".nii" in name:
        save(path, slice_of().astype("int16"), UGLY, nib.Nifti2Image if name == "two.nii" else nib.Nifti1Image)
    else:
        PIL.Image.fromarray(noise(9, 8, 3)).save(path)
    good = path.read_bytes()
    for _ in range(300):
        data = bytearray(good)
        reach = 360 if chance.random() < 0.7 else len(data)  # most of it into the headers
        for _ in range(chance.choice((1, 2, 8))):
            data[chance.randrange(min(reach, len(data)))] = chance.choice((0, 1, 127, 128, 255, chance.randrange(256)))
        path.write_bytes(data)
        image = attempt(path)
        if image is None:
            continue
        assert image.normalised((16, 16), RANGE).isfinite().all()
        assert same(image.plus(torch.zeros(len(image.pixels), 16, 16), RANGE).pixels, image.pixels)


def test_threads_may_read(tmp_path: Path) -> None:
    paths = [image_of_size(tmp_path / f"{i}.png", 20 + i, 20) for i in range(40)]
    with ThreadPoolExecutor(4) as pool:
        shapes = [image.pixels.shape for image in pool.map(read, paths)]
    assert shapes == [(1, 20 + i, 20) for i in range(40)]


def test_records_are_frozen(tmp_path: Path) -> None:
    image = read(image_of_size(tmp_path / "x.png", 6, 6))
    with pytest.raises(AttributeError):
        image.pixels = torch.zeros(1)  # type: ignore[misc]
    assert isinstance(image, Image)
