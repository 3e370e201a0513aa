"""What images a model sees, and the presets: a table of network sizes and training settings."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from knife.errors import SettingsError
from knife.unet import Architecture, Encoder, UNet

MOST = 2**14  # of what a card may say of a network: width, multipliers, heads
MOST_BLOCKS = 1000


@dataclass(frozen=True)
class ImageSpec:
    """The images a model was made for, and the shape of the networks that see them."""

    channels: tuple[str, ...]  # names in order, such as t1, t1ce, t2, flair
    size: tuple[int, int]  # height, width in pixels
    unet: Architecture
    encoder: Architecture
    value_range: tuple[float, float] = (-1.0, 1.0)
    crop: bool = False  # images fill the grid, and what is beyond is cut off; else they fit inside, and are padded

    def __post_init__(self) -> None:
        for arch in (self.unet, self.encoder):
            if any(side % arch.factor() for side in self.size):
                raise SettingsError(
                    f"size {self.size[0]}x{self.size[1]}: this network needs sides divisible by {arch.factor()}."
                )

    def build_unet(self, outputs: int) -> nn.Module:
        """Build a U-Net: net(x [N, C, H, W], t [N]) -> [N, outputs, H, W]."""
        return UNet(self.unet, len(self.channels), outputs)

    def build_encoder(self, outputs: int) -> nn.Module:
        """Build an encoder: net(x [N, C, H, W], t [N]) -> [N, outputs]."""
        return Encoder(self.encoder, len(self.channels), outputs, self.size)

    def for_judge(self) -> "ImageSpec":
        """Return a spec for the judges of the same images: other networks than any preset's guides.

        They are narrower, and attend at their coarsest grid alone. A stem folds pixels into channels of images whose
        sides are above `JUDGED`, so that a judge stays cheap.
        """
        halvings = min((side & -side).bit_length() - 1 for side in self.size)  # of both sides without a rest
        folds = min(halvings, max(0, math.ceil(math.log2(max(self.size) / JUDGED))))
        unet, encoder = (
            replace(arch, stem=2**folds, mult=arch.mult[: halvings - folds + 1]) for arch in (JUDGE_UNET, JUDGE_ENCODER)
        )
        return replace(self, unet=unet, encoder=encoder)

    def to_json(self) -> dict[str, Any]:
        """Return the spec as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "ImageSpec":
        """Rebuild a spec from `to_json`; raises TypeError or ValueError if the values are those of none."""
        if not all(isinstance(name, str) for name in values["channels"]):
            raise TypeError(f"channels are {values['channels']!r}")
        return cls(
            channels=tuple(values["channels"]),
            size=pair(values["size"]),
            unet=architecture(values["unet"]),
            encoder=architecture(values["encoder"]),
            value_range=pair(values["value_range"]),
            crop=bool(values.get("crop", False)),
        )


def pair(values: Any) -> tuple[Any, Any]:
    """Return two finite numbers as a tuple; raises TypeError or ValueError if they are none."""
    first, second = values
    if not (math.isfinite(first) and math.isfinite(second)):
        raise ValueError(f"{values!r} are not finite")
    return first, second


def architecture(values: Mapping[str, Any]) -> Architecture:
    """Rebuild an architecture from JSON, where tuples have become lists; raises ValueError if there can be none."""
    known = {f.name for f in fields(Architecture)}
    arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known}
    return possible(Architecture(**arguments))


def possible(arch: Architecture) -> Architecture:
    """Return an architecture that a file tells of; raises ValueError if no network can be so, or none that is meant."""
    counts = [arch.width, arch.res_blocks, arch.heads, arch.groups, arch.stem, *arch.mult]
    counts += [count for count in (arch.head_width, arch.outputs, arch.classes or None) if count is not None]
    if not arch.mult or not all(type(count) is int and 1 <= count <= MOST for count in counts):
        raise ValueError(f"{arch} is no network")
    if arch.res_blocks * len(arch.mult) > MOST_BLOCKS:
        raise ValueError(f"{len(arch.mult)} levels of {arch.res_blocks} blocks are too many")
    for channels in attending(arch):
        if channels % (arch.head_width or arch.heads):
            raise ValueError(f"heads do not divide the {channels} channels of an attention of {arch}")
    return arch


def attending(arch: Architecture) -> list[int]:
    """Return the channels of every attention, that of the middle last."""
    levels = [m for level, m in enumerate(arch.mult) if arch.stem * 2**level in arch.attention]
    return [arch.width * m for m in (*levels, arch.mult[-1])]


@dataclass(frozen=True)
class Training:
    """How long and how fast to train one kind of network."""

    steps: int
    batch: int = 10
    lr: float = 1e-4
    ema: float = 0.9999


@dataclass(frozen=True)
class Preset:
    """A row of the table: image size, the three architectures, training settings for `diffusion` and for `task`s."""

    name: str
    size: tuple[int, int]
    channels: int | None  # None: as many as the data have
    diffusion: Architecture
    encoder: Architecture
    segmenter: Architecture
    training: Mapping[str, Training]
    kinds: tuple[str, ...] = ("diffusion", "regress", "classify", "segment")

    def spec(self, kind: str, channels: tuple[str, ...], value_range: tuple[float, float] = (-1.0, 1.0)) -> ImageSpec:
        """Return the image spec of a model of this preset: `kind` is diffusion or the name of a task.

        Raises:
            SettingsError: if the preset is for another number of channels.
        """
        if self.channels not in (None, len(channels)):
            raise SettingsError(
                f"--preset {self.name}: made for {self.channels} channels, the images have {len(channels)} "
                f"({', '.join(channels)}); choose another preset (knife presets)."
            )
        unet = self.diffusion if kind == "diffusion" else self.segmenter
        return ImageSpec(channels, self.size, unet, self.encoder, value_range)

    def settings(self, kind: str) -> Training:
        """Return the training settings for diffusion or a task."""
        return self.training["diffusion" if kind == "diffusion" else "task"]


def preset(name: str) -> Preset:
    """Look a preset up by name.

    Raises:
        SettingsError: if there is none of that name.
    """
    if name not in PRESETS:
        raise SettingsError(f"--preset {name}: there is none of that name; choose from {', '.join(PRESETS)}.")
    return PRESETS[name]


def rows() -> list[dict[str, Any]]:
    """Return a row for each network of each preset: name, kind, channels, size, parameters."""
    table = []
    for p in PRESETS.values():
        channels = p.channels or 4
        for kind in p.kinds:
            spec = p.spec(kind, tuple(map(str, range(channels))))
            outputs = {"diffusion": 2 * channels, "classify": 2}.get(kind, 1)
            with torch.device("meta"):
                net = (spec.build_unet if kind in ("diffusion", "segment") else spec.build_encoder)(outputs)
            count = sum(parameter.numel() for parameter in net.parameters())
            table.append(
                {"name": p.name, "kind": kind, "channels": p.channels, "size": list(p.size), "parameters": count}
            )
    return table


FACES = Architecture(128, (1, 1, 2, 3, 4), res_blocks=2, attention=(8,))
BRATS = Architecture(128, (1, 1, 2, 2, 4, 4), res_blocks=2, attention=(16,), classes=2)
GUIDE = Architecture(128, (1, 1, 2, 3, 4), 4, (4, 8, 16), head_width=64, scale_shift=True, updown=True)
SMALL = Architecture(48, (1, 2, 3), res_blocks=1, attention=(8,), heads=2, groups=8, stem=2)
JUDGE_UNET = Architecture(8, (1, 2, 4, 8), res_blocks=1, groups=4)
JUDGE_ENCODER = Architecture(16, (1, 2, 4, 4), res_blocks=1, groups=8, pool="spatial")
JUDGED = 64  # pixels a side, up to which a judge sees each of them
SMALL_GUIDE = Architecture(32, (1, 2, 3), 1, (8,), heads=2, scale_shift=True, groups=8, stem=2, pool="spatial")

PRESETS = {
    p.name: p
    for p in [
        Preset(
            "paper-faces", (128, 128), 3, FACES, GUIDE, replace(FACES),
            {"diffusion": Training(500_000), "task": Training(80_000)}, kinds=("diffusion", "regress"),
        ),
        Preset(
            # The paper counts as many parameters for its segmenter as for its diffusion model, so the segmenter kept
            # the eight outputs (the mask is read from the first) and the label embedding.
            "paper-brats", (256, 256), 4, BRATS,
            replace(GUIDE, width=32, mult=(1, 1, 2, 2, 4, 4), attention=(8, 16, 32)), replace(BRATS, outputs=8),
            {"diffusion": Training(50_000), "task": Training(20_000)},
        ),
        Preset(
            "small-64", (64, 64), None, SMALL, SMALL_GUIDE, replace(SMALL, width=32, scale_shift=True),
            {"diffusion": Training(20_000, 16, 5e-4, 0.999), "task": Training(5_000, 16, 5e-4, 0.999)},
        ),
        Preset(
            "small-128", (128, 128), None, replace(SMALL, mult=(1, 2, 3, 4), attention=(16,)),
            replace(SMALL_GUIDE, mult=(1, 2, 3, 4), attention=(16,)),
            replace(SMALL, width=32, mult=(1, 2, 3, 4), attention=(16,), scale_shift=True),
            {"diffusion": Training(40_000, 16, 5e-4, 0.9995), "task": Training(10_000, 16, 5e-4, 0.999)},
        ),
    ]
}  # fmt: skip
