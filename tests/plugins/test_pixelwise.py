"""Sizes and classes that are counted pixel by pixel."""

import math

import pytest
import torch
from knife_plugins import classify, regress
from knife_plugins.pixelwise import Pixelwise, even_maps, maps_of, sizes
from torch import nn

from knife.data import Case
from knife.phantom import CHANNELS
from knife.spec import preset
from knife.tasks import task
from knife.unet import Encoder

SURE = 20.0  # a logit


class Told(nn.Module):
    """Stands in for a U-Net: says the same maps of every image, and has a third output that nobody asks for."""

    def __init__(self, mask, brain):
        super().__init__()
        self.maps = torch.stack([mask, brain, torch.ones_like(mask)]) * 2 * SURE - SURE

    def forward(self, x, t):
        return self.maps.expand(len(x), -1, -1, -1)


def rectangle(rows, columns, size=8):
    mask = torch.zeros(size, size)
    mask[:rows, :columns] = 1
    return mask


def case(mask):
    pixels = torch.full((2, 8, 8), -1.0)
    pixels[0, :, :5] = 0.5  # the brain, 40 pixels, which the second channel shows a part of
    pixels[1, :4, :5] = 0.7
    return Case("one", pixels, None if mask is None else mask[None], {})


X, T = torch.zeros(2, 2, 8, 8), torch.zeros(2, dtype=torch.long)


def test_a_label_holds_mask_and_brain_and_counts_as_the_relative_size():
    maps = maps_of(case(rectangle(2, 5)))
    assert maps.shape == (2, 8, 8)
    assert maps[0].sum() == 10
    assert maps[1].sum() == 40
    assert sizes(maps[None]).item() == pytest.approx(0.25)
    assert regress.value_of(case(rectangle(2, 5)), regress.TUMOUR) == pytest.approx(0.25)


@pytest.mark.parametrize("size", [0.0, 0.07, 1.0, math.inf, -math.inf])
def test_a_target_counts_as_the_size_that_is_wanted(size):
    assert sizes(even_maps(size, (8, 8))[None]).item() == pytest.approx(size)


def test_a_size_is_counted_in_standard_units():
    net = regress.Size(Pixelwise(Told(rectangle(2, 5), rectangle(8, 5))), mean=0.05, std=0.1)
    torch.testing.assert_close(net(X, T), torch.full((2, 1), 2.0))
    config = {"label": regress.TUMOUR, "maps": 2, "mean": 0.05, "std": 0.1, "low": 0.0, "high": 0.5}
    known, spec = task("regress"), preset("small-64").spec("regress", CHANNELS)
    wanted = torch.stack([known.target("0.25", None, spec, config), known.target("0.15", None, spec, config)])
    torch.testing.assert_close(known.error(net, X, T, wanted, config), torch.tensor([0.0, 0.1]), atol=1e-6, rtol=0)
    torch.testing.assert_close(known.evaluate(net, X, T, None, config)["value"], torch.full((2,), 0.25))
    torch.testing.assert_close(known.score(net, wanted)(X, T), torch.tensor([0.0, -0.5]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("pixels", "healthy"), [(0, 1.0), (1, math.exp(-1)), (10, math.exp(-10))])
def test_a_class_is_as_likely_as_no_pixel_of_the_mask(pixels, healthy):
    net = classify.Presence(Pixelwise(Told(rectangle(1, pixels, 16), rectangle(16, 16, 16))))
    log_p = net(torch.zeros(1, 2, 16, 16), T[:1])
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones(1))
    assert log_p[0, 1].exp().item() == pytest.approx(healthy, rel=1e-3, abs=1e-5)
    assert log_p.isfinite().all()


@pytest.mark.parametrize(("t", "temperature"), [(0, 2.0), (50, 4.0), (100, 8.0), (999, 1.0), (5000, 1.0)])
def test_the_number_expected_is_divided_by_the_temperature_of_the_timestep(t, temperature):
    net = classify.Presence(Pixelwise(Told(rectangle(1, 10, 16), rectangle(16, 16, 16))))
    with torch.no_grad():
        net.knots[:2] = torch.tensor([2.0, 8.0]).log() / classify.RATE
    log_p = net(torch.zeros(1, 2, 16, 16), torch.tensor([t]))
    assert log_p[0, 1].item() == pytest.approx(-10 / temperature, rel=1e-3)


class Wary(nn.Module):
    """Suspects all 256 pixels a little, and those of a tumour a little more; its one weight is of no use."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x, t):
        suspected = torch.where(x[:, :1] > 0, -2.0, -3.0) + self.weight
        return torch.cat([suspected, suspected], 1)


def test_a_temperature_is_learnt_that_makes_classes_of_wary_maps():
    torch.manual_seed(0)
    masks = torch.stack([rectangle(6, 16, 16) if i % 2 else rectangle(0, 0, 16) for i in range(8)])
    labels = torch.stack([torch.stack([mask, torch.ones_like(mask)]) for mask in masks])
    x, t = masks[:, None], torch.full((8,), 30)
    net = classify.Presence(Pixelwise(Wary()))
    before = net(x, t)[::2, 1].exp()
    assert (before < 1e-4).all(), "healthy images are called diseased"
    optimizer = torch.optim.Adam([net.knots], lr=5e-4)
    for _ in range(600):
        optimizer.zero_grad()
        task("classify").train(net, x, t, labels).backward()
        optimizer.step()
    p = net(x, t).exp()
    assert (p[::2, 1] > 0.3).all()
    assert (p[1::2, 0] > 0.7).all()
    assert p[0, 1] / p[1, 1] > 1.5


def test_the_temperature_leaves_the_maps_as_they_are():
    x, t = torch.rand(2, 2, 16, 16), torch.tensor([30, 600])
    label = torch.stack([torch.stack([rectangle(0, 0, 16), rectangle(9, 9, 16)])] * 2)
    net = classify.Presence(Pixelwise(Wary()))
    net.loss(x, t, label).backward()
    alone = Wary()
    nn.functional.binary_cross_entropy_with_logits(alone(x, t), label).backward()
    torch.testing.assert_close(net.maps.unet.weight.grad, alone.weight.grad)
    assert (net.knots.grad != 0).nonzero().flatten().tolist() == [0, 1, 6]


def test_a_class_is_read_from_labels_and_targets_alike():
    known, spec = task("classify"), preset("small-64").spec("classify", CHANNELS)
    config = known.configure([case(rectangle(2, 5)), case(rectangle(0, 0))])
    net = classify.Presence(Pixelwise(Told(rectangle(0, 0), rectangle(8, 5))))
    labels = torch.stack([known.label(case(mask), config) for mask in (rectangle(2, 5), rectangle(0, 0))])
    targets = torch.stack([known.target(text, None, spec, config) for text in ("diseased", "healthy")])
    for wanted in (labels, targets):
        torch.testing.assert_close(known.error(net, X, T, wanted, config), torch.tensor([1.0, 0.0]), atol=1e-4, rtol=0)


def test_the_label_chooses_between_counting_and_the_papers_encoder():
    cases = [case(rectangle(2, 5)), case(rectangle(0, 0))]
    for name, counted, encoded in (
        ("regress", regress.PIXELS, regress.TUMOUR), ("classify", classify.PIXELS, classify.DISEASE),
    ):  # fmt: skip
        known, spec = task(name), preset("small-64").spec(name, ("a", "b"))
        assert known.configure(cases) == known.configure(cases, counted)
        assert isinstance(known.build(spec, known.configure(cases)).maps, Pixelwise)
        assert isinstance(known.build(spec, known.configure(cases, encoded)), Encoder)
