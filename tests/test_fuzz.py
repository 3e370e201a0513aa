"""Damaged files of every kind: read, or refused in knife's own words (benchmarks/fuzz.py goes on longer)."""

import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import fuzz

INPUTS = 60  # of each kind


@pytest.fixture(scope="module")
def targets() -> Iterator[dict[str, fuzz.Target]]:
    with tempfile.TemporaryDirectory() as name:
        yield fuzz.targets(Path(name))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind", ["nifti", "volume", "mask", "picture", "table", "checkpoint", "foreign", "diffusers", "dicom"]
)
def test_damage_is_refused_or_read(kind: str, targets: dict[str, fuzz.Target], tmp_path: Path) -> None:
    tally = fuzz.fuzz(targets[kind], tmp_path, lambda tally: tally.inputs >= INPUTS, seed=3)
    assert tally.found == []
    assert tally.inputs >= INPUTS
    assert tally.refused > INPUTS / 10, "changes must be seen"
    assert tally.read > len(targets[kind].seeds) / 2


def test_every_kind_is_tried(targets: dict[str, fuzz.Target]) -> None:
    assert len(targets) == 9


def test_what_is_no_refusal_is_found(tmp_path: Path) -> None:
    def careless(path: Path) -> object:
        raise ValueError("no sentence")

    target = fuzz.Target({"x.bin": b"whatever"}, careless, (fuzz.damaged,))
    tally = fuzz.fuzz(target, tmp_path, lambda tally: tally.inputs >= 3, seed=0, keep=tmp_path / "kept")
    assert (tally.other, len(tally.found)) == (3, 3)
    assert len([*(tmp_path / "kept").iterdir()]) == 2


def test_what_hangs_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(path: Path) -> object:
        while True:
            pass

    monkeypatch.setattr(fuzz, "PATIENCE", 0.05)
    tally = fuzz.Tally()
    said = fuzz.outcome(fuzz.Target({}, hang, ()), tmp_path, tally)
    assert "Hung" in said
    assert tally.other == 1


@pytest.mark.parametrize("kind", ["nifti", "picture", "checkpoint", "foreign"])
def test_the_same_seed_makes_the_same_inputs(
    kind: str, targets: dict[str, fuzz.Target], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)

    def inputs() -> list[bytes]:
        chance, seeds = random.Random(5), targets[kind].seeds
        return [fuzz.changed(targets[kind], data, chance) for data in seeds.values() for _ in range(5)]

    first = inputs()
    now += 3600.0  # archives store times
    assert inputs() == first
    assert len(set(first)) > 1
