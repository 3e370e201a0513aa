"""Encode and decode against closed forms: Gaussian data, for which the exact eps is known.

A network sees timesteps, and t = 0 stands for the levels 0 and 1 alike. An exact eps must tell them apart, so the exact
networks here are told the levels that they will be asked at, in order, and check the timestep that they are asked with.
"""

import math
from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from knife.ddim import (
    SOLVERS,
    WHOLE,
    Guidance,
    Point,
    Slope,
    ab2,
    balanced,
    decode,
    decode_with_control,
    encode,
    keep_outside,
    noise_of,
    slope,
    under_fresh_noise,
)
from knife.schedule import Schedule, path
from knife.settings import QUALITIES, SOLVER_NAMES

KINDS = ("linear", "cosine")
patient = settings(deadline=None, derandomize=True, max_examples=40)
schedules = st.builds(Schedule, st.sampled_from(KINDS), st.integers(1, 1500))


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gaussian_eps(schedule, mean, variance, levels):
    """Return the exact eps of data N(mean, variance), for a walk that asks at `levels` in order."""
    remaining = iter(levels)

    def net(x, t):
        level = next(remaining)
        assert t.tolist() == [max(level - 1, 0)] * len(x)
        ab = schedule.alpha_bar[level]
        return (1 - ab).sqrt() * (x - ab.sqrt() * mean) / (ab * variance + 1 - ab)

    return net


def round_trip(schedule, levels, x, mean, std):
    noisy, _ = encode(gaussian_eps(schedule, mean, std**2, levels[:-1]), x, schedule, levels)
    return decode(gaussian_eps(schedule, mean, std**2, levels[:0:-1]), noisy, schedule, levels)


def angles(schedule, levels, std):
    """Return theta_k = atan2(sqrt(1 - ab_k), sqrt(ab_k) s)."""
    ab = schedule.alpha_bar[levels]
    return torch.atan2((1 - ab).sqrt(), ab.sqrt() * std)


def tolerance(schedule, level):
    """Return 1e-12, or a few roundings of x/sqrt(alpha_bar) at levels where hardly any signal is left."""
    return max(1e-12, 8 * torch.finfo(torch.float64).eps / schedule.alpha_bar[level].sqrt().item())


def point(x, eps, alpha_bar):
    """Return a point of a walk, at a level whose alpha_bar is a number."""
    share = torch.tensor(float(alpha_bar), dtype=torch.float64)
    return Point(x, eps, share, ((1 - share) / share).sqrt())


def with_alpha_bar(alpha_bar):
    """Return a schedule of given levels."""
    schedule = Schedule(T=len(alpha_bar) - 1)
    vars(schedule)["alpha_bar"] = alpha_bar  # where its cached property looks first
    return schedule


# --- solvers ----------------------------------------------------------------------------------------------------------


def solved(solver, schedule, noise_level, steps, std=0.5, mean=0.3):
    """Return what a solver makes of x = 1 by encoding and by encoding and decoding, and what each should be."""
    levels, x = path(noise_level, steps, spread=1.5), torch.ones(1, 1, 1, 1, dtype=torch.float64)
    noisy, last = encode(gaussian_eps(schedule, mean, std**2, levels[:-1]), x, schedule, levels, solver=solver)
    down = gaussian_eps(schedule, mean, std**2, levels[:0:-1])
    back = decode(down, noisy, schedule, levels, solver=solver, before=last)
    ab = schedule.alpha_bar[noise_level]
    exact = ab.sqrt() * mean + (1 - mean) * (ab * std**2 + 1 - ab).sqrt() / std
    return abs(noisy.item() - exact.item()), abs(back.item() - 1)


@pytest.mark.parametrize(("name", "least"), [("ddim", 1.8), ("ab2", 3.5), ("dpm2m", 2.5)])
def test_twice_the_steps_halve_the_error_of_the_first_order_and_more_than_halve_that_of_the_second(name, least):
    few, many = (solved(SOLVERS[name], Schedule(), 500, steps) for steps in (60, 120))
    assert few[0] / many[0] > least
    assert name != "ddim" or few[0] / many[0] < 2.2


@pytest.mark.parametrize("name", ["ab2", "dpm2m"])
def test_the_second_order_makes_a_better_round_trip_in_fewer_steps(name):
    for few in (12, 25):
        assert solved(SOLVERS[name], Schedule(), 475, few)[1] < solved(SOLVERS["ddim"], Schedule(), 475, 50)[1] / 2


def test_the_settings_know_every_solver():
    assert {*SOLVERS} == {*SOLVER_NAMES} >= {usual.solver for usual in QUALITIES.values()}


@pytest.mark.parametrize("name", [*SOLVERS])
def test_every_solver_is_exact_where_the_network_always_says_the_same(name):
    x, eps = normal(2, 1, 3, 3), normal(2, 1, 3, 3, seed=1)
    levels, schedule = path(600, 7, spread=1.5), Schedule()
    noisy, last = encode(lambda x, t: eps, x, schedule, levels, solver=SOLVERS[name])
    ab = schedule.alpha_bar[600]
    torch.testing.assert_close(noisy, ab.sqrt() * x + (1 - ab).sqrt() * eps)
    back = decode(lambda x, t: eps, noisy, schedule, levels, solver=SOLVERS[name], before=last)
    torch.testing.assert_close(back, x)


def test_the_step_that_turns_back_takes_the_mean_of_both_ends():
    ab = Schedule().alpha_bar.tolist()
    ends = [point(normal(1, 1, 2, 2), normal(1, 1, 2, 2, seed=seed), ab[level]) for seed, level in ((1, 300), (2, 200))]
    torch.testing.assert_close(ab2(*ends, ends[1].sigma), (ends[0].eps + ends[1].eps) / 2)


def test_no_line_in_log_sigma_leads_from_clean_images_or_to_them():
    ab, net = Schedule().alpha_bar, lambda x, t: x.sin()
    x, before = normal(1, 1, 2, 2), point(normal(1, 1, 2, 2, seed=1), normal(1, 1, 2, 2, seed=2), ab[300])
    down = [decode(net, x, Schedule(), [0, 200], solver=SOLVERS[name], before=before) for name in ("dpm2m", "ddim")]
    assert torch.equal(*down)
    up = [encode(net, x, Schedule(), [0, 100, 200], solver=SOLVERS[name])[0] for name in ("dpm2m", "ddim")]
    assert torch.equal(*up)


@pytest.mark.parametrize("name", ["ab2", "dpm2m"])
def test_a_walk_asks_the_network_once_a_step(name):
    asked = []

    def net(x, t):
        asked.append(t[0].item())
        return 0.1 * x

    levels = path(400, 8, spread=1.5)
    noisy, last = encode(net, normal(1, 1, 2, 2), Schedule(), levels, solver=SOLVERS[name])
    decode(net, noisy, Schedule(), levels, solver=SOLVERS[name], before=last)
    assert asked == [max(level - 1, 0) for level in levels[:-1] + levels[:0:-1]]


def test_whoever_plays_takes_every_step():
    taken, levels, schedule, x = [], path(300, 4), Schedule(), normal(1, 1, 2, 2)

    def play(work, *arguments):
        taken.append(work.__name__)
        return work(*arguments)

    net, guidance = (lambda x, t: 0.1 * x), [Guidance(lambda x, t: x.flatten(1).sum(1), 0.1)]
    noisy, _ = encode(net, x, schedule, levels, play=play)
    decode(net, noisy, schedule, levels, guidance, play=play)
    decode_with_control(net, noisy, schedule, levels, guidance, play=play)
    decode_with_control(net, noisy, schedule, levels, play=play)
    assert taken == ["step"] * 16


def test_guidance_alone_moves_images_as_in_the_first_order():
    # A network that says nothing leaves guidance alone: its path must be Euler's, which is stable where it is rough.
    x, levels, schedule = normal(1, 1, 2, 2), path(300, 6, spread=1.5), Schedule()
    guidance = [Guidance(lambda x, t: (x**2).sum((1, 2, 3)), 0.01)]
    before = point(x, torch.zeros_like(x), schedule.alpha_bar[levels[-2]])

    def silent(x, t):
        return torch.zeros_like(x)

    made = decode(silent, x, schedule, levels, guidance, solver=ab2, before=before)
    torch.testing.assert_close(made, decode(silent, x, schedule, levels, guidance))


# --- P1: a constant eps makes the round trip the identity -------------------------------------------------------------


@patient
@given(schedules, st.data())
def test_round_trip_with_a_constant_eps_is_the_identity(schedule, data):
    noise_level = data.draw(st.integers(1, schedule.T))
    levels = path(noise_level, data.draw(st.integers(1, min(noise_level, 60))))
    x, eps = normal(2, 3, 4, 4).clamp(-1, 1), normal(1, 3, 4, 4, seed=1)
    net = lambda x, t: eps.expand_as(x)  # noqa: E731
    back = decode(net, encode(net, x, schedule, levels)[0], schedule, levels)
    assert (back - x).abs().max() <= tolerance(schedule, noise_level)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [500, 999])
def test_round_trip_over_every_level_is_the_identity(kind, steps):
    schedule, levels = Schedule(kind), path(steps, steps)
    x, eps = normal(1, 1, 4, 4), normal(1, 1, 4, 4, seed=1)
    net = lambda x, t: eps  # noqa: E731
    assert (decode(net, encode(net, x, schedule, levels)[0], schedule, levels) - x).abs().max() <= 1e-12


# --- P2, P3: the exact gain of a round trip, and its order ------------------------------------------------------------


@patient
@given(schedules, st.data(), st.floats(0.1, 3), st.floats(-1, 1))
def test_round_trip_multiplies_the_deviation_by_the_product_of_squared_cosines(schedule, data, std, mean):
    noise_level = data.draw(st.integers(1, schedule.T))
    levels = path(noise_level, data.draw(st.integers(1, min(noise_level, 60))))
    x = normal(1, 2, 3, 3)
    gain = angles(schedule, levels, std).diff().cos().square().prod()
    error = round_trip(schedule, levels, x, mean, std) - mean - gain * (x - mean)
    assert error.abs().max() <= tolerance(schedule, noise_level)


@patient
@given(st.integers(1, 200), st.floats(0.1, 3), st.floats(0.01, 0.999))
def test_equal_angle_steps_lose_less_than_a_share_of_one_over_their_number(steps, std, share):
    theta = torch.linspace(0, share * math.pi / 2, steps + 1, dtype=torch.float64)
    schedule = with_alpha_bar(1 / (1 + (std * theta.tan()) ** 2))
    gain = round_trip(schedule, list(range(steps + 1)), torch.ones(1, 1, 1, 1, dtype=torch.float64), 0.0, std).item()
    assert gain == pytest.approx(math.cos(share * math.pi / 2 / steps) ** (2 * steps), abs=1e-10)
    assert -1e-12 <= 1 - gain <= (math.pi / 2) ** 2 / steps


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("std", [1.0, 2.0])
@pytest.mark.parametrize("noise_level", [2048, 4096])
def test_loss_of_the_round_trip_halves_with_the_step(kind, std, noise_level):
    schedule, x = Schedule(kind, 4096), torch.ones(1, 1, 1, 1, dtype=torch.float64)
    loss = [1 - round_trip(schedule, path(noise_level, n), x, 0.0, std).item() for n in (16, 32, 64, 128, 256)]
    ratios = [coarse / fine for coarse, fine in pairwise(loss)]
    assert all(1.85 <= ratio <= 2.1 for ratio in ratios)
    assert abs(ratios[-1] - 2) < abs(ratios[0] - 2)  # so that N (1 - gain) tends to a constant


# --- P4: decode in closed form ----------------------------------------------------------------------------------------


@patient
@given(schedules, st.data(), st.floats(0.1, 3), st.floats(-1, 1))
def test_decode_of_gaussian_data_has_a_closed_form(schedule, data, std, mean):
    noise_level = data.draw(st.integers(1, schedule.T))
    levels = path(noise_level, data.draw(st.integers(1, min(noise_level, 60))))
    assume(schedule.alpha_bar[noise_level] * std**2 > 1e-9)
    ab, x = schedule.alpha_bar[levels], normal(1, 2, 3, 3)
    v = ab * std**2 + 1 - ab
    factor = (((ab[1:] * ab[:-1]).sqrt() * std**2 + ((1 - ab[1:]) * (1 - ab[:-1])).sqrt()) / v[1:]).prod()
    expected = mean + factor * (x - ab[-1].sqrt() * mean)  # sqrt(ab_0) = 1
    decoded = decode(gaussian_eps(schedule, mean, std**2, levels[:0:-1]), x, schedule, levels)
    torch.testing.assert_close(decoded, expected, rtol=1e-11, atol=tolerance(schedule, noise_level))


# --- P5, P6: guidance -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("noise_level", "steps"), [(1, 1), (300, 1), (400, 7), (500, 50), (900, 300)])
def test_exact_guidance_is_unguided_decoding_of_the_posterior(kind, noise_level, steps):
    schedule, levels = Schedule(kind), path(noise_level, steps)
    shape, std, noise_variance, y = (2, 1, 2, 3), 0.7, 0.3, 1.5  # y = w.x0 + noise
    mean, w, x = normal(6, seed=1), normal(6, seed=2), normal(*shape, seed=3)
    gain = std**2 * w / (noise_variance + std**2 * (w @ w))
    posterior_mean = mean + gain * (y - w @ mean)
    posterior_covariance = std**2 * (torch.eye(6, dtype=torch.float64) - torch.outer(gain, w))

    def score(x, t):  # log p(y | x_k) up to a constant
        ab = schedule.alpha_bar[t + 1][:, None]
        v = ab * std**2 + 1 - ab
        expected = mean + ab.sqrt() * std**2 / v * (x.flatten(1) - ab.sqrt() * mean)
        return -0.5 * (y - expected @ w) ** 2 / (noise_variance + (w @ w) * (std**2 * (1 - ab) / v)[:, 0])

    def posterior_eps(x, t):
        ab = schedule.alpha_bar[t[0] + 1]
        covariance = ab * posterior_covariance + (1 - ab) * torch.eye(6, dtype=torch.float64)
        deviation = x.flatten(1) - ab.sqrt() * posterior_mean
        return (1 - ab).sqrt() * torch.linalg.solve(covariance, deviation.T).T.view(shape)

    prior_eps = gaussian_eps(schedule, mean.view(1, *shape[1:]), std**2, levels[:0:-1])
    guided = decode(prior_eps, x, schedule, levels, [Guidance(score, 1.0)])
    torch.testing.assert_close(guided, decode(posterior_eps, x, schedule, levels), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 10, 200])
def test_guidance_by_a_linear_regressor_changes_the_image_along_its_weights_alone(kind, steps):
    schedule, levels = Schedule(kind), path(400, steps)
    x, w = normal(3, 2, 4, 4), normal(2, 4, 4, seed=1) / 32**0.5
    predicted = lambda x: (x * w).sum((1, 2, 3))  # noqa: E731
    unguided = decode(gaussian_eps(schedule, 0.2, 0.25, levels[:0:-1]), x, schedule, levels)

    def guided(target):
        net = gaussian_eps(schedule, 0.2, 0.25, levels[:0:-1])
        return decode(net, x, schedule, levels, [Guidance(lambda x, t: -0.5 * (predicted(x) - target) ** 2, 0.5)])

    results = [guided(target) for target in (-4.0, -1.0, 2.0, 5.0)]
    for result in results:
        change = result - unguided
        across = change - predicted(change)[:, None, None, None] * w / w.square().sum()
        assert across.abs().max() <= 1e-13 * max(1, change.abs().max().item())
    values = torch.stack([predicted(result) for result in results])
    assert (values.diff(dim=0) > 0.01).all()  # grows with the target


@pytest.mark.parametrize("clamp", [None, (-1.0, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scale_zero_is_bit_for_bit_unguided(clamp, dtype):
    schedule, levels, x = Schedule(), path(300, 12), normal(2, 1, 4, 4).to(dtype)
    net = lambda x, t: torch.sin(3 * x)  # noqa: E731
    guided = decode(net, x, schedule, levels, [Guidance(lambda x, t: x.flatten(1).sum(1), 0.0)], clamp)
    assert torch.equal(guided, decode(net, x, schedule, levels, clamp=clamp))


def endless(g: Tensor) -> Slope:
    """Return the slope of a score that has no best."""
    return Slope(torch.ones(len(g)), g)


def sizes(strength: float, steepness: float, g: Tensor, alpha_bar: Tensor) -> Tensor:
    """Return the size of the guidance of each image against eps."""
    s = balanced(strength, steepness)(endless(g), alpha_bar, alpha_bar)
    return s * (1 - alpha_bar).sqrt() * g.flatten(1).double().square().mean(1).sqrt()


def test_balanced_guidance_has_the_wanted_size_where_the_score_is_as_steep_as_usual():
    alpha_bar, g = Schedule().alpha_bar[400], normal(3, 2, 8, 8)
    usual = (1 - alpha_bar).sqrt() * g[1].double().square().mean().sqrt()
    found = sizes(0.2, float(usual), g, alpha_bar)
    assert found[1] == pytest.approx(0.2)


def test_balanced_guidance_follows_the_root_of_the_steepness():
    alpha_bar, g = Schedule().alpha_bar[100], normal(1, 2, 8, 8)
    flat, usual, steep = (sizes(0.2, 0.01, k * g, alpha_bar).item() for k in (1e-4, 1, 1e4))
    assert usual / flat == pytest.approx(100)
    assert steep / usual == pytest.approx(100)


def test_balanced_guidance_is_as_exact_for_guides_of_lower_precision():
    alpha_bar, next_alpha_bar = Schedule().alpha_bar[[300, 200]]
    score = torch.tensor([-0.7], dtype=torch.bfloat16)
    tiny = 2.0**-80  # its square is no float32
    for strength, steepness, size in ((1e-3, 1e-3, tiny), (1e30, 1e-3, tiny), (0.03, 1e-12, 1.0)):
        scale, g = balanced(strength, steepness), torch.full((1, 2, 8, 8), size)
        found = scale(Slope(score, g), alpha_bar, next_alpha_bar)
        exact = scale(Slope(score.double(), g.double()), alpha_bar, next_alpha_bar)
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=0)
        assert 0 < found < math.inf


def test_balanced_guidance_of_an_image_does_not_depend_on_its_batch_and_a_flat_score_asks_for_nothing():
    alpha_bar, g = Schedule().alpha_bar[100], normal(3, 2, 8, 8)
    g[2] = 0
    together, alone = sizes(0.2, 0.01, g, alpha_bar), sizes(0.2, 0.01, g[1:2], alpha_bar)
    torch.testing.assert_close(together[1:2], alone)
    assert together[2] == 0


def test_balanced_decoding_takes_the_step_with_its_scale():
    schedule, x = Schedule(), normal(2, 1, 4, 4)
    score = lambda x, t: -0.5 * (x - 1).square().flatten(1).sum(1)  # noqa: E731
    net = lambda x, t: 0.1 * x  # noqa: E731
    found = decode(net, x, schedule, [100, 200], [Guidance(score, balanced(0.3, 0.5))])
    ab = schedule.alpha_bar
    s = balanced(0.3, 0.5)(Slope(score(x, None), 1 - x), ab[200], ab[100])
    for i in range(2):
        one = decode(net, x[i : i + 1], schedule, [100, 200], [Guidance(score, float(s[i]))])
        torch.testing.assert_close(found[i : i + 1], one)


@pytest.mark.parametrize("step", [[0, 400], [200, 400], [390, 400]])
def test_a_hard_pull_lands_on_the_target_in_one_step_however_long(step):
    schedule, x, wanted = Schedule(), normal(2, 1, 4, 4), normal(2, 1, 4, 4, seed=1)
    score = lambda x, t: -0.5 * (x - wanted).square().flatten(1).sum(1)  # noqa: E731
    found = decode(lambda x, t: 0 * x, x, schedule, step, [Guidance(score, balanced(1e9, 1.0))])
    ab, next_ab = schedule.alpha_bar[400], schedule.alpha_bar[step[0]]
    torch.testing.assert_close(found, wanted * (next_ab / ab).sqrt())  # where x itself would come as x sqrt(ab' / ab)


def test_a_gentle_pull_asks_for_a_share_of_what_is_lacking_and_for_less_under_more_noise():
    at = Slope(torch.tensor([-2.0]), normal(1, 1, 8, 8))
    ab, next_ab = (torch.tensor(value, dtype=torch.float64) for value in (0.5, 0.6))
    hard, half, tenth = (balanced(k * WHOLE, 1e-12)(at, ab, next_ab).item() for k in (9, 1, 0.2))
    assert half == pytest.approx(hard / 2)  # of an image that shows half of itself
    assert tenth == pytest.approx(hard / 10)
    clear = balanced(WHOLE, 1e-12)(at, ab + 0.49, ab + 0.491).item()
    gain = [
        ((1 - ab) - (ab * (1 - ab) * (1 - ab_) / ab_).sqrt()).item()
        for ab, ab_ in ((ab, next_ab), (ab + 0.49, ab + 0.491))
    ]
    assert clear * gain[1] / (hard * gain[0]) == pytest.approx(0.99)


def test_a_score_without_end_is_climbed_at_full_strength_and_a_weak_one_is_not_helped():
    g, (ab, next_ab) = normal(1, 1, 8, 8), Schedule().alpha_bar[[300, 200]]
    free = balanced(0.1, 0.01)(endless(g), ab, next_ab)
    assert balanced(0.1, 0.01)(Slope(torch.tensor([-1e9]), g), ab, next_ab) == free
    assert balanced(0.1, 0.01)(Slope(torch.tensor([-1e-9]), g), ab, next_ab) < 1e-3 * free
    assert balanced(0.1, 0.01)(Slope(torch.tensor([0.0]), g), ab, next_ab) == free


def test_long_steps_do_not_pull_to_and_fro():
    """A stiff score: each step at full strength would overshoot its target."""
    schedule, levels, x = Schedule(), path(475, 10), normal(1, 1, 8, 8)
    said = []

    def score(x, t):
        miss = x.mean((1, 2, 3)) - 0.5
        said.append(float(miss.detach()))
        return -0.5 * (100 * miss).square()

    decode(lambda x, t: 0.1 * x, x, schedule, levels, [Guidance(score, balanced(1.0, 1e-4))])
    assert abs(said[-1]) < 0.02
    assert all(abs(b) < abs(a) + 0.1 for a, b in pairwise(said))  # x itself grows by a little from step to step


def drawn(level, x):
    """Return the noise of a level, for images."""
    return noise_of(level, x.shape[1:], x.device, x.dtype)


def test_fresh_noise_leaves_the_predicted_image_and_is_the_same_for_all():
    ab = Schedule().alpha_bar[300].item()
    here = point(normal(2, 1, 4, 4), normal(2, 1, 4, 4, seed=1), ab)
    seen = under_fresh_noise(here, drawn(300, here.x))
    noise = (seen - math.sqrt(ab) * here.x0) / math.sqrt(1 - ab)
    torch.testing.assert_close(noise[0], noise[1])
    assert noise.std() == pytest.approx(1, abs=0.5)
    assert not torch.allclose(noise, here.eps, atol=0.1)
    assert not torch.allclose(drawn(300, here.x), drawn(301, here.x), atol=0.1)
    part = here.part(slice(1))
    torch.testing.assert_close(under_fresh_noise(part, drawn(300, part.x)), seen[:1], rtol=0, atol=0)


def test_the_noise_of_a_level_is_drawn_once_for_all_batches():
    shape, cpu = torch.Size((2, 4, 4)), torch.device("cpu")
    noise = noise_of(300, shape, cpu, torch.float64)
    assert (noise.shape, noise.dtype) == (shape, torch.float64)
    assert noise_of(300, shape, cpu, torch.float64) is noise
    assert noise_of(300, shape, torch.device("meta"), torch.float64).device.type == "meta"
    assert torch.equal(noise_of(300, shape, cpu, torch.float32).double(), noise)  # the same in every precision


def test_fresh_noise_differs_between_channels_and_leaves_other_draws_alone():
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    first, second, third = drawn(200, torch.zeros(1, 3, 4, 4))
    assert torch.equal(torch.rand(3), wanted)
    for one, other in ((first, second), (first, third), (second, third)):
        assert not torch.allclose(one, other, atol=0.1)


def test_a_guide_is_shown_fresh_noise_where_it_asks_for_it_and_the_images_themselves_as_in_the_paper():
    schedule, x, shown = Schedule(), normal(2, 1, 4, 4), []
    net = lambda x, t: 0.3 * x  # noqa: E731

    def score(x, t):
        shown.append(x.detach())
        return x.flatten(1).sum(1)

    decode(net, x, schedule, [0, 200], [Guidance(score, 0.1)])
    decode(net, x, schedule, [0, 200], [Guidance(score, 0.1, fresh=True)])
    assert torch.equal(shown[0], x)
    here = point(x, 0.3 * x, schedule.alpha_bar[200])
    assert torch.equal(shown[1], under_fresh_noise(here, drawn(200, x)))


def test_of_several_guides_each_sees_what_it_asks_for():
    x, shown = normal(2, 2, 4, 4), {}

    def told(name):
        def score(x, t):
            shown[name] = x.detach()
            return x.flatten(1).sum(1)

        return score

    guidance = [Guidance(told("fresh"), 0.1, fresh=True), Guidance(told("paper"), 0.1)]
    decode(lambda x, t: 0.3 * x, x, Schedule(), [0, 200], guidance)
    assert torch.equal(shown["paper"], x)
    wanted = under_fresh_noise(point(x, 0.3 * x, Schedule().alpha_bar[200]), drawn(200, x))
    assert torch.equal(shown["fresh"], wanted)


@pytest.mark.parametrize("scale", [0.5, balanced(0.3, 0.5)], ids=["paper", "balanced"])
def test_a_control_is_the_unguided_decode_in_the_same_batch(scale):
    schedule, levels, x = Schedule(), [0, 50, 100, 200], normal(2, 1, 4, 4)
    net = lambda x, t: torch.tanh(x) * 0.3  # noqa: E731
    score = lambda x, t: -0.5 * (x - 1).square().flatten(1).sum(1)  # noqa: E731
    guided, control = decode_with_control(net, x, schedule, levels, [Guidance(score, scale)])
    torch.testing.assert_close(guided, decode(net, x, schedule, levels, [Guidance(score, scale)]))
    torch.testing.assert_close(control, decode(net, x, schedule, levels))
    assert not torch.allclose(guided, control)
    same, also = decode_with_control(net, x, schedule, levels, [Guidance(score, 0.0)])
    assert torch.equal(same, also)
    assert torch.equal(same, decode(net, x, schedule, levels))


@pytest.mark.parametrize("name", [*SOLVERS])
def test_a_control_goes_on_from_the_last_point_of_encoding_like_the_edit(name):
    schedule, levels, x = Schedule(), path(400, 5, spread=1.5), normal(2, 1, 4, 4)
    net = lambda x, t: torch.tanh(x) * 0.3  # noqa: E731
    guidance = [Guidance(lambda x, t: -0.5 * (x - 1).square().flatten(1).sum(1), 0.5)]
    noisy, last = encode(net, x, schedule, levels, solver=SOLVERS[name])
    both = decode_with_control(net, noisy, schedule, levels, guidance, solver=SOLVERS[name], before=last)
    for found, pulling in zip(both, (guidance, ()), strict=True):
        alone = decode(net, noisy, schedule, levels, pulling, solver=SOLVERS[name], before=last)
        torch.testing.assert_close(found, alone)
    unguided, _ = decode_with_control(net, noisy, schedule, levels, (), solver=SOLVERS[name], before=last)
    assert torch.equal(unguided, alone)


def test_what_lies_outside_a_region_stays_where_encoding_led_it():
    schedule, levels, x = Schedule(), [0, 50, 100, 200], normal(2, 1, 8, 8)
    net = lambda x, t: torch.tanh(x.roll(1, 3)) * 0.3  # noqa: E731
    score = lambda x, t: -0.5 * (x - 3).square().flatten(1).sum(1)  # noqa: E731
    trajectory = {0: x}
    noisy, _ = encode(net, x, schedule, levels, trajectory.__setitem__)
    region = torch.zeros(2, 1, 8, 8)
    region[0, :, :4] = 1
    region[1, :, 4:] = 0.5
    hold, seen = keep_outside(region, trajectory), []
    guided, control = decode_with_control(
        net, noisy, schedule, levels, [Guidance(score, 0.5)], hold=hold, track=lambda k, x: seen.append((k, x))
    )
    for image, outside in ((0, slice(4, None)), (1, slice(0, 4))):
        for level, both in seen:
            for one in both.chunk(2):
                assert torch.equal(one[image, :, outside], trajectory[level][image, :, outside])
        assert torch.equal(guided[image, :, outside], control[image, :, outside])
    free = decode(net, noisy, schedule, levels, [Guidance(score, 0.5)])
    assert (guided[0, :, :4] - x[0, :, :4]).abs().mean() > 0.3 * (free[0, :, :4] - x[0, :, :4]).abs().mean()
    assert not torch.equal(guided[1, :, 4:], control[1, :, 4:])


def test_steps_from_a_level_down_are_not_guided():
    asked = []

    def score(x, t):
        asked.append(int(t[0]))
        return x.flatten(1).sum(1)

    schedule, levels, x = Schedule(), [0, 50, 100, 200, 300], normal(1, 1, 2, 2)
    net = lambda x, t: torch.tanh(x)  # noqa: E731
    found = decode(net, x, schedule, levels, [Guidance(score, 0.5, low=100)])
    assert asked == [299, 199]
    half = decode(net, x, schedule, [100, 200, 300], [Guidance(score, 0.5)])
    torch.testing.assert_close(found, decode(net, half, schedule, [0, 50, 100]))


def test_a_guide_pulls_up_to_a_level():
    asked = []

    def score(x, t):
        asked.append(int(t[0]))
        return x.flatten(1).sum(1)

    decode(lambda x, t: 0 * x, normal(1, 1, 2, 2), Schedule(), [0, 50, 100, 200], [Guidance(score, 0.5, 50, 100)])
    assert asked == [99]


def test_pulls_of_several_guides_add_up():
    """Two linear scores at scales a and b pull as one score a u + b v does at scale 1."""
    schedule, levels, x = Schedule(), path(300, 12), normal(2, 1, 4, 4)
    u, v = (lambda x, t: x.flatten(1).sum(1)), (lambda x, t: x[:, 0, 0].pow(2).sum(1))
    net = lambda x, t: torch.tanh(x)  # noqa: E731
    both = decode(net, x, schedule, levels, [Guidance(u, 0.3), Guidance(v, 0.7)])
    torch.testing.assert_close(both, decode(net, x, schedule, levels, [Guidance(v, 0.7), Guidance(u, 0.3)]))
    one = decode(net, x, schedule, levels, [Guidance(lambda x, t: 0.3 * u(x, t) + 0.7 * v(x, t), 1.0)])
    torch.testing.assert_close(both, one)
    guided, control = decode_with_control(net, x, schedule, levels, [Guidance(u, 0.3), Guidance(v, 0.7)])
    torch.testing.assert_close(guided, both)
    torch.testing.assert_close(control, decode(net, x, schedule, levels))


def test_each_image_of_a_batch_may_have_a_strength_of_its_own():
    alpha_bar, g = Schedule().alpha_bar[100], normal(2, 2, 8, 8)
    at = Slope(torch.tensor([-1e6, -1e-3]), g)  # the first is far from its best, the second not
    both = balanced(torch.tensor([0.1, 0.04]), 0.01)(at, alpha_bar, alpha_bar / 2)
    for i, strength in enumerate((0.1, 0.04)):
        alone = balanced(strength, 0.01)(Slope(at.score[i : i + 1], g[i : i + 1]), alpha_bar, alpha_bar / 2)
        torch.testing.assert_close(both[i : i + 1], alone, rtol=1e-6, atol=0)


def test_nothing_pulls_at_clean_images():
    always = Guidance(lambda x, t: x.sum((1, 2, 3)), 0.5)
    assert [always.pulls(level) for level in (0, 1, 10**9)] == [False, True, True]


def test_scale_zero_does_not_ask_the_guide():
    def score(x, t):
        raise AssertionError

    decode(lambda x, t: x, normal(1, 1, 2, 2), Schedule(), [0, 10], [Guidance(score, 0)])


def test_opposite_scores_pull_in_opposite_directions():
    schedule, levels, x = Schedule(), path(300, 12), normal(2, 1, 4, 4)
    net = lambda x, t: 0.5 * x  # noqa: E731
    up, unguided, down = (
        decode(net, x, schedule, levels, [Guidance(lambda x, t, s=sign: s * x.flatten(1).sum(1), 0.1)])
        for sign in (1, 0, -1)
    )
    assert (up > unguided).all()
    torch.testing.assert_close(up - unguided, unguided - down, rtol=1e-9, atol=1e-12)


# --- Gradients --------------------------------------------------------------------------------------------------------


class Watched(nn.Module):
    """A network that notes whether its answers can be differentiated."""

    def __init__(self, outputs):
        super().__init__()
        self.layer = nn.Conv2d(2, outputs, 3, padding=1).double()
        self.asked = []

    def forward(self, x, t):
        out = self.layer(x)
        self.asked.append(torch.is_grad_enabled() or out.requires_grad)
        return out


def test_no_gradient_flows_through_the_diffusion_network():
    schedule, levels = Schedule(), path(200, 8)
    torch.manual_seed(0)
    net, guide = Watched(4), Watched(1)
    x = normal(2, 2, 4, 4).requires_grad_()
    noisy, _ = encode(net, x, schedule, levels)
    result = decode(net, noisy, schedule, levels, [Guidance(lambda x, t: guide(x, t).mean((1, 2, 3)), 3)])
    assert net.asked == [False] * 16
    assert guide.asked == [True] * 8
    assert not result.requires_grad
    assert x.grad is None
    assert all(parameter.grad is None for parameter in [*net.parameters(), *guide.parameters()])


def test_a_network_that_refuses_autograd_can_be_translated_with():
    def net(x, t):
        assert not torch.is_grad_enabled()
        return x

    with torch.enable_grad():
        decode(net, normal(1, 1, 2, 2), Schedule(), [0, 10, 20], [Guidance(lambda x, t: x.flatten(1).sum(1), 1)])


def test_a_slope_is_of_each_image_alone():
    x, t = normal(3, 1, 4, 4), torch.tensor([1, 5, 9])
    score = lambda x, t: (x**3).sum((1, 2, 3)) * t  # noqa: E731
    torch.testing.assert_close(slope(score, x, t).gradient, 3 * x**2 * t.view(3, 1, 1, 1), rtol=1e-14, atol=0)
    assert torch.equal(slope(score, x, t).score, score(x, t))
    assert not slope(score, x, t).score.requires_grad
    assert not slope(score, x, t).gradient.requires_grad
    assert not x.requires_grad


def test_images_of_a_batch_do_not_see_each_other():
    schedule, levels, x = Schedule(), path(300, 9), normal(3, 1, 4, 4)
    net = lambda x, t: torch.sin(x) * (1 + t.view(-1, 1, 1, 1) / 1000)  # noqa: E731
    guidance = [Guidance(lambda x, t: -(x**2).sum((1, 2, 3)), 0.3)]
    translate = lambda x: decode(net, x, schedule, levels, guidance)  # noqa: E731
    assert torch.equal(translate(x), torch.cat([translate(one) for one in x.split(1)]))


# --- The walk ---------------------------------------------------------------------------------------------------------


def test_both_directions_ask_at_the_level_they_come_from():
    asked, tracked = [], []

    def net(x, t):
        asked.append(t.tolist())
        return torch.zeros_like(x)

    x, levels = normal(1, 1, 2, 2), [0, 1, 2, 5]
    noisy, _ = encode(net, x, Schedule(), levels, track=lambda level, x: tracked.append((level, x)))
    assert torch.equal(tracked[-1][1], noisy)
    decode(net, noisy, Schedule(), levels, track=lambda level, x: tracked.append((level, x)))
    assert asked == [[0], [0], [1], [4], [1], [0]]
    assert [level for level, _ in tracked] == [1, 2, 5, 2, 1, 0]


def test_the_channels_of_a_learned_sigma_are_not_read():
    schedule, levels, x = Schedule(), path(300, 5), normal(2, 3, 4, 4)
    plain = lambda x, t: torch.sin(x)  # noqa: E731
    learned = lambda x, t: torch.cat([torch.sin(x), torch.full_like(x, torch.nan)], 1)  # noqa: E731
    assert torch.equal(encode(learned, x, schedule, levels)[0], encode(plain, x, schedule, levels)[0])
    assert torch.equal(decode(learned, x, schedule, levels), decode(plain, x, schedule, levels))


def test_a_network_of_lower_precision_answers_in_the_precision_of_the_images():
    x = normal(1, 1, 2, 2)
    assert encode(lambda x, t: x.bfloat16(), x, Schedule(), [0, 10])[0].dtype == torch.float64


def test_the_walk_stays_on_the_device_of_its_images(meta_ops):
    """A device that holds no values will do."""
    x, asked = torch.empty(2, 1, 4, 4, device=meta_ops), []

    def net(x, t):
        asked.append((x.device.type, t.device.type))
        return torch.sin(x)

    def score(x, t):
        asked.append((x.device.type, t.device.type))
        return x.square().flatten(1).sum(1)

    levels, guidance = [0, 50, 100], [Guidance(score, balanced(0.3, 0.5), fresh=True), Guidance(score, 0.5)]
    both = decode_with_control(net, encode(net, x, Schedule(), levels)[0], Schedule(), levels, guidance)
    assert {one.device.type for one in both} == {"meta"}
    assert asked == [("meta", "meta")] * 8


# --- Clamping ---------------------------------------------------------------------------------------------------------


def test_clamp_limits_the_predicted_clean_image_of_every_step():
    schedule, levels, x = Schedule(), [0, 100, 250, 400], 3 * normal(2, 1, 4, 4)
    net = lambda x, t: 0.1 * x  # noqa: E731
    seen = []
    result = decode(net, x, schedule, levels, clamp=(-0.5, 0.75), track=lambda level, x: seen.append(x))
    for (level, below), before, after in zip([(400, 250), (250, 100), (100, 0)], [x, *seen], seen, strict=False):
        ab, ab_below = schedule.alpha_bar[level], schedule.alpha_bar[below]
        x0 = ((before - (1 - ab).sqrt() * 0.1 * before) / ab.sqrt()).clamp(-0.5, 0.75)
        eps = (before - ab.sqrt() * x0) / (1 - ab).sqrt()  # what x and the clamped x0 imply
        torch.testing.assert_close(after, ab_below.sqrt() * x0 + (1 - ab_below).sqrt() * eps, rtol=0, atol=1e-13)
    assert (result.min(), result.max()) == (-0.5, 0.75)


def test_a_clamp_that_is_never_reached_changes_nothing():
    schedule, levels, x = Schedule(), path(300, 10), normal(2, 1, 4, 4)
    net = lambda x, t: 0.5 * x  # noqa: E731
    assert torch.equal(decode(net, x, schedule, levels, clamp=(-1e3, 1e3)), decode(net, x, schedule, levels))


def test_clamping_loses_the_round_trip_that_encoding_without_a_clamp_keeps():
    schedule, levels, x = Schedule(), path(300, 10), normal(2, 1, 4, 4)
    eps = normal(2, 1, 4, 4, seed=1)
    noisy, _ = encode(lambda x, t: eps, x, schedule, levels)
    assert (decode(lambda x, t: eps, noisy, schedule, levels) - x).abs().max() < 1e-12
    clamped = decode(lambda x, t: eps, noisy, schedule, levels, clamp=(-1, 1))
    assert clamped.abs().max() <= 1
    assert (clamped - x).abs().max() > 0.1


class Launches(TorchDispatchMode):
    """Tells the ops that compute; views, and memory that is only taken, launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.names = list[str]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not (func.is_view or "empty" in func.name()):
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_a_step_launches_nothing_but_networks_and_the_step():
    """What a third step adds to two, in the paper's way: no clock, no coefficient, nothing to wait for."""
    x, schedule, answer = normal(2, 2, 8, 8).float(), Schedule(), normal(2, 4, 8, 8).float()

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return answer[:, 0, 0, 0]

        @staticmethod
        def backward(ctx, grad):
            return answer[:, :2]

    counts = []
    for steps in (2, 3):
        with Launches() as seen:
            levels = [0, 10, 20, 30][: steps + 1]
            decode(lambda x, t: answer, x, schedule, levels, [Guidance(lambda x, t: Gradient.apply(x), 2.0)])
        counts.append(Counter(seen.names))
    assert counts[1] - counts[0] == {
        "knife::ddim_step": 1,
        "aten::sum": 1,
        "aten::ones_like": 1,
    }  # autograd's own, both


@pytest.mark.parametrize("scale", [2.0, balanced(0.1, 1.0)], ids=["fixed", "balanced"])
def test_a_walk_never_waits_for_a_gpu(meta_ops, scale):
    """On tensors that have no values whoever asks for one fails, as who asks a GPU for one waits."""
    x, w = torch.empty(2, 3, 8, 8, device=meta_ops), torch.empty(6, 3, 3, 3, device=meta_ops)

    def net(x, t):
        return torch.nn.functional.conv2d(x, w, padding=1) * t[:, None, None, None]

    guidance = [Guidance(lambda x, t: -net(x, t).square().flatten(1).sum(1), scale)]
    noisy, last = encode(net, x, Schedule(), [0, 10, 20, 30], solver=ab2)
    results = decode_with_control(net, noisy, Schedule(), [0, 10, 20, 30], guidance, solver=ab2, before=last)
    assert [y.shape for y in results] == [x.shape] * 2
    with pytest.raises((RuntimeError, NotImplementedError)):
        decode(net, noisy, Schedule(), [0, 10], track=lambda level, x: x.sum().item())
