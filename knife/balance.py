"""Which images a task is shown how often: no value more often than another, or at most so many images of each.

Images are of kinds: classes, tenths of the range of a number, or with and without a mask. Balanced, every image of an
epoch comes together with one image of each other kind, so that all kinds are seen equally often. Slices of volumes are
matched with slices of the same tenth of the height, since where in the head a slice lies tells a good deal about its
class, and a classifier would learn that instead.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from knife.errors import SettingsError

BINS = 10  # of a number's range, and of the height of a volume

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


def strata(labels: Sequence[Tensor], heights: Sequence[float | None] | None = None) -> Strata:
    """Sort images by their labels: class indices, numbers or masks; and by heights of 0 to 1, if all are given.

    Raises:
        SettingsError: if all are of one kind, or no tenth of the height holds every kind.
    """
    kinds = ranked(binned(labels))
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


def binned(labels: Sequence[Tensor]) -> list[float]:
    """Return what each label counts as: a class its index, a number its tenth of the range, a mask if it has any."""
    values = [value_of(label) for label in labels]
    if not labels[0].is_floating_point() or labels[0].ndim:
        return values
    low, high = min(values), max(values)
    return [min(int(BINS * (value - low) / (high - low or 1)), BINS - 1) for value in values]


def value_of(label: Tensor) -> float:
    """Return a label as a number: of maps, 1 if the first, a mask, is not empty."""
    return float(label[:1].any()) if label.ndim else float(label)


def ranked(values: Sequence[float]) -> list[int]:
    """Return the rank of each value among the different ones."""
    rank = {value: i for i, value in enumerate(sorted({*values}))}
    return [rank[value] for value in values]


def capped(labels: Sequence[Tensor], cap: int, random: torch.Generator) -> list[int]:
    """Return which images stay if at most `cap` of one class or value do, chosen at random."""
    seen: Counter[float] = Counter()
    kept = []
    for i in torch.randperm(len(labels), generator=random).tolist():
        value = value_of(labels[i])
        seen[value] += 1
        if seen[value] <= cap:
            kept.append(i)
    return sorted(kept)
