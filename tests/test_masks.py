"""Masks as targets: the world decides where a NIfTI mask lies, numbers where a shape does."""

from pathlib import Path

import nibabel as nib
import numpy as np
import PIL.Image
import pytest
import torch

from knife.errors import InputError, TargetError
from knife.image import Image, read, read_mask
from knife.masks import read_target_mask, soft_edged

UGLY = np.array([[-0.83, 0.21, 0.4, 71.3], [0.17, 1.1, -0.3, -55.5], [0.09, 0.35, 2.9, 12.25], [0, 0, 0, 1]])


def save(path: Path, values: np.ndarray, affine: np.ndarray) -> Path:
    nib.save(nib.Nifti1Image(values, affine, dtype=values.dtype), path)
    return path


def slice_in(folder: Path, shape: tuple[int, ...] = (23, 17, 1), affine: np.ndarray = UGLY) -> Image:
    values = np.random.default_rng(0).integers(1, 900, shape).astype("int16")
    return read(save(folder / "x.nii", values, affine))


def picture_in(folder: Path, rows: int = 20, columns: int = 30) -> Image:
    PIL.Image.fromarray(np.arange(rows * columns).reshape(rows, columns).astype("uint8")).save(folder / "x.png")
    return read(folder / "x.png")


def moved(affine: np.ndarray, start: tuple[float, ...], step: tuple[float, ...]) -> np.ndarray:
    """Return the affine of a grid whose voxel 0 lies at `start` of another grid, and goes by `step` of its voxels."""
    inner = np.diag([*step, 1.0])
    inner[:3, 3] = start
    return affine @ inner


# ----------------------------------------------------------------------------------------------------------- the world


def test_a_mask_on_the_same_grid_is_read_as_ever(tmp_path: Path) -> None:
    image = slice_in(tmp_path)
    labels = (np.random.default_rng(1).uniform(size=(23, 17)) > 0.6).astype("uint8") * 4
    for name, values in (("flat.nii", labels), ("deep.nii.gz", labels[..., None]), ("4d.nii", labels[..., None, None])):
        path = save(tmp_path / name, values, UGLY)
        mask = read_target_mask(str(path), image)
        assert torch.equal(mask, read_mask(path, image))
        assert mask.dtype == torch.float32


@pytest.mark.parametrize("flips", [(1, 1), (-1, 1), (1, -1), (-1, -1)])
@pytest.mark.parametrize("factor", [2, 3])
def test_a_coarser_mask_covers_whole_blocks(tmp_path: Path, factor: int, flips: tuple[int, int]) -> None:
    image = slice_in(tmp_path, (24, 18, 1))
    coarse = (np.random.default_rng(2).uniform(size=(24 // factor, 18 // factor, 1)) > 0.5).astype("uint8")
    half = (factor - 1) / 2
    starts = [half if f > 0 else n - 1 - half for f, n in zip(flips, (24, 18), strict=True)]
    affine = moved(UGLY, (*starts, 0.0), (flips[0] * factor, flips[1] * factor, 1))
    mask = read_target_mask(str(save(tmp_path / "m.nii", coarse, affine)), image)
    full = np.kron(coarse[:: flips[0], :: flips[1]], np.ones((factor, factor, 1), "uint8"))
    assert torch.equal(mask, read_mask(save(tmp_path / "full.nii", full, UGLY), image))


def test_a_finer_mask_and_a_turned_one(tmp_path: Path) -> None:
    image = slice_in(tmp_path, (8, 6, 1))
    labels = (np.random.default_rng(3).uniform(size=(8, 6, 1)) > 0.5).astype("uint8")
    want = read_mask(save(tmp_path / "same.nii", labels, UGLY), image)
    fine = np.kron(labels, np.ones((3, 3, 1), "uint8"))
    path = save(tmp_path / "fine.nii", fine, moved(UGLY, (-1 / 3, -1 / 3, 0), (1 / 3, 1 / 3, 1)))
    assert torch.equal(read_target_mask(str(path), image), want)
    path = save(tmp_path / "turned.nii", labels.swapaxes(0, 2), UGLY[:, [2, 1, 0, 3]])  # [1, Y, X], the same places
    assert torch.equal(read_target_mask(str(path), image), want)


def test_a_cropped_mask_is_nothing_outside(tmp_path: Path) -> None:
    image = slice_in(tmp_path, (10, 8, 1))
    path = save(tmp_path / "m.nii", np.ones((3, 2, 1), "uint8"), moved(UGLY, (4, 5, 0), (1, 1, 1)))
    full = np.zeros((10, 8, 1), "uint8")
    full[4:7, 5:7] = 1
    want = read_mask(save(tmp_path / "full.nii", full, UGLY), image)
    assert want.sum() == 6
    assert torch.equal(read_target_mask(str(path), image), want)


def test_a_volume_gives_the_slice_where_the_image_lies(tmp_path: Path) -> None:
    labels = (np.random.default_rng(4).uniform(size=(9, 7, 11)) > 0.5).astype("uint8")
    path = save(tmp_path / "m.nii.gz", labels, UGLY)
    for k in (0, 6, 10):
        image = slice_in(tmp_path, (9, 7, 1), moved(UGLY, (0, 0, k), (1, 1, 1)))
        want = read_mask(save(tmp_path / "one.nii", labels[..., k : k + 1], image_affine(tmp_path)), image)
        assert torch.equal(read_target_mask(str(path), image), want), k


def image_affine(folder: Path) -> np.ndarray:
    return nib.load(folder / "x.nii").affine


def test_masks_that_lie_elsewhere_are_refused(tmp_path: Path) -> None:
    image = slice_in(tmp_path, (9, 7, 1))
    labels = np.ones((9, 7, 1), "uint8")
    for start in ((0, 0, 0.6), (0, 0, -2), (9, 0, 0), (0, -7.6, 0)):
        path = save(tmp_path / "m.nii", labels, moved(UGLY, start, (1, 1, 1)))
        with pytest.raises(InputError, match=r"m\.nii and .*x\.nii: no place of the world lies in both"):
            read_target_mask(str(path), image)
    near = save(tmp_path / "m.nii", labels, moved(UGLY, (0, 0, 0.4), (1, 1, 1)))
    assert read_target_mask(str(near), image).all()
    with pytest.raises(InputError, match=r"m\.nii and .*x\.nii: their planes are \d+ degrees apart"):
        read_target_mask(str(save(tmp_path / "m.nii", labels, UGLY[:, [0, 2, 1, 3]])), image)
    tilt = np.eye(4)
    tilt[2, 0] = 0.005  # under a third of a degree: rounding of headers
    assert read_target_mask(str(save(tmp_path / "m.nii", labels, tilt @ UGLY)), image).any()


def test_files_that_are_no_masks(tmp_path: Path) -> None:
    image = slice_in(tmp_path, (9, 7, 1))
    two = save(tmp_path / "two.nii", np.ones((9, 7, 1, 2), "uint8"), UGLY)
    with pytest.raises(InputError, match=r"two\.nii: a mask of 2 channels"):
        read_target_mask(str(two), image)
    with pytest.raises(InputError, match=r"gone\.nii: no such file"):
        read_target_mask(str(tmp_path / "gone.nii"), image)
    (tmp_path / "text.nii").write_text("hello")
    with pytest.raises(InputError, match=r"text\.nii: no NIfTI header"):
        read_target_mask(str(tmp_path / "text.nii"), image)
    PIL.Image.new("L", (5, 5)).save(tmp_path / "m.png")
    with pytest.raises(InputError, match=r"m\.png: the mask is 5 x 5, but"):
        read_target_mask(str(tmp_path / "m.png"), image)
    with pytest.raises(InputError, match=r"two\.nii: a NIfTI mask, but .*x\.png has no geometry"):
        read_target_mask(str(two), picture_in(tmp_path, 7, 9))


# -------------------------------------------------------------------------------------------------------------- shapes


def test_rectangles_have_the_size_they_say(tmp_path: Path) -> None:
    image = picture_in(tmp_path)
    mask = read_target_mask("rectangle:4,7,10,3", image)
    want = torch.zeros(1, 20, 30)
    want[:, 7:10, 4:14] = 1
    assert torch.equal(mask, want)
    assert torch.equal(
        read_target_mask("rectangle:10%,25%, 50% ,10%", image), read_target_mask("rectangle:3,5,15,2", image)
    )
    assert read_target_mask("rectangle:-5,-5,6,7", image).nonzero().tolist() == [[0, 0, 0], [0, 1, 0]]


def test_ellipses_are_centred_and_upright(tmp_path: Path) -> None:
    mask = read_target_mask("ellipse:12,6,5,2", picture_in(tmp_path))[0]
    assert mask[6].nonzero().flatten().tolist() == list(range(7, 18))
    assert mask[:, 12].nonzero().flatten().tolist() == list(range(4, 9))
    assert torch.equal(mask[2:11], mask[2:11].flip(0))
    big = read_target_mask("ellipse:50%,50%,20,15", picture_in(tmp_path, 60, 60))
    assert big.sum().item() == pytest.approx(np.pi * 20 * 15, rel=0.02)


def test_shapes_lie_on_the_displayed_image(tmp_path: Path) -> None:
    image = slice_in(tmp_path)  # [23, 17] is stored, 17 rows of 23 pixels are seen
    mask = read_target_mask("rectangle:20,1,2,3", image)
    assert mask.shape == image.pixels.shape
    assert mask.nonzero().amin(0).tolist() == [0, 1, 20]


@pytest.mark.parametrize(
    "text",
    ["ellipse:", "ellipse:1,2,3", "ellipse:1,2,3,4,5", "ellipse:a,b,c,d", "ellipse:1,2,nan,4", "rectangle:1,2,inf,4",
     "ellipse:5,5,0,4", "rectangle:5,5,2,-4", "rectangle:1;2;3;4", "ellipse:%,1,1,1"],
)  # fmt: skip
def test_bad_numbers_are_told_the_form(tmp_path: Path, text: str) -> None:
    form = "ellipse:cx,cy,rx,ry" if text.startswith("e") else "rectangle:x,y,w,h"
    with pytest.raises(TargetError, match=rf"give {form} in pixels of the displayed image.* such as") as caught:
        read_target_mask(text, picture_in(tmp_path))
    assert str(caught.value).startswith(f"--target {text}: ")


@pytest.mark.parametrize("text", ["circle:1,2,3", "mask", "0.3", "ellipse", "a\nb"])
def test_what_is_neither_file_nor_shape(tmp_path: Path, text: str) -> None:
    with pytest.raises(
        TargetError, match=r"neither a mask file nor a shape; .*ellipse:cx,cy,rx,ry, rectangle:x,y,w,h\.$"
    ):
        read_target_mask(text, picture_in(tmp_path))


@pytest.mark.parametrize("text", ["ellipse:100,5,3,3", "rectangle:0,20,5,5", "ellipse:5.5,5.5,0.1,0.1"])
def test_shapes_beside_the_image(tmp_path: Path, text: str) -> None:
    with pytest.raises(TargetError, match=r"covers no pixel of .*x\.png, 30 wide and 20 high"):
        read_target_mask(text, picture_in(tmp_path))


def test_a_soft_edge_rises_within_the_mask_and_leaves_little_ones_alone() -> None:
    mask = torch.zeros(1, 24, 24)
    mask[0, 4:18, 6:20] = 1
    soft = soft_edged(mask)
    assert not soft[mask == 0].any()
    assert soft[0, 11, 13] == 1
    row = soft[0, 11, 6:14]
    assert (row.diff() >= 0).all()
    assert row[0] < 0.5
    small = torch.zeros(1, 24, 24)
    small[0, 4:6, 4:6] = 1
    assert torch.equal(soft_edged(small), small)
    assert not soft_edged(torch.zeros(1, 9, 9)).any()
