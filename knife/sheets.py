"""How good a network in training is: what its card tells of it, and the sheet that shows it."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from knife.checkpoint import Card
from knife.ddim import decode, slope
from knife.job import CURVE, SHEET, STEEPNESS, Job, generator, loss_of, stacked
from knife.panel import curve, grid
from knife.schedule import alpha_bar_on, noise, path, timestep
from knife.tasks import Task


@torch.no_grad()
def samples(net: nn.Module, card: Card, count: int = 8, steps: int = 50) -> bytes:
    """Draw a sheet of images made from nothing but noise, the same noise every time."""
    device = next(net.parameters()).device
    shape = (count, len(card.spec.channels), *card.spec.size)
    x = torch.randn(shape, generator=generator(0, 0, SHEET)).to(device)
    x = decode(net, x, card.schedule, path(card.schedule.T, steps), clamp=card.spec.value_range)
    return grid(x.cpu(), card.spec.value_range)


def measured(job: Job, kind: Task, net: nn.Module) -> dict[str, float]:
    """Return what the card tells of a task network: how steep a guide's score is, and its errors at level 0.

    error: the mean distance of images from their labels. chance: that from other images' labels, what guessing would
    err by. Of images that were trained on, none is told: it would be too small.
    """
    found = {} if job.run.judge else {"gradient": steepness(job, kind, net)}
    for name, roll in {"error": 0, "chance": 1}.items() if job.set_apart else ():
        errors = clean_errors(job, kind, net, roll)
        if errors is not None and bool(errors.isfinite().all()):  # a distance to an empty mask may have no end
            found[name] = float(errors.mean())
    return found


@torch.no_grad()
def clean_errors(job: Job, kind: Task, net: nn.Module, roll: int = 0) -> Tensor | None:
    """Return how far from the truth each validation image is told at noise level 0, [N], in the user's units.

    It is how well the network can tell at all; rolled, how far from the truth about another image. None if the task has
    no hook for it.
    """
    config = job.card.config
    parts = [kind.error(net, x, timestep(at_level(0, x)), y, config) for x, y, _ in validation(job, CURVE, roll)]
    told = [part.float().cpu() for part in parts if part is not None]
    return torch.cat(told) if told else None


def sheet_of(job: Job, kind: Task, net: nn.Module) -> bytes:
    """Draw how good a task network is: a guide at every noise level, a judge from its best to its worst image."""
    if not job.run.judge:
        return error_curve(job, kind, net)
    errors, what = clean_errors(job, kind, net), "error"
    if errors is None:
        errors, what = clean_losses(job, kind, net), "loss"
    best_first = errors.sort().values.tolist()
    return curve(range(1, len(best_first) + 1), best_first, "images, best to worst,", f"judge of {kind.name}: {what}")


@torch.no_grad()
def clean_losses(job: Job, kind: Task, net: nn.Module) -> Tensor:
    """Return the loss of each validation image at noise level 0, [N]."""
    parts = [(x[i : i + 1], y[i : i + 1]) for x, y, _ in validation(job, CURVE) for i in range(len(x))]
    return torch.stack([kind.train(net, x, timestep(at_level(0, x)), y).cpu() for x, y in parts])


@torch.no_grad()
def error_curve(job: Job, kind: Task, net: nn.Module) -> bytes:
    """Draw the validation loss of a task against the noise level."""
    loss = loss_of(kind, job.card.schedule)
    levels = path(job.card.schedule.T, 10)[1:]
    losses = []
    for level in levels:
        parts = [(loss(net, x0, y, at_level(level, x0), eps), len(x0)) for x0, y, eps in validation(job, CURVE)]
        losses.append(sum(float(value) * count for value, count in parts) / len(job.validation))
    return curve(levels, losses, "noise level", f"{kind.name}: validation loss")


def steepness(job: Job, kind: Task, net: nn.Module) -> float:
    """Measure how steep a task's score is: the median size of sqrt(1 - ab) g against eps, whose size is 1 a pixel.

    Every image is pulled towards the label of another. The inverse of this number is the scale at which guidance is as
    large as the noise prediction, which is what makes a scale portable between data sets and tasks.
    """
    sizes = []
    for level in path(job.card.schedule.T // 2, 5)[1:]:
        for x0, wanted, eps in validation(job, STEEPNESS, roll=1):
            k = at_level(level, x0)
            ab = alpha_bar_on(job.card.schedule, x0.device)[k]
            g = slope(kind.score(net, wanted), noise(x0, eps, ab), timestep(k)).gradient
            sizes.append((1 - ab).sqrt() * g.flatten(1).square().mean(1).sqrt())
    return float(torch.cat(sizes).median())


def validation(job: Job, purpose: int, roll: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield images, labels (of another image, if rolled) and noise, always the same, as many at once as in a step."""
    x0, labels = stacked(job.validation)
    eps = torch.randn(x0.shape, generator=generator(0, 0, purpose))
    for part in torch.split(torch.arange(len(x0)), job.run.at_once):
        x, y, e = (tensor[part].to(job.run.device) for tensor in (x0, labels.roll(roll, 0), eps))
        yield x, y, e


def at_level(level: int, x0: Tensor) -> Tensor:
    """Return one noise level for each image, [N]."""
    return torch.full((len(x0),), level, device=x0.device)
