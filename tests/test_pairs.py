"""A judge is never taken for a guide, and judges only what it was taught to tell."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import CONFIGS, SCHEDULE, SIZE, TINY

from knife.checkpoint import Card, file_name, load, save
from knife.errors import ModelError
from knife.pairs import Pair, choose, doubts, judge_of, pairs_in
from knife.schedule import Schedule
from knife.spec import ImageSpec
from knife.tasks import task

SPEC = ImageSpec(("a",), SIZE, TINY, TINY)


def store(folder: Path, card: Card, name: str | None = None) -> Path:
    """Store a network of random weights under its own name, or another."""
    path = folder / card.dataset / (name or file_name(card.kind, card.judge))
    save(path, card.build().state_dict(), card.to_json())
    return path


def card_of(kind: str, config: Mapping[str, Any] | None = None, judge: bool = False) -> Card:
    spec = SPEC.for_judge() if judge else SPEC
    return Card(kind, "toy", spec, SCHEDULE, CONFIGS.get(kind, {}) if config is None else config, judge=judge)


def a_pair(folder: Path, kind: str = "regress") -> Pair:
    """Store a diffusion model and a guide, and return them as they are found."""
    for name in ("diffusion", kind):
        store(folder, card_of(name))
    ((pair,), broken) = pairs_in(folder, kind, None)
    assert not broken
    return pair


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_judge_is_found_beside_its_guide_and_answers(tmp_path: Path, kind: str) -> None:
    pair = a_pair(tmp_path, kind)
    assert judge_of(pair) is None
    path = store(tmp_path, card_of(kind, judge=True))
    judge = judge_of(pair)
    assert judge is not None
    assert (judge.path, judge.card.judge, judge.card.spec) == (path, True, SPEC.for_judge())
    net = load(judge)
    label = {
        "regress": torch.zeros(2),
        "classify": torch.zeros(2, dtype=torch.long),
        "segment": torch.ones(2, 1, *SIZE),
    }
    error = task(kind).error(net, torch.zeros(2, 1, *SIZE), torch.zeros(2), label[kind], judge.card.config)
    assert error is not None
    assert error.shape == (2,)


def test_a_judge_of_another_task_does_not_count(tmp_path: Path) -> None:
    pair = a_pair(tmp_path)
    store(tmp_path, card_of("classify", judge=True))
    assert judge_of(pair) is None


def test_a_judge_has_numbers_of_its_own_and_any_schedule(tmp_path: Path) -> None:
    """Its half of the patients has another mean and range; of noise levels it knows the clean one alone."""
    pair = a_pair(tmp_path)
    config = {**CONFIGS["regress"], "mean": 0.12, "std": 0.09, "high": 0.31}
    store(tmp_path, replace(card_of("regress", config, judge=True), schedule=Schedule("cosine", 20)))
    judge = judge_of(pair)
    assert judge is not None
    assert judge.card.config["mean"] == 0.12


@pytest.mark.parametrize(
    "changed",
    [
        {"config": {**CONFIGS["regress"], "label": "age"}},
        {"config": {**CONFIGS["regress"], "unit": "years"}},
        {"config": {}},
        {"spec": replace(SPEC, channels=("b",))},
        {"spec": replace(SPEC, channels=("a", "b"))},
        {"spec": replace(SPEC, size=(32, 32))},
        {"spec": replace(SPEC, value_range=(0.0, 1.0))},
        {"spec": replace(SPEC, crop=True)},
        {"training": {"settings": {"mask_labels": [1, 4]}}},
    ],
    ids=str,
)
def test_a_judge_that_tells_something_else_is_left_aside(tmp_path: Path, changed: dict[str, Any]) -> None:
    pair = a_pair(tmp_path)
    store(tmp_path, replace(card_of("regress", judge=True), **changed))
    assert judge_of(pair) is None


def test_a_judge_of_other_classes_is_left_aside(tmp_path: Path) -> None:
    pair = a_pair(tmp_path, "classify")
    store(tmp_path, card_of("classify", {"label": "class", "classes": ["diseased", "healthy", "unclear"]}, judge=True))
    assert judge_of(pair) is None


def test_guides_of_before_there_were_settings_have_judges_too(tmp_path: Path) -> None:
    pair = a_pair(tmp_path)
    store(tmp_path, replace(card_of("regress", judge=True), training={"settings": {"mask_labels": []}}))
    assert judge_of(pair) is not None


def test_a_judge_is_never_taken_for_a_guide(tmp_path: Path) -> None:
    store(tmp_path, card_of("diffusion"))
    store(tmp_path, card_of("regress", judge=True))
    assert pairs_in(tmp_path, "regress", None) == ([], [])
    renamed = store(tmp_path, card_of("regress", judge=True), file_name("regress"))
    pairs, broken = pairs_in(tmp_path, "regress", None)
    assert (pairs, [str(error) for error in broken]) == (
        [],
        [f"{renamed}: a judge of regress under the wrong name; rename it, or remove it."],
    )
    with pytest.raises(ModelError, match="a judge of regress under the wrong name"):
        choose("regress", [], tmp_path, None)


def test_a_guide_is_never_taken_for_a_judge(tmp_path: Path) -> None:
    pair = a_pair(tmp_path)
    store(tmp_path, card_of("regress"), file_name("regress", judge=True))
    with pytest.raises(ModelError, match="a model of kind regress under the wrong name"):
        judge_of(pair)


@pytest.mark.parametrize(
    ("guidance", "doubtful"),
    [
        ({}, False),
        ({"error": 9.0}, False),
        ({"error": 9.0, "chance": 10.0}, True),
        ({"error": 7.0, "chance": 10.0}, False),
    ],
)
def test_a_guide_that_errs_as_guessing_does_is_doubted(
    tmp_path: Path, guidance: dict[str, float], doubtful: bool
) -> None:
    stored = SimpleNamespace(
        card=SimpleNamespace(dataset="d", guidance=guidance), path=tmp_path / "regress.safetensors"
    )
    said = doubts([Pair(stored, stored)])
    assert (
        said
        == [
            "d/regress.safetensors: on images set apart it errs by 9, where guessing errs by 10; what it guides to "
            "means little. Train it further."
        ]
        * doubtful
    )


def test_a_damaged_judge_is_refused_by_name(tmp_path: Path) -> None:
    pair = a_pair(tmp_path)
    file = pair.folder / file_name("regress", judge=True)
    file.write_bytes(b"damaged")
    with pytest.raises(ModelError) as refusal:
        judge_of(pair)
    assert str(file) in str(refusal.value)
