"""Which models translate an image: a diffusion model, the guide of the task beside it, and who judges the result."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knife.checkpoint import STARTER, Card, Stored, check_fit, describe, digest, file_name, terms
from knife.errors import KnifeError, ModelError
from knife.image import Image
from knife.tasks import Task, task

GUESSING = 0.75  # share of what guessing errs by, above which a guide tells little


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
        files = [folder / file_name(kind) for kind in ("diffusion", task)]
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
    card = stored.card
    if file.name != file_name(card.kind, card.judge):
        what = f"judge of {card.kind}" if card.judge else f"model of kind {card.kind}"
        raise ModelError(f"{file}: a {what} under the wrong name; rename it, or remove it.")
    return stored


def judge_of(pair: Pair) -> Stored | None:
    """Return the judge of a pair's task that lies beside its guide; None if there is none, or it tells something else.

    A judge has a config of its own: it learnt from other patients, whose numbers have another mean and deviation. A
    target made with the guide's config means something else to it, so whoever asks it makes the target anew, with
    `task.target(text, image, judge.card.spec, judge.card.config)`. It was trained on clean images: ask it with t = 0.

    Raises:
        ModelError: if it cannot be read, or is another model under its name.
    """
    file = pair.folder / file_name(pair.guide.card.kind, judge=True)
    if not os.path.lexists(file):
        return None
    judge = described(file)
    return judge if question(judge.card) == question(pair.guide.card) else None


def question(card: Card) -> dict[str, Any]:
    """Return what a network tells of which images: what a guide and its judge have in common.

    Numbers in a config are measured on the images trained on, and differ; words say what was learnt.
    """
    words = {k: v for k, v in card.config.items() if isinstance(v, bool) or not isinstance(v, int | float)}
    images = {k: v for k, v in terms(card).items() if k != "schedule"}  # of levels a judge knows none but the clean one
    return {**images, "config": words, "mask labels": card.training.get("settings", {}).get("mask_labels") or []}


def onlookers(pair: Pair, asked: Sequence[str]) -> list[tuple[Task, Stored]]:
    """Return the other tasks' networks beside a pair, to see what happens to what nobody asked for.

    Those that cannot be read, do not fit or have no plugin are left out: nothing depends on them.
    """
    found = []
    for file in sorted(pair.folder.glob("*.safetensors")):
        kind = file.name.removesuffix(".safetensors")
        if kind == "diffusion" or kind in asked or "." in kind:
            continue
        try:
            stored = described(file)
            check_fit(pair.diffusion, stored)
            found.append((task(kind), stored))
        except KnifeError:
            continue
    return found


def misfit(pair: Pair, images: Sequence[Image]) -> str:
    """Say why a model does not fit the images, or nothing if it does."""
    wanted = pair.diffusion.card.spec.channels
    whose = f"the shipped model {pair.folder.name}" if pair.shipped else f"{pair.folder}"
    trained = f"but {whose} was trained on {len(wanted)} ({', '.join(wanted)})"
    for image in images:
        found, name = image.channels, image.source.paths[0].name
        if len(found) != len(wanted):
            count = f"{len(found)} channel{'s' * (len(found) != 1)}"
            lacking = [] if unnamed(found) else [channel for channel in wanted if channel not in found]
            what = f", {', '.join(lacking)} lacking" if 0 < len(lacking) < len(wanted) else ""
            files = ", or a folder with one file for each" if isinstance(image.source.kind, tuple) else ""
            return f"{name}: {count}{what}, {trained}; give such an image{files}."
        if found != wanted and not (unnamed(found) or unnamed(wanted)):
            return f"{name}: its channels are {', '.join(found)}, {trained}; give such an image."
    return ""


def doubts(pairs: Sequence[Pair]) -> list[str]:
    """Say which guides err, on images set apart from their training, hardly less than guessing would."""
    told = []
    for guide in (pair.guide for pair in pairs):
        error, chance = (guide.card.guidance.get(name, 0.0) for name in ("error", "chance"))
        if error > GUESSING * chance > 0:
            told.append(
                f"{guide.card.dataset}/{guide.path.name}: on images set apart it errs by {error:.3g}, where guessing "
                f"errs by {chance:.3g}; what it guides to means little. Train it further."
            )
    return told


def unnamed(channels: Sequence[str]) -> bool:
    """Tell whether channels have numbers for names, because no file told any."""
    return all(name.isdigit() for name in channels)


def model_record(stored: Stored) -> dict[str, Any]:
    """Return what a record says of a model: which it is, how long it was trained, and the hash of its file."""
    card = stored.card
    about = {"dataset": card.dataset, "kind": card.kind, "judge": card.judge, "steps": card.training.get("step")}
    return {**about, "sha256": digest(stored.path)}
