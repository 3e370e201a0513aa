"""The networks: the ADM U-Net (Dhariwal and Nichol, 2021) and its encoder half, from one block.

`Architecture` is the shape of a network without its ends: how many channels go in, how many come out, and for which
image size is said when it is built.
"""

import math
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from knife.layers import Convolution, Linear
from knife.ops import group_norm_silu, needs_gradient

M = TypeVar("M", bound=nn.Module)
POOLS = ("mean", "attention", "spatial", "spatial-norm")
FLATTEST = 1e-25  # a score that slopes less is not followed back: no image moves by so little


@dataclass(frozen=True)
class Architecture:
    """The shape of a U-Net or an encoder, whatever its input and output channels."""

    width: int  # channels at multiplier 1
    mult: tuple[int, ...]  # channel multiplier of each level; each level halves the grid of the one before
    res_blocks: int = 2
    attention: tuple[int, ...] = ()  # downsampling factors, counted from the image's pixels, whose blocks attend
    heads: int = 1
    head_width: int | None = None  # channels a head; overrides heads
    scale_shift: bool = False  # the embedding of t scales and shifts the second norm, instead of being added before it
    updown: bool = False  # residual blocks change the grid, instead of a strided convolution
    groups: int = 32
    stem: int = 1  # lossless space-to-depth: stem x stem pixels become channels
    classes: int = 0  # labels of a class-conditional model; asked without a label, it adds none
    pool: str = "attention"  # how an encoder makes its outputs: one of POOLS
    outputs: int | None = None  # fixes the outputs where published weights have more than the task reads

    def factor(self) -> int:
        """Return what both sides of an image must be divisible by."""
        return self.stem * 2 ** (len(self.mult) - 1)


class NormSiLU(nn.GroupNorm):
    """Group normalisation, a scale and shift of each image's channels where given, and SiLU, as one op."""

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        return group_norm_silu(x, self.weight, self.bias, self.num_groups, self.eps, scale, shift)


class Attention(nn.Module):
    """Self-attention over the pixels of a feature map, with a residual connection."""

    def __init__(self, channels: int, arch: Architecture) -> None:
        super().__init__()
        self.heads = channels // arch.head_width if arch.head_width else arch.heads
        self.norm = nn.GroupNorm(arch.groups, channels)
        self.qkv = Linear(channels, 3 * channels)  # rows lie as [head][q, k, v][dim]
        self.out = zeroed(Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # [N, HW, C]
        q, k, v = self.qkv(tokens).view(n, h * w, self.heads, 3, -1).permute(3, 0, 2, 1, 4)
        mixed = attend(q, k, v).transpose(1, 2).reshape(n, h * w, c)
        return x + self.out(mixed).transpose(1, 2).reshape(n, c, h, w)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Mix values [N, heads, L, dim] by the likeness of queries and keys.

    On a CPU torch's gradient of this is slower in bfloat16, by far, and so it is left to float32.
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or not needs_gradient(q, k, v):
        return F.scaled_dot_product_attention(q, k, v)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(q.dtype)


class Block(nn.Module):
    """The one block of both networks: two convolutions conditioned on t, a skip, then attention where asked for."""

    def __init__(
        self, channels: int, out: int, embedding: int, arch: Architecture, attend: bool = False, resample: str = ""
    ) -> None:
        super().__init__()
        self.scale_shift = arch.scale_shift
        self.norm1 = NormSiLU(arch.groups, channels)
        self.resample = {"": nn.Identity(), "down": nn.AvgPool2d(2), "up": nn.Upsample(scale_factor=2)}[resample]
        self.conv1 = Convolution(channels, out)
        self.affine = Linear(embedding, 2 * out if arch.scale_shift else out)
        self.norm2 = NormSiLU(arch.groups, out)
        self.conv2 = zeroed(Convolution(out, out))
        self.skip = nn.Identity() if channels == out else Convolution(channels, out, 1)
        self.attention = Attention(out, arch) if attend else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(self.resample(self.norm1(x)))
        condition = self.affine(emb)
        h = self.norm2(h, *condition.chunk(2, 1)) if self.scale_shift else self.norm2(h + condition[:, :, None, None])
        h = self.conv2(h)
        return self.attention(self.skip(self.resample(x)) + h)


class Downsample(Convolution):
    """Halves the grid by a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, stride=2)

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        return super().forward(x)


class Upsample(Convolution):
    """Doubles the grid by repeating pixels, then convolves."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels)

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        return super().forward(F.interpolate(x, scale_factor=2.0))


class Embedding(nn.Module):
    """Embeds the timestep t [N] as waves, then as a vector of four times the width; adds a label's vector if given."""

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        self.width = arch.width
        self.linear1 = Linear(arch.width, 4 * arch.width)
        self.linear2 = Linear(4 * arch.width, 4 * arch.width)
        self.label = nn.Embedding(arch.classes, 4 * arch.width) if arch.classes else None

    def forward(self, t: Tensor, label: Tensor | None) -> Tensor:
        half = self.width // 2
        frequency = torch.exp(-math.log(10000) / half * torch.arange(half, device=t.device, dtype=torch.float32))
        angle = t.float()[:, None] * frequency
        waves = torch.cat([angle.cos(), angle.sin()], 1).to(self.linear1.weight.dtype)
        emb = self.linear2(F.silu(self.linear1(waves)))
        if label is not None and self.label is not None:
            emb = emb + self.label(label)
        return F.silu(emb)


class Down(nn.Module):
    """The encoder half and the middle, shared by both networks; returns the features of every block."""

    def __init__(self, arch: Architecture, channels: int) -> None:
        super().__init__()
        emb, width = 4 * arch.width, arch.width * arch.mult[0]
        self.stem = nn.PixelUnshuffle(arch.stem) if arch.stem > 1 else nn.Identity()  # which copies nothing
        self.conv_in = Convolution(channels * arch.stem**2, width)
        self.blocks = nn.ModuleDict()
        self.widths = [width]  # channels of every feature map, first to last
        factor = arch.stem
        for level, mult in enumerate(arch.mult):
            for i in range(arch.res_blocks):
                block = Block(width, arch.width * mult, emb, arch, attend=factor in arch.attention)
                self.blocks[f"level{level}_block{i}"] = block
                width = arch.width * mult
                self.widths.append(width)
            if level < len(arch.mult) - 1:
                down = Block(width, width, emb, arch, resample="down") if arch.updown else Downsample(width)
                self.blocks[f"level{level}_down"] = down
                self.widths.append(width)
                factor *= 2
        self.middle0 = Block(width, width, emb, arch, attend=True)
        self.middle1 = Block(width, width, emb, arch)

    def forward(self, x: Tensor, emb: Tensor) -> tuple[Tensor, list[Tensor]]:
        h = self.conv_in(self.stem(x))
        features = [h]
        for block in self.blocks.values():
            h = block(h, emb)
            features.append(h)
        return self.middle1(self.middle0(h, emb), emb), features


class UNet(nn.Module):
    """The ADM U-Net: x [N, channels, H, W], t [N] -> [N, outputs, H, W]; sides divisible by `Architecture.factor()`."""

    def __init__(self, arch: Architecture, channels: int, outputs: int) -> None:
        super().__init__()
        self.embedding = Embedding(arch)
        self.down = Down(arch, channels)
        emb, width, skips = 4 * arch.width, self.down.widths[-1], list(self.down.widths)
        self.up = nn.ModuleDict()
        for level, mult in reversed(list(enumerate(arch.mult))):
            attend = arch.stem * 2**level in arch.attention
            for i in range(arch.res_blocks + 1):
                self.up[f"level{level}_block{i}"] = Block(
                    width + skips.pop(), arch.width * mult, emb, arch, attend=attend
                )
                width = arch.width * mult
            if level > 0:
                up = Block(width, width, emb, arch, resample="up") if arch.updown else Upsample(width)
                self.up[f"level{level}_up"] = up
        self.norm_out = NormSiLU(arch.groups, width)
        self.conv_out = zeroed(Convolution(width, (arch.outputs or outputs) * arch.stem**2))
        self.unstem = nn.PixelShuffle(arch.stem) if arch.stem > 1 else nn.Identity()

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        emb = self.embedding(t, label)
        h, features = self.down(x, emb)
        for name, block in self.up.items():
            h = block(h if name.endswith("_up") else torch.cat([h, features.pop()], 1), emb)
        y = self.unstem(self.conv_out(self.norm_out(h))).to(x.dtype)  # autocast may have halved it
        return y if self.training else without_flat(y)


class Encoder(nn.Module):
    """The encoder half of the U-Net with a pooled head: x [N, channels, H, W], t [N] -> [N, outputs]."""

    def __init__(self, arch: Architecture, channels: int, outputs: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.embedding = Embedding(arch)
        self.down = Down(arch, channels)
        self.spatial = arch.pool.startswith("spatial")
        width, outputs = self.down.widths[-1], arch.outputs or outputs
        grid = (size[0] // arch.factor(), size[1] // arch.factor())
        self.norm_out = nn.Identity() if self.spatial else NormSiLU(arch.groups, width)
        if self.spatial:
            self.head: nn.Module = spatial_head(
                sum(self.down.widths) + width, outputs, normed=arch.pool == "spatial-norm"
            )
        elif arch.pool == "attention":
            self.head = AttentionPool(width, outputs, grid, arch)
        else:
            self.head = zeroed(Linear(width, outputs))

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        y = self.head(self.pool(*self.down(x, self.embedding(t, label)))).to(x.dtype)
        return y if self.training else without_flat(y)

    def pool(self, h: Tensor, features: list[Tensor]) -> Tensor:
        """Return what the head reads of the last features and those of every block."""
        if self.spatial:
            return torch.cat([f.mean((2, 3)) for f in [*features, h]], 1)
        h = self.norm_out(h)
        return h if isinstance(self.head, AttentionPool) else h.mean((2, 3))


class AttentionPool(nn.Module):
    """Pools a feature map by the attention of its mean over its pixels (CLIP's pool): [N, C, h, w] -> [N, outputs]."""

    def __init__(self, channels: int, outputs: int, grid: tuple[int, int], arch: Architecture) -> None:
        super().__init__()
        self.heads = channels // arch.head_width if arch.head_width else arch.heads
        self.grid = grid
        self.position = nn.Parameter(torch.randn(channels, grid[0] * grid[1] + 1) / channels**0.5)
        self.qkv = Linear(channels, 3 * channels)  # rows lie as [q, k, v][head][dim]
        self.out = Linear(channels, outputs)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2)
        tokens = torch.cat([tokens.mean(2, keepdim=True), tokens], 2) + self.position
        n, _, length = tokens.shape
        qkv = self.qkv(tokens.transpose(1, 2)).view(n, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = attend(q[:, :, :1], k, v)  # only the mean's own query is read
        return self.out(mixed.transpose(1, 2).flatten(1))


def spatial_head(features: int, outputs: int, normed: bool) -> nn.Sequential:
    """Return the two-layer head over the means of every feature map."""
    between = [nn.GroupNorm(32, 2048), nn.SiLU()] if normed else [nn.ReLU()]
    return nn.Sequential(Linear(features, 2048), *between, Linear(2048, outputs))


def without_flat(y: Tensor) -> Tensor:
    """Let what a network answers have no gradient where that is below `FLATTEST`, as once images are at their target.

    It would become numbers so small (subnormal) that processors take many times as long for each.
    """
    if y.requires_grad:
        y.register_hook(lambda slope: torch.where(slope.abs() < FLATTEST, 0, slope))
    return y


def zeroed(module: M) -> M:
    """Set a module's parameters to zero, so that its branch starts silent."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
