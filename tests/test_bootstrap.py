"""Statistics against values worked out by hand, and intervals that resample what belongs together."""

import math

import numpy as np
import pytest

from knife import bootstrap
from knife.bootstrap import Figure, figure, interval, mean, median, ranks, resamples, slope, spearman


def column(*values: float) -> bootstrap.Array:
    return np.array(values, float)[:, None]


def pairs(*points: tuple[float, float]) -> bootstrap.Array:
    return np.array(points, float)


def test_equal_values_share_their_rank():
    assert ranks(np.array([3.0, 1.0, 3.0, 2.0, 3.0])).tolist() == [4, 1, 4, 2, 4]


@pytest.mark.parametrize(
    ("points", "value"),
    [
        ([(1, 10), (2, 20), (3, 900)], 1.0),
        ([(1, 3), (2, 2), (3, -5)], -1.0),
        ([(1, 1), (2, 3), (3, 2), (4, 4)], 0.8),  # 1 - 6 * 2 / (4 * 15)
        ([(1, 1), (1, 2), (2, 3), (2, 3)], 4 / math.sqrt(4 * 4.5)),  # ranks 1.5 1.5 3.5 3.5, 1 2 3.5 3.5
    ],
)
def test_spearman_is_the_correlation_of_the_ranks(points, value):
    assert spearman(pairs(*points)) == pytest.approx(value)


def test_slope_is_that_of_least_squares():
    assert slope(pairs((0, 1), (1, 3), (2, 5))) == pytest.approx(2)
    assert slope(pairs((0, 0), (1, 2), (2, 1))) == pytest.approx(0.5)  # (-1)(-1) + 0 + (1)(0) over 2
    assert slope(pairs((0, 7), (1, 7))) == 0


def test_what_never_changes_has_no_slope_and_no_rank_correlation():
    assert math.isnan(slope(pairs((0.1, 1), (0.1, 2), (0.1, 4))))
    assert math.isnan(spearman(pairs((0.1, 1), (0.1, 2))))
    assert math.isnan(spearman(pairs((1, 0.1), (2, 0.1))))
    assert figure(slope, pairs((0.1, 1), (0.1, 2)), ["a", "b"]) is None
    assert figure(mean, column(), []) is None


def test_mean_and_median():
    assert mean(column(1, 2, 6)) == 3
    assert median(column(1, 2, 6)) == 2
    assert median(column(1, 2, 6, 7)) == 4


# ----------------------------------------------------------------------------------------------------------- intervals


def test_an_interval_spans_what_resamples_say():
    one = figure(mean, column(0, 1), ["a", "b"])
    assert one == Figure(0.5, 0.0, 1.0, 2)  # of 1000, a quarter is all 0 and a quarter all 1
    assert one.to_json() == {"value": 0.5, "low": 0.0, "high": 1.0, "rows": 2}
    same = figure(mean, column(4, 4, 4), ["a", "b", "c"])
    assert same == Figure(4.0, 4.0, 4.0, 3)


def test_an_interval_is_that_of_the_central_limit():
    values = np.random.default_rng(3).normal(10, 2, (400, 1))
    low, high = interval(mean, values, [str(i) for i in range(400)], 0)
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


def test_groups_are_drawn_as_a_whole():
    once, thrice = column(1, 2, 5, 9), column(1, 1, 1, 2, 2, 2, 5, 5, 5, 9, 9, 9)
    assert interval(mean, once, list("abcd"), 7) == interval(mean, thrice, list("aaabbbcccddd"), 7)
    alone = interval(mean, thrice, list("abcdefghijkl"), 7)
    assert alone[1] - alone[0] < 0.75 * np.subtract(*reversed(interval(mean, once, list("abcd"), 7)))
    for drawn in resamples(list("abab"), 0):
        assert sorted(drawn) in ([0, 0, 2, 2], [0, 1, 2, 3], [1, 1, 3, 3])


def test_a_single_group_has_no_interval():
    assert figure(mean, column(1, 3), ["a", "a"]) == Figure(2.0, None, None, 2)


def test_the_same_seed_draws_the_same_resamples():
    groups = list("abcdef")
    first, again, other = ([drawn.tolist() for drawn in resamples(groups, seed)] for seed in (1, 1, 2))
    assert len(first) == bootstrap.RESAMPLES == 1000
    assert first == again != other


def test_resamples_in_which_a_statistic_is_not_defined_are_left_out():
    low, high = interval(slope, pairs((0, 0), (1, 2)), ["a", "b"], 0)  # half of them hold one point twice
    assert (low, high) == (2.0, 2.0)
    assert interval(lambda rows: math.nan, column(1, 2), ["a", "b"], 0) is None
