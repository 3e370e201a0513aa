"""Stored models: one safetensors file holds the weights and a card that says what they are.

They lie in `models/<dataset>/<kind>.safetensors`, judges in `<kind>.judge.safetensors` beside them. No pickle is ever
read here, so a stranger's file can do no harm. A hash beside the card tells if a bit has changed on the disk.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor, nn

from knife import files
from knife.devices import ran_out_of_memory
from knife.errors import DiskError, KnifeError, ModelError, UnreadableError
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
    guidance: Mapping[str, float] = field(default_factory=dict)  # measured: the score's steepness, the error
    training: Mapping[str, Any] = field(default_factory=dict)  # steps, settings, data, versions
    calibration: Mapping[str, Any] = field(default_factory=dict)  # measured on images set apart: errors by noise level
    judge: bool = False  # trained on clean images to measure results, never to guide

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
            "calibration": dict(self.calibration),
            "judge": self.judge,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Card":
        """Rebuild a card from `to_json`.

        Raises LookupError, TypeError, ValueError, AttributeError, ArithmeticError or KnifeError if they are no card's.
        """
        for name, kind in {"kind": str, "dataset": str, "config": dict, "guidance": dict, "training": dict}.items():
            if not isinstance(values[name], kind):
                raise TypeError(f"{name} is {values[name]!r}")
        schedule = Schedule(values["schedule"]["kind"], values["schedule"]["T"])
        return cls(
            values["kind"],
            values["dataset"],
            ImageSpec.from_json(values["spec"]),
            schedule,
            values["config"],
            values["guidance"],
            values["training"],
            values.get("calibration", {}),
            values.get("judge", False),
        )

    def build(self) -> nn.Module:
        """Build the network the card describes, with fresh weights.

        Raises:
            TaskError: if the task's plugin is not there or broken.
        """
        if self.kind == "diffusion":
            return self.spec.build_unet(2 * len(self.spec.channels))  # eps and the v of a learned sigma
        return task(self.kind).build(self.spec, self.config)


def file_name(kind: str, judge: bool = False) -> str:
    """Return the name of a model's file; the dot keeps a judge apart from tasks, whose names have none."""
    return f"{kind}.judge.safetensors" if judge else f"{kind}.safetensors"


@dataclass(frozen=True)
class Stored:
    """A stored model by its card; the weights are read when they are asked for."""

    path: Path
    card: Card


# -------------------------------------------------------------------------------------------------------------- writing


def write_safely(path: Path, data: bytes, before: Path | None = None) -> None:
    """Write a file so that after a crash either the old or the new one is there, whole.

    before: where the old file goes, if it shall be kept.

    Raises:
        DiskError: if the disk is full or the folder cannot be written to; the old file stays.
    """
    try:
        files.write_safely(path, data, before)
    except OSError as error:
        raise DiskError(f"{path}: cannot be written ({error.strerror or error}); make room, or allow it.") from error


def save(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any], before: Path | None = None) -> None:
    """Write tensors and a JSON description as one safetensors file, with a hash over both.

    before: where the old file goes, if it shall be kept.

    Raises:
        DiskError: if the disk is full or the folder cannot be written to; the old file stays.
    """
    stored = {k: t.detach().cpu().clone(memory_format=torch.contiguous_format) for k, t in tensors.items()}
    plain = json.loads(json.dumps(about))  # lists for tuples and texts for keys, as they will be read
    text = json.dumps({**plain, "sha256": seal(plain, stored)})
    write_safely(path, serialise(stored, {"knife": text}), before)


def seal(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over a description and tensors on the CPU, names and shapes included."""
    text = json.dumps({k: v for k, v in about.items() if k != "sha256"}, sort_keys=True)
    hashed = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        hashed.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        hashed.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()


# -------------------------------------------------------------------------------------------------------------- reading


@contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Tell a file that is missing or damaged from one that the disk refuses to read; memory that runs out is neither.

    Raises:
        ModelError: if it is missing or damaged.
        UnreadableError: if the disk refuses.
    """
    try:
        if not path.is_file():
            raise ModelError(f"{path}: no such file; check the name, or train the model first.")
        with path.open("rb") as file:  # safetensors calls all that cannot be opened missing
            length = int.from_bytes(file.read(8), "little")
        if length > LONGEST_HEADER:  # safetensors refuses it too, but maps the file first
            raise ModelError(f"{path}: {DAMAGED} (a header of {length} bytes).")
        yield
    except OSError as error:
        reason = f"cannot be read ({error.strerror or error})"
        raise UnreadableError(f"{path}: {reason}; allow it, or look after the disk, and try again.") from error
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:  # a RecursionError is one too
        if ran_out_of_memory(error):
            raise
        raise ModelError(f"{path}: {DAMAGED} ({type(error).__name__}).") from error


def read_about(path: Path) -> dict[str, Any]:
    """Read the JSON description of a file that `save` wrote.

    Raises:
        ModelError: if the file is missing, damaged, or not knife's.
        UnreadableError: if the disk refuses.
    """
    with refusing(path), safe_open(path, "pt") as file:
        about = json.loads((file.metadata() or {})["knife"])
    if not isinstance(about, dict):
        raise ModelError(f"{path}: {DAMAGED} (it describes itself as a {type(about).__name__}).")
    return about


DAMAGED = "not written by knife, or damaged; copy it anew or remove it"
LONGEST_HEADER = 100_000_000  # bytes, as safetensors has it


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a file that `save` wrote.

    Raises:
        ModelError: if the file is missing, damaged, or a bit of it has changed since it was written.
        UnreadableError: if the disk refuses.
    """
    about = read_about(path)
    with refusing(path), safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - a safe_open is no dict
    if about.get("sha256") != seal(about, tensors):
        raise ModelError(f"{path}: {DAMAGED} (its checksum differs).")
    return tensors


def describe(path: Path) -> Stored:
    """Read the card of a stored model.

    Raises:
        ModelError: if the file is missing, damaged, not a model of knife, or of a later format.
    """
    about = read_about(path)
    if "format" not in about:
        raise ModelError(f"{path}: has no card, so it is no model; give a file that knife models list shows.")
    if about["format"] != FORMAT:
        raise ModelError(f"{path}: card of format {about['format']!r}, this knife reads {FORMAT}; update knife.")
    try:
        return Stored(path, Card.from_json(about))
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, KnifeError) as error:
        raise ModelError(f"{path}: its card is damaged ({type(error).__name__}: {error}).") from error


def load(stored: Stored, device: torch.device | str = "cpu") -> nn.Module:
    """Build a stored network with its weights: in float32, frozen, ready to be asked.

    Raises:
        ModelError: if the file is damaged or the weights do not fit the card.
        TaskError: if the task's plugin is not there or broken.
    """
    weights = read_tensors(stored.path)
    refuse_larger(stored, sum(tensor.numel() for tensor in weights.values()))
    try:
        net = stored.card.build()
        net.load_state_dict(weights)  # copied into float32, whatever they were stored in
    except KnifeError:
        raise
    except Exception as error:  # a damaged card may ask for a network that cannot be built in many ways
        if ran_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200].rstrip(" .")
        raise ModelError(f"{stored.path}: its weights do not fit its card: {reason}.") from error
    return ready(net, device).eval().requires_grad_(False)


def refuse_larger(stored: Stored, count: int) -> None:
    """Refuse a card that asks for more weights than its file has, before they get memory.

    Raises:
        ModelError: naming both.
    """
    wanted = 0
    with torch.device("meta"), suppress(Exception):  # what cannot be built is refused when it is built
        wanted = sum(tensor.numel() for tensor in stored.card.build().state_dict().values())
    if wanted > count:
        raise ModelError(f"{stored.path}: its weights do not fit its card, {count} instead of {wanted}; copy it anew.")


def ready(net: nn.Module, device: torch.device | str) -> nn.Module:
    """Move a network to a device, its weights laid out as convolutions like them best."""
    move: Any = net.to  # the declared types leave out memory_format
    moved: nn.Module = move(device, memory_format=torch.channels_last)
    return moved


def load_model(path: str | Path, device: torch.device | str = "cpu") -> nn.Module:
    """Load a stored network, called as net(x [N, C, H, W], t [N]).

    Raises:
        ModelError: if the file is missing, damaged, or not a model of knife.
        TaskError: if the task's plugin is not there or broken.
    """
    return load(describe(Path(path)), device)


def digest(path: Path) -> str:
    """Return the SHA-256 of a file.

    Raises:
        ModelError: if it cannot be read.
    """
    try:
        return files.sha256_of(path)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}).") from error


# -------------------------------------------------------------------------------------------------------------- folders


def stored_models(models: Path, skip: Callable[[ModelError], None] | None = None) -> list[Stored]:
    """Return every model of a models folder, sorted by data set and kind; training states are no models.

    `skip` hears of each file that cannot be read; without it the first of them raises.

    Raises:
        ModelError: if there is such a file and no `skip`.
    """
    found = []
    for path in sorted(p for p in models.glob("*/*.safetensors") if not p.name.endswith(".resume.safetensors")):
        try:
            found.append(describe(path))
        except ModelError as error:
            if skip is None:
                raise
            skip(error)
    return found


def check_fit(diffusion: Stored, guide: Stored) -> None:
    """Refuse a guide that was trained on other images or levels than the diffusion model.

    Raises:
        ModelError: naming every difference.
    """
    its, wanted = (terms(stored.card) for stored in (guide, diffusion))
    differences = [f"{key} {its[key]} against {wanted[key]}" for key in wanted if its[key] != wanted[key]]
    if differences:
        raise ModelError(
            f"{guide.path}: does not fit {diffusion.path}: {'; '.join(differences)}. Train it on the same settings."
        )


def terms(card: Card) -> dict[str, str]:
    """Return in words what a diffusion model and its guides must agree on."""
    low, high = card.spec.value_range
    return {
        "schedule": f"{card.schedule.kind} of {card.schedule.T} levels",
        "channels": ", ".join(card.spec.channels),
        "size": "{} x {}".format(*card.spec.size),
        "value range": f"{float(low)} to {float(high)}",
        "images": "cropped" if card.spec.crop else "padded",
    }
