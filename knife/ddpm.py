"""The loss of a diffusion model: mean squared error on the noise, plus the variational term that trains sigma.

Hybrid objective of Nichol and Dhariwal (arXiv 2102.09672): the network gives 2C channels, the noise eps and v, and
log sigma^2 = f log beta + (1 - f) log beta_tilde with f = (v + 1)/2. The variational term trains v alone: there, eps is
detached.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from knife.schedule import Schedule, alpha_bar_on, noise, timestep

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
    x = noise(x0, eps, alpha_bar_on(schedule, x0.device)[level])  # eq. 1
    out = net(x, timestep(level)).to(x0.dtype)
    channels = x0.shape[1]
    predicted = out[:, :channels]
    mse = mean(torch.square(eps - predicted))  # eq. 2
    if out.shape[1] == channels:
        return mse
    return mse + variational_bound(x0, x, predicted.detach(), out[:, channels:], level, schedule)


def variational_bound(x0: Tensor, x: Tensor, eps: Tensor, v: Tensor, level: Tensor, schedule: Schedule) -> Tensor:
    """Return one term of the variational bound for each image, [N], in bits per dimension."""
    signal, noise_part, weight_x0, weight_x, log_beta, log_beta_tilde = posterior(schedule, level, x0)
    f = (v + 1) / 2
    log_var = f * log_beta + (1 - f) * log_beta_tilde
    predicted_x0 = (x - noise_part * eps) / signal
    true_mean, model_mean = weight_x0 * x0 + weight_x * x, weight_x0 * predicted_x0 + weight_x * x
    kl = normal_kl(true_mean, log_beta_tilde, model_mean, log_var)
    nll = -discretized_log_likelihood(x0, model_mean, 0.5 * log_var)
    return torch.where(level == 1, mean(nll), mean(kl)) / math.log(2)


def posterior(schedule: Schedule, level: Tensor, like: Tensor) -> list[Tensor]:
    """Return the coefficients of q(x_{k-1} | x_k, x_0) at levels k, each [N, 1, 1, 1] in the dtype of `like`.

    They are sqrt(ab), sqrt(1 - ab), the weights of x_0 and of x_k in its mean, log beta and log beta_tilde: formed in
    float64, because 1 - ab loses its digits in float32 at low levels. beta_tilde = beta (1 - ab_prev)/(1 - ab) is 0 at
    level 1, where the value of level 2 stands in (beta, if there is no level 2).
    """
    found = coefficients(schedule, like.device)[:, level - 1].to(like.dtype)
    return [one.view(-1, *[1] * (like.ndim - 1)) for one in found]


@lru_cache(8)
def coefficients(schedule: Schedule, device: torch.device) -> Tensor:
    """Return the same of all levels 1..T, [6, T] float64, made once for each device; do not write to them."""
    alpha_bar, beta = schedule.alpha_bar, schedule.beta
    ab, ab_prev = alpha_bar[1:], alpha_bar[:-1]
    weight_x0, weight_x = ab_prev.sqrt() * beta / (1 - ab), (1 - beta).sqrt() * (1 - ab_prev) / (1 - ab)
    beta_tilde = beta * (1 - ab_prev) / (1 - ab)
    beta_tilde[0] = beta_tilde[1] if schedule.T > 1 else beta[0]
    return torch.stack([ab.sqrt(), (1 - ab).sqrt(), weight_x0, weight_x, beta.log(), beta_tilde.log()]).to(device)


def normal_kl(mean1: Tensor, log_var1: Tensor, mean2: Tensor, log_var2: Tensor) -> Tensor:
    """Return KL(N1 || N2) of normal distributions, elementwise, in nats."""
    return 0.5 * (log_var2 - log_var1 - 1 + (log_var1 - log_var2).exp() + (mean1 - mean2) ** 2 * (-log_var2).exp())


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Return the log-probability, in nats, of 8-bit values x in [-1, 1] under a normal distribution in 256 bins."""

    def cdf(z: Tensor) -> Tensor:  # the tanh approximation, as the published models were trained
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    above = cdf((-log_scale).exp() * (x - mean + 1 / 255))
    below = cdf((-log_scale).exp() * (x - mean - 1 / 255))
    middle = torch.where(x > 0.999, 1 - below, above - below)
    return torch.where(x < -0.999, above, middle).clamp(min=1e-12).log()


def mean(x: Tensor) -> Tensor:
    """Average over everything but the first dimension."""
    return x.flatten(1).mean(1)
