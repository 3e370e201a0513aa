"""What a file tells of a person stays in that file; what knife makes says so; and nothing is sent anywhere."""

import base64
import getpass
import gzip
import io
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import nibabel
import numpy as np
import PIL.Image
import PIL.PngImagePlugin
import pytest
from conftest import TINY, Run
from test_dicom import voxels, write_series

from knife import data, image, spec
from knife.data import Form
from knife.layouts import open_folder
from knife.phantom import phantom, write_dataset
from knife.spec import Preset, Training

CANARY = "Zebrafink"  # no file that knife writes has a reason to hold this word
FEW = ("--noise-level", "10", "--steps", "3", "--strength", "0.2", "--max-reconstruction", "9")
MARKED = b"synthetic: knife"


# ----------------------------------------------------------------------------------------------------------- carriers


def nifti(path: Path, pixels: np.ndarray) -> Path:
    """Write a slice or volume whose header and extensions tell of a person."""
    one = nibabel.Nifti1Image(pixels.astype(np.float32), np.diag([2.0, 2.0, 2.0, 1.0]))
    for field in ("descrip", "aux_file", "db_name", "data_type", "intent_name"):
        one.header[field] = CANARY[: one.header[field].dtype.itemsize].encode()
    for code in (0, 4, 6, 44):
        one.header.extensions.append(nibabel.nifti1.Nifti1Extension(code, f"{CANARY} born 1970".encode()))
    nibabel.save(one, path)
    return path


def pictures(folder: Path) -> list[Path]:
    """Write pictures of every format whose metadata tell of a person."""
    colours = (np.moveaxis(phantom(3, size=32, relative_size=0.1).pixels[:3], 0, 2) * 255).astype(np.uint8)
    picture, exif, text = PIL.Image.fromarray(colours), PIL.Image.Exif(), PIL.PngImagePlugin.PngInfo()
    for tag in (270, 271, 305, 315, 33432, 37510, 42016):
        exif[tag] = CANARY
    exif.get_ifd(0x8825)[29] = CANARY  # where it was taken
    text.add_text("Comment", CANARY)
    text.add_text("Author", CANARY * 9, zip=True)
    text.add_itxt("Title", CANARY, zip=True)
    xmp = f"<x:xmpmeta>{CANARY}</x:xmpmeta>".encode()
    options = {
        "face.png": {"pnginfo": text, "exif": exif}, "face.jpg": {"exif": exif, "comment": CANARY, "xmp": xmp},
        "face.webp": {"exif": exif, "xmp": xmp}, "face.tif": {"exif": exif, "description": CANARY, "artist": CANARY},
        "face.bmp": {},
    }  # fmt: skip
    for name, told in options.items():
        picture.save(folder / name, **told)
    return [folder / name for name in options]


def series(folder: Path) -> Path:
    """Write a DICOM series whose tags tell of a person."""
    data = np.repeat(np.repeat(voxels() + 1, 2, 1), 2, 2)
    told = dict.fromkeys(("PatientName", "PatientID", "InstitutionName", "StudyDescription", "PatientComments"), CANARY)
    return write_series(
        folder, data, **told, PatientBirthDate="19700101", OperatorsName=CANARY, DeviceSerialNumber=CANARY
    )


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder that bears a person's name, as that person, at a machine of that name."""
    place = tmp_path / CANARY / "work"
    place.mkdir(parents=True)
    monkeypatch.chdir(place)
    for name in ("USER", "LOGNAME", "USERNAME", "HOSTNAME", "HOME"):
        monkeypatch.setenv(name, f"/home/{CANARY}" if name == "HOME" else CANARY)
    monkeypatch.setattr(getpass, "getuser", lambda: CANARY)
    monkeypatch.setattr(socket, "gethostname", lambda: CANARY)
    monkeypatch.setattr(platform, "node", lambda: CANARY)
    return place


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(4, 4)
    row = Preset("tiny", (16, 16), None, TINY, TINY, TINY, {"diffusion": training, "task": training})
    monkeypatch.setitem(spec.PRESETS, "tiny", row)


# ----------------------------------------------------------------------------------------------------------- searching


def layers(content: bytes) -> Iterator[bytes]:
    """Yield a file's bytes as they are, and as they are behind every compression and notation that knife writes."""
    yield content
    if content.startswith(b"\x1f\x8b"):
        yield gzip.decompress(content)
    if content.startswith(b"\x89PNG"):
        with PIL.Image.open(io.BytesIO(content)) as opened:
            opened.load()
            yield repr(opened.info).encode()
        for start in re.finditer(rb"(?:IDAT|zTXt\w+\0\0|iCCP[^\0]+\0\0)", content):
            yield zlib.decompressobj().decompress(content[start.end() :])
    for found in re.finditer(rb"base64,([A-Za-z0-9+/=]{40,})", content):
        yield from layers(base64.b64decode(found[1]))
    with suppress(ValueError):
        yield str(json.loads(content)).encode()


def told_of(folder: Path) -> list[str]:
    """Return the files below a folder in which, or in whose name, the person can be found."""
    spelt = [text.encode(code) for text in (CANARY, CANARY.lower()) for code in ("ascii", "utf-16-le")]
    words = [*spelt, base64.b64encode(CANARY.encode())[:10], str(folder.parent.parent).encode()]
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    assert files, "nothing was written"

    def tells(path: Path) -> bool:
        inside = (word in layer for layer in layers(path.read_bytes()) for word in words)
        return CANARY in str(path.relative_to(folder)) or any(inside)

    return [str(path.relative_to(folder)) for path in files if tells(path)]


def test_the_search_finds_what_it_looks_for(tmp_path: Path) -> None:
    place = tmp_path / "a" / "b" / "c"
    place.mkdir(parents=True)
    nifti(place / "x.nii.gz", np.ones((4, 4, 1)))
    names = [path.name for path in pictures(place) if path.name != "face.bmp"]
    (place / "page.html").write_bytes(b"data:image/png;base64," + base64.b64encode((place / "face.png").read_bytes()))
    (place / "escaped.json").write_text(json.dumps({"name": CANARY}).replace("Z", "\\u005a"))
    series(place / "series")
    found = told_of(place)
    assert {*names, "x.nii.gz", "page.html", "escaped.json"} <= set(found)
    assert sum(name.startswith("series") for name in found) == len([*(place / "series").iterdir()])
    assert "face.bmp" not in found


# ------------------------------------------------------------------------------------------------------------ commands


def given(home: Path) -> dict[str, list[object]]:
    """Write the inputs; return the words that translate each kind of them."""
    place = home / "in"
    place.mkdir()
    brain = phantom(5, size=32, relative_size=0.1).pixels
    nifti(place / "slice.nii.gz", np.moveaxis(brain, 0, 2)[:, :, None])
    nifti(place / "volume.nii", np.stack([np.moveaxis(brain * k, 0, 2) for k in (0.8, 0.9, 1.0)] * 4, axis=2))
    (place / "case").mkdir()
    for name, plane in zip(("t1", "t1ce", "t2", "flair"), brain, strict=True):
        nifti(place / "case" / f"p_{name}.nii", plane[:, :, None])
        series(place / "head" / name)
    regress = ["--task", "regress", "--target", "0.3"]
    return {
        "slice": [place / "slice.nii.gz", *regress],
        "volume": [place / "volume.nii", *regress, "--slices", "4:6"],
        "case": [place / "case", *regress, "--report"],
        "dicom": [place / "head", *regress, "--slice", "5"],
        "pictures": [*pictures(place), *regress, "--dataset", "photo", "--report"],
        "mask": [
            place / "slice.nii.gz",
            "--task",
            "segment",
            "--target",
            masked(place / "m.nii"),
            "--region",
            place / "m.nii",
        ],
    }


def masked(path: Path) -> Path:
    mask = np.zeros((32, 32, 1))
    mask[10:20, 10:20] = 1
    return nifti(path, mask)


@pytest.mark.parametrize("kind", ["slice", "volume", "case", "dicom", "pictures", "mask"])
def test_translations_tell_nothing_of_a_person_and_that_they_are_made_up(
    kind: str, home: Path, run: Run, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    dataset = [] if kind == "pictures" else ["--dataset", "brain"]
    done = run("translate", *given(home)[kind], *dataset, *FEW, "--models", models, "-o", home / "out")
    assert done.code == 0, done.err
    assert told_of(home / "out") == []
    for path in (home / "out").rglob("*"):
        if path.is_file() and path.suffix not in (".json", ".csv", ".bmp"):  # a BMP has no room, and a record beside it
            assert any(MARKED in layer or b"not for diagnosis" in layer for layer in layers(path.read_bytes())), (
                path.name
            )
    for record in (home / "out").glob("*.json"):
        assert "not for diagnosis" in json.loads(record.read_text())["synthetic"]
    if kind in ("slice", "volume"):
        made = next(path for path in (home / "out").glob("*.nii*") if "difference" not in path.name)
        assert json.loads(run("info", made, "--json").out)["synthetic"] is True


def test_a_sweep_tells_nothing_of_a_person(home: Path, run: Run, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    words = ("--task", "regress", "--targets", "0.1,0.3", "--noise-levels", "10", "--steps", "2", "--dataset", "brain")
    assert run("sweep", given(home)["slice"][0], *words, "--models", models, "-o", home / "out").code == 0
    assert told_of(home / "out") == []


@pytest.mark.filterwarnings("ignore:.*few")
def test_models_tell_nothing_of_those_who_trained_them(
    home: Path, run: Run, tiny: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    write_dataset(home / "scans", 40, size=16)
    for path in (home / "scans").rglob("*.nii.gz"):
        if "seg" not in path.name:
            nifti(path, nibabel.load(path).get_fdata())
    words = ("--data", home / "scans", "--preset", "tiny", "--models", home / "models", "--dataset", "scans")
    for kind in ("diffusion", "regress"):
        done = run("train", kind, *words, "--steps", "2")
        assert done.code == 0, done.err
    assert run("models", "export", home / "models/scans/diffusion.safetensors", "-o", home / "models/x").code == 0
    assert run("models", "import", home / "models/x", "--name", "again", "--models", home / "models").code == 0
    measured = ("scans", "--data", home / "scans", "--models", home / "models", "--count", "2")
    done = run("calibrate", *measured)
    assert done.code == 0, done.err
    few = ("--targets", "0.1", "--noise-level", "10", "--steps", "2", "-o", home / "models" / "evaluated")
    done = run("evaluate", *measured, "--task", "regress", *few)
    assert done.code == 0, done.err
    assert told_of(home / "models") == []


def test_a_scaffold_tells_nothing_of_who_made_it(home: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    assert run("plugins", "new", "bright", "--folder", home / "out").code == 0
    assert run("phantom", home / "out" / "phantoms", "--count", "2", "--size", "16").code == 0
    assert told_of(home / "out") == []


# ----------------------------------------------------------------------------------------------- what is made is marked


@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz", "x.png", "x.tif", "x.jpg", "x.webp"])
def test_training_leaves_out_what_knife_made_unless_it_is_allowed(tmp_path: Path, name: str) -> None:
    own = tmp_path / f"own{name[1:]}"
    if ".nii" in name:
        nibabel.save(nibabel.Nifti1Image(phantom(1, size=16).pixels[0][:, :, None], np.eye(4)), own)
    else:
        PIL.Image.fromarray((phantom(1, size=16).pixels[0] * 255).astype(np.uint8)).save(own)
    image.write(image.read(own), tmp_path / name)
    entries, form = open_folder(tmp_path).entries, Form(("grey",), (16, 16), (-1.0, 1.0))
    form = form._replace(channels=data.channels_of(entries))
    loaded = data.load(entries, form)
    assert [case.name for case in loaded.cases] == [own.name]
    assert list(loaded.skipped) == [name]
    assert "marked as made by knife" in loaded.skipped[name]
    assert "--allow-synthetic" in loaded.skipped[name]
    assert len(data.load(entries, form._replace(synthetic=True)).cases) == 2


def test_a_training_of_nothing_else_is_refused(home: Path, run: Run, tiny: None) -> None:
    (home / "made").mkdir()
    for i in range(4):
        source = home / f"{i}.png"
        PIL.Image.fromarray((phantom(i, size=16).pixels[0] * 255).astype(np.uint8)).save(source)
        image.write(image.read(source), home / "made" / f"{i}.png")
    words = ("train", "diffusion", "--data", home / "made", "--preset", "tiny", "--models", home / "m", "--steps", "1")
    done = run(*words)
    assert done.code == 2
    assert "marked as made by knife" in done.err
    assert run(*words, "--allow-synthetic").code == 0


def test_info_tells_what_is_made_up(home: Path, run: Run) -> None:
    for number, path in enumerate(pictures(home)):
        made = home / f"made{number}{path.suffix}"
        image.write(image.read(path), made)
        assert json.loads(run("info", path, "--json").out)["synthetic"] is False
        assert json.loads(run("info", made, "--json").out)["synthetic"] is (path.suffix != ".bmp")


# ------------------------------------------------------------------------------------------------------------- network

DENIED = """
import sys

ASKING = ("connect", "sendto", "sendmsg", "getaddrinfo", "gethostbyname", "gethostbyaddr", "getnameinfo", "bind")

def deny(event, arguments):
    local = event == "socket.bind" and arguments[1][0] == "::1"  # as a library finds out whether there is IPv6
    if event.startswith("socket.") and event[7:] in ASKING and not local:
        raise SystemExit(f"a socket was asked for: {event} {arguments}")

sys.addaudithook(deny)
from knife.cli import main
main()
"""


@pytest.fixture
def denied(tmp_path: Path) -> object:
    """Return a function that runs a command in a process that must not reach for the network."""

    def command(*words: object) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        line = [*isolated(), sys.executable, "-c", DENIED, *map(str, words)]
        return subprocess.run(
            line, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
        )

    return command


def isolated() -> list[str]:
    """Return the words that run a command without any network, where that is allowed."""
    unshare = shutil.which("unshare")
    words = [unshare, "-n"] if unshare else []
    allowed = words and subprocess.run([*words, "true"], capture_output=True, check=False).returncode == 0
    return words if allowed else []


def test_no_command_asks_for_the_network(denied, models: Path, images: Path) -> None:
    quick = ("--noise-level", "10", "--steps", "2", "--strength", "0.2")
    words, few = (*quick, "--models", models, "--dataset", "brain"), ("--count", "1", *quick, "--models", models)
    for command in (
        ("translate", images / "slice.nii", "--task", "regress", "--target", "0.3", *words, "--report"),
        ("phantom", "heads", "--count", "16", "--size", "32"),
        ("data", "check", "heads"),
        ("train", "diffusion", "--data", "heads", "--steps", "1", "--batch-size", "1"),
        ("evaluate", "brain", "--data", "heads", "--task", "regress", "--targets", "0.1", "--split", "train", *few),
        ("plugins", "list"),
        ("doctor",),
    ):
        done = denied(*command)
        assert done.returncode == 0, done.stderr
        assert "a socket was" not in done.stderr


def test_a_socket_would_be_seen(tmp_path: Path) -> None:
    code = DENIED.replace(
        "from knife.cli import main\nmain()", "import socket; socket.create_connection(('127.0.0.1', 9))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "a socket was asked for: socket.getaddrinfo" in done.stderr
