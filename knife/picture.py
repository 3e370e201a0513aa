"""Pictures (PNG, JPEG, TIFF, BMP, WebP): bytes to pixels and back, exactly where the format allows it.

Pillow decodes and encodes, but for colours of 16 bits, which it cuts down to their high bytes: those it decodes twice,
once as if the bytes lay in the other order, and they are encoded here.

To add a format: its suffix in FORMATS, its modes in MODES, its options in `save_options`; the test to write is a row of
`PICTURES` in tests/test_image.py.
"""

import io
import math
import struct
import sys
import threading
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import PIL.Image
import PIL.ImageFile
import PIL.ImageOps
import PIL.PngImagePlugin
import PIL.TiffImagePlugin
import torch
from torch import Tensor

from knife.errors import InputError
from knife.files import MARK, shown
from knife.finite import finite

FORMATS = {
    ".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".tif": "TIFF", ".tiff": "TIFF", ".bmp": "BMP", ".webp": "WEBP",
}  # fmt: skip
MODES = {  # what each format can hold
    "PNG": ("L", "LA", "RGB", "RGBA", "I;16", "RGB;16", "RGBA;16"), "BMP": ("L", "RGB"), "WEBP": ("RGB", "RGBA"),
    "TIFF": ("L", "LA", "RGB", "RGBA", "I;16", "RGB;16", "RGBA;16", "F"), "JPEG": ("L", "RGB"),
}  # fmt: skip
CONVERSIONS = {"1": "L", "P": "RGB", "PA": "RGBA", "CMYK": "RGB", "YCbCr": "RGB", "RGBX": "RGB"}
PLAIN = ("L", "LA", "RGB", "RGBA", "I;16", "F")  # what everything is converted to
TOPS = {"L": 255.0, "RGB": 255.0, "I;16": 65535.0, "RGB;16": 65535.0, "F": math.inf}
TYPES = {255.0: np.uint8, 65535.0: np.uint16, math.inf: np.float32}
WITH_ALPHA = {"L": "LA", "RGB": "RGBA", "RGB;16": "RGBA;16"}
OTHER_ORDER = {"L": "B", "B": "L", "N": "L" if sys.byteorder == "big" else "B"}  # of the bytes of a number
MAX_PIXELS = 64 * 2**20
PIXELS_A_BYTE = 8 * 1032  # at most, of a PNG: eight of one bit to a byte, of which deflate packs 1032 into one
_WARNINGS = threading.Lock()  # their filters are one for all threads

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Picture:
    """Describe one picture file.

    mode: L, RGB, I;16 (grey), RGB;16 or F. alpha: plane [H, W] of the same depth. options: resolution, colour profile.
    filled: how many of its pixels were no number and have been filled, see `knife.finite`.
    """

    mode: str
    alpha: Array | None
    options: Mapping[str, Any]
    filled: int = 0

    @property
    def top(self) -> float:
        """Return the largest whole number that a pixel may take, or inf for floats."""
        return TOPS[self.mode]


# ------------------------------------------------------------------------------------------------------------- reading


def decode(file: BinaryIO, path: Path, fill: float | None = None) -> tuple[Picture, Tensor, bool]:
    """Read a picture: what it is, pixels [C, H, W] float32, and whether it says that knife made it.

    fill: what stands for NaN and infinity; None: they are refused.
    """
    opened = opened_picture(file, path)
    deep, synthetic = is_deep(opened, path), says_synthetic(opened)
    picture = upright(opened)
    mode = plain_mode(picture, path)
    profile = opened.info.get("icc_profile") if opened.mode != "CMYK" else None
    array = channels_last(picture if mode in (picture.mode, "I;16") else picture.convert(mode))
    if deep:
        array = array.astype(np.uint16) << 8 | channels_last(upright(low_bytes(file)))
    alpha = array[..., -1].copy() if mode in ("LA", "RGBA") else None
    planes = np.moveaxis(array if alpha is None else array[..., :-1], 2, 0)
    pixels, filled = finite(planes.astype(np.float32, order="C"), path, fill, "pixels")
    kept = {"icc_profile": profile, "dpi": resolution(opened.info.get("dpi"))}
    options = {key: value for key, value in kept.items() if value}
    kind = Picture(mode.removesuffix("A") + (";16" if deep else ""), alpha, options, filled)
    return kind, torch.from_numpy(pixels), synthetic


def opened_picture(file: BinaryIO, path: Path) -> PIL.ImageFile.ImageFile:
    """Open one picture of an allowed format, its size checked before and its checksums before decoding."""
    try:
        opened = reopened(file)
    except PIL.Image.DecompressionBombError as error:
        raise InputError(f"{shown(path)}: more than {MAX_PIXELS} pixels; give a smaller picture.") from error
    except PIL.UnidentifiedImageError as error:
        raise InputError(f"{shown(path)}: not a PNG, JPEG, TIFF, BMP or WebP picture; save it as one.") from error
    if opened.width * opened.height > MAX_PIXELS:
        raise InputError(f"{shown(path)}: {opened.width} x {opened.height} pixels; give at most {MAX_PIXELS}.")
    if opened.format != "MPO" and getattr(opened, "is_animated", False):  # an MPO is a JPEG with a preview behind it
        raise InputError(f"{shown(path)}: holds several pictures; save the one to translate as its own file.")
    if opened.format != "PNG":
        return opened
    size = file.seek(0, io.SEEK_END)
    if opened.width * opened.height > PIXELS_A_BYTE * size:  # pillow would add what is missing
        raise InputError(
            f"{shown(path)}: says {opened.width} x {opened.height} pixels, more than {size} bytes can hold; "
            "it is damaged: give another copy."
        )
    opened.verify()  # decoding alone leaves the checksums uncompared
    return reopened(file)


def reopened(file: BinaryIO) -> PIL.ImageFile.ImageFile:
    """Open a picture of an allowed format from the beginning of its file."""
    file.seek(0)
    with quiet():
        return PIL.Image.open(file, formats=sorted(set(FORMATS.values())))


@contextmanager
def quiet() -> Iterator[None]:
    """Keep pillow's warnings about odd metadata and large pictures from the terminal."""
    with _WARNINGS, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def upright(opened: PIL.Image.Image) -> PIL.Image.Image:
    """Decode a picture and turn it as its EXIF orientation says."""
    if opened.format == "TIFF":
        with quiet():
            opened.load()  # reads metadata too, and warns about it
    opened.load()  # the work, outside the lock
    with quiet():
        return PIL.ImageOps.exif_transpose(opened)


def channels_last(picture: PIL.Image.Image) -> Array:
    """Return a picture's pixels as [H, W, C]."""
    return np.atleast_3d(np.asarray(picture))


def is_deep(opened: PIL.ImageFile.ImageFile, path: Path) -> bool:
    """Tell whether colours have 16 bits each, of which pillow would silently keep 8, before it decodes them.

    Raises InputError if they cannot be kept: grey with transparency, planes apart, inks, premultiplied alpha.
    """
    raw, tags = raw_mode(opened.tile[0][3]) if opened.tile else "", getattr(opened, "tag_v2", {})
    bits = tags.get(258, (8,)) if opened.format == "TIFF" else (16 if ";16" in raw else 8,)
    if opened.mode in ("F", "I", "I;16", "I;16B") or max(bits) <= 8:
        return False
    whole = raw[:-1] in ("RGB;16", "RGBA;16") and tags.get(284, 1) == 1
    if not whole or "transparency" in opened.info:
        raise InputError(f"{shown(path)}: 16 bits a colour would be lost; save it with 8, or as plain RGB or RGBA.")
    return True


def raw_mode(arguments: Any) -> str:
    """Return how pillow's decoder takes the bytes, which is its only argument or the first."""
    return str(arguments if isinstance(arguments, str) else arguments[0] if arguments else "")


def low_bytes(file: BinaryIO) -> PIL.ImageFile.ImageFile:
    """Open a picture of 16-bit colours so that pillow, which keeps the high byte of each, keeps the low one."""
    opened = reopened(file)
    turned = []
    for tile in opened.tile:
        raw = raw_mode(tile[3])
        other = raw[:-1] + OTHER_ORDER[raw[-1]]
        turned.append(tile._replace(args=other if isinstance(tile[3], str) else (other, *cast(Any, tile[3])[1:])))
    opened.tile = turned
    return opened


def plain_mode(picture: PIL.Image.Image, path: Path) -> str:
    """Return the mode to convert to: L, LA, RGB, RGBA, I;16 or F."""
    mode = "I;16" if picture.mode.startswith("I;16") else CONVERSIONS.get(picture.mode, picture.mode)
    if mode in ("L", "RGB") and picture.has_transparency_data:
        mode += "A"
    if mode == "I;16" and picture.has_transparency_data:
        raise InputError(f"{shown(path)}: 16-bit grey with a transparent value; save it without transparency.")
    if mode not in PLAIN:
        raise InputError(f"{shown(path)}: pixels of mode {mode}; save it as grey or RGB of 8 or 16 bits.")
    return mode


def resolution(dpi: Any) -> tuple[float, float] | None:
    """Return the dots per inch if they are two sensible numbers."""
    try:
        x, y = (float(d) for d in dpi)
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    return (x, y) if 1 <= x < 65535 and 1 <= y < 65535 else None


def says_synthetic(opened: PIL.Image.Image) -> bool:
    """Tell whether a comment says that knife made the picture."""
    with quiet():
        texts = [opened.info.get("Comment"), opened.info.get("comment"), opened.getexif().get(270)]
    return any(MARK in (t.decode("latin-1") if isinstance(t, bytes) else str(t)) for t in texts)


# ------------------------------------------------------------------------------------------------------------- writing


def encode(pixels: Tensor, kind: Picture, path: Path, *, suffix: str, synthetic: bool) -> bytes:
    """Return the bytes of a picture, whole numbers rounded and clipped to what its mode holds.

    Raises InputError if the format of `suffix` cannot hold the pixels.
    """
    target = FORMATS.get(suffix)
    if target is None:
        raise InputError(f"{shown(path)}: a picture is written as one of {', '.join(FORMATS)}; name the output so.")
    count, same = len(pixels), len(pixels) == (3 if kind.mode.startswith("RGB") else 1)
    if count not in (1, 3):
        raise InputError(f"{shown(path)}: {count} channels, and a picture has 1 or 3; save them one by one.")
    mode = kind.mode if same else ("RGB" if count == 3 else "L")
    alpha = kind.alpha if same else None
    full = mode if alpha is None else WITH_ALPHA[mode]
    if full not in MODES[target]:
        raise InputError(f"{shown(path)}: {target} cannot hold pixels of mode {full}; name the output .png or .tif.")
    array, top = np.moveaxis(pixels.numpy(), 0, 2), TOPS[mode]
    array = (array if top == math.inf else array.round().clip(0, top)).astype(TYPES[top])
    array = array if alpha is None else np.concatenate([array, alpha[..., None]], axis=2)
    if full in ("RGB;16", "RGBA;16"):
        return (deep_png if target == "PNG" else deep_tiff)(array, kind.options, synthetic)
    out, squeezed = io.BytesIO(), array[..., 0] if array.shape[2] == 1 else array
    picture = PIL.Image.fromarray(np.ascontiguousarray(squeezed))
    picture.save(out, format=target, **save_options(target, synthetic), **kind.options)
    return out.getvalue()


def save_options(target: str, synthetic: bool) -> dict[str, Any]:
    """Return what pillow is told beside the pixels: no loss where the format allows it, and the mark."""
    exact: dict[str, dict[str, Any]] = {
        "JPEG": {"quality": 95, "subsampling": 0},
        "WEBP": {"lossless": True, "exact": True},
    }
    options = exact.get(target, {})
    if synthetic and target == "PNG":
        options["pnginfo"] = PIL.PngImagePlugin.PngInfo()
        options["pnginfo"].add_text("Software", "knife")
        options["pnginfo"].add_text("Comment", MARK)
    elif synthetic and target == "TIFF":
        options |= {"description": MARK, "software": "knife"}
    elif synthetic and target == "JPEG":
        options["comment"] = MARK
    elif synthetic and target == "WEBP":
        options["exif"] = PIL.Image.Exif()
        options["exif"][270] = MARK
    return options


def deep_png(array: Array, options: Mapping[str, Any], synthetic: bool) -> bytes:
    """Return the bytes of a PNG of 16-bit colours, [H, W, 3 or 4] uint16."""
    height, width, bands = array.shape
    rows = np.ascontiguousarray(array, dtype=">u2").view(np.uint8).reshape(height, -1)
    differences = np.diff(rows, axis=0, prepend=np.zeros_like(rows[:1]))  # modulo 256, the filter "up"
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2 if bands == 3 else 6, 0, 0, 0))]
    if "icc_profile" in options:
        chunks.append((b"iCCP", b"ICC profile\0\0" + zlib.compress(options["icc_profile"])))
    if "dpi" in options:
        chunks.append((b"pHYs", struct.pack(">IIB", *(round(d / 0.0254) for d in options["dpi"]), 1)))  # a metre
    if synthetic:
        chunks += [(b"tEXt", b"Software\0knife"), (b"tEXt", b"Comment\0" + MARK.encode())]
    chunks += [(b"IDAT", zlib.compress(np.insert(differences, 0, 2, axis=1).tobytes())), (b"IEND", b"")]
    sealed = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(sealed)


def deep_tiff(array: Array, options: Mapping[str, Any], synthetic: bool) -> bytes:
    """Return the bytes of a TIFF of 16-bit colours, [H, W, 3 or 4] uint16, as one strip without compression."""
    height, width, bands = array.shape
    data = array.astype("<u2").tobytes()
    tags: dict[int, Any] = {
        256: width, 257: height, 258: (16,) * bands, 259: 1, 262: 2, 273: 0, 277: bands, 278: height, 279: len(data),
        284: 1,
    }  # fmt: skip  # size, bits, no compression, RGB, offset (which `save` corrects), bands, rows and bytes, together
    if bands == 4:
        tags[338] = 2  # the alpha is not multiplied into the colours
    if "dpi" in options:
        tags |= {282: options["dpi"][0], 283: options["dpi"][1], 296: 2}  # an inch
    if "icc_profile" in options:
        tags[34675] = options["icc_profile"]
    if synthetic:
        tags |= {270: MARK, 305: "knife"}
    directory, out = PIL.TiffImagePlugin.ImageFileDirectory_v2(), io.BytesIO()
    for tag, value in tags.items():
        directory[tag] = value
    directory.save(out)
    out.write(data)
    return out.getvalue()
