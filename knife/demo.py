"""The demonstration: a brain slice whose tumour grows, shrinks and vanishes, and one that gets a tumour by a mask."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from knife import panel
from knife.errors import InputError
from knife.files import write_safely
from knife.image import Image
from knife.outputs import Translation, refuse_unwritable, refusing_disk
from knife.phantom import CHANNELS, nifti, phantom
from knife.settings import DEFAULTS, Settings, Wish
from knife.translation import translate

SEED = 20_220_402  # no training data were made from this seed
DISEASED, HEALTHY = 3, 4  # phantoms of that seed
SHOWN = ("flair", "t1ce")
TITLE = "knife: one diffusion model, three tasks"


class Scene(NamedTuple):
    """One translation of the demonstration."""

    word: str  # what happens to the tumour
    image: str
    task: str
    target: str


SCENES = (
    Scene("grown", "slice.nii", "regress", "0.3"),
    Scene("shrunk", "slice.nii", "regress", "0.02"),
    Scene("removed", "slice.nii", "classify", "healthy"),
    Scene("inserted", "healthy.nii", "segment", "mask.nii"),
)


def run_demo(
    folder: Path,
    device: str = "auto",
    progress: Callable[[int, int], None] = lambda done, total: None,
    settings: Settings = DEFAULTS,
) -> tuple[list[dict[str, Any]], Path]:
    """Write slice.nii, healthy.nii and mask.nii, translate them with the shipped models into demo/, draw demo/demo.png.

    Args:
        folder: where all that goes.
        device: auto, cpu, cuda or cuda:N.
        progress: called with (steps done, steps in all).
        settings: how to walk.

    Returns:
        A row for each translation, and the path of the picture.

    Raises:
        InputError: if one of the three files is there already and is not the demonstration's.
        DiskError: if the disk refuses.
        KnifeError: if a translation is refused.
    """
    mask = write_inputs(folder)
    done: list[Translation] = []

    def advance(step: int, steps: int) -> None:
        progress(len(done) * steps + step, len(SCENES) * steps)

    for scene in SCENES:
        target = str(folder / scene.target) if scene.task == "segment" else scene.target
        image, out = folder / scene.image, folder / "demo"
        done += translate(
            image, Wish(scene.task, target), out=out, models=None, settings=settings, device=device, progress=advance
        )
    picture = folder / "demo" / "demo.png"
    with refusing_disk("--folder", folder):
        write_safely(picture, overview(done, mask))
    return [row(scene, translation) for scene, translation in zip(SCENES, done, strict=True)], picture


def write_inputs(folder: Path) -> Tensor:
    """Write slice.nii, healthy.nii and mask.nii, unless they are there already; return the mask [H, W]."""
    diseased, healthy = phantom(DISEASED, seed=SEED, relative_size=0.1), phantom(HEALTHY, seed=SEED, relative_size=0.0)
    mask = phantom(HEALTHY, seed=SEED, relative_size=0.1).mask
    files: dict[str, np.ndarray[Any, Any]] = {
        "slice.nii": diseased.pixels,
        "healthy.nii": healthy.pixels,
        "mask.nii": mask,
    }
    refuse_unwritable("--folder", folder)
    made = {folder / name: nifti(pixels) for name, pixels in files.items()}
    with refusing_disk("--folder", folder):
        for path, data in made.items():
            if path.exists() and path.read_bytes() != data:
                raise InputError(f"{path}: is there already, and not the demonstration's; give another --folder.")
        for path, data in made.items():
            write_safely(path, data)
    return torch.from_numpy(mask) > 0


def row(scene: Scene, translation: Translation) -> dict[str, Any]:
    """Return what the table says of a translation: what the guide saw before and after."""
    record = translation.record
    told = {"classify": "p(healthy)", "regress": "value", "segment": "dice"}[scene.task]
    seen = {when: f"{told} {record[when][told]:.3f}" for when in ("before", "after")}
    file = translation.files.image if translation.files else ""
    return {
        "tumour": scene.word,
        "asked": f"{scene.task} {scene.target}",
        **seen,
        "seconds": record["seconds"],
        "file": file,
    }


def overview(done: list[Translation], mask: Tensor) -> bytes:
    """Draw the inputs and outputs side by side, and what has changed, as PNG."""
    *edited, inserted = done
    columns: list[tuple[str, Image, Tensor | None]] = [("slice", edited[0].source, None)]
    columns += [(scene.word, translation.result, None) for scene, translation in zip(SCENES, edited, strict=False)]
    columns += [("healthy, mask", inserted.source, mask), (SCENES[-1].word, inserted.result, None)]
    rows = [
        [panel.outlined(panel.grey(image.pixels[CHANNELS.index(name)], 0, 1), outline) for _, image, outline in columns]
        for name in SHOWN
    ]
    still = torch.zeros_like(mask, dtype=torch.float32)
    changes = [still, *map(change, edited), still, change(inserted)]
    rows.append([panel.heat(plane, max(float(plane.max()) for plane in changes)) for plane in changes])
    names = [name for name, _, _ in columns]
    return panel.png(panel.captioned(rows, 3, TITLE, ("FLAIR", "T1ce", "change"), names))


def change(translation: Translation) -> Tensor:
    """Return the absolute change summed over channels, [H, W]."""
    return (translation.result.pixels - translation.source.pixels).abs().sum(0)
