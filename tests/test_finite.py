"""Pixels that are no number: refused by a sentence that names --nan, filled and counted where it is given."""

from pathlib import Path

import nibabel as nib
import numpy as np
import PIL.Image
import pytest
import torch
from trees import table

from knife import data, volume
from knife.data import Form, load
from knife.errors import InputError, SettingsError
from knife.finite import fill_of, finite
from knife.image import Image, read, read_mask, write
from knife.layouts import open_folder
from knife.masks import read_target_mask
from knife.prepared import key
from knife.survey import survey

BAD = (np.nan, np.inf, -np.inf, 1e300)
ADVICE = "or, if it is no mask, give --nan fill=0"


def noisy(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(1, 900, shape)


def spoilt(values: np.ndarray) -> np.ndarray:
    """Put one of each thing that is no number, or none to float32, into some values."""
    values.reshape(-1)[7 : 7 + len(BAD)] = BAD
    return values


def single(values: np.ndarray) -> np.ndarray:
    """Spoil some values, as float32."""
    with np.errstate(over="ignore"):
        return spoilt(values).astype(np.float32)


def save(path: Path, values: np.ndarray, slope: float = 1.0) -> Path:
    image = nib.Nifti1Image(values, np.diag([-1.5, 1.25, 3, 1]))
    image.header.set_slope_inter(slope, 0)
    nib.save(image, path)
    return path


def counted(image: Image, fill: float) -> int:
    return int((image.pixels == torch.tensor(fill)).sum())


# ----------------------------------------------------------------------------------------------------------- the option


@pytest.mark.parametrize(
    ("text", "fill"), [(None, None), ("fill=0", 0.0), ("fill=-1024", -1024.0), ("fill=1.5e3", 1500.0)]
)
def test_the_words_of_the_option(text: str | None, fill: float | None) -> None:
    assert fill_of(text) == fill


@pytest.mark.parametrize("text", ["", "0", "fill", "fill=", "fill=x", "fill=nan", "fill=inf", "fill=1e39", "drop=0"])
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(SettingsError, match=r"--nan .*: give fill= and a number .* such as fill=0"):
        fill_of(text)


def test_what_is_finite_is_handed_back_as_it_is() -> None:
    values = noisy((3, 4)).astype(np.float32)
    assert finite(values, Path("x"), 5.0, "voxels")[0] is values


# --------------------------------------------------------------------------------------------------------------- images


def test_a_slice_is_refused_or_filled_and_counted(tmp_path: Path) -> None:
    values = spoilt(noisy((9, 8, 1, 2)))
    path = save(tmp_path / "x.nii.gz", values)
    with pytest.raises(InputError, match=f"x.nii.gz: 4 voxels are NaN, infinite or beyond float32; .*{ADVICE}"):
        read(path)
    image = read(path, fill=-3.0)
    assert image.source.filled == 4
    assert counted(image, -3.0) == 4
    clean = read(save(tmp_path / "clean.nii", np.where(np.abs(values) < 1e30, values, -3)), fill=7.0)
    assert torch.equal(clean.pixels, image.pixels)  # a fill that nothing needs changes nothing
    assert clean.source.filled == 0


def test_the_fill_is_in_units_of_the_file_whatever_its_slope(tmp_path: Path) -> None:
    values = single(noisy((9, 8, 1)))
    assert counted(read(save(tmp_path / "x.nii", values, slope=2.5), fill=7.0), 7.0) == 4


def test_files_of_one_case_count_together_and_results_are_finite(tmp_path: Path) -> None:
    for i, name in enumerate(["t1", "flair"]):
        save(tmp_path / f"x_{name}.nii", single(noisy((9, 8, 1), i)))
    image = read(tmp_path, fill=0.0)
    assert image.source.filled == 8
    write(image.plus(torch.full((2, 8, 8), 0.1), (-1, 1)), tmp_path / "out.nii")
    after = nib.load(tmp_path / "out.nii").get_fdata()
    assert np.isfinite(after).all()
    assert (after == 0).any()


def test_a_float_picture(tmp_path: Path) -> None:
    PIL.Image.fromarray(single(noisy((9, 8)))).save(tmp_path / "x.tif")
    with pytest.raises(InputError, match=f"x.tif: 4 pixels are NaN, .*{ADVICE}"):
        read(tmp_path / "x.tif")
    image = read(tmp_path / "x.tif", fill=0.0)
    assert (image.source.filled, counted(image, 0.0)) == (4, 4)


def test_nothing_but_nan_is_a_constant_image(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="every pixel is 0; a constant image shows nothing"):
        read(save(tmp_path / "x.nii", np.full((5, 5), np.nan)), fill=0.0)


def test_a_volume_and_its_slices(tmp_path: Path) -> None:
    path = save(tmp_path / "x.nii", spoilt(noisy((9, 8, 12))))
    with pytest.raises(InputError, match=ADVICE):
        volume.open_volume(path)
    stack = volume.open_volume(path, fill=0.0)
    assert stack.source.filled == stack.slice(3).source.filled == 4
    assert int((stack.pixels == 0).sum()) == 4
    assert bool(stack.pixels.isfinite().all())


def test_labels_are_never_filled(tmp_path: Path) -> None:
    image = read(save(tmp_path / "x.nii", spoilt(noisy((9, 8, 1)))), fill=5.0)
    mask = save(tmp_path / "mask.nii", spoilt(noisy((9, 8, 1))))
    stack = volume.open_volume(save(tmp_path / "y.nii", spoilt(noisy((9, 8, 12)))), fill=5.0)
    masks = save(tmp_path / "masks.nii", spoilt(noisy((9, 8, 12))))
    for ask in (
        lambda: read_mask(mask, image),
        lambda: read_target_mask(str(mask), image),
        lambda: stack.mask(masks, 2),
    ):
        with pytest.raises(InputError, match="correct the file, or, if it is no mask"):
            ask()


# --------------------------------------------------------------------------------------------------------- data folders


def test_a_data_folder_skips_or_fills(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / f"{i}.nii", noisy((16, 16), i).astype(np.float32))
    save(tmp_path / "bad.nii", spoilt(noisy((16, 16), 4)))
    save(tmp_path / "deep.nii", spoilt(noisy((16, 16, 10), 5)))
    entries = open_folder(tmp_path, layout="flat").entries
    form = Form(("0",), (16, 16), (-1.0, 1.0))
    skipped = load(entries, form).skipped
    assert set(skipped) == {"bad.nii", *(f"deep.nii:{k:03d}" for k in range(10))}
    assert all(ADVICE in why for why in skipped.values())
    loaded = load(entries, form._replace(fill=0.0))
    assert loaded.skipped == {}
    assert all(bool(case.pixels.isfinite().all()) for case in loaded.cases)
    assert key({}, form) != key({}, form._replace(fill=0.0))


def test_the_channels_are_those_of_filled_images(tmp_path: Path) -> None:
    save(tmp_path / "bad_t1.nii", spoilt(noisy((16, 16))))
    entries = open_folder(table(tmp_path, "image", "bad_t1.nii")).entries
    assert data.channels_of(entries, fill=0.0) == ("t1",)
    with pytest.raises(InputError, match=ADVICE):
        data.channels_of(entries)


def test_a_survey_tells_what_was_filled(tmp_path: Path) -> None:
    save(tmp_path / "bad.nii", spoilt(noisy((16, 16))))
    save(tmp_path / "good.nii", noisy((16, 16), 1))
    assert any(ADVICE in why for why in survey(tmp_path)["problems"]["unreadable"])
    report = survey(tmp_path, fill=0.0)
    assert "unreadable" not in report["problems"]
    assert report["notes"] == ["bad.nii: 4 of its pixels were no number, and have been filled."]
