"""The training loss against closed forms."""

import math

import pytest
import torch

from knife.ddpm import discretized_log_likelihood, hybrid_loss, normal_kl, posterior
from knife.schedule import Schedule, noise

SCHEDULE = Schedule("linear", 1000)


def normal(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def fixed(eps, v=None):
    """Return a network that answers with given values, whatever it sees."""
    return lambda x, t: eps if v is None else torch.cat([eps, v], 1)


def test_without_a_learned_sigma_the_loss_is_the_squared_error_of_eps():
    x0, eps, wrong = normal(3, 2, 4, 4), normal(3, 2, 4, 4, seed=1), normal(3, 2, 4, 4, seed=2)
    loss = hybrid_loss(fixed(wrong), x0, torch.tensor([1, 500, 1000]), eps, SCHEDULE)
    torch.testing.assert_close(loss, ((eps - wrong) ** 2).mean((1, 2, 3)), rtol=1e-14, atol=0)


def test_the_network_sees_the_noised_images_and_their_timesteps():
    x0, eps, level = normal(3, 1, 4, 4), normal(3, 1, 4, 4, seed=1), torch.tensor([1, 2, 1000])

    def net(x, t):
        assert t.tolist() == [0, 1, 999]
        assert torch.equal(x, noise(x0, eps, SCHEDULE.alpha_bar[level]))
        return eps

    assert hybrid_loss(net, x0, level, eps, SCHEDULE).tolist() == [0, 0, 0]


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_exact_eps_and_the_true_variance_leave_no_loss(kind):
    x0, eps = normal(3, 1, 4, 4), normal(3, 1, 4, 4, seed=1)
    loss = hybrid_loss(fixed(eps, -torch.ones_like(eps)), x0, torch.tensor([2, 500, 999]), eps, Schedule(kind, 1000))
    assert loss.abs().max() < 1e-12


def test_exact_eps_and_too_large_a_variance_cost_the_divergence_of_two_normals():
    x0, eps, level = normal(3, 1, 4, 4), normal(3, 1, 4, 4, seed=1), torch.tensor([2, 500, 1000])
    loss = hybrid_loss(fixed(eps, torch.ones_like(eps)), x0, level, eps, SCHEDULE)
    alpha_bar = SCHEDULE.alpha_bar
    ratio = (1 - alpha_bar[level - 1]) / (1 - alpha_bar[level])  # beta_tilde / beta
    torch.testing.assert_close(loss, (ratio - 1 - ratio.log()) / 2 / math.log(2), rtol=1e-9, atol=1e-14)


def test_the_lowest_level_pays_for_the_8_bit_values():
    x0 = torch.tensor([-1.0, -0.2, 0.0, 1.0], dtype=torch.float64).view(1, 1, 2, 2)
    eps, v = normal(1, 1, 2, 2), torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    loss = hybrid_loss(fixed(eps, v), x0, torch.tensor([1]), eps, SCHEDULE)
    beta = SCHEDULE.beta
    stand_in = beta[1] * beta[0] / (1 - SCHEDULE.alpha_bar[2])  # beta_tilde of level 2
    log_std = 0.25 * (beta[0].log() + stand_in.log())
    expected = -discretized_log_likelihood(x0, x0, log_std).mean() / math.log(2)  # eps is exact, so the mean is x0
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)


def test_the_lowest_level_asks_how_likely_the_image_is_where_the_network_expects_it():
    x0 = torch.tensor([-1.0, -0.2, 0.5, 1.0], dtype=torch.float64).view(1, 1, 2, 2)
    eps, v = normal(1, 1, 2, 2), torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    wrong = eps + torch.tensor([[-2.0, 1.0], [-3.0, 2.0]], dtype=torch.float64)
    loss = hybrid_loss(fixed(wrong, v), x0, torch.tensor([1]), eps, SCHEDULE)
    ab, beta = SCHEDULE.alpha_bar[1], SCHEDULE.beta
    expected_x0 = (noise(x0, eps, ab[None]) - (1 - ab).sqrt() * wrong) / ab.sqrt()
    log_std = 0.25 * (beta[0].log() + (beta[1] * beta[0] / (1 - SCHEDULE.alpha_bar[2])).log())
    nll = -discretized_log_likelihood(x0, expected_x0, log_std).mean() / math.log(2)
    assert loss.item() == pytest.approx(((eps - wrong) ** 2).mean().item() + nll.item(), rel=1e-9)


def test_the_variational_term_trains_sigma_alone():
    x0, eps = normal(3, 2, 4, 4), normal(3, 2, 4, 4, seed=1)
    predicted, v = normal(3, 2, 4, 4, seed=2).requires_grad_(), normal(3, 2, 4, 4, seed=3).requires_grad_()
    hybrid_loss(fixed(predicted, v), x0, torch.tensor([1, 500, 1000]), eps, SCHEDULE).sum().backward()
    torch.testing.assert_close(predicted.grad, 2 * (predicted - eps).detach() / 32, rtol=1e-12, atol=0)
    assert (v.grad.abs().amax((1, 2, 3)) > 0).all()


def test_the_loss_of_an_image_does_not_depend_on_its_neighbours():
    x0, eps, level = normal(4, 1, 4, 4), normal(4, 1, 4, 4, seed=1), torch.tensor([1, 2, 300, 1000])
    net = lambda x, t: torch.cat([torch.sin(x), torch.cos(x)], 1)  # noqa: E731
    together = hybrid_loss(net, x0, level, eps, SCHEDULE)
    alone = [hybrid_loss(net, x0[[i]], level[[i]], eps[[i]], SCHEDULE) for i in range(4)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-13, atol=0)


@pytest.mark.parametrize("T", [1, 2, 50])
def test_the_loss_and_its_gradient_are_finite_for_few_levels(T):
    x0, eps, v = normal(2, 1, 4, 4).clamp(-1, 1), normal(2, 1, 4, 4, seed=1), normal(2, 1, 4, 4, seed=2)
    v.requires_grad_()
    loss = hybrid_loss(fixed(0.9 * eps, v), x0, torch.tensor([1, T]), eps, Schedule("linear", T))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert v.grad.isfinite().all()


def test_float32_agrees_with_float64():
    x0, eps, error, v = (normal(4, 1, 8, 8, seed=i).clamp(-1, 1) for i in range(4))
    wrong = eps + 0.1 * error
    level = torch.tensor([1, 2, 300, 1000])
    exact = hybrid_loss(fixed(wrong, v), x0, level, eps, SCHEDULE)
    single = hybrid_loss(fixed(wrong.float(), v.float()), x0.float(), level, eps.float(), SCHEDULE)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize("log_std", [-6.0, -3.0, 0.0])
def test_the_256_values_share_a_probability_of_one(log_std):
    values = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    likelihood = discretized_log_likelihood(values, torch.tensor(0.3), torch.tensor(log_std, dtype=torch.float64))
    assert likelihood.exp().sum().item() == pytest.approx(1, abs=1e-9)


def test_what_is_a_bin_away_is_as_likely_as_the_normal_distribution_says():
    values, mean = torch.arange(256, dtype=torch.float64) / 127.5 - 1, torch.tensor(0.3, dtype=torch.float64)
    edges = torch.cat([torch.tensor([-9.0]), values[:-1] + 1 / 255, torch.tensor([9.0])]).double()
    for std in (1 / 255, 3 / 255, 2.0):
        exact = torch.distributions.Normal(mean, std).cdf(edges).diff()
        found = discretized_log_likelihood(values, mean, torch.tensor(std, dtype=torch.float64).log()).exp()
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-3)


def test_no_value_is_impossible():
    far = discretized_log_likelihood(torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([1.0, 1.0, -1.0]), torch.tensor(-6.0))
    assert far.tolist() == pytest.approx([math.log(1e-12)] * 3)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_the_posterior_is_that_of_bayes(kind):
    """x_{k-1} is N(sqrt(ab_{k-1}) x_0, 1 - ab_{k-1}), and seen in x_k = sqrt(1 - beta) x_{k-1} + noise of beta."""
    schedule, level = Schedule(kind, 40), torch.arange(2, 41)
    ab, beta = schedule.alpha_bar, schedule.beta
    before, spread = ab[1:-1], beta[1:]
    variance = 1 / (1 / (1 - before) + (1 - spread) / spread)
    expected = [
        ab[2:].sqrt(), (1 - ab[2:]).sqrt(), variance * before.sqrt() / (1 - before),
        variance * (1 - spread).sqrt() / spread, spread.log(), variance.log(),
    ]  # fmt: skip
    found = posterior(schedule, level, normal(1, 1, 1, 1))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.view(-1), other, rtol=1e-9, atol=0)


@pytest.mark.parametrize("T", [2, 3])
def test_the_lowest_level_borrows_the_variance_of_the_next(T):
    first, second = posterior(Schedule("linear", T), torch.tensor([1, 2]), normal(1, 1, 1, 1))[-1].view(-1)
    assert first == second


def test_divergence_of_normals():
    mean1, log_var1, mean2, log_var2 = normal(4, 5)
    assert normal_kl(mean1, log_var1, mean1, log_var1).tolist() == [0] * 5
    first = torch.distributions.Normal(mean1, (log_var1 / 2).exp())
    second = torch.distributions.Normal(mean2, (log_var2 / 2).exp())
    expected = torch.distributions.kl_divergence(first, second)
    torch.testing.assert_close(normal_kl(mean1, log_var1, mean2, log_var2), expected, rtol=1e-12, atol=1e-14)
