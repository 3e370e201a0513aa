"""Balanced, every kind of image is seen equally often, slices beside slices of their height, the same way each time."""

from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from knife.balance import Strata, capped, strata
from knife.errors import SettingsError


def random(draw: int) -> torch.Generator:
    return torch.Generator().manual_seed(draw)


def order(epoch: int, count: int) -> Sequence[int]:
    return torch.randperm(count, generator=random(epoch)).tolist()


def seen(found: Strata, places: int) -> list[int]:
    return [found.draw(place, order, random) for place in range(places)]


def classes(*indices: int) -> list[Tensor]:
    return [torch.tensor(i) for i in indices]


def test_classes_are_seen_equally_often_and_every_image_at_least_once_an_epoch() -> None:
    labels = classes(*[0] * 45, *[1] * 5)
    images = seen(strata(labels), 2 * 50)
    assert Counter(int(labels[i]) for i in images) == {0: 50, 1: 50}
    assert all(int(labels[i]) == place % 2 for place, i in enumerate(images))
    assert {*images} == {*range(50)}
    assert seen(strata(labels), 100) == images
    assert seen(strata(labels), 200)[100:] != images


def test_numbers_are_seen_equally_often_by_tenths_of_their_range() -> None:
    ages = [26.0] * 90 + [1.0, 4.0, 12.0, 55.0, 100.0]
    labels = [torch.tensor(age) for age in ages]
    found = strata(labels)
    assert found.count == 5  # of the ten tenths, five hold nobody
    counts = Counter(ages[i] for i in seen(found, 500))
    assert (counts[26.0], counts[12.0], counts[55.0], counts[100.0]) == (100, 100, 100, 100)
    assert counts[1.0] + counts[4.0] == 100


def test_masks_count_as_with_and_without() -> None:
    masks = [torch.zeros(1, 4, 4) for _ in range(9)]
    masks[4][0, 1, 1] = 1
    assert Counter(i == 4 for i in seen(strata(masks), 18)) == {True: 9, False: 9}


def test_classes_of_slices_are_matched_by_height() -> None:
    """Tumours lie high: without matching, height alone would tell the class."""
    heights = [i / 100 for i in range(100)]
    labels = classes(*[int(i % 10 < i // 10) for i in range(100)])  # more diseased the higher, none in the lowest tenth
    found = strata(labels, heights)
    assert {*found.kept} == {*range(10, 100)}
    pairs = torch.tensor(seen(found, 180)).view(-1, 2)
    assert all(int(labels[int(a)]) == 0 and int(labels[int(b)]) == 1 for a, b in pairs)
    assert torch.equal(pairs[:, 0] // 10, pairs[:, 1] // 10)


def test_heights_that_are_not_all_known_do_not_matter() -> None:
    assert {*strata(classes(0, 1, 1), [0.1, None, 0.9]).tenths} == {0}


def test_what_cannot_be_balanced_is_refused() -> None:
    with pytest.raises(SettingsError, match="--balance: all images have the same label"):
        strata(classes(1, 1))
    with pytest.raises(SettingsError, match="--balance: no tenth of the height holds slices of every class"):
        strata(classes(0, 1), [0.2, 0.8])


def test_at_most_so_many_of_one_value() -> None:
    labels = [torch.tensor(26.0)] * 50 + [torch.tensor(30.0)] * 3
    kept = capped(labels, 10, random(0))
    assert kept == sorted(kept)
    assert Counter(float(labels[i]) for i in kept) == {26.0: 10, 30.0: 3}
    assert capped(labels, 10, random(0)) == kept != capped(labels, 10, random(1))
    assert capped(labels, 100, random(0)) == list(range(53))
