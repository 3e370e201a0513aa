"""Which models translate an image: a diffusion model, and the guide of the task beside it."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knife.checkpoint import STARTER, Stored, check_fit, describe, digest
from knife.errors import ModelError
from knife.image import Image


@dataclass(frozen=True)
class Pair:
    """A diffusion model, and the guide beside it."""

    diffusion: Stored
    guide: Stored

    @property
    def folder(self) -> Path:
        """Return the folder of both; its name is the word after --dataset."""
        return self.guide.path.parent

    @property
    def shipped(self) -> bool:
        """Tell whether knife brought these models along."""
        return self.folder.parent == STARTER


def choose(task: str, images: Sequence[Image], models: Path | None, dataset: str | None) -> Pair:
    """Return the models to use: those in `models` that have the task and fit the images, else the shipped ones.

    A model file that cannot be read counts as missing while another fits; it is never passed over for a shipped one.

    Raises:
        ModelError: if none fit, several do and `dataset` does not choose, or guide and diffusion model do not fit.
    """
    if models is not None and models != Path("models") and not models.is_dir():
        raise ModelError(f"--models {models}: no such folder; give one that holds trained models.")
    reasons: list[str] = []
    for folder in (models, STARTER):
        pairs, broken = ([], []) if folder is None else pairs_in(folder, task, dataset)
        problems = [misfit(pair, images) for pair in pairs]
        fitting = [pair for pair, problem in zip(pairs, problems, strict=True) if not problem]
        if len(fitting) > 1:
            names = ", ".join(pair.folder.name for pair in fitting)
            raise ModelError(f"--dataset: several models in {folder} fit the images; give one of {names}.")
        if fitting:
            check_fit(fitting[0].diffusion, fitting[0].guide)
            return fitting[0]
        if broken:
            raise broken[0]
        reasons += problems
    here, named = models or "knife's own", f" under the name {dataset}" if dataset else ""
    advice = f"run `knife train diffusion` and `knife train {task}`, or see `knife models list`"
    raise ModelError(reasons[0] if reasons else f"task {task}: no trained models in {here}{named}; {advice}.")


def pairs_in(models: Path, task: str, dataset: str | None) -> tuple[list[Pair], list[ModelError]]:
    """Return the diffusion models in a folder that have a guide of the task beside them, and what cannot be read."""
    pairs, broken = [], []
    for folder in sorted(place for place in models.glob("*") if dataset in (None, place.name)):
        files = [folder / f"{kind}.safetensors" for kind in ("diffusion", task)]
        if all(os.path.lexists(file) for file in files):
            try:
                pairs.append(Pair(*map(described, files)))
            except ModelError as error:
                broken.append(error)
    return pairs, broken


def described(file: Path) -> Stored:
    """Read the card of a model that must be of the kind its file is named by.

    Raises:
        ModelError: if it cannot be read or is of another kind.
    """
    stored = describe(file)
    if stored.card.kind != file.stem:
        raise ModelError(f"{file}: a model of kind {stored.card.kind} under the wrong name; rename it, or remove it.")
    return stored


def misfit(pair: Pair, images: Sequence[Image]) -> str:
    """Say why a model does not fit the images, or nothing if it does."""
    wanted = pair.diffusion.card.spec.channels
    whose = f"the shipped model {pair.folder.name}" if pair.shipped else f"{pair.folder}"
    trained = f"but {whose} was trained on {len(wanted)} ({', '.join(wanted)})"
    for image in images:
        found, name = image.channels, image.source.paths[0].name
        if len(found) != len(wanted):
            count = f"{len(found)} channel{'s' * (len(found) != 1)}"
            return f"{name}: {count}, {trained}; give such an image, or a folder with one file for each."
        if found != wanted and not (unnamed(found) or unnamed(wanted)):
            return f"{name}: its channels are {', '.join(found)}, {trained}; give such an image."
    return ""


def unnamed(channels: Sequence[str]) -> bool:
    """Tell whether channels have numbers for names, because no file told any."""
    return all(name.isdigit() for name in channels)


def model_record(stored: Stored) -> dict[str, Any]:
    """Return what a record says of a model: which it is, how long it was trained, and the hash of its file."""
    about = {"dataset": stored.card.dataset, "kind": stored.card.kind, "steps": stored.card.training.get("step")}
    return {**about, "sha256": digest(stored.path)}
