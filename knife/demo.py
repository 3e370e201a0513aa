"""The demonstration: one brain slice whose tumour grows, shrinks and vanishes, and one that gets a tumour where a mask says."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from knife import panel
from knife.image import write_safely
from knife.phantom import phantom, write_nifti
from knife.translate import Translation, translate

SEED = 20_220_402  # no training data were made from this seed
DISEASED, HEALTHY = 3, 4  # phantoms of that seed


def run_demo(folder: Path, device: str, progress: Callable[[int], None]) -> tuple[list[dict[str, Any]], Path]:
    """Write slice.nii, healthy.nii and mask.nii, translate them with the shipped models into demo/, draw demo/demo.png.

    Returns:
        A row for each translation, and the path of the picture.
    """
    diseased, healthy = phantom(DISEASED, seed=SEED, relative_size=0.1), phantom(HEALTHY, seed=SEED, relative_size=0.0)
    wanted = phantom(HEALTHY, seed=SEED, relative_size=0.1).mask
    files = {"slice.nii": diseased.pixels, "healthy.nii": healthy.pixels, "mask.nii": wanted}
    folder.mkdir(parents=True, exist_ok=True)
    for name, pixels in files.items():
        write_nifti(folder / name, pixels)
    jobs = [
        ("grown", "slice.nii", "regress", "0.3"),
        ("shrunk", "slice.nii", "regress", "0.02"),
        ("removed", "slice.nii", "classify", "healthy"),
        ("inserted", "healthy.nii", "segment", str(folder / "mask.nii")),
    ]
    done = []
    for number, (_, name, task, target) in enumerate(jobs, 1):
        done += translate(folder / name, task, target, out=folder / "demo", models=None, device=device)
        progress(number)
    picture = folder / "demo" / "demo.png"
    write_safely(picture, overview([word for word, *_ in jobs], done, torch.from_numpy(wanted) > 0))
    return [row(word, translation) for (word, *_), translation in zip(jobs, done, strict=True)], picture


def row(word: str, translation: Translation) -> dict[str, Any]:
    """Return what the table says of a translation: what the guide saw before and after."""
    record = translation.record
    numbers = [name for name in record["after"] if name not in ("level", "area", "p(diseased)")]
    seen = {when: ", ".join(f"{name} {record[when][name]:.3f}" for name in numbers) for when in ("before", "after")}
    asked = f"{record['task']} {Path(record['target']).name}"
    return {"tumour": word, "asked": asked, **seen, "seconds": f"{record['seconds']:.1f}", "file": str(translation.files[0])}


def overview(words: Sequence[str], done: Sequence[Translation], mask: Tensor) -> bytes:
    """Draw FLAIR and contrast-enhanced T1 of every input and output side by side, and the change, as PNG."""
    columns = [("slice", done[0].source, None), *[(w, t.result, None) for w, t in zip(words[:3], done, strict=False)]]
    columns += [("healthy, mask", done[3].source, mask), (words[3], done[3].result, None)]
    tiles = [
        [panel.outlined(panel.grey(image.pixels[channel], 0, 1), outline) for _, image, outline in columns] for channel in (3, 1)
    ]
    changes = [None, *[t.change.abs().sum(0) for t in done[:3]], None, done[3].change.abs().sum(0)]
    blank = torch.zeros_like(done[0].source.pixels[0])
    tiles.append([panel.heat(blank if change is None else change, 2.0) for change in changes])
    sheet = panel.arrange(tiles, zoom=3)
    names = [name for name, *_ in columns]
    return panel.png(panel.captioned(sheet, tiles[0][0].shape, names, ("FLAIR", "T1ce", "change"), 3, "knife: one diffusion model, three tasks"))
