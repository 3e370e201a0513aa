"""Regression: an age, a relative tumour size, any number (Algorithm 1).

The network predicts the label in standard units, (value - mean)/std, so that one guidance scale means the same for
years and for fractions. A target of + or - asks for more or less without end (section 4.1 of the paper) and stands as
an infinite value.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from knife.errors import InputError, TargetError
from knife.hookspecs import hookimpl

if TYPE_CHECKING:
    from knife.data import Case
    from knife.spec import ImageSpec

TUMOUR = "relative size of the mask"


@hookimpl
def configure(cases: "Sequence[Case]", label: str | None) -> dict[str, Any]:
    """Choose the label (a column of numbers, else the mask's share of the brain), and remember its range."""
    masks = any(case.mask is not None for case in cases)
    name = label or next(iter(numeric_columns(cases)), TUMOUR if masks else None)
    if name is None:
        raise InputError(
            "regress: the data hold neither numbers nor masks to learn from; give a manifest with a column of numbers."
        )
    values = [found for case in cases if (found := value_of(case, name)) is not None]
    if not values:
        raise InputError(f"regress: no image has a number as {name}; give another --label.")
    return {
        "label": name,
        "low": min(values),
        "high": max(values),
        "mean": fmean(values),
        "std": pstdev(values) or 1.0,
    }


@hookimpl
def label(case: "Case", config: Mapping[str, Any]) -> Tensor:
    """Return the case's value in standard units."""
    name = config["label"]
    found = value_of(case, name)
    if found is None:
        raise InputError(f"{case.name}: {name} is {case.values.get(name, 'missing')}, and no number.")
    return torch.tensor((found - config["mean"]) / config["std"])


@hookimpl
def build(image_spec: "ImageSpec") -> nn.Module:
    """Build the encoder half of the U-Net with one output."""
    return image_spec.build_encoder(1)


@hookimpl
def train(net: nn.Module, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
    """Return the mean squared error."""
    return F.mse_loss(net(x, t)[:, 0], label)


@hookimpl
def target(text: str, config: Mapping[str, Any]) -> Tensor:
    """Read a number in the label's own unit, + or -."""
    if text in ("+", "-"):
        return torch.tensor(float(f"{text}inf"))
    low, high = config["low"], config["high"]
    wanted = f"give a number from {low:g} to {high:g} ({config['label']}), + for more or - for less"
    try:
        number = float(text)
    except ValueError:
        raise TargetError(f"--target {text}: not a number; {wanted}.") from None
    if not low <= number <= high and not (config.get("extrapolate") and math.isfinite(number)):
        advice = f"{wanted}, or allow it with --allow-extrapolation"
        raise TargetError(f"--target {text}: outside the values the model was trained on; {advice}.")
    return torch.tensor((number - config["mean"]) / config["std"])


@hookimpl
def guide(net: nn.Module, x: Tensor, t: Tensor, target: Tensor) -> Tensor:
    """Return -1/2 (R - v)^2, whose gradient is c grad R with c = v - R; towards infinity, the prediction itself."""
    prediction: Tensor = net(x, t)[:, 0]
    distance = -0.5 * (prediction - target.nan_to_num(posinf=0, neginf=0)) ** 2
    return torch.where(target.isinf(), target.sign() * prediction, distance)


@hookimpl
def evaluate(net: nn.Module, x: Tensor, t: Tensor, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the predicted value in the label's own unit."""
    return {"value": net(x, t)[:, 0] * config["std"] + config["mean"]}


@hookimpl
def error(net: nn.Module, x: Tensor, t: Tensor, target: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Return |prediction - target| in the label's own unit."""
    distance: Tensor = (net(x, t)[:, 0] - target).abs() * config["std"]
    return distance


def numeric_columns(cases: "Sequence[Case]") -> Iterator[str]:
    """Yield the columns in which at least half of the cases have a finite number."""
    fullest_first = sorted(cases, key=lambda case: -len(case.values))  # it has the columns in their order
    for name in dict.fromkeys(name for case in fullest_first for name in case.values):
        if sum(number_of(case.values.get(name)) is not None for case in cases) >= len(cases) / 2:
            yield name


def number_of(text: str | None) -> float | None:
    """Return a text as a finite number, or None if it is none."""
    try:
        number = math.nan if text is None else float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def value_of(case: "Case", name: str) -> float | None:
    """Return a case's number, of a column or the mask's area over the brain's; None if it has none."""
    if name != TUMOUR:
        return number_of(case.values.get(name))
    if case.mask is None:
        return None
    floor = case.pixels.amin((1, 2), keepdim=True)  # the brain is all that is not background
    brain = (case.pixels > floor + 0.05 * (case.pixels.amax((1, 2), keepdim=True) - floor)).any(0)
    return float(case.mask.sum() / brain.sum().clamp(min=1))
