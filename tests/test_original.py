"""The formulas against the original implementation (guided-diffusion): schedules, training loss, one step up and down.

Indices: the original counts timesteps t = 0..T-1 where knife counts levels 0..T, and its t is knife's level t + 1:

    original                  knife
    training_losses at t      hybrid_loss at level t + 1
    ddim_sample at t          decode from level t + 1 to t
    ddim_reverse_sample at t  encode from level t + 1 to t + 2

Its last step up, from t = T - 1 to alpha_bar = 0, has no counterpart here; knife's first, from level 0, has none there.

The original rounds its coefficients to float32; here it is made to keep them in float64, so that formulas are compared.
"""

import warnings

import pytest
import torch

from knife.ddim import Guidance, decode, encode
from knife.ddpm import hybrid_loss
from knife.schedule import Schedule

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # it spells torch.amp's decorators the old way
    from guided_diffusion import gaussian_diffusion as original

SCHEDULES = [Schedule("linear", 1000), Schedule("cosine", 1000), Schedule("linear", 40)]
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture(autouse=True)
def float64_coefficients(monkeypatch):
    def extract(array, timesteps, shape):
        return torch.from_numpy(array)[timesteps].view(-1, *[1] * (len(shape) - 1)).expand(shape)

    monkeypatch.setattr(original, "_extract_into_tensor", extract)


def diffusion(schedule, learned_sigma=True):
    variance = original.ModelVarType.LEARNED_RANGE if learned_sigma else original.ModelVarType.FIXED_LARGE
    return original.GaussianDiffusion(
        betas=original.get_named_beta_schedule(schedule.kind, schedule.T),
        model_mean_type=original.ModelMeanType.EPSILON,
        model_var_type=variance,
        loss_type=original.LossType.MSE,
    )


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def net(x, t):
    """Answer like a network with learned sigma: something smooth of the image and the timestep, v mostly in [-1, 1]."""
    when = t.view(-1, 1, 1, 1) / 1000
    return torch.cat([torch.sin(2 * x + when) + 0.3 * x, torch.cos(x - when)], 1)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules(schedule):
    theirs = diffusion(schedule)
    torch.testing.assert_close(schedule.beta, torch.from_numpy(theirs.betas), rtol=1e-12, atol=1e-16)
    torch.testing.assert_close(schedule.alpha_bar[1:], torch.from_numpy(theirs.alphas_cumprod), rtol=1e-11, atol=0)


@pytest.mark.parametrize("learned_sigma", [True, False])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_training_loss_of_each_image(schedule, learned_sigma):
    level = torch.tensor([1, 1, 2, schedule.T // 2, schedule.T - 1, schedule.T])
    x0 = normal(6, 3, 4, 4).clamp(-1, 1)  # so that some pixels lie in the outermost bins
    eps = normal(6, 3, 4, 4, seed=1)
    model = net if learned_sigma else lambda x, t: net(x, t)[:, :3]
    theirs = diffusion(schedule, learned_sigma).training_losses(model, x0, level - 1, noise=eps)["loss"]
    torch.testing.assert_close(hybrid_loss(model, x0, level, eps, schedule), theirs, **CLOSE)


@pytest.mark.parametrize("level", [1, 2, 20, 39])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_step_up(schedule, level):
    x, at = normal(2, 3, 4, 4), torch.tensor([level, level])
    theirs = diffusion(schedule).ddim_reverse_sample(net, x, at - 1, clip_denoised=False)["sample"]
    torch.testing.assert_close(encode(net, x, schedule, [level, level + 1])[0], theirs, **CLOSE)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("level", [1, 2, 20, 40])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_unguided_step_down(schedule, level, clip):
    x, at = normal(2, 3, 4, 4), torch.tensor([level, level])
    theirs = diffusion(schedule).ddim_sample(net, x, at - 1, clip_denoised=clip, eta=0)["sample"]
    ours = decode(net, x, schedule, [level - 1, level], clamp=(-1, 1) if clip else None)
    torch.testing.assert_close(ours, theirs, **CLOSE)


def score(x, t):
    return -((x - 0.4) ** 2).sum((1, 2, 3)) * (1 + t / 1000)


def score_gradient(x, t):
    return -2 * (x - 0.4) * (1 + t / 1000).view(-1, 1, 1, 1)


@pytest.mark.parametrize("level", [1, 2, 20, 40])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_guided_step_down(schedule, level):
    x, at, scale = normal(2, 3, 4, 4), torch.tensor([level, level]), 3.0
    theirs = diffusion(schedule).ddim_sample(
        net,
        x,
        at - 1,
        clip_denoised=False,
        cond_fn=lambda x, t: scale * score_gradient(x, t),
        model_kwargs={},
        eta=0,
    )["sample"]
    torch.testing.assert_close(decode(net, x, schedule, [level - 1, level], [Guidance(score, scale)]), theirs, **CLOSE)


@pytest.mark.parametrize("level", [2, 20, 40])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_clipped_and_guided_step_down(schedule, level):
    """The original clips x0 and guides then, so that its x0 may leave the range again; knife clamps the guided x0.

    They agree if the clipping is part of the network: eps as the clipped x0 implies it, then guided and never clamped.
    """
    x, at, scale = normal(2, 3, 4, 4), torch.tensor([level, level]), 3.0
    theirs = diffusion(schedule).ddim_sample(
        net,
        x,
        at - 1,
        clip_denoised=True,
        cond_fn=lambda x, t: scale * score_gradient(x, t),
        model_kwargs={},
        eta=0,
    )["sample"]
    ab = schedule.alpha_bar[level]

    def clipped(x, t):
        x0 = ((x - (1 - ab).sqrt() * net(x, t)[:, :3]) / ab.sqrt()).clamp(-1, 1)
        return (x - ab.sqrt() * x0) / (1 - ab).sqrt()

    torch.testing.assert_close(
        decode(clipped, x, schedule, [level - 1, level], [Guidance(score, scale)]), theirs, **CLOSE
    )
    last = decode(net, x, schedule, [0, level], [Guidance(score, scale)], clamp=(-1, 1))
    assert last.abs().max() <= 1
