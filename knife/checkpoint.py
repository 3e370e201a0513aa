"""Stored models: one safetensors file holds the weights and a card that says what they are; `models/<dataset>/<kind>.safetensors`.

No pickle is ever read here, so a stranger's file can do no harm.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor, nn

from knife.errors import KnifeError, ModelError
from knife.schedule import Schedule
from knife.spec import ImageSpec
from knife.tasks import task

FORMAT = 1
STARTER = Path(__file__).parent / "starter"


@dataclass(frozen=True)
class Card:
    """What a stored network is: enough to rebuild it, to use it rightly, and to know where it came from."""

    kind: str  # diffusion, or the name of the task
    dataset: str
    spec: ImageSpec
    schedule: Schedule
    config: Mapping[str, Any] = field(default_factory=dict)  # what a task remembers of its labels
    guidance: Mapping[str, float] = field(default_factory=dict)  # measured with the task: how steep its score is
    training: Mapping[str, Any] = field(default_factory=dict)  # steps, settings, data, versions

    def to_json(self) -> dict[str, Any]:
        """Return the card as plain JSON values."""
        return {
            "format": FORMAT,
            "kind": self.kind,
            "dataset": self.dataset,
            "spec": self.spec.to_json(),
            "schedule": {**asdict(self.schedule), "digest": self.schedule.digest},
            "config": dict(self.config),
            "guidance": dict(self.guidance),
            "training": dict(self.training),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Card":
        """Rebuild a card from `to_json`."""
        schedule = Schedule(values["schedule"]["kind"], values["schedule"]["T"])
        return cls(
            values["kind"],
            values["dataset"],
            ImageSpec.from_json(values["spec"]),
            schedule,
            values["config"],
            values["guidance"],
            values["training"],
        )

    def build(self) -> nn.Module:
        """Build the network the card describes, with fresh weights."""
        if self.kind == "diffusion":
            return self.spec.build_unet(2 * len(self.spec.channels))  # eps and the v of a learned sigma
        return task(self.kind).build(self.spec, self.config)


@dataclass(frozen=True)
class Stored:
    """A stored model by its card; the weights are read when they are asked for."""

    path: Path
    card: Card


def write_safely(path: Path, data: bytes) -> None:
    """Write a file so that after a crash either the old or the new one is there, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write tensors and a JSON description as one safetensors file."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_safely(path, serialise(contiguous, {"knife": json.dumps(about)}))


def read_about(path: Path) -> dict[str, Any]:
    """Read the JSON description of a file that `save` wrote.

    Raises:
        ModelError: if the file is missing, damaged, or not knife's.
    """
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["knife"])
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file.") from None
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ModelError(f"{path}: not a model that knife stored, or damaged ({type(error).__name__}).") from error
    if not isinstance(about, dict):
        raise ModelError(f"{path}: not a model that knife stored.")
    return about


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a file that `save` wrote."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a safe_open is no dict
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: damaged ({type(error).__name__}: {error}).") from error


def describe(path: Path) -> Stored:
    """Read the card of a stored model.

    Raises:
        ModelError: if the file is missing, damaged, not a model of knife, or of a later format.
    """
    about = read_about(path)
    if about.get("format") != FORMAT:
        raise ModelError(f"{path}: card of format {about.get('format')!r}, this knife reads {FORMAT}; update knife.")
    try:
        return Stored(path, Card.from_json(about))
    except (KeyError, TypeError, ValueError, KnifeError) as error:
        raise ModelError(f"{path}: its card is damaged ({type(error).__name__}: {error}).") from error


def load(stored: Stored, device: torch.device | str = "cpu") -> nn.Module:
    """Build a stored network with its weights: in float32, frozen, ready to be asked.

    Raises:
        ModelError: if the weights do not fit the card.
    """
    net = stored.card.build()
    weights = read_tensors(stored.path)
    try:
        net.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    except RuntimeError as error:
        raise ModelError(f"{stored.path}: its weights do not fit its card: {str(error).splitlines()[1].strip()}") from error
    return net.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def load_model(path: str | Path, device: torch.device | str = "cpu") -> nn.Module:
    """Load a stored network, called as net(x [N, C, H, W], t [N]).

    Raises:
        ModelError: if the file is missing, damaged, or not a model of knife.
    """
    return load(describe(Path(path)), device)


def digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stored_models(models: Path) -> list[Stored]:
    """Return every model of a models folder, sorted by data set and kind; training states are no models."""
    paths = sorted(p for p in models.glob("*/*.safetensors") if not p.name.endswith(".resume.safetensors"))
    return [describe(path) for path in paths]


def check_fit(diffusion: Stored, guide: Stored) -> None:
    """Refuse a guide that was trained on other images or levels than the diffusion model.

    Raises:
        ModelError: naming every difference.
    """
    sides = [
        {
            "schedule": s.card.schedule,
            "channels": s.card.spec.channels,
            "size": s.card.spec.size,
            "value range": s.card.spec.value_range,
        }
        for s in (diffusion, guide)
    ]
    differences = [f"{key} {sides[1][key]} against {sides[0][key]}" for key in sides[0] if sides[0][key] != sides[1][key]]
    if differences:
        raise ModelError(f"{guide.path}: does not fit {diffusion.path}: {'; '.join(differences)}. Train it on the same settings.")
