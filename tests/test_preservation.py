"""What is measured of an image that changed, against values worked out by hand."""

from dataclasses import replace

import pytest
import torch

from knife.image import read
from knife.preservation import changed_most, percentile, preserved, smoothed, ssim


@pytest.fixture
def image(images):
    return read(images / "slice.nii")


def changed_by(image, change):
    return replace(image, pixels=image.pixels + change)


def test_nothing_changed(image):
    assert preserved(image, image) == {"changed": 0, "p95": 0, "ssim": 1}
    inside = torch.zeros(1, 32, 32, dtype=torch.bool)
    inside[:, 10:20, 10:20] = True
    told = preserved(image, image, inside)
    assert told["share_outside"] == told["changed_inside"] == 0
    assert told["ssim_outside"] == 1


def test_changes_are_shares_of_the_window_told_inside_and_outside(image):
    inside = torch.zeros(1, 32, 32, dtype=torch.bool)
    inside[:, :16] = True
    width = (image.window[:, 1] - image.window[:, 0])[:, None, None]
    share = torch.where(inside, 0.3, 0.01)
    told = preserved(image, changed_by(image, share * width), inside)
    seen = ~image.background
    above, below = int((seen & inside[0]).sum()), int((seen & ~inside[0]).sum())
    assert told["changed_inside"] == pytest.approx(0.3, rel=1e-3)
    assert told["changed_outside"] == pytest.approx(0.01, rel=1e-3)
    assert told["p95_outside"] == pytest.approx(0.01, rel=1e-3)
    assert told["changed"] == pytest.approx((0.3 * above + 0.01 * below) / (above + below), rel=1e-3)
    assert told["share_outside"] == pytest.approx(0.01 * below / (0.3 * above + 0.01 * below), rel=1e-3)
    assert "ssim" not in told


def test_the_background_does_not_count(image):
    change = torch.where(image.background, 9.0, 0.0)
    told = preserved(image, changed_by(image, change))
    assert told["changed"] == told["p95"] == 0


def test_ssim_of_flat_images_is_that_of_their_means():
    """Without variance the formula is (2ab + C1)/(a^2 + b^2 + C1)."""
    a, b = torch.full((1, 16, 16), 0.25), torch.full((1, 16, 16), 0.75)
    wanted = (2 * 0.25 * 0.75 + 1e-4) / (0.25**2 + 0.75**2 + 1e-4)
    assert torch.allclose(ssim(a, b), torch.full((1, 16, 16), wanted).double(), atol=1e-6)


def test_ssim_falls_with_noise_and_turns_negative_for_the_opposite():
    x = torch.rand(1, 24, 24, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    means = [float(ssim(x, x + size * noise).mean()) for size in (0, 0.05, 0.2, 0.8)]
    assert means[0] == pytest.approx(1, abs=1e-5)
    assert means == sorted(means, reverse=True)
    assert float(ssim(x, 1 - x).mean()) < -0.5


def test_blurring_keeps_what_is_flat_at_the_border_too():
    assert torch.allclose(smoothed(torch.full((2, 9, 7), 0.3), 2.0, 6), torch.full((2, 9, 7), 0.3))


def test_what_changed_most_is_round_the_largest_change():
    change = 0.01 * torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(0))
    change[:, 20:26, 5:11] += 1
    where = changed_most(change)[0]
    assert where[20:26, 5:11].all()
    assert where.sum() < 400
    assert not where[:8].any()
    assert not changed_most(torch.zeros(3, 32, 32)).any()


def test_percentiles_of_any_number_of_values():
    values = torch.arange(1.0, 101)[torch.randperm(100, generator=torch.Generator().manual_seed(0))]
    assert percentile(values, 0.95) == 95
    assert percentile(torch.tensor([3.0]), 0.95) == 3
    assert percentile(torch.ones(2**24 + 1), 0.95) == 1  # more than torch.quantile takes
