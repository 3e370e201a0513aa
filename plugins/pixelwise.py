"""What is told of a whole image by looking at each of its pixels: for labels that come from a mask.

A network that answers with one number is easily pleased: guided by it, an image comes to have the wanted number for it
and for nobody else. A U-Net that must say of every pixel whether it is of the mask has to be shown a tumour. So where
masks are known, regress and classify learn the mask and count it.

A label is two maps [2, H, W]: the mask, and the brain that its size is relative to. A target is made of even maps: the
mask's is the wanted size, the brain's is 1, so that both are read alike.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from knife.errors import InputError

if TYPE_CHECKING:
    from knife.data import Case

MAPS = 2  # mask and brain; a config that names them belongs to a network that sees pixel by pixel


class Pixelwise(nn.Module):
    """A U-Net with two outputs, the logits of mask and brain: net(x [N, C, H, W], t [N]) -> [N, 2, H, W]."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the logits of both maps."""
        logits: Tensor = self.unet(x, t)[:, :MAPS]
        return logits


def loss(logits: Tensor, maps: Tensor) -> Tensor:
    """Return the binary cross-entropy of both maps, [N, 2, H, W]."""
    return F.binary_cross_entropy_with_logits(logits, maps)


def maps_of(case: "Case") -> Tensor:
    """Return a case's mask and brain, [2, H, W]."""
    if case.mask is None:
        raise InputError(f"{case.name}: has no mask, though others have one.")
    return torch.cat([case.mask.float(), brain_of(case)[None].float()])


def brain_of(case: "Case") -> Tensor:
    """Return where any channel is above its background, [H, W] bool."""
    floor = case.pixels.amin((1, 2), keepdim=True)
    return (case.pixels > floor + 0.05 * (case.pixels.amax((1, 2), keepdim=True) - floor)).any(0)


def even_maps(size: float, shape: tuple[int, int]) -> Tensor:
    """Return the target maps of a relative size, [2, H, W]."""
    return torch.stack([torch.full(shape, size), torch.ones(shape)])


def sizes(maps: Tensor) -> Tensor:
    """Return the sizes of masks relative to the brain, [N], of maps [N, 2, H, W] from 0 to 1."""
    mask, brain = maps.flatten(2).mean(2).unbind(1)
    return mask / brain.clamp(min=1e-6)
