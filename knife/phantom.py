"""Brain slices whose truth is known: MR-like phantoms with tumours, from the ICBM152 tissue maps.

    anatomy    cut a slanted slice out of the maps and bend it: grey and white matter, CSF, brain
    tumour     rank the brain's pixels from the tumour's seed outwards; the k first are a tumour of k pixels
    mass_effect  push the anatomy around the tumour away
    contrast   tissue -> t1, t1ce, t2, flair
    paint      oedema, core and rim over them
    acquire    blur, bias field, noise, skull-stripping

Anatomy and tumour have random streams of their own, and the tumour's ranking does not depend on its size. So the same
(index, seed) with another `relative_size` is a counterfactual twin: one patient, a larger, smaller or absent tumour.
"""

import csv
import functools
import gzip
import io
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from knife.errors import InputError, SettingsError
from knife.files import sync, write_safely

CHANNELS = ("t1", "t1ce", "t2", "flair")
CORE, OEDEMA, RIM = 1, 2, 4  # the BraTS labels
FIELD_OF_VIEW = 212.0  # mm, side of the square slice
HEALTHY_SHARE, SMALLEST, LARGEST = 0.45, 0.01, 0.35  # how phantoms without a wanted size are drawn
HEIGHTS = (-8.0, 42.0)  # mm above the anterior commissure: temporal horns to just above the ventricles
CENTRE = (0.0, -18.0)  # mm, middle of the brain in the template
VENTRICLES = (0.0, -14.0)  # mm, where the ventricles widen from

#                  csf   gm    wm    texture: how much of the template's own T1 detail the sequence shows
TISSUE = {
    "t1": (0.16, 0.50, 0.72, 0.8),
    "t1ce": (0.17, 0.53, 0.72, 0.8),
    "t2": (0.90, 0.52, 0.36, -0.5),
    "flair": (0.10, 0.52, 0.38, 0.2),
}
T1_OF_MAPS = (0.30, 0.66, 0.88)  # csf, gm, wm in the template's own T1, by least squares over the maps

#                 t1    t1ce  t2    flair
LESION = {
    OEDEMA: (0.38, 0.38, 0.80, 0.90),
    RIM: (0.45, 0.97, 0.66, 0.76),
    CORE: (0.20, 0.18, 0.92, 0.56),
}


@dataclass(frozen=True)
class Phantom:
    """One slice, rows from anterior to posterior, the patient's right at the left.

    pixels: [4, S, S] float32 in [0, 1], channels t1, t1ce, t2, flair, exactly 0 outside the brain.
    mask: [S, S] uint8, 0 background, 1 core (non-enhancing or necrotic), 2 oedema, 4 enhancing rim, as in BraTS.
    brain: [S, S] bool.
    size: relative tumour size, (mask > 0).sum() / brain.sum().
    """

    pixels: np.ndarray
    mask: np.ndarray
    brain: np.ndarray
    size: float


@dataclass(frozen=True)
class Anatomy:
    """A tumour-free head seen at one height: where each pixel lies in the template, and what is there.

    place: [S, S, 3] template coordinates (x, y, z) in mm, the scale of the head taken out.
    tissue: [4, S, S] csf, gm, wm and T1 texture.  brain: [S, S] float, 0 or 1.  csf_gain: atrophy, a log-odds shift.
    """

    place: Tensor
    tissue: Tensor
    brain: Tensor
    csf_gain: float


@dataclass(frozen=True)
class Tumour:
    """Two rankings of the pixels, and what the tumour is made of; nothing here depends on its size.

    extent: [S, S] distance-like score of oedema and all, inf outside the brain.  core: [S, S] the same for rim + core.
    core_share: pixels of rim + core over all of the tumour's.  rim_share: pixels of the rim over those of rim + core.
    push: strength of the mass effect.  seed: (row, column) of its middle.  texture: [4, S, S] about 1.
    """

    extent: Tensor
    core: Tensor
    core_share: float
    rim_share: float
    push: float
    seed: tuple[int, int]
    texture: Tensor


def phantom(index: int, size: int = 64, seed: int = 0, relative_size: float | None = None) -> Phantom:
    """Make phantom number `index`: a deterministic function of (index, size, seed, relative_size).

    About 45 % are healthy; the others' relative sizes spread over 0.01..0.35, small ones somewhat more often.
    `relative_size` (0 = healthy) forces a size, met to the pixel. Anatomy, contrast, bias field and noise do not depend
    on it: such twins are bit-equal outside of the tumour and its mass effect, at most a seventh of the slice away.
    Raises SettingsError if an argument is out of its range.
    """
    _check(index, size, seed, relative_size)
    head = np.random.default_rng([seed, index, 0])
    lesion = np.random.default_rng([seed, index, 1])
    wanted = draw_size(lesion) if relative_size is None else relative_size
    slice_ = anatomy(head, size)
    contrasts = draw_contrast(head)
    growth = tumour(lesion, slice_)
    mask, cover = cut(growth, slice_.brain, wanted)
    tissue = mass_effect(slice_, growth, mask)
    pixels = paint(contrast(tissue, contrasts), growth, cover)
    pixels = acquire(head, pixels, slice_.brain)
    brain = slice_.brain.numpy() > 0
    return Phantom(pixels.numpy(), mask.numpy(), brain, float((mask > 0).sum()) / float(brain.sum()))


def draw_size(rng: np.random.Generator) -> float:
    """Draw a relative tumour size: 0 in HEALTHY_SHARE of the cases, else within SMALLEST..LARGEST."""
    healthy, u = rng.random(2)
    return 0.0 if healthy < HEALTHY_SHARE else SMALLEST + (LARGEST - SMALLEST) * float(u) ** 1.3


# ---------------------------------------------------------------------------------------------------------- anatomy


def anatomy(rng: np.random.Generator, size: int) -> Anatomy:
    """Cut one slice out of the maps: random height, tilt, scale, shear, bending, ventricle width and atrophy."""
    place = _bend(rng, _slant(rng, _pixel_grid(size)), size)
    place = _widen_ventricles(place, gain=float(rng.uniform(-0.3, 0.8)))
    csf_gain = float(rng.uniform(-0.5, 1.1))
    tissue, brain = sample(place, csf_gain)
    return Anatomy(place, tissue, (brain > 0.5).float(), csf_gain)


def sample(place: Tensor, csf_gain: float) -> tuple[Tensor, Tensor]:
    """Read the maps at `place` [S, S, 3] mm, trilinear; returns tissue [4, S, S] and brain fraction [S, S]."""
    maps, origin, extent = load_maps()
    grid = 2 * (place - origin) / extent - 1
    t1, gm, wm, brain = F.grid_sample(maps[None], grid[None, None], align_corners=True)[0, :, 0]
    t1, gm, wm = torch.stack([t1, gm, wm]) / brain.clamp_min(0.5)  # no false CSF in the edge's half-empty voxels
    matter = (gm + wm).clamp(1e-4, 1 - 1e-4)
    share = torch.sigmoid(torch.logit(matter) - csf_gain)  # atrophy: the folds and the ventricles' edges give way
    gm, wm = gm * share / matter, wm * share / matter
    csf = 1 - gm - wm
    texture = t1 - sum(a * b for a, b in zip(T1_OF_MAPS, (csf, gm, wm), strict=True))
    return torch.stack([csf, gm, wm, texture.clamp(-0.12, 0.12)]), brain


@functools.cache
def load_maps() -> tuple[Tensor, Tensor, Tensor]:
    """Read the shipped maps: [4, Z, Y, X] in [0, 1] (t1, gm, wm, brain), origin (x, y, z) and extent, both mm."""
    with np.load(Path(__file__).with_name("starter") / "icbm152.npz") as file:
        maps = torch.from_numpy(file["maps"].astype(np.float32) / 255)
        origin, voxel = torch.from_numpy(file["origin"]), float(file["voxel"])
    steps = torch.tensor([maps.shape[3], maps.shape[2], maps.shape[1]], dtype=torch.float32) - 1
    return maps, origin, steps * voxel


def _pixel_grid(size: int) -> Tensor:
    """Return (x, y) [S, S, 2] in mm from the slice's middle: x falls along columns, y falls along rows."""
    axis = FIELD_OF_VIEW * (0.5 - (torch.arange(size) + 0.5) / size)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x, y], dim=-1)


def _slant(rng: np.random.Generator, xy: Tensor) -> Tensor:
    """Move the flat slice to a random place in the template: [S, S, 2] -> [S, S, 3] mm."""
    turn, shear = rng.uniform(-0.10, 0.10), rng.uniform(-0.05, 0.05)
    scale = rng.uniform(0.94, 1.06) * np.exp(rng.uniform(-0.025, 0.025) * np.array([1, -1]))
    matrix = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) @ np.array([[1, shear], [0, 1]])
    shift = rng.uniform(-2.5, 2.5, 2) + CENTRE
    height, pitch, roll = rng.uniform(*HEIGHTS), rng.uniform(-0.10, 0.10), rng.uniform(-0.05, 0.05)
    xy = xy @ torch.tensor((matrix / scale).T, dtype=torch.float32)
    z = height + xy @ torch.tensor([roll, pitch], dtype=torch.float32)
    return torch.cat([xy + torch.tensor(shift, dtype=torch.float32), z[..., None]], dim=-1)


def _bend(rng: np.random.Generator, place: Tensor, size: int) -> Tensor:
    """Add a smooth random displacement of some millimetres, coarse and fine: no two brains fold alike."""
    coarse = smooth_noise(rng, 3, 4, size) * torch.tensor([4.0, 4.0, 4.0])[:, None, None]
    fine = smooth_noise(rng, 3, 10, size) * torch.tensor([1.8, 1.8, 3.0])[:, None, None]
    bend = (coarse + fine).permute(1, 2, 0)
    return place + bend - bend.mean(dim=(0, 1))  # the mean would only move the head out of the picture


def _widen_ventricles(place: Tensor, gain: float) -> Tensor:
    """Read nearer to (gain > 0) or farther from the ventricles' middle, out to some 5 cm."""
    offset = place[..., :2] - torch.tensor(VENTRICLES)
    near = torch.exp(-(((offset / torch.tensor([16.0, 32.0])) ** 2).sum(-1, keepdim=True)))
    widened = place.clone()
    widened[..., :2] -= 0.45 * gain * near * offset
    return widened


# ----------------------------------------------------------------------------------------------------------- tumour


def tumour(rng: np.random.Generator, head: Anatomy) -> Tumour:
    """Seed a tumour, mostly in white matter, and rank all pixels by how late it reaches them."""
    size = head.brain.shape[-1]
    row, column = _seed_point(rng, head)
    squeeze, angle = float(np.exp(rng.uniform(-0.35, 0.35))), float(rng.uniform(0, np.pi))
    outline = smooth_noise(rng, 2, 7, size) + 0.6 * smooth_noise(rng, 2, 14, size)
    distance = _ellipse(size, row, column, squeeze, angle)
    delay = 0.20 * outline[0] + _resistance(head, row, column)
    extent = distance + distance.clamp(max=12) * delay  # the clamp keeps far pixels from overtaking: no islands
    step = rng.uniform(-0.045, 0.045, 2) * size
    core = _ellipse(size, row + step[0], column + step[1], squeeze**0.5, angle)
    core = core + core.clamp(max=12) * 0.28 * outline[1]
    outside = torch.full_like(extent, torch.inf)
    return Tumour(
        extent=torch.where(head.brain > 0, extent, outside),
        core=torch.where(head.brain > 0, core + 0.3 * extent, outside),
        core_share=float(rng.choice([rng.uniform(0.08, 0.3), rng.uniform(0.3, 0.65), rng.uniform(0.65, 0.85)])),
        rim_share=float(rng.uniform(0.35, 0.75)),
        push=float(rng.uniform(0.4, 1.0)),
        seed=(row, column),
        texture=1 + 0.08 * smooth_noise(rng, 4, 12, size),
    )


def cut(growth: Tumour, brain: Tensor, relative_size: float) -> tuple[Tensor, dict[int, Tensor]]:
    """Stop the growth at `relative_size`: label mask [S, S] uint8, soft covers [S, S] of OEDEMA (all), RIM, CORE."""
    pixels = round(relative_size * int(brain.sum()))
    pixels = max(pixels, 1) if relative_size > 0 else 0
    whole, whole_cover = _first(growth.extent, pixels, softness=2.5, offset=0.5)
    within = torch.where(whole, growth.core, torch.inf)
    solid_pixels = round(growth.core_share * pixels)
    solid, solid_cover = _first(within, solid_pixels, softness=1.5, offset=0.8)
    core, core_cover = _first(within, round((1 - growth.rim_share) * solid_pixels), softness=1.5, offset=0.8)
    mask = whole.to(torch.uint8) * OEDEMA
    mask[solid], mask[core] = RIM, CORE
    return mask, {OEDEMA: whole_cover, RIM: solid_cover, CORE: core_cover}


def _first(score: Tensor, count: int, softness: float, offset: float) -> tuple[Tensor, Tensor]:
    """Return the `count` pixels of lowest score [S, S] bool, and the same with a soft edge, 0 outside of it."""
    if count == 0:
        return torch.zeros_like(score, dtype=torch.bool), torch.zeros_like(score)
    order = score.flatten().argsort(stable=True)[:count]
    inside = torch.zeros(score.numel(), dtype=torch.bool)
    inside[order] = True
    inside = inside.view_as(score)
    edge = score.flatten()[order[-1]]
    cover = ((edge - score) / softness + offset).clamp(0, 1)  # scores grow by 1 to 1.5 a 64th of the slice
    return inside, torch.where(inside, cover, 0.0)


def _seed_point(rng: np.random.Generator, head: Anatomy) -> tuple[int, int]:
    """Draw the pixel the tumour grows from: white matter first, away from the brain's edge and midline."""
    wide = max(1, round(head.brain.shape[-1] / 20))
    interior = blur(head.brain, wide)
    white = blur(head.tissue[2], wide / 3)
    side = (head.place[..., 0].abs() / 25).clamp(0.05, 1)
    weight = ((white**2 + 0.08) * (2 * interior - 1).clamp(0, 1) ** 2 * side * head.brain).double().flatten()
    total = weight.cumsum(0)
    pixel = int(torch.searchsorted(total, float(rng.random()) * float(total[-1])))
    return divmod(pixel, head.brain.shape[-1])


def _resistance(head: Anatomy, row: int, column: int) -> Tensor:
    """Return how hard each pixel is to invade [S, S] >= 0: CSF most, then grey matter, and the other hemisphere."""
    csf, gm = blur(head.tissue[:2], head.brain.shape[-1] / 64)
    x = head.place[..., 0]
    crossing = (-x * torch.sign(x[row, column]) / 12).clamp(0, 1)
    delay: Tensor = 0.6 * csf + 0.25 * gm + 0.6 * crossing
    return delay


def _ellipse(size: int, row: float, column: float, squeeze: float, angle: float) -> Tensor:
    """Return the distance [S, S] to (row, column) in 64ths of the slice, stretched along `angle`."""
    axis = torch.arange(size, dtype=torch.float32)
    dy, dx = (axis - row)[:, None], (axis - column)[None, :]
    along, across = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
    squared: Tensor = (along * squeeze) ** 2 + (across / squeeze) ** 2
    return torch.sqrt(squared + 1e-3) * (64 / size)


def mass_effect(head: Anatomy, growth: Tumour, mask: Tensor) -> Tensor:
    """Push the anatomy away from the tumour and read the maps again: tissue [4, S, S].

    The push grows with the tumour, acts in it and in a margin around, and ends at the brain's edge: the skull holds.
    """
    whole = mask > 0
    if not whole.any():
        return head.tissue
    edge = growth.extent[whole].max()
    unit = mask.shape[-1] / 64  # pixels
    near = blur(whole.float(), float((0.2 * edge).clamp(1, 2.5)) * unit)  # ends some 8 units outside at the farthest
    depth = (growth.extent / edge).clamp(0, 1) * (2.5 * (near - 0.01)).clamp(0, 1)
    held = (2 * blur(head.brain, 2.7 * unit) - 1).clamp(0, 1)
    middle = head.place[growth.seed]
    away = head.place[..., :2] - middle[:2]
    away = away / away.norm(dim=-1, keepdim=True).clamp_min(1)
    push = growth.push * (0.28 * edge).clamp(max=4.0) * FIELD_OF_VIEW / 64  # mm
    place = head.place.clone()
    place[..., :2] -= (push * _smoothstep(depth) * held)[..., None] * away
    moved, _ = sample(place, head.csf_gain)
    return torch.where((depth > 0) & (held > 0), moved, head.tissue)


# -------------------------------------------------------------------------------------------------------- appearance


def draw_contrast(rng: np.random.Generator) -> Tensor:
    """Draw the brightness of csf, gm, wm and texture for each sequence: [4 sequences, 4]."""
    table = torch.tensor([TISSUE[name] for name in CHANNELS])
    wobble = torch.from_numpy(rng.uniform(-1, 1, (4, 4)).astype(np.float32)) * torch.tensor([0.03, 0.03, 0.03, 0.15])
    wobble[1] = wobble[0]  # t1ce is the same sequence as t1, later
    return table + wobble


def contrast(tissue: Tensor, table: Tensor) -> Tensor:
    """Turn tissue [4, S, S] into the four sequences [4, S, S]; t1ce gains the vessels between the folds."""
    image = torch.einsum("ct,tyx->cyx", table, tissue)
    csf, gm, _, _ = tissue
    image[1] += 0.35 * csf * gm
    return image.clamp(0, 1)


def paint(image: Tensor, growth: Tumour, cover: dict[int, Tensor]) -> Tensor:
    """Lay oedema, rim and core over the sequences [4, S, S]; under oedema the anatomy shines through."""
    for label, opacity in ((OEDEMA, 0.8), (RIM, 0.9), (CORE, 0.95)):
        bright = torch.tensor(LESION[label])[:, None, None] * growth.texture
        image = torch.lerp(image, bright.clamp(0, 1), opacity * cover[label])
    return image


def acquire(rng: np.random.Generator, image: Tensor, brain: Tensor) -> Tensor:
    """Blur slightly, add a bias field (+-15 %) and Rician noise, and strip what is not brain: [4, S, S] in [0, 1]."""
    size = image.shape[-1]
    bias = 1 + 0.06 * smooth_noise(rng, 4, 3, size).clamp(-2.5, 2.5)
    sigma = rng.uniform(0.006, 0.012)
    real, imaginary = torch.from_numpy(rng.standard_normal((2, 4, size, size), dtype=np.float32)) * sigma
    image = blur(image * brain, 0.45 * size / 64) * bias
    return (torch.hypot(image + real, imaginary) * brain).clamp(0, 1)


def smooth_noise(rng: np.random.Generator, channels: int, knots: int, size: int) -> Tensor:
    """Draw [channels, S, S] noise of about unit variance, smooth over 1/knots of the slice (bicubic)."""
    coarse = torch.from_numpy(rng.standard_normal((1, channels, knots, knots), dtype=np.float32))
    return F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=True)[0]


def blur(image: Tensor, sigma: float) -> Tensor:
    """Blur [..., S, S] by a Gaussian of `sigma` pixels, cut off at three of them."""
    reach = max(1, round(3 * sigma))
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    kernel = kernel / kernel.sum()
    flat = image.reshape(-1, 1, *image.shape[-2:])
    flat = F.conv2d(flat, kernel.view(1, 1, -1, 1), padding=(reach, 0))
    return F.conv2d(flat, kernel.view(1, 1, 1, -1), padding=(0, reach)).reshape(image.shape)


def _smoothstep(x: Tensor) -> Tensor:
    return x * x * (3 - 2 * x)


# -------------------------------------------------------------------------------------------------------------- files

README = """Synthetic brain MR slices with known truth, made by `knife phantom`. No patient is in them.

{count} slices of {size} x {size} pixels, seed {seed}; channels {channels}, float32 in [0, 1].
images/  the slices (NIfTI, 4-D: x, y, 1, channel)      masks/  tumours: 1 core, 2 oedema, 4 enhancing rim
manifest.csv: size is tumour pixels over brain pixels. Every slice is a "patient" (group) of its own.

Anatomy: slices of the ICBM 152 2009a tissue maps, bent and re-contrasted at random; tumours are drawn in.
Copyright (C) 1993-2009 Louis Collins, McConnell Brain Imaging Centre, Montreal Neurological Institute, McGill
University, for the maps; the full notice is starter/NOTICE of the knife package.
"""
COLUMNS = ("image", "mask", "channels", "size", "label", "group", "split")


def write_dataset(
    out: Path, count: int, size: int = 64, seed: int = 0, on_progress: Callable[[int], None] | None = None
) -> None:
    """Write `count` phantoms as NIfTI to OUT/images and OUT/masks, with manifest.csv and README.txt.

    Works in a hidden folder beside OUT and renames it at the end, so that OUT is whole or absent.
    `on_progress` is called with the number of phantoms written so far.
    Raises InputError if OUT exists and is not an empty folder, SettingsError if an argument is out of its range.
    """
    out = Path(out)
    if count < 1:
        raise SettingsError(f"count is {count}: ask for at least one phantom.")
    _check(0, size, seed, None)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: exists already and is not an empty folder; choose another name or remove it.")
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        _fill(partial, count, size, seed, on_progress)
        partial.rename(out)
        sync(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def split_of(index: int) -> str:
    """Return train (90 %), val (5 %) or test (5 %): every 20th phantom each, whatever the count."""
    return {9: "val", 19: "test"}.get(index % 20, "train")


def _fill(folder: Path, count: int, size: int, seed: int, on_progress: Callable[[int], None] | None) -> None:
    """Write the files of a data set into `folder`."""
    facts = {"count": count, "size": size, "seed": seed, "channels": ", ".join(CHANNELS)}
    write_safely(folder / "README.txt", README.format(**facts).encode())
    manifest = io.StringIO()
    table = csv.writer(manifest, lineterminator="\n")
    table.writerow(COLUMNS)
    for index in range(count):
        case = phantom(index, size, seed)
        name = f"phantom_{index:05d}"
        image, mask = f"images/{name}.nii.gz", f"masks/{name}_mask.nii.gz"
        write_nifti(folder / image, case.pixels)
        write_nifti(folder / mask, case.mask)
        label = "diseased" if case.size > 0 else "healthy"
        table.writerow((image, mask, ";".join(CHANNELS), f"{case.size:.6f}", label, name, split_of(index)))
        if on_progress is not None:
            on_progress(index + 1)
    write_safely(folder / "manifest.csv", manifest.getvalue().encode())


def write_nifti(path: Path, rows: np.ndarray) -> None:
    """Write a slice as NIfTI, see `nifti`; compressed if the name ends so."""
    data = nifti(rows)
    write_safely(path, gzip.compress(data, 1, mtime=0) if path.suffix == ".gz" else data)


def nifti(rows: np.ndarray) -> bytes:
    """Return a NIfTI file: [S, S] as [X, Y, 1], [C, S, S] as [X, Y, 1, C]; x to the patient's right, y to the front."""
    from nibabel import nifti1  # here, because only writing files needs it

    voxel = FIELD_OF_VIEW / rows.shape[-1]
    flipped = np.moveaxis(rows[..., ::-1, ::-1], (-1, -2), (0, 1))
    affine = np.diag([voxel, voxel, voxel, 1.0])
    affine[:2, 3] = -voxel * (rows.shape[-1] - 1) / 2
    make: Any = nifti1.Nifti1Image  # untyped in nibabel
    image = make(np.ascontiguousarray(flipped[:, :, None]), affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code="scanner")
    image.set_qform(affine, code="scanner")
    data: bytes = image.to_bytes()
    return data


def _check(index: int, size: int, seed: int, relative_size: float | None) -> None:
    """Raise SettingsError for an argument out of its range."""
    if index < 0 or seed < 0:
        raise SettingsError(f"index {index}, seed {seed}: both must be 0 or more.")
    if not 16 <= size <= 512:
        raise SettingsError(f"size is {size}: choose 16 to 512 pixels.")
    if relative_size is not None and not 0 <= relative_size <= 0.6:
        raise SettingsError(f"relative_size is {relative_size}: choose 0 (healthy) to 0.6.")
