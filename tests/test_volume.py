import struct
from itertools import permutations
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from knife import volume
from knife.errors import InputError
from knife.image import read
from knife.image import write as write_image

SHAPE = (11, 13, 12)


def affine(order=(0, 1, 2), signs=(1, 1, 1), turn=0.0) -> np.ndarray:
    """Return an affine whose voxel axes run along world axes `order`, of ugly voxel sizes, turned about one of them."""
    matrix = np.zeros((4, 4))
    for voxel, (world, sign, size) in enumerate(zip(order, signs, (0.9, 1.7, 3.1), strict=True)):
        matrix[world, voxel] = sign * size
    c, s = np.cos(turn), np.sin(turn)
    matrix[:3, :3] = (
        np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, c, -s], [0, s, c]]) @ matrix[:3, :3]
    )
    matrix[:, 3] = (-31.5, 17.25, 5.125, 1)
    return matrix


UGLY = [
    affine(),
    affine(signs=(-1, 1, -1)),
    affine((2, 0, 1)),
    affine((1, 2, 0), (1, -1, 1)),
    affine((0, 2, 1), (-1, -1, 1), turn=0.2),
    affine(turn=-0.3),
]


def voxels(seed=0, dtype=np.int16, shape=SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 900, shape).astype(dtype)


def save(path: Path, data: np.ndarray, matrix: np.ndarray, codes=(1, 2), slope=None) -> Path:
    image = nib.Nifti1Image(data, matrix)
    image.header.set_xyzt_units("mm", "sec")
    image.set_qform(matrix, codes[0])
    image.set_sform(matrix, codes[1])
    if slope:
        image.header.set_slope_inter(*slope)
    image.header["descrip"] = b"Jane Doe"
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return path


def same_geometry(a: Path, b: Path) -> None:
    one, two = nib.load(a), nib.load(b)
    assert one.shape == two.shape
    assert np.array_equal(one.affine, two.affine)
    for field in ("qform_code", "sform_code", "pixdim", "xyzt_units", "quatern_b", "quatern_c", "quatern_d", "srow_x",
                  "srow_y", "srow_z", "qoffset_x", "qoffset_y", "qoffset_z"):  # fmt: skip
        assert np.array_equal(one.header[field], two.header[field]), field


@pytest.mark.parametrize("matrix", UGLY, ids=range(len(UGLY)))
def test_a_slice_lies_where_the_volume_has_it(tmp_path, matrix):
    path = save(tmp_path / "x.nii.gz", voxels(), matrix)
    stack = volume.open_volume(path)
    whole = nib.load(path)
    axis = int(np.flatnonzero(nib.io_orientation(whole.affine)[:, 0] == 2)[0])
    assert stack.count == volume.axial_count(path) == SHAPE[axis]
    k = 4
    write_image(stack.slice(k), tmp_path / "slice.nii.gz")
    cut = nib.load(tmp_path / "slice.nii.gz")
    places = [slice(None)] * 3
    places[axis] = slice(k, k + 1)
    wanted = whole.slicer[tuple(places)]
    assert np.array_equal(np.asarray(cut.dataobj), np.asarray(wanted.dataobj))
    assert np.abs(cut.affine - wanted.affine).max() < 1e-4
    assert np.abs(cut.get_qform() - wanted.get_qform()).max() < 1e-4
    assert (cut.header["qform_code"], cut.header["sform_code"]) == (1, 2)
    assert torch.equal(read(tmp_path / "slice.nii.gz").pixels, stack.slice(k).pixels)
    frames = [image.source.kind[0].frame for image in (read(tmp_path / "slice.nii.gz"), stack.slice(k))]
    assert np.abs(frames[0] - frames[1]).max() < 1e-4


@pytest.mark.parametrize(
    ("field", "value", "usable"),
    [(76, 0.0, True), (80, -0.9, True), (256, 1.5, False)],
    ids=["pixdim[0] is 0", "a size below 0", "a quaternion longer than 1"],
)
def test_a_loose_qform_beside_an_sform_does_no_harm(tmp_path, field, value, usable):
    data = bytearray(save(tmp_path / "x.nii", voxels(), affine()).read_bytes())
    data[field : field + 4] = struct.pack("<f", value)
    (tmp_path / "x.nii").write_bytes(data)
    stack = volume.open_volume(tmp_path / "x.nii")
    write_image(stack.slice(4), tmp_path / "slice.nii")
    volume.write(stack, tmp_path / "y.nii")
    assert (tmp_path / "y.nii").read_bytes()[76:108] == bytes(data[76:108])  # pixdim, as it was
    before, after = (nib.load(tmp_path / name).header for name in ("x.nii", "slice.nii"))
    assert after["srow_z"][3] == pytest.approx(before["srow_z"][3] + 4 * 3.1)
    assert after["qoffset_z"] == pytest.approx(before["qoffset_z"] + (4 * 3.1 if usable else 0))


@pytest.mark.parametrize("matrix", UGLY, ids=range(len(UGLY)))
@pytest.mark.parametrize("codes", [(1, 2), (0, 1), (3, 0)])
def test_only_the_replaced_slice_changes(tmp_path, matrix, codes):
    path = save(tmp_path / "x.nii.gz", voxels(), matrix, codes)
    stack = volume.open_volume(path)
    k = 3
    changed = stack.with_slices({k: stack.slice(k).pixels + 5})
    volume.write(changed, tmp_path / "y.nii.gz")
    same_geometry(path, tmp_path / "y.nii.gz")
    before, after = (np.asarray(nib.load(p).dataobj) for p in (path, tmp_path / "y.nii.gz"))
    axis = stack.axis
    difference = np.moveaxis(after.astype(int) - before, axis, 0)
    assert after.dtype == np.int16
    assert (difference[k] == 5).all()
    assert not np.delete(difference, k, 0).any()
    assert torch.equal(volume.open_volume(path).pixels, stack.pixels), "the volume itself was changed"


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_slices_are_the_same_however_the_file_is_stored(tmp_path, order):
    """One head, its axes stored in any order and direction: the same pictures in the same places."""
    data = voxels()
    plain = nib.Nifti1Image(data, affine())
    turned = plain.as_reoriented(np.array([[i, (-1) ** (i + 1)] for i in np.argsort(order)]))
    one = volume.open_volume(save(tmp_path / "a.nii", data, plain.affine))
    other = volume.open_volume(save(tmp_path / "b.nii", np.asarray(turned.dataobj), turned.affine))
    flipped = turned.affine[2, other.axis] < 0
    pixels = other.pixels.flip(1) if flipped else other.pixels
    assert torch.equal(one.pixels, pixels)


def test_sequences_join_and_are_written_apart(tmp_path):
    for i, name in enumerate(["flair", "t1", "t2", "t1ce"]):
        save(tmp_path / f"p/p_{name}.nii.gz", voxels(i), UGLY[1])
    stack = volume.open_volume(tmp_path / "p")
    assert stack.channels == ("t1", "t1ce", "t2", "flair")
    assert torch.equal(stack.pixels[3], volume.open_volume(tmp_path / "p/p_flair.nii.gz").pixels[0])
    volume.write(stack, tmp_path / "out")
    for path in (tmp_path / "p").iterdir():
        same_geometry(path, tmp_path / "out" / path.name)
        assert np.array_equal(
            np.asarray(nib.load(path).dataobj), np.asarray(nib.load(tmp_path / "out" / path.name).dataobj)
        )
    volume.write(stack, tmp_path / "one.nii")
    assert nib.load(tmp_path / "one.nii").shape == (*SHAPE, 4)
    again = volume.open_volume(tmp_path / "one.nii")
    assert torch.equal(again.pixels, stack.pixels)


def test_four_dimensions_are_channels(tmp_path):
    path = save(tmp_path / "x.nii.gz", voxels(shape=(*SHAPE, 3)), UGLY[4])
    stack = volume.open_volume(path)
    assert stack.channels == ("0", "1", "2")
    volume.write(stack, tmp_path / "y.nii.gz")
    same_geometry(path, tmp_path / "y.nii.gz")
    assert np.array_equal(np.asarray(nib.load(path).dataobj), np.asarray(nib.load(tmp_path / "y.nii.gz").dataobj))


def test_scaled_and_float_volumes_keep_their_values(tmp_path):
    path = save(tmp_path / "x.nii.gz", voxels().astype(np.float32), UGLY[2], slope=(0.5, -3))
    stack = volume.open_volume(path)
    volume.write(stack, tmp_path / "y.nii.gz")
    assert nib.load(tmp_path / "y.nii.gz").get_data_dtype() == np.float32
    assert np.array_equal(nib.load(path).get_fdata().astype(np.float32), nib.load(tmp_path / "y.nii.gz").get_fdata())
    volume.write(volume.open_volume(save(tmp_path / "i.nii", voxels(), UGLY[2])), tmp_path / "f.nii", dtype="float32")
    assert nib.load(tmp_path / "f.nii").get_data_dtype() == np.float32


def test_nothing_of_the_patient_is_written_but_the_mark(tmp_path):
    stack = volume.open_volume(save(tmp_path / "x.nii", voxels(), UGLY[0]))
    volume.write(stack, tmp_path / "y.nii")
    data = (tmp_path / "y.nii").read_bytes()
    assert b"Jane" not in data
    assert b"synthetic: knife" in data
    assert volume.open_volume(tmp_path / "y.nii").source.synthetic


def test_the_window_is_the_volumes(tmp_path):
    data = voxels()
    data[:, :, 5] //= 100
    stack = volume.open_volume(save(tmp_path / "x.nii", data, UGLY[0]))
    high = np.percentile(data[data > 0], 99.5)
    assert stack.slice(5).window[0, 1] == stack.slice(0).window[0, 1] == pytest.approx(high)


def test_masks_are_cut_like_the_volume(tmp_path):
    path = save(tmp_path / "x.nii", voxels(), UGLY[3])
    labels = (voxels(1) > 700) * np.uint8(4)
    mask = save(tmp_path / "seg.nii.gz", labels, UGLY[3])
    stack = volume.open_volume(path)
    found = torch.stack([stack.mask(mask, k) for k in range(stack.count)], 1)
    assert torch.equal(found, (volume.open_volume(mask).pixels > 0).float())
    assert found.shape == stack.pixels.shape
    other = save(tmp_path / "other.nii.gz", labels, UGLY[0])
    with pytest.raises(InputError, match=r"other.nii.gz and .*x.nii: "):
        stack.mask(other, 0)
    with pytest.raises(InputError, match="there is no slice 99; its axial slices are 0 to"):
        stack.mask(mask, 99)


def test_a_mask_that_was_changed_is_read_anew(tmp_path):
    stack = volume.open_volume(save(tmp_path / "x.nii", voxels(), UGLY[0]))
    mask = save(tmp_path / "seg.nii", np.zeros(SHAPE, np.uint8), UGLY[0])
    assert not stack.mask(mask, 2).any()
    save(tmp_path / "seg.nii", np.ones(SHAPE, np.int16), UGLY[0])
    assert stack.mask(mask, 2).all()


def test_brain_is_what_is_not_zero_in_every_channel(tmp_path):
    data = np.zeros((10, 10, 12), np.int16)
    data[:5, :, 3] = 7
    stack = volume.open_volume(save(tmp_path / "x.nii", data + voxels(shape=data.shape) * 0, UGLY[0]))
    assert stack.brain(3) == 0.5
    assert stack.brain(4) == 0


@pytest.mark.parametrize("shape", [(9, 9), (9, 9, 1), (9, 9, 4), (9, 9, 1, 4), (1, 9, 9)])
def test_slices_are_no_volumes(tmp_path, shape):
    path = save(tmp_path / "x.nii", voxels(shape=shape), UGLY[0])
    assert volume.axial_count(path) is None
    with pytest.raises(InputError, match="are no volume"):
        volume.open_volume(path)


def test_what_cannot_be_a_volume_is_refused(tmp_path):
    save(tmp_path / "a/p_t1.nii", voxels(), UGLY[0])
    save(tmp_path / "a/p_t2.nii", voxels(), UGLY[1])
    with pytest.raises(InputError, match="their affines differ by"):
        volume.open_volume(tmp_path / "a")
    save(tmp_path / "b/p_t1.nii", voxels(), UGLY[0])
    save(tmp_path / "b/p_t2.nii", voxels(shape=(11, 13, 14)), UGLY[0])
    with pytest.raises(InputError, match="11 x 13 x 14 and 11 x 13 x 12 voxels"):
        volume.open_volume(tmp_path / "b")
    (tmp_path / "c").mkdir()
    with pytest.raises(InputError, match="a folder without NIfTI files named"):
        volume.open_volume(tmp_path / "c")
    with pytest.raises(InputError, match=r"gone.nii: no such file"):
        volume.open_volume(tmp_path / "gone.nii")
    path = save(tmp_path / "x.nii.gz", voxels(), UGLY[0])
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InputError, match=r"x.nii.gz"):
        volume.open_volume(path)
    save(tmp_path / "d/p_t1.nii", voxels(), UGLY[0])
    save(tmp_path / "d/p_t2.nii", voxels(shape=(11, 13, 12, 2)), UGLY[0])
    with pytest.raises(InputError, match=r"p_t2.nii: only NIfTI files of one channel can be joined"):
        volume.open_volume(tmp_path / "d")
    five = save(tmp_path / "five.nii", voxels(shape=(9, 9, 9, 2, 2)), UGLY[0])
    with pytest.raises(InputError, match=r"9 x 9 x 9 x 2 x 2 voxels are no volume"):
        volume.open_volume(five)


def test_too_many_voxels_are_refused_before_they_are_read(tmp_path, monkeypatch):
    path = save(tmp_path / "x.nii", voxels(), UGLY[0])
    monkeypatch.setattr(volume, "MAX_VOXELS", 100)
    with pytest.raises(InputError, match="more than 100 voxels"):
        volume.open_volume(path)


def test_an_input_is_never_overwritten(tmp_path):
    path = save(tmp_path / "x.nii", voxels(), UGLY[0])
    before = path.read_bytes()
    with pytest.raises(InputError, match="never overwritten"):
        volume.write(volume.open_volume(path), path)
    with pytest.raises(InputError, match="written as NIfTI"):
        volume.write(volume.open_volume(path), tmp_path / "x.png")
    assert path.read_bytes() == before


def test_voxels_that_are_no_numbers_are_not_written(tmp_path):
    opened = volume.open_volume(save(tmp_path / "x.nii", voxels(), UGLY[0]))
    opened.pixels[0, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match=r"out\.nii: the voxels to write are not all finite; nothing was written"):
        volume.write(opened, tmp_path / "out.nii")
    assert [path.name for path in tmp_path.iterdir()] == ["x.nii"]


def test_a_map_has_the_volumes_geometry(tmp_path):
    for name in ("t1", "t2"):
        save(tmp_path / f"p/p_{name}.nii.gz", voxels(), UGLY[4])
    stack = volume.open_volume(tmp_path / "p")
    volume.write(stack.like(stack.pixels.sum(0, keepdim=True) / 7), tmp_path / "map.nii.gz")
    same_geometry(tmp_path / "p/p_t1.nii.gz", tmp_path / "map.nii.gz")
    assert nib.load(tmp_path / "map.nii.gz").get_data_dtype() == np.float32


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_may_stand_behind_an_axis_of_time(tmp_path, channels):
    data = voxels(shape=(*SHAPE, 1, channels))
    path = save(tmp_path / "x.nii.gz", data, UGLY[4])
    stack = volume.open_volume(path)
    plain = volume.open_volume(save(tmp_path / "four.nii", data[..., 0, :], UGLY[4]))
    assert stack.channels == plain.channels == tuple(map(str, range(channels)))
    assert torch.equal(stack.pixels, plain.pixels)
    volume.write(stack.with_slices({4: stack.slice(4).pixels + 5}), tmp_path / "y.nii.gz")
    same_geometry(path, tmp_path / "y.nii.gz")
    difference = np.moveaxis(np.asarray(nib.load(tmp_path / "y.nii.gz").dataobj).astype(int) - data, stack.axis, 0)
    assert (difference[4] == 5).all()
    assert not np.delete(difference, 4, 0).any()
    write_image(stack.slice(4), tmp_path / "slice.nii")
    assert torch.equal(read(tmp_path / "slice.nii").pixels, stack.slice(4).pixels)
    volume.write(stack.like(stack.pixels[:1]), tmp_path / "map.nii")
    assert nib.load(tmp_path / "map.nii").shape == (data.shape if channels == 1 else SHAPE)


def thin(path: Path, told: bool, shape=(11, 13, 5)) -> Path:
    """Write a file of few slices, whose header tells that it has them or does not."""
    image = nib.Nifti1Image(voxels(shape=shape), UGLY[1])
    if told:
        image.header.set_dim_info(freq=0, phase=1, slice=2)
    nib.save(image, path)
    return path


def test_few_slices_are_a_volume_if_the_header_says_so(tmp_path):
    path = thin(tmp_path / "x.nii", told=True)
    assert volume.axial_count(path) == 5
    stack = volume.open_volume(path)
    assert stack.pixels.shape == (1, 5, 13, 11)
    with pytest.raises(InputError, match="a volume of 11 x 13 x 5 voxels"):
        read(path)
    volume.write(stack, tmp_path / "y.nii")
    assert volume.axial_count(tmp_path / "y.nii") == 5
    write_image(stack.slice(2), tmp_path / "slice.nii")
    assert read(tmp_path / "slice.nii").pixels.shape == (1, 13, 11)


def test_few_slices_are_channels_if_nothing_is_said_but_a_fourth_axis_is(tmp_path):
    assert len(read(thin(tmp_path / "x.nii", told=False)).pixels) == 5
    assert volume.axial_count(tmp_path / "x.nii") is None
    stack = volume.open_volume(thin(tmp_path / "four.nii", told=False, shape=(11, 13, 5, 1)))
    assert stack.count == 5
    mask = stack.mask(thin(tmp_path / "mask.nii", told=False), 2)  # few labels a pixel are no mask: these are slices
    assert torch.equal(mask[0], (stack.pixels[0, 2] > 0).float())
