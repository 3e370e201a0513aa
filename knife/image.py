"""Images and the files they came from: read, bring onto a model's grid, add a change, write back.

A model sees `image.normalised(size, value_range)`; what it changed comes back through `image.plus(delta, value_range)`,
which adds to the file's own intensities, so that whatever the model did not change stays bit for bit. Every file is
taken as untrusted: whatever is wrong with it ends in an `InputError` that names it.

Pixels lie as they are looked at: the bytes of files are the business of `knife.nifti` and `knife.picture`.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from knife import nifti, picture
from knife.errors import InputError, SettingsError
from knife.files import MARK, refusing, regular, shown, write_safely
from knife.nifti import NIFTI, Nifti
from knife.picture import FORMATS, Picture

__all__ = [
    "DTYPES", "FORMATS", "MARK", "NIFTI", "SEQUENCES", "SUFFIXES", "Image", "MRSequence", "Nifti", "Picture", "Source",
    "check_dtype", "decoded", "is_image", "joined", "not_constant", "output_name", "read", "read_mask",
    "sequence_files", "sequence_of", "write",
]  # fmt: skip

SUFFIXES = (*NIFTI, *FORMATS)
SEQUENCES = {  # canonical name and order: the words that name it in a file name
    "t1": ("t1", "t1n", "t1w"), "t1ce": ("t1ce", "t1c", "t1gd"), "t2": ("t2", "t2w"), "flair": ("flair", "t2f"),
}  # fmt: skip
MASK_WORDS = ("seg", "segm", "mask", "label", "labels")
DTYPES = ("same", "float32")  # what a NIfTI output's voxels may be stored as
SAME_GRID = 1e-3  # world units by which two files of one slice may differ
PERCENTILES = (0.5, 99.5)  # of a channel's intensities, that span a model's range
FAINT = 0.05  # floats up to 1 are taken as they are, unless none is above this, as in maps of diffusion in mm2/s
TWELVE_BITS = 4095  # the largest value of many a 16-bit picture
PAD_ONLY = 9 / 8  # a NIfTI slice that fills a model's grid up to this factor is padded, not resized


class MRSequence(NamedTuple):
    """What a file name tells: a canonical name, "t1", "t1ce", "t2", "flair" or "seg", and the word it was told by."""

    name: str
    token: str


@dataclass(frozen=True, eq=False)
class Source:
    """Where an image came from, and what its files can hold.

    limits: [C, 2] the values that a changed pixel may take. whole: [C, 1, 1] bool, channels stored as whole numbers.
    kind: one Picture, or one Nifti for each of `paths`. synthetic: the file says that knife made it.
    """

    paths: tuple[Path, ...]
    kind: Picture | tuple[Nifti, ...]
    limits: Tensor
    whole: Tensor
    synthetic: bool

    @property
    def filled(self) -> int:
        """Return how many pixels of the files, of a volume in all its slices, were no number and have been filled."""
        return sum(file.filled for file in ([self.kind] if isinstance(self.kind, Picture) else self.kind))


@dataclass(frozen=True, eq=False)
class Image:
    """Hold one 2-D image in its file's own intensities, and where it came from.

    pixels: [C, H, W] float32, after a NIfTI file's slope and intercept, oriented as displayed.
    window: [C, 2] low and high intensity that map to the ends of a model's value range.
    channels: ("t1", "flair", ...) where file names tell, ("r", "g", "b"), ("grey",), else ("0", "1", ...).
    crop: fill a model's grid and cut off what lies beyond it, instead of padding.
    """

    pixels: Tensor
    window: Tensor
    channels: tuple[str, ...]
    source: Source
    crop: bool = False

    def normalised(self, size: tuple[int, int] | None, value_range: tuple[float, float]) -> Tensor:
        """Return [C, h, w] float32 in `value_range`, clipped to the window, on the grid of `size` (None: its own)."""
        low, high = self.window.double()[:, :, None, None].unbind(1)
        share = ((self.pixels.double() - low) / (high - low)).clamp(0, 1)
        x = (value_range[0] + share * (value_range[1] - value_range[0])).float()
        return x if size is None else self.on_grid(x, size, pad=value_range[0])

    def on_grid(self, x: Tensor, size: tuple[int, int], pad: float = 0.0) -> Tensor:
        """Bring [C, H, W] on the image's grid to [C, h, w] = `size`: resize to fit inside, antialiased, centre, pad.

        Or, with `crop`, resize to fill it, and cut off what is beyond. A NIfTI slice that nearly has the grid's size
        (PAD_ONLY) is padded or cut only, as 240 x 240 to 256 x 256 in the paper.
        """
        top, left, height, width = self._placed(size)
        below, right = size[0] - top - height, size[1] - left - width
        return F.pad(_resized(x, (height, width)), (left, right, top, below), value=pad)  # what is below 0 cuts

    def from_grid(self, x: Tensor) -> Tensor:
        """Bring [C, h, w] on a model's grid back to [C, H, W] on the image's: undo `on_grid`; 0 where it cut off."""
        top, left, height, width = self._placed((x.shape[-2], x.shape[-1]))
        below, right = x.shape[-2] - top - height, x.shape[-1] - left - width
        rows, columns = self.pixels.shape[1:]
        inside = F.pad(torch.ones_like(x[:1]), (-left, -right, -top, -below))
        seen = F.interpolate(inside[None], size=(rows, columns), mode="nearest-exact")[0] > 0
        return _resized(F.pad(x, (-left, -right, -top, -below)), (rows, columns)).masked_fill(~seen, 0)

    def plus(self, delta: Tensor, value_range: tuple[float, float], region: Tensor | None = None) -> "Image":
        """Return the image changed by `delta` [C, h, w], in units of `value_range` on a model's grid.

        region: where it may change, [1, H, W] on the image's grid, 0 or 1; None is anywhere.

        The change is scaled by the window and added to the raw pixels: fine detail and values beyond the window stay.
        Where delta is 0, and in the background, pixels stay bit for bit. Changed pixels are rounded if the file holds
        whole numbers, and clipped to what it can hold.
        """
        gain = (self.window[:, 1].double() - self.window[:, 0]) / (value_range[1] - value_range[0])
        change = self.from_grid(delta.detach().to("cpu", torch.float64)) * gain[:, None, None]
        change = change.masked_fill(self.background, 0)
        change = change if region is None else change.masked_fill(region == 0, 0)
        changed = self.pixels.double() + change
        low, high = self.source.limits[:, :, None, None].unbind(1)
        changed = torch.where(self.source.whole, changed.round(), changed).clamp(low, high)
        return replace(self, pixels=torch.where(change == 0, self.pixels, changed.float()))

    def like(self, pixels: Tensor) -> "Image":
        """Return an image of other pixels [C', H, W] in the same place; with another C', of unnamed channels.

        Raises ValueError if height or width differ.
        """
        if pixels.shape[1:] != self.pixels.shape[1:]:
            raise ValueError(f"pixels are {list(pixels.shape)}, the image is {list(self.pixels.shape)}")
        pixels = pixels.detach().to("cpu", torch.float32)
        if pixels.shape == self.pixels.shape:
            return replace(self, pixels=pixels)
        count = len(pixels)
        limits, whole = torch.tensor([[-torch.inf, torch.inf]]).expand(count, 2), torch.zeros(count, 1, 1).bool()
        source = replace(self.source, limits=limits, whole=whole)
        return Image(pixels, _window(pixels), tuple(map(str, range(count))), source)

    @property
    def background(self) -> Tensor:
        """Return [H, W] bool: pixels of a NIfTI slice that are exactly 0 in every channel, where 0 means "nothing".

        It means so if it is the low end of every window, or the value of one pixel in twenty; in a CT it is water.
        """
        zero = (self.pixels == 0).all(0)
        empty = not isinstance(self.source.kind, Picture) and (
            bool((self.window[:, 0] == 0).all()) or zero.float().mean().item() >= 0.05
        )
        return zero if empty else torch.zeros_like(zero)

    def _placed(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Return top, left, height, width of the image on a model's grid of this size."""
        rows, columns = self.pixels.shape[1:]
        scale = (max if self.crop else min)(size[0] / rows, size[1] / columns)
        if 1 <= (1 / scale if self.crop else scale) <= PAD_ONLY and not isinstance(self.source.kind, Picture):
            scale = 1
        height, width = max(1, round(rows * scale)), max(1, round(columns * scale))
        return (size[0] - height) // 2, (size[1] - width) // 2, height, width


def _resized(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize [C, H, W] to `size`, antialiased; the same size is the identity."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x[None], size=size, mode="bilinear", antialias=True)[0]


# ---------------------------------------------------------------------------------------------------------------- names


def is_image(path: Path | str) -> bool:
    """Tell whether a file's name is that of an image knife reads; hidden files are not."""
    return bool(suffix_of(Path(path))) and not Path(path).name.startswith(".")


def output_name(paths: Sequence[Path]) -> tuple[str, str]:
    """Return stem and suffix to name the output of an image's files by: ("x", ".nii.gz") for x.nii.gz.

    Several files have the suffix "" (a folder holds the output) and as stem their name without the sequence.
    """
    first = paths[0]
    stem = first.name.removesuffix(suffix_of(first))
    told = sequence_of(first)
    if len(paths) == 1 or told is None:
        return stem, suffix_of(first) or ".nii.gz"  # a folder of DICOM files becomes one of NIfTI
    bare = re.sub(rf"(^|[^A-Za-z0-9]){told.token}(?![A-Za-z0-9])", "", stem).strip(" ._-")
    return bare or first.absolute().parent.name or "image", ""


def own_name(path: Path) -> str:
    """Return what one of several files is called among the results: as it is, and what is no image file, as NIfTI."""
    return path.name if suffix_of(path) else f"{path.name}.nii.gz"


def sequence_of(path: Path | str) -> MRSequence | None:
    """Return the MR sequence, or "seg", that a file's name tells by a word of its own; None if there is none."""
    words = re.split(r"[^A-Za-z0-9]+", Path(path).name)
    known = {"seg": MASK_WORDS, **SEQUENCES}  # x_t1_seg is a mask
    told = ((name, word) for name, spelt in known.items() for word in reversed(words) if word.lower() in spelt)
    found = list(told)
    if not found or found[0][0] == "seg":
        return MRSequence(*found[0]) if found else None
    return MRSequence(*max(found, key=lambda f: words.index(f[1])))  # BIDS: space-T1w_FLAIR is a flair


def sequence_files(folder: Path | str) -> dict[str, Path]:
    """Return the NIfTI files of a folder by sequence, in canonical order; masks and other files are left out.

    Raises InputError if the folder cannot be listed or two files are of the same sequence.
    """
    folder = Path(folder)
    with refusing(folder, "a folder"):
        files = sorted(f for f in folder.iterdir() if is_image(f) and suffix_of(f).lower() in NIFTI)
    return by_sequence([file for file in files if mr_name(file)])


def by_sequence(files: Sequence[Path]) -> dict[str, Path]:
    """Return files by the MR sequence that their names tell, in canonical order.

    Raises InputError if one tells none, or two are of the same.
    """
    found: dict[str, Path] = {}
    for file in files:
        name = mr_name(file)
        if name is None:
            raise InputError(f"{shown(file)}: its name tells no sequence; files are joined by t1, t1ce, t2 or flair.")
        if name in found:
            both = f"{shown(found[name])} and {shown(file)}"
            raise InputError(f"{both}: two files of sequence {name}; give the files of one case only.")
        found[name] = file
    return {name: found[name] for name in SEQUENCES if name in found}


def mr_name(path: Path) -> str | None:
    """Return the canonical name of the MR sequence that a file's name tells; None for none, or a mask."""
    told = sequence_of(path)
    return told.name if told and told.name in SEQUENCES else None


def suffix_of(path: Path) -> str:
    """Return the image suffix of a path as it is spelt, or "" if there is none."""
    suffix = next((s for s in SUFFIXES if path.name.lower().endswith(s)), "")
    return path.name[len(path.name) - len(suffix) :]


# ------------------------------------------------------------------------------------------------------------- reading


def read(path: Path | str | Sequence[Path | str], fill: float | None = None) -> Image:
    """Read one 2-D image from a file, from a folder of one case or from several files, one for each MR sequence.

    fill: what stands for pixels that are NaN or infinite; `image.source.filled` says how many there were.

    Raises InputError, and nothing else, if a file cannot be used: missing, no regular file, malformed, damaged, too
    large, a volume, with pixels that are no number and no `fill` for them, or the same value everywhere.
    """
    return not_constant(_assembled([Path(path)] if isinstance(path, Path | str) else [Path(p) for p in path], fill))


def not_constant(image: Image) -> Image:
    """Return the image, or raise InputError if it shows nothing: in each channel, every pixel is the same."""
    flat = image.pixels.flatten(1)
    if bool((flat == flat[:, :1]).all()):
        values = ", ".join(f"{v:g}" for v in flat[:, 0].tolist()[:4])
        raise InputError(f"{shown(image.source.paths[0])}: every pixel is {values}; a constant image shows nothing.")
    return image


def read_mask(path: Path | str, image: Image, labels: Collection[int] = ()) -> Tensor:
    """Read a mask as [1, H, W] float32, 1 where its label is one of `labels` (none: above 0), oriented as the image.

    A NIfTI mask must lie on the image's grid; a picture counts as drawn on the displayed image. An empty mask is one.
    Raises InputError if it cannot be read, or its shape or geometry differ.
    """
    mask = decoded(Path(path))
    name, whose = shown(Path(path)), shown(image.source.paths[0])
    if mask.pixels.shape[1:] != image.pixels.shape[1:]:
        shapes = [" x ".join(map(str, p.shape[1:])) for p in (mask.pixels, image.pixels)]
        raise InputError(f"{name}: the mask is {shapes[0]}, but {whose} is {shapes[1]}; give one of the same shape.")
    if suffix_of(Path(path)).lower() in (".jpg", ".jpeg"):
        raise InputError(f"{name}: JPEG blurs the edges of labels; save the mask as PNG or NIfTI.")
    if not isinstance(mask.source.kind, Picture):
        if isinstance(image.source.kind, Picture):
            raise InputError(f"{name}: a NIfTI mask, but {whose} has no geometry to lay it on; save the mask as PNG.")
        if len(mask.pixels) != 1:
            raise InputError(f"{name}: a mask of {len(mask.pixels)} channels; give one with a single label a pixel.")
        _check_same_grid(mask, image)
    return labelled(mask.pixels, labels)


def labelled(pixels: Tensor, labels: Collection[int] = ()) -> Tensor:
    """Return 1 where a label map [C, H, W] shows one of `labels` (none: anything above 0), [1, H, W] float32."""
    chosen = torch.isin(pixels, torch.tensor([*labels], dtype=pixels.dtype)) if labels else pixels > 0
    return chosen.any(0, keepdim=True).float()


def _assembled(paths: Sequence[Path], fill: float | None) -> Image:
    """Read the file, or join the files of one case as channels in canonical order."""
    if not paths:
        raise InputError("no image file given; name at least one.")
    if len(paths) == 1 and not _is_folder(paths[0]):
        return decoded(paths[0], fill)
    named = sequence_files(paths[0]) if len(paths) == 1 else by_sequence(paths)
    if not named:
        raise InputError(f"{shown(paths[0])}: a folder without NIfTI files named t1, t1ce, t2 or flair; give a file.")
    return joined(tuple(named), [decoded(file, fill) for file in named.values()])


def _is_folder(path: Path) -> bool:
    with refusing(path, "a path"):
        return path.is_dir()


def joined(channels: tuple[str, ...], images: Sequence[Image]) -> Image:
    """Join images of one channel each, from NIfTI files on one grid, as the channels of one image, named as given.

    Raises InputError if one is no such image, or lies on another grid than the first.
    """
    for image in images:
        if isinstance(image.source.kind, Picture) or len(image.pixels) != 1:
            raise InputError(f"{shown(image.source.paths[0])}: only NIfTI files of one channel can be joined.")
        _check_same_grid(image, images[0])
    pixels, sources = torch.cat([image.pixels for image in images]), [image.source for image in images]
    files = tuple(file for source in sources for file in cast(tuple[Nifti, ...], source.kind))
    paths = tuple(path for source in sources for path in source.paths)
    synthetic, tops = any(source.synthetic for source in sources), [file.top for file in files]
    return assemble(paths, files, pixels, channels=channels, tops=tops, synthetic=synthetic)


def _check_same_grid(image: Image, other: Image) -> None:
    """Raise InputError, naming the pair, unless two images cover the same pixels of the world."""
    mine, its = cast(tuple[Nifti, ...], image.source.kind)[0], cast(tuple[Nifti, ...], other.source.kind)[0]
    pair = f"{shown(image.source.paths[0])} and {shown(other.source.paths[0])}"
    if image.pixels.shape[1:] != other.pixels.shape[1:]:
        shapes = [" x ".join(map(str, x.pixels.shape[1:])) for x in (image, other)]
        raise InputError(f"{pair}: {shapes[0]} and {shapes[1]} pixels; give files of the same slice.")
    gap = float(np.abs(mine.frame - its.frame).max())
    if gap > SAME_GRID:
        raise InputError(f"{pair}: their affines differ by {gap:.3g}; resample one onto the grid of the other.")


def decoded(path: Path, fill: float | None = None) -> Image:
    """Read one file; a constant one too, since a mask or one channel of several may be empty.

    fill: what stands for pixels that are NaN or infinite; None: they are refused.

    Raises InputError, and nothing else, if it cannot be used.
    """
    suffix = suffix_of(path).lower()
    if not suffix:
        if not path.exists():
            raise InputError(f"{shown(path)}: no such file; check the name.")
        raise InputError(f"{shown(path)}: no image format that knife reads; give one of {', '.join(SUFFIXES)}.")
    with refusing(path, "a NIfTI file" if suffix in NIFTI else "a picture"), regular(path) as file:
        return _decoded_nifti(file, path, fill) if suffix in NIFTI else _decoded_picture(file, path, fill)


def _decoded_nifti(file: BinaryIO, path: Path, fill: float | None) -> Image:
    kind, pixels, synthetic = nifti.decode(file, path, fill)
    count, name = len(pixels), mr_name(path)
    channels = (name,) if name and count == 1 else tuple(map(str, range(count)))
    return assemble((path,), (kind,), pixels, channels=channels, tops=[kind.top] * count, synthetic=synthetic)


def _decoded_picture(file: BinaryIO, path: Path, fill: float | None) -> Image:
    kind, pixels, synthetic = picture.decode(file, path, fill)
    channels = ("grey",) if len(pixels) == 1 else ("r", "g", "b")
    return assemble((path,), kind, pixels, channels=channels, tops=[kind.top] * len(pixels), synthetic=synthetic)


def assemble(
    paths: tuple[Path, ...],
    kind: Picture | tuple[Nifti, ...],
    pixels: Tensor,
    *,
    channels: tuple[str, ...],
    tops: Sequence[float],
    synthetic: bool,
) -> Image:
    """Assemble an image; `tops` has the largest whole number that each channel's file holds, or inf for floats."""
    limits = torch.tensor([[0.0, top] for top in tops], dtype=torch.float64)
    whole = limits[:, 1].isfinite()
    floats = not whole.any()
    normalised = floats and pixels.min().item() >= 0 and FAINT < pixels.max().item() <= 1  # as published slices are
    if normalised:
        limits[:, 1] = 1
    known = normalised or (isinstance(kind, Picture) and bool(whole.all()))
    window = limits.float() if known else _window(pixels)
    deep = known and not floats and limits[0, 1] > TWELVE_BITS
    if deep and pixels.max().item() <= TWELVE_BITS:  # as X-rays and microscopes give them
        window[:, 1] = TWELVE_BITS
    limits[:, 0] = torch.minimum(pixels.amin((1, 2)), window[:, 0])  # no change goes below both image and window
    return Image(pixels, window, channels, Source(paths, kind, limits, whole[:, None, None], synthetic))


def _window(pixels: Tensor) -> Tensor:
    """Return [C, 2] intensities of [C, H, W] that span a model's range: 0 to the 99.5th percentile of what is above 0.

    The low end is the 0.5th percentile of what is not 0, if that is clearly negative (CT, standardised values); the few
    slightly negative voxels that resampling leaves in MR are not.
    """
    ends = []
    for channel in pixels.double().numpy():
        above, other = channel[channel > 0], channel[channel != 0]
        high = float(np.percentile(above, PERCENTILES[1])) if above.size else 0.0
        low = float(np.percentile(other, PERCENTILES[0])) if other.size else 0.0
        low = low if low < -0.05 * high else 0.0
        ends.append((low, high if high > low else low + 1))
    return torch.tensor(ends)


# ------------------------------------------------------------------------------------------------------------- writing


def write(image: Image, path: Path | str, synthetic: bool = True, dtype: str = "same") -> None:
    """Write an image in the format that the suffix of `path` names; only complete files ever appear.

    NIfTI keeps the geometry of the input, drops its texts, and is stored as the input's integer type if every value
    fits it, else as float32; `dtype` "float32" stores it so in any case, and pictures take no notice of it. An image
    read from several files is written under their names if `path` is a folder (a name without image suffix), else as
    one [X, Y, 1, C] file. Pictures keep alpha, resolution and colour profile and lose other metadata. `synthetic` puts
    a mark into the file (BMP has no place for one).

    Raises InputError if that would overwrite an input, the format cannot hold the image or pixels are not finite;
    SettingsError if there is no such dtype; OSError if the disk refuses.
    """
    path, paths = Path(path), image.source.paths
    check_dtype(dtype)
    if not bool(image.pixels.isfinite().all()):
        raise InputError(f"{shown(path)}: the pixels to write are not all finite; nothing was written.")
    if not suffix_of(path) and len(paths) > 1:
        if len(image.pixels) != len(paths):
            raise InputError(f"{shown(path)}: {len(image.pixels)} channels do not fill {len(paths)} files; name one.")
        files = {path / own_name(own): [i] for i, own in enumerate(paths)}
    else:
        files = {path: list(range(len(image.pixels)))}
    for file in files:
        _check_no_input(file, paths)
    encoded = {file: _encoded(image, channels, file, synthetic, dtype) for file, channels in files.items()}
    for file, data in encoded.items():
        write_safely(file, data)


def check_dtype(dtype: str) -> None:
    """Raise SettingsError unless a type to store NIfTI voxels as is one that `write` knows."""
    if dtype not in DTYPES:
        raise SettingsError(f"--dtype {dtype}: give {' or '.join(DTYPES)}.")


def _check_no_input(path: Path, inputs: Sequence[Path]) -> None:
    if path.exists() and any(own.exists() and path.samefile(own) for own in inputs):
        raise InputError(f"{shown(path)}: this is the input, and inputs are never overwritten; name another output.")


def _encoded(image: Image, channels: list[int], path: Path, synthetic: bool, dtype: str) -> bytes:
    """Return the bytes of the file that holds some of an image's channels."""
    kind, suffix, pixels = image.source.kind, suffix_of(path).lower(), image.pixels[channels]
    if isinstance(kind, Picture):
        return picture.encode(pixels, kind, path, suffix=suffix, synthetic=synthetic)
    if suffix not in NIFTI:
        raise InputError(f"{shown(path)}: a NIfTI slice is written as NIfTI; name the output .nii or .nii.gz.")
    own = [kind[channels[0]]] if len(channels) == 1 and len(kind) == len(image.pixels) else kind
    return nifti.encode(pixels, own, dtype=dtype, synthetic=synthetic, zipped=suffix == ".nii.gz")
