"""Asks the judges that installed plugins offer: programs from elsewhere that read off an image what a guide tells.

A judge is an entry point of the group `knife.judges`. It serves where no trained judge lies beside a guide, and where
it says that it knows what the guide tells. Nothing depends on it: one that fails is left out, and records say why.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from knife.errors import KnifeError, TaskError
from knife.tasks import JUDGES, Plugin, Seen, Task, contained, describe, manager_of, plugins

if TYPE_CHECKING:
    from knife.spec import ImageSpec


@dataclass(frozen=True)
class Witness:
    """Which judge was asked, as records name it."""

    task: str
    name: str
    distribution: str  # of the plugin
    version: str
    origin: str  # what really judges


class Offered(nn.Module):
    """A judge's network, called as the guide's; whatever goes wrong in it becomes a TaskError that names the judge."""

    def __init__(self, witness: Witness, net: nn.Module) -> None:
        super().__init__()
        self.witness, self.net = witness, net

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return what the judge tells of clean images x [N, C, H, W], in the form of the guide's network."""
        who = f"judge {self.witness.name}: its network"
        with contained(who):
            answer = self.net(x, t)
        if not isinstance(answer, Tensor) or len(answer) != len(x) or not bool(answer.isfinite().all()):
            raise TaskError(f"{who} returned {describe(answer)}; it must return a finite answer for each of {len(x)}.")
        return answer.to(x.device)


@dataclass(frozen=True)
class Judge(Seen):
    """A plugin that judges."""

    role: ClassVar[str] = "judge"

    def build(self, task: str, image_spec: "ImageSpec", config: Mapping[str, Any]) -> nn.Module | None:
        """Return a network that tells what a guide tells, or None if the judge knows no such thing."""
        net = self.call("judge", task=task, image_spec=image_spec, config=config)
        if not isinstance(net, nn.Module | None):
            raise self.violation("judge", net, "a torch.nn.Module, called as net(x, t), or None")
        return net

    def origin(self) -> str | None:
        """Return what really judges, if the plugin tells."""
        told = self.call("origin")
        if not isinstance(told, str | None):
            raise self.violation("origin", told, "a text")
        return told


def offered(
    kind: Task, image_spec: "ImageSpec", config: Mapping[str, Any], device: str = "cpu"
) -> tuple[Offered | None, list[str]]:
    """Return the first judge by name that knows what a guide tells, and why others that know it too are left out."""
    reasons = list[str]()
    for row in plugins(group=JUDGES):
        if row.usable:
            try:
                if judge := engaged(row, kind, image_spec, config, device):
                    return judge, reasons
            except KnifeError as error:
                reasons.append(str(error))
    return None, reasons


def engaged(row: Plugin, kind: Task, image_spec: "ImageSpec", config: Mapping[str, Any], device: str) -> Offered | None:
    """Return a plugin's judge if it knows what a guide tells, tried on one grey image before minutes are spent.

    Raises:
        TaskError: if it fails, or answers otherwise than a guide's network.
    """
    judge = Judge(row.task, manager_of(row.module), row.hooks)
    net = judge.build(kind.name, image_spec, config)
    if net is None:
        return None
    origin = judge.origin() or f"{row.distribution} {row.version}"
    witness = Witness(kind.name, row.task, row.distribution, row.version, origin)
    with contained(f"judge {row.task}: its network"):
        answering = Offered(witness, net).to(device).eval().requires_grad_(False)
    grey = torch.full((1, len(image_spec.channels), *image_spec.size), sum(image_spec.value_range) / 2, device=device)
    with torch.no_grad():
        kind.evaluate(answering, grey, torch.zeros(1, device=device), None, config)
    return answering


def judges_record(judges: Sequence[nn.Module], reasons: Sequence[str]) -> dict[str, Any]:
    """Return what records say of those judges that plugins offer, and of those that are left out."""
    told = {
        "judges": [asdict(one.witness) for one in judges if isinstance(one, Offered)],
        "judges_left_out": [*reasons],
    }
    return {name: value for name, value in told.items() if value}
