"""Figures of a sample and how far to trust them: rank correlation, slope, and bootstrap intervals (Efron 1979)."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000
ENDS = (0.025, 0.975)  # quantiles of the resampled statistic between which it lies 95 times in 100

Array = NDArray[np.float64]
Statistic = Callable[[Array], float]  # of rows [n, columns]; NaN where it is not defined


class Figure(NamedTuple):
    """A statistic, and the ends of its interval; None where there is none to tell."""

    value: float
    low: float | None
    high: float | None
    rows: int  # that it is made of

    def to_json(self) -> dict[str, Any]:
        """Return what a record says of it."""
        return self._asdict()


def figure(statistic: Statistic, rows: Array, groups: Sequence[str], seed: int = 0) -> Figure | None:
    """Measure rows [n, columns] that belong to groups [n]; None where the statistic is not defined for them.

    Whole groups are drawn, with replacement: what belongs together, as the slices of a patient, is not independent.
    The same groups and seed draw the same resamples. A single group has no interval.
    """
    value = statistic(rows) if len(rows) else np.nan
    if not np.isfinite(value):
        return None
    low, high = interval(statistic, rows, groups, seed) or (None, None)
    return Figure(rounded(value), low, high, len(rows))


def interval(statistic: Statistic, rows: Array, groups: Sequence[str], seed: int) -> tuple[float, float] | None:
    """Return the ends of the 95 % percentile interval; None of a single group."""
    if len({*groups}) < 2:
        return None
    found = np.array([statistic(rows[drawn]) for drawn in resamples(groups, seed)])
    found = found[np.isfinite(found)]
    if not len(found):
        return None
    low, high = np.quantile(found, ENDS)
    return rounded(low), rounded(high)


def resamples(groups: Sequence[str], seed: int) -> Iterator[NDArray[np.intp]]:
    """Yield the row numbers of each resample: those of as many groups as there are, drawn with replacement."""
    members: dict[str, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    rows = [np.array(some) for some in members.values()]
    generator = np.random.default_rng(seed)
    for _ in range(RESAMPLES):
        yield np.concatenate([rows[k] for k in generator.integers(len(rows), size=len(rows))])


def rounded(value: float) -> float:
    """Return a number to six digits."""
    return float(f"{value:.6g}")


# ---------------------------------------------------------------------------------------------------------- statistics


def mean(rows: Array) -> float:
    """Return the mean of the first column."""
    return float(rows[:, 0].mean())


def median(rows: Array) -> float:
    """Return the median of the first column."""
    return float(np.median(rows[:, 0]))


def spearman(rows: Array) -> float:
    """Return the rank correlation of two columns, ties sharing their mean rank; NaN if one never changes."""
    x, y = (ranks(column) for column in rows.T)
    return slope(np.stack([x, y], 1)) * float(x.std() / y.std()) if np.ptp(y) else np.nan


def slope(rows: Array) -> float:
    """Return by how much the second column rises with the first, by least squares; NaN if the first never changes."""
    if not np.ptp(rows[:, 0]):
        return np.nan
    x, y = (rows - rows.mean(0)).T
    return float(x @ y / (x @ x))


def ranks(values: Array) -> Array:
    """Return the rank of each value from 1 on; those that are equal share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranked: Array = (counts.cumsum() - (counts - 1) / 2)[place]
    return ranked
