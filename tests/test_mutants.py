"""What benchmarks/mutants.py changes, and that what it calls equivalent is there; the run itself takes its time."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import mutants

CHANGES = {
    "a < b": ["a <= b", "a >= b"],
    "1 <= a": ["1 < a", "1 > a", "2 <= a", "0 <= a"],
    "a is None": ["a is not None"],
    "a + b": ["a - b"],
    "not a": ["a"],
    "-a": ["a"],
    "a and b": ["a or b"],
    "a if b else c": ["a if not b else c"],
    "[a for a in b if c]": ["[a for a in b if not c]"],
    "x = True": ["x = False"],
    "x = 0.5": ["x = 1.0"],
    "x = 'a'": ["x = 'ax'"],
    "a.sqrt()": ["pass", "a"],
    "x = min(a, b)": ["x = max(a, b)"],
    "x = f(a, b, c)": ["x = f(b, a, c)"],
    "x = f(a=b)": ["x = f()"],
    "x = a.clamp(min=b)": ["x = a.clamp()", "x = a.clamp(max=b)"],
    "raise ValueError('a' + 'b')": ["pass"],
    "with suppress(E):\n    x = y": ["if True:\n    x = y"],
    "with a, suppress(E):\n    x = y": ["with a:\n    x = y"],
    "if a:\n    x = y": ["if not a:\n    x = y"],
    "for a in b:\n    break": ["for a in b:\n    continue"],
    "try:\n    x = y\nexcept E:\n    x = z": ["try:\n    x = y\nexcept E:\n    raise"],
    "def f(x: int=1) -> 'X':\n    'Do it.'\n    return x": [
        'def f(x: int=2) -> \'X\':\n    """Do it."""\n    return x',
        'def f(x: int=0) -> \'X\':\n    """Do it."""\n    return x',
        'def f(x: int=1) -> \'X\':\n    """Do it."""\n    return None',
    ],
    "@a\ndef f():\n    x = y": ["def f():\n    x = y"],
    "PRESETS = {'a': 1}": [],
    "import a": [],
}


@pytest.mark.parametrize("text", CHANGES)
def test_one_thing_is_changed_at_a_time(text: str) -> None:
    assert sorted(mutant.source.strip() for mutant in mutants.mutants_in(text, "m")) == sorted(CHANGES[text])


def test_a_mutant_is_named_by_its_place_and_what_was_changed() -> None:
    text = "class A:\n    def f(self):\n        x = 1\n        x = 1\n"
    told = [(mutant.line, mutant.name) for mutant in mutants.mutants_in(text, "m")]
    assert told == [(3, "m.A.f: 1 -> 2"), (3, "m.A.f: 1 -> 0"), (4, "m.A.f: 1 -> 2 #2"), (4, "m.A.f: 1 -> 0 #2")]


def test_what_is_called_equivalent_is_a_mutant() -> None:
    assert mutants.unknown([*mutants.SUBJECTS]) == []
