"""Volumes through a translation: only the chosen slices change, a stopped run goes on, the table tells the truth."""

import csv
import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from knife import panel, stacks, steering, translation
from knife import steering as module
from knife.errors import DiskError, InputError, SamplingError
from knife.phantom import phantom
from knife.settings import Settings, Wish
from knife.translation import translate

FEW = Settings(noise_level=10, steps=2, batch_size=2)
DEPTH, FIRST = 12, 3  # slices, and the first that shows brain
NAMES = ("t1", "t1ce", "t2", "flair")


@pytest.fixture
def patient(tmp_path):
    """Make a patient of four 3-D files and a mask: int16, a flipped affine, empty slices at both ends."""
    folder = tmp_path / "P_001"
    folder.mkdir()
    matrix = np.diag([-1.5, -1.25, 2.0, 1.0])
    matrix[:3, 3] = (40, 50, -60)
    shown = [phantom(i, size=32, seed=3, relative_size=0.1) for i in range(6)]
    stack, seg = np.zeros((4, 32, 32, DEPTH), np.int16), np.zeros((32, 32, DEPTH), np.uint8)
    for i, one in enumerate(shown):
        stack[..., FIRST + i] = np.round(one.pixels * 700)
        seg[..., FIRST + i] = one.mask
    for name, data in zip(NAMES, stack, strict=True):
        nib.save(nib.Nifti1Image(data, matrix), folder / f"P_001_{name}.nii.gz")
    nib.save(nib.Nifti1Image(seg, matrix), folder / "P_001_seg.nii.gz")
    return folder


@pytest.fixture
def quick(models, tmp_path):
    """Translate with the tiny models and few steps into out/."""

    def run(images, task, target, **options):
        return translate(
            images, Wish(task, target), **{"models": models, "settings": FEW, "out": tmp_path / "out", **options}
        )

    return run


def voxels(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


def results(out: Path) -> list[str]:
    return sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())


def rows(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((out / "P_001_regress_0.3_slices3-5.csv").read_text().splitlines()))


def test_the_panel_of_a_volume_names_its_slice(quick, patient, tmp_path, monkeypatch):
    titles, drawn = [], panel.translation
    monkeypatch.setattr(panel, "translation", lambda *told: titles.append(told[-1]) or drawn(*told))
    quick(patient, "regress", "0.3", slices=(4, 7))
    told = json.loads((tmp_path / "out" / "P_001_regress_0.3_slices4-6.json").read_text())["panel"]
    (title,) = titles
    assert title.split(", ")[0] == told.split(", ")[0]
    assert title.startswith("slice ")


def test_a_volume_of_another_patient_is_not_written_over(quick, patient, tmp_path):
    quick(patient, "regress", "0.3", slices=(4, 7))
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    other = Path(shutil.copytree(patient, tmp_path / "elsewhere" / patient.name))
    for path in other.glob("*_t1.nii.gz"):
        image = nib.load(path)
        nib.save(nib.Nifti1Image(voxels(path) + np.int16(1), image.affine), path)
    with pytest.raises(InputError, match=r"P_001_t1\.nii\.gz: .* tells of another input of that name"):
        quick(other, "regress", "0.3", slices=(4, 7))
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


def test_a_patient_comes_back_with_the_chosen_slices_changed(quick, patient, tmp_path):
    done = quick(patient, "regress", "0.3", slices=(4, 7))
    assert [one.record["slice"] for one in done] == [4, 5, 6]
    name = "P_001_regress_0.3_slices4-6"
    assert results(tmp_path / "out") == sorted(
        [f"{name}/P_001_{s}.nii.gz" for s in NAMES]
        + [f"{name}{e}" for e in (".csv", ".json", "_difference.nii.gz", "_panel.png")]
    )
    summed = 0
    for sequence in NAMES:
        before, after = (nib.load(p / f"P_001_{sequence}.nii.gz") for p in (patient, tmp_path / "out" / name))
        assert np.array_equal(before.affine, after.affine)
        assert before.get_data_dtype() == after.get_data_dtype()
        change = voxels(tmp_path / "out" / name / f"P_001_{sequence}.nii.gz").astype(int) - voxels(
            patient / f"P_001_{sequence}.nii.gz"
        )
        assert not np.delete(change, [4, 5, 6], 2).any()
        assert all(change[..., k].any() for k in (4, 5, 6))
        summed = summed + np.abs(change)
    assert np.array_equal(voxels(tmp_path / "out" / f"{name}_difference.nii.gz"), summed)


def test_without_a_choice_all_slices_that_show_brain_are_translated(quick, patient):
    assert [one.record["slice"] for one in quick(patient, "regress", "0.3")] == list(range(FIRST, FIRST + 6))


def test_the_table_and_the_record_tell_each_slice(quick, patient, tmp_path):
    done = quick(patient, "regress", "0.3", slices=(3, 6))
    table = rows(tmp_path / "out")
    record = json.loads((tmp_path / "out" / "P_001_regress_0.3_slices3-5.json").read_text())
    assert [row["slice"] for row in table] == ["3", "4", "5"]
    assert [one["slice"] for one in record["slices"]] == [3, 4, 5]
    for row, one in zip(table, done, strict=True):
        assert float(row["value before"]) == one.record["before"]["value"]
        assert float(row["value after"]) == one.record["after"]["value"]
        low, high = one.source.window[:, :, None, None].unbind(1)
        share = ((one.result.pixels - one.source.pixels).abs() / (high - low)).mean(0)
        k = int(row["slice"])
        mask = torch.from_numpy(voxels(patient / "P_001_seg.nii.gz")[..., k].astype(int)) > 0
        mask = (
            mask.T.flip(0, 1)
            if nib.aff2axcodes(nib.load(patient / "P_001_seg.nii.gz").affine)[:2] == ("R", "A")
            else mask.T
        )
        assert mask.any()
        brain = ~one.source.background
        assert float(row["changed_inside"]) == pytest.approx(float(share[mask & brain].mean()), rel=1e-3)
        assert float(row["changed_outside"]) == pytest.approx(float(share[brain & ~mask].mean()), rel=1e-3)
    assert record["input"] == [f"P_001_{name}.nii.gz" for name in NAMES]
    assert str(tmp_path) not in json.dumps(record)


def test_a_lone_slice_is_written_as_an_image_too(quick, patient, tmp_path):
    quick(patient, "regress", "0.3", slices=(5, 6))
    name = "P_001_regress_0.3"
    assert {f"{name}_slice5/P_001_{s}.nii.gz" for s in NAMES} < set(results(tmp_path / "out"))
    whole = voxels(tmp_path / "out" / f"{name}_slices5-5" / "P_001_t2.nii.gz")
    image = nib.load(tmp_path / "out" / f"{name}_slice5" / "P_001_t2.nii.gz")
    assert np.array_equal(np.asarray(image.dataobj)[..., 0], whole[..., 5])
    wanted = nib.load(patient / "P_001_t2.nii.gz").slicer[:, :, 5:6].affine
    assert np.allclose(image.affine, wanted)


def stopping_after(monkeypatch, batches):
    """Let the translation be interrupted after some batches; return how many batches are walked."""
    walked, real = [], module.translate_batch

    def one(*arguments):
        if len(walked) == batches:
            raise KeyboardInterrupt
        walked.append(1)
        return real(*arguments)

    monkeypatch.setattr(module, "translate_batch", one)
    return walked


@pytest.mark.parametrize("region", [None, "auto", "ellipse:16,16,6,5"])
def test_a_stopped_patient_goes_on_where_it_stopped(quick, patient, tmp_path, monkeypatch, region):
    quick(patient, "regress", "0.3", region=region, out=tmp_path / "whole")
    with monkeypatch.context() as patch:
        stopping_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            quick(patient, "regress", "0.3", region=region)
    kept = results(tmp_path / "out")
    assert kept == [f".P_001_regress_0.3.part/{k}.safetensors" for k in range(FIRST, FIRST + 4)]
    with monkeypatch.context() as patch:
        walked, heard = stopping_after(patch, 9), []
        done = quick(patient, "regress", "0.3", region=region, progress=lambda step, steps: heard.append((step, steps)))
    assert len(walked) == 1
    assert {steps for _, steps in heard} == {heard[-1][0]}  # what is done already does not count
    assert [one.kept for one in done] == [True] * 4 + [False] * 2
    assert results(tmp_path / "out") == results(tmp_path / "whole")
    for name in NAMES:
        same = (tmp_path / place / "P_001_regress_0.3" / f"P_001_{name}.nii.gz" for place in ("out", "whole"))
        one, other = (voxels(path) for path in same)
        assert np.array_equal(one, other)
    tables = [(tmp_path / place / "P_001_regress_0.3.csv").read_text().splitlines() for place in ("out", "whole")]
    for one, other in zip(*map(csv.DictReader, tables), strict=True):
        assert {**one, "seconds": ""} == {**other, "seconds": ""}


@pytest.mark.parametrize("what", ["target", "settings", "input", "damage", "region"])
def test_what_was_kept_counts_only_for_the_same_work(quick, patient, monkeypatch, tmp_path, what):
    with monkeypatch.context() as patch:
        stopping_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            quick(patient, "regress", "0.3")
    part = tmp_path / "out" / ".P_001_regress_0.3.part"
    settings = FEW
    if what == "target":
        part = part.rename(part.with_name(".P_001_regress_0.2.part"))
    elif what == "settings":
        settings = replace(FEW, strength=0.3)
    elif what == "input":
        path = patient / "P_001_t2.nii.gz"
        image = nib.load(path)
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj) + np.int16(1), image.affine), path)
    elif what == "damage":
        for file in part.iterdir():
            data = bytearray(file.read_bytes())
            data[-3] ^= 16
            file.write_bytes(data)
    target = "0.2" if what == "target" else "0.3"
    region = "ellipse:16,16,9,9" if what == "region" else None
    assert not any(one.kept for one in quick(patient, "regress", target, region=region, settings=settings))


def test_what_is_all_done_needs_no_network(quick, patient, monkeypatch, tmp_path):
    """Stopped between the last slice and the volume: nothing is walked again."""
    with monkeypatch.context() as patch:
        patch.setattr(stacks.volume, "write", lambda *arguments: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(DiskError, match="No space left"):
            quick(patient, "regress", "0.3", slices=(3, 6))
    with monkeypatch.context() as patch:
        walked = stopping_after(patch, 0)
        assert len(quick(patient, "regress", "0.3", slices=(3, 6))) == 3
    assert walked == []
    assert not (tmp_path / "out" / ".P_001_regress_0.3_slices3-5.part").exists()


def test_segment_takes_a_mask_volume(quick, patient, tmp_path):
    done = quick(patient, "segment", str(patient / "P_001_seg.nii.gz"), slices=(4, 6))
    assert [bool(one.targets[0].any()) for one in done] == [True, True]
    assert not torch.equal(done[0].targets[0], done[1].targets[0])


def test_a_four_dimensional_file_is_a_patient_too(quick, patient, tmp_path):
    data = np.stack([voxels(patient / f"P_001_{name}.nii.gz") for name in NAMES], 3)
    path = tmp_path / "four.nii.gz"
    nib.save(nib.Nifti1Image(data, nib.load(patient / "P_001_t1.nii.gz").affine), path)
    quick(path, "regress", "0.3", slices=(4, 6))
    after = voxels(tmp_path / "out" / "four_regress_0.3_slices4-5.nii.gz")
    assert after.shape == data.shape
    assert not np.delete(after.astype(int) - data, [4, 5], 2).any()


def test_nothing_is_written_without_a_folder(quick, patient, tmp_path):
    assert len(quick(patient, "regress", "0.3", slices=(4, 6), out=None)) == 2
    assert not (tmp_path / "out").exists()


def test_patients_and_slices_come_in_the_order_given(quick, patient, images):
    done = quick([images / "slice.nii", patient, images / "healthy.nii"], "regress", "0.3", slices=None)
    assert [one.record.get("slice") for one in done] == [None, *range(FIRST, FIRST + 6), None]


@pytest.mark.parametrize(
    ("slices", "words"),
    [((0, 2), "--slices 0:2: nothing to translate there"), ((50, 60), "axial slices are 0 to 11")],
)
def test_slices_that_are_not_there_are_refused(quick, patient, slices, words, tmp_path):
    with pytest.raises(InputError, match=words):
        quick(patient, "regress", "0.3", slices=slices)
    assert not (tmp_path / "out").exists()


def test_slices_of_a_slice_are_refused(quick, images):
    with pytest.raises(InputError, match=r"slice.nii is a single slice and no volume"):
        quick(images / "slice.nii", "regress", "0.3", slices=(4, 6))


def test_results_never_overwrite_the_patient(quick, patient):
    named_so = patient.rename(patient.with_name("P_001_regress_0.3_slices4-4"))
    with pytest.raises(InputError, match="never overwritten"):
        quick(named_so, "regress", "0.3", out=named_so.parent, slices=(4, 5))


def test_the_mask_of_another_patient_in_the_folder_counts_as_none(quick, patient):
    for name in NAMES:
        shutil.copy(patient / f"P_001_{name}.nii.gz", patient / f"P_002_{name}.nii.gz")
    done = quick(patient, "regress", "0.3", slices=(4, 5))
    inside = {one.record["input"][0]: one.record["preservation"].get("changed_inside") for one in done}
    assert inside["P_001_t1.nii.gz"] is not None
    assert inside["P_002_t1.nii.gz"] is None


def test_a_file_that_belongs_to_no_case_is_refused(quick, patient):
    shutil.copy(patient / "P_001_seg.nii.gz", patient / "skull.nii.gz")
    with pytest.raises(InputError, match=r"skull.nii.gz: its name tells no sequence; complete the case, or move"):
        quick(patient, "regress", "0.3", slices=(4, 5))


def test_a_mask_on_another_grid_counts_as_none(quick, patient, tmp_path):
    nib.save(nib.Nifti1Image(np.ones((5, 5, 9), np.uint8), np.eye(4)), patient / "P_001_seg.nii.gz")
    (one, _) = quick(patient, "regress", "0.3", slices=(4, 6))
    assert "changed_inside" not in one.record["preservation"]
    assert one.record["preservation"]["changed"] > 0


def test_four_files_of_one_case_are_one_volume(quick, patient, tmp_path):
    files = [patient / f"P_001_{name}.nii.gz" for name in ("flair", "t1", "t2", "t1ce")]
    done = quick(files, "regress", "0.3", slices=(4, 6))
    assert [one.record["slice"] for one in done] == [4, 5]
    assert done[0].record["input"] == [f"P_001_{name}.nii.gz" for name in NAMES]
    assert (tmp_path / "out" / "P_001_regress_0.3_slices4-5" / "P_001_t1ce.nii.gz").exists()


def test_slices_that_a_wanted_mask_does_not_reach_are_left_as_they_are(quick, patient, tmp_path):
    """A slab of finer slices, on a grid of its own, over two of the volume's."""
    image = nib.load(patient / "P_001_t1.nii.gz")
    slab = np.zeros((32, 32, 16), np.uint8)
    slab[10:20, 10:20] = 1
    matrix = image.affine.copy()
    matrix[:3, 3] += 5 * matrix[:3, 2] - matrix[:3, 2] / 2
    matrix[:3, 2] /= 8
    nib.save(nib.Nifti1Image(slab, matrix), tmp_path / "slab.nii.gz")
    done = quick(patient, "segment", str(tmp_path / "slab.nii.gz"), slices=(3, 9))
    assert [one.record["slice"] for one in done] == [5, 6]
    with pytest.raises(InputError):
        quick(patient, "segment", str(tmp_path / "slab.nii.gz"), slices=(8, 9))


def failing_at(monkeypatch, *numbers):
    """Let guidance blow up the slices of these numbers in the order walked, one a batch; return what was walked."""
    walked, real = [], steering.translate_batch

    def one(job, edits):
        walked.append(len(edits))
        if len(walked) - 1 in numbers:
            raise SamplingError("blown up")
        return real(job, edits)

    monkeypatch.setattr(steering, "translate_batch", one)
    return walked


ONE_BY_ONE = replace(FEW, batch_size=1)


def test_slices_that_failed_are_told_and_tried_again_alone(quick, patient, tmp_path, monkeypatch):
    part, record = tmp_path / "out" / ".P_001_regress_0.3.part", tmp_path / "out" / "P_001_regress_0.3.json"
    heard = []
    with monkeypatch.context() as patch:
        failing_at(patch, 1, 4)
        options = {"settings": ONE_BY_ONE, "failed": lambda file, error: heard.append(str(error))}
        done = quick(patient, "regress", "0.3", **options)
    assert heard == ["blown up"] * 2
    assert [one.record["slice"] for one in done] == [3, 5, 6, 8]
    assert json.loads(record.read_text())["failed"] == [4, 7]
    assert sorted(file.name for file in part.iterdir()) == [f"{k}.safetensors" for k in (3, 5, 6, 8)]
    with monkeypatch.context() as patch:
        walked = failing_at(patch)
        assert len(quick(patient, "regress", "0.3", settings=ONE_BY_ONE)) == 6
    assert walked == [1, 1]
    assert json.loads(record.read_text())["failed"] == []
    assert not part.exists()


def test_a_slice_left_alone_by_failures_is_no_lone_slice(quick, patient, tmp_path, monkeypatch):
    failing_at(monkeypatch, 0)
    options = {"settings": ONE_BY_ONE, "failed": lambda file, error: None}
    assert len(quick(patient, "regress", "0.3", slices=(4, 6), **options)) == 1
    assert not [name for name in results(tmp_path / "out") if "slice5/" in name]


def test_other_slices_of_a_patient_overwrite_nothing(quick, patient, tmp_path):
    for slices in (None, (4, 6), (5, 7), (5, 99), (5, 6)):
        quick(patient, "regress", "0.3", slices=slices)
    records = sorted(path.name for path in (tmp_path / "out").glob("*.json"))
    ends = ["", "_slice5", "_slices4-5", "_slices5-98", "_slices5-5", "_slices5-6"]
    assert records == sorted(f"P_001_regress_0.3{end}.json" for end in ends)


def test_slices_whose_target_is_refused_are_told_and_left_as_they_are(quick, patient, tmp_path):
    heard = []
    low = [one.record["before"]["value"] for one in quick(patient, "regress", "0.3", out=None)]
    edge = sorted(low)[2]  # counted from there on upwards, targets lie beyond what the guide was trained on
    step = 0.35 - edge
    done = quick(patient, "regress", f"by:{step:+.6f}", failed=lambda file, why: heard.append(str(why)))
    beyond = [FIRST + i for i, value in enumerate(low) if value + step > 0.35 + 1e-6]
    assert 0 < len(beyond) < len(low)
    assert len(heard) == len(beyond)
    assert all("outside the values" in why for why in heard)
    assert [one.record["slice"] for one in done] == [FIRST + i for i in range(len(low)) if FIRST + i not in beyond]
    (record,) = (tmp_path / "out").glob("P_001_*.json")
    assert json.loads(record.read_text())["failed"] == beyond


def test_a_finished_patient_is_read_back_unless_something_of_it_is_missing(quick, patient, monkeypatch, tmp_path):
    fresh = quick(patient, "regress", "0.3", slices=(3, 6))
    with monkeypatch.context() as patch:
        stopping_after(patch, 0)
        again = quick(patient, "regress", "0.3", slices=(3, 6))
    assert [one.kept for one in again] == [True] * 3
    for one, other in zip(fresh, again, strict=True):
        assert torch.equal(one.result.pixels, other.result.pixels)
        assert torch.equal(one.source.pixels, other.source.pixels)
        assert one.record == other.record
    volume = tmp_path / "out" / "P_001_regress_0.3_slices3-5" / "P_001_t2.nii.gz"
    volume.write_bytes(volume.read_bytes()[:-1])
    assert not any(one.kept for one in quick(patient, "regress", "0.3", slices=(3, 6)))
    assert all(one.kept for one in quick(patient, "regress", "0.3", slices=(3, 6)))
    (patient / "P_001_seg.nii.gz").unlink()  # which told what lies inside
    assert not any(one.kept for one in quick(patient, "regress", "0.3", slices=(3, 6)))


def test_of_a_lone_slice_the_image_counts_too(quick, patient, tmp_path):
    assert not quick(patient, "regress", "0.3", slices=(5, 6))[0].kept
    assert quick(patient, "regress", "0.3", slices=(5, 6))[0].kept
    (tmp_path / "out" / "P_001_regress_0.3_slice5" / "P_001_t1.nii.gz").unlink()
    assert not quick(patient, "regress", "0.3", slices=(5, 6))[0].kept


def test_few_volumes_are_held_at_a_time(models, patient, tmp_path, monkeypatch):
    there, read, most = weakref.WeakSet(), [], []
    real, walk = translation.opened, module.translate_batch

    def opened(*arguments, **options):
        found = real(*arguments, **options)
        there.add(found.volume.pixels)
        read.append(1)
        return found

    def batch(*arguments):
        most.append(len(there))
        return walk(*arguments)

    monkeypatch.setattr(translation, "opened", opened)
    monkeypatch.setattr(module, "translate_batch", batch)
    data = np.stack([voxels(patient / f"P_001_{name}.nii.gz") for name in NAMES], 3)
    nib.save(nib.Nifti1Image(data, nib.load(patient / "P_001_t1.nii.gz").affine), tmp_path / "four.nii.gz")
    found = translation.translations(
        [tmp_path / "four.nii.gz"] * 7, Wish("regress", "0.3"), models=models, settings=FEW, out=tmp_path / "out"
    )
    assert sum(1 for _ in found) == 42
    assert len(read) == 7
    assert max(most) <= 4  # one is read, one waits, one is walked, one is written
