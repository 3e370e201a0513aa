"""A task for knife: how bright an image is, the mean of its first channel.

A small task that works, to be turned into yours. Its heart is `guide`: a number for each image, higher the better the
image fits its target. knife adds the noise, differentiates, scales and steps.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from knife import hookimpl
from knife.errors import TargetError

if TYPE_CHECKING:
    from knife.data import Case
    from knife.spec import ImageSpec


def brightness(case: "Case") -> float:
    """Return the mean of the first channel, in the model's value range. Yours may read case.mask or case.values."""
    return float(case.pixels[0].mean())


@hookimpl
def configure(cases: "Sequence[Case]") -> dict[str, Any]:
    """Remember the range of the labels; the dict is stored with the network, and every other hook may ask for it."""
    values = [brightness(case) for case in cases]
    return {"low": min(values), "high": max(values), "mean": fmean(values), "std": pstdev(values) or 1.0}


@hookimpl
def label(case: "Case", config: Mapping[str, Any]) -> Tensor:
    """Return what the network learns to predict of a case: here in standard units, which train well."""
    return torch.tensor((brightness(case) - config["mean"]) / config["std"])


@hookimpl
def build(image_spec: "ImageSpec") -> nn.Module:
    """Build the network, called as net(x [N, C, H, W], t [N]); build_unet(1) predicts an image instead of a number."""
    return image_spec.build_encoder(1)


@hookimpl
def train(net: nn.Module, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
    """Return the loss over a batch of noised images, to descend over the weights."""
    return F.mse_loss(net(x, t)[:, 0], label)


@hookimpl
def target(text: str, config: Mapping[str, Any]) -> Tensor:
    """Turn the word after --target into a tensor of the same form as a label."""
    wanted = f"give a number from {config['low']:.3g} to {config['high']:.3g}"
    try:
        number = float(text)
    except ValueError:
        raise TargetError(f"--target {text}: not a number; {wanted}.") from None
    if not config["low"] <= number <= config["high"] and not config.get("extrapolate"):
        advice = f"{wanted}, or allow it with --allow-extrapolation"
        raise TargetError(f"--target {text}: outside the images that the network has seen; {advice}.")
    return torch.tensor((number - config["mean"]) / config["std"])


@hookimpl
def guide(net: nn.Module, x: Tensor, t: Tensor, target: Tensor) -> Tensor:
    """Return how well each noised image fits its target, [N], to climb over the pixels; below 0, 0 is best."""
    distance: Tensor = net(x, t)[:, 0] - target
    return -0.5 * distance**2


@hookimpl
def evaluate(net: nn.Module, x: Tensor, t: Tensor, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return numbers [N] for the report; optional, as configure is."""
    return {"$name": net(x, t)[:, 0] * config["std"] + config["mean"]}


@hookimpl
def error(net: nn.Module, x: Tensor, t: Tensor, target: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Return how far each image is from its target, [N]: knife adjusts its guidance until this is small; optional."""
    distance: Tensor = (net(x, t)[:, 0] - target).abs() * config["std"]
    return distance


@hookimpl
def value(case: "Case") -> float:
    """Return the label as the number that evaluate tells: knife evaluate sets one against the other; optional."""
    return brightness(case)
