"""Translation: the right models, the right files, complete records, and refusals that leave nothing behind."""

import inspect
import json
import os
import re
import shutil
import threading
import weakref
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import PIL.Image
import pytest
import torch
from conftest import CHANNELS, SIZE, TINY, store
from tape import Twin

import knife
from knife import files as files_module
from knife import ops, outputs, pairs, translation
from knife import steering as module
from knife.checkpoint import describe, digest, load, read_tensors, save
from knife.devices import computed_in
from knife.errors import (
    DeviceError,
    DiskError,
    InputError,
    KnifeError,
    ModelError,
    SamplingError,
    SettingsError,
    TargetError,
    TaskError,
)
from knife.graphs import Recorder
from knife.image import MARK, read
from knife.inputs import expand
from knife.layers import has_packing
from knife.outputs import Translation, target_word
from knife.phantom import phantom, write_nifti
from knife.schedule import Schedule
from knife.settings import Settings, Wish
from knife.spec import ImageSpec
from knife.steering import Reader
from knife.tasks import Task, task
from knife.translation import translate, translations

FEW = Settings(noise_level=10, steps=5)


@pytest.fixture
def quick(models):
    """Translate with the tiny models and few steps."""

    def run(images, task, target, *also, **options):
        return translate(images, Wish(task, target), *also, **{"models": models, "settings": FEW, **options})

    return run


@pytest.fixture
def own(models, tmp_path):
    """Copy the tiny models of brains, to be tampered with."""
    return Path(shutil.copytree(models / "brain", tmp_path / "own" / "brain")).parent


@pytest.fixture
def no_network(monkeypatch):
    """Fail if an image is about to be encoded."""

    def refuse(*arguments):
        raise AssertionError("a network was called")

    monkeypatch.setattr(module, "encode", refuse)


def written(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def edited(path: Path, **changes: object) -> None:
    """Store a model again with another card."""
    save(path, read_tensors(path), replace(describe(path).card, **changes).to_json())


# --------------------------------------------------------------------------------------------------------- what it does


@pytest.mark.parametrize(
    ("kind", "target", "number", "sign"),
    [
        ("regress", "0.3", "value", 1), ("regress", "0", "value", -1), ("regress", "+", "value", 1),
        ("regress", "-", "value", -1), ("classify", "healthy", "p(healthy)", 1),
        ("classify", "diseased", "p(healthy)", -1), ("segment", "mask.nii", "dice", 1),
    ],
)  # fmt: skip
def test_the_prediction_moves_towards_the_target(quick, images, kind, target, number, sign):
    wanted = str(images / target) if kind == "segment" else target
    ((guided,), (unguided,)) = (
        quick(images / "slice.nii", kind, wanted, settings=replace(FEW, strength=s)) for s in (0.3, 0.0)
    )
    assert sign * (guided.record["after"][number] - unguided.record["after"][number]) > 0
    assert guided.record["before"] == unguided.record["before"]


def test_without_guidance_the_target_does_not_matter(quick, images):
    zero = replace(FEW, scale=0.0)
    more, less = (quick(images / "slice.nii", "regress", target, settings=zero)[0] for target in "+-")
    assert torch.equal(more.change, less.change)


def test_the_result_is_the_input_plus_the_change(quick, images):
    (done,) = quick(images / "slice.nii", "regress", "0.3")
    assert done.change.shape == (4, *SIZE)
    assert done.change.abs().max() > 0.01
    assert torch.equal(done.result.pixels, done.source.plus(done.change, (-1.0, 1.0)).pixels)
    background = (done.source.pixels == 0).all(0)
    assert background.any()
    assert not done.result.pixels[:, background].any()


def test_the_package_offers_it_though_a_module_has_its_name(images, models):
    for _ in range(2):
        (done,) = knife.translate(images / "slice.nii", Wish("regress", "0.3"), models=models, settings=FEW)
        assert done.record["task"] == "regress"


def test_outside_a_region_every_pixel_stays(quick, images):
    (done,) = quick(images / "slice.nii", "regress", "+", region="ellipse:16,14,7,5")
    (free,) = quick(images / "slice.nii", "regress", "+")
    y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    inside = ((x - 16) / 7) ** 2 + ((y - 14) / 5) ** 2 <= 1
    changed = (done.result.pixels != done.source.pixels).any(0)
    assert not changed[~inside].any()
    assert changed[inside].float().mean() > 0.3
    assert (free.result.pixels != free.source.pixels).any(0)[~inside].any()
    assert done.record["region"] == "ellipse:16,14,7,5"


def test_a_region_may_be_a_file_and_differs_by_image(quick, images, tmp_path):
    wanted = torch.from_numpy(np.asarray(nibabel.load(images / "mask.nii").dataobj) > 0)
    done = quick([images / "slice.nii", images / "healthy.nii"], "regress", "+", region=str(images / "mask.nii"))
    for one in done:
        changed = (one.result.pixels != one.source.pixels).any(0)
        assert changed.any()
        assert int(changed.sum()) <= int(wanted.sum())
    assert done[0].record["region"] == "mask.nii"


@pytest.mark.parametrize(
    ("region", "words"), [("ellipse:1,2", "--region ellipse:1,2: give"), ("here", "--region here")]
)
def test_regions_that_mean_nothing_are_refused(quick, images, no_network, region, words):
    with pytest.raises(TargetError, match=words):
        quick(images / "slice.nii", "regress", "+", region=region)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_batch_gives_what_single_images_give(quick, images, tmp_path, precision):
    """In bfloat16 on a CPU to the bit: no product of its networks depends on the neighbours."""
    if precision == "bfloat16" and not has_packing():
        pytest.skip("this torch or processor packs no weights")
    for i in range(5):
        write_nifti(tmp_path / f"{i}.nii", phantom(i, size=32, seed=1).pixels)
    places = [tmp_path / f"{i}.nii" for i in (3, 1, 4, 0, 2)]
    single, three, eight = (
        quick(places, "classify", "healthy", settings=replace(FEW, batch_size=size, precision=precision), device="cpu")
        for size in (1, 3, 8)
    )
    near = {"rtol": 1e-4, "atol": 1e-5} if precision == "float32" else {"rtol": 0, "atol": 0}
    for one, some, all_ in zip(single, three, eight, strict=True):
        assert torch.allclose(one.change, some.change, **near)
        assert torch.allclose(one.change, all_.change, **near)
    assert [t.source.source.paths[0] for t in eight] == places
    assert not torch.allclose(eight[0].change, eight[1].change, atol=1e-3)


def test_progress_counts_every_step_of_every_batch(quick, images):
    heard = []
    quick(
        [images / "slice.nii"] * 3,
        "regress",
        "0.3",
        settings=replace(FEW, batch_size=2),
        started=lambda about: heard.append(about["inputs"]),
        progress=lambda done, total: heard.append((done, total)),
    )
    first, second = range(2, 21, 2), range(21, 31)  # two images at once, then one
    assert heard == [3, *[(done, 30) for done in (*first, *second, 30)]]


def test_clamping_keeps_the_result_within_the_value_range(quick, images):
    strong = replace(FEW, strength=3.0, control=False)
    free, kept = (
        quick(images / "slice.nii", "regress", "+", settings=replace(strong, clamp=clamp))[0] for clamp in (False, True)
    )
    start = free.source.normalised(SIZE, (-1, 1))
    assert (start + free.change).abs().max() > 1.1
    assert (start + kept.change).abs().max() < 1 + 1e-5
    assert kept.record["settings"]["clamp"] is True


# ---------------------------------------------------------------------------------------------------------------- files


def test_nifti_comes_back_as_nifti_in_the_same_place(quick, images, tmp_path):
    (done,) = quick(images / "slice.nii", "regress", "0.3", out=tmp_path / "out")
    before, after = (nibabel.load(path) for path in (images / "slice.nii", done.files.image))
    assert after.shape == before.shape == (32, 32, 1, 4)
    assert np.array_equal(after.affine, before.affine)
    assert after.header["qform_code"] == before.header["qform_code"]
    assert MARK in str(after.header["descrip"])
    assert torch.equal(read(done.files.image).pixels, done.result.pixels)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_the_files_of_a_result(quick, images, tmp_path, suffix):
    image = nibabel.load(images / "slice.nii")
    nibabel.save(image, tmp_path / f"x{suffix}")
    (done,) = quick(tmp_path / f"x{suffix}", "regress", "0.3", out=tmp_path / "out")
    names = [f"x_regress_0.3{suffix}", f"x_regress_0.3_difference{suffix}", "x_regress_0.3_panel.png"]
    assert [file.name for file in done.files] == [*names, "x_regress_0.3.json"]
    assert written(tmp_path / "out") == sorted(file.name for file in done.files)


def test_the_difference_map_is_the_sum_over_channels(quick, images, tmp_path):
    (done,) = quick(images / "slice.nii", "regress", "0.3", out=tmp_path)
    wanted = (done.result.pixels - done.source.pixels).abs().sum(0)
    assert torch.allclose(read(done.files.difference).pixels[0], wanted, atol=1e-6)
    assert done.record["difference_peak"] == pytest.approx(float(wanted.max()))
    assert "intensities of the file" in done.record["difference"]


def test_four_files_become_four_files(quick, images, tmp_path):
    (joined,) = quick(images / "slice.nii", "regress", "0.3")
    (done,) = quick(images / "case", "regress", "0.3", out=tmp_path)
    assert done.files.image == tmp_path / "case_regress_0.3"
    names = [f"case_{name}.nii.gz" for name in CHANNELS["brain"]]
    assert written(done.files.image) == sorted(names)
    assert done.files.difference == tmp_path / "case_regress_0.3_difference.nii.gz"
    assert read(done.files.difference).pixels.shape == (1, 32, 32)
    assert torch.allclose(done.result.pixels, joined.result.pixels, atol=1e-6)
    assert torch.equal(read(done.files.image).pixels, done.result.pixels)
    assert done.record["input"] == names
    assert done.record["channels"] == joined.record["channels"] == ["t1", "t1ce", "t2", "flair"]


@pytest.mark.parametrize(("suffix", "mode"), [(".png", "RGB"), (".jpg", "RGB"), (".tif", "RGB"), (".png", "RGBA")])
def test_pictures_come_back_as_pictures(quick, images, tmp_path, suffix, mode):
    PIL.Image.open(images / "face.png").convert(mode).resize((40, 24)).save(tmp_path / f"x{suffix}")
    (done,) = quick(tmp_path / f"x{suffix}", "regress", "0.3", out=tmp_path / "out")
    with PIL.Image.open(done.files.image) as picture, PIL.Image.open(done.files.difference) as difference:
        assert (picture.size, picture.mode) == ((40, 24), mode)
        assert (difference.size, difference.format) == ((40, 24), "PNG")
        grey = torch.from_numpy(np.asarray(difference)[..., 0].copy())
    change = (done.result.pixels - done.source.pixels).abs().sum(0)
    assert torch.equal(grey, (change / change.max() * 255).round().byte())
    assert done.record["difference_peak"] == float(change.max()) > 0
    assert f"white is {float(change.max()):g}" in done.record["difference"]
    assert done.record["channels"] == ["r", "g", "b"]


@pytest.mark.parametrize("size", [16, 64])
def test_images_of_any_size_come_back_in_their_own(quick, tmp_path, size):
    write_nifti(tmp_path / "x.nii", phantom(0, size=size).pixels)
    (done,) = quick(tmp_path / "x.nii", "regress", "0.3", out=tmp_path / "out")
    assert done.result.pixels.shape == (4, size, size)
    assert done.change.shape == (4, *SIZE)


def test_a_grey_tiff_of_floats(own, tmp_path):
    for kind in ("diffusion", "regress"):
        card = describe(own / "brain" / f"{kind}.safetensors").card
        store(own, replace(card, dataset="grey", spec=ImageSpec(("grey",), SIZE, TINY, TINY)))
    picture = PIL.Image.fromarray(phantom(0, size=32).pixels[0] * 1000)
    picture.save(tmp_path / "x.tif")
    (done,) = translate(tmp_path / "x.tif", Wish("regress", "0.3"), models=own, settings=FEW, out=tmp_path / "out")
    with PIL.Image.open(done.files.image) as result, PIL.Image.open(done.files.difference) as difference:
        assert (result.mode, difference.mode) == ("F", "RGB")


def test_the_panel_shows_the_mask(quick, images, tmp_path):
    mask = images / "mask.nii"
    for kind, target, red in (("segment", str(mask), True), ("regress", "0.3", False)):
        (done,) = quick(images / "healthy.nii", kind, target, out=tmp_path)
        with PIL.Image.open(done.files.panel) as picture:
            assert MARK in picture.text["Comment"]
            assert (np.asarray(picture) == (255, 64, 64)).all(2).any() == red


def test_outputs_of_the_same_name_are_numbered(quick, images, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        shutil.copy(images / "slice.nii", tmp_path / folder / "x.nii")
    shutil.copy(images / "slice.nii", tmp_path / "a" / "X.nii")
    places = [tmp_path / "a" / "x.nii", tmp_path / "b" / "x.nii", tmp_path / "a" / "X.nii"]
    done = quick(places, "regress", "+", out=tmp_path / "out")
    names = ["x_regress_more", "x_regress_more_2", "X_regress_more_3"]
    assert [t.files.image.stem for t in done] == names
    assert len(written(tmp_path / "out")) == 12


@pytest.mark.parametrize("name", ["[red]x", "x\x1b[31m", "x\ny", "-x", "x" * 240, "é\udcff", "x y;$(z)"])
def test_odd_names(quick, images, tmp_path, name):
    shutil.copy(images / "slice.nii", tmp_path / f"{name}.nii")
    (done,) = quick(tmp_path / f"{name}.nii", "regress", "0.3", out=tmp_path / "out")
    assert done.files.image.name.isprintable()
    assert json.loads(done.files.record.read_text())["input"] == [f"{name}.nii"]
    assert len(written(tmp_path / "out")) == 4


def test_a_second_run_replaces_the_results_of_the_first(quick, images, tmp_path):
    (first,) = quick(images / "slice.nii", "regress", "0.3", out=tmp_path)
    (second,) = quick(images / "slice.nii", "regress", "0.3", out=tmp_path, settings=replace(FEW, steps=4))
    assert len(written(tmp_path)) == 4
    assert torch.equal(read(first.files.image).pixels, second.result.pixels)


@pytest.mark.parametrize(
    ("target", "word"),
    [
        ("0.3", "0.3"), ("+", "more"), ("-", "less"), ("-0.5", "-0.5"), ("mask.nii", "mask"), ("m.NII.GZ", "m"),
        ("a/b", "a-b"), ("x" * 99, "x" * 40), ("../no/x", "..-no-x"), ("", ""),
    ],
)  # fmt: skip
def test_the_word_for_a_target(target, word):
    assert target_word(target) == word


# -------------------------------------------------------------------------------------------------------------- records


def test_the_record_says_all_that_was_done(quick, images, models, tmp_path):
    (done,) = quick(images / "healthy.nii", "segment", str(images / "mask.nii"), out=tmp_path)
    record = json.loads(done.files.record.read_text(), parse_constant=pytest.fail)
    assert record == done.record
    assert record["settings"] == {
        "noise_level": 10, "quality": "standard", "steps": 5, "solver": "ab2", "scale": None,
        "strength": None, "tolerance": None, "batch_size": None,
        "control": True, "clamp": False, "auto_region": False, "extrapolate": False, "max_reconstruction": 0.1,
        "precision": computed_in("cpu"), "dtype": "same",
    }  # fmt: skip
    hashes = [digest(models / "brain" / f"{kind}.safetensors") for kind in ("diffusion", "segment")]
    assert [(m["dataset"], m["sha256"], m["shipped"]) for m in record["models"]] == [
        ("brain", h, False) for h in hashes
    ]
    assert (record["task"], record["target"], record["input"]) == ("segment", "mask.nii", ["healthy.nii"])
    assert record["files"] == [file.name for file in done.files]
    assert (record["knife"], record["torch"], record["ops"]) == (
        knife.__version__,
        torch.__version__,
        ops.status().path,
    )
    assert record["device"].startswith("cpu: ")
    assert "not for diagnosis" in record["synthetic"]
    assert record["seconds"] > 0


def test_the_record_says_what_the_guide_saw(quick, images, models):
    (done,) = quick(images / "slice.nii", "regress", "0.3")
    net, kind = load(describe(models / "brain" / "regress.safetensors")), task("regress")
    config = describe(models / "brain" / "regress.safetensors").card.config
    for when, image in (("before", done.source), ("after", done.result)):
        x = image.normalised(SIZE, (-1, 1))[None]
        seen = kind.evaluate(net, x, torch.zeros(1), done.targets[0][None], config)["value"]
        assert done.record[when]["value"] == pytest.approx(float(seen), rel=1e-4)
    assert [seen["level"] for seen in done.record["along"]] == [10, 7, 5, 3, 1, 0]
    assert all(np.isfinite(seen["value"]) for seen in done.record["along"])


def test_a_long_walk_is_looked_at_about_ten_times(quick, images):
    (done,) = quick(
        images / "slice.nii", "regress", "0.3", settings=Settings(noise_level=40, steps=40, max_reconstruction=9)
    )
    levels = [seen["level"] for seen in done.record["along"]]
    assert levels[0] == 40
    assert levels[-1] == 0
    assert 10 <= len(levels) <= 12


def test_nothing_written_tells_where_files_lie(quick, images, tmp_path):
    quick(images / "healthy.nii", "segment", str(images / "mask.nii"), out=tmp_path)
    for name in written(tmp_path):
        assert str(images).encode() not in (tmp_path / name).read_bytes()


def test_an_explicit_scale_is_the_papers_and_stands_in_the_record(quick, images, monkeypatch):
    used, real = [], module.decode_with_control
    monkeypatch.setattr(module, "decode_with_control", lambda *arguments: used.append(arguments[4]) or real(*arguments))
    (done,) = quick(images / "slice.nii", "regress", "0.3", settings=replace(FEW, scale=5.0))
    assert [[one.scale for one in guidance] for guidance in used] == [[5.0]]
    assert (done.record["settings"]["scale"], done.record["settings"]["strength"]) == (5.0, None)


def test_no_strength_gives_the_input_back_bit_for_bit(quick, images):
    (done,) = quick(images / "slice.nii", "regress", "+", settings=replace(FEW, strength=0.0))
    assert torch.equal(done.result.pixels, done.source.pixels)
    assert done.record["effect"] == 0
    assert done.record["reconstruction"] > 0


def test_the_control_takes_the_error_of_encoding_and_decoding_out(quick, images):
    """What is written is the input and the difference of two decodes; without control it is the guided one."""
    (with_control,) = quick(images / "slice.nii", "regress", "+")
    (without,) = quick(images / "slice.nii", "regress", "+", settings=replace(FEW, control=False))
    (unguided,) = quick(images / "slice.nii", "regress", "+", settings=replace(FEW, control=False, strength=0.0))
    torch.testing.assert_close(with_control.change, without.change - unguided.change, rtol=1e-4, atol=1e-5)
    assert with_control.record["effect"] == pytest.approx(float(with_control.change.abs().mean() / 2), rel=0.01)
    assert with_control.record["reconstruction"] == pytest.approx(float(unguided.change.abs().mean() / 2), rel=0.01)
    assert with_control.record["along"] == without.record["along"]
    assert "reconstruction" not in without.record


# -------------------------------------------------------------------------------------------------------------- folders


def test_a_folder_stands_for_its_images_and_cases(quick, images, tmp_path):
    shutil.copytree(images / "case", tmp_path / "in" / "patient")
    shutil.copy(images / "slice.nii", tmp_path / "in" / "b.nii")
    shutil.copy(images / "healthy.nii", tmp_path / "in" / "a.nii")
    shutil.copy(images / "mask.nii", tmp_path / "in" / "a_mask.nii")
    for name in (".hidden.nii", "notes.txt"):
        (tmp_path / "in" / name).write_text("no image")
    (tmp_path / "in" / "empty.nii").mkdir()
    heard = []
    done = quick(
        tmp_path / "in", "regress", "0.3", out=tmp_path / "out", started=lambda about: heard.append(about["left_out"])
    )
    assert heard == [["a_mask.nii"]]
    assert [t.files.image.name for t in done] == ["a_regress_0.3.nii", "b_regress_0.3.nii", "case_regress_0.3"]


def test_several_slices_of_one_case_in_one_folder(images, tmp_path):
    for number in ("080", "081"):
        for name in CHANNELS["brain"]:
            shutil.copy(images / "case" / f"case_{name}.nii.gz", tmp_path / f"brats_001_{name}_{number}_w.nii.gz")
        shutil.copy(images / "mask.nii", tmp_path / f"brats_001_seg_{number}_w.nii")
    found, left_out = expand(tmp_path)
    assert left_out == []  # the masks belong to the case
    assert [[file.name for file in files] for files in found] == [
        [f"brats_001_{name}_{number}_w.nii.gz" for name in CHANNELS["brain"]] for number in ("080", "081")
    ]


def test_an_incomplete_case_is_refused(quick, images, tmp_path):
    for number in ("080", "081"):
        for name in CHANNELS["brain"]:
            shutil.copy(images / "case" / f"case_{name}.nii.gz", tmp_path / f"x_{name}_{number}.nii.gz")
    (tmp_path / "x_t2_081.nii.gz").unlink()
    with pytest.raises(InputError, match="x_081: lacks t2"):
        quick(tmp_path, "regress", "0.3")


def test_a_folder_with_another_kind_of_image_is_refused_by_its_name(quick, images, tmp_path, no_network):
    shutil.copy(images / "slice.nii", tmp_path / "a.nii")
    shutil.copy(images / "face.png", tmp_path / "b.png")
    with pytest.raises(ModelError, match=r"b\.png: 3 channels, but .*brain was trained on 4 \(t1, t1ce, t2, flair\)"):
        quick(tmp_path, "regress", "0.3", dataset="brain", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------------------- models


@pytest.fixture
def shipped(models, monkeypatch, tmp_path):
    """Put a copy of the tiny models in the place of the shipped ones."""
    monkeypatch.setattr(pairs, "STARTER", Path(shutil.copytree(models, tmp_path / "starter")))
    monkeypatch.chdir(tmp_path)


def datasets(done):
    return [(model["dataset"], model["shipped"]) for model in done[0].record["models"]]


def test_models_that_fit_are_taken_before_the_shipped_ones(own, images, shipped):
    done = translate(images / "slice.nii", Wish("regress", "0.3"), models=own, settings=FEW)
    assert datasets(done) == [("brain", False)] * 2


@pytest.mark.parametrize("place", ["models", None])
def test_without_models_the_shipped_ones_serve(images, shipped, place):
    done = translate(images / "slice.nii", Wish("regress", "0.3"), models=place, settings=FEW)
    assert datasets(done) == [("brain", True)] * 2


def test_where_no_model_fits_or_has_the_task_the_shipped_ones_serve(own, images, shipped):
    done = translate(images / "face.png", Wish("regress", "0.3"), models=own, settings=FEW)
    assert datasets(done) == [("photo", True)] * 2
    (own / "brain" / "regress.safetensors").unlink()
    done = translate(images / "slice.nii", Wish("regress", "0.3"), models=own, settings=FEW)
    assert datasets(done) == [("brain", True)] * 2


def test_several_that_fit_are_listed_and_dataset_chooses(own, images, no_network, monkeypatch):
    shutil.copytree(own / "brain", own / "other")
    with pytest.raises(ModelError, match=r"--dataset: several .* fit the images; give one of brain, other\."):
        translate(images / "slice.nii", Wish("regress", "0.3"), models=own, settings=FEW)
    monkeypatch.undo()
    done = translate(images / "slice.nii", Wish("regress", "0.3"), models=own, dataset="other", settings=FEW)
    assert done[0].record["models"][0]["sha256"] == digest(own / "other" / "diffusion.safetensors")


def test_a_dataset_of_no_such_name(own, images, no_network):
    with pytest.raises(ModelError, match=r"task regress: no trained models in .* under the name nothing; run"):
        translate(images / "slice.nii", Wish("regress", "0.3"), models=own, dataset="nothing", settings=FEW)


def test_a_folder_of_models_that_is_not_there(images, tmp_path):
    with pytest.raises(ModelError, match=r"--models .*nowhere: no such folder"):
        translate(images / "slice.nii", Wish("regress", "0.3"), models=tmp_path / "nowhere")


@pytest.mark.parametrize("kind", ["diffusion", "regress"])
def test_a_damaged_model_is_named_where_it_is_needed(own, images, shipped, kind):
    (own / "brain" / f"{kind}.safetensors").write_bytes(b"damaged")
    with pytest.raises(ModelError, match=rf"brain/{kind}\.safetensors: .*damaged"):
        translate(images / "slice.nii", Wish("regress", "0.3"), models=own, settings=FEW)


def test_a_model_under_the_name_of_another_kind_is_refused(own, images, no_network):
    shutil.copy(own / "brain" / "classify.safetensors", own / "brain" / "regress.safetensors")
    with pytest.raises(ModelError, match=r"regress\.safetensors: a model of kind classify under the wrong name"):
        translate(images / "slice.nii", Wish("regress", "0.3"), models=own, settings=FEW)


def test_a_damaged_model_does_no_harm_where_another_fits_or_it_is_not_needed(own, images):
    shutil.copytree(own / "brain", own / "broken")
    (own / "broken" / "diffusion.safetensors").write_bytes(b"damaged")
    (own / "brain" / "segment.safetensors").write_bytes(b"damaged")
    done = translate(images / "slice.nii", Wish("regress", "0.3"), models=own, settings=FEW)
    assert datasets(done) == [("brain", False)] * 2


def test_weights_that_have_changed_are_refused(own, images, no_network, tmp_path):
    path = own / "brain" / "diffusion.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ModelError, match=r"diffusion\.safetensors: .*checksum"):
        translate(images / "slice.nii", Wish("regress", "0.3"), models=own, settings=FEW, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_guide_of_another_schedule_is_refused_with_the_difference(own, images, no_network):
    edited(own / "brain" / "regress.safetensors", schedule=Schedule("cosine", 50))
    with pytest.raises(ModelError, match="schedule cosine of 50 levels against linear of 50 levels"):
        translate(images / "slice.nii", Wish("regress", "0.3"), models=own, settings=FEW)


def test_a_guide_of_another_value_range_is_refused_with_the_difference(own, images, no_network):
    path = own / "brain" / "regress.safetensors"
    edited(path, spec=replace(describe(path).card.spec, value_range=(0.0, 1.0)))
    with pytest.raises(ModelError, match=r"value range 0\.0 to 1\.0 against -1\.0 to 1\.0"):
        translate(images / "slice.nii", Wish("regress", "0.3"), models=own, settings=FEW)


def test_other_channels_of_the_same_number_are_refused(own, images, no_network, monkeypatch, tmp_path):
    monkeypatch.setattr(pairs, "STARTER", tmp_path / "nowhere")  # else a shipped model would serve
    for kind in ("diffusion", "regress"):
        path = own / "brain" / f"{kind}.safetensors"
        edited(path, spec=replace(describe(path).card.spec, channels=("t1", "t1ce", "t2", "pd")))
    with pytest.raises(ModelError, match=r"its channels are t1, t1ce, t2, flair, but .* 4 \(t1, t1ce, t2, pd\)"):
        translate(images / "case", Wish("regress", "0.3"), models=own, settings=FEW)


def test_channels_without_names_in_the_model_fit_any(own, images):
    for kind in ("diffusion", "regress"):
        path = own / "brain" / f"{kind}.safetensors"
        edited(path, spec=replace(describe(path).card.spec, channels=("0", "1", "2", "3")))
    (done,) = translate(images / "case", Wish("regress", "0.3"), models=own, settings=FEW)
    assert done.record["channels"] == ["t1", "t1ce", "t2", "flair"]


def test_a_guide_without_measured_steepness_needs_a_scale(own, images):
    path = own / "brain" / "regress.safetensors"
    edited(path, guidance={})
    with pytest.raises(
        SettingsError, match=r"--strength: no steepness is known of brain/regress\.safetensors; give --scale"
    ):
        translate(images / "slice.nii", Wish("regress", "0.3"), models=own, settings=FEW)
    (done,) = translate(images / "slice.nii", Wish("regress", "0.3"), models=own, settings=replace(FEW, scale=2.0))
    assert done.record["settings"]["scale"] == 2.0


# ------------------------------------------------------------------------------------------------------------- refusals


def nifti(path: Path, pixels: np.ndarray) -> Path:
    write_nifti(path, pixels.astype(np.float32))
    return path


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"noise_level": 0}, "--noise-level 0: give a level from 1 to 50"),
        ({"noise_level": 51}, "--noise-level 51: give a level from 1 to 50"),
        ({"steps": 0}, "--steps 0"),
        ({"steps": 11}, "--steps 11: give 1 to 10"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"scale": float("nan")}, "--scale nan"),
        ({"scale": -1.0}, "--scale -1"),
        ({"strength": float("inf")}, "--strength inf"),
    ],
)
def test_settings_that_are_refused(quick, images, tmp_path, no_network, changes, words):
    with pytest.raises(SettingsError, match=words):
        quick(images / "slice.nii", "regress", "0.3", out=tmp_path / "out", settings=replace(FEW, **changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "target", "error", "words"),
    [
        ("nothing", "0.3", TaskError, "task nothing: no plugin"),
        ("regress", "big", TargetError, "--target big: not a number"),
        ("regress", "7", TargetError, "--target 7: outside"),
        ("classify", "ill", TargetError, "--target ill: no such class; give one of diseased, healthy"),
        ("segment", "nowhere.nii", InputError, "nowhere.nii: no such file"),
        ("segment", "small.png", InputError, "small.png: the mask is 16 x 16, but .* is 32 x 32"),
        ("segment", "ellipse:1,2", TargetError, "ellipse:1,2: give ellipse:cx,cy,rx,ry in pixels"),
    ],
)
def test_tasks_and_targets_that_are_refused(quick, images, tmp_path, no_network, kind, target, error, words):
    PIL.Image.fromarray(np.eye(16, dtype=np.uint8)).save(tmp_path / "small.png")
    target = str(tmp_path / target) if target.endswith((".nii", ".png")) else target
    with pytest.raises(error, match=words):
        quick(images / "slice.nii", kind, target, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_images_that_are_refused(quick, images, tmp_path, no_network):
    bad = {
        "nan.nii": "NaN",
        "flat.nii": "constant",
        "text.png": "not a PNG",
        "missing.nii": "no such file",
        "three.nii": r"3 channels, but .* trained on 4",
        "volume.nii": "nothing to translate there",
    }
    nifti(tmp_path / "nan.nii", np.full((4, 32, 32), np.nan))
    nifti(tmp_path / "flat.nii", np.ones((4, 32, 32)))
    (tmp_path / "text.png").write_text("no picture")
    nifti(tmp_path / "three.nii", np.random.default_rng(0).random((3, 32, 32)))
    nibabel.save(nibabel.Nifti1Image(np.zeros((9, 9, 9), np.float32), np.eye(4)), tmp_path / "volume.nii")
    for name, words in bad.items():
        with pytest.raises(KnifeError, match=rf"{name}: .*{words}"):
            quick([images / "slice.nii", tmp_path / name], "regress", "0.3", dataset="brain", out=tmp_path / "out")
    for nothing in ([], tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(InputError, match="no image"):
            quick(nothing, "regress", "0.3", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_device_that_is_not_there(quick, images, tmp_path, no_network):
    with pytest.raises(DeviceError, match="--device cuda:99: not there"):
        quick(images / "slice.nii", "regress", "0.3", device="cuda:99", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_result_goes_over_an_input(quick, images, tmp_path, no_network):
    for name in ("x.nii", "x_segment_m.nii"):
        shutil.copy(images / "slice.nii", tmp_path / name)
    shutil.copy(images / "mask.nii", tmp_path / "m.nii")
    before = {name: (tmp_path / name).read_bytes() for name in written(tmp_path)}
    with pytest.raises(InputError, match=r"x_segment_m\.nii: this is an input, and inputs are never overwritten"):
        quick([tmp_path / "x.nii", tmp_path / "x_segment_m.nii"], "segment", str(tmp_path / "m.nii"), out=tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in written(tmp_path)} == before


def test_no_result_goes_over_an_input_by_another_path(quick, images, tmp_path, no_network):
    shutil.copy(images / "slice.nii", tmp_path / "x.nii")
    shutil.copy(images / "slice.nii", tmp_path / "x_regress_0.3.nii")
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    places = [tmp_path / "link" / "x.nii", tmp_path / "link" / "x_regress_0.3.nii"]
    with pytest.raises(InputError, match="never overwritten"):
        quick(places, "regress", "0.3", out=tmp_path)


def test_no_case_goes_over_its_own_files(quick, images, tmp_path, no_network):
    shutil.copytree(images / "case", tmp_path / "case_regress_0.3")
    shutil.copytree(images / "case", tmp_path / "case")
    with pytest.raises(InputError, match="never overwritten"):
        quick([tmp_path / "case", tmp_path / "case_regress_0.3"], "regress", "0.3", out=tmp_path)


def test_an_output_folder_that_is_a_file(quick, images, tmp_path, no_network):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(SettingsError, match=r"-o .*file.*: .*file is no folder that can be written to"):
            quick(images / "slice.nii", "regress", "0.3", out=out)
    assert (tmp_path / "file").read_text() == "mine"


# --------------------------------------------------------------------------------------------------- trouble on the way


@pytest.mark.parametrize("scale", [1e12, 1e38, 1e300])
def test_an_image_that_blows_up_is_named_and_nothing_of_it_written(quick, images, tmp_path, scale):
    with pytest.raises(
        SamplingError, match=r"slice\.nii: values beyond 1e\+06 at level [0-9]+; give a smaller --scale than"
    ):
        quick(images / "slice.nii", "regress", "+", out=tmp_path / "out", settings=replace(FEW, scale=scale))
    assert not (tmp_path / "out").exists()


OUT_OF_MEMORY = [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate")]


def test_what_a_guide_says_of_values_without_bounds_is_no_fault_of_its(quick, images, monkeypatch):
    """On a GPU it may meet them before anybody looks."""
    met, scored, check = [], Task.scored, module.check_sane

    def bounded(kind, net, target, x, t):
        if not x.abs().max() < module.ABSURD:
            met.append(x)
            raise TaskError("task regress: its hook guide failed")
        return scored(kind, net, target, x, t)

    def late(job, edits, level, x):
        if met:
            check(job, edits, level, x)

    monkeypatch.setattr(Task, "scored", bounded)
    monkeypatch.setattr(module, "check_sane", late)
    with pytest.raises(SamplingError, match=r"slice\.nii: values beyond 1e\+06 at level [0-9]+"):
        quick([images / "slice.nii"], "regress", "0.3", settings=replace(FEW, scale=1e12))
    assert met


@pytest.mark.parametrize("trouble", OUT_OF_MEMORY, ids=["cuda", "cpu"])
def test_one_image_that_does_not_fit_into_memory_is_refused(quick, images, monkeypatch, trouble):
    def decode(*arguments):
        raise trouble

    monkeypatch.setattr(module, "decode_with_control", decode)
    with pytest.raises(DeviceError, match="cpu: one image does not fit into memory; give --device cpu"):
        quick([images / "slice.nii"] * 3, "regress", "0.3")


def test_batches_grow_as_memory_allows(quick, images, monkeypatch):
    sizes, translated = list[int](), module.each_on_its_own

    def each(job, part, failed):
        sizes.append(len(part))
        return translated(job, part, failed)

    monkeypatch.setattr(module, "each_on_its_own", each)
    monkeypatch.setattr(module, "memory_share", lambda device: nullcontext(lambda: 1 / 6))
    places = [images / "slice.nii"] * 9
    quick(places, "regress", "0.3", settings=replace(FEW, batch_size=2))
    assert sizes == [2, 2, 2, 2, 1], "what is asked for stays"
    sizes.clear()
    monkeypatch.setattr(module, "BATCH", 1)
    monkeypatch.setattr(module.Job, "at_once", property(lambda job: 4))
    assert len(quick(places, "regress", "0.3", settings=FEW)) == 9
    assert sizes == [1, 3, 4, 1]


@pytest.mark.parametrize("trouble", OUT_OF_MEMORY, ids=["cuda", "cpu"])
def test_a_batch_that_does_not_fit_into_memory_is_halved(quick, images, monkeypatch, trouble):
    tried, real = [], module.decode_with_control

    def decode(net, x, *arguments):
        tried.append(len(x))
        if len(x) > 2:
            raise trouble
        return real(net, x, *arguments)

    monkeypatch.setenv("KNIFE_GRAPHS", "on")
    whole = quick([images / "slice.nii", images / "healthy.nii"] * 3, "regress", "0.3")
    forgotten = []
    monkeypatch.setattr(module, "decode_with_control", decode)
    monkeypatch.setattr(module, "forget", forgotten.append)
    halved = quick([images / "slice.nii", images / "healthy.nii"] * 3, "regress", "0.3")
    assert tried == [6, 3, 1, 1, 1, 1, 1, 1]
    assert (len(forgotten), len({*forgotten})) == (2, 1)  # by the one recorder, each time
    for one, other in zip(whole, halved, strict=True):
        assert one.source.source.paths == other.source.source.paths
        torch.testing.assert_close(one.change, other.change, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("target", "recorded"), [("0.3", True), ("by:+10%", False)])
def test_steps_are_recorded_if_one_thread_alone_asks_networks(quick, images, monkeypatch, target, recorded):
    """By a recorder that finds no GPU; each step comes to it, and none of another thread."""
    asked, played, numbers, play = set(), [], Reader.numbers, Recorder.__call__

    def reading(reader, *arguments):
        asked.add(threading.get_ident())
        return numbers(reader, *arguments)

    def playing(recorder, work, *arguments):
        played.append(work.__name__)
        return play(recorder, work, *arguments)

    monkeypatch.setenv("KNIFE_GRAPHS", "on")
    monkeypatch.setattr(Reader, "numbers", reading)
    monkeypatch.setattr(Recorder, "__call__", playing)
    quick([images / "slice.nii", images / "healthy.nii"], "regress", target, settings=replace(FEW, batch_size=1))
    assert bool(played) == recorded
    assert {*played} <= {"step"}
    assert not recorded or asked == {threading.get_ident()}


@pytest.mark.parametrize(("kind", "target"), [("regress", "0.3"), ("classify", "healthy"), ("segment", "mask.nii")])
def test_batches_share_what_is_recorded(quick, images, monkeypatch, kind, target):
    """Whole translations, whose steps the twin of a CUDA graph takes."""
    wanted = str(images / target) if kind == "segment" else target
    places, settings = [images / "slice.nii", images / "healthy.nii"] * 2, replace(FEW, batch_size=1)
    called = quick(places, kind, wanted, settings=settings)
    twin = Twin(monkeypatch)
    monkeypatch.setattr(translation, "player", lambda: Recorder("cpu"))
    recorded = quick(places, kind, wanted, settings=settings)
    for one, other in zip(recorded, called, strict=True):
        assert torch.equal(one.change, other.change)
    assert twin.recorded <= 4, "up: the first step and the others; down: with a control, and again without"
    assert twin.replayed >= 4 * 2 * FEW.steps


def test_an_image_that_fails_takes_no_other_with_it(quick, images, tmp_path, monkeypatch):
    """One cannot be read, one is blown up in the middle of its batch; the rest is as without them."""
    (tmp_path / "torn.nii").write_bytes((images / "slice.nii").read_bytes()[:999])
    good, bad = images / "slice.nii", images / "healthy.nii"
    alone = quick([good, good], "regress", "0.3")
    real, heard = module.check_sane, []

    def check(job, batch, level, x):
        if level == job.levels[2] and any(edit.image.source.paths[0] == bad for edit in batch):
            raise SamplingError("healthy.nii: values beyond")
        real(job, batch, level, x)

    monkeypatch.setattr(module, "check_sane", check)
    done = quick(
        [good, tmp_path / "torn.nii", bad, good], "regress", "0.3", out=tmp_path / "out",
        failed=lambda file, error: heard.append((file.name, type(error))),
    )  # fmt: skip
    assert heard == [("torn.nii", InputError), ("healthy.nii", SamplingError)]
    assert [one.record["input"] for one in done] == [["slice.nii"]] * 2
    assert [one.files.image.name for one in done] == ["slice_regress_0.3.nii", "slice_regress_0.3_2.nii"]
    for one, other in zip(done, alone, strict=True):
        torch.testing.assert_close(one.change, other.change, rtol=1e-4, atol=1e-5)
    with pytest.raises(SamplingError):
        quick([good, bad], "regress", "0.3")


def test_if_every_image_fails_it_is_refused(quick, images, tmp_path):
    (tmp_path / "torn.nii").write_bytes((images / "slice.nii").read_bytes()[:999])
    with pytest.raises(InputError, match=r"torn\.nii"):
        quick([tmp_path / "torn.nii"] * 2, "regress", "0.3", failed=lambda file, error: None)


def test_other_errors_stay_what_they_are(quick, images, monkeypatch):
    def decode(*arguments):
        raise RuntimeError("a bug")

    monkeypatch.setattr(module, "decode_with_control", decode)
    with pytest.raises(RuntimeError, match="a bug"):
        quick(images / "slice.nii", "regress", "0.3")


def test_a_full_disk_is_a_refusal_without_a_record(quick, images, tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(outputs, "write_safely", full)
    with pytest.raises(DiskError, match=r"-o .*out: cannot be written to \(No space left on device\)"):
        quick(images / "slice.nii", "regress", "0.3", out=tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.json"))


def test_an_image_that_vanishes_is_refused(quick, tmp_path):
    os.symlink(tmp_path / "gone.nii", tmp_path / "link.nii")
    with pytest.raises(InputError, match=r"link\.nii: no such file"):
        quick(tmp_path / "link.nii", "regress", "0.3")


@pytest.mark.parametrize(("dtype", "stored"), [("same", "int16"), ("float32", "float32")])
def test_voxels_are_stored_as_asked(quick, images, tmp_path, dtype, stored):
    image = nibabel.load(images / "slice.nii")
    whole = (image.get_fdata() * 1000).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(whole, image.affine), tmp_path / "x.nii")
    settings = replace(FEW, dtype=dtype)
    (done,) = quick(tmp_path / "x.nii", "segment", "ellipse:50%,50%,8,5", out=tmp_path / "out", settings=settings)
    assert nibabel.load(done.files.image).get_data_dtype() == stored
    assert done.record["settings"]["dtype"] == dtype
    assert 25 < done.targets[0].sum() < 35  # of 125 pixels, on a grid half as fine
    with pytest.raises(SettingsError, match="--dtype int8: give same or float32"):
        quick(tmp_path / "x.nii", "segment", "ellipse:50%,50%,8,5", settings=replace(FEW, dtype="int8"))


# ---------------------------------------------------------------------------------------------------------- many images

TWO = replace(FEW, steps=2, batch_size=2, strength=0.2)


@pytest.fixture
def folder(tmp_path):
    """Make a folder of seven phantoms."""
    (tmp_path / "in").mkdir()
    for i in range(7):
        write_nifti(tmp_path / "in" / f"{i}.nii", phantom(i, size=32, seed=1).pixels)
    return tmp_path / "in"


@pytest.fixture
def walked(monkeypatch):
    """Return the names of the images that are walked, as they are."""
    names, real = [], module.translate_batch

    def batch(job, edits):
        names.extend(edit.image.source.paths[0].name for edit in edits)
        return real(job, edits)

    monkeypatch.setattr(module, "translate_batch", batch)
    return names


@pytest.fixture
def alive(monkeypatch):
    """Return the images that were read and are still in memory, and the names of all that were read."""
    there, names, real = weakref.WeakSet(), [], translation.opened

    def opened(files, *arguments, **options):
        image = real(files, *arguments, **options)
        there.add(image.pixels)
        names.append(files[0].name)
        return image

    monkeypatch.setattr(translation, "opened", opened)
    return there, names


CLOCKED = {".json": rb'"seconds": [^,\n}]*|"[^"]*\.csv": "[0-9a-f]{64}"', ".csv": rb",[^,\n]*(?=\n)"}  # the last column


def contents(folder: Path) -> dict[str, bytes]:
    """Return all files of a folder, without what depends on the clock."""
    files = [folder / name for name in written(folder)]
    return {str(f.relative_to(folder)): re.sub(CLOCKED.get(f.suffix, b"$^"), b"", f.read_bytes()) for f in files}


def test_images_are_read_as_they_are_needed_and_given_up_when_they_are_written(models, folder, tmp_path, alive):
    there, read = alive
    places = [folder / f"{i % 7}.nii" for i in range(40)]
    found = translations(places, Wish("regress", "0.3"), models=models, settings=TWO, out=tmp_path / "out")
    most = 0
    for count, one in enumerate(found):
        assert one.files.record.exists()
        assert len(read) <= count + 14
        most = max(most, len(there))
        del one
    assert count == 39
    assert most <= 14  # two batches are read ahead, one is walked, two are written, and one is here


def test_what_is_done_is_not_held_while_a_batch_is_filled(quick, models, folder, tmp_path, alive, walked):
    there, _ = alive
    places, options = [folder / f"{i % 7}.nii" for i in range(40)], {"settings": TWO, "out": tmp_path / "out"}
    first, *_, last = quick(places, "regress", "0.3", **options)
    for one in (first, last):
        one.files.record.unlink()
    del one, first, last, _
    walked.clear()
    kept, most = [], 0
    for one in translations(places, Wish("regress", "0.3"), models=models, **options):
        kept.append(one.kept)
        most = max(most, len(there))
        del one
    assert kept == [False, *[True] * 38, False]
    assert len(walked) == 2
    assert most <= 14


def test_an_earlier_calls_results_are_read_back(quick, folder, tmp_path, walked):
    options = {"settings": TWO, "out": tmp_path / "out"}
    fresh = quick(folder, "regress", "0.3", **options)
    before = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in written(tmp_path / "out")}
    assert len(walked) == 7
    again = quick(folder, "regress", "0.3", **{**options, "settings": replace(TWO, batch_size=3)})
    assert len(walked) == 7
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in written(tmp_path / "out")} == before
    assert [one.kept for one in fresh] == [False] * 7
    for one, other in zip(fresh, again, strict=True):
        assert other.kept
        assert torch.equal(one.result.pixels, other.result.pixels)
        assert torch.equal(one.source.pixels, other.source.pixels)
        before, after = (image.normalised(SIZE, (-1, 1)) for image in (one.source, one.result))
        assert torch.equal(other.change, after - before)  # that in the background is nowhere written
        assert one.record == other.record
        assert one.files == other.files


@pytest.mark.parametrize(
    ("kind", "task", "target"),
    [("case", "classify", "healthy"), ("face.png", "regress", "0.3"), ("healthy.nii", "segment", "mask.nii")],
)
def test_every_kind_of_result_is_read_back(quick, images, tmp_path, walked, kind, task, target):
    wanted = str(images / target) if target.endswith("nii") else target
    (one,) = quick(images / kind, task, wanted, out=tmp_path / "out", settings=TWO)
    (other,) = quick(images / kind, task, wanted, out=tmp_path / "out", settings=TWO)
    assert len(walked) == 1
    assert torch.equal(one.result.pixels, other.result.pixels)
    assert (one.wanted is None) == (other.wanted is None)


def test_pictures_of_a_lossy_kind_are_read_back_as_they_lie_there(quick, images, tmp_path, walked):
    PIL.Image.open(images / "face.png").save(tmp_path / "x.jpg")
    for kept in (False, True):
        (one,) = quick(tmp_path / "x.jpg", "regress", "0.3", out=tmp_path / "out", settings=TWO)
        assert one.kept == kept
    assert torch.equal(one.result.pixels, read(one.files.image).pixels)
    assert len(walked) == 1


def test_a_number_and_a_device_may_be_given_as_they_are(quick, images):
    (one,) = quick(images / "slice.nii", "regress", 0.3, device=torch.device("cpu"))
    (other,) = quick(images / "slice.nii", "regress", "0.3", device="cpu")
    assert torch.equal(one.change, other.change)
    assert one.record["target"] == "0.3"


def test_what_is_no_wish_or_no_path_is_refused_by_name(images):
    with pytest.raises(SettingsError, match=r"wishes: 'regress' is none; give knife\.Wish"):
        translate(images / "slice.nii", "regress")
    with pytest.raises(InputError, match="images: give files or folders, not ndarray"):
        translate(np.zeros((4, 32, 32)), Wish("regress", "0.3"))


def test_the_package_tells_what_it_offers():
    assert {"translate", "Wish", "Settings", "load_model"} <= {*dir(knife)}
    told = inspect.signature(knife.translate)
    assert told.return_annotation == list[Translation]
    assert told.parameters == inspect.signature(translations).parameters
    assert "Returns:" in knife.translate.__doc__
    assert "Yields:" not in knife.translate.__doc__


def test_doubts_about_a_guide_are_told_before_it_begins(quick, images, own):
    path, heard = own / "brain" / "regress.safetensors", []
    card = describe(path).card
    save(path, read_tensors(path), replace(card, guidance={**card.guidance, "error": 1.0, "chance": 1.1}).to_json())
    quick(images / "slice.nii", "regress", "0.3", models=own, started=lambda about: heard.extend(about["doubts"]))
    (doubt,) = heard
    assert doubt.startswith("brain/regress.safetensors: on images set apart it errs by 1, where guessing errs by 1.1")


def test_results_of_another_input_of_that_name_are_not_written_over(quick, folder, tmp_path):
    """One that has changed where it lies is done anew, and so is the same one where another path leads to it."""
    for place in "ab":
        (tmp_path / place).mkdir()
        shutil.copy(folder / ("0.nii" if place == "a" else "1.nii"), tmp_path / place / "x.nii")
    first, second, out = tmp_path / "a" / "x.nii", tmp_path / "b" / "x.nii", tmp_path / "out"

    def made(image: Path) -> bytes:
        quick(image, "regress", "0.3", settings=TWO, out=out)
        return (out / "x_regress_0.3.nii").read_bytes()

    mine = made(first)
    with pytest.raises(InputError, match=r"b/x\.nii: .*x_regress_0\.3\.json tells of another input of that name; give"):
        made(second)
    assert (out / "x_regress_0.3.nii").read_bytes() == mine
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    assert made(tmp_path / "c" / "x.nii") == mine
    shutil.copy(second, first)
    assert made(first) != mine
    shutil.copy(tmp_path / "c" / "x.nii", second)
    (out / "x_regress_0.3.json").unlink()
    assert made(second) == mine


def test_what_counts_on_is_the_work_itself(quick, folder, own, tmp_path, walked):
    """Each change makes those images new that it touches, and no others."""
    out = tmp_path / "out"

    def done(**options):
        walked.clear()
        quick(folder, "regress", "0.3", **{"settings": TWO, "out": out, "models": own, **options})
        return walked.copy()

    everything = [f"{i}.nii" for i in range(7)]
    assert done() == everything
    assert done() == []
    (out / "1_regress_0.3.nii").write_bytes(b"something else")
    (out / "3_regress_0.3_panel.png").unlink()
    (out / "4_regress_0.3.json").write_text((out / "4_regress_0.3.json").read_text()[:-9])
    (out / "6_regress_0.3.json").write_text("[]")
    assert done() == ["1.nii", "3.nii", "4.nii", "6.nii"]
    for name, gain, height in (("2.nii", 1.01, 0), ("5.nii", 1, 4)):
        image = nibabel.load(folder / name, mmap=False)
        image.affine[2, 3] += height
        nibabel.save(
            nibabel.Nifti1Image(image.get_fdata(dtype=np.float32) * np.float32(gain), image.affine), folder / name
        )
    assert done() == ["2.nii", "5.nii"]
    assert done() == []
    assert done(settings=replace(TWO, strength=0.21)) == everything
    assert done(settings=replace(TWO, dtype="float32")) == everything
    edited(own / "brain" / "regress.safetensors", training={"step": 8})
    assert done(settings=replace(TWO, dtype="float32")) == everything
    assert done(region="ellipse:50%,50%,8,8") == everything


@pytest.mark.parametrize("kind", ["image", "volume"])
def test_killed_after_any_write_and_begun_again_all_is_there_and_nothing_torn(
    quick, images, tmp_path, monkeypatch, kind
):
    """After the n-th write the process is as dead; then the same command does what is missing, for every n."""
    places, options = [images / "slice.nii", images / "healthy.nii"], {"settings": replace(TWO, batch_size=1)}
    if kind == "volume":
        shown = np.stack([phantom(i, size=32, seed=3).pixels for i in range(9)], 3)
        nibabel.save(nibabel.Nifti1Image(np.moveaxis(shown, (0, 3), (3, 2)), np.eye(4)), tmp_path / "v.nii")
        places, options = [tmp_path / "v.nii"], {**options, "slices": (3, 5)}
    quick(places, "regress", "0.3", out=tmp_path / "whole", **options)
    wanted, real, redone = contents(tmp_path / "whole"), files_module.os.replace, 0
    for n in range(99):
        writes, out = [], tmp_path / str(n)

        def replacing(source, target, writes=writes, n=n):
            if len(writes) == n:
                raise BrokenPipeError("as dead")
            writes.append(target)
            real(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(files_module.os, "replace", replacing)
            try:
                quick(places, "regress", "0.3", out=out, **options)
            except KnifeError:
                died = True
            else:
                died = False
        survivors = {name for name in written(out) if name.endswith(".json")} if out.exists() else set()
        done = quick(places, "regress", "0.3", out=out, **options)
        assert contents(out).keys() == wanted.keys()
        assert all(contents(out)[name] == data for name, data in wanted.items())
        redone += sum(not one.kept for one in done)
        assert all(one.kept for one in done if one.files.record.name in survivors)
        if not died:
            break
    assert n == {"image": 8, "volume": 7}[kind]
    assert redone < 2 * n


def test_of_many_images_a_bad_one_stops_no_other_and_is_tried_again_alone(quick, folder, tmp_path, walked):
    good = (folder / "5.nii").read_bytes()
    (folder / "5.nii").write_bytes(good[:999])
    heard = []
    options = {"settings": TWO, "out": tmp_path / "out", "failed": lambda file, why: heard.append(file.name)}
    assert len(quick(folder, "regress", "0.3", **options)) == 6
    assert heard == ["5.nii"]
    (folder / "5.nii").write_bytes(good)
    walked.clear()
    assert [one.kept for one in quick(folder, "regress", "0.3", **options)] == [True] * 5 + [False, True]
    assert walked == ["5.nii"]


def test_an_image_of_another_kind_among_many_is_told_of_alone(quick, folder, images, tmp_path):
    shutil.copy(images / "face.png", folder / "3.png")
    heard = []
    done = quick(
        folder, "regress", "0.3", settings=TWO, dataset="brain", failed=lambda file, why: heard.append(str(why))
    )
    assert len(done) == 7
    (why,) = heard
    assert "3.png: 3 channels, but" in why


def test_a_file_that_is_not_there_is_refused_before_the_first_step(quick, folder, tmp_path, no_network):
    places = [*sorted(folder.iterdir()), folder / "gone.nii"]
    with pytest.raises(InputError, match=r"gone\.nii: no such file"):
        quick(places, "regress", "0.3", settings=TWO, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_steps_to_do_are_counted_as_inputs_are_read(quick, folder, tmp_path):
    (folder / "5.nii").write_bytes(b"torn")
    options = {"settings": TWO, "out": tmp_path / "out", "failed": lambda file, why: None}
    quick([folder / "1.nii"], "regress", "0.3", **options)
    heard = []
    quick(folder, "regress", "0.3", progress=lambda done, total: heard.append((done, total)), **options)
    first, last = heard[0], heard[-1]
    assert first == (2, 4 * 6)  # two images of 2 + 2 steps; all seven but the one that is done already
    assert last == (4 * 5, 4 * 5)
    assert [done for done, _ in heard] == sorted(done for done, _ in heard)


def test_shards_together_are_the_whole(quick, folder, images, tmp_path):
    """With batches of one image bit for bit; in larger ones, which have other neighbours, up to rounding."""
    (folder / "more").mkdir()
    shutil.copy(images / "slice.nii", folder / "more" / "3.nii")
    places, alone = [folder, folder / "more"], replace(TWO, batch_size=1)
    quick(places, "regress", "0.3", settings=alone, out=tmp_path / "whole")
    names = []
    for i in (3, 1, 2):
        quick(places, "regress", "0.3", settings=alone, out=tmp_path / "parts", shard=f"{i}/3")
        names.append(set(written(tmp_path / "parts")))
    assert [len(some) for some in names] == [2 * 4, 5 * 4, 8 * 4]
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert "3_regress_0.3_2.nii" in names[-1] - names[0]
    done = [quick(places, "regress", "0.3", settings=TWO, shard=f"{i}/3") for i in (1, 2, 3)]
    for i, one in enumerate(quick(places, "regress", "0.3", settings=TWO)):
        torch.testing.assert_close(one.change, done[i % 3][i // 3].change, rtol=1e-4, atol=1e-5)


def test_a_shard_may_be_empty(quick, folder):
    assert quick([folder / "1.nii", folder / "2.nii"], "regress", "0.3", settings=TWO, shard="3/3") == []
