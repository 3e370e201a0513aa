"""What this machine offers and which ops run, what a file is, and which models there are."""

import importlib.util
import platform
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from knife import __version__, native, ops
from knife.checkpoint import STARTER, Stored, describe, digest, read_tensors, stored_models
from knife.devices import computed_in, keep_freed_memory, resolve_device
from knife.errors import KnifeError, ModelError
from knife.graphs import in_words
from knife.image import NIFTI, Image, Nifti, Picture, read
from knife.tasks import Plugin, plugins
from knife.volume import Volume, axial_count, open_volume

# ------------------------------------------------------------------------------------------------------------- machine


def examine() -> dict[str, Any]:
    """Return named facts of this machine, each a short text; `healthy` tells whether knife can work here."""
    device, why = resolve_device("auto")
    rows, shipped, broken = plugins(), *model_rows(None)
    checks = {f"ops on {kind}": ops_fact(kind) for kind in dict.fromkeys(("cpu", device.split(":")[0]))}
    return {
        "knife": __version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "device": f"{device}: {why}",
        "precision": f"{computed_in(device)}: what networks compute in here (--precision auto)",
        **{name: fact for name, (fact, _) in checks.items()},
        "memory": or_why_not(keep_freed_memory),
        "graphs": or_why_not(in_words),
        "compiler": or_why_not(lambda: " ".join(native.compiler("cpu"))),
        "nvcc": or_why_not(lambda: " ".join(native.compiler("cuda"))),
        "plugins": "; ".join(map(plugin_fact, rows)) or "none",
        "tensorboard": "installed" if importlib.util.find_spec("tensorboard") else "not installed (an extra)",
        "write here": writable(Path()),
        "shipped models": ", ".join(map(model_fact, shipped)) or "none",
        **({"broken models": "; ".join(broken)} if broken else {}),
        "healthy": all(fine for _, fine in checks.values()) and any(row.usable for row in rows) and not broken,
    }


def ops_fact(device: str) -> tuple[str, bool]:
    """Say which ops run on a device type, why, and how far a step of theirs is from plain torch; and if all is well."""
    try:
        status = ops.status(device)
        return f"{status.path} ({status.reason}); self-test: differs by {ops.self_test(device):.1g}", True
    except KnifeError as error:
        return str(error), False


def or_why_not(ask: Callable[[], str]) -> str:
    """Return an answer, or why there is none."""
    try:
        return ask()
    except KnifeError as error:
        return f"none: {error}"


def plugin_fact(row: Plugin) -> str:
    """Say in words what `knife plugins list` says in a row."""
    return f"{row.task} ({row.distribution} {row.version}): {row.status}"


def model_fact(row: Mapping[str, Any]) -> str:
    """Name a model of `knife models list`."""
    return f"{row['dataset']}/{row['kind']}" + " (judge)" * row["judge"]


def writable(folder: Path) -> str:
    """Say whether files can be written in a folder, and how much room is left."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return f"no: {error.strerror}"
    return f"yes, {shutil.disk_usage(folder).free / 2**30:.0f} GiB free"


# -------------------------------------------------------------------------------------------------------------- models


def model_rows(models: Path | None) -> tuple[list[dict[str, Any]], list[str]]:
    """Return a row for each model of a folder, the shipped ones behind them, and why some cannot be read."""
    broken: list[ModelError] = []
    found = [stored for folder in (models, STARTER) if folder for stored in stored_models(folder, broken.append)]
    return [model_row(stored) for stored in found], list(map(str, broken))


def model_row(stored: Stored) -> dict[str, Any]:
    """Return a row of `knife models list`; the data set is the folder's name, the word after --dataset."""
    card = stored.card
    return {
        "dataset": stored.path.parent.name,
        "kind": card.kind,
        "judge": card.judge,
        "channels": list(card.spec.channels),
        "size": list(card.spec.size),
        "learnt": learnt(card.config),
        "steps": card.training.get("step"),
        "path": "shipped" if stored.path.parent.parent == STARTER else str(stored.path),
    }


def learnt(config: Mapping[str, Any]) -> str:
    """Say what a task learnt: its label, with the classes or the range; nothing for a diffusion model."""
    label = str(config.get("label", ""))
    if "classes" in config:
        return f"{label}: {', '.join(map(str, config['classes']))}"
    if "low" in config and "high" in config:
        return f"{label} {config['low']:g} to {config['high']:g}".strip()
    return label


# --------------------------------------------------------------------------------------------------------------- files


def about_file(path: Path) -> dict[str, Any]:
    """Return all that a file tells: the card of a stored model, or what kind of image it is.

    Raises:
        KnifeError: if it is neither.
    """
    if path.suffix == ".safetensors":
        card, weights = describe(path).card, read_tensors(path)
        parameters = sum(tensor.numel() for tensor in weights.values())
        return {"file": path.name, "sha256": digest(path), "parameters": parameters, **card.to_json()}
    if path.name.lower().endswith(NIFTI) and axial_count(path) is not None:
        return about_volume(path, open_volume(path))
    return about_image(path, read(path))


def about_volume(path: Path, volume: Volume) -> dict[str, Any]:
    """Return channels, slices, size, geometry and intensities of a volume."""
    ends = {"lowest": rounded(volume.pixels.amin((1, 2, 3))), "highest": rounded(volume.pixels.amax((1, 2, 3)))}
    return {**about_image(path, volume.slice(0)), "slices": volume.count, **ends}


def about_image(path: Path, image: Image) -> dict[str, Any]:
    """Return channels, size, geometry and intensities of an image."""
    kind = image.source.kind
    return {
        "file": path.name,
        "stored as": f"picture, mode {kind.mode}" if isinstance(kind, Picture) else f"NIfTI, {kind[0].dtype.name}",
        "channels": list(image.channels),
        "size": list(image.pixels.shape[1:]),
        **({} if isinstance(kind, Picture) else {"spacing": spacing(kind[0])}),
        "lowest": rounded(image.pixels.amin((1, 2))),
        "highest": rounded(image.pixels.amax((1, 2))),
        "window": [rounded(ends) for ends in image.window],
        "synthetic": image.source.synthetic,
    }


def spacing(nifti: Nifti) -> list[float]:
    """Return the distance of rows and of columns, in the file's units."""
    return [round(float((step**2).sum() ** 0.5), 4) for step in nifti.frame[:2]]


def rounded(values: torch.Tensor) -> list[float]:
    """Return numbers to six digits."""
    return [float(f"{value:.6g}") for value in values.tolist()]


def summary(about: Mapping[str, Any]) -> dict[str, Any]:
    """Return of `about_file` what a reader wants, in words; an image's facts are few enough as they are."""
    if "kind" not in about:
        return {**about, "window": ["{:g}..{:g}".format(*ends) for ends in about["window"]]}
    spec, training = about["spec"], about["training"]
    settings = training.get("settings", {})
    facts = {
        "file": about["file"],
        "kind": about["kind"] + " (judge)" * about.get("judge", False),
        "data set": about["dataset"],
        "channels": ", ".join(spec["channels"]),
        "size": "{} x {}".format(*spec["size"]),
        "value range": "{:g} to {:g}".format(*spec["value_range"]),
        "schedule": f"{about['schedule']['kind']}, T = {about['schedule']['T']}",
        "learnt": learnt(about["config"]),
        "parameters": about["parameters"],
        "training steps": training.get("step"),
        "loss": training.get("loss"),
        "preset": settings.get("preset"),
        "command": training.get("command"),
        "imported from": training.get("imported"),
        "steepness": about["guidance"].get("gradient"),
        "error on clean images": about["guidance"].get("error"),
        "sha256": about["sha256"],
    }
    return {name: value for name, value in facts.items() if value not in (None, "")}
