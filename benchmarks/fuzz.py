"""Damaged files by the thousand: whatever a reader is given, it reads it or refuses it in its own words.

    python benchmarks/fuzz.py [--seconds 20] [--only nifti,checkpoint] [--seed 0] [--keep FOLDER]

Of every kind of file that knife reads, small valid ones are made; each input is one of them with a few changes: bits,
bytes, numbers at their limits, blocks cut out or doubled, other values in headers and JSON, with checksums set right as
often as not, since a wrong one would hide what lies behind it. Each kind runs in a process of its own with 512 MiB to
spare, so that one that crashes or hangs is told by its name; `--keep` keeps what found something.

Prints a table (inputs, how many were refused and read, other exceptions, the slowest in seconds, the largest in MiB of
memory) and, last, one JSON line. The exit code is 1 if an input met anything but a refusal in knife's own words.
"""

import argparse
import gzip
import io
import json
import logging
import platform
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import nibabel
import numpy as np
import PIL.Image
import torch
from safetensors.torch import load as deserialise

from knife import checkpoint, dicom, diffusers, image, interop, layouts, masks, volume
from knife.checkpoint import Card
from knife.errors import KnifeError
from knife.schedule import Schedule
from knife.spec import ImageSpec
from knife.unet import Architecture, UNet

SPARE = 512 * 2**20  # bytes that a process may take beyond what it begins with
SLOW = 1  # second of its own work that no input may take longer than
PATIENCE = 10  # seconds after which an input counts as one that hangs
NUMBERS = (0, 1, 2, 7, 8, 127, 128, 255, 256, 32767, 32768, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)
VALUES = (
    None, True, 0, -1, 1, 3, 2.5, 1e300, -1e-300, 2**31, 2**63, 10**30, float("nan"), float("inf"), "", "x", "../x",
    "/etc/passwd", "\0", "\x1b[31m", "\ud800", "9" * 5000, [], [[]], {}, {"x": {}}, [1, 2, 3], [None] * 50,
)  # fmt: skip
AFFINE = np.array([[-2, 0.1, 0, 9], [0, 3, 0.2, 7], [0, -0.1, 4, 5], [0, 0, 0, 1]])
TINY = Architecture(32, (1,), res_blocks=1, pool="mean")


@dataclass(frozen=True)
class Target:
    """One kind of file: valid ones, what may be done to them, and what reads them."""

    seeds: dict[str, bytes]  # by the name that the file must have
    read: Callable[[Path], object]
    change: "tuple[Change, ...]"


Change = Callable[[bytes, random.Random], bytes]


@dataclass
class Tally:
    """What became of the inputs of one kind."""

    inputs: int = 0
    refused: int = 0
    read: int = 0
    other: int = 0
    slowest: float = 0.0
    largest: float = 0.0  # MiB
    found: list[str] = field(default_factory=list)


# ------------------------------------------------------------------------------------------------------------- changes


def damaged(data: bytes, chance: random.Random) -> bytes:
    """Change a few bytes, mostly near the beginning, where headers are."""
    raw = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        if not raw:
            break
        at = chance.randrange(min(len(raw), chance.choice((16, 400, len(raw)))))
        match chance.randrange(6):
            case 0:
                raw[at] ^= 1 << chance.randrange(8)
            case 1:
                raw[at] = chance.randrange(256)
            case 2:
                del raw[at : at + chance.choice((1, 4, 100))]
            case 3:
                raw[at:at] = raw[at : at + chance.choice((1, 4, 100))]
            case 4:
                form = chance.choice(("<H", ">H", "<I", ">I", "<Q", ">Q", "<f", ">f"))
                raw[at : at + struct.calcsize(form)] = packed(form, chance)
            case 5:
                del raw[at:]
    return bytes(raw)


def packed(form: str, chance: random.Random) -> bytes:
    """Return a number at a limit, as a file holds it."""
    if form.endswith("f"):
        return struct.pack(form, chance.choice((0.0, -1.0, 1e30, 1e-40, float("nan"), float("inf"))))
    return struct.pack(form, chance.choice(NUMBERS) % 256 ** struct.calcsize(form))


def zipped(change: Change) -> Change:
    """Make a change of what a gzip stream holds, with a right checksum."""
    return lambda data, chance: gzip.compress(change(gzip.decompress(data), chance), 1, mtime=0)


def chunked(data: bytes, chance: random.Random) -> bytes:
    """Change one chunk of a PNG, with a right checksum."""
    chunks, at = [], 8
    while at < len(data):
        size = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
        at += size + 12
    which = chance.randrange(len(chunks))
    name, content = chunks[which]
    if name == b"IDAT" and chance.random() < 0.7:
        content = zlib.compress(damaged(zlib.decompress(content), chance))
    else:
        content = damaged(content, chance)
    chunks[which] = (name, content)
    if chance.random() < 0.1:
        chunks.append(chance.choice(chunks))
    return data[:8] + b"".join(
        struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks
    )


def archived(data: bytes, chance: random.Random) -> bytes:
    """Change one member of a zip archive, with a right checksum."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        names = old.namelist()
        which = chance.choice([name for name in names if name.endswith(".pkl")] * 5 + names)
        for name in names:
            content, dated = old.read(name), zipfile.ZipInfo(name)  # not the present time: same seed, same bytes
            new.writestr(dated, damaged(content, chance) if name == which else content)
    return out.getvalue()


def spliced(data: bytes, chance: random.Random) -> bytes:
    """Put another value into a text, JSON or a table."""
    try:
        return json.dumps(other_value(json.loads(data), chance)).encode()
    except ValueError:
        parts = data.split(chance.choice((b",", b"\t", b"\n", b";")))
        parts[chance.randrange(len(parts))] = str(chance.choice(VALUES)).encode(errors="surrogatepass")
        return chance.choice((b",", b"\t", b"\n", b";")).join(parts)


def other_value(value: Any, chance: random.Random) -> Any:
    """Return a value of JSON in which one part is another, missing, or deep."""
    if isinstance(value, dict | list) and value and chance.random() < 0.9:
        key = chance.choice([*value]) if isinstance(value, dict) else chance.randrange(len(value))
        copy = dict(value) if isinstance(value, dict) else list(value)
        if chance.random() < 0.1:
            del copy[key]
        else:
            copy[key] = other_value(value[key], chance)
        return copy
    return chance.choice((*VALUES, value, [value], {"a": value}))


def described(data: bytes, chance: random.Random) -> bytes:
    """Change the header of a safetensors file, or the description in it, whose length is set right."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    about = header.get("__metadata__", {})
    if "knife" in about and chance.random() < 0.8:  # a wrong hash would hide what the card says
        card = other_value(json.loads(about["knife"]), chance)
        sealed = {"sha256": checkpoint.seal(card, deserialise(data))} if isinstance(card, dict) else {}
        about["knife"] = json.dumps({**card, **sealed} if sealed else card)
    elif about and chance.random() < 0.8:
        name = chance.choice([*about])
        about[name] = spliced(about[name].encode(), chance).decode(errors="replace")
    else:
        header = other_value(header, chance)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


# --------------------------------------------------------------------------------------------------------- valid files


def targets(folder: Path) -> dict[str, Target]:
    """Return every kind of file; `folder` is where those of them are made that are made as files."""
    return {
        "nifti": Target(nifti_seeds(folder, (12, 9, 1)), image.read, (damaged, zipped(damaged))),
        "volume": Target(nifti_seeds(folder, (12, 9, 14)), volume.open_volume, (damaged, zipped(damaged))),
        "mask": Target(nifti_seeds(folder, (12, 9, 14)), mask_reader(folder), (damaged, zipped(damaged))),
        "picture": Target(picture_seeds(), image.read, (damaged, chunked)),
        "table": Target(table_seeds(), read_folder, (damaged, spliced)),
        "checkpoint": Target(checkpoint_seeds(folder), read_model, (damaged, described)),
        "foreign": Target(foreign_seeds(folder), read_foreign, (damaged, archived)),
        "diffusers": Target(diffusers_seeds(folder), read_diffusers(folder), (damaged, spliced, described)),
        **dicom_target(folder),
    }


def nifti_seeds(folder: Path, shape: tuple[int, ...]) -> dict[str, bytes]:
    """Return NIfTI files of both versions, plain and compressed, of whole numbers and of fractions."""
    voxels, seeds = np.random.default_rng(0).integers(0, 900, shape), {}
    kinds = {"one": nibabel.Nifti1Image, "two": nibabel.Nifti2Image}
    for name, kind in kinds.items():
        for suffix, dtype in ((".nii", np.int16), (".nii.gz", np.float32)):
            nibabel.save(kind(voxels.astype(dtype), AFFINE), folder / f"{name}{suffix}")
            seeds[f"{name}{suffix}"] = (folder / f"{name}{suffix}").read_bytes()
    return seeds


def picture_seeds() -> dict[str, bytes]:
    """Return pictures of every format, and PNG and TIFF of several modes."""
    colours = np.random.default_rng(0).integers(0, 256, (9, 8, 3), np.uint8)
    rgb = PIL.Image.fromarray(colours)
    deep = PIL.Image.fromarray(colours[..., 0].astype(np.uint16) * 200)
    exif = PIL.Image.Exif()
    exif[274], exif[270] = 6, "canary"
    pictures = {
        "rgb.png": (rgb, {"exif": exif, "dpi": (72, 72)}), "palette.png": (rgb.convert("P"), {"transparency": 3}),
        "deep.png": (deep, {}), "alpha.png": (rgb.convert("RGBA"), {}), "x.jpg": (rgb, {"exif": exif}),
        "x.tif": (rgb, {"compression": "tiff_lzw"}), "plain.tif": (rgb, {}), "deep.tif": (deep, {}),
        "float.tif": (rgb.convert("F"), {}), "x.webp": (rgb, {"exif": exif}), "x.bmp": (rgb, {}),
    }  # fmt: skip
    seeds = {}
    for name, (picture, options) in pictures.items():
        out = io.BytesIO()
        picture.save(out, format=image.FORMATS[Path(name).suffix], **options)
        seeds[name] = out.getvalue()
    return seeds


def table_seeds() -> dict[str, bytes]:
    """Return what people write into data folders: manifests and lists."""
    lines = [{"image": "a.png", "group": "p1", "split": "train", "age": 3}, {"image": ["b.png"], "mask": None}]
    return {
        "manifest.csv": b"image,mask,group,split,age\na.png,,p1,train,3\nb.png,b.png,p2,test,4\n",
        "manifest.tsv": b"image\tgroup\tchannels\na.png;b.png\tp1\tx;y\n",
        "manifest.jsonl": "\n".join(map(json.dumps, lines)).encode(),
        "split.json": json.dumps({"by": "image", "train": ["a.png"], "val": [], "test": ["b.png"]}).encode(),
        "dataset.json": json.dumps({"channel_names": {"0": "T1", "1": "T2"}}).encode(),
        "participants.tsv": b"participant_id\tage\tsex\nsub-01\t34\tF\n",
        "list_attr_celeba.csv": b"image_id,Smiling\na.png,1\nb.png,-1\n",
    }


def read_folder(path: Path) -> object:
    """Open the data folder that a table lies in."""
    beside = {
        "dataset.json": ("imagesTr/x_0000.nii", "imagesTr/x_0001.nii"),
        "participants.tsv": ("sub-01/anat/sub-01_T1w.nii",),
    }
    for name in beside.get(path.name, ("a.png", "b.png")):
        (path.parent / name).parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("L", (4, 4)).save(path.parent / name, format="PNG")
    return layouts.open_folder(path.parent).split("train")


def mask_reader(folder: Path) -> Callable[[Path], object]:
    """Return a reader of masks as targets of one image."""
    of = folder / "of.nii"
    nibabel.save(nibabel.Nifti1Image(np.arange(108, dtype=np.float32).reshape(12, 9, 1), AFFINE), of)
    shown = image.read(of)
    return lambda path: masks.read_target_mask(str(path), shown)


def card_of(kind: str, **config: object) -> Card:
    """Return the card of a tiny network."""
    return Card(kind, "fuzz", ImageSpec(("grey",), (8, 8), TINY, TINY), Schedule("linear", 50), config)


def checkpoint_seeds(folder: Path) -> dict[str, bytes]:
    """Return stored models."""
    size = card_of("regress", label="size", low=0.0, high=1.0, mean=0.5, std=0.2)
    seeds = {}
    for card in (card_of("diffusion"), size, card_of("classify", label="x", classes=["a", "b"])):
        path = folder / "stored.safetensors"
        checkpoint.save(path, card.build().state_dict(), card.to_json())
        seeds[f"{card.kind}.safetensors"] = path.read_bytes()
    return seeds


def read_model(path: Path) -> object:
    """Load a stored model."""
    return checkpoint.load_model(path)


def foreign_seeds(folder: Path) -> dict[str, bytes]:
    """Return weights as guided-diffusion stores them."""
    net, state = UNet(TINY, 1, 2), dict[str, torch.Tensor]()
    for ours, theirs in interop.foreign_names(net).items():
        tensor = net.state_dict()[ours]
        state[theirs] = tensor.reshape(interop.foreign_shape(ours, tensor.shape))
    torch.save(state, folder / "model.pt")
    return {"model.pt": (folder / "model.pt").read_bytes()}


def read_foreign(path: Path) -> object:
    """Import weights of guided-diffusion."""
    return interop.import_guided_diffusion(path, "diffusion", "fuzz", replace(interop.NOTHING, size=(8, 8)))


def diffusers_seeds(folder: Path) -> dict[str, bytes]:
    """Return both files of a folder of diffusers."""
    card = card_of("diffusion")
    checkpoint.save(folder / "d.safetensors", card.build().state_dict(), card.to_json())
    diffusers.export_diffusers(folder / "d.safetensors", folder / "exported")
    with torch.device("meta"):
        torch.nn.Embedding(1, 1)  # imports half of torch at the first time
    return {name: (folder / "exported" / name).read_bytes() for name in (diffusers.CONFIG, diffusers.WEIGHTS)}


def read_diffusers(folder: Path) -> Callable[[Path], object]:
    """Return a reader of a folder of diffusers of which one file is the one given."""

    def read(path: Path) -> object:
        for good in (folder / "exported").iterdir():
            if not (path.parent / good.name).exists():
                shutil.copy(good, path.parent)
        return diffusers.import_diffusers(path.parent, "diffusion", "fuzz")

    return read


def dicom_target(folder: Path) -> dict[str, Target]:
    """Return DICOM slices, one of which is changed, if pydicom is installed."""
    try:
        from pydicom.dataset import FileDataset, FileMetaDataset
        from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage
    except ImportError:
        return {}
    made = folder / "series"
    made.mkdir(exist_ok=True)
    for k in range(3):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, MRImageStorage
        meta.MediaStorageSOPInstanceUID = f"1.2.3.{k}"
        one = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        one.SOPClassUID, one.SOPInstanceUID, one.SeriesInstanceUID = MRImageStorage, f"1.2.3.{k}", "1.2.3"
        one.Rows, one.Columns, one.SamplesPerPixel, one.PhotometricInterpretation = 6, 5, 1, "MONOCHROME2"
        one.BitsAllocated, one.BitsStored, one.HighBit, one.PixelRepresentation = 16, 16, 15, 0
        one.PixelSpacing, one.ImageOrientationPatient = [1.0, 1.0], [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
        one.ImagePositionPatient = [0.0, 0.0, 2.0 * k]
        one.PixelData = np.random.default_rng(k).integers(0, 900, (6, 5), np.uint16).tobytes()
        one.save_as(made / f"{k}.dcm", enforce_file_format=True)

    def read(path: Path) -> object:
        for good in made.iterdir():
            if not (path.parent / good.name).exists():
                shutil.copy(good, path.parent)
        return dicom.open_series(path.parent)

    return {"dicom": Target({"1.dcm": (made / "1.dcm").read_bytes()}, read, (damaged,))}


# ------------------------------------------------------------------------------------------------------------- running


class Hung(BaseException):
    """An input took longer than PATIENCE."""


def fuzz(target: Target, folder: Path, enough: Callable[[Tally], bool], seed: int, keep: Path | None = None) -> Tally:
    """Read changed files until it is enough; `keep` is where those go that found something."""
    tally, chance = Tally(), random.Random(seed)
    for name, data in target.seeds.items():
        said, refused = outcome(target, placed(folder, name, data), tally), tally.refused
        tally.found += [said or f"{name}: refused, though it is as it should be"] if said or refused else []
    tally.slowest = tally.largest = 0.0  # the first of a kind wait for libraries
    while not enough(tally):
        name = chance.choice([*target.seeds])
        path = placed(folder, name, changed(target, target.seeds[name], chance))
        if said := outcome(target, path, tally):
            tally.found.append(said)
            if keep:
                keep.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, keep / f"{tally.inputs}_{name}")
    return tally


def changed(target: Target, data: bytes, chance: random.Random) -> bytes:
    """Change a valid file; a change that suits another kind of file changes bytes instead."""
    try:
        return chance.choice(target.change)(data, chance)
    except (ValueError, OSError, KeyError, AttributeError, zlib.error, zipfile.BadZipFile, UnicodeError):
        return damaged(data, chance)


def placed(folder: Path, name: str, data: bytes) -> Path:
    """Put a file into an empty folder."""
    place = folder / "input"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    (place / name).write_bytes(data)
    return place / name


def outcome(target: Target, path: Path, tally: Tally) -> str:
    """Read one file and count what became of it; return what is wrong about that, or nothing."""
    tally.inputs += 1
    before, began = resident("VmRSS", reset=True), time.process_time()
    said = attempted(target, path, tally)
    seconds = time.process_time() - began
    tally.slowest = max(tally.slowest, seconds)
    tally.largest = max(tally.largest, (resident("VmHWM") - before) / 2**20)
    return said or (f"{path.name}: took {seconds:.1f} s" if seconds > SLOW else "")


def attempted(target: Target, path: Path, tally: Tally) -> str:
    """Read one file; return what is wrong about how that ended, or nothing."""
    try:
        with patience():
            target.read(path)
        tally.read += 1
    except KnifeError as error:
        tally.refused += 1
        return "" if sentence(str(error)) else f"{path.name}: refused without a sentence: {str(error)[:200]!r}"
    except (Exception, Hung) as error:
        tally.other += 1
        return f"{path.name}: {type(error).__name__}: {str(error)[:200]}"
    return ""


def sentence(text: str) -> bool:
    """Tell whether a refusal is a sentence."""
    return len(text.split()) >= 4 and text.endswith(".")


@contextmanager
def patience() -> Iterator[None]:
    """Raise Hung if something takes too long."""

    def give_up(number: int, frame: FrameType | None) -> None:
        raise Hung(f"longer than {PATIENCE} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def resident(which: str, reset: bool = False) -> int:
    """Return the bytes of memory that this process holds (VmRSS), or the most since the last reset (VmHWM)."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{which}:"))
    except OSError:  # not Linux
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def spare(extra: int) -> None:
    """Let this process take so many more bytes of memory, and no more."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + extra, resource.RLIM_INFINITY))


# ------------------------------------------------------------------------------------------------------------ printing


def options_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each kind of file")
    parser.add_argument("--only", help="kinds of files, with commas between")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the inputs that found something")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def child(options: argparse.Namespace) -> None:
    """Try one kind of file, and print what became of it as JSON."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable()
    with tempfile.TemporaryDirectory() as name:
        target = targets(Path(name))[options.only]
        spare(SPARE)
        end = time.monotonic() + options.seconds
        print(json.dumps(vars(fuzz(target, Path(name), lambda _: time.monotonic() > end, options.seed, options.keep))))


def asked(kind: str, options: argparse.Namespace) -> Tally:
    """Try one kind of file in a process of its own."""
    words = [f"--only={kind}", f"--seconds={options.seconds}", f"--seed={options.seed}", "--child"]
    words += [f"--keep={options.keep}"] if options.keep else []
    try:
        limit = options.seconds * 2 + 120
        command = [sys.executable, __file__, *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return Tally(other=1, found=["the process hangs"])
    try:
        return Tally(**json.loads(done.stdout.splitlines()[-1]))
    except (ValueError, IndexError, TypeError):
        return Tally(other=1, found=[f"the process ended by {done.returncode}: {done.stderr[-300:]}"])


def main() -> int:
    """Try every kind of file and print."""
    options = options_of()
    if options.child:
        child(options)
        return 0
    with tempfile.TemporaryDirectory() as name:
        kinds = options.only.split(",") if options.only else [*targets(Path(name))]
    columns = ("inputs", "refused", "read", "other", "slowest", "largest")
    print(f"{'':<12}" + "".join(f"{column:>10}" for column in columns), flush=True)
    tallies = dict[str, Tally]()
    for kind in kinds:
        tally = tallies[kind] = asked(kind, options)
        values = [getattr(tally, column) for column in columns]
        print(f"{kind:<12}" + "".join(f"{v:10.3g}" if isinstance(v, float) else f"{v:10}" for v in values), flush=True)
        for found in dict.fromkeys(tally.found):
            print(f"    {found!a}")
    found = sum(len(tally.found) for tally in tallies.values())
    inputs = sum(tally.inputs for tally in tallies.values())
    about = {
        "seconds": options.seconds,
        "seed": options.seed,
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    kept = {kind: vars(tally) for kind, tally in tallies.items()}
    print(json.dumps({"benchmark": "fuzz", **about, "inputs": inputs, "found": found, "kinds": kept}))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
