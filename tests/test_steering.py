"""Steering: the closed loop, several tasks at once, judges and onlookers, and what is refused on the way."""

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from knife import steering
from knife.checkpoint import STARTER, describe, read_tensors, save, stored_models
from knife.errors import InputError, ModelError, SettingsError, TargetError
from knife.image import read
from knife.settings import FIRST, ROUNDS, STRENGTH, Settings, Wish
from knife.steering import Attempt, best, next_strength
from knife.translation import translate

FEW = Settings(noise_level=10, steps=5, max_reconstruction=9)


@pytest.fixture
def quick(models, images):
    """Translate one image with the tiny models and few steps."""

    def run(*wishes, image="slice.nii", settings=FEW, **options):
        (done,) = translate(images / image, *wishes, **{"models": models, "settings": settings, **options})
        return done

    return run


@pytest.fixture
def own(models, tmp_path):
    """Copy the tiny models of brains, to be added to."""
    return Path(shutil.copytree(models / "brain", tmp_path / "own" / "brain")).parent


def tried(*pairs):
    return [Attempt(strength, torch.zeros(1), None, {}, {}, [], miss) for strength, miss in pairs]


# ---------------------------------------------------------------------------------------------------- the closed loop


def test_of_attempts_that_reach_their_target_the_first_counts_and_else_the_nearest():
    assert best(tried((0.1, 3.0), (0.2, 0.9), (0.4, 0.1))).strength == 0.2
    assert best(tried((0.1, 3.0), (0.2, 1.5), (0.4, 2.0))).strength == 0.2
    assert best(tried((0.1, 3.0), (0.2, 2.9), (0.4, 2.8))).strength == 0.1  # hardly nearer, at a price
    assert best(tried((0.1, 1.1), (0.2, 0.99))).strength == 0.2
    assert best(tried((0.1, 3.0), (0.4, 0.2), (0.2, 0.9))).strength == 0.2


@pytest.mark.parametrize(
    ("attempts", "following"),
    [
        ([(0.1, 9)], 0.2),
        ([(0.1, 9), (0.2, 5)], 0.4),
        ([(0.1, 5), (0.2, 9)], math.sqrt(0.02)),
        ([(0.1, 9), (0.2, 5), (0.4, 7)], math.sqrt(0.08)),
    ],
)
def test_the_strength_grows_while_that_helps(attempts, following):
    assert next_strength(tried(*attempts)) == pytest.approx(following)


def test_a_target_that_is_not_reached_is_tried_for_with_other_strengths(quick):
    done = quick(Wish("regress", "0.3"), settings=replace(FEW, tolerance=1e-9))
    strengths = [attempt["strength"] for attempt in done.record["attempts"]]
    assert strengths[:2] == [FIRST, 2 * FIRST]
    assert len(strengths) == ROUNDS
    assert done.record["reached"] is False
    assert done.record["tolerance"] == {"regress": 1e-9}
    errors = [attempt["error"]["regress"] for attempt in done.record["attempts"]]
    assert done.record["strength"] == strengths[errors.index(done.record["error"]["regress"])]
    assert done.record["error"]["regress"] < 1.25 * min(errors)
    assert done.record["error"]["regress"] == pytest.approx(abs(done.record["after"]["value"] - 0.3), rel=1e-4)


def test_each_attempt_is_what_that_strength_alone_gives(quick):
    done = quick(Wish("regress", "0.3"), settings=replace(FEW, tolerance=1e-9))
    alone = quick(Wish("regress", "0.3"), settings=replace(FEW, strength=done.record["strength"]))
    torch.testing.assert_close(done.change, alone.change, rtol=1e-4, atol=1e-5)
    assert done.record["along"][-1]["value"] == pytest.approx(alone.record["along"][-1]["value"], rel=1e-3)


def test_what_is_near_enough_at_once_is_decoded_once(quick):
    steps = []
    done = quick(
        Wish("regress", "0.3"), settings=replace(FEW, tolerance=9), progress=lambda i, total: steps.append((i, total))
    )
    assert [attempt["strength"] for attempt in done.record["attempts"]] == [FIRST]
    assert done.record["reached"] is True
    assert steps[-2:] == [(10, 20), (20, 20)]  # what further attempts would have taken is skipped


def test_of_a_batch_those_that_missed_alone_are_decoded_again(models, images):
    def errors_at(tolerance):
        places = [images / "slice.nii", images / "healthy.nii"]
        done = translate(places, Wish("regress", "0.3"), models=models, settings=replace(FEW, tolerance=tolerance))
        return [[attempt["error"]["regress"] for attempt in t.record["attempts"]] for t in done]

    first = [errors[0] for errors in errors_at(9)]
    near, far = sorted(first)
    again = errors_at((near + far) / 2)
    assert [len(errors) > 1 for errors in again] == [error == far for error in first]
    assert [errors[0] for errors in again] == first


def test_what_nobody_measured_is_pulled_at_with_the_usual_strength(quick):
    done = quick(Wish("regress", "0.3"), settings=FEW)
    assert [attempt["strength"] for attempt in done.record["attempts"]] == [STRENGTH]
    assert "reached" not in done.record


@pytest.mark.parametrize(("sign", "end"), [("+", "high"), ("-", "low")])
def test_more_and_less_end_where_the_labels_did(models, quick, sign, end):
    most = describe(models / "brain" / "regress.safetensors").card.config[end]
    done, same = quick(Wish("regress", sign)), quick(Wish("regress", f"{most}"))
    assert torch.equal(done.change, same.change)


def test_a_guide_that_knows_its_own_error_closes_the_loop(own, images):
    path = own / "brain" / "regress.safetensors"
    card = describe(path).card
    save(path, read_tensors(path), replace(card, guidance={**card.guidance, "error": 1e-6}).to_json())
    (done,) = translate(images / "slice.nii", Wish("regress", "0.3"), models=own, settings=FEW)
    assert done.record["tolerance"] == {"regress": 2e-6}
    assert len(done.record["attempts"]) == ROUNDS
    (fixed,) = translate(images / "slice.nii", Wish("regress", "0.3"), models=own, settings=replace(FEW, strength=0.3))
    assert len(fixed.record["attempts"]) == 1
    assert fixed.record["reached"] is False


def test_a_later_attempt_that_blows_up_leaves_the_earlier_ones(quick, monkeypatch):
    real, seen = steering.check_sane, []

    def check(job, edits, level, x):
        seen.append(level)
        if seen.count(0) == 2:  # the end of the second decode
            raise steering.SamplingError("blown up.")
        real(job, edits, level, x)

    monkeypatch.setattr(steering, "check_sane", check)
    done = quick(Wish("regress", "0.3"), settings=replace(FEW, tolerance=1e-9))
    assert [attempt["strength"] for attempt in done.record["attempts"]] == [FIRST]


def test_an_image_that_blows_up_later_does_not_end_the_loop_of_its_neighbour(models, images, monkeypatch):
    settings = replace(FEW, tolerance=1e-9)
    places = [images / "healthy.nii", images / "slice.nii"]
    (alone,) = translate(places[1], Wish("regress", "0.3"), models=models, settings=settings)
    real, decodes = steering.check_sane, []

    def check(job, edits, level, x):
        decodes.append(level == 0 and edits[0].image.source.paths[0] == places[0])
        if sum(decodes) > 1 and edits[0].image.source.paths[0] == places[0]:  # from its second decode on
            raise steering.SamplingError("blown up.")
        real(job, edits, level, x)

    monkeypatch.setattr(steering, "check_sane", check)
    bad, good = translate(places, Wish("regress", "0.3"), models=models, settings=settings)
    assert len(bad.record["attempts"]) == 1
    tried = [attempt["strength"] for attempt in good.record["attempts"]]
    assert tried == [attempt["strength"] for attempt in alone.record["attempts"]]


def test_what_nothing_tells_of_counts_neither_as_reached_nor_as_missed(own, images):
    """Nothing tells how near is near: no loop, no verdict."""
    wishes = (Wish("regress", "0.3"), Wish("classify", "healthy"))
    (done,) = translate(images / "slice.nii", *wishes, models=own, settings=FEW)
    assert set(done.record["error"]) == {"regress", "classify"}
    assert "reached" not in done.record
    assert done.record["strength"] == STRENGTH


@pytest.mark.parametrize(
    ("begins", "tolerance"),
    [(1.0, 0.08), (0.6, 0.06), (0.3, 0.03), (0.05, 0.01), (0.0, 0.01), (float("nan"), float("inf"))],
)
def test_a_tenth_of_the_way_is_near_enough_within_what_a_guide_can_tell(models, begins, tolerance):
    stored = describe(models / "brain" / "regress.safetensors")
    knowing = replace(stored, card=replace(stored.card, guidance={"error": 0.04}))
    guide = steering.Guide(None, knowing, None)
    assert guide.tolerance(begins, Settings()) == pytest.approx(tolerance)
    assert steering.Guide(None, stored, None).tolerance(begins, Settings()) == math.inf
    task_says = replace(knowing, card=replace(knowing.card, config={"tolerance": 0.1}))
    assert steering.Guide(None, task_says, None).tolerance(0.5, Settings()) == 0.1
    assert guide.tolerance(0.5, Settings(tolerance=0.2)) == 0.2


def test_the_shipped_guides_close_the_loop_and_know_their_noise_level():
    for stored in stored_models(STARTER):
        if stored.card.kind != "diffusion":
            assert 0 < stored.card.guidance["error"] < 0.1
            assert 400 <= stored.card.calibration["noise_level"] <= 600
            assert steering.Guide(None, stored, None).tolerance(0.5, Settings()) <= 0.1


# -------------------------------------------------------------------------------------------------- several tasks


def test_the_order_of_tasks_does_not_matter(quick, images, tmp_path):
    wishes = [Wish("regress", "0.3", 0.5), Wish("segment", str(images / "mask.nii"), 2.0), Wish("classify", "diseased")]
    one, other = quick(*wishes), quick(*wishes[::-1], out=tmp_path)
    assert torch.equal(one.change, other.change)
    assert one.record["task"] == other.record["task"] == "classify, regress, segment"
    assert set(one.record["after"]) == {
        "classify p(diseased)", "classify p(healthy)", "regress value", "segment area", "segment dice",
    }  # fmt: skip
    assert other.files.image.name == "slice_classify_diseased_regress_0.3_segment_mask.nii"
    assert [wish["weight"] for wish in one.record["wishes"]] == [1.0, 0.5, 2.0]


def test_each_of_several_tasks_is_nearer_its_target_than_without_it(quick):
    settings = replace(FEW, strength=0.3)
    both = quick(Wish("regress", "0.3"), Wish("classify", "healthy"), settings=settings)
    regress = quick(Wish("regress", "0.3"), settings=settings)
    assert both.record["error"]["regress"] < abs(both.record["before"]["regress value"] - 0.3)
    assert both.record["after"]["classify p(healthy)"] > regress.record["others"]["after"]["classify p(healthy)"]


def test_weights_turn_the_balance(quick):
    settings = replace(FEW, strength=0.2)
    light, heavy = (
        quick(Wish("regress", "0.3", weight), Wish("classify", "healthy"), settings=settings) for weight in (0.2, 5.0)
    )
    assert heavy.record["error"]["regress"] < 0.99 * light.record["error"]["regress"]


def test_a_window_says_where_a_task_guides(quick):
    none, low, all_ = (
        quick(Wish("regress", "0.3", window=window), settings=replace(FEW, strength=0.2))
        for window in ((9, 10), (0, 4), None)
    )
    assert not torch.equal(none.change, all_.change)
    assert not torch.equal(low.change, all_.change)
    twice = quick(Wish("regress", "0.3", window=(0, 10)), settings=replace(FEW, strength=0.2))
    assert torch.equal(twice.change, all_.change)


@pytest.mark.parametrize(
    ("wishes", "words"),
    [
        ([], "--task: none given"),
        ([Wish("regress", "0.1"), Wish("regress", "0.2")], "--task regress: given twice"),
        ([Wish("regress", "0.1", 0.0)], "--weight 0: give a number above 0"),
        ([Wish("regress", "0.1", window=(10, 40))], "--window 10:40: no step of the walk to 10 lies in it"),
        ([Wish("regress", "0.1", window=(8, 3))], "--window 8:3: give two noise levels"),
        ([Wish("regress", "0.1", window=(4, 5))], "--window 4:5: no step of the walk to 10 lies in it"),
    ],
)
def test_wishes_that_mean_nothing_are_refused(quick, wishes, words):
    with pytest.raises(SettingsError, match=words):
        quick(*wishes)


def test_tasks_that_guide_together_need_one_diffusion_model(own, images):
    shutil.copytree(own / "brain", own / "other")
    (own / "other" / "regress.safetensors").unlink()
    (own / "brain" / "classify.safetensors").unlink()
    with pytest.raises(ModelError, match=r"task regress: no trained models in .* under the name other"):
        translate(images / "slice.nii", Wish("regress", "0.3"), Wish("classify", "healthy"), models=own, settings=FEW)


# ------------------------------------------------------------------------------------------------------------ targets


@pytest.mark.parametrize(("by", "wanted"), [("-0.02", lambda v: v - 0.02), ("+15%", lambda v: v * 1.15)])
def test_a_target_may_count_from_what_is_there(quick, by, wanted):
    settings = replace(FEW, strength=0.2, extrapolate=True)
    done = quick(Wish("regress", f"by:{by}"), settings=settings)
    before, after = done.record["before"]["value"], done.record["after"]["value"]
    assert done.targets[0] * 0.1 + 0.1 == pytest.approx(wanted(before), rel=1e-4)
    assert done.record["error"]["regress"] == pytest.approx(abs(after - wanted(before)), rel=1e-3)


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        (Wish("regress", "by:much"), r"--by much: give what to add, as -0.02, or a share of what is there, as \+15%"),
        (Wish("regress", "by:1.2.3"), r"--by 1.2.3: give what to add"),
        (Wish("classify", "by:+1"), r"--by \+1: the task classify has no single number to count from"),
        (Wish("regress", "9"), r"outside the values .* --allow-extrapolation"),
    ],
)
def test_targets_that_mean_nothing_are_refused(quick, wish, words):
    with pytest.raises(TargetError, match=words):
        quick(wish)


def test_extrapolation_is_allowed_on_request_and_told(quick):
    done = quick(Wish("regress", "9"), settings=replace(FEW, strength=0.1, extrapolate=True))
    assert done.targets[0] == pytest.approx(89)
    assert done.record["settings"]["extrapolate"] is True


# -------------------------------------------------------------------------------------------- regions and preservation


def test_an_automatic_region_is_where_a_first_decode_changed_most(quick, monkeypatch):
    asked = []

    def corner(change):
        asked.append(change)
        where = torch.zeros(1, *change.shape[1:])
        where[:, :8, :8] = 1
        return where

    monkeypatch.setattr(steering, "changed_most", corner)
    free = quick(Wish("regress", "0.3"), settings=replace(FEW, strength=0.3))
    held = quick(Wish("regress", "0.3"), settings=replace(FEW, strength=0.3), region="auto")
    torch.testing.assert_close(asked, [free.change])
    changed = (held.result.pixels != held.source.pixels).any(0)
    assert changed[:15, :15].any()
    assert not changed[17:].any()
    assert not changed[:, 17:].any()
    assert held.record["region"] == "auto"
    assert held.record["preservation"]["changed_outside"] == 0


def test_an_image_that_does_not_come_back_is_refused_alone(models, images):
    heard = []
    with pytest.raises(InputError, match=r"slice.nii: unguided, .* more than --max-reconstruction 0.0%"):
        translate(
            images / "slice.nii",
            Wish("regress", "0.3"),
            models=models,
            settings=replace(FEW, max_reconstruction=1e-9),
        )
    both = translate(
        [images / "slice.nii", images / "healthy.nii"], Wish("regress", "0.3"), models=models, settings=FEW
    )
    errors = sorted((t.record["reconstruction"], t.source.source.paths[0].name) for t in both)
    limit = (errors[0][0] + errors[1][0]) / 2
    done = translate(
        [images / "slice.nii", images / "healthy.nii"],
        Wish("regress", "0.3"),
        models=models,
        settings=replace(FEW, max_reconstruction=limit),
        failed=lambda file, error: heard.append(file.name),
    )
    assert heard == [errors[1][1]]
    assert [t.source.source.paths[0].name for t in done] == [errors[0][1]]


def test_networks_compute_in_bfloat16_where_asked_and_images_stay_in_float32(quick):
    wish = Wish("regress", "0.3")
    exact = quick(wish, settings=replace(FEW, strength=0.3, precision="float32"))
    coarse = quick(wish, settings=replace(FEW, strength=0.3, precision="bfloat16"))
    apart, size = (coarse.change - exact.change).abs().mean(), exact.change.abs().mean()
    assert 0 < apart < 0.1 * size
    assert coarse.change.dtype == torch.float32
    assert coarse.record["settings"]["precision"] == "bfloat16"
    assert coarse.record["before"] == exact.record["before"]  # what a guide reads stays exact
    still = quick(wish, settings=replace(FEW, strength=0.0, precision="bfloat16"))
    assert torch.equal(still.result.pixels, still.source.pixels)


def test_an_unknown_precision_is_refused():
    with pytest.raises(SettingsError, match=r"--precision float16: unknown; give one of auto, float32, bfloat16\."):
        Settings(precision="float16")


def test_the_record_tells_what_other_tasks_see(quick):
    done = quick(Wish("classify", "healthy"), settings=replace(FEW, strength=0.3))
    others = done.record["others"]
    assert set(others["before"]) == set(others["after"]) == {"regress value", "segment area"}
    assert others["before"]["regress value"] != others["after"]["regress value"]


def test_onlookers_that_cannot_be_read_are_left_out(own, images):
    damaged = own / "brain" / "segment.safetensors"
    tensors = {name: tensor[..., :1] if tensor.ndim > 3 else tensor for name, tensor in read_tensors(damaged).items()}
    save(damaged, tensors, describe(damaged).card.to_json())  # a card that is right, and weights that do not fit it
    (done,) = translate(images / "slice.nii", Wish("classify", "healthy"), models=own, settings=FEW)
    assert set(done.record["others"]["after"]) == {"regress value"}
    damaged.write_bytes(b"no model")
    (done,) = translate(images / "slice.nii", Wish("classify", "healthy"), models=own, settings=FEW)
    assert set(done.record["others"]["after"]) == {"regress value"}


# ------------------------------------------------------------------------------------------------------------- judges


def test_a_judge_measures_and_never_guides(own, images, quick, tmp_path):
    guide = describe(own / "brain" / "regress.safetensors")
    config = {**guide.card.config, "mean": 0.2, "std": 0.05}
    card = replace(guide.card, judge=True, config=config, guidance={})
    save(own / "brain" / "regress.judge.safetensors", read_tensors(guide.path), card.to_json())
    (done,) = translate(images / "slice.nii", Wish("regress", "0.3"), models=own, settings=FEW)
    alone = quick(Wish("regress", "0.3"))
    assert torch.equal(done.change, alone.change)
    judge = done.record["judge"]
    for when in ("before", "after"):  # the same weights, another mean and deviation
        in_units = (done.record[when]["value"] - 0.1) / 0.1
        assert judge[when]["value"] == pytest.approx(in_units * 0.05 + 0.2, rel=1e-4)
    assert judge["error"]["regress"] == pytest.approx(abs(judge["after"]["value"] - 0.3), rel=1e-4)
    assert "judge" not in alone.record
    assert len(done.record["models"]) == 3


def test_pixels_that_were_filled_are_counted(quick, images, tmp_path, models):
    import nibabel
    import numpy as np

    image = nibabel.load(images / "slice.nii")
    data = image.get_fdata().astype(np.float32)
    data[3, 4] = np.nan
    nibabel.save(nibabel.Nifti1Image(data, image.affine), tmp_path / "x.nii")
    with pytest.raises(InputError, match="--nan fill=0"):
        translate(tmp_path / "x.nii", Wish("regress", "0.3"), models=models, settings=FEW)
    (done,) = translate(
        tmp_path / "x.nii", Wish("regress", "0.3"), models=models, settings=FEW, nan="fill=0", out=tmp_path / "out"
    )
    assert done.record["filled"] == 4
    assert read(done.files.image).pixels.isfinite().all()
    assert "filled" not in quick(Wish("regress", "0.3")).record
