"""How much of an image stayed: what changed inside and outside of where it should, and how alike the rest looks."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from knife.image import Image

SIGMA, REACH = 1.5, 5  # of the window that SSIM compares through, in pixels (Wang et al. 2004)
C1, C2 = 0.01**2, 0.03**2  # its constants, for intensities from 0 to 1
SMOOTH = 2.0  # pixels over which a change is averaged before it is asked where it is large
LARGE, ROUND = 0.1, 3  # share of the largest change from which one counts as large; pixels round it that do too


def preserved(before: Image, after: Image, inside: Tensor | None = None) -> dict[str, float]:
    """Measure what changed of an image, as shares of its window, background left out.

    Args:
        before: the image.
        after: what became of it.
        inside: where it may well have changed, [1, H, W] bool; None: not known.

    Returns:
        changed: the mean absolute change. Then, where `inside` is known, the same inside and outside of it, the share
        of all change that lies outside, and of what is outside the 95th percentile of the change and the SSIM; where it
        is not, the last two of the whole.
    """
    x, y = before.normalised(None, (0.0, 1.0)), after.normalised(None, (0.0, 1.0))
    low, high = before.window[:, :, None, None].unbind(1)
    change = ((after.pixels - before.pixels).abs() / (high - low)).mean(0)
    seen = ~before.background
    alike = ssim(x, y).mean(0)
    told = {"changed": mean_of(change, seen)}
    rest, where = seen, ""
    if inside is not None:
        rest, where = seen & ~inside[0], "_outside"
        whole = float(change[seen].sum())
        told |= {
            "changed_inside": mean_of(change, seen & inside[0]),
            "changed_outside": mean_of(change, rest),
            "share_outside": float(change[rest].sum()) / whole if whole else 0.0,
        }
    if rest.any():
        told |= {f"p95{where}": percentile(change[rest], 0.95), f"ssim{where}": float(alike[rest].mean())}
    return {name: float(f"{value:.4g}") for name, value in told.items()}


def mean_of(values: Tensor, where: Tensor) -> float:
    """Return the mean of values [H, W] where [H, W] says, 0 of nothing."""
    return float(values[where].mean()) if where.any() else 0.0


def percentile(values: Tensor, share: float) -> float:
    """Return the value that a share of the values [N] does not exceed; of any number of them."""
    return float(values.kthvalue(max(1, math.ceil(share * len(values)))).values)


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Return the structural similarity of images [C, H, W] from 0 to 1 at every pixel (Wang et al. 2004, eq. 13)."""
    x, y = x.double(), y.double()  # variances are small differences
    mx, my = smoothed(x, SIGMA, REACH), smoothed(y, SIGMA, REACH)
    vx, vy = smoothed(x * x, SIGMA, REACH) - mx * mx, smoothed(y * y, SIGMA, REACH) - my * my
    both = smoothed(x * y, SIGMA, REACH) - mx * my
    return (2 * mx * my + C1) * (2 * both + C2) / ((mx * mx + my * my + C1) * (vx + vy + C2))


def smoothed(x: Tensor, sigma: float, reach: int) -> Tensor:
    """Return [C, H, W] blurred by a Gaussian; at the border, by what of it lies within."""
    offsets = torch.arange(-reach, reach + 1, dtype=x.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    sums = [along(torch.ones(1, 1, n, dtype=x.dtype), kernel) for n in x.shape[1:]]
    rows = along(x, kernel)
    columns = along(rows.transpose(1, 2), kernel).transpose(1, 2)
    return columns / (sums[0].transpose(1, 2) * sums[1])


def along(x: Tensor, kernel: Tensor) -> Tensor:
    """Return [C, H, W] filtered along its rows, with zeros beyond the border."""
    reach = len(kernel) // 2
    padded = F.pad(x, (reach, reach))
    total = torch.zeros_like(x)
    for i, weight in enumerate(kernel.tolist()):
        total.add_(padded[..., i : i + x.shape[2]], alpha=weight)
    return total


def changed_most(change: Tensor) -> Tensor:
    """Return where a change [C, h, w] is large, and what is round it, [1, h, w], 0 or 1: nowhere if it is nil."""
    size = smoothed(change.abs().mean(0, keepdim=True), SMOOTH, round(3 * SMOOTH))
    large = ((size >= LARGE * size.max()) & (size > 0)).float()
    return F.max_pool2d(large, 2 * ROUND + 1, 1, ROUND)
