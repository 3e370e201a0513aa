"""Balanced, every kind of image is seen equally often, slices beside slices of their height, the same way each time."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from knife_plugins import classify, regress
from PIL import Image as Picture
from torch import Tensor

from knife import hookimpl
from knife.balance import Strata, capped, kinds_of, strata
from knife.contract import unregistered
from knife.data import Case
from knife.errors import SettingsError
from knife.job import Job, Run, prepare
from knife.tasks import Task, task


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
    found = strata(balanced("regress", [of_age(age) for age in ages]))
    assert found.count == 5  # of the ten tenths, five hold nobody
    counts = Counter(ages[i] for i in seen(found, 500))
    assert (counts[26.0], counts[12.0], counts[55.0], counts[100.0]) == (100, 100, 100, 100)
    assert counts[1.0] + counts[4.0] == 100


def test_masks_count_as_with_and_without() -> None:
    cases = [outlined(3 * (i == 4)) for i in range(9)]
    for name in ("segment", "classify"):
        assert Counter(i == 4 for i in seen(strata(balanced(name, cases)), 18)) == {True: 9, False: 9}


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
    values = [26.0] * 50 + [30.0] * 3
    kept = capped(values, 10, random(0))
    assert kept == sorted(kept)
    assert Counter(values[i] for i in kept) == {26.0: 10, 30.0: 3}
    assert capped(values, 10, random(0)) == kept != capped(values, 10, random(1))
    assert capped(values, 100, random(0)) == list(range(53))


# ------------------------------------------------------------------------------------------------------------ the kinds


def outlined(pixels: int, **values: str) -> Case:
    """Return a case of 100 pixels of brain, of which a mask outlines some."""
    mask = torch.zeros(100)
    mask[:pixels] = 1
    image = torch.full((1, 11, 10), 0.5)
    image[0, 10] = -1
    return Case("one", image, torch.cat([mask, torch.zeros(10)]).view(1, 11, 10), values)


def of_age(years: float) -> Case:
    return outlined(0, age=str(years))


def kinds(known: Task | str, cases: Sequence[Case], label: str | None = None) -> tuple[list[float], list[float]]:
    known = task(known) if isinstance(known, str) else known
    return kinds_of(known, cases, known.configure(cases, label))


def balanced(name: str, cases: Sequence[Case]) -> list[float]:
    return kinds(name, cases)[1]


@pytest.mark.parametrize("label", [regress.PIXELS, regress.TUMOUR])
def test_sizes_of_masks_count_by_tenths_and_none_apart_however_they_are_told(label: str) -> None:
    """Most slices show nothing: in the lowest tenth they would crowd out the small tumours."""
    sizes = [0] * 50 + [1, 2, 3, 11, 20, 31, 51, 60, 91, 100]
    alike, near = kinds("regress", [outlined(size) for size in sizes], label)
    assert alike == near == [-1] * 50 + [0, 0, 0, 1, 1, 3, 5, 5, 9, 9]
    counts = Counter(sizes[i] for i in seen(strata(near), 6 * 60))
    assert counts[0] == counts[31] == counts[11] + counts[20] == counts[1] + counts[2] + counts[3] == 60
    assert Counter(near[i] for i in capped(alike, 2, random(0))) == {-1: 2, 0: 2, 1: 2, 3: 1, 5: 2, 9: 2}


def test_ages_count_one_by_one_for_a_cap_and_by_tenths_when_balanced() -> None:
    ages = [20.0, 20.0, 21.0, 70.0]
    alike, near = kinds("regress", [of_age(age) for age in ages])
    assert len({*alike}) == 3
    assert alike[0] == alike[1]
    assert near == [0, 0, 0, 9]


def test_classes_and_masks_count_alike_for_both() -> None:
    cases = [outlined(size, sort=sort) for size, sort in ((0, "a"), (5, "b"), (50, "c"), (0, "a"))]
    for name, label, wanted in (
        ("classify", "sort", [0, 1, 2, 0]), ("classify", classify.PIXELS, [0, 1, 1, 0]),
        ("classify", classify.DISEASE, [1, 0, 0, 1]), ("segment", None, [0, 1, 1, 0]),
    ):  # fmt: skip
        assert kinds(name, cases, label) == (wanted, wanted)


def stranger(**hooks: Any) -> Task:
    """Return regress with some hooks replaced; None leaves one out."""
    module = ModuleType("stranger")
    for name in ("configure", "label", "build", "train", "target", "guide", "value"):
        if hook := hooks.get(name, getattr(regress, name)):
            setattr(module, name, hookimpl(hook))
    return unregistered(module)


def unknown_of_one(case: Case, config: Mapping[str, Any]) -> float | None:
    return float(case.mask.sum()) if case.values.get("known") else None


def test_a_stranger_s_number_counts_as_what_its_task_tells() -> None:
    cases = [outlined(size, known="yes" * (size != 7)) for size in (0, 1, 7, 90)]
    maps = {"configure": lambda cases: {}, "label": lambda case: case.mask}
    measured = stranger(**maps, value=lambda case: float(case.mask.sum()))
    assert kinds(measured, cases) == ([-1, 0, 0, 9], [-1, 0, 0, 9])
    assert kinds(stranger(**maps, value=unknown_of_one), cases) == ([0, 1, 1, 1], [0, 1, 1, 1])  # by the mask
    graded = stranger(configure=lambda cases: {"label": ["grade"]}, label=lambda case: case.mask.sum().long())
    assert kinds(graded, cases) == ([0, 1, 7, 90], [0, 1, 7, 90])  # classes, however a number tells them
    silent = stranger(configure=lambda cases: {}, label=lambda case: case.mask.mean(), value=None)
    alike, near = kinds(silent, cases)
    assert alike == [float(case.mask.mean()) for case in cases]  # nothing says that it is measured
    assert near == [0, 0, 0, 9]


# ----------------------------------------------------------------------------------------------------------- a training


@pytest.fixture
def forty(tmp_path: Path) -> Path:
    """Write forty pictures with masks of two times twenty sizes."""
    noise = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for i in range(40):
        mask = np.zeros((32, 32), np.uint8)
        mask[: 1 + i // 2, :10] = 255
        for name, pixels in ((f"{i}.png", noise.integers(1, 255, (32, 32), np.uint8)), (f"{i}_mask.png", mask)):
            Picture.fromarray(pixels).save(tmp_path / "data" / name)
    return tmp_path / "data"


def prepared(data: Path, **options: Any) -> Job:
    return prepare(Run("regress", data, data.parent / "models", "x", "small-64", 1, 2, 1e-3, 0.9, **options))


def test_a_cap_leaves_so_many_of_each_tenth_of_the_sizes(forty: Path) -> None:
    job = prepared(forty, cap=3)
    assert len(job.examples) == 30
    assert all(x is case.pixels for (x, _), case in zip(job.examples, job.cases, strict=True))
    sizes = [case.mask.sum() for case in job.cases]
    assert len({int(size) for size in sizes}) > 10


def test_sizes_of_masks_are_balanced(forty: Path) -> None:
    found = prepared(forty, balance=True).strata
    assert found is not None
    assert (found.count, len(found.kept)) == (10, 36)  # four are set apart
    both = prepared(forty, balance=True, cap=2)
    assert both.strata is not None
    assert (len(both.examples), both.strata.count) == (20, 10)
    assert Counter(both.strata.kinds) == dict.fromkeys(range(10), 2)
