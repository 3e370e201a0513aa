"""Several processes that train one network: torchrun starts them, and each computes its part of every batch.

All make the same draws for the whole batch and take every n-th row of it, so that their gradients add up to those of
one process. The first of them alone tells, writes and keeps.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
from torch import Tensor, distributed, nn

from knife.errors import DeviceError

PATIENCE = timedelta(hours=2)  # that the others wait, as for the first to read a large folder
HANGS, STEPS = 60.0, 200  # seconds, and steps' time, after which one that is silent on the way counts as dead


@dataclass(frozen=True)
class Team:
    """How many processes there are, and which of them this is."""

    number: int = 0
    count: int = 1
    device: str = "cpu"  # on which what they tell each other must lie
    group: distributed.ProcessGroup | None = None  # None: the one that waits long

    @property
    def first(self) -> bool:
        """Tell whether this one tells, writes and keeps."""
        return self.number == 0

    def part(self, rows: Tensor) -> Tensor:
        """Return this one's rows, of those of the whole batch."""
        return rows[self.number :: self.count]

    def total(self, value: float) -> float:
        """Return the sum of what all have."""
        if self.count == 1:
            return value
        return self.summed(torch.tensor([value], dtype=torch.float64, device=self.device)).item()

    def summed(self, value: Tensor) -> Tensor:
        """Return the same of a tensor on the device, for which the host does not wait."""
        if self.count == 1:
            return value
        whole = value.clone()
        with in_touch():
            distributed.all_reduce(whole, group=self.group)
        return whole

    def add_gradients(self, net: nn.Module) -> None:
        """Give every parameter the sum of all gradients."""
        if self.count == 1:
            return
        parameters = [p for p in net.parameters() if p.requires_grad]
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        grads = [p.grad for p in parameters if p.grad is not None]
        whole = torch.cat([g.flatten() for g in grads])
        with in_touch():
            distributed.all_reduce(whole, group=self.group)
        for g, summed in zip(grads, whole.split([g.numel() for g in grads]), strict=True):
            g.copy_(summed.view_as(g))

    def hurried(self, seconds_a_step: float) -> "Team":
        """Return the team on its way: nobody takes long from step to step, not even the first to keep what was done."""
        if self.count == 1:
            return self
        with in_touch():
            group = distributed.new_group(timeout=timedelta(seconds=max(HANGS, STEPS * seconds_a_step)))
        return replace(self, group=group)

    @contextmanager
    def after_the_first(self) -> Iterator[None]:
        """Wait until the first has done what follows, so that the others find it done."""
        if not self.first:
            self.total(0)
        yield
        if self.first:
            self.total(0)


ALONE = Team()


@contextmanager
def team(device: str) -> Iterator[Team]:
    """Join the other processes that torchrun has started, if it has.

    Raises:
        DeviceError: if they do not answer, or one ends before the others.
    """
    count = processes()
    if count == 1:
        yield ALONE
        return
    with in_touch():
        distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=PATIENCE)
    try:
        yield Team(distributed.get_rank(), count, device)
    finally:
        distributed.destroy_process_group()


@contextmanager
def in_touch() -> Iterator[None]:
    """Turn the loss of another process into a refusal.

    Raises:
        DeviceError: if another process does not answer.
    """
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise DeviceError(
            f"torchrun: another process of this training has ended or does not answer "
            f"({' '.join(str(error).split())[:120]}); see what it said. The same command resumes."
        ) from error


def processes() -> int:
    """Return how many processes torchrun has started."""
    told = os.environ.get("WORLD_SIZE", "")
    return int(told) if told.isdecimal() else 1


def own_device(text: str) -> str:
    """Return what --device means to this process: of several on a machine each has a GPU of its own."""
    if processes() > 1 and text in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return text


def leads() -> bool:
    """Tell whether this process speaks for all that torchrun has started, or is alone."""
    return os.environ.get("RANK", "0") == "0"
