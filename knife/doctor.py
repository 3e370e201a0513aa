"""What this machine offers and which ops run, and what a file is."""

import importlib.util
import os
import platform
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from knife import __version__, ops
from knife.checkpoint import describe, digest
from knife.devices import resolve_device
from knife.errors import KnifeError
from knife.image import read
from knife.tasks import plugins


def examine() -> dict[str, Any]:
    """Return named facts of this machine, each a short text; `healthy` tells whether knife can work here."""
    device, why = resolve_device("auto")
    rows = plugins()
    broken = [f"{row.task}: {row.status}" for row in rows if not row.usable]
    return {
        "knife": __version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "device": f"{device}: {why}",
        "threads": torch.get_num_threads(),
        **ops_facts(),
        "compiler": next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), "none"),
        "nvcc": shutil.which("nvcc") or "none",
        "tasks": ", ".join(row.task for row in rows if row.usable) or "none",
        "broken plugins": "; ".join(broken) or "none",
        "tensorboard": "installed" if importlib.util.find_spec("tensorboard") else "not installed (an extra)",
        "write here": writable(Path()),
        "healthy": any(row.usable for row in rows),
    }


def ops_facts() -> dict[str, Any]:
    """Return which ops run and why, and how a step of theirs compares with the reference."""
    try:
        status = ops.status()
        return {"ops": f"{status.path}: {status.reason}", "self-test": ops.self_test()}
    except KnifeError as error:
        return {"ops": str(error), "self-test": "not run"}


def writable(folder: Path) -> str:
    """Say whether files can be written in a folder, and how much room is left."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return f"no: {error.strerror}"
    return f"yes, {shutil.disk_usage(folder).free / 2**30:.0f} GiB free" if os.name == "posix" else "yes"


def about_file(path: Path) -> dict[str, Any]:
    """Return what a file is: the card of a stored model, or the channels and intensities of an image.

    Raises:
        KnifeError: if it is neither.
    """
    if path.suffix == ".safetensors":
        card = describe(path).card.to_json()
        parameters = sum(p.numel() for p in describe(path).card.build().parameters())
        return {"file": path.name, "sha256": digest(path), "parameters": parameters, **card}
    image = read(path)
    return {
        "file": path.name,
        "channels": list(image.channels),
        "size": list(image.pixels.shape[1:]),
        "low": [round(v, 4) for v in image.pixels.amin((1, 2)).tolist()],
        "high": [round(v, 4) for v in image.pixels.amax((1, 2)).tolist()],
        "window": image.window.tolist(),
        "synthetic": image.source.synthetic,
    }
