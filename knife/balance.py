"""Which images a task is shown how often: no value more often than another, or at most so many images of each.

Images are of kinds: classes, tenths of the range of a number, or with and without a mask. Balanced, every image of an
epoch comes together with one image of each other kind, so that all kinds are seen equally often. Slices of volumes are
matched with slices of the same tenth of the height, since where in the head a slice lies tells a good deal about its
class, and a classifier would learn that instead.

A number that is measured, as the size of a mask, hardly ever comes twice, so that its tenths are the kinds for both
options; and where it is 0 there is nothing to measure, which is a kind of its own: among the small tumours of the
lowest tenth, the many slices without one would crowd them out.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, SupportsFloat

import torch
from torch import Tensor

from knife.errors import SettingsError
from knife.tasks import Task

if TYPE_CHECKING:
    from knife.data import Case

BINS = 10  # of a number's range, and of the height of a volume
NOTHING = -1  # the kind of what measures 0; tenths are counted from 0

Random = Callable[[int], torch.Generator]  # a source of random numbers for the draw of this number
Order = Callable[[int, int], Sequence[int]]  # (epoch, count) -> a permutation


@dataclass(frozen=True)
class Strata:
    """The kind of every image, and which images may stand beside it."""

    kinds: Sequence[int]  # of each image, 0 to `count` - 1
    tenths: Sequence[int]  # of the height at which each lies; 0 for all if that does not matter
    members: dict[tuple[int, int], list[int]]  # (tenth, kind) -> images
    kept: Sequence[int]  # images that find one of every other kind in their tenth
    count: int  # of kinds

    def draw(self, place: int, order: Order, random: Random) -> int:
        """Return the image at a place of the endless row of images that are trained on.

        Of `count` places that follow each other, one is for each kind: one image as its epoch brings it, and others
        drawn to match it.
        """
        group, kind = divmod(place, self.count)
        epoch, turn = divmod(group, len(self.kept))
        leader = self.kept[order(epoch, len(self.kept))[turn]]
        if self.kinds[leader] == kind:
            return leader
        matching = self.members[self.tenths[leader], kind]
        return matching[int(torch.randint(len(matching), (), generator=random(place)))]


def strata(told: Sequence[SupportsFloat], heights: Sequence[float | None] | None = None) -> Strata:
    """Sort images by their kinds, told as numbers that differ; and by heights of 0 to 1, if all are given.

    Raises:
        SettingsError: if all are of one kind, or no tenth of the height holds every kind.
    """
    kinds = ranked([float(one) for one in told])
    count = len({*kinds})
    if count < 2:
        raise SettingsError("--balance: all images have the same label; leave the option out.")
    known = [min(int(BINS * height), BINS - 1) for height in heights or () if height is not None]
    tenths = known if len(known) == len(kinds) else [0] * len(kinds)
    members: dict[tuple[int, int], list[int]] = {}
    for i, where in enumerate(zip(tenths, kinds, strict=True)):
        members.setdefault(where, []).append(i)
    whole = {tenth for tenth in tenths if all((tenth, kind) in members for kind in range(count))}
    kept = [i for i, tenth in enumerate(tenths) if tenth in whole]
    if not kept:
        raise SettingsError("--balance: no tenth of the height holds slices of every class; leave the option out.")
    return Strata(kinds, tenths, members, kept, count)


def kinds_of(task: Task, cases: "Sequence[Case]", config: Mapping[str, Any]) -> tuple[list[float], list[float]]:
    """Return of which kind each image is for --cap, and for --balance; no more than one label is held at a time.

    A class, and whether a mask is empty, is a kind for both. A number of a column is one by itself for --cap, as ages
    come again and again, and its tenth of the range for --balance. One that the task measures (its hook `value`) is its
    tenth for both, and 0 apart.
    """
    values = measured(task, cases, config)
    if values:
        sizes = tenths([value for value in values if value])
        kinds = [float(next(sizes) if value else NOTHING) for value in values]
        return kinds, kinds
    values, numbers = [], False
    for case in cases:
        label = task.label(case, config)
        numbers = label.is_floating_point() and not label.ndim
        values.append(value_of(label))
    return values, [*map(float, tenths(values))] if numbers else values


def measured(task: Task, cases: "Sequence[Case]", config: Mapping[str, Any]) -> list[float]:
    """Return the numbers that a task measures, in the user's units; none if some lack.

    There are none either if the task tells classes, or learns a column.
    """
    column = str(config.get("label"))
    if "value" not in task.hooks or any(column in case.values for case in cases):
        return []
    label = task.label(cases[0], config)
    if not (label.is_floating_point() or label.ndim):
        return []
    found = [value for case in cases if (value := task.value(case, config)) is not None]
    return found if len(found) == len(cases) else []


def tenths(values: Sequence[float]) -> Iterator[int]:
    """Yield the tenth of their range, 0 to 9, in which each value lies."""
    low, high = min(values, default=0), max(values, default=0)
    for value in values:
        yield min(int(BINS * (value - low) / (high - low or 1)), BINS - 1)


def value_of(label: Tensor) -> float:
    """Return a label as a number: of maps, 1 if the first, a mask, is not empty."""
    return float(label[:1].any()) if label.ndim else float(label)


def ranked(values: Sequence[float]) -> list[int]:
    """Return the rank of each value among the different ones."""
    rank = {value: i for i, value in enumerate(sorted({*values}))}
    return [rank[value] for value in values]


def capped(told: Sequence[float], cap: int, random: torch.Generator) -> list[int]:
    """Return which images stay if at most `cap` of one kind do, chosen at random."""
    seen: Counter[float] = Counter()
    kept = []
    for i in torch.randperm(len(told), generator=random).tolist():
        seen[told[i]] += 1
        if seen[told[i]] <= cap:
            kept.append(i)
    return sorted(kept)
