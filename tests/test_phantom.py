"""Tests of the phantoms: they are what they say, to the pixel, and twins differ by their tumour alone."""

import csv

import nibabel as nib
import numpy as np
import pytest
import torch

from knife.errors import InputError, SettingsError
from knife.phantom import phantom, write_dataset

INDICES = range(24)


@pytest.fixture(scope="module")
def phantoms():
    return [phantom(i) for i in INDICES]


def tumour_touch(healthy, diseased):
    """Return the pixels [S, S] in which two twins differ in any channel."""
    return (healthy.pixels != diseased.pixels).any(axis=0)


def distance_to(region):
    """Return each pixel's distance [S, S] to the nearest pixel of `region`."""
    rows, columns = np.nonzero(region)
    grid = np.indices(region.shape)
    return np.sqrt((grid[0][..., None] - rows) ** 2 + (grid[1][..., None] - columns) ** 2).min(axis=-1)


def test_shapes_and_types(phantoms):
    for case in phantoms:
        assert case.pixels.shape == (4, 64, 64)
        assert case.pixels.dtype == np.float32
        assert case.mask.shape == case.brain.shape == (64, 64)
        assert case.mask.dtype == np.uint8
        assert case.brain.dtype == bool


def test_the_same_arguments_give_the_same_phantom():
    a, b = phantom(7, seed=3, relative_size=0.1), phantom(7, seed=3, relative_size=0.1)
    np.testing.assert_array_equal(a.pixels, b.pixels)
    np.testing.assert_array_equal(a.mask, b.mask)


def test_generation_leaves_the_global_random_state_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    phantom(1)
    assert torch.equal(torch.rand(3), expected)


def test_index_and_seed_both_matter(phantoms):
    assert np.abs(phantoms[0].pixels - phantoms[1].pixels).mean() > 0.02
    assert np.abs(phantoms[0].pixels - phantom(0, seed=1).pixels).mean() > 0.02


def test_range_and_background(phantoms):
    for case in phantoms:
        assert np.isfinite(case.pixels).all()
        assert case.pixels.min() >= 0
        assert case.pixels.max() <= 1
        assert not case.pixels[:, ~case.brain].any()
        assert case.pixels[:, case.brain].mean() > 0.3


def test_brain_fills_the_slice_and_stays_inside():
    for index in range(60):
        brain = phantom(index, relative_size=0).brain
        edge = np.concatenate([brain[0], brain[-1], brain[:, 0], brain[:, -1]])
        assert edge.sum() <= 5  # a frontal pole may just reach it
        assert 0.25 < brain.mean() < 0.65


def test_size_is_that_of_the_mask(phantoms):
    for case in phantoms:
        assert case.size == pytest.approx((case.mask > 0).sum() / case.brain.sum(), abs=1e-12)
        assert not (case.mask > 0)[~case.brain].any()
        assert set(np.unique(case.mask)) <= {0, 1, 2, 4}


@pytest.mark.parametrize("wanted", [0.05, 0.1, 0.2, 0.3])
def test_a_forced_size_is_met(wanted):
    for index in range(10):
        case = phantom(index, relative_size=wanted)
        assert case.size == pytest.approx(wanted, abs=0.001)
        assert {1, 2, 4} <= set(np.unique(case.mask))


def test_healthy_means_an_empty_mask():
    case = phantom(5, relative_size=0)
    assert case.size == 0
    assert not case.mask.any()


def test_sizes_are_spread():
    sizes = np.array([phantom(i, size=16).size for i in range(300)])
    ill = sizes[sizes > 0]
    assert 0.37 < (sizes == 0).mean() < 0.53
    assert ill.min() < 0.03
    assert 0.3 < ill.max() < 0.36
    assert 0.1 < np.median(ill) < 0.2


def test_twins_share_anatomy_noise_and_contrast_outside_the_tumour():
    for index in range(10):
        healthy, small, large = (phantom(index, relative_size=r) for r in (0.0, 0.03, 0.15))
        np.testing.assert_array_equal(healthy.brain, large.brain)
        for ill, untouched in ((small, 0.75), (large, 0.5)):
            changed, inside = tumour_touch(healthy, ill), ill.mask > 0
            assert not changed[distance_to(inside) > 9].any()
            assert changed[inside].mean() > 0.99
            assert (~changed)[healthy.brain].mean() > untouched
            assert np.abs(healthy.pixels - ill.pixels)[:, healthy.brain & ~inside].mean() < 0.02


def test_twins_grow_one_tumour():
    small, large = phantom(3, relative_size=0.05), phantom(3, relative_size=0.2)
    assert (large.mask > 0)[small.mask > 0].all()


def test_mass_effect_moves_tissue_outside_of_the_mask():
    healthy, ill = phantom(3, relative_size=0), phantom(3, relative_size=0.2)
    moved = tumour_touch(healthy, ill) & (ill.mask == 0)
    assert np.abs(healthy.pixels - ill.pixels)[:, moved].max() > 0.1


def test_tumours_look_as_the_sequences_show_them():
    t1, t1ce, t2, flair = range(4)
    for index in range(10):
        case, healthy = phantom(index, relative_size=0.2), phantom(index, relative_size=0)
        brain = healthy.pixels[:, healthy.brain].mean(axis=1)
        oedema, core, rim = (case.pixels[:, case.mask == label].mean(axis=1) for label in (2, 1, 4))
        assert oedema[flair] > brain[flair] + 0.2
        assert oedema[t2] > brain[t2] + 0.1
        assert oedema[t1] < brain[t1]
        assert rim[t1ce] > brain[t1ce] + 0.1
        assert rim[t1ce] > rim[t1] + 0.2
        assert core[t1ce] < brain[t1ce] - 0.1


def test_other_sizes_show_the_same_head():
    small, large = phantom(4, size=64, relative_size=0), phantom(4, size=128, relative_size=0)
    shrunk = large.pixels.reshape(4, 64, 2, 64, 2).mean(axis=(2, 4))
    assert large.pixels.shape == (4, 128, 128)
    assert np.abs(shrunk - small.pixels).mean() < 0.02


@pytest.mark.parametrize(
    "wrong", [{"index": -1}, {"index": 0, "seed": -1}, {"index": 0, "size": 8}, {"index": 0, "relative_size": 0.9}]
)
def test_impossible_arguments_are_refused(wrong):
    with pytest.raises(SettingsError):
        phantom(**wrong)


def test_write_dataset_round_trip(tmp_path):
    out, seen = tmp_path / "new" / "phantoms", []
    write_dataset(out, count=4, size=48, seed=2, on_progress=seen.append)
    assert seen == [1, 2, 3, 4]
    assert sorted(p.name for p in out.iterdir()) == ["README.txt", "images", "manifest.csv", "masks"]
    assert [p.name for p in out.parent.iterdir()] == ["phantoms"]
    assert "Louis Collins" in (out / "README.txt").read_text()
    for index in range(4):
        case = phantom(index, size=48, seed=2)
        image = nib.load(out / f"images/phantom_{index:05d}.nii.gz")
        mask = nib.load(out / f"masks/phantom_{index:05d}_mask.nii.gz")
        assert image.shape == (48, 48, 1, 4)
        assert image.get_data_dtype() == np.float32
        assert mask.shape == (48, 48, 1)
        assert mask.get_data_dtype() == np.uint8
        rows = np.asarray(image.dataobj)[::-1, ::-1, 0].transpose(2, 1, 0)
        np.testing.assert_array_equal(rows, case.pixels)
        np.testing.assert_array_equal(np.asarray(mask.dataobj)[::-1, ::-1, 0].T, case.mask)


def test_geometry_of_the_files(tmp_path):
    write_dataset(tmp_path / "out", count=1, size=53)
    header = nib.load(tmp_path / "out/images/phantom_00000.nii.gz").header
    affine = header.get_sform()
    assert nib.aff2axcodes(affine) == ("R", "A", "S")
    np.testing.assert_allclose(affine, header.get_qform())
    assert int(header["sform_code"]) == int(header["qform_code"]) == 1
    assert header.get_xyzt_units()[0] == "mm"
    np.testing.assert_allclose(header.get_zooms()[:3], 4.0)
    np.testing.assert_allclose(affine @ [26, 26, 0, 1], [0, 0, 0, 1], atol=1e-6)


def test_manifest(tmp_path):
    write_dataset(tmp_path / "out", count=40, size=16)
    with (tmp_path / "out/manifest.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["image", "mask", "channels", "size", "label", "group", "split"]
    assert len({row["group"] for row in rows}) == 40
    splits = [row["split"] for row in rows]
    assert (splits.count("train"), splits.count("val"), splits.count("test")) == (36, 2, 2)
    for index, row in enumerate(rows):
        assert (tmp_path / "out" / row["image"]).is_file()
        assert (tmp_path / "out" / row["mask"]).is_file()
        assert row["channels"] == "t1;t1ce;t2;flair"
        assert row["size"] == f"{phantom(index, size=16).size:.6f}"
        assert row["label"] == ("diseased" if float(row["size"]) > 0 else "healthy")


def test_an_existing_folder_is_refused_and_kept(tmp_path):
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(InputError, match="not an empty folder"):
        write_dataset(tmp_path, count=1, size=16)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_an_empty_folder_is_filled(tmp_path):
    out = tmp_path / "empty"
    out.mkdir()
    write_dataset(out, count=1, size=16)
    assert (out / "manifest.csv").is_file()


def test_an_interrupted_run_leaves_nothing(tmp_path):
    def stop(done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path / "out", count=3, size=16, on_progress=stop)
    assert not list(tmp_path.iterdir())


def test_a_count_of_zero_is_refused(tmp_path):
    with pytest.raises(SettingsError):
        write_dataset(tmp_path / "out", count=0)
    assert not list(tmp_path.iterdir())
