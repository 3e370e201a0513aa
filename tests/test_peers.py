"""The script that measures other programs: what it does by itself, on which device."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import peers

CALLS = ["batch1", "batch8", "faces", "brats"]
OTHERS = ["guided-diffusion", "diffusers", "monai"]


@pytest.mark.parametrize(
    ("only", "device", "cases", "programs"),
    [
        (None, "cpu", CALLS, ["knife", "knife-standard", *OTHERS]),
        (None, "cuda:1", [*CALLS, "faces16", "brats16", "brats-walk"], ["knife", "knife-standard", *OTHERS]),
        ("paper", "cpu", ["paper"], ["knife", "knife-standard", *OTHERS]),
        ("brats,knife,diffusers-compile", "cpu", ["brats"], ["knife", "diffusers-compile"]),
    ],
)
def test_what_is_measured(only: str | None, device: str, cases: list[str], programs: list[str]) -> None:
    found = peers.chosen(only, peers.Where(device))
    compiled = ["diffusers-compile"] if only is None and device != "cpu" else []
    assert [case.name for case in found[0]] == cases
    names = [program.name for program in found[1]]
    assert sorted(names) == sorted([*programs, *compiled])


def test_facts_name_device_and_precision() -> None:
    facts = peers.about(1, peers.Where("cpu", "bfloat16"))
    assert (facts["device"], facts["precision"]) == ("cpu", "bfloat16")
    assert {"torch", "diffusers", "monai", "guided-diffusion-sdk"} <= {*facts}


def test_timesteps_are_those_of_the_walk() -> None:
    walk = next(case for case in peers.CASES if case.name == "brats-walk")
    assert walk.timesteps == [0, 50, 100, 150, 200, 250, 300, 350, 400, 450, 500]
