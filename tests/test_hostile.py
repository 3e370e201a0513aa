"""Files and names made to do harm: whatever they hold, they are read or refused in knife's own words, and quickly."""

import gzip
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import PIL.Image
import pydicom
import pytest
from conftest import Run
from pydicom.uid import DeflatedExplicitVRLittleEndian, RLELossless
from test_dicom import voxels, write_series
from test_image import header_png
from trees import picture, slice_

from knife import checkpoint, dicom, diffusers, image, interop, layouts, masks, survey, translation, volume
from knife.checkpoint import Card
from knife.errors import DiskError, KnifeError
from knife.outputs import destinations
from knife.schedule import Schedule
from knife.settings import Settings, Wish
from knife.spec import ImageSpec
from knife.unet import Architecture

Read = Callable[[Path], object]
TINY = Architecture(8, (1,), res_blocks=1, groups=4, pool="mean")
CARD = Card("diffusion", "x", ImageSpec(("grey",), (8, 8), TINY, TINY), Schedule("linear", 50))


def mask(path: Path) -> object:
    return masks.read_target_mask(str(path), image.read(slice_(path.parent / "of_mask.nii")))


def foreign(path: Path) -> object:
    return interop.import_guided_diffusion(path, "diffusion", "x")


def folder(path: Path) -> object:
    return layouts.open_folder(path.parent)


def refusal(read: Read, path: Path) -> str:
    """Return the sentence that refuses a file; anything but a refusal is a failure."""
    with pytest.raises(KnifeError) as caught:
        read(path)
    assert len(str(caught.value).split()) >= 4
    assert len(str(caught.value)) < 2000 + 2 * len(str(path))
    return str(caught.value)


# --------------------------------------------------------------------------------------------------------------- bombs

# Each takes an empty folder and returns a small file that would unfold to a large one, or says that it is large.


def flat_png(at: Path) -> Path:
    data = zlib.compress(bytes((1 + 3 * 8190) * 8190), 1)
    parts = header_png(8190, 8190, 8, 2).split(b"IDAT")
    head, tail = parts[0][:-4], b"\0\0\0\0IEND\xaeB`\x82"
    chunk = b"IDAT" + data
    sealed = len(data).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    (at / "flat.png").write_bytes(head + sealed + tail)
    return at / "flat.png"


def text_png(at: Path) -> Path:
    small = io.BytesIO()
    PIL.Image.new("L", (4, 4)).save(small, format="PNG")
    chunk = b"zTXtComment\0\0" + zlib.compress(bytes(2**26), 1)
    sealed = (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    (at / "text.png").write_bytes(small.getvalue()[:33] + sealed + small.getvalue()[33:])
    return at / "text.png"


def profile_png(at: Path) -> Path:
    small = io.BytesIO()
    PIL.Image.new("L", (4, 4)).save(small, format="PNG")
    chunk = b"iCCPx\0\0" + zlib.compress(bytes(2**26), 1)
    sealed = (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    (at / "profile.png").write_bytes(small.getvalue()[:33] + sealed + small.getvalue()[33:])
    return at / "profile.png"


def large_tiff(at: Path) -> Path:
    PIL.Image.new("L", (8000, 8000)).save(at / "large.tif", compression="tiff_deflate")
    data = (at / "large.tif").read_bytes()
    wide = (8000).to_bytes(2, "little")
    (at / "large.tif").write_bytes(data.replace(wide, (60000).to_bytes(2, "little")))
    return at / "large.tif"


def nifti_bomb(at: Path, shape: tuple[int, ...], name: str, surplus: int = 0) -> Path:
    header = nibabel.Nifti1Header()
    header.set_data_shape(shape)
    header.set_data_dtype(np.float32)
    header["vox_offset"], header["magic"] = 352, b"n+1"
    header.set_sform(np.eye(4), 1)
    much = gzip.compress(bytes(2**24), 1)  # several streams in a row are one
    (at / name).write_bytes(gzip.compress(bytes(header.binaryblock) + bytes(4)) + much * (surplus // 2**24))
    return at / name


def deflated_zip(at: Path) -> Path:
    with zipfile.ZipFile(at / "model.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/data.pkl", bytes(2**27))
    return at / "model.pt"


def deflated_dicom(at: Path) -> Path:
    series = write_series(at / "deflated", voxels()[:2])
    one = pydicom.dcmread(next(series.iterdir()))
    one.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    one.add_new(0x00091001, "OB", bytes(2**26))
    path = next(series.iterdir())
    one.save_as(path, enforce_file_format=True)
    assert path.stat().st_size < 2**20
    return series


def large_dicom(at: Path) -> Path:
    series = write_series(at / "large", voxels()[:2])
    path = next(series.iterdir())
    one = pydicom.dcmread(path)
    one.file_meta.TransferSyntaxUID = RLELossless
    one.Rows = one.Columns = 65535
    one.PixelData = pydicom.encaps.encapsulate([(1).to_bytes(4, "little") + (64).to_bytes(4, "little") + bytes(56)])
    one["PixelData"].VR = "OB"
    one.save_as(path)
    return series


def endless_table(at: Path) -> Path:
    (at / "manifest.csv").write_text("image\n")
    os.truncate(at / "manifest.csv", 2**33)  # a hole, which takes no room
    return at / "manifest.csv"


def wide_card(at: Path) -> Path:
    """Store a network of a few weights whose card, with a right hash, tells of thirty thousand million."""
    about = CARD.to_json()
    about["spec"]["unet"]["width"], about["spec"]["unet"]["mult"] = 16384, [1, 1, 1]
    about["spec"]["size"] = [8, 8]
    checkpoint.save(at / "wide.safetensors", CARD.build().state_dict(), about)
    return at / "wide.safetensors"


def long_header(at: Path) -> Path:
    (at / "header.safetensors").write_bytes((2**33).to_bytes(8, "little") + b"{" + b" " * 100)
    os.truncate(at / "header.safetensors", 2**33 + 8)
    return at / "header.safetensors"


BOMBS: dict[str, tuple[Callable[[Path], Path], Read]] = {
    "a picture that is all one colour": (flat_png, image.read),
    "a picture with a long text": (text_png, image.read),
    "a picture with a long profile": (profile_png, image.read),
    "a picture that says it is larger": (large_tiff, image.read),
    "a slice that says it is large": (lambda at: nifti_bomb(at, (30000, 30000, 1, 7), "a.nii.gz"), image.read),
    "a slice with more behind it": (lambda at: nifti_bomb(at, (8, 8, 1), "b.nii.gz", 2**28), image.read),
    "a volume that says it is large": (lambda at: nifti_bomb(at, (3000, 3000, 3000), "c.nii.gz"), volume.open_volume),
    "a volume that is large": (lambda at: nifti_bomb(at, (512, 512, 512), "d.nii.gz", 2**29), volume.open_volume),
    "a mask that is large": (lambda at: nifti_bomb(at, (512, 512, 512), "e.nii.gz", 2**29), mask),
    "an archive that unfolds": (deflated_zip, foreign),
    "a DICOM file that unfolds": (deflated_dicom, dicom.open_series),
    "a DICOM file that says it is large": (large_dicom, dicom.open_series),
    "a list without end": (endless_table, folder),
    "a network that is wide": (wide_card, checkpoint.load_model),
    "a long header": (long_header, checkpoint.load_model),
}


def explode(at: Path) -> None:
    """Read every bomb within 512 MiB more than there is, and print how each was refused."""
    import resource

    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    for what, (_, read) in BOMBS.items():
        path = Path((at / what / "path").read_text())
        resource.setrlimit(resource.RLIMIT_AS, (taken + 2**29, resource.RLIM_INFINITY))
        try:
            read(path)
            print(f"{what}: was read")
        except KnifeError as error:
            print(f"{what}: refused: {error}")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the limit is set by what Linux tells")
def test_bombs_are_refused_in_little_memory(tmp_path: Path) -> None:
    for what, (make, _) in BOMBS.items():
        (tmp_path / what).mkdir()
        (tmp_path / what / "path").write_text(str(make(tmp_path / what)))
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_hostile; from pathlib import Path"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; test_hostile.explode(Path({str(tmp_path)!r}))"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    told = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert told.keys() == BOMBS.keys()
    assert {what: said for what, said in told.items() if not said.startswith("refused: ")} == {}


# --------------------------------------------------------------------------------------------------- what is no file

PLACES: dict[str, Read] = {  # files that knife looks for by name, each with what reads it
    "manifest.csv": folder,
    "manifest.jsonl": folder,
    "split.json": folder,
    "dataset.json": folder,
    "participants.tsv": folder,
    "list_attr_celeba.txt": folder,
    "model.safetensors": checkpoint.load_model,
    "model.pt": foreign,
    "config.json": lambda path: diffusers.import_diffusers(path.parent, "diffusion", "x"),
    "x.nii.gz": mask,
    "x.dcm": dicom.read_slice,
    "scan_t1.nii": volume.open_volume,
}

KINDS = ("fifo", "device", "loop", "folder")


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_is_never_waited_for(tmp_path: Path, name: str, kind: str) -> None:
    picture(tmp_path / "a.png")
    slice_(tmp_path / "sub-01" / "anat" / "sub-01_T1w.nii")
    path = tmp_path / name
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "loop":
            path.symlink_to(name)
        case "folder":
            path.mkdir()
    passed_over = (name, kind) in {  # as if it were not there
        *((name, "loop") for name in ("manifest.csv", "manifest.jsonl", "split.json", "participants.tsv")),
        *((name, kind) for name in ("dataset.json", "list_attr_celeba.txt") for kind in KINDS),
    }
    if passed_over:
        PLACES[name](path)
    else:
        refusal(PLACES[name], path)


@pytest.mark.parametrize("name", ["dataset.json", "split.json", "manifest.jsonl", "config.json"])
def test_json_of_any_depth_is_refused(tmp_path: Path, name: str) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / name).write_text("[" * 200_000)
    if name == "dataset.json":  # of another program, for all knife knows
        assert layouts.open_folder(tmp_path).layout == "flat"
    else:
        refusal(PLACES[name], tmp_path / name)


# ------------------------------------------------------------------------------------------------------------ traversal

OUTSIDE = (
    "../secret.png", "../../secret.png", "x/../../secret.png", "./../secret.png", "a.png/../../secret.png", "..",
    "/etc/passwd", "//etc/passwd", "/proc/self/environ", "/dev/stdin", "/", "~/../../../../etc/passwd",
    "link.png", "links/secret.png", "links/../../secret.png", "circle/a.png", "\0", "a.png\0", "..\0/secret.png",
    "x" * 300, "x/" * 3000, "\ud800.png", "%2e%2e/secret.png", "..\\secret.png", "file:///etc/passwd",
)  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE, ids=lambda name: ascii(name[:20]))
@pytest.mark.parametrize("column", ["image", "mask"])
def test_a_manifest_reaches_nothing_outside_its_folder(tmp_path: Path, name: str, column: str) -> None:
    root = tmp_path / "data"
    picture(root / "a.png")
    picture(tmp_path / "secret.png")
    (root / "link.png").symlink_to("../secret.png")
    (root / "links").symlink_to("..")
    (root / "circle").symlink_to("circle")
    row = {"image": "a.png", column: name}
    (root / "manifest.jsonl").write_text(json.dumps(row) + "\n")
    said = refusal(folder, root / "manifest.jsonl")
    assert "lies outside the folder" in said or "are not there" in said


# ---------------------------------------------------------------------------------------------------------------- names

NAMES = (
    b"-rf", b"--help", b"-", b"[red]bold[red]", b"[red", b"[link=x]y", b"\x1b]0;own\x07", b"\x1b[2J", b"a\nb",
    b"a\rb", b"a\tb", b"\x7f", b"\xff\xfe", b"\xc3\x28", "\u202egnp".encode(), "\u200b".encode(), b"a b;$(touch x)`y`",
    b"'\"", b"<img src=x onerror=alert(1)>", b"{{7*7}}", b"{0}%s%n", b"..", b"...", b"~", b"#", b"con", b"n" * 240,
)  # fmt: skip


def hostile_folder(root: Path) -> Path:
    """Write a picture under each of the names, one that is damaged, links, a FIFO, and a folder named as a picture."""
    picture(root / "x.png")
    for name in NAMES:
        shutil.copy(root / "x.png", os.fsencode(root) + b"/" + name + b".png")
    picture(root / "[" / "red].png")
    (root / "torn[red]\x1b[31m.png").write_bytes(b"no picture")
    (root / "dangling.png").symlink_to("nowhere\x1b.png")
    (root / "round.png").symlink_to("round.png")
    (root / "circle").symlink_to(".")
    os.mkfifo(root / "pipe.png")
    (root / "folder.png").mkdir()
    (root / "zero.png").touch()
    return root


COMMANDS = (
    ("data", "check", "."), ("data", "check", ".", "--json"), ("data", "split", "."),
    ("models", "list", "--models", "."),
    ("train", "paint", "--data", "."), ("info", "torn[red]\x1b[31m.png"), ("info", "pipe.png"), ("info", "folder.png"),
    ("info", "./-rf.png"), ("info", "--", "-rf.png"), ("info", "a\nb.png"),
    ("models", "import", "pipe.png", "--name", "x"),
    ("translate", ".", "--task", "regress", "--target", "\x1b[31m[red]", "-o", "out"), ("info", "[/red].png", "--json"),
    ("models", "import", "zero.png", "--name", "../x"), ("models", "export", "pipe.png", "-o", "[red]"),
    ("plugins", "new", "[red]\x1b"), ("sweep", "pipe.png", "--task", "regress", "--targets", "\x1b"),
)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: " ".join(words[:2]))
def test_hostile_names_command_no_terminal_and_break_no_command(run, tmp_path: Path, monkeypatch, command) -> None:
    monkeypatch.chdir(hostile_folder(tmp_path / "data"))
    done = run(*command)
    assert done.code in (0, 1, 2, 3), done.err
    assert done.code != 1 or command[:2] == ("data", "check")
    assert "Traceback" not in done.err
    assert "internal error" not in done.err
    assert all(c.isprintable() or c == "\n" for c in done.out + done.err)
    assert not (tmp_path / "x").exists()
    assert not (tmp_path / "data" / "x").exists()


def test_hostile_names_are_surveyed_one_by_one(tmp_path: Path) -> None:
    root = hostile_folder(tmp_path / "data")
    found = survey.survey(root)
    hidden = sum(name.startswith(b".") for name in NAMES)
    assert found["images"] == len(NAMES) - hidden + 7
    unreadable = found["problems"]["unreadable"]
    wanted = ["dangling.png", "pipe.png", "round.png", "torn[red]\\x1b[31m.png", "zero.png"]
    assert [Path(problem.split(": ")[0]).name for problem in unreadable] == wanted


def test_names_that_differ_in_case_alone_have_results_of_their_own(tmp_path: Path) -> None:
    inputs = [(tmp_path / name,) for name in ("x.png", "X.png", "x.tif", "x\x07.png", "x\x08.png")]
    plans = destinations(inputs, [Wish("regress", "0.3")], tmp_path / "out")
    names = [plan.record.name.lower() for plan in plans]
    assert len(set(names)) == len(inputs)
    assert all(name.isprintable() for name in names)


# ----------------------------------------------------------------------------------------------- what changes meanwhile

QUICK = Settings(noise_level=10, steps=2, strength=0.2, batch_size=1, max_reconstruction=9.0)


@pytest.fixture
def several(tmp_path: Path, images: Path) -> Path:
    (tmp_path / "in").mkdir()
    for i in range(4):
        shutil.copy(images / "slice.nii", tmp_path / "in" / f"{i}.nii")
    return tmp_path / "in"


@pytest.mark.parametrize("damage", ["removed", "torn", "a folder"])
def test_an_input_that_is_lost_during_the_job_fails_alone(
    several: Path, models: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    opened, failures = translation.opened, list[str]()

    def losing(files: tuple[Path, ...], **options: object) -> object:
        if files[0].name == "2.nii":
            content = files[0].read_bytes()
            files[0].unlink()
            if damage == "torn":
                files[0].write_bytes(content[:1000])
            elif damage == "a folder":
                files[0].mkdir()
        return opened(files, **options)

    monkeypatch.setattr(translation, "opened", losing)
    wish, out = Wish("regress", "0.3"), several.parent / "out"
    done = translation.translations(
        several, wish, out=out, models=models, settings=QUICK, failed=lambda file, error: failures.append(str(error))
    )
    assert [one.source.source.paths[0].name for one in done] == ["0.nii", "1.nii", "3.nii"]
    (why,) = failures
    assert "2.nii: " in why
    assert not any(path.name.startswith("2_") for path in out.iterdir())


def test_a_folder_of_results_that_goes_during_the_job_is_named_or_made_anew(several: Path, models: Path) -> None:
    out, wish = several.parent / "out", Wish("regress", "0.3")
    done = iter(translation.translations(several, wish, out=out, models=models, settings=QUICK))
    next(done)
    out.rename(several.parent / "elsewhere")  # at once, while results may be on their way
    try:
        for _ in done:
            pass
    except DiskError as error:  # it went while a file was being written
        said = str(error)
    else:
        said = str(out)
    assert str(out) in said
    again = translation.translate(several, wish, out=out, models=models, settings=QUICK)
    assert len(again) == 4
    assert len([path for path in out.iterdir() if path.suffix == ".json"]) == 4
    assert not [path for path in out.iterdir() if path.suffix == ".tmp"]


def test_a_place_that_takes_no_results_is_refused_by_its_name(several: Path, models: Path, run: Run) -> None:
    words = ("--task", "regress", "--target", "0.3", "--models", models, "--noise-level", "10", "--steps", "2")
    (several.parent / "file").write_text("in the way")
    for place in ("/proc/knife", several.parent / "file", several.parent / "file" / "below"):
        done = run("translate", several / "0.nii", *words, "-o", place)
        assert done.code in (2, 4), done.err
        assert f"{place}" in done.err
        assert done.err.splitlines()[-1].startswith("knife: ")
        assert "Traceback" not in done.err


def test_files_get_the_rights_that_the_umask_says(several: Path, models: Path) -> None:
    before = os.umask(0o027)
    try:
        (done,) = translation.translate(
            several / "0.nii", Wish("regress", "0.3"), out=several.parent / "out", models=models, settings=QUICK
        )
    finally:
        os.umask(before)
    assert done.files is not None
    assert {path.stat().st_mode & 0o777 for path in done.files} == {0o640}
