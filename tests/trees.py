"""Small trees of image files, for the tests of data folders."""

from pathlib import Path

import nibabel
import numpy as np
from PIL import Image as Picture

from knife.layouts import Entry


def picture(path: Path, value: int = 200, mode: str = "L", side: int = 16) -> Path:
    """Write a dark picture with a bright square."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((side, side), 10, np.uint8)
    pixels[4:9, 4:9] = value
    Picture.fromarray(pixels).convert(mode).save(path)
    return path


def slice_(path: Path, level: float = 1.0, label: bool = False) -> Path:
    """Write a NIfTI slice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).random((16, 16, 1), np.float32) * level
    if label:
        pixels = (pixels > 0.9).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(pixels, np.eye(4)), path)
    return path


def table(root: Path, *lines: str) -> Path:
    """Write a manifest."""
    (root / "manifest.csv").write_text("\n".join(lines) + "\n")
    return root


def volume_(path: Path, depth: int = 12, level: float = 1.0, label: bool = False) -> Path:
    """Write a NIfTI volume [16, 16, depth] of a bright cube; its lowest slice is empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    voxels = np.zeros((16, 16, depth), np.float32)
    voxels[4:12, 4:12, 1:] = level * np.arange(2, depth + 1)
    if label:
        voxels = (voxels > depth // 2).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), path)
    return path


def names(entries: list[Entry]) -> list[str]:
    return [entry.name for entry in entries]
