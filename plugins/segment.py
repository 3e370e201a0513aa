"""Segmentation: a mask where something shall be (Algorithm 2)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from knife.errors import InputError, TargetError
from knife.hookspecs import hookimpl
from knife.image import Image
from knife.masks import read_target_mask

if TYPE_CHECKING:
    from knife.data import Case
    from knife.spec import ImageSpec


TOLERANCE = 0.1  # 1 - Dice: a mask met that well is met


@hookimpl
def configure(cases: "Sequence[Case]") -> dict[str, Any]:
    """Check that there are masks to learn from."""
    if all(case.mask is None for case in cases):
        raise InputError("segment: no image has a mask to learn from; put x_mask.png beside x.png.")
    return {"label": "mask", "tolerance": TOLERANCE}


@hookimpl
def label(case: "Case") -> Tensor:
    """Return the case's mask [1, H, W]."""
    if case.mask is None:
        raise InputError(f"{case.name}: has no mask, though the others have one.")
    return case.mask


@hookimpl
def build(image_spec: "ImageSpec") -> nn.Module:
    """Build the U-Net with one output, the logit of the mask."""
    return image_spec.build_unet(1)


@hookimpl
def train(net: nn.Module, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
    """Return the binary cross-entropy."""
    return F.binary_cross_entropy_with_logits(net(x, t)[:, :1], label)


@hookimpl
def target(text: str, image: Image, image_spec: "ImageSpec") -> Tensor:
    """Read a mask, from a file or a shape such as ellipse:120,100,20,15, and bring it onto the model's grid."""
    mask = read_target_mask(text, image)
    placed = image.on_grid(mask, image_spec.size).round()
    if mask.any() and not placed.any():
        size = " x ".join(map(str, image_spec.size))
        raise TargetError(f"--target {text}: vanishes on the model's grid of {size} pixels; give a larger mask.")
    return placed


@hookimpl
def guide(net: nn.Module, x: Tensor, t: Tensor, target: Tensor) -> Tensor:
    """Return minus the binary cross-entropy to the wanted mask."""
    logits = net(x, t)[:, :1]
    return -F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean((1, 2, 3))


@hookimpl
def evaluate(net: nn.Module, x: Tensor, t: Tensor, target: Tensor | None) -> dict[str, Tensor]:
    """Return the share of the image that is segmented, and its Dice overlap with the wanted mask, if there is one."""
    found = (net(x, t)[:, :1] > 0).float()
    area = {"area": found.mean((1, 2, 3))}
    return area if target is None else {**area, "dice": dice(found, target)}


@hookimpl
def error(net: nn.Module, x: Tensor, t: Tensor, target: Tensor) -> Tensor:
    """Return 1 - Dice of what is segmented and the wanted mask."""
    return 1 - dice((net(x, t)[:, :1] > 0).float(), target)


def dice(found: Tensor, wanted: Tensor) -> Tensor:
    """Return the overlap of masks [N, 1, H, W], [N]; two empty ones agree."""
    overlap, areas = (found * wanted).sum((1, 2, 3)), (found + wanted).sum((1, 2, 3))
    return torch.where(areas > 0, 2 * overlap / areas.clamp(min=1), torch.ones_like(areas))
