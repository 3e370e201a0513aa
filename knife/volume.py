"""Whole volumes: their axial slices as images, and back again.

A volume is one 3-D NIfTI file, one file for each MR sequence, or one file [X, Y, Z, C] or [X, Y, Z, 1, C]. Which
slices are axial is told by the affine and not by the order of the axes; a slice's number is its index along that axis,
as other programs show it. Intensities are windowed over the whole volume, so that neighbouring slices stay comparable.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from knife import nifti
from knife.errors import InputError
from knife.files import MARK, refusing, regular, shown, write_safely
from knife.image import (
    SAME_GRID,
    Image,
    Source,
    assemble,
    by_sequence,
    labelled,
    mr_name,
    own_name,
    sequence_files,
    suffix_of,
)
from knife.nifti import Array, Header, Nifti

MAX_VOXELS = 2**28  # of a volume, over all channels: 1 GiB as float32

Place = Path | str


@dataclass(frozen=True, eq=False)
class Volume:
    """Hold a 3-D image in its files' own intensities, as a stack of axial slices, and where it came from.

    pixels: [C, D, H, W] float32; [:, k] is what `Image.pixels` of that slice would be. axis: the voxel axis that the
    slices are stacked along. steps: of each file, the way [3] in the world from one slice to the next. window,
    channels, source: as those of an Image; in source.kind shape and header are the volume's, the frame is slice 0's.
    """

    pixels: Tensor
    window: Tensor
    channels: tuple[str, ...]
    source: Source
    axis: int
    steps: tuple[Array, ...]

    @property
    def count(self) -> int:
        """Return the number of axial slices."""
        return self.pixels.shape[1]

    @property
    def files(self) -> tuple[Nifti, ...]:
        """Return what each file is."""
        return cast(tuple[Nifti, ...], self.source.kind)

    def slice(self, k: int) -> Image:
        """Return axial slice k as an image that lies where the slice lies in the world.

        Raises InputError if there is no such slice.
        """
        self.check(k)
        kind = tuple(slice_of(f, self.axis, k, step) for f, step in zip(self.files, self.steps, strict=True))
        return Image(self.pixels[:, k], self.window, self.channels, replace(self.source, kind=kind))

    def mask(self, path: Place, k: int, labels: Collection[int] = ()) -> Tensor:
        """Return slice k of a mask volume on the same grid as [1, H, W] float32, see `knife.image.read_mask`.

        Raises InputError if it cannot be read or lies on another grid.
        """
        self.check(k)
        mask = mask_volume(Path(path))
        check_same_grid(mask, self)
        return labelled(mask.pixels[:, k], labels)

    def brain(self, k: int) -> float:
        """Return the share of slice k that is not 0 in every channel."""
        return float((self.pixels[:, k] != 0).any(0).float().mean())

    def with_slices(self, results: Mapping[int, Tensor]) -> "Volume":
        """Return the volume with the pixels [C, H, W] of some slices replaced."""
        pixels = self.pixels.clone()
        for k, plane in results.items():
            pixels[:, k] = plane
        return replace(self, pixels=pixels)

    def like(self, pixels: Tensor) -> "Volume":
        """Return a volume of one channel without limits, [1, D, H, W], in the same place: a map."""
        limits, whole = torch.tensor([[-torch.inf, torch.inf]]), torch.zeros(1, 1, 1, dtype=torch.bool)
        source = replace(self.source, kind=self.files[:1], paths=self.source.paths[:1], limits=limits, whole=whole)
        return replace(self, pixels=pixels, channels=("0",), source=source, steps=self.steps[:1])

    def check(self, k: int) -> None:
        """Raise InputError unless slice k is there."""
        if not 0 <= k < self.count:
            name = shown(self.source.paths[0])
            raise InputError(f"{name}: there is no slice {k}; its axial slices are 0 to {self.count - 1}.")


def slice_of(file: Nifti, axis: int, k: int, step: Array) -> Nifti:
    """Return the description of slice k of a volume's file: only the origin moves, all else stays bit for bit."""
    spatial = tuple(1 if i == axis else n for i, n in enumerate(file.spatial))
    shape = (*spatial, *file.shape[3:])
    frame = file.frame + np.array([[0, 0, 0], [0, 0, 0], k * step])
    return replace(file, header=moved(file.header, axis, k), shape=shape, spatial=spatial, frame=frame)


def moved(header: Header, axis: int, k: int) -> Header:
    """Return a header whose origin, in both of its affines, is that of slice k along a voxel axis."""
    fresh = header.copy()
    for row in ("srow_x", "srow_y", "srow_z"):
        values = np.array(header[row], dtype=np.float64)
        values[3] += k * values[axis]
        fresh[row] = values
    turned = nifti.qform_of(header)
    if turned is not None:
        for offset, change in zip(("qoffset_x", "qoffset_y", "qoffset_z"), turned[:3, axis] * k, strict=True):
            fresh[offset] = float(header[offset]) + change
    return fresh


# ------------------------------------------------------------------------------------------------------------- reading


def axial_count(path: Place) -> int | None:
    """Return how many axial slices a NIfTI file has, from its header alone; None if it is a slice and no volume.

    Raises InputError if the header cannot be used.
    """
    path = Path(path)
    with refusing(path, "a NIfTI file"), regular(path) as file:
        _, _, header = nifti.begin(file, path)
        shape, _, _ = nifti.checked_header(header, path)
        return shape[nifti.axial_axis(nifti.affine_of(header, path))] if nifti.is_volume(shape, header) else None


def open_volume(paths: Place | Sequence[Place], fill: float | None = None) -> Volume:
    """Read a volume from a file, from a folder of one case or from several files, one for each MR sequence.

    fill: what stands for voxels that are NaN or infinite; None: they are refused.

    Raises InputError, and nothing else, if a file cannot be used, is no volume, or their grids differ.
    """
    given = [Path(paths)] if isinstance(paths, Path | str) else [Path(p) for p in paths]
    if len(given) == 1 and not given[0].is_dir():
        return decoded(given[0], fill)
    named = sequence_files(given[0]) if len(given) == 1 else by_sequence(given)
    if not named:
        raise InputError(f"{shown(given[0])}: a folder without NIfTI files named t1, t1ce, t2 or flair; give a file.")
    return joined(tuple(named), [decoded(file, fill) for file in named.values()])


def decoded(path: Path, fill: float | None = None, thin: bool = False) -> Volume:
    """Read one file of a volume; `thin` takes [X, Y, Z <= 8] for one in any case, and never for channels."""
    with refusing(path, "a NIfTI file"), regular(path) as file:
        stream, head, header = nifti.begin(file, path)
        shape, dtype, offset = nifti.checked_header(header, path)
        is_volume = nifti.is_volume(shape, header) or (thin and len(shape) == 3 and min(shape) > 1)
        if not is_volume or sum(n > 1 for n in shape[3:]) > 1:
            size = " x ".join(map(str, shape))
            raise InputError(f"{shown(path)}: {size} voxels are no volume [X, Y, Z], [X, Y, Z, C] or [X, Y, Z, 1, C].")
        if math.prod(shape) > MAX_VOXELS:
            raise InputError(f"{shown(path)}: its header declares more than {MAX_VOXELS} voxels; crop it first.")
        affine = nifti.affine_of(header, path)
        data = nifti.read_to_end(stream, head, offset + math.prod(shape) * dtype.itemsize, path)
        values = np.frombuffer(data, dtype, math.prod(shape), offset).reshape(*shape[:3], -1, order="F")
        return stacked(values, header, affine, shape, path, fill)


def stacked(
    values: Array, header: Header, affine: Array, shape: tuple[int, ...], path: Path, fill: float | None = None
) -> Volume:
    """Return voxels [X, Y, Z, C] as a stack of displayed axial slices."""
    axis, count = nifti.axial_axis(affine), values.shape[3]
    planes = np.moveaxis(values, (3, axis), (0, 1))  # [C, D, a, b]
    pixels, kept, filled = nifti.intensities(planes.reshape(-1, *planes.shape[2:]), header, path, fill)
    one, two = (i for i in range(3) if i != axis)
    orientation, frame = nifti.oriented(affine, (one, two), planes.shape[2:])
    file = Nifti(nifti.geometry(header), shape, shape[:3], orientation, frame, kept, filled)
    stack = nifti.displayed(pixels, orientation)
    name = mr_name(path) if count == 1 else None
    channels = (name,) if name else tuple(map(str, range(count)))
    synthetic = bytes(header["descrip"]).startswith(MARK.encode())
    flat = stack.reshape(count, -1, stack.shape[-1])  # all slices below each other: one window for all
    whole = assemble((path,), (file,), flat, channels=channels, tops=[file.top] * count, synthetic=synthetic)
    stack = stack.reshape(count, -1, *stack.shape[1:])
    return Volume(stack, whole.window, channels, whole.source, axis, (affine[:3, axis],))


def joined(channels: tuple[str, ...], volumes: Sequence[Volume]) -> Volume:
    """Join the volumes of one case as channels."""
    for volume in volumes:
        if len(volume.channels) != 1:
            raise InputError(f"{shown(volume.source.paths[0])}: only NIfTI files of one channel can be joined.")
        check_same_grid(volume, volumes[0])
    sources = [volume.source for volume in volumes]
    source = Source(
        paths=tuple(path for source in sources for path in source.paths),
        kind=tuple(file for volume in volumes for file in volume.files),
        limits=torch.cat([source.limits for source in sources]),
        whole=torch.cat([source.whole for source in sources]),
        synthetic=any(source.synthetic for source in sources),
    )
    pixels, window = torch.cat([v.pixels for v in volumes]), torch.cat([v.window for v in volumes])
    steps = tuple(step for volume in volumes for step in volume.steps)
    return Volume(pixels, window, channels, source, volumes[0].axis, steps)


def check_same_grid(volume: Volume, other: Volume) -> None:
    """Raise InputError, naming the pair, unless two volumes cover the same voxels of the world."""
    pair = f"{shown(volume.source.paths[0])} and {shown(other.source.paths[0])}"
    if volume.pixels.shape[1:] != other.pixels.shape[1:]:
        shapes = [" x ".join(map(str, v.files[0].spatial)) for v in (volume, other)]
        raise InputError(f"{pair}: {shapes[0]} and {shapes[1]} voxels; give files of the same grid.")
    gaps = volume.files[0].frame - other.files[0].frame, volume.steps[0] - other.steps[0]
    gap = max(float(np.abs(gap).max()) for gap in gaps)
    if gap > SAME_GRID:
        raise InputError(f"{pair}: their affines differ by {gap:.3g}; resample one onto the grid of the other.")


def mask_volume(path: Path) -> Volume:
    """Read a mask; the last few are kept, since every slice asks for its own part."""
    with refusing(path, "a mask"):
        status = path.stat()
    return _mask_volume(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=4)
def _mask_volume(path: Path, mtime: int, size: int) -> Volume:
    return decoded(path, thin=True)


# ------------------------------------------------------------------------------------------------------------- writing


def write(volume: Volume, path: Place, dtype: str = "same", synthetic: bool = True) -> None:
    """Write a volume as NIfTI; only complete files ever appear, and never over an input.

    Geometry is the input's, its texts are dropped. One read from several files is written under their names if `path`
    is a folder (a name without image suffix), else as one [X, Y, Z, C] file. dtype: "same" or "float32", as in
    `nifti.encode`: slices that were not replaced come out bit for bit where the file holds integers without scaling.

    Raises InputError if that would overwrite an input or pixels are not finite; OSError if the disk refuses.
    """
    path = Path(path)
    for file, channels in targets(volume, path).items():
        write_safely(file, encoded(volume, channels, file, dtype, synthetic))


def targets(volume: Volume, path: Path) -> dict[Path, list[int]]:
    """Return the files to write, and the channels that go into each."""
    paths = volume.source.paths
    if not bool(volume.pixels.isfinite().all()):
        raise InputError(f"{shown(path)}: the voxels to write are not all finite; nothing was written.")
    apart = not suffix_of(path) and len(paths) > 1
    files = (
        {path / own_name(own): [i] for i, own in enumerate(paths)} if apart else {path: list(range(len(volume.pixels)))}
    )
    for file in files:
        if suffix_of(file).lower() not in nifti.NIFTI:
            raise InputError(f"{shown(file)}: a volume is written as NIfTI; name the output .nii or .nii.gz.")
        if file.exists() and any(own.exists() and file.samefile(own) for own in paths):
            raise InputError(
                f"{shown(file)}: this is the input, and inputs are never overwritten; name another output."
            )
    return files


def encoded(volume: Volume, channels: list[int], path: Path, dtype: str, synthetic: bool) -> bytes:
    """Return the bytes of one file of a volume."""
    files, pixels = volume.files, volume.pixels[channels]
    files = files[channels[0] :][:1] if len(channels) == 1 and len(files) > 1 else files
    file = files[0]
    count, depth = pixels.shape[:2]
    planes = nifti.stored_plane(pixels.reshape(-1, *pixels.shape[2:]), file.orientation)
    voxels = np.moveaxis(planes.reshape(count, depth, *planes.shape[1:]), (0, 1), (3, volume.axis))
    shape = file.shape if math.prod(file.shape) == pixels.numel() else (*file.spatial, *[count] * (count > 1))
    kept = nifti.stored_type(pixels, {f.dtype for f in files}) if dtype == "same" else np.dtype(np.float32)
    zipped = suffix_of(path).lower() == ".nii.gz"
    return nifti.finished(file.header, voxels.reshape(shape), kept, synthetic=synthetic, zipped=zipped)
