"""A new plugin is a package that works as it stands: installed, tested and trained here."""

import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from knife.checkpoint import describe, save
from knife.errors import InputError, SettingsError, TargetError
from knife.phantom import write_dataset
from knife.scaffold import PLACES, new_plugin
from knife.settings import Settings, Wish
from knife.spec import preset
from knife.tasks import HOOKS, task
from knife.train import Run, Watch, train
from knife.translation import translate

NAME = "scaffolded"


class Finite(Watch):
    """A watch that insists on finite losses."""

    def step(self, step, loss):
        assert math.isfinite(loss)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    return new_plugin(NAME, tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def site(package, tmp_path_factory):
    """Return a folder with the package installed in it, for the module search path."""
    folder = tmp_path_factory.mktemp("site")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(folder), str(package)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def installed(site, monkeypatch):
    """Let this process find the installed package."""
    monkeypatch.syspath_prepend(site)
    yield
    sys.modules.pop(f"knife_{NAME}", None)


def test_the_files_of_a_package(package):
    assert package.name == f"knife-{NAME}"
    assert [entry.name for entry in package.parent.iterdir()] == [package.name]
    files = {path.relative_to(package).as_posix() for path in package.rglob("*") if path.is_file()}
    assert files >= {place.replace("$name", NAME) for place in PLACES.values()}
    for file in files:
        assert "$" not in (package / file).read_text(encoding="utf-8")


def test_its_contract_test_passes(package, site):
    env = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error", "tests"]
    done = subprocess.run(command, cwd=package, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


def test_it_is_listed_with_every_hook(installed):
    assert task(NAME).hooks == HOOKS


def test_it_trains_and_translates(installed, tmp_path):
    data, models = tmp_path / "data", tmp_path / "models"
    write_dataset(data, 12, size=64)
    run = Run(NAME, data, models, "toy", "small-64", steps=3, batch=4, lr=1e-3, ema=0.9)
    assert train(run, Finite()) == 3
    card = describe(run.path).card
    assert (card.kind, card.dataset) == (NAME, "toy")
    assert card.config["low"] < card.config["mean"] < card.config["high"]
    fresh = replace(card, kind="diffusion", spec=preset("small-64").spec("diffusion", card.spec.channels))
    save(run.path.with_stem("diffusion"), fresh.build().state_dict(), fresh.to_json())

    image, wanted = data / "images" / "phantom_00000.nii.gz", f"{card.config['mean']:.4f}"
    settings = Settings(noise_level=20, steps=2)
    (done,) = translate(image, Wish(NAME, wanted), out=tmp_path / "out", models=models, settings=settings, device="cpu")
    assert done.result.pixels.shape == done.source.pixels.shape
    assert done.result.pixels.isfinite().all()
    assert not torch.equal(done.result.pixels, done.source.pixels)
    assert math.isfinite(done.record["before"][NAME])
    assert math.isfinite(done.record["after"][NAME])
    assert all(file.is_file() for file in done.files)
    with pytest.raises(TargetError, match=f"--target 7: outside .* give a number from {card.config['low']:.3g} to"):
        translate(image, Wish(NAME, "7"), models=models, device="cpu")


@pytest.mark.parametrize(
    "name", ["", "Upper", "two-words", "1st", "a/b", "../up", "with space", "été", "a" * 41, "x\n"]
)
def test_a_name_that_is_none(name, tmp_path):
    with pytest.raises(SettingsError, match=r"NAME .*: give lowercase letters, digits and _"):
        new_plugin(name, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["regress", "segment", "classify", "diffusion"])
def test_a_name_that_is_taken(name, tmp_path):
    with pytest.raises(SettingsError, match=rf"NAME {name}: a task of that name is there already"):
        new_plugin(name, tmp_path)


def test_a_folder_that_exists_is_left_alone(tmp_path):
    (tmp_path / "knife-age").mkdir()
    (tmp_path / "knife-age" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match=r"knife-age: exists already; choose another name or folder"):
        new_plugin("age", tmp_path)
    assert [path.name for path in (tmp_path / "knife-age").iterdir()] == ["mine.txt"]


def test_a_file_instead_of_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file: a file; give a folder"):
        new_plugin("age", tmp_path / "file")


def test_missing_folders_are_made(tmp_path):
    assert (new_plugin("age", tmp_path / "a" / "b") / "knife_age.py").is_file()


def test_a_package_is_whole_or_absent(tmp_path, monkeypatch):
    monkeypatch.setitem(PLACES, "no_such_file", "end.txt")
    with pytest.raises(FileNotFoundError):
        new_plugin("age", tmp_path)
    assert not list(tmp_path.iterdir())
