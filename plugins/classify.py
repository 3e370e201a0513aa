"""Classification: healthy or diseased, or any other classes (the task of Wolleb et al., arXiv 2203.04306).

Whether a mask is empty is told pixel by pixel (`pixelwise`); `--label mask` has it told by an encoder.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from knife_plugins.pixelwise import MAPS, Pixelwise, even_maps, loss, maps_of
from torch import Tensor, nn
from torch.nn import functional as F

from knife.errors import InputError, TargetError
from knife.hookspecs import hookimpl

if TYPE_CHECKING:
    from knife.data import Case
    from knife.spec import ImageSpec

DISEASE = "mask"  # whether it is empty
PIXELS = f"{DISEASE}, pixel by pixel"  # the same, but looked for
DISEASED, HEALTHY = "diseased", "healthy"
SURE = 1e-6  # pixels: fewer are none
KNOTS, APART = 11, 100  # places along the timesteps, and how far they lie from each other
RATE = 20.0  # times that what the knots hold learns faster than weights do
PART = 0.01  # of the loss, so that it stays that of the maps


class Presence(nn.Module):
    """Whether an image has any pixel of the mask: net(x [N, C, H, W], t [N]) -> log p [N, 2], diseased and healthy.

    Were pixels found independently of each other, p(none) = exp(-number expected). But all of a healthy image's pixels
    that might be diseased, most of all under noise, sum up to many. So the number is divided by a temperature, which is
    learnt beside the maps, as its logarithm at knots along the timesteps.
    """

    def __init__(self, maps: Pixelwise) -> None:
        super().__init__()
        self.maps = maps
        self.knots = nn.Parameter(torch.zeros(KNOTS))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the logarithm of the probability of each class."""
        return self.told(self.maps(x, t), t)

    def told(self, maps: Tensor, t: Tensor) -> Tensor:
        """Return the same of the logits of the maps [N, 2, H, W]."""
        expected = maps[:, 0].sigmoid().sum((1, 2))
        place = (t.to(expected.dtype) / APART).clamp(max=KNOTS - 1)
        left = place.long().clamp(max=KNOTS - 2)
        temperature = (RATE * torch.lerp(self.knots[left], self.knots[left + 1], place - left)).exp()
        found = (expected / temperature).clamp(min=SURE)
        return torch.stack([(-found).expm1().neg().log(), -found], 1)

    def loss(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """Return the loss of the maps [N, 2, H, W], and of what is told of them, which does not change them."""
        maps = self.maps(x, t)
        wrong = F.nll_loss(self.told(maps.detach(), t), index(self, label))
        return loss(maps, label) + PART * wrong


@hookimpl
def configure(cases: "Sequence[Case]", label: str | None) -> dict[str, Any]:
    """Choose the label (a column of few words, else whether the mask is empty), and remember the class names."""
    masks = any(case.mask is not None for case in cases)
    label = label or next(iter(word_columns(cases)), PIXELS if masks else None)
    name = DISEASE if label == PIXELS else label
    if name is None:
        raise InputError(
            "classify: the data hold neither classes nor masks to learn from; put each class into a folder of its own."
        )
    classes = sorted({found for case in cases if (found := word_of(case, name)) is not None})
    if not classes:
        raise InputError(f"classify: no image has {name}; give another --label.")
    if len(classes) < 2:
        raise InputError(f"classify: every image has {name} = {classes[0]}; two classes are the least.")
    return {"label": name, "classes": classes, **({"maps": MAPS} if label == PIXELS else {})}


@hookimpl
def label(case: "Case", config: Mapping[str, Any]) -> Tensor:
    """Return the index of the case's class, or mask and brain."""
    if "maps" in config:
        return maps_of(case)
    found = word_of(case, config["label"])
    if found is None:
        raise InputError(f"{case.name}: has no {config['label']}, though others have one.")
    if found not in config["classes"]:
        raise InputError(f"{case.name}: {config['label']} is {found!r}, none of {', '.join(config['classes'])}.")
    return torch.tensor(config["classes"].index(found))


@hookimpl
def build(image_spec: "ImageSpec", config: Mapping[str, Any]) -> nn.Module:
    """Build the encoder half of the U-Net with one output a class; for a mask seen pixel by pixel, the U-Net."""
    if "maps" in config:
        return Presence(Pixelwise(image_spec.build_unet(config["maps"])))
    return image_spec.build_encoder(len(config["classes"]))


@hookimpl
def train(net: nn.Module, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
    """Return the cross-entropy, of the class or of the maps."""
    return net.loss(x, t, label) if isinstance(net, Presence) else F.cross_entropy(net(x, t), label)


@hookimpl
def target(text: str, image_spec: "ImageSpec", config: Mapping[str, Any]) -> Tensor:
    """Read the name of a class."""
    if text not in config["classes"]:
        raise TargetError(f"--target {text}: no such class; give one of {', '.join(config['classes'])}.")
    if "maps" in config:
        return even_maps(float(text == DISEASED), image_spec.size)
    return torch.tensor(config["classes"].index(text))


@hookimpl
def guide(net: nn.Module, x: Tensor, t: Tensor, target: Tensor) -> Tensor:
    """Return log p(y)."""
    logits: Tensor = net(x, t)
    return logits.log_softmax(1).gather(1, index(net, target)[:, None])[:, 0]


@hookimpl
def evaluate(net: nn.Module, x: Tensor, t: Tensor, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the probability of each class."""
    return {f"p({name})": p for name, p in zip(config["classes"], net(x, t).softmax(1).unbind(1), strict=False)}


@hookimpl
def error(net: nn.Module, x: Tensor, t: Tensor, target: Tensor) -> Tensor:
    """Return 1 - p(wanted class)."""
    return 1 - net(x, t).softmax(1).gather(1, index(net, target)[:, None])[:, 0]


def index(net: nn.Module, target: Tensor) -> Tensor:
    """Return targets or labels as indices of classes, [N]."""
    return 1 - target[:, 0].flatten(1).any(1).long() if isinstance(net, Presence) else target


def word_columns(cases: "Sequence[Case]") -> Iterator[str]:
    """Yield the columns that half of the cases have, of at most a hundred different words, none of them a fraction."""
    fullest_first = sorted(cases, key=lambda case: -len(case.values))  # it has the columns in their order
    for name in dict.fromkeys(name for case in fullest_first for name in case.values):
        words = [case.values[name] for case in cases if name in case.values]
        if len(words) >= len(cases) / 2 and len({*words}) <= 100 and not any("." in word for word in words):
            yield name


def word_of(case: "Case", name: str) -> str | None:
    """Return a case's class, of a column or whether its mask is empty; None if it has none."""
    if name != DISEASE:
        return case.values.get(name)
    if case.mask is None:
        return None
    return DISEASED if case.mask.any() else HEALTHY
