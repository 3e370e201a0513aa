"""Make knife/starter/icbm152.npz, the small tissue maps behind `knife.phantom`, from the ICBM152 2009a template.

Run it once, in any environment with nibabel and nilearn's package data (`pip install --no-deps nilearn==0.14.1`):

    python benchmarks/make_icbm152.py [OUT.npz]

nilearn is only where the template files come from. Nothing of it is needed to use knife.
"""

import argparse
import importlib.util
from pathlib import Path

import nibabel as nib
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
FILE = "mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
VOXEL = 2  # mm: finer than the 3.25 mm of a 64-pixel slice, so that sampling stays smooth
LOW, HIGH = np.array([-76, -112, -32]), np.array([76, 80, 72])  # mm, MNI: brain in-plane, mid-height slices and tilt
GM_DARK, CSF_BRIGHT = 150.0, 80.0  # T1 values: the darkest grey matter, and about the brightest plain CSF


def template_folder() -> Path:
    """Return the folder of nilearn's template files, without importing nilearn."""
    spec = importlib.util.find_spec("nilearn")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("nilearn is not installed: pip install --no-deps nilearn==0.14.1")
    return Path(spec.submodule_search_locations[0]) / "datasets" / "data"


def read_map(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Read one 1 mm map, cropped to LOW..HIGH, with the world coordinate of its first voxel [mm]."""
    nifti = nib.load(template_folder() / FILE.format(name))
    first = np.rint(LOW - nifti.affine[:3, 3]).astype(int)
    last = np.rint(HIGH - nifti.affine[:3, 3]).astype(int)
    crop = tuple(slice(max(a, 0), b) for a, b in zip(first, last, strict=True))
    corner = nifti.affine[:3, 3] + [c.start for c in crop]
    return np.asarray(nifti.dataobj, dtype=np.float64)[crop], corner


def shrink(volume: np.ndarray) -> np.ndarray:
    """Average blocks of VOXEL^3 voxels, and bring [X, Y, Z] to [Z, Y, X]."""
    n = [s // VOXEL for s in volume.shape]
    volume = volume[tuple(slice(k * VOXEL) for k in n)]
    blocks = volume.reshape(n[0], VOXEL, n[1], VOXEL, n[2], VOXEL)
    return blocks.mean(axis=(1, 3, 5)).transpose(2, 1, 0)


def main() -> None:
    """Write t1, gm, wm and brain as uint8 [4, Z, Y, X], with their origin and voxel size [mm]."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", nargs="?", type=Path, default=ROOT / "knife" / "starter" / "icbm152.npz")
    out = parser.parse_args().out
    (t1, corner), (gm, _), (wm, _) = (read_map(name) for name in ("t1", "gm", "wm"))
    brain, gm, wm = (t1 > 0).astype(float), gm / 255, wm / 255

    # The template's maps know hardly any CSF in the sulci; the dark folds of its T1 do.
    csf = np.maximum(1 - gm - wm, np.clip((GM_DARK - t1) / (GM_DARK - CSF_BRIGHT), 0, 1)) * brain
    tissue = brain * (1 - csf) / np.maximum(gm + wm, 1e-6)
    maps = np.stack([shrink(m) for m in (t1, 255 * gm * tissue, 255 * wm * tissue, 255 * brain)])
    origin = corner + (VOXEL - 1) / 2  # centre of the first block
    pixels = np.rint(maps).clip(0, 255).astype(np.uint8)
    np.savez_compressed(out, maps=pixels, origin=origin.astype(np.float32), voxel=np.float32(VOXEL))
    print(f"{out}: {maps.shape}, origin {origin}, {out.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
