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
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from knife.ops import ddim_step
from knife.schedule import Schedule, timestep

Network = Callable[[Tensor, Tensor], Tensor]  # (x [N, C, H, W], t [N]) -> [N, C or 2C, H, W]
Score = Callable[[Tensor, Tensor], Tensor]  # (x [N, C, H, W], t [N]) -> [N], higher is nearer to the target
Scale = Callable[["Slope", Tensor, Tensor], Tensor]  # (slope, alpha_bar [N], the next alpha_bar [N]) -> s, [N]
Track = Callable[[int, Tensor], None]  # called with (level, x at that level) after every step
Hold = Callable[[int, Tensor], Tensor]  # (level, x at that level) -> what the walk goes on with
Play = Callable[..., Any]  # (work, *arguments) -> what the work makes of them, however it is launched
DRAWS = 64  # levels whose noise is kept for the next decode and batch; a walk of more draws it anew
FLAT = 1e-30  # a score that slopes less asks for nothing
WHOLE = 0.05  # strength from which a step may ask for all that its target lacks, if the image shows all of itself


class Point(NamedTuple):
    """Where a walk asked its network: images x [N, C, H, W] of a level, and the eps that it told.

    The level's alpha_bar and sigma, noise over signal, are tensors [] float64, so that no GPU is waited for.
    """

    x: Tensor
    eps: Tensor
    alpha_bar: Tensor
    sigma: Tensor

    @property
    def x0(self) -> Tensor:
        """Return the predicted clean images."""
        return self.x / self.alpha_bar.sqrt() - self.sigma * self.eps

    def part(self, rows: Tensor | slice) -> "Point":
        """Return the point of some of the images, each as often as `rows` names it."""
        return self._replace(x=self.x[rows], eps=self.eps[rows])


Solver = Callable[[Point, Point | None, Tensor], Tensor]  # (here, one step before, the next sigma) -> e of the step


def ddim(here: Point, before: Point | None, sigma: Tensor) -> Tensor:
    """Return eps as the network told it: the first order of the paper."""
    return here.eps


def ab2(here: Point, before: Point | None, sigma: Tensor) -> Tensor:
    """Return eps on the line in sigma through the last two points, half a step on (Adams-Bashforth of second order).

    Where encoding has turned into decoding, the point before is the one that the step leads back to, and this is the
    mean of the two: the trapezoid rule.
    """
    if before is None:
        return here.eps
    share = (sigma - here.sigma) / (2 * (here.sigma - before.sigma))
    return torch.lerp(before.eps, here.eps, (1 + share).to(here.eps.dtype))


def dpm2m(here: Point, before: Point | None, sigma: Tensor) -> Tensor:
    """Return the eps whose x0 is on the line in log sigma through the last two points: DPM-Solver++(2M).

    Source: Lu et al., arXiv 2211.01095, algorithm 2.
    """
    if before is None:
        return here.eps
    share = (here.sigma / sigma).log() / (2 * (before.sigma / here.sigma).log())
    share = torch.where(sigma > 0, share, 0)  # no line leads to log 0
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


def called(work: Callable[..., Any], *arguments: Any) -> Any:
    """Call a work as it is."""
    return work(*arguments)


def encode(
    net: Network,
    x: Tensor,
    schedule: Schedule,
    levels: Sequence[int],
    track: Track | None = None,
    solver: Solver = ddim,
    play: Play = called,
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
        play: what takes the steps: a `knife.graphs.Recorder` launches each as one, if networks are callables that
            last, or `functools.partial` of such, and all tensors that change are arguments.

    Returns:
        The noisy images x_L, [N, C, H, W], and the point one step before, for `decode` to go on from.
    """
    return walk(net, x, schedule, levels, track=track, solver=solver, play=play)


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
    play: Play = called,
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
        play: what takes the steps, as of `encode`.

    Returns:
        The translated images, [N, C, H, W].
    """
    return walk(net, x, schedule, levels[::-1], guidance, clamp, track, hold, solver, before, play)[0]


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
    play: Play = called,
) -> tuple[Tensor, Tensor]:
    """Decode noisy images guided and, as a control, unguided, in one batch; arguments as of `decode`.

    What differs between the two is the effect of the guidance alone: the error of encoding and decoding is in both.
    `track` and `hold` see the guided ones first, then the controls, [2N, C, H, W].
    """
    if not any(one.pulls(level) for one in guidance for level in levels):
        alone = decode(net, x, schedule, levels, (), clamp, track, hold, solver, before, play)
        return alone, alone
    count = len(x)
    before = before and before.part(torch.arange(count).repeat(2))
    walked = (schedule, levels[::-1], guidance, clamp, track, hold, solver, before, play)
    both, _ = walk(net, torch.cat([x, x]), *walked, controls=count)
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
    play: Play = called,
    controls: int = 0,
) -> tuple[Tensor, Point]:
    """Take one step for each pair of neighbouring levels; nothing pulls at the last `controls` of the images.

    All that a step needs beside images is made before the first: a GPU is then told to compute, and never waited for.

    Returns the images, and the point where the last step began.
    """
    guided = len(x) - controls
    ones = torch.ones(len(x), dtype=torch.float64, device=x.device)
    still = torch.zeros_like(x[guided:])
    guidance, places = settled(guidance, ones[:guided]), places_of(schedule, levels, x)
    for (level, next_level), (at, to) in zip(pairwise(levels), pairwise(places), strict=True):
        pulling = [one for one in guidance if one.pulls(level)]
        fresh = noise_of(level, x.shape[1:], x.device, x.dtype) if any(one.fresh for one in pulling) else None
        x, before = play(step, net, solver, pulling, clamp, x, before, at, to, fresh, ones, still)
        if hold:
            x = hold(next_level, x)
        if track:
            track(next_level, x)
    assert before is not None
    return x, before


class Place(NamedTuple):
    """A level as a step needs it, on the device of the images: once for each, [N], and once for all, []."""

    t: Tensor  # [N] the timestep
    alpha_bars: Tensor  # [N] float64
    alpha_bar: Tensor  # [] float64
    sigma: Tensor  # [] float64, noise over signal


def places_of(schedule: Schedule, levels: Sequence[int], x: Tensor) -> list[Place]:
    """Return the places of levels, for images x [N, C, H, W]."""
    at = torch.tensor(levels)
    alpha_bar = schedule.alpha_bar[at]
    single = alpha_bar.to(x.device), ((1 - alpha_bar) / alpha_bar).sqrt().to(x.device)
    alpha_bars, t = (one.to(x.device)[:, None].repeat(1, len(x)) for one in (alpha_bar, timestep(at)))
    return [Place(*one) for one in zip(t, alpha_bars, *single, strict=True)]


def step(
    net: Network,
    solver: Solver,
    pulling: Sequence[Guidance],
    clamp: tuple[float, float] | None,
    x: Tensor,
    before: Point | None,
    at: Place,
    to: Place,
    fresh: Tensor | None,
    ones: Tensor,
    still: Tensor,
) -> tuple[Tensor, Point]:
    """Take one step of images x [N, C, H, W] (eq. 3 downwards, eq. 4 upwards): all of it is tensors of one device.

    Args:
        net: the diffusion model.
        solver: what makes the step's eps.
        pulling: what pulls at this level.
        clamp: limits of the predicted clean image.
        x: the images.
        before: where the step before began.
        at: the level of the images.
        to: the level that they come to.
        fresh: noise [C, H, W], if anybody asks for it.
        ones: [N] float64.
        still: zeros [M, C, H, W]: nothing pulls at the last M images.

    Returns:
        The images at the next level, and the point where this step began.
    """
    here = Point(x, net(x, at.t)[:, : x.shape[1]].to(x.dtype), at.alpha_bar, at.sigma)
    eps = solver(here, before, to.sigma)
    g, s = None, ones
    if pulling:
        guided = len(x) - len(still)
        g, s = pull(pulling, here.part(slice(guided)), at, to, fresh, ones[:guided])
        if len(still):
            g, s = torch.cat([g, still]), torch.cat([s, ones[guided:]])
    return ddim_step(x, eps, g, at.alpha_bars, to.alpha_bars, s, clamp), here  # eq. 3, 4


def pull(
    guidance: Sequence[Guidance], here: Point, at: Place, to: Place, fresh: Tensor | None, ones: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what pulls at the first N images of a step: a gradient [N, C, H, W], and its scale for each, [N].

    Arguments as of `step`; of N images, `ones` is [N].
    """
    count = len(ones)
    shown = here.x if fresh is None else under_fresh_noise(here, fresh)
    slopes = [slope(one.score, shown if one.fresh else here.x, at.t[:count]) for one in guidance]
    ends = at.alpha_bars[:count], to.alpha_bars[:count]
    scales = [one.scale(found, *ends) for one, found in zip(guidance, slopes, strict=True) if callable(one.scale)]
    if len(slopes) == 1:
        return slopes[0].gradient, scales[0]
    pulls = [found.gradient * s[:, None, None, None].to(here.x.dtype) for found, s in zip(slopes, scales, strict=True)]
    return torch.stack(pulls).sum(0), ones


def settled(guidance: Sequence[Guidance], ones: Tensor) -> list[Guidance]:
    """Return what pulls at all, with scales that every step can ask, of as many images as there are ones."""
    return [
        one if callable(one.scale) else one._replace(scale=partial(always, one.scale * ones))
        for one in guidance
        if one.scale
    ]


def always(s: Tensor, found: Slope, alpha_bar: Tensor, next_alpha_bar: Tensor) -> Tensor:
    """Return the paper's scale: s [N], whatever the slope and the level."""
    return s


def under_fresh_noise(here: Point, fresh: Tensor) -> Tensor:
    """Return noisy images [N, C, H, W] whose predicted x0 is the same, and whose noise is drawn anew: [C, H, W].

    Task networks learn from images under noise that knows nothing of them. The noise of an encoded image is made of
    the image, and stays for the whole walk: a network that meets nothing else is met in its weaknesses. The draw
    depends on the level alone, and is the same for every image, so that no result depends on its batch.
    """
    return here.x + (1 - here.alpha_bar).sqrt() * (fresh - here.eps)


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
    return partial(steered, strength, steepness)


def steered(
    strength: float | Tensor, steepness: float, found: Slope, alpha_bar: Tensor, next_alpha_bar: Tensor
) -> Tensor:
    """Return the scale of `balanced`, [N]."""
    squares = found.gradient.flatten(1).double().square()
    size = ((1 - alpha_bar) * squares.mean(1)).sqrt()
    s = strength / (steepness * size).clamp(min=FLAT).sqrt()
    gain = reach(alpha_bar, next_alpha_bar) * squares.sum(1)  # on the tangent, of s = 1
    share = (strength / WHOLE * alpha_bar).clamp(max=1)
    enough = -2 * share * found.score.double() / gain.clamp(min=FLAT)
    return torch.where(found.score < 0, torch.minimum(s, enough), s)


def reach(alpha_bar: Tensor, next_alpha_bar: Tensor) -> Tensor:
    """Return how far a step moves images along the gradient for s = 1, measured at the level that it begins at.

    By eq. 3 guidance sqrt(1 - ab) g in eps moves x' by sqrt(ab') (sigma - sigma') of it, and x = x' sqrt(ab / ab').
    """
    sigma, next_sigma = (((1 - ab) / ab).sqrt() for ab in (alpha_bar, next_alpha_bar))
    return alpha_bar.sqrt() * (sigma - next_sigma) * (1 - alpha_bar).sqrt()
