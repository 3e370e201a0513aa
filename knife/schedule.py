"""Noise levels: alpha_bar, noising, and the path of levels that a translation walks.

A *level* k in 0..T says how noisy an image is: alpha_bar[0] = 1 is the clean image, alpha_bar[T] is nearly noise. A
network trained at timesteps t = 0..T-1 is asked at level k with t = max(k - 1, 0). Everything here counts in levels;
`timestep` is the one place that converts.
"""

import hashlib
import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from knife.errors import SettingsError

MOST_LEVELS = 100_000


@dataclass(frozen=True)
class Schedule:
    """How fast an image drowns in noise over T levels: `linear` (Ho et al.) or `cosine` (Nichol and Dhariwal)."""

    kind: str = "linear"
    T: int = 1000

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "cosine"):
            raise SettingsError(f"schedule: {self.kind!r} is unknown; give linear or cosine.")
        if not 1 <= self.T <= MOST_LEVELS:
            raise SettingsError(f"schedule: T = {self.T} levels make no schedule; give 1 to {MOST_LEVELS}.")

    @cached_property
    def beta(self) -> Tensor:
        """Return the forward variances beta_1..beta_T, [T] float64."""
        if self.kind == "linear":
            first, last = 0.1 / self.T, min(20 / self.T, 0.999)  # 1e-4 and 0.02 at T = 1000
            return torch.linspace(first, last, self.T, dtype=torch.float64)
        u = torch.arange(self.T + 1, dtype=torch.float64) / self.T
        signal = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - signal[1:] / signal[:-1]).clamp(max=0.999)

    @cached_property
    def alpha_bar(self) -> Tensor:
        """Return the share of signal left at each level, [T + 1] float64, alpha_bar[0] = 1."""
        return torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - self.beta, 0)])

    @cached_property
    def digest(self) -> str:
        """Return a fingerprint of alpha_bar, which stands in a model's card."""
        return hashlib.sha256(self.alpha_bar.numpy().tobytes()).hexdigest()[:16]


@lru_cache(8)
def alpha_bar_on(schedule: Schedule, device: torch.device) -> Tensor:
    """Return alpha_bar [T + 1] on a device, where it is copied but once; do not write to it."""
    return schedule.alpha_bar.to(device)


def timestep(level: Tensor) -> Tensor:
    """Convert levels to the timesteps that a network is asked with: t = max(level - 1, 0)."""
    return (level - 1).clamp(min=0)


def noise(x0: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    """Noise clean images x0 [N, C, H, W] with eps to the levels whose alpha_bar [N] is given (eq. 1)."""
    ab = alpha_bar.view(-1, *[1] * (x0.ndim - 1))
    return ab.sqrt().to(x0.dtype) * x0 + (1 - ab).sqrt().to(x0.dtype) * eps  # eq. 1


def path(noise_level: int, steps: int, spread: float = 1.0) -> list[int]:
    """Return the levels 0 = k_0 < ... < k_steps = noise_level: walked up to encode, down to decode.

    They are spread evenly, or with a `spread` above 1 as its power, closer together near 0 than near the noise level.

    Raises:
        SettingsError: if there are no levels to walk, or fewer levels than steps.
    """
    if noise_level < 1:
        raise SettingsError(f"--noise-level {noise_level}: nothing to encode; give a level from 1 to T.")
    if not 1 <= steps <= noise_level:
        raise SettingsError(
            f"--steps {steps}: give 1 to {noise_level}, as many as there are levels up to --noise-level."
        )
    return [max(i, int(noise_level * (i / steps) ** spread + 0.5)) for i in range(steps + 1)]
