"""The paper's two algorithms: encode an image to noise level L, decode it while a task pulls.

Encode and decode are the same step along the same levels in opposite directions:

    e  = eps_theta(x, t) - s sqrt(1 - ab) g          g: gradient of the task's score, decode only
    x0 = (x - sqrt(1 - ab) e) / sqrt(ab)
    x' = sqrt(ab') x0 + sqrt(1 - ab') e              (eq. 3 downwards, eq. 4 upwards)

Algorithm 1 (regression) and Algorithm 2 (segmentation) differ in the score alone, so the score is an argument. Several
may pull at once, each with a scale of its own: their pulls add up.

In y = x / sqrt(ab) and sigma = sqrt((1 - ab) / ab) the step is Euler's: y' = y + (sigma' - sigma) e. A solver of second
order takes the same step with another e, made from what the network says here and what it said one step before.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from knife.ops import ddim_step
from knife.schedule import Schedule, timestep

Network = Callable[[Tensor, Tensor], Tensor]  # (x [N, C, H, W], t [N]) -> [N, C or 2C, H, W]
Score = Callable[[Tensor, Tensor], Tensor]  # (x [N, C, H, W], t [N]) -> [N], higher is nearer to the target
Scale = Callable[["Slope", Tensor, Tensor], Tensor]  # (slope, alpha_bar [N], the next alpha_bar [N]) -> s, [N]
Track = Callable[[int, Tensor], None]  # called with (level, x at that level) after every step
Hold = Callable[[int, Tensor], Tensor]  # (level, x at that level) -> what the walk goes on with
DRAWS = 64  # levels whose noise is kept for the next decode and batch; a walk of more draws it anew
FLAT = 1e-30  # a score that slopes less asks for nothing
WHOLE = 0.05  # strength from which a step may ask for all that its target lacks, if the image shows all of itself


class Point(NamedTuple):
    """Where a walk asked its network: images x [N, C, H, W] of an alpha_bar, and the eps that it told."""

    x: Tensor
    eps: Tensor
    alpha_bar: float

    @property
    def sigma(self) -> float:
        """Return how noisy the images are: noise over signal."""
        return sigma_of(self.alpha_bar)

    @property
    def x0(self) -> Tensor:
        """Return the predicted clean images."""
        return (self.x - math.sqrt(1 - self.alpha_bar) * self.eps) / math.sqrt(self.alpha_bar)

    def part(self, rows: Tensor | slice) -> "Point":
        """Return the point of some of the images, each as often as `rows` names it."""
        return Point(self.x[rows], self.eps[rows], self.alpha_bar)


def sigma_of(alpha_bar: float) -> float:
    """Return the ratio of noise to signal."""
    return math.sqrt((1 - alpha_bar) / alpha_bar)


Solver = Callable[[Point, Point | None, float], Tensor]  # (here, one step before, the next sigma) -> e of the step


def ddim(here: Point, before: Point | None, sigma: float) -> Tensor:
    """Return eps as the network told it: the first order of the paper."""
    return here.eps


def ab2(here: Point, before: Point | None, sigma: float) -> Tensor:
    """Return eps on the line in sigma through the last two points, half a step on (Adams-Bashforth of second order).

    Where encoding has turned into decoding, the point before is the one that the step leads back to, and this is the
    mean of the two: the trapezoid rule.
    """
    if before is None:
        return here.eps
    share = (sigma - here.sigma) / (2 * (here.sigma - before.sigma))
    return torch.lerp(before.eps, here.eps, 1 + share)


def dpm2m(here: Point, before: Point | None, sigma: float) -> Tensor:
    """Return the eps whose x0 is on the line in log sigma through the last two points: DPM-Solver++(2M).

    Source: Lu et al., arXiv 2211.01095, algorithm 2.
    """
    if before is None or not (here.sigma and before.sigma and sigma):  # there is no line through log 0
        return here.eps
    share = math.log(here.sigma / sigma) / (2 * math.log(before.sigma / here.sigma))
    return here.eps - share / here.sigma * (here.x0 - before.x0)


SOLVERS: Mapping[str, Solver] = {"ddim": ddim, "ab2": ab2, "dpm2m": dpm2m}


class Slope(NamedTuple):
    """How well noisy images fit a target: a score [N], and its gradient [N, C, H, W]."""

    score: Tensor
    gradient: Tensor


class Guidance(NamedTuple):
    """What pulls at images while they are decoded.

    score: how well noisy images fit the target. scale: the paper's s, or what makes one for each image and step, as
    `balanced` does; 0 is bit for bit the unguided result. low, high: it pulls in steps from levels above `low`, up to
    `high`. fresh: it sees the images under noise of its own, see `under_fresh_noise`, instead of x as in the paper.
    """

    score: Score
    scale: float | Scale
    low: int = 0
    high: float = math.inf
    fresh: bool = False

    def pulls(self, level: int) -> bool:
        """Tell whether it pulls in a step from a level."""
        return bool(self.scale) and self.low < level <= self.high


def encode(
    net: Network,
    x: Tensor,
    schedule: Schedule,
    levels: Sequence[int],
    track: Track | None = None,
    solver: Solver = ddim,
) -> tuple[Tensor, Point]:
    """Encode images deterministically to noise level levels[-1] (eq. 4; first loop of Algorithms 1 and 2).

    Nothing is clamped here: a clamp cannot be undone.

    Args:
        net: the diffusion model; of 2C output channels the first C are eps.
        x: clean images [N, C, H, W] in the model's value range.
        schedule: the levels the model was trained on.
        levels: rising levels from 0, as `schedule.path` gives them.
        track: called after every step.
        solver: what makes a step's eps of what the network tells.

    Returns:
        The noisy images x_L, [N, C, H, W], and the point one step before, for `decode` to go on from.
    """
    return walk(net, x, schedule, levels, track=track, solver=solver)


def decode(
    net: Network,
    x: Tensor,
    schedule: Schedule,
    levels: Sequence[int],
    guidance: Sequence[Guidance] = (),
    clamp: tuple[float, float] | None = None,
    track: Track | None = None,
    hold: Hold | None = None,
    solver: Solver = ddim,
    before: Point | None = None,
) -> Tensor:
    """Decode noisy images back to level 0 while the gradients of scores pull (eq. 3; Algorithms 1 and 2).

    Args:
        net: the diffusion model; of 2C output channels the first C are eps.
        x: images [N, C, H, W] at noise level levels[-1].
        schedule: the levels the model was trained on.
        levels: the same rising levels that encoded x; they are walked downwards.
        guidance: what pulls; nothing decodes unguided.
        clamp: limits of the predicted clean image x0; None leaves it free, which keeps the round trip exact.
        track: called after every step.
        hold: what becomes of x after every step, such as `keep_outside`.
        solver: what makes a step's eps of what the network tells; guidance, which is rough, stays of first order.
        before: the last point of encoding.

    Returns:
        The translated images, [N, C, H, W].
    """
    return walk(net, x, schedule, levels[::-1], guidance, clamp, track, hold, solver, before)[0]


def decode_with_control(
    net: Network,
    x: Tensor,
    schedule: Schedule,
    levels: Sequence[int],
    guidance: Sequence[Guidance] = (),
    clamp: tuple[float, float] | None = None,
    track: Track | None = None,
    hold: Hold | None = None,
    solver: Solver = ddim,
    before: Point | None = None,
) -> tuple[Tensor, Tensor]:
    """Decode noisy images guided and, as a control, unguided, in one batch; arguments as of `decode`.

    What differs between the two is the effect of the guidance alone: the error of encoding and decoding is in both.
    `track` and `hold` see the guided ones first, then the controls, [2N, C, H, W].
    """
    if not any(one.pulls(level) for one in guidance for level in levels):
        alone = decode(net, x, schedule, levels, (), clamp, track, hold, solver, before)
        return alone, alone
    count = len(x)
    before = before and before.part(torch.arange(count).repeat(2))
    both, _ = walk(net, torch.cat([x, x]), schedule, levels[::-1], guidance, clamp, track, hold, solver, before, count)
    return both[:count], both[count:]


@torch.no_grad()
def walk(
    net: Network,
    x: Tensor,
    schedule: Schedule,
    levels: Sequence[int],
    guidance: Sequence[Guidance] = (),
    clamp: tuple[float, float] | None = None,
    track: Track | None = None,
    hold: Hold | None = None,
    solver: Solver = ddim,
    before: Point | None = None,
    guided: int | None = None,
) -> tuple[Tensor, Point]:
    """Take one step for each pair of neighbouring levels; only the first `guided` images are pulled at (None: all).

    All that a step needs beside images is made before the first: a GPU is then told to compute, and never waited for.

    Returns the images, and the point where the last step began.
    """
    count, known, at = len(x) if guided is None else guided, schedule.shares, torch.tensor(levels)
    alpha_bar = schedule.alpha_bar[at].to(x.device)[:, None].repeat(1, len(x))  # [levels, N]
    t = timestep(at).to(x.device)[:, None].repeat(1, len(x))
    ones, still = torch.ones_like(alpha_bar[0]), torch.zeros_like(x[count:])
    guidance = settled(guidance, ones[:count])
    for i, (level, next_level) in enumerate(pairwise(levels)):
        here = Point(x, net(x, t[i])[:, : x.shape[1]].to(x.dtype), known[level])
        eps = solver(here, before, sigma_of(known[next_level]))
        g, s = None, ones
        if pulling := [one for one in guidance if one.pulls(level)]:
            g, s = pull(pulling, here.part(slice(count)), level, t[i, :count], alpha_bar[i : i + 2, :count])
            if count < len(x):
                g, s = torch.cat([g, still]), torch.cat([s, ones[count:]])
        x = ddim_step(x, eps, g, alpha_bar[i], alpha_bar[i + 1], s, clamp)  # eq. 3, 4
        before = here
        if hold:
            x = hold(next_level, x)
        if track:
            track(next_level, x)
    assert before is not None
    return x, before


def pull(guidance: Sequence[Guidance], here: Point, level: int, t: Tensor, alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
    """Return what pulls at images [N, C, H, W] together: a gradient of their shape, and its scale for each, [N].

    They are at a level, for which the networks are asked at t, [N]; alpha_bar [2, N] is of this level and the next.
    """
    slopes = [slope(one.score, under_fresh_noise(here, level) if one.fresh else here.x, t) for one in guidance]
    scales = [one.scale(at, *alpha_bar) for one, at in zip(guidance, slopes, strict=True) if callable(one.scale)]
    if len(slopes) == 1:
        return slopes[0].gradient, scales[0]
    pulls = [at.gradient * s[:, None, None, None].to(here.x.dtype) for at, s in zip(slopes, scales, strict=True)]
    return torch.stack(pulls).sum(0), torch.ones_like(alpha_bar[0])


def settled(guidance: Sequence[Guidance], ones: Tensor) -> list[Guidance]:
    """Return what pulls at all, with scales that every step can ask, of as many images as there are ones."""

    def always(s: Tensor) -> Scale:
        return lambda at, alpha_bar, next_alpha_bar: s

    return [
        one if callable(one.scale) else one._replace(scale=always(one.scale * ones)) for one in guidance if one.scale
    ]


def under_fresh_noise(here: Point, level: int) -> Tensor:
    """Return noisy images [N, C, H, W] whose predicted x0 is the same, and whose noise is drawn anew.

    Task networks learn from images under noise that knows nothing of them. The noise of an encoded image is made of
    the image, and stays for the whole walk: a network that meets nothing else is met in its weaknesses. The draw
    depends on the level alone, and is the same for every image, so that no result depends on its batch.
    """
    noise = noise_of(level, here.x.shape[1:], here.x.device, here.x.dtype)
    return here.x + math.sqrt(1 - here.alpha_bar) * (noise - here.eps)


@lru_cache(DRAWS)
def noise_of(level: int, shape: torch.Size, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Draw the noise of a level, [C, H, W], on the CPU, so that it is the same on every device; do not write to it."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(level)).to(device, dtype)


def keep_outside(region: Tensor, trajectory: Mapping[int, Tensor]) -> Hold:
    """Return a hold that lets images change within a region, and keeps the rest where encoding led it.

    What lies outside then meets what changes at every noise level, so that borders stay natural; between the two the
    images are mixed.

    Args:
        region: [N, 1, H, W], 1 where an image may change, 0 where it may not.
        trajectory: the encoded images [N, C, H, W] at every level that decoding comes to.
    """

    def hold(level: int, x: Tensor) -> Tensor:
        copies = len(x) // len(region)  # guided ones and controls
        return torch.lerp(trajectory[level].repeat(copies, 1, 1, 1), x, region.to(x.dtype).repeat(copies, 1, 1, 1))

    return hold


def slope(score: Score, x: Tensor, t: Tensor) -> Slope:
    """Return a score of images [N, C, H, W], and differentiate it with respect to them alone.

    The images of a batch do not see each other, so the gradient of the sum holds every image's own.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        reached = score(x, t)
        return Slope(reached.detach(), torch.autograd.grad(reached.sum(), x)[0])


def balanced(strength: float | Tensor, steepness: float) -> Scale:
    """Return a scale that carries over between images, tasks and data sets, and from few steps to many.

    Guidance s sqrt(1 - ab) g has the size `strength` against eps, whose size is 1 a pixel, where the score is as steep
    as usual. Where it is not, its size follows the square root of the steepness instead of the steepness itself: a
    guide that hardly slopes, as a regressor far from any tumour, still moves its image, one that slopes too much does
    not tear it apart, and guidance still fades as the target is reached.

    A score below 0 is at its best at 0, and no step asks for more than that, on the parabola that is flat there: scores
    are minus squares, or nearly so, and theirs is Newton's step, twice what the tangent says. Without this limit long
    steps overshoot, and pull an image to and fro. Of a noisy image only the share ab can be told, and a strength below
    `WHOLE` asks for its share of that, so that the limit is tighter there.

    Args:
        strength: the size of the guidance, one for all images or one for each, [N].
        steepness: the usual size of sqrt(1 - ab) g, as measured when the guide was trained.
    """

    def scale(at: Slope, alpha_bar: Tensor, next_alpha_bar: Tensor) -> Tensor:
        squares = at.gradient.flatten(1).double().square()
        size = ((1 - alpha_bar) * squares.mean(1)).sqrt()
        s = strength / (steepness * size).clamp(min=FLAT).sqrt()
        gain = reach(alpha_bar, next_alpha_bar) * squares.sum(1)  # on the tangent, of s = 1
        share = (strength / WHOLE * alpha_bar).clamp(max=1)
        enough = -2 * share * at.score.double() / gain.clamp(min=FLAT)
        return torch.where(at.score < 0, torch.minimum(s, enough), s)

    return scale


def reach(alpha_bar: Tensor, next_alpha_bar: Tensor) -> Tensor:
    """Return how far a step moves images along the gradient for s = 1, measured at the level that it begins at.

    By eq. 3 guidance sqrt(1 - ab) g in eps moves x' by sqrt(ab') (sigma - sigma') of it, and x = x' sqrt(ab / ab').
    """
    sigma, next_sigma = (((1 - ab) / ab).sqrt() for ab in (alpha_bar, next_alpha_bar))
    return alpha_bar.sqrt() * (sigma - next_sigma) * (1 - alpha_bar).sqrt()
