"""Killed, signalled, and on failing disks: a short run of benchmarks/endurance.py."""

import random
import sys
from pathlib import Path

import pytest

from knife import resume, spec

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import endurance

pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # of forks where there are threads


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Offer a preset of tiny networks."""
    monkeypatch.setitem(spec.PRESETS, "tiny", endurance.PRESET)
    monkeypatch.setattr(resume, "LOG_EVERY", 2)


@pytest.mark.slow
def test_killed_trainings_lose_nothing_and_end_as_if_never_killed(tmp_path: Path) -> None:
    counts = endurance.kill_trainings(tmp_path, 100, random.Random(0))
    assert counts["kills"] >= 100
    assert counts["ended"] > 0
    assert (counts["lost"], counts["mismatched"], counts["refused"]) == (0, 0, 0)


def test_signalled_trainings_save_and_say_so(tmp_path: Path) -> None:
    counts = endurance.signal_trainings(tmp_path, 6, random.Random(0))
    assert counts["signals"] >= 6
    assert (counts["mismatched"], counts["wrong_code"], counts["still_locked"]) == (0, 0, 0)


@pytest.mark.slow
def test_trainings_on_failing_disks_end_well_when_these_are_mended(tmp_path: Path) -> None:
    counts = endurance.fail_calls(tmp_path, 61)
    assert counts["calls"] >= 10
    assert counts["crashed"] > 0
    assert (counts["mismatched"], counts["other"]) == (0, 0)


def test_killed_translations_do_everything_once(tmp_path: Path) -> None:
    counts = endurance.kill_translations(tmp_path, 24, 8, random.Random(0))
    assert counts["kills"] > 3
    assert (counts["missing"], counts["torn"], counts["done_twice"]) == (0, 0, 0)
