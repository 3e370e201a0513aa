"""Regression: an age, a relative tumour size, any number (Algorithm 1).

The network predicts the label in standard units, (value - mean)/std, so that one guidance scale means the same for
years and for fractions. A target of + or - is the largest or smallest value that it was trained on; what lies beyond,
as the paper's guidance without end (section 4.1), leads to images that no model knows.

The size of a mask is told pixel by pixel (`pixelwise`); `--label "relative size of the mask"` has it told by the
paper's encoder.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

import torch
from knife_plugins.pixelwise import MAPS, Pixelwise, brain_of, even_maps, loss, maps_of, sizes
from torch import Tensor, nn
from torch.nn import functional as F

from knife.errors import InputError, TargetError
from knife.hookspecs import hookimpl

if TYPE_CHECKING:
    from knife.data import Case
    from knife.spec import ImageSpec

TUMOUR = "relative size of the mask"
PIXELS = f"{TUMOUR}, pixel by pixel"  # the same, but counted


class Size(nn.Module):
    """The relative size of the mask in standard units, counted: net(x [N, C, H, W], t [N]) -> [N, 1]."""

    def __init__(self, maps: Pixelwise, mean: float, std: float) -> None:
        super().__init__()
        self.maps, self.mean, self.std = maps, mean, std

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the expected size."""
        return ((sizes(self.maps(x, t).sigmoid()) - self.mean) / self.std)[:, None]

    def standard(self, maps: Tensor) -> Tensor:
        """Return the size that labels or targets [N, 2, H, W] stand for, [N]."""
        return (sizes(maps) - self.mean) / self.std


@hookimpl
def configure(cases: "Sequence[Case]", label: str | None) -> dict[str, Any]:
    """Choose the label (a column of numbers, else the mask's share of the brain), and remember its range."""
    masks = any(case.mask is not None for case in cases)
    label = label or next(iter(numeric_columns(cases)), PIXELS if masks else None)
    name = TUMOUR if label == PIXELS else label
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
        **({"maps": MAPS} if label == PIXELS else {}),
    }


@hookimpl
def label(case: "Case", config: Mapping[str, Any]) -> Tensor:
    """Return the case's value in standard units, or mask and brain."""
    if "maps" in config:
        return maps_of(case)
    name = config["label"]
    found = value_of(case, name)
    if found is None:
        raise InputError(f"{case.name}: {name} is {case.values.get(name, 'missing')}, and no number.")
    return torch.tensor((found - config["mean"]) / config["std"])


@hookimpl
def build(image_spec: "ImageSpec", config: Mapping[str, Any]) -> nn.Module:
    """Build the encoder half of the U-Net with one output; for a mask seen pixel by pixel, the U-Net."""
    if "maps" in config:
        return Size(Pixelwise(image_spec.build_unet(config["maps"])), config["mean"], config["std"])
    return image_spec.build_encoder(1)


@hookimpl
def train(net: nn.Module, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
    """Return the mean squared error, or that of the maps."""
    return loss(net.maps(x, t), label) if isinstance(net, Size) else F.mse_loss(net(x, t)[:, 0], label)


@hookimpl
def target(text: str, image_spec: "ImageSpec", config: Mapping[str, Any]) -> Tensor:
    """Read a number in the label's own unit; + is the largest that the labels had, - the smallest."""
    number = number_wanted(text, config)
    if "maps" in config:
        return even_maps(number, image_spec.size)
    return torch.tensor((number - config["mean"]) / config["std"])


def number_wanted(text: str, config: Mapping[str, Any]) -> float:
    """Read a number within the range of the labels, whose ends are + and -.

    Raises:
        TargetError: if it is none.
    """
    low, high = config["low"], config["high"]
    if text in ("+", "-"):
        return float(high if text == "+" else low)
    wanted = f"give a number from {low:g} to {high:g} ({config['label']}), + for the most or - for the least"
    try:
        number = float(text)
    except ValueError:
        raise TargetError(f"--target {text}: not a number; {wanted}.") from None
    if not low <= number <= high and not (config.get("extrapolate") and math.isfinite(number)):
        advice = f"{wanted}, or allow it with --allow-extrapolation"
        raise TargetError(f"--target {text}: outside the values the model was trained on; {advice}.")
    return number


@hookimpl
def guide(net: nn.Module, x: Tensor, t: Tensor, target: Tensor) -> Tensor:
    """Return -1/2 (R - v)^2, whose gradient is c grad R with c = v - R."""
    score: Tensor = -0.5 * (net(x, t)[:, 0] - standard(net, target)) ** 2
    return score


@hookimpl
def evaluate(net: nn.Module, x: Tensor, t: Tensor, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the predicted value in the label's own unit."""
    return {"value": net(x, t)[:, 0] * config["std"] + config["mean"]}


@hookimpl
def error(net: nn.Module, x: Tensor, t: Tensor, target: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Return |prediction - target| in the label's own unit."""
    distance: Tensor = (net(x, t)[:, 0] - standard(net, target)).abs() * config["std"]
    return distance


@hookimpl
def value(case: "Case", config: Mapping[str, Any]) -> float | None:
    """Return the case's number, if it has one."""
    return value_of(case, config["label"])


def standard(net: nn.Module, target: Tensor) -> Tensor:
    """Return targets or labels as numbers in standard units, [N]."""
    return net.standard(target) if isinstance(net, Size) else target


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
    return float(case.mask.sum() / brain_of(case).sum().clamp(min=1))
