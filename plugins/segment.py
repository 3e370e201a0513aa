"""Segmentation: a mask where something shall be (Algorithm 2)."""

import torch
from torch.nn import functional as F

from knife.errors import InputError
from knife.hookspecs import hookimpl
from knife.image import read_mask


@hookimpl
def configure(cases):
    """Check that every case has a mask."""
    without = [case.name for case in cases if case.mask is None]
    if without:
        raise InputError(f"segment: {len(without)} of {len(cases)} images have no mask, {without[0]} among them.")
    return {"label": "mask"}


@hookimpl
def label(case):
    """Return the case's mask [1, H, W]."""
    return case.mask


@hookimpl
def build(image_spec):
    """Build the U-Net with one output, the logit of the mask."""
    return image_spec.build_unet(1)


@hookimpl
def train(net, x, t, label):
    """Return the binary cross-entropy."""
    return F.binary_cross_entropy_with_logits(net(x, t)[:, :1], label)


@hookimpl
def target(text, image, image_spec):
    """Read a mask file on the image's grid."""
    return image.on_grid(read_mask(text, image), image_spec.size).round()


@hookimpl
def guide(net, x, t, target):
    """Return minus the binary cross-entropy to the wanted mask."""
    logits = net(x, t)[:, :1]
    return -F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean((1, 2, 3))


@hookimpl
def evaluate(net, x, t, target):
    """Return the share of the image that is segmented, and its Dice overlap with the wanted mask."""
    found = (net(x, t)[:, :1] > 0).float()
    overlap, areas = (found * target).sum((1, 2, 3)), (found + target).sum((1, 2, 3))
    return {"area": found.mean((1, 2, 3)), "dice": torch.where(areas > 0, 2 * overlap / areas, torch.ones_like(areas))}
