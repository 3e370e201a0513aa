"""The loss a diffusion model is trained with: mean squared error on the noise, plus the variational term that trains sigma.

Hybrid objective of Nichol and Dhariwal (arXiv 2102.09672): the network gives 2C channels, the noise eps and v, and
log sigma^2 = f log beta + (1 - f) log beta_tilde with f = (v + 1)/2. The variational term trains v alone: eps is detached there.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from knife.schedule import Schedule, noise, timestep

Network = Callable[[Tensor, Tensor], Tensor]


def hybrid_loss(net: Network, x0: Tensor, level: Tensor, eps: Tensor, schedule: Schedule) -> Tensor:
    """Return the training loss of each image, [N]: MSE on eps (eq. 2) plus the variational term in bits per dimension.

    Args:
        net: called as net(x [N, C, H, W], t [N]) -> [N, 2C, H, W]; with C outputs there is no variational term.
        x0: clean images [N, C, H, W] in the model's value range.
        level: noise levels 1..T, [N] integers.
        eps: standard normal noise like x0.
        schedule: the levels.
    """
    alpha_bar = schedule.alpha_bar.to(x0.device)
    x = noise(x0, eps, alpha_bar[level])  # eq. 1
    out = net(x, timestep(level)).to(x0.dtype)
    channels = x0.shape[1]
    predicted = out[:, :channels]
    mse = mean(torch.square(eps - predicted))  # eq. 2
    if out.shape[1] == channels:
        return mse
    return mse + variational_bound(x0, x, predicted.detach(), out[:, channels:], level, schedule)


def variational_bound(x0: Tensor, x: Tensor, eps: Tensor, v: Tensor, level: Tensor, schedule: Schedule) -> Tensor:
    """Return one term of the variational bound for each image, [N], in bits per dimension."""
    ab, ab_prev, beta, log_beta_tilde = (c.to(x0.dtype) for c in posterior(schedule, level, x0))
    f = (v + 1) / 2
    log_var = f * beta.log() + (1 - f) * log_beta_tilde
    predicted_x0 = (x - (1 - ab).sqrt() * eps) / ab.sqrt()
    weight_x0, weight_x = ab_prev.sqrt() * beta / (1 - ab), (1 - beta).sqrt() * (1 - ab_prev) / (1 - ab)
    true_mean, model_mean = weight_x0 * x0 + weight_x * x, weight_x0 * predicted_x0 + weight_x * x
    kl = normal_kl(true_mean, log_beta_tilde, model_mean, log_var)
    nll = -discretized_log_likelihood(x0, model_mean, 0.5 * log_var)
    return torch.where(level == 1, mean(nll), mean(kl)) / math.log(2)


def posterior(schedule: Schedule, level: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return alpha_bar at the level and below it, beta, and log beta_tilde, each [N, 1, 1, 1] float64.

    beta_tilde = beta (1 - alpha_bar_prev)/(1 - alpha_bar) is 0 at level 1, where the value of level 2 stands in (beta, if there is no level 2).
    """
    alpha_bar, beta = schedule.alpha_bar.to(like.device), schedule.beta.to(like.device)
    beta_tilde = beta * (1 - alpha_bar[:-1]) / (1 - alpha_bar[1:])
    beta_tilde[0] = beta_tilde[1] if schedule.T > 1 else beta[0]
    shape = (-1, *[1] * (like.ndim - 1))
    at = level - 1
    columns = alpha_bar[1:][at], alpha_bar[:-1][at], beta[at], beta_tilde.log()[at]
    ab, ab_prev, b, log_b = (c.view(shape) for c in columns)
    return ab, ab_prev, b, log_b


def normal_kl(mean1: Tensor, log_var1: Tensor, mean2: Tensor, log_var2: Tensor) -> Tensor:
    """Return KL(N1 || N2) of normal distributions, elementwise, in nats."""
    return 0.5 * (log_var2 - log_var1 - 1 + (log_var1 - log_var2).exp() + (mean1 - mean2) ** 2 * (-log_var2).exp())


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Return the log-probability, in nats, of 8-bit values x in [-1, 1] under a normal distribution cut into 256 bins."""

    def cdf(z: Tensor) -> Tensor:  # the tanh approximation, as the published models were trained
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    above = cdf((-log_scale).exp() * (x - mean + 1 / 255))
    below = cdf((-log_scale).exp() * (x - mean - 1 / 255))
    middle = torch.where(x > 0.999, 1 - below, above - below)
    return torch.where(x < -0.999, above, middle).clamp(min=1e-12).log()


def mean(x: Tensor) -> Tensor:
    """Average over everything but the first dimension."""
    return x.flatten(1).mean(1)
