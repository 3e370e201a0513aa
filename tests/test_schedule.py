"""The noise levels: closed forms, noising, the path of levels."""

import math
from dataclasses import FrozenInstanceError
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from knife.errors import SettingsError
from knife.schedule import MOST_LEVELS, Schedule, alpha_bar_on, noise, path, timestep

KINDS = ("linear", "cosine")
patient = settings(deadline=None, derandomize=True, max_examples=60)


@patient
@given(st.sampled_from(KINDS), st.integers(1, 2000))
def test_alpha_bar_falls_from_one_towards_nothing(kind, T):
    alpha_bar = Schedule(kind, T).alpha_bar
    assert alpha_bar.dtype == torch.float64
    assert alpha_bar.shape == (T + 1,)
    assert alpha_bar[0] == 1
    assert (alpha_bar.diff() < 0).all()
    assert alpha_bar[-1] > 0


def test_linear_schedule_has_the_published_variances():
    beta = Schedule().beta
    assert len(beta) == 1000
    assert beta[0].item() == pytest.approx(1e-4, rel=1e-14)
    assert beta[-1].item() == pytest.approx(0.02, rel=1e-14)
    assert beta.diff().std() < 1e-17
    assert Schedule("linear", 1000).alpha_bar[-1].item() == pytest.approx(4.0358e-5, rel=1e-4)


def test_linear_schedule_means_the_same_noise_at_any_number_of_levels():
    coarse, fine = Schedule("linear", 1000).alpha_bar, Schedule("linear", 4000).alpha_bar[::4]
    assert (coarse - fine).abs().max() < 2e-3


@pytest.mark.parametrize("T", [2, 10, 20])
def test_linear_schedule_of_few_levels_is_capped(T):
    schedule = Schedule("linear", T)
    assert schedule.beta[-1] == 0.999
    assert schedule.beta[0] == pytest.approx(0.1 / T)
    assert (schedule.alpha_bar > 0).all()


def test_cosine_schedule_is_a_squared_cosine_up_to_its_cap():
    schedule = Schedule("cosine", 1000)
    signal = [math.cos((k / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for k in range(1000)]
    expected = torch.tensor([s / signal[0] for s in signal], dtype=torch.float64)
    torch.testing.assert_close(schedule.alpha_bar[:-1], expected, rtol=1e-11, atol=0)
    assert schedule.beta[-1] == 0.999


@pytest.mark.parametrize("kind", KINDS)
def test_a_schedule_of_one_level_is_one(kind):
    assert Schedule(kind, 1).alpha_bar.shape == (2,)


@pytest.mark.parametrize(("kind", "T", "words"), [("square", 1000, "'square' is unknown"), ("linear", 0, "T = 0")])
def test_schedules_that_cannot_be_are_refused(kind, T, words):
    with pytest.raises(SettingsError, match=words):
        Schedule(kind, T)


def test_as_many_levels_as_are_allowed_make_a_schedule():
    assert Schedule("linear", MOST_LEVELS).T == 100_000


def test_a_schedule_stays_what_it_is():
    """Its levels are worked out once, and would not follow."""
    schedule = Schedule()
    with pytest.raises(FrozenInstanceError):
        schedule.T = 500


def test_digest_tells_schedules_apart():
    digests = {Schedule(kind, T).digest for kind in KINDS for T in (999, 1000)}
    assert len(digests) == 4
    assert {len(digest) for digest in digests} == {16}
    assert Schedule("linear", 1000).digest in digests
    assert Schedule("linear", 1000) == Schedule("linear", 1000)


def test_a_network_is_asked_one_below_the_level_and_never_below_zero():
    assert timestep(torch.tensor([0, 1, 2, 1000])).tolist() == [0, 0, 1, 999]


def test_noise_mixes_each_image_at_its_own_level():
    x0, eps = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = noise(x0, eps, torch.tensor([1.0, 0.64, 0.0], dtype=torch.float64))
    assert torch.equal(x[0], x0[0])
    torch.testing.assert_close(x[1], 0.8 * x0[1] + 0.6 * eps[1], rtol=0, atol=1e-15)
    assert torch.equal(x[2], eps[2])


def test_noise_keeps_the_dtype_of_the_images():
    x0 = torch.zeros(1, 1, 2, 2)
    assert noise(x0, x0, Schedule().alpha_bar[[500]]).dtype == torch.float32


@patient
@given(st.integers(1, 4000).flatmap(lambda top: st.tuples(st.just(top), st.integers(1, top))))
def test_path_rises_evenly_from_zero_to_the_noise_level(case):
    noise_level, steps = case
    levels = path(noise_level, steps)
    gaps = {b - a for a, b in pairwise(levels)}
    assert (levels[0], levels[-1], len(levels)) == (0, noise_level, steps + 1)
    assert min(gaps) >= 1
    assert max(gaps) - min(gaps) <= 1


@patient
@given(st.integers(1, 4000).flatmap(lambda top: st.tuples(st.just(top), st.integers(1, top))), st.floats(1, 3))
def test_a_path_with_a_spread_rises_by_whole_levels_that_lie_closer_near_zero(case, spread):
    noise_level, steps = case
    levels = path(noise_level, steps, spread)
    gaps = [b - a for a, b in pairwise(levels)]
    assert (levels[0], levels[-1], len(levels)) == (0, noise_level, steps + 1)
    assert min(gaps) >= 1
    assert all(b - a >= -1 for a, b in pairwise(gaps))  # they grow, up to the rounding of their ends


@pytest.mark.parametrize("levels", [0, -1, MOST_LEVELS + 1, 10**9, float("nan")])
def test_schedules_of_no_levels_or_too_many_are_refused(levels):
    with pytest.raises(SettingsError, match="give 1 to 100000"):
        Schedule("linear", levels)


def test_path_takes_the_nearest_levels():
    assert path(1000, 3) == [0, 333, 667, 1000]
    assert path(4, 4) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("noise_level", "steps", "words"),
    [
        (0, 1, "--noise-level 0: nothing to encode"),
        (-5, 1, "--noise-level -5"),
        (100, 0, "--steps 0: give 1 to 100"),
        (100, 101, "--steps 101: give 1 to 100"),
        (100, -1, "--steps -1"),
    ],
)
def test_paths_that_lead_nowhere_are_refused(noise_level, steps, words):
    with pytest.raises(SettingsError, match=words):
        path(noise_level, steps)


def test_alpha_bar_is_copied_to_a_device_once():
    schedule = Schedule("cosine", 7)
    assert torch.equal(alpha_bar_on(schedule, torch.device("cpu")), schedule.alpha_bar)
    there = alpha_bar_on(schedule, torch.device("meta"))
    assert (there.device.type, there.dtype, there.shape) == ("meta", torch.float64, (8,))
    assert alpha_bar_on(Schedule("cosine", 7), torch.device("meta")) is there
