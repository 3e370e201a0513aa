"""The command line: every command once, results on stdout, words on stderr, and refusals of one sentence."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import TINY, Done
from test_lock import holder

import knife.files
import knife.train
from knife import __version__, cli, demo, doctor, pairs, spec, translation
from knife.checkpoint import Card, describe
from knife.cli import terminal, translating
from knife.cli.training import TrainingView, command_line
from knife.errors import (
    ApartError,
    DeviceError,
    DiskError,
    DivergedError,
    InputError,
    KnifeError,
    LockedError,
    MemoryShortError,
    ModelError,
    OpsError,
    SamplingError,
    SettingsError,
    TargetError,
    TaskError,
    UnreadableError,
)
from knife.image import read
from knife.interop import foreign_names, foreign_shape
from knife.phantom import phantom, write_dataset, write_nifti
from knife.schedule import Schedule
from knife.settings import DEFAULTS, Settings, Wish
from knife.spec import ImageSpec, Preset, Training

FEW = ("--noise-level", "10", "--steps", "5")


@pytest.fixture
def shipped(models, monkeypatch):
    """Let the tiny models be the shipped ones."""
    for user in (pairs, doctor):
        monkeypatch.setattr(user, "STARTER", models)


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# -------------------------------------------------------------------------------------------------- help, what there is


def test_help_is_given_without_torch():
    code = "import sys; sys.argv = ['knife', '--help']\nfrom knife.cli import main\n"
    code += "try: main()\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    for command in ("train", "translate", "demo", "presets", "info", "doctor", "phantom", "plugins", "models"):
        assert re.search(rf"^  {command} ", done.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    "command", ["train", "translate", "demo", "phantom", "models import", "models export", "plugins new", "data check"]
)
def test_every_command_has_help(run, command):
    done = run(*command.split(), "--help")
    assert done.code == 0
    assert "Usage: " in done.out


def test_version(run):
    assert run("--version") == Done(0, f"knife {__version__}\n", "")


def test_presets(run, monkeypatch):
    rows = json.loads(run("presets", "--json").out)
    monkeypatch.setattr(spec, "rows", lambda: rows)
    assert {"name", "kind", "channels", "size", "parameters"} == set(rows[0])
    assert {row["name"] for row in rows} == set(spec.PRESETS)
    table = run("presets")
    assert (table.code, table.err) == (0, "")
    assert "85,606,150" in table.out


def test_plugins_list(run):
    rows = json.loads(run("plugins", "list", "--json").out)
    tasks = {row["task"]: row["status"] for row in rows if "task" in row}
    assert tasks.items() >= {"regress": "ok", "classify": "ok"}.items()
    assert "face_age" in {row["judge"] for row in rows if "judge" in row}
    table = run("plugins", "list").out
    assert "regress" in table
    assert "face_age" in table


def test_plugins_new(run, tmp_path):
    done = run("plugins", "new", "shine")
    assert (done.code, done.lines) == (0, ["knife-shine"])
    assert "pip install -e knife-shine" in done.err
    assert (tmp_path / "knife-shine" / "pyproject.toml").is_file()
    again = run("plugins", "new", "shine")
    assert again.code == 2
    assert "knife-shine: exists already" in again.err


def test_models_list(run, shipped, models, tmp_path):
    shutil.copytree(models / "photo", tmp_path / "models" / "mine")
    (tmp_path / "models" / "mine" / "regress.safetensors").write_bytes(b"damaged")
    done = run("models", "list", "--json")
    rows = json.loads(done.out)
    assert [row["kind"] for row in rows if row["dataset"] == "mine"] == ["classify", "diffusion", "segment"]
    assert sum(row["path"] == "shipped" for row in rows) == 8
    assert "mine/regress.safetensors" in done.err
    table = run("models", "list")
    assert table.code == 0
    assert "models/mine/diffusion.safetensors" in table.out  # whole, however wide


def test_nothing_to_list(run, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "STARTER", tmp_path / "nowhere")
    assert run("models", "list") == Done(0, "", "Nothing to list.\n")


def test_info_of_a_model(run, models):
    path = models / "brain" / "classify.safetensors"
    table = run("info", path)
    assert table.code == 0
    for words in ("class: diseased, healthy", "t1, t1ce, t2, flair", "16 x 16", "linear, T = 50", "sha256"):
        assert words in table.out
    assert "{" not in table.out
    card = json.loads(run("info", path, "--json").out)
    assert card["config"]["classes"] == ["diseased", "healthy"]
    assert card["spec"]["unet"]["width"] == TINY.width


def test_info_of_an_image(run, images):
    assert "NIfTI, float32" in run("info", images / "slice.nii").out
    assert json.loads(run("info", images / "face.png", "--json").out)["channels"] == ["r", "g", "b"]


def test_doctor(run, shipped):
    table, facts = run("doctor"), json.loads(run("doctor", "--json").out)
    assert table.code == 0
    assert facts["healthy"] is True
    for name in ("torch", "device", "ops on cpu", "compiler", "plugins", "write here", "shipped models"):
        assert name in table.out
        assert facts[name]


def test_a_doctor_that_finds_an_illness_says_so_by_its_exit_code(run, monkeypatch):
    monkeypatch.setattr(doctor, "examine", lambda: {"healthy": False})
    assert run("doctor").code == 1


def test_phantom(run, tmp_path):
    done = run("phantom", "data", "--count", 2, "--size", 16)
    assert (done.code, done.out) == (0, "data\n")
    assert done.err == "phantoms 2/2\n"
    assert len(list((tmp_path / "data" / "images").iterdir())) == 2
    assert "data: exists already" in run("phantom", "data").err


# ------------------------------------------------------------------------------------------------------------ importing


@pytest.fixture
def foreign(tmp_path, monkeypatch) -> Path:
    """Write weights in guided-diffusion's layout, of a preset `tiny`."""
    arch = replace(TINY, width=32, groups=32, pool="attention", head_width=32)
    training = {"diffusion": Training(1), "task": Training(1)}
    row = Preset("tiny", (16, 16), 3, arch, arch, arch, training)
    monkeypatch.setitem(spec.PRESETS, "tiny", row)
    net = Card("diffusion", "x", ImageSpec(("r", "g", "b"), (16, 16), arch, arch), Schedule()).build()
    names, ours = foreign_names(net), net.state_dict()
    torch.save({names[k]: v.reshape(foreign_shape(k, v.shape)) for k, v in ours.items()}, tmp_path / "model.pt")
    return tmp_path / "model.pt"


def test_models_import(run, foreign, tmp_path):
    arguments = ("models", "import", foreign, "--preset", "tiny", "--name", "faces", "--value-range", "0,1")
    assert run(*arguments) == Done(0, "models/faces/diffusion.safetensors\n", "")
    card = describe(tmp_path / "models" / "faces" / "diffusion.safetensors").card
    assert (card.dataset, card.spec.value_range) == ("faces", (0.0, 1.0))
    assert "model.pt" in run("info", "models/faces/diffusion.safetensors").out
    again = run(*arguments)
    assert again.code == 2
    assert "models/faces/diffusion.safetensors is there already" in again.err


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # of forks where there are threads
def test_a_model_that_is_being_trained_is_not_imported_over(run, foreign, tmp_path):
    with holder(tmp_path / "models" / "toy" / ".diffusion.lock") as child:
        done = run("models", "import", foreign, "--name", "toy", "--preset", "tiny")
    assert (done.code, done.out) == (4, "")
    assert f"diffusion.safetensors is in use by process {child} on " in done.err
    assert not [*tmp_path.rglob("*.safetensors")]


def test_models_import_without_a_preset(run, foreign, tmp_path):
    done = run("models", "import", foreign, "--name", "faces", "--size", "16", "--head-width", "32")
    assert (done.code, done.lines) == (0, ["models/faces/diffusion.safetensors"])
    assert "assumed: --schedule=linear --value-range=-1,1; " in done.err
    card = describe(tmp_path / "models" / "faces" / "diffusion.safetensors").card
    assert (card.spec.size, card.spec.unet.head_width, card.spec.unet.mult) == ((16, 16), 32, TINY.mult)
    told = run("models", "import", foreign, "--name", "others", "--schedule", "cosine", "--value-range", "0,1")
    assert "assumed: --heads=1 --size=128; " in told.err
    card = describe(tmp_path / "models" / "others" / "diffusion.safetensors").card
    assert (card.schedule, card.spec.value_range) == (Schedule("cosine", 1000), (0.0, 1.0))


def test_models_export_and_import(run, models, tmp_path):
    done = run("models", "export", models / "photo" / "diffusion.safetensors", "--format", "diffusers", "-o", "folder")
    assert done == Done(0, "folder\n", "")
    assert everything(tmp_path / "folder") == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert run("models", "import", "folder", "--name", "back") == Done(0, "models/back/diffusion.safetensors\n", "")
    card = describe(tmp_path / "models" / "back" / "diffusion.safetensors").card
    assert (card.dataset, card.spec.channels) == ("back", ("r", "g", "b"))
    refused = run("models", "import", "folder", "--name", "again", "--preset", "paper-faces")
    assert "--preset paper-faces: a folder of diffusers tells its architecture; leave it out" in refused.err


def test_exports_that_are_refused(run, models, tmp_path):
    model = models / "photo" / "diffusion.safetensors"
    assert "--format onnx: unknown; give diffusers" in run("models", "export", model, "--format", "onnx", "-o", "x").err
    assert "only a U-Net" in run("models", "export", model.with_name("regress.safetensors"), "-o", "x").err
    assert "none.safetensors: no such file" in run("models", "export", "none.safetensors", "-o", "x").err
    assert everything(tmp_path) == []


def test_an_import_says_how_classes_are_asked(run, tmp_path):
    arch = replace(TINY, width=32, groups=32, classes=2)
    net = Card("diffusion", "x", ImageSpec(("r", "g", "b"), (16, 16), arch, arch), Schedule()).build()
    names, ours = foreign_names(net), net.state_dict()
    torch.save({names[k]: v.reshape(foreign_shape(k, v.shape)) for k, v in ours.items()}, tmp_path / "model.pt")
    assert "asked with the mean of its classes" in run("models", "import", "model.pt", "--name", "mean").err
    assert "asked with" not in run("models", "import", "model.pt", "--name", "one", "--class", "1").err
    assert describe(tmp_path / "models" / "one" / "diffusion.safetensors").card.training["class"] == 1


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--name", "../faces", "--name '../faces': not the name of a folder"),
        ("--name", "", "--name '': not the name of a folder"),
        ("--value-range", "0", "--value-range 0: give two numbers"),
        ("--value-range", "a,b", "--value-range a,b: give two numbers"),
        ("--as", "paint", "--as paint: no such kind"),
        ("--preset", "huge", "--preset huge: there is none"),
        ("--size", "16", "--size: --preset tiny says it"),
        ("--heads", "0", "--heads 0: give a number above 0"),
        ("--schedule", "steep", "schedule: 'steep' is unknown"),
        ("--class", "1", "--class 1: there are no classes"),
    ],
)
def test_imports_that_are_refused(run, foreign, tmp_path, option, value, words):
    options = {"--preset": "tiny", "--name": "faces", option: value}
    done = run("models", "import", foreign, *(word for pair in options.items() for word in pair))
    assert done.code == 2
    assert words in done.err
    assert not (tmp_path / "models").exists()


# ------------------------------------------------------------------------------------------------------------ translate


def test_translate_prints_paths_for_scripts_and_words_for_readers(run, images, shipped):
    done = run("translate", images / "slice.nii", images / "healthy.nii", "--task", "regress", "--target", "0.3", *FEW)
    assert done.code == 0
    assert done.lines == ["translated/slice_regress_0.3.nii", "translated/healthy_regress_0.3.nii"]
    assert all(Path(line).is_file() for line in done.lines)
    told = (
        "2 to translate; models brain (shipped with knife); noise level 10, 5 steps by ab2, strength as it takes; cpu"
    )
    assert told in done.err
    assert "value before" in done.err
    assert "translating 20/20" in done.err


@pytest.mark.parametrize(
    ("target", "name"),
    [(("--target", "-"), "less"), (("--target=-",), "less"), (("--target", "+"), "more"), (("--target=0.01",), "0.01")],
)
def test_targets_that_look_like_options(run, images, shipped, target, name):
    done = run("translate", images / "slice.nii", "--task", "regress", *target, *FEW)
    assert (done.code, done.lines) == (0, [f"translated/slice_regress_{name}.nii"])


@pytest.mark.parametrize("target", [("--target", "-0.5"), ("--target=-0.5",)])
def test_a_negative_target_reaches_the_task(run, images, shipped, target):
    done = run("translate", images / "slice.nii", "--task", "regress", *target, *FEW)
    assert done.code == 2
    assert "--target -0.5: outside the values" in done.err


@pytest.mark.parametrize(("task", "target"), [("classify", "healthy"), ("segment", "mask.nii")])
def test_the_other_prescribed_uses(run, images, shipped, tmp_path, task, target):
    shutil.copytree(images, tmp_path / "in")
    os.chdir(tmp_path / "in")
    done = run("translate", "--task", task, "--target", target, "healthy.nii", "-o", "out", *FEW)
    assert (done.code, done.lines) == (0, [f"out/healthy_{task}_{Path(target).stem}.nii"])


def test_json_holds_the_records(run, images, models):
    options = ("--models", models, "--dataset", "brain", "--scale", 2, "--batch-size", 3, "--clamp", "--device", "cpu")
    done = run("translate", images / "slice.nii", "--task", "regress", "--target", "0.3", *FEW, *options, "--json")
    (record,) = json.loads(done.out)
    assert record["settings"] == {
        **record["settings"],
        "scale": 2.0,
        "strength": None,
        "batch_size": 3,
        "clamp": True,
        "steps": 5,
    }
    assert record["folder"] == "translated"
    stored = json.loads(Path("translated/slice_regress_0.3.json").read_text())
    assert {**stored, "folder": "translated"} == record


def test_every_knob_reaches_the_settings_and_defaults_stand_in_one_place(run, images, shipped, monkeypatch):
    seen = []
    monkeypatch.setattr(translation, "translations", lambda *_, settings, **__: seen.append(settings) or [])
    knobs = {
        "noise_level": 7, "quality": "draft", "steps": 9, "solver": "dpm2m", "scale": 2.0, "strength": 0.7,
        "tolerance": 0.01, "batch_size": 3, "max_reconstruction": 0.2, "precision": "bfloat16", "dtype": "float32",
    }  # fmt: skip
    switches = {"extrapolate": "--allow-extrapolation", "clamp": "--clamp", "control": "--no-control"}
    assert {*knobs, *switches, "auto_region"} == {field.name for field in fields(Settings)}
    command = ("translate", images / "slice.nii", "--task", "regress", "--target", "0.3")
    run(*command)
    for name, value in knobs.items():
        run(*command, f"--{name.replace('_', '-')}", value)
    for switch in switches.values():
        run(*command, switch)
    wanted = [*knobs.items(), *((name, not getattr(DEFAULTS, name)) for name in switches)]
    assert seen == [DEFAULTS, *(replace(DEFAULTS, **{name: value}) for name, value in wanted)]


def test_formats_that_are_not_read_are_told(run, images, shipped, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    shutil.copy(images / "slice.nii", folder)
    for name in ("b.HEIC", "c.gif", "notes.txt"):
        (folder / name).touch()
    done = run("translate", folder, "--task", "regress", "--target", "0.3", *FEW)
    assert done.code == 0
    assert "left out b.HEIC and 1 more: knife does not read such formats; save them as PNG" in done.err


def test_a_folder_and_a_case_of_four_files(run, images, shipped):
    done = run("translate", images / "case", "--task", "regress", "--target", "0.3", *FEW)
    assert done.lines == ["translated/case_regress_0.3"]
    assert len(list(Path("translated/case_regress_0.3").iterdir())) == 4


def test_masks_in_a_folder_are_left_out_and_named(run, images, shipped, tmp_path):
    for name in ("slice.nii", "mask.nii"):
        shutil.copy(images / name, tmp_path / name)
    done = run("translate", ".", "--task", "regress", "--target", "0.3", *FEW)
    assert (done.code, done.lines) == (0, ["translated/slice_regress_0.3.nii"])
    assert "left out mask.nii: a mask by its name" in done.err


def test_a_long_path_is_printed_whole(run, images, shipped, tmp_path):
    name = "a_rather_long_name_" * 6
    shutil.copy(images / "slice.nii", tmp_path / f"{name}.nii")
    done = run("translate", f"{name}.nii", "--task", "regress", "--target", "0.3", *FEW, "-o", "x" * 80)
    assert done.lines == [f"{'x' * 80}/{name}_regress_0.3.nii"]


def test_names_are_shown_literally_and_command_no_terminal(run, images, shipped, tmp_path):
    for name in ("[red]x", "[bold]y[red]", "z\x1b[31m\x07"):
        shutil.copy(images / "slice.nii", tmp_path / f"{name}.nii")
        done = run("translate", f"{name}.nii", "--task", "regress", "--target", "0.3", *FEW)
        assert done.code == 0
        assert "\x1b" not in done.out + done.err
        assert name.replace("\x1b", "\\x1b").replace("\x07", "\\x07") + ".nii" in done.err  # in the table
        missing = run("info", f"gone{name}.nii")
        assert missing.code == 2
        assert "\x1b" not in missing.err
        assert "gone" + name.replace("\x1b", "\\x1b").replace("\x07", "\\x07") in missing.err


# ----------------------------------------------------------------------------------------------------------------- demo


def test_demo_leaves_what_the_readme_uses(run, shipped, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "run_demo", partial(demo.run_demo, settings=Settings(10, steps=2)))
    done = run("demo")
    assert (done.code, done.lines) == (0, ["demo/demo.png"])
    for file in ("slice.nii", "healthy.nii", "mask.nii"):
        assert (tmp_path / file).is_file()
    names = ["slice_regress_0.3", "slice_regress_0.02", "slice_classify_healthy", "healthy_segment_mask"]
    assert all((tmp_path / "demo" / f"{name}.nii").is_file() for name in names)
    assert "translating 16/16" in done.err
    for word in ("grown", "shrunk", "removed", "inserted"):
        assert word in done.err
    with PIL.Image.open(tmp_path / "demo" / "demo.png") as picture:
        assert picture.width > 6 * 64 * 3
        assert (np.asarray(picture) == (255, 64, 64)).all(2).any()  # the mask
    assert read("healthy.nii").pixels.shape == (4, 64, 64)
    first = (tmp_path / "slice.nii").read_bytes()
    assert run("demo").code == 0  # a second time too
    assert (tmp_path / "slice.nii").read_bytes() == first


def test_demo_leaves_other_files_alone(run, shipped, tmp_path):
    (tmp_path / "mask.nii").write_text("mine")
    done = run("demo")
    assert done.code == 2
    assert "mask.nii: is there already, and not the demonstration's; give another --folder" in done.err
    assert everything(tmp_path) == ["mask.nii"]
    assert (tmp_path / "mask.nii").read_text() == "mine"


def test_the_shipped_models_do_the_demonstration(tmp_path):
    rows, picture = demo.run_demo(tmp_path, settings=Settings(noise_level=100, steps=2))
    assert [row["tumour"] for row in rows] == ["grown", "shrunk", "removed", "inserted"]
    assert picture.is_file()


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.fixture
def bad(images, tmp_path) -> Path:
    """Make a folder of images that cannot be used, beside good ones."""
    folder = Path(shutil.copytree(images, tmp_path / "in"))
    write_nifti(folder / "nan.nii", np.full((4, 32, 32), np.nan, np.float32))
    write_nifti(folder / "flat.nii", np.ones((4, 32, 32), np.float32))
    write_nifti(folder / "two.nii", phantom(0, size=32).pixels[:2])
    PIL.Image.fromarray(np.eye(16, dtype=np.uint8) * 255).save(folder / "small.png")
    (folder / "torn.nii").write_bytes((folder / "slice.nii").read_bytes()[:999])
    (folder / "torn.png").write_bytes((folder / "face.png").read_bytes()[:99])
    (folder / "empty").mkdir()
    for name in "ab":
        (folder / "above" / name).mkdir(parents=True)
        shutil.copy(folder / "face.png", folder / "above" / name)
    return folder


@pytest.mark.parametrize("text", ["0", "1,x", "-1", "1,,2"])
def test_mask_labels_are_whole_numbers_from_1_on(run, tmp_path, text):
    done = run("train", "segment", "--data", tmp_path, "--mask-labels", text)
    assert done.code == 2
    assert f"--mask-labels {text}: give whole numbers from 1 on" in done.err


@pytest.mark.parametrize(
    ("image", "options", "culprit"),
    [
        ("missing.nii", {}, "missing.nii: no such file"),
        ("missing", {}, "missing: no such file; check the name"),
        ("above", {}, r"above: no images in this folder; there are some in in/above/a and 1 more: give these folders"),
        ("two.nii", {}, r"two.nii: 2 channels, but the shipped model brain was trained on 4 \(t1, t1ce, t2, flair\)"),
        ("torn.nii", {}, "torn.nii: ends after"),
        ("torn.png", {}, "torn.png: cannot be read as a picture"),
        ("nan.nii", {}, "nan.nii: 4096 voxels are NaN"),
        ("flat.nii", {}, "flat.nii: every pixel is 1, 1, 1, 1; a constant image"),
        ("empty", {}, "empty: no images in this folder"),
        ("slice.nii", {"--task": "segment", "--target": "in/small.png"}, "small.png: the mask is 16 x 16, but"),
        ("slice.nii", {"--task": "segment", "--target": "gone.nii"}, "gone.nii: no such file"),
        ("slice.nii", {"--task": "paint"}, "task paint: no plugin offers it; choose from classify, regress, segment"),
        ("slice.nii", {"--target": "big"}, "--target big: not a number"),
        ("slice.nii", {"--target": "nan"}, "--target nan: "),
        ("slice.nii", {"--models": "nowhere"}, "--models nowhere: no such folder"),
        ("slice.nii", {"--dataset": "cats"}, "under the name cats; run `knife train diffusion`"),
        ("slice.nii", {"--device": "cuda:9"}, "--device cuda:9: not there"),
        ("slice.nii", {"--device": "abacus"}, "--device abacus: unknown"),
        ("slice.nii", {"--noise-level": "0"}, "--noise-level 0: "),
        ("slice.nii", {"--steps": "99999"}, "--steps 99999: "),
        ("slice.nii", {"--scale": "2", "--strength": "1"}, "--scale and --strength: "),
        ("slice.nii", {"-o": "in/slice.nii"}, "-o in/slice.nii: "),
        ("slice.nii", {"--slice": "1", "--slices": "1:3"}, "--slices and --slice: "),
        ("slice.nii", {"--by": "+15%"}, "--by: stands for the --target"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2_and_writes_nothing(
    run, bad, shipped, tmp_path, image, options, culprit
):
    before = everything(tmp_path)
    given = {"--task": "regress", "--target": "0.3", "--noise-level": "10", "--steps": "5", **options}
    done = run("translate", Path("in") / image, *(word for pair in given.items() for word in pair))
    assert (done.code, done.out) == (2, "")
    assert re.search(culprit, done.err)
    assert done.err.startswith("knife: ")
    assert done.err.count("\n") == 1
    assert done.err.endswith(".\n")
    assert everything(tmp_path) == before


def test_one_bad_image_in_a_folder_does_not_stop_the_others(run, images, shipped, tmp_path):
    shutil.copytree(images, tmp_path / "in")
    (tmp_path / "in" / "torn.nii").write_bytes((images / "slice.nii").read_bytes()[:999])
    for name in ("face.png", "mask.nii"):
        (tmp_path / "in" / name).unlink()
    done = run("translate", "in", "--task", "regress", "--target", "0.3", *FEW)
    assert done.code == 3
    assert "1 failed:" in done.err
    assert re.search("in/torn.nii: .*copy it anew", done.err)
    assert len(done.out.splitlines()) == 3
    assert all(Path(line).exists() for line in done.out.splitlines())


def test_the_same_command_again_does_what_is_missing(run, images, shipped, tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(5):
        shutil.copy(images / "slice.nii", tmp_path / "in" / f"{i}.nii")
    (tmp_path / "in" / "3.nii").write_bytes(b"torn")
    command = ("translate", "in", "--task", "regress", "--target", "0.3", *FEW, "--batch-size", "2", "--report")
    first = run(*command)
    assert (first.code, len(first.lines)) == (3, 5)
    assert "done already" not in first.err
    shutil.copy(images / "slice.nii", tmp_path / "in" / "3.nii")
    second = run(*command)
    assert (second.code, len(second.lines)) == (0, 6)
    assert "4 of 5 were done already and lie there as written; to redo one, remove its record." in second.err
    assert "translating 1" in second.err  # the steps of one image and no more
    assert second.lines == [*(f"translated/{i}_regress_0.3.nii" for i in range(5)), "translated/report.html"]
    assert all(f"{i}.nii" in Path("translated/report.html").read_text() for i in range(5))


def test_shards_share_the_work(run, images, shipped, monkeypatch):
    command = ("translate", images / "slice.nii", images / "healthy.nii", "--task", "regress", "--target", "0.3", *FEW)
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "3")
    done = run(*command, "--report")
    assert done.lines == ["translated/healthy_regress_0.3.nii", "translated/report_2_of_3.html"]
    assert "shard 2/3 (SLURM job array): 1 to translate; models brain" in done.err
    done = run(*command, "--shard", "1/2")
    assert done.lines == ["translated/slice_regress_0.3.nii"]
    assert "shard 1/2 (--shard): 1 to translate" in done.err
    done = run(*command, "--shard", "3/3")
    assert (done.code, done.out) == (0, "")
    assert "Nothing to do: there are fewer inputs than shards." in done.err
    assert len(run(*command, "--shard", "1/1").lines) == 2
    done = run(*command, "--shard", "4/3")
    assert (done.code, done.err) == (2, "knife: --shard 4/3: give which of how many parts, from 1 on, such as 2/8.\n")


def test_ctrl_c_says_what_is_kept(run, images, shipped, monkeypatch):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("knife.translation.run", stop)
    done = run("translate", images / "slice.nii", "--task", "regress", "--target", "0.3", *FEW)
    assert done.code == 130
    assert "knife: stopped. What was written stays; the same command goes on" in done.err


def test_without_any_models_the_next_step_is_said(run, images, monkeypatch, tmp_path):
    monkeypatch.setattr(pairs, "STARTER", tmp_path / "nowhere")
    done = run("translate", images / "slice.nii", "--task", "regress", "--target", "0.3")
    assert done.code == 2
    assert (
        "task regress: no trained models in models; run `knife train diffusion` and `knife train regress`" in done.err
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train", "diffusion", "--data", "nowhere"), "--data nowhere: no such folder"),
        (("train", "paint", "--data", "."), "task paint: no plugin offers it"),
        (("train", "diffusion", "--data", ".", "--preset", "huge"), "--preset huge: there is none"),
        (("train", "diffusion", "--data", ".", "--device", "cuda:7"), "--device cuda:7: not there"),
        (("train", "diffusion", "--data", ".", "--steps", "0"), "--steps 0: give 1"),
        (("train", "diffusion", "--data", "."), "--data .: no images in there"),
        (("train", "diffusion", "--data", ".", "--judge"), "--judge: a diffusion model tells nothing of an image"),
        (("train", "regress", "--data", ".", "--judge", "--spare-judge"), "--judge and --spare-judge: a judge learns"),
        (("info", "nowhere.nii"), "nowhere.nii: no such file"),
        (("info", "nowhere.safetensors"), "nowhere.safetensors: no such file"),
        (("phantom", "out", "--count", "0"), "count is 0"),
        (("plugins", "new", "No Name"), "NAME 'No Name': give lowercase"),
        (
            ("sweep", "x.nii", "--task", "regress", "--targets", "0.1", "--noise-levels", "20,high"),
            "--noise-levels 20,high: give whole numbers",
        ),
    ],
)
def test_other_commands_refuse_in_one_sentence_too(run, tmp_path, arguments, words):
    done = run(*arguments)
    assert (done.code, done.out) == (2, "")
    assert words in done.err
    assert done.err.count("\n") == 1
    assert everything(tmp_path) == []


@pytest.mark.parametrize(
    ("tasks", "targets", "by", "weights", "windows", "words"),
    [
        (["a", "b"], [], "1", [], [], "--by: stands for the --target of a single --task"),
        (["a", "b"], ["1"], None, [], [], "--target: 1 for 2 --task"),
        (["a", "b"], ["1", "2"], None, [1.0], [], "--weight: 1 for 2 --task"),
        (["a", "b", "c"], ["1", "2", "3"], None, [], ["0:1", "0:2"], "--window: 2 for 3 --task"),
        (["a"], ["1"], None, [], ["high"], "--window high: give two noise levels"),
    ],
)
def test_tasks_that_cannot_be_matched_are_refused(tasks, targets, by, weights, windows, words):
    with pytest.raises(SettingsError) as refusal:
        translating.wishes(tasks, targets, by, weights, windows)
    assert words in str(refusal.value)


def test_each_task_gets_its_target_weight_and_window():
    assert translating.wishes(["a"], [], "+15%", [], []) == [Wish("a", "by:+15%", 1.0, None)]
    wanted = [Wish("a", "1", 0.5, (5, 40)), Wish("b", "2", 2.0, (5, 40))]
    assert translating.wishes(["a", "b"], ["1", "2"], None, [0.5, 2.0], ["5:40"]) == wanted
    wanted = [Wish("a", "1", 1.0, (5, 40)), Wish("b", "2", 1.0, (0, 9))]
    assert translating.wishes(["a", "b"], ["1", "2"], None, [], ["5:40", "0:9"]) == wanted


def test_debug_shows_where_a_refusal_came_from(run):
    done = run("--debug", "info", "nowhere.nii")
    assert done.code == 2
    assert "Traceback" in done.err
    assert done.err.splitlines()[-1] == "knife: nowhere.nii: no such file; check the name."
    assert "Traceback" not in run("info", "nowhere.nii").err


def test_a_bug_is_one_sentence_and_exit_code_1(run, monkeypatch, tmp_path):
    def broken(path):
        try:
            int("Doe, Jane")
        except ValueError:
            raise ZeroDivisionError("a bug\nof two lines in Jane's scan") from None

    monkeypatch.setattr(doctor, "about_file", broken)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    done = run("info", "Jane.nii", "--json")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("knife: internal error, ZeroDivisionError: a bug\\nof two lines in Jane's scan; --")
    (report,) = re.findall(r"shows where; (.*) holds what a report needs", done.err)
    assert done.err.count("\n") == 1
    text = Path(report).read_text()
    assert text.startswith(f"knife {__version__}, python ")
    assert f"torch {version('torch')}" in text
    assert "command: info\nbuiltins.ZeroDivisionError\n" in text
    assert "tests/test_cli.py:" in text
    assert not any(word in text for word in ("Jane", "a bug", str(tmp_path.parent)))
    assert "in broken" in run("info", "x.nii", "--debug").err


def test_without_room_for_a_report_the_bug_is_told_all_the_same(run, monkeypatch, tmp_path):
    def broken(path):
        raise KeyError("x")

    monkeypatch.setattr(doctor, "about_file", broken)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    assert run("info", "x.nii").err == "knife: internal error, KeyError: 'x'; --debug shows where.\n"


CODES = {  # of every error that may reach the command line: what the README says
    InputError("a."): 2, TargetError("a."): 2, TaskError("a."): 2, ModelError("a."): 2, SettingsError("a."): 2,
    UnreadableError("a."): 4, DiskError("a."): 4, LockedError("a."): 4, SamplingError("a."): 6,
    DivergedError("a."): 6, OpsError("a."): 2,
    DeviceError("a."): 2, MemoryShortError("a."): 5, OSError(28, "No space left on device", "x"): 4,
    PermissionError(13, "Permission denied", "x"): 4, MemoryError(): 5, torch.OutOfMemoryError("CUDA"): 5,
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"): 5, RuntimeError("other"): 1,
}  # fmt: skip


@pytest.mark.parametrize("error", CODES, ids=repr)
def test_every_error_has_its_exit_code_and_one_line(run, monkeypatch, tmp_path, error):
    def broken(path):
        raise error

    monkeypatch.setattr(doctor, "about_file", broken)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    done = run("info", "x.nii")
    assert (done.code, done.out) == (CODES[error], "")
    assert done.err.count("\n") == 1
    assert "Traceback" not in done.err


def test_every_kind_of_error_is_in_the_table():
    kinds = [KnifeError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    assert set(kinds) - {type(error) for error in CODES} == {KnifeError, ApartError}


@pytest.mark.parametrize(
    "arguments",
    [
        ("translate", "slice.nii", "--task", "regress", "--target", "0.3", "-o", "out"),
        ("evaluate", "brain", "--data", ".", "--task", "regress", "--targets", "0.3", "-o", "out"),
        ("demo", "--folder", "out"),
        ("calibrate", "brain", "--data", "."),
    ],
    ids=lambda arguments: arguments[0],
)
def test_results_that_cannot_be_written_are_exit_code_4_and_no_folder_is_2(
    run, images, shipped, models, monkeypatch, tmp_path, arguments
):
    shutil.copy(images / "slice.nii", tmp_path)
    shutil.copytree(models, tmp_path / "models")
    with monkeypatch.context() as patch:
        patch.setattr(knife.files.os, "access", lambda path, mode: not mode & os.W_OK)
        done = run(*arguments)
    assert (done.code, done.out, done.err.count("\n")) == (4, "", 1)
    if "out" in arguments:
        (tmp_path / "out").write_text("a file")
        assert run(*arguments).code == 2
        assert (tmp_path / "out").read_text() == "a file"


def test_the_readme_tells_the_exit_codes():
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    told = {
        int(code) for row in re.findall(r"^\| ([\d, ]+) \| .* \|$", readme, re.MULTILINE) for code in row.split(",")
    }
    assert told == {0, 3, 130, 143, *CODES.values()}


@pytest.mark.parametrize("arguments", [("translate",), ("info",), ("nothing",), ("presets", "--steps", "2")])
def test_wrong_usage_is_exit_code_2(run, arguments):
    done = run(*arguments)
    assert done.code == 2
    assert "Error: " in done.err


# ------------------------------------------------------------------------------------------------------------- printing


def test_images_that_a_model_hardly_knows_are_doubted_by_the_worst(capsys):
    records = [{"input": [f"{i}.nii"], "reconstruction": error} for i, error in enumerate((0.02, 0.04, 0.5))]
    translating.say_doubts(records)
    words = " ".join(capsys.readouterr().err.split())
    assert "gives back 2.nii with a mean error of 50.0% of the range (2 of 3 images above 3%)" in words
    translating.say_doubts([{"input": ["x.nii"]}, *records[:1]])
    assert capsys.readouterr() == ("", "")


def test_targets_that_were_missed_are_named_and_many_are_counted(capsys):
    missed = {
        "input": ["a.nii"], "slice": 7, "reached": False, "error": {"regress": 0.05, "segment": 0.001, "other": 9.0},
        "tolerance": {"regress": 0.01, "segment": 0.1}, "attempts": [{"strength": 0.1}, {"strength": 0.2}],
    }  # fmt: skip
    reached = {"input": ["b.nii"], "reached": True}
    translating.say_missed([missed, reached, {"input": ["c.nii"]}])
    assert capsys.readouterr().err == (
        "Not reached: a.nii, slice 7: regress 0.05 off, 0.01 allowed (strengths tried: 0.1, 0.2).\n"
    )
    plain = {name: value for name, value in missed.items() if name not in ("slice", "attempts")}
    translating.say_missed([plain] * 6 + [reached])
    lines = capsys.readouterr().err.splitlines()
    assert lines[:5] == ["Not reached: a.nii: regress 0.05 off, 0.01 allowed."] * 5
    assert lines[5:] == ["Not reached: 6 of 7 images in all; their records say by how much."]


def test_progress_without_a_terminal_is_few_lines(capsys, monkeypatch):
    now = iter(range(0, 10_000))
    monkeypatch.setattr(terminal.time, "monotonic", lambda: float(next(now)))
    show = terminal.plain_progress()
    for step in range(1, 101):
        show("step", step, 100, f"loss {step / 100:.2f}")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 20
    assert lines[:2] == ["step 5/100, loss 0.05, 2 min left", "step 10/100, loss 0.10, 2 min left"]
    assert lines[-1] == "step 100/100, loss 1.00"


def test_progress_on_a_terminal_is_bars(monkeypatch):
    screen = io.StringIO()
    console = terminal.Console(file=screen, force_terminal=True, width=100)
    monkeypatch.setattr(terminal, "words", console)
    with terminal.progress() as show:
        show("reading", 5, 10)
        show("reading", 10, 10)
        show("step", 3, 4, "loss 0.1")
    for words in ("reading", "10/10", "step", "3/4", "loss 0.1"):
        assert words in screen.getvalue()


def test_a_table_on_a_terminal_folds_and_cuts_nothing():
    screen, name = io.StringIO(), "a_long_name_" * 9
    console = terminal.Console(file=screen, force_terminal=True, width=60, color_system=None)
    terminal.show_table([{"input": name, "value": 0.123456, "size": 1234567, "ok": True}], console)
    shown = [line.split("│")[1].strip() for line in screen.getvalue().splitlines() if line.startswith("│")]
    assert "".join(shown) == name
    for words in ("0.1235", "1,234,567", "yes"):
        assert words in screen.getvalue()


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (5399, "90 min"), (5400, "1.5 h"), (86400, "24.0 h")],
)
def test_durations(seconds, words):
    assert terminal.duration(seconds) == words


def test_an_interrupted_command_ends_by_130_without_a_word(run, monkeypatch):
    def interrupt(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "about_file", interrupt)
    assert run("info", "x.nii") == Done(130, "", "")


def test_ctrl_c_while_the_program_is_loaded_leaves_no_traceback():
    early = (
        "import builtins, runpy\n"
        "load = builtins.__import__\n"
        "def interrupted(name, *others, **named):\n"
        "    if name == 'typer': raise KeyboardInterrupt\n"
        "    return load(name, *others, **named)\n"
        "builtins.__import__ = interrupted\n"
        "runpy.run_module('knife', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", early], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_the_package_is_a_program_too():
    done = subprocess.run([sys.executable, "-m", "knife", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"knife {__version__}\n")


def test_what_a_terminal_would_obey_is_escaped():
    assert terminal.plain("a\x1b[31mb\nc\u202e\udcffé") == "a\\x1b[31mb\\nc\\u202e\\udcffé"


@pytest.mark.parametrize(
    "error", [BrokenPipeError(32, "Broken pipe"), OSError(28, "No space left"), ValueError("closed")]
)
def test_what_nobody_can_hear_ends_nothing(monkeypatch, error):
    class Gone(io.StringIO):
        def write(self, text):
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(terminal.words, "quiet", False)
        patch.setattr(sys, "stderr", Gone())
        for _ in range(2):
            terminal.say("step 1")


def test_a_recorded_command_tells_no_places():
    arguments = ["train", "--data", "/home/me/data", "--models=/mnt/models", "--dataset", "x y", "rel/path"]
    assert command_line(arguments) == "knife train --data data --models=models --dataset 'x y' rel/path"


# ------------------------------------------------------------------------------------------------------------- training


TINY_KNIFE = """
from knife import spec
from knife.cli import main
from knife.unet import Architecture
tiny, training = Architecture(8, (1, 2), res_blocks=1, groups=4, pool="mean"), spec.Training(10, 4)
spec.PRESETS["tiny"] = spec.Preset("tiny", (16, 16), None, tiny, tiny, tiny, {"diffusion": training, "task": training})
main()
"""


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "phantoms"
    write_dataset(folder, 8, size=16)
    return folder


@contextmanager
def training(folder: Path, data: Path, kind: str, *options: str) -> Iterator[subprocess.Popen[str]]:
    """Run a training of a network so small that its steps take milliseconds."""
    command = [sys.executable, "-c", TINY_KNIFE, "train", kind, "--data", str(data), "--preset", "tiny", *options]
    pipe, environment = subprocess.PIPE, {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(process: subprocess.Popen[str], start: str) -> str:
    """Read stderr until a line begins so."""
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith(start):
            return line
    raise AssertionError(f"no line began with {start!r}")


def test_a_signal_saves_and_the_same_command_resumes(tmp_path, data):
    reached = 0
    for number in (signal.SIGINT, signal.SIGTERM):
        with training(tmp_path, data, "regress", "--steps", "1000000") as process:
            budget = wait_for(process, "8 images (manifest")
            time.sleep(1)
            process.send_signal(number)
            out, err = process.communicate(timeout=120)
        assert "; learning size 0 to 0." in budget
        assert f"; steps {reached} to 1000000, " in budget
        said = re.search(r"knife: stopped after step (\d+); saved. The same command resumes.\n$", err)
        assert said, err
        assert (process.returncode, out) == (128 + number, "")
        assert int(said[1]) > reached
        reached = int(said[1])
        card = describe(tmp_path / "models" / "phantoms" / "regress.safetensors").card
        assert card.training["step"] == reached
        assert "knife train regress --data phantoms --preset tiny" in card.training["command"]
        assert str(data.parent) not in json.dumps(card.to_json())
    with training(tmp_path, data, "regress", "--steps", "1000000", "--lr", "1") as process:
        out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, "")
    assert "lr: 0.0001 then, 1.0 now" in err
    assert "Traceback" not in err


def test_a_plugin_cannot_keep_a_signal_to_itself(run, monkeypatch):
    handlers = {}

    def app():
        with pytest.raises(KeyboardInterrupt):  # and no SystemExit, which would count as the hook's own
            handlers[signal.SIGTERM](signal.SIGTERM, None)
        sys.exit(130)  # as typer does

    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    monkeypatch.setattr(cli, "app", app)
    assert run("translate").code == 143


def test_a_training_that_ends_prints_its_model(run, data, monkeypatch):
    row = Preset("tiny", (16, 16), None, TINY, TINY, TINY, {"diffusion": Training(3, 4), "task": Training(3, 4)})
    monkeypatch.setitem(spec.PRESETS, "tiny", row)
    done = run("train", "diffusion", "--data", data, "--preset", "tiny", "--dataset", "toy", "--device", "cpu")
    assert (done.code, done.out) == (0, "models/toy/diffusion.safetensors\n")
    assert "parameters; steps 0 to 3, " in done.err
    assert "; cpu: as asked for." in done.err
    assert "step 3/3, loss " in done.err


def test_a_judge_is_trained_and_listed_beside_its_guide(run, data, monkeypatch):
    row = Preset("tiny", (16, 16), None, TINY, TINY, TINY, {"diffusion": Training(1, 4), "task": Training(1, 4)})
    monkeypatch.setitem(spec.PRESETS, "tiny", row)
    command = ("train", "regress", "--data", data, "--preset", "tiny", "--dataset", "toy", "--device", "cpu")
    said = {option: run(*command, *option).err for option in ((), ("--judge",))}
    assert "8 images (manifest" in said[()]
    assert re.search(r"[1-7] images of the judge's half \(manifest", said["--judge",])
    rows = json.loads(run("models", "list", "--json").out)
    assert [(row["kind"], row["judge"]) for row in rows if row["dataset"] == "toy"] == [
        ("regress", True), ("regress", False),
    ]  # fmt: skip


def test_a_signal_while_images_are_read_ends_it(run, data, monkeypatch):
    view = TrainingView(terminal.plain_progress(), 10, "cpu", [signal.SIGTERM])
    monkeypatch.setattr(knife.train, "train", lambda run, watch, stop: view.loading(1, 8))
    assert run("train", "diffusion", "--data", data).code == 143
