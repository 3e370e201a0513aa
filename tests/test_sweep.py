"""Contact sheets: a tile for each target and level, and what came of it."""

import io
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest

from knife import panel
from knife.errors import InputError, SettingsError
from knife.panel import RED
from knife.settings import Settings
from knife.sweep import judged, reached, sheet, sweep, wanted

FEW = Settings(noise_level=10, steps=5)


@pytest.fixture
def quick(models, tmp_path):
    def run(image, targets, levels=(), **options):
        return sweep(image, "regress", targets, levels, out=tmp_path / "out", settings=FEW, models=models, **options)

    return run


def test_a_row_for_each_level_and_a_column_for_each_target(quick, images, tmp_path):
    heard = []
    rows, file = quick(images / "slice.nii", ["0.1", "0.3"], [5, 10, 3], progress=lambda *told: heard.append(told))
    asked = [[(t.record["settings"]["noise_level"], t.record["target"]) for t in row] for row in rows]
    assert asked == [[(level, target) for target in ("0.1", "0.3")] for level in (5, 10, 3)]
    assert [row[0].record["settings"]["steps"] for row in rows] == [5, 5, 3]
    assert heard == [(done, 6) for done in range(7)]
    assert [path.name for path in (tmp_path / "out").iterdir()] == [file.name] == ["slice_regress_sweep.png"]


def test_the_sheet_shows_the_input_and_what_became_of_it(quick, images):
    rows, file = quick(images / "slice.nii", ["0.1", "0.3"])
    shown = np.asarray(PIL.Image.open(io.BytesIO(file.read_bytes())))[..., 0]
    one = rows[0][1]
    most = int(sum(t.change.abs().mean((1, 2)) for t in rows[0]).argmax())
    for image in (one.source, one.result):
        tile = image.normalised(None, (0, 1))[most].mul(255).round().byte().numpy().repeat(4, 0).repeat(4, 1)
        places = [
            (i, j)
            for i in range(shown.shape[0] - 127)
            for j in range(shown.shape[1] - 127)
            if shown[i + 60, j + 60] == tile[60, 60] and np.array_equal(shown[i : i + 128, j : j + 128], tile)
        ]
        assert places


def test_maps_tell_what_was_reached(quick, images):
    rows, _ = quick(images / "slice.nii", ["0.1", "by:+50%"], region="ellipse:16,16,9,6")
    near, far = rows[0]
    after = f"{near.record['after']['value']:.3g}"
    judge = {"before": {}, "after": {"value": 0.0987}, "error": {"regress": 0.0013}}
    assert reached(near) == after  # nobody knows what is near enough
    assert judged(near) == ""
    assert reached(replace(near, record={**near.record, "reached": True})) == f"{after}, reached"
    assert reached(replace(near, record={**near.record, "reached": False})) == f"{after}, not reached"
    assert judged(replace(near, record={**near.record, "judge": judge})) == "judge: 0.0987"
    assert wanted(near) == "wanted 0.1"
    assert wanted(far) == f"by:+50% = {1.5 * far.record['before']['value']:.6g}"
    told = replace(near, record={**near.record, "reached": True, "judge": judge})
    assert sheet([[told]]) != sheet([[near]])


def test_several_numbers_are_told_by_their_error(models, images, tmp_path):
    mask = str(images / "mask.nii")
    rows, file = sweep(images / "healthy.nii", "segment", [mask], [], out=tmp_path, settings=FEW, models=models)
    assert reached(rows[0][0]) == f"{rows[0][0].record['error']['segment']:.3g} off"
    shown = np.asarray(PIL.Image.open(io.BytesIO(file.read_bytes())))
    assert (shown == RED).all(2).sum() == 16 * (outline(rows[0][0].wanted).sum())


def outline(mask):
    return (panel.outlined(panel.grey(mask.float(), 0, 1), mask) == RED).all(2)


def test_colours_are_swept_as_colours(quick, images):
    rows, file = quick(images / "face.png", ["+"])
    assert len(rows) == 1
    assert PIL.Image.open(io.BytesIO(file.read_bytes())).mode == "RGB"


def test_what_cannot_be_swept_is_refused(quick, images, tmp_path):
    with pytest.raises(SettingsError, match="--targets: none given"):
        quick(images / "slice.nii", [])
    with pytest.raises(InputError, match="images, and a sheet shows one"):
        quick([images / "slice.nii"] * 2, ["0.1"])
    assert not (tmp_path / "out").exists()
