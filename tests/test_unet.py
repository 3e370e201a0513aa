"""The networks: the paper's sizes, the options, what a guide needs."""

from dataclasses import replace

import pytest
import torch

from knife import unet
from knife.ops import norm_reference
from knife.spec import PRESETS, preset
from knife.unet import POOLS, Architecture, Encoder, UNet, zeroed

TINY = Architecture(32, (1, 2), res_blocks=1, attention=(2,), heads=2)
RICH = replace(TINY, head_width=16, scale_shift=True, updown=True)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lively(net):
    """Return the network with every weight drawn anew, so that no branch is silent."""
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / max(parameter[0].numel(), 8) ** 0.5
    return net.eval().requires_grad_(False)


def parameters(net):
    return sum(parameter.numel() for parameter in net.parameters())


@pytest.mark.parametrize(
    ("name", "kind", "outputs", "count"),
    [
        ("paper-faces", "diffusion", 6, 85_606_150),
        ("paper-brats", "diffusion", 8, 113_681_160),
        ("paper-brats", "segment", 1, 113_681_160),
        ("paper-faces", "regress", 1, 67_061_121),
        ("paper-brats", "regress", 1, 5_452_833),
    ],
)
def test_presets_of_the_paper_have_its_parameter_counts(name, kind, outputs, count):
    spec = preset(name).spec(kind, tuple("abcd"[: PRESETS[name].channels]))
    with torch.device("meta"):
        net = spec.build_encoder(outputs) if kind == "regress" else spec.build_unet(outputs)
    assert parameters(net) == count


def test_the_label_embedding_is_what_the_brats_model_counts_more_than_an_unconditional_one():
    with torch.device("meta"):
        assert parameters(UNet(replace(preset("paper-brats").diffusion, classes=0), 4, 8)) == 113_680_136


@pytest.mark.parametrize("arch", [TINY, RICH, replace(TINY, stem=2, attention=(4,)), replace(TINY, classes=3)])
@pytest.mark.parametrize(("channels", "size"), [(1, (8, 8)), (4, (8, 12)), (7, (16, 4))])
def test_any_channel_count_and_sizes_that_are_not_square(arch, channels, size):
    x, t = normal(2, channels, *size), torch.tensor([0, 999])
    assert lively(UNet(arch, channels, 2 * channels))(x, t).shape == (2, 2 * channels, *size)
    for pool in POOLS:
        out = lively(Encoder(replace(arch, pool=pool), channels, 3, size))(x, t)
        assert out.shape == (2, 3)
        assert (out[0] != out[1]).any()


@pytest.mark.parametrize("arch", [TINY, RICH, replace(TINY, stem=2)])
def test_a_new_network_answers_zero(arch):
    torch.manual_seed(0)
    x, t = normal(2, 2, 8, 8), torch.tensor([3, 500])
    assert UNet(arch, 2, 4)(x, t).count_nonzero() == 0
    assert Encoder(replace(arch, pool="mean"), 2, 3, (8, 8))(x, t).count_nonzero() == 0


def test_the_residual_branches_of_a_new_network_are_silent():
    torch.manual_seed(0)
    for module in UNet(TINY, 2, 4).modules():
        silent = getattr(module, "conv2", None) or getattr(module, "out", None)
        if silent is not None:
            assert silent.weight.count_nonzero() == silent.bias.count_nonzero() == 0


def test_outputs_can_be_fixed_by_the_architecture():
    x, t = normal(1, 2, 8, 8), torch.tensor([1])
    assert UNet(replace(TINY, outputs=5), 2, 1)(x, t).shape == (1, 5, 8, 8)
    assert Encoder(replace(TINY, outputs=5), 2, 1, (8, 8))(x, t).shape == (1, 5)


def test_the_stem_loses_no_pixel():
    net = UNet(replace(TINY, stem=2), 3, 3)
    x = normal(2, 3, 8, 12)
    stemmed = net.down.stem(x)
    assert stemmed.shape == (2, 12, 4, 6)
    assert torch.equal(net.unstem(stemmed), x)
    assert net.down.conv_in.in_channels == net.conv_out.out_channels == 12


def test_attention_levels_are_counted_in_pixels_of_the_image():
    def attending(net):
        return {name for name, block in net.down.blocks.items() if hasattr(getattr(block, "attention", None), "qkv")}

    assert attending(UNet(TINY, 1, 1)) == {"level1_block0"}
    assert attending(UNet(replace(TINY, stem=2), 1, 1)) == {"level0_block0"}  # which lies behind the stem, at factor 2


def test_a_label_is_added_to_the_embedding_and_without_one_none_is():
    net, x, t = lively(UNet(replace(TINY, classes=2), 1, 1)), normal(2, 1, 8, 8), torch.tensor([5, 5])
    healthy, diseased = (net(x, t, torch.tensor([label] * 2)) for label in (0, 1))
    assert (healthy != diseased).any()
    zeroed(net.embedding.label)
    torch.testing.assert_close(net(x, t), net(x, t, torch.tensor([0, 1])), rtol=0, atol=0)


def test_the_timestep_matters():
    for net in (lively(UNet(TINY, 1, 1)), lively(UNet(RICH, 1, 1))):
        x = normal(1, 1, 8, 8)
        assert (net(x, torch.tensor([1])) - net(x, torch.tensor([900]))).abs().max() > 1e-3


@pytest.mark.parametrize("arch", [TINY, RICH])
def test_images_of_a_batch_do_not_see_each_other(arch):
    net, x, t = lively(UNet(arch, 2, 2)), normal(3, 2, 8, 8), torch.tensor([0, 10, 999])
    alone = torch.cat([net(x[[i]], t[[i]]) for i in range(3)])
    torch.testing.assert_close(net(x, t), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", [TINY, RICH, replace(TINY, stem=2)])
def test_channels_last_gives_what_contiguous_gives(arch):
    x, t = normal(2, 4, 8, 12), torch.tensor([7, 700])
    for net in (lively(UNet(arch, 4, 8)), lively(Encoder(arch, 4, 2, (8, 12)))):
        expected = net(x, t)
        last = net.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), t)
        torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("arch", [TINY, RICH])
def test_features_stay_channels_last_from_end_to_end(arch, batch):
    strays = []

    def look(module, _, out):
        if isinstance(out, torch.Tensor) and out.ndim == 4 and not out.is_contiguous(memory_format=torch.channels_last):
            strays.append(type(module).__name__)

    x = normal(batch, 4, 8, 12).to(memory_format=torch.channels_last)
    for net in (lively(UNet(arch, 4, 8)), lively(Encoder(arch, 4, 2, (8, 12)))):
        net.to(memory_format=torch.channels_last)
        for module in net.modules():
            module.register_forward_hook(look)
        net(x, torch.full((batch,), 7))
    assert strays == []


@pytest.mark.parametrize("arch", [TINY, RICH])
def test_the_fused_norm_gives_what_plain_torch_gives(arch, monkeypatch):
    x, t = normal(2, 4, 8, 12), torch.tensor([7, 700])
    nets = lively(UNet(arch, 4, 8)), lively(Encoder(arch, 4, 2, (8, 12)))
    fused = [net(x, t) for net in nets]
    monkeypatch.setattr(unet, "group_norm_silu", norm_reference)
    for net, out in zip(nets, fused, strict=True):
        torch.testing.assert_close(net(x, t), out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arch", [TINY, RICH])
def test_every_weight_learns_alike_with_the_fused_norm(arch, monkeypatch):
    x, t = normal(2, 2, 8, 8), torch.tensor([7, 700])

    def gradients():
        net = lively(UNet(arch, 2, 2)).requires_grad_(True)
        return torch.autograd.grad(net(x, t).square().sum(), net.parameters())

    fused = gradients()
    monkeypatch.setattr(unet, "group_norm_silu", norm_reference)
    plain = gradients()
    largest = max(gradient.abs().max().item() for gradient in plain)
    for one, other in zip(fused, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6 * largest)


def test_the_fused_norm_is_a_group_norm_to_whoever_looks_for_its_weights():
    net = UNet(TINY, 1, 1)
    assert {"norm_out.weight", "norm_out.bias", "down.middle0.norm2.weight"} <= net.state_dict().keys()
    assert all(isinstance(module, torch.nn.GroupNorm) for module in (net.norm_out, net.down.middle0.norm1))


@pytest.mark.parametrize("pool", POOLS)
def test_a_frozen_guide_has_a_gradient_over_the_pixels_alone(pool):
    net = lively(Encoder(replace(RICH, pool=pool), 2, 1, (8, 8))).double()
    x, t, direction = normal(2, 2, 8, 8).double(), torch.tensor([4, 400]), normal(2, 2, 8, 8, seed=1).double()
    seen = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(net(seen, t).sum(), seen)
    step = 1e-6 * direction
    slope = (net(x + step, t) - net(x - step, t)).sum() / 2e-6
    assert (gradient * direction).sum().item() == pytest.approx(slope.item(), rel=1e-5)
    assert all(parameter.grad is None for parameter in net.parameters())


def test_the_gradient_of_a_frozen_unet_reaches_the_pixels():
    net, x = lively(UNet(TINY, 1, 1)), normal(1, 1, 8, 8).requires_grad_()
    (gradient,) = torch.autograd.grad(net(x, torch.tensor([9])).sum(), x)
    assert gradient.isfinite().all()
    assert gradient.count_nonzero() == gradient.numel()


def test_weights_move_between_networks_by_name():
    first, second = lively(UNet(RICH, 2, 4)), UNet(RICH, 2, 4)
    second.load_state_dict(first.state_dict())
    x, t = normal(1, 2, 8, 8), torch.tensor([3])
    assert torch.equal(first(x, t), second(x, t))


@pytest.mark.parametrize(
    ("arch", "factor"), [(TINY, 2), (replace(TINY, stem=2), 4), (replace(TINY, mult=(1, 1, 2, 3)), 8)]
)
def test_sides_must_be_divisible_by_the_factor(arch, factor):
    assert arch.factor() == factor
    net, t = UNet(arch, 1, 1), torch.tensor([0])
    assert net(normal(1, 1, factor, 3 * factor), t).shape == (1, 1, factor, 3 * factor)
    with pytest.raises(RuntimeError, match=r"[Ss]ize|divisible"):
        net(normal(1, 1, 3 * factor + 1, 3 * factor), t)


def test_the_attention_pool_is_built_for_one_size():
    net = Encoder(TINY, 1, 1, (8, 12))
    assert net.head.position.shape == (64, 4 * 6 + 1)
    with pytest.raises(RuntimeError, match="size"):
        net(normal(1, 1, 8, 8), torch.tensor([0]))


@pytest.mark.parametrize("network", ["unet", "mean", "attention", "spatial", "spatial-norm"])
def test_slopes_too_flat_to_matter_are_cut_before_they_become_subnormal(network):
    net = UNet(TINY, 4, 1) if network == "unet" else Encoder(replace(TINY, pool=network), 4, 1, (8, 8))
    net, t = lively(net), torch.tensor([400])

    def gradient(steepness):
        x = normal(1, 4, 8, 8).requires_grad_()
        return torch.autograd.grad((net(x, t).double() * steepness).sum(), x)[0]

    assert torch.equal(gradient(1e-26), torch.zeros(1, 4, 8, 8))
    torch.testing.assert_close(gradient(1e-20) * 1e20, gradient(1.0), rtol=1e-4, atol=1e-6)
    net.train()
    assert gradient(1e-26).abs().max() > 0, "what learns is told everything"


@pytest.mark.parametrize("kind", ["unet", "encoder"])
def test_a_network_that_computes_in_half_precision_answers_in_that_of_the_images(kind):
    spec = preset("small-64").spec("regress", ("a", "b"))
    net = (spec.build_unet(2) if kind == "unet" else spec.build_encoder(2)).eval()
    x, t = torch.randn(1, 2, *spec.size), torch.zeros(1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert net(x, t).dtype == torch.float32
